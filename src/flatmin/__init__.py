"""Train to flat minima, and prove that they are flat.

Descend     Sharpener             sharpness-aware gradients for any optimizer
            presets               the SAM family by name: sam, asam, looksam, functional_sam, ...
            SAM                   the drop-in torch.optim.Optimizer
Measure     Objective             a model and a loss bound to data
            flatmin.curvature     Hessian, Gauss-Newton, Fisher; eigenpairs, traces, densities
            flatmin.sharpness     one-step sharpness and its relatives
            flatmin.landscape     the loss along lines and over planes
            flatmin.paths         the logit path and the functional path of sharpness
            flatmin.generalization  calibration, robustness of weights, PAC-Bayes bounds
"""

from . import presets
from .ascent import SAM, Sharpener
from .objective import Objective

__version__ = "0.1.0"

__all__ = ["SAM", "Objective", "Sharpener", "presets"]
