"""Warnings about sharpness numbers, each a class of its own so that it can be filtered."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from ..batches import samples_in
from ..evaluation import Pass
from ..objective import Objective
from ..results import FEWEST_BATCHES, uncertain

__all__ = ["DifferentScaleWarning", "DisagreementWarning", "LossNearZeroWarning", "MissingGradientWarning",
           "RoundingWarning", "SharpnessWarning", "SmallBatchWarning", "TrainingModeWarning", "data_size", "samples_in",
           "warn_of", "warn_of_rounded_step", "warn_of_rounding"]


class SharpnessWarning(UserWarning):
    """A sharpness number that does not mean what it seems to; the base of the warnings below."""


class SmallBatchWarning(SharpnessWarning):
    """Other data would give another number: a large standard error over batches, or too few data to give one."""


class MissingGradientWarning(SharpnessWarning):
    """Parameters that the loss does not depend on: they count as flat."""


class TrainingModeWarning(SharpnessWarning):
    """Evaluated in training mode: dropout and batch statistics are part of what is measured."""


class LossNearZeroWarning(SharpnessWarning):
    """A loss near zero: gradients and curvature vanish with it whatever the shape of the function."""


class RoundingWarning(SharpnessWarning):
    """The rise of the loss, or the step taken, is within the rounding of the numbers it is made of."""


class DifferentScaleWarning(SharpnessWarning):
    """Plain measures of differently scaled models: they compare the scale of weights, not flatness."""


class DisagreementWarning(SharpnessWarning):
    """Sharpness and the Hessian do not agree where they should."""


FEWEST_SAMPLES = 8
NEAR_ZERO = 1e-4


def warn_of(objective: Objective, at: Pass, *, value: float = math.nan, data_stderr: float = math.nan,
            stacklevel: int = 3) -> list[str]:
    """Warn of everything that applies to a number measured with the pass ``at``; the names, for the record.

    ``value`` and ``data_stderr`` are the number and its standard error over batches, where there are enough of them.
    """
    found: list[tuple[type[SharpnessWarning], str]] = []
    missing, loss = at.missing, float(at.loss)
    count, unit = data_size(objective, at)
    if not math.isnan(data_stderr):
        if 2 * data_stderr > abs(value):
            found.append((SmallBatchWarning, f"the value is {uncertain(value, data_stderr)}, with its standard error "
                                             "over batches: other data of this size may give another sign. Measure on "
                                             "more data"))
    elif count < FEWEST_SAMPLES:
        found.append((SmallBatchWarning, f"measured on {count:g} {unit}, in fewer than {FEWEST_BATCHES} batches: how "
                                         "much the number would change with other data is not known. Pass more data, "
                                         f"in {FEWEST_BATCHES} batches or more, for its standard error"))
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


def data_size(objective: Objective, at: Pass) -> tuple[float, str]:
    """How many data a number was measured on and in what: tokens of a causal language model, else samples."""
    if objective.counts_tokens:
        return objective.ranks.total(math.fsum(at.weights))[0], "tokens"
    return at.samples, "samples"


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


def warn_of_rounding(at: Pass, rise: float, expected: float = 0.0, stacklevel: int = 3) -> list[str]:
    """Warn where the rounding of two losses may be more than one per cent of their difference.

    No rise at all is nothing to warn of, unless one was ``expected``.
    """
    eps, loss = at.eps, float(at.loss)
    if rise == expected == 0 or abs(rise) > 100 * eps * abs(loss):
        return []
    off = f"about {100 * eps * abs(loss / rise):.0f} %" if abs(rise) > eps * abs(loss) else "more than all of it"
    warnings.warn(f"the loss changes by {rise:.1e}, of which {off} is within the rounding of a loss of {loss:.3g} to "
                  f"{eps:.1e}: take a larger rho, or float64", RoundingWarning, stacklevel=stacklevel + 1)
    return ["RoundingWarning"]
