"""Sharpness-aware gradients: a product of small parts.

direction   where is uphill?            Gradient, Adaptive, Layerwise, Fisher, Preconditioned, Momentum, Friendly,
                                        Random, RandomFraction, WithWeightDecay
rule        which gradient is kept?     Plain, Functional, LogitOnly, SurrogateGap, Weighted, Selected
cadence     when is it paid for?        EveryStep, Every (with Reuse), WarmStart
rho         how far?                    a number, LinearRho, RhoFollowsLearningRate; by_depth for groups
façade      torch.optim.Optimizer       SAM, ASAM, LookSAM, EfficientSAM, MomentumSAM, MemoryEfficientSAM
"""

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
from .facade import ASAM, SAM, EfficientSAM, LookSAM, MemoryEfficientSAM, MomentumSAM
from .parameters import by_depth
from .rules import Functional, LogitOnly, Plain, Selected, SurrogateGap, Weighted
from .schedules import LinearRho, RhoFollowsLearningRate
from .sharpener import Sharpener

__all__ = [
    "ASAM", "SAM", "Adaptive", "EfficientSAM", "Every", "EveryStep", "Fisher", "Friendly", "Functional", "Gradient",
    "Layerwise", "LinearRho", "LogitOnly", "LookSAM", "MemoryEfficientSAM", "Momentum", "MomentumSAM", "Plain",
    "Preconditioned", "Random", "RandomFraction", "Reuse", "RhoFollowsLearningRate", "Selected", "Sharpener",
    "SurrogateGap", "WarmStart", "Weighted", "WithWeightDecay", "by_depth", "presets",
]
