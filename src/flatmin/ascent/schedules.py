"""How ρ changes over the steps. A schedule is called as ``rho(step, lr)``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final


@final
@dataclass(frozen=True)
class LinearRho:
    """ρ from ``start`` to ``end`` over ``steps`` steps, constant after."""

    start: float
    end: float
    steps: int

    def __call__(self, step: int, lr: float | None) -> float:
        return self.start + (self.end - self.start) * min(1.0, step / max(1, self.steps))


@final
@dataclass(frozen=True)
class RhoFollowsLearningRate:
    """ρ = ρ_min + (ρ_max − ρ_min)(lr − lr_min)/(lr_max − lr_min) (GSAM's schedule, arXiv:2203.08065).

    Needs ``optimizer=``; the learning rate is the one of its first group.
    """

    rho_max: float
    rho_min: float
    lr_max: float
    lr_min: float = 0.0

    def __call__(self, step: int, lr: float | None) -> float:
        if lr is None:
            raise ValueError("a radius that follows the learning rate needs optimizer=")
        share = (float(lr) - self.lr_min) / (self.lr_max - self.lr_min)
        return self.rho_min + (self.rho_max - self.rho_min) * min(1.0, max(0.0, share))


@final
@dataclass(frozen=True)
class Late:
    """ρ = 0 before step ``first``, and ``rho`` (a number, or another schedule) from there on."""

    rho: float | Callable[[int, float | None], float]
    first: int

    def __call__(self, step: int, lr: float | None) -> float:
        if step < self.first:
            return 0.0
        return float(self.rho(step, lr) if callable(self.rho) else self.rho)
