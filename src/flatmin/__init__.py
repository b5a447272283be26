"""Train to flat minima, and prove that they are flat.

Train
    Sharpener        sharpness-aware gradients for any optimizer
    presets          the SAM family by name: sam, asam, looksam, functional_sam, ...
    SAM              the drop-in torch.optim.Optimizer
    ascent           the parts they are made of: directions, rules, cadences

Measure
    Objective        a model and a loss bound to data
    curvature        Hessian, Gauss-Newton, Fisher; eigenpairs, traces, densities
    sharpness        one-step sharpness and its relatives
    landscape        the loss along lines and over planes
    paths            the logit path and the functional path of sharpness
    generalization   calibration, robustness of weights, PAC-Bayes bounds

Runs
    load             the record, weights and log of a run folder

Use elsewhere
    recipes          models and data for ``flatmin compare``, and the class for your own
    tensorscope      the names and signatures of the TensorScope pipeline
    compat           the names and signatures of the most used SAM classes and functions
    measures         the table of all measures, with their cost

Each name is imported when it is first used, so that ``import flatmin`` takes no time.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import (
        ascent,
        compat,
        curvature,
        generalization,
        landscape,
        measures,
        paths,
        presets,
        recipes,
        sharpness,
        tensorscope,
    )
    from .ascent import SAM, Sharpener
    from .objective import Objective
    from .training.folder import load

__version__ = "0.1.0"

__all__ = [
    # train
    "Sharpener", "presets", "SAM", "ascent",
    # measure
    "Objective", "curvature", "sharpness", "landscape", "paths", "generalization",
    # runs
    "load",
    # use elsewhere
    "recipes", "tensorscope", "compat", "measures",
]

_INSIDE = {"Sharpener": "ascent", "SAM": "ascent", "Objective": "objective", "load": "training.folder"}
_OTHER_MODULES = ("errors", "results", "vectors", "objective", "linalg", "training", "jobs", "report", "perturbed",
                  "batches", "evaluation")


def __getattr__(name: str) -> Any:
    if name not in (*__all__, *_OTHER_MODULES):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f".{_INSIDE.get(name, name)}", __name__)
    globals()[name] = found = getattr(module, name) if name in _INSIDE else module
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
