"""Sharpness while a model trains, every n steps, sent to a logger."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..curvature.measure_functions import MEASURES as OF_CURVATURE
from ..measures import Options, offered
from ..objective import Objective
from .measure_functions import MEASURES as OF_SHARPNESS
from .measure_functions import learning_rate

Measure = Callable[[Objective], Any]
_TABLE = {**OF_CURVATURE, **OF_SHARPNESS}
COSTS = {name: _TABLE[name].cost_for("monitor") for name in offered("monitor")}
"""What a measurement takes, in forward (F), backward (B) and Hessian-vector (H) passes over the data."""


class SharpnessMonitor:
    """Measures every ``every`` steps of a training loop and logs the numbers.

    The objective should be over a fixed batch or two, apart from the training data's order. A measurement leaves
    weights, gradients, buffers, modes and random state bit for bit, so a monitored run is the same run. ``overhead``,
    the share of wall time that measuring has taken since the first step, is logged with the numbers; ``COSTS`` says
    beforehand what a measure takes. A number that is not finite (an infinite "critical_sharpness", say) is kept in
    ``history`` with a ``note``, and is not sent to the logger.

    Args:
        objective: what is measured, over the model that is being trained.
        measures: names from ``COSTS``, or a mapping of names to functions of the objective that give a number.
        every: steps between measurements; the first is at the first step.
        logger: anything with one of these methods, the first of them is called: ``log_metrics(values, step=...)`` (a
            logger of Lightning, the module ``mlflow``), ``log_dict(values)`` (a LightningModule), ``log(values,
            step=...)`` (a W&B run, an Accelerator), ``add_scalar(name, value, step)`` (a TensorBoard writer). A
            method that takes no step gets it among the values, as ``prefix`` + "step". None keeps ``history`` alone.
        optimizer: its learning rate goes into "edge_of_stability" and "critical_sharpness", and its own next update
            is the direction of the latter while ``.grad`` is there.
        rho: the radius.
        prefix: before every name.

    Raises:
        ValueError: an unknown measure, a logger without any of these methods, "edge_of_stability" without an optimizer.

    >>> model = torch.nn.Linear(2, 3)
    >>> objective = Objective(model, torch.nn.CrossEntropyLoss(), (torch.randn(8, 2), torch.zeros(8, dtype=torch.long)))
    >>> monitor = SharpnessMonitor(objective, ["one_step"], every=10)
    >>> seen = [monitor.step() for _ in range(20)]          # in the loop, after optimizer.step()
    >>> [sorted(values) for values in seen if values]
    [['sharpness/one_step', 'sharpness/overhead'], ['sharpness/one_step', 'sharpness/overhead']]
    """

    def __init__(self, objective: Objective, measures: Sequence[str] | Mapping[str, Measure] = ("one_step",), *,
                 every: int = 100, logger: Any = None, optimizer: torch.optim.Optimizer | None = None,
                 rho: float = 0.05, prefix: str = "sharpness/"):
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        self.objective, self.every, self.optimizer, self.rho, self.prefix = objective, every, optimizer, rho, prefix
        self.measures = dict(measures) if isinstance(measures, Mapping) else {m: self._named(m) for m in measures}
        self.history: list[dict[str, Any]] = []
        self._send = _sender(logger, prefix)
        self._count, self._spent, self._begun = 0, 0.0, math.nan

    @property
    def overhead(self) -> float:
        """The share of wall time since the first step that went into measuring."""
        total = time.perf_counter() - self._begun
        return self._spent / total if total > 0 else 0.0

    def step(self, step: int | None = None) -> dict[str, float] | None:
        """Count one training step; measure and log where it is its turn. ``step`` is the number it is logged under."""
        count, self._count = self._count, self._count + 1
        if count == 0:
            self._begun = time.perf_counter()
        return self.measure(count if step is None else step) if count % self.every == 0 else None

    def measure(self, step: int) -> dict[str, float]:
        """Measure and log now, whatever the step."""
        start = time.perf_counter()
        if math.isnan(self._begun):
            self._begun = start
        values = {self.prefix + name: float(measure(self.objective)) for name, measure in self.measures.items()}
        self._spent += time.perf_counter() - start
        values[self.prefix + "overhead"] = self.overhead
        left_out = [name for name, value in values.items() if not math.isfinite(value)]
        note = {"note": f"not finite, so not sent to the logger: {', '.join(left_out)}"} if left_out else {}
        self.history.append({"step": step, **values, **note})
        self._send({name: value for name, value in values.items() if math.isfinite(value)}, step)
        return values

    def state_dict(self) -> dict[str, Any]:
        return {"count": self._count, "history": [dict(row) for row in self.history]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume counting from a saved monitor; wall time is counted from here."""
        self._count, self.history = int(state["count"]), [dict(row) for row in state["history"]]
        self._spent, self._begun = 0.0, time.perf_counter()

    def _named(self, name: str) -> Measure:
        if name not in COSTS:
            raise ValueError(f"unknown measure {name!r}: choose from {', '.join(COSTS)}, or pass a mapping of names "
                             "to functions of the objective")
        options = Options(rho=self.rho, quick=True, optimizer=self.optimizer)
        if name == "edge_of_stability":
            learning_rate(options)
        return lambda objective: _TABLE[name](objective, options)


def _sender(logger: Any, prefix: str) -> Callable[[dict[str, float], int], Any]:
    """How to hand numbers to a logger; where its function takes no step, the step is one of the numbers."""
    if logger is None:
        return lambda values, step: None
    for name in ("log_metrics", "log_dict", "log"):
        function = getattr(logger, name, None)
        if callable(function):
            if _takes_step(function):
                return lambda values, step: function(values, step=step)
            return lambda values, step: function({**values, prefix + "step": float(step)})
    if hasattr(logger, "add_scalar"):
        def add(values: dict[str, float], step: int) -> None:
            for name, value in values.items():
                logger.add_scalar(name, value, step)
        return add
    raise ValueError(f"the logger, a {type(logger).__name__}, has none of log_metrics(values, step), "
                     "log_dict(values), log(values, step=...) and add_scalar(name, value, step)")


def _takes_step(function: Callable[..., Any]) -> bool:
    try:
        accepted = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return True
    return any(p.name == "step" or p.kind is p.VAR_KEYWORD for p in accepted)
