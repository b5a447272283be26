"""What makes a sharpness number less than it seems, each as a warning with a name that can be filtered."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..objective import Objective


class SharpnessWarning(UserWarning):
    """A sharpness number that is less than it seems; the base of the warnings below."""


class SmallBatchWarning(SharpnessWarning):
    """Fewer samples than the table of batch sizes asks for: the number is noisy."""


class MissingGradientWarning(SharpnessWarning):
    """Parameters that the loss does not depend on: they count as flat."""


class TrainingModeWarning(SharpnessWarning):
    """Evaluated in training mode: dropout and batch statistics are part of what is measured."""


class LossNearZeroWarning(SharpnessWarning):
    """A loss near zero: gradients and curvature vanish with it whatever the shape of the function."""


class RoundingWarning(SharpnessWarning):
    """The rise of the loss, or the step taken, is within the rounding of the numbers it is made of."""


class DifferentScaleWarning(SharpnessWarning):
    """Plain measures of differently scaled models: the comparison is of units, not of flatness."""


BATCH_SIZES = (  # (parameters below, least, recommended, best number of samples)
    (1e9, 8, 16, 32),
    (3e9, 4, 8, 16),
    (7e9, 2, 4, 8),
    (math.inf, 1, 2, 4),
)

NEAR_ZERO = 1e-4


def batch_sizes(parameters: int) -> tuple[int, int, int]:
    """How many samples a measurement should see: (least, recommended, best), by the number of parameters.

    >>> batch_sizes(25_000_000), batch_sizes(1_500_000_000)
    ((8, 16, 32), (4, 8, 16))
    """
    return next((least, good, best) for limit, least, good, best in BATCH_SIZES if parameters < limit)


def samples_in(batch: Any) -> int:
    """How many samples a batch holds: the length of its first tensor."""
    first = next((t for t in tree_leaves(dict(batch) if hasattr(batch, "keys") else batch) if isinstance(t, Tensor)),
                 None)
    return first.shape[0] if first is not None and first.dim() else 1


def warn_of(objective: Objective, *, loss: float, samples: int | None = None, missing: list[str] | None = None,
            stacklevel: int = 3) -> list[str]:
    """Warn of everything that applies; the names of the warnings, for the record."""
    found: list[tuple[type[SharpnessWarning], str]] = []
    size = sum(p.numel() for p in objective.parameters)
    least, good, best = batch_sizes(size)
    if samples is not None and samples < least:
        found.append((SmallBatchWarning, f"{samples} samples for {size} parameters: at least {least} are needed for a "
                                         f"stable number, {good} are better, {best} are enough"))
    if missing:
        some = ", ".join(missing[:4]) + (", ..." if len(missing) > 4 else "")
        found.append((MissingGradientWarning, f"the loss does not depend on {len(missing)} parameters ({some}); they "
                                              "count as flat. Freeze them, or check that they are used"))
    if objective.mode == "train" or objective.mode == "as_is" and any(m.training for m in objective.model.modules()):
        found.append((TrainingModeWarning, "the model is evaluated in training mode, so dropout and batch statistics "
                                           'are part of what is measured; mode="eval" measures the model that is used'))
    if abs(loss) < NEAR_ZERO:
        found.append((LossNearZeroWarning, f"the loss is {loss:.2g}: gradient and curvature of a cross-entropy vanish "
                                           "with it, so a small number need not mean a flat function, and dividing by "
                                           "the loss means nothing"))
    for kind, text in found:
        warnings.warn(text, kind, stacklevel=stacklevel + 1)
    return [kind.__name__ for kind, _ in found]


def warn_of_rounded_step(objective: Objective, realised: Sequence[Tensor], stacklevel: int = 3) -> \
        tuple[float, list[str]]:
    """The share of the length asked for that half-precision weights really moved, and a warning where much was lost.

    ``realised`` is what displacements noted (:class:`flatmin.perturbed.Displacement`): nothing in full precision.
    """
    if not realised:
        return 1.0, []
    sums = torch.stack([t.cpu() for t in realised]).sum(0).double().tolist()
    asked, done, both = objective.ranks.total(*sums) if objective.ranks.in_step else sums
    cosine = both / math.sqrt(asked * done) if asked * done > 0 else 0.0
    ratio = math.sqrt(done / asked) if asked > 0 else 0.0
    if abs(ratio - 1) <= 0.1 and cosine >= 0.95:
        return ratio, []
    warnings.warn(f"half-precision weights rounded the step: {100 * ratio:.0f} % of its length is left, at a cosine of "
                  f"{cosine:.2f} to the direction asked for. Measure a float32 copy, or take a larger step",
                  RoundingWarning, stacklevel=stacklevel + 1)
    return ratio, ["RoundingWarning"]


def warn_of_rounding(objective: Objective, rise: float, loss: float, expected: float = 0.0,
                     stacklevel: int = 3) -> list[str]:
    """Warn where a rise of the loss is not much larger than the rounding of the losses it is a difference of.

    No rise at all is nothing to warn of, unless one was ``expected``.
    """
    eps = max((torch.finfo(p.dtype).eps for p in objective.parameters), default=0.0)
    if rise == expected == 0 or abs(rise) > 10 * eps * abs(loss):
        return []
    warnings.warn(f"the loss changes by {rise:.1e}, which is within the rounding of a loss of {loss:.3g} in "
                  f"{str(objective.parameters[0].dtype).removeprefix('torch.')}: take a larger rho, or float64",
                  RoundingWarning, stacklevel=stacklevel + 1)
    return ["RoundingWarning"]
