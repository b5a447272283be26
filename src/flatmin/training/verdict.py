"""What is wrong with a run, said while it trains."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ..ascent.presets import PRESETS
from ..sharpness import Finding, diagnose
from .methods import METHODS
from .settings import TrainSettings

FIRST = 10
"""Logged steps before the first look."""


class Verdict:
    """Runs ``diagnose`` on the logged steps of a live run, and names each finding once.

    A listener of :class:`~flatmin.training.log.Log`. It looks after 10 logged steps, and again after every further
    quarter (12, 15, 18, ...), so that all looks together cost no more than five of the last.

    Args:
        steps: the run's logged steps, a list that grows; a resumed run's hold the steps before.
        settings: whose ``rho`` the steps should have.
        first: the step at which this run began, after 0 where it was forked from another.
        say: called with each finding.
    """

    def __init__(self, steps: list[dict[str, Any]], settings: TrainSettings, first: int = 0,
                 say: Callable[[Finding], None] = lambda finding: None):
        self.steps, self.settings, self.first, self.say = steps, settings, first, say
        self.named: set[str] = set()
        self.next = FIRST
        own = self._own()
        while self.next <= len(own):
            self._look(own[:self.next])

    def __call__(self, row: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
        own = self._own() if "loss" in row else []
        if len(own) < self.next:
            return []
        found = self._look(own)
        for finding in found:
            self.say(finding)
        return [{"step": row["step"], "finding": finding.to_dict()} for finding in found]

    def _own(self) -> list[dict[str, Any]]:
        return [row for row in self.steps if row["step"] >= self.first]

    def _look(self, steps: Sequence[Mapping[str, Any]]) -> list[Finding]:
        """The findings of these steps that no look before had."""
        self.next += self.next // 4
        found = [f for f in findings(steps, self.settings) if f.name not in self.named and f.name != "too few records"]
        self.named |= {finding.name for finding in found}
        return found


def findings(steps: Sequence[Mapping[str, Any]], settings: TrainSettings,
             evaluations: Sequence[Mapping[str, Any]] = ()) -> list[Finding]:
    """What ``diagnose`` says of logged steps, with what was evaluated on "tune" beside the last step before."""
    rows = [_known(row) for row in steps]
    for evaluation in evaluations:
        before = [row for row in rows if row["step"] < evaluation["step"]]
        if before:
            before[-1].update({k: v for k, v in evaluation.get("tune", {}).items() if k not in before[-1]})
    return diagnose(rows, rho=_length(settings)) if rows else []


def _known(row: Mapping[str, Any]) -> dict[str, Any]:
    """A logged step without what it does not know: numbers that are nan, but for the loss.

    A method of one pass knows no loss at w; the loop logs the loss at w + ε in its place.
    """
    known = {k: v for k, v in row.items() if k == "loss" or not (isinstance(v, float) and math.isnan(v))}
    if "perturbed_loss" in known and row.get("passes") == 1 and "gradient_norm" not in known:
        del known["loss"]
    return known


def _length(settings: TrainSettings) -> float | None:
    """The length that every step should have; None where it is not ρ by definition."""
    if settings.method not in PRESETS or settings.late < 1 or not METHODS[settings.method].steps_by_rho:
        return None
    default = inspect.signature(PRESETS[settings.method]).parameters["rho"].default
    return default if settings.rho is None else settings.rho
