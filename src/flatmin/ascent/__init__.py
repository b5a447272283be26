"""Sharpness-aware gradients: each method is a combination of a direction, a rule and a cadence.

direction   of the perturbation ε       Gradient, Adaptive, Layerwise, Fisher, Preconditioned, Momentum, Friendly,
                                        Random, RandomFraction, WithWeightDecay
rule        the gradient descended on   Plain, Functional, LogitOnly, SurrogateGap, Weighted, Selected
cadence     which steps perturb         EveryStep, Every (with Reuse), WarmStart
rho         the radius of ε             a number, Late, LinearRho, RhoFollowsLearningRate; by_depth for groups
façade      torch.optim.Optimizer       SAM; its relatives, ASAM, LookSAM, ..., are in flatmin.compat
"""

import importlib
from typing import Any

from . import presets
from .cadences import Every, EveryStep, Reuse, WarmStart
from .directions import (
    Adaptive,
    Fisher,
    Friendly,
    Gradient,
    Layerwise,
    Momentum,
    Preconditioned,
    Random,
    RandomFraction,
    WithWeightDecay,
)
from .facade import SAM
from .parameters import by_depth
from .rules import Functional, LogitOnly, Plain, Selected, SurrogateGap, Weighted
from .schedules import Late, LinearRho, RhoFollowsLearningRate
from .sharpener import Sharpener

__all__ = [
    "SAM", "Adaptive", "Every", "EveryStep", "Fisher", "Friendly", "Functional", "Gradient", "Late", "Layerwise",
    "LinearRho", "LogitOnly", "Momentum", "Plain", "Preconditioned", "Random", "RandomFraction", "Reuse",
    "RhoFollowsLearningRate", "Selected", "Sharpener", "SurrogateGap", "WarmStart", "Weighted", "WithWeightDecay",
    "by_depth", "presets",
]


def __getattr__(name: str) -> Any:
    """The classes that live in ``flatmin.compat``, which imports this package, under their earlier address."""
    if name in ("ASAM", "EfficientSAM", "LookSAM", "MemoryEfficientSAM", "MomentumSAM"):
        return getattr(importlib.import_module("flatmin.compat"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
