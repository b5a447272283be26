"""What one step did, read from the two passes it made anyway."""

from __future__ import annotations

import math
import warnings
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..parallel import local

Key = TypeVar("Key", bound=Hashable)

MEASURED = ("loss", "perturbed_loss", "gradient_norm", "perturbed_gradient_norm", "radius", "cosine")


@dataclass
class Outcome:
    """What a step came to, on the device: nothing of it has been read yet."""

    overflow: Tensor  # whether inf or nan was met in a pass
    passes: int = 1
    loss: Tensor | None = None
    perturbed_loss: Tensor | None = None
    gradient_norm: Tensor | None = None
    perturbed_gradient_norm: Tensor | None = None
    radius: Tensor | float = 0.0
    cosine: Tensor | float | None = None
    gradients: dict[int, Tensor] = field(default_factory=dict)  # g by parameter, where the cadence re-uses it
    memory: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)  # for later steps, by kind and name


def accumulate(total: dict[Key, Tensor], new: Mapping[Key, Tensor], weight: float) -> None:
    """total ← total + weight · new."""
    for key, tensor in new.items():
        if key in total:
            local(total[key]).add_(local(tensor), alpha=weight)
        else:
            total[key] = tensor * weight


class MemoryMean:
    """Mean over micro-batches of what a direction keeps, with weights that sum to one.

    A micro-batch that does not reach a parameter leaves what is kept of it as it was before the step; where there was
    nothing, the mean is over the others.
    """

    def __init__(self, before: Mapping[str, Mapping[str, Tensor]]):
        self._before = before
        self._sums: dict[str, dict[str, Tensor]] = {}
        self._weights: dict[tuple[str, str], list[float]] = {}
        self._count = 0

    def add(self, memory: Mapping[str, Mapping[str, Tensor]], weight: float) -> None:
        self._count += 1
        for kind, tensors in memory.items():
            accumulate(self._sums.setdefault(kind, {}), tensors, weight)
            for name in tensors:
                self._weights.setdefault((kind, name), []).append(weight)

    def result(self) -> dict[str, dict[str, Tensor]]:
        for (kind, name), weights in self._weights.items():
            total, share = self._sums[kind][name], sum(weights)
            if len(weights) == self._count:
                continue
            if name in self._before.get(kind, {}):
                total.add_(self._before[kind][name], alpha=1 - share)
            elif share:
                total.div_(share)
        return self._sums


def merged(outcomes: Sequence[tuple[float, Outcome]]) -> Outcome:
    """Of the micro-batches of a step: weighted sums of losses, plain means of norms, and any overflow."""
    parts = [outcome for _, outcome in outcomes]
    out = Outcome(torch.stack([o.overflow for o in parts]).any(), max(o.passes for o in parts))
    for name in ("loss", "perturbed_loss"):
        values = [getattr(o, name) for o in parts]
        if all(v is not None for v in values):
            setattr(out, name, sum(w * v for (w, _), v in zip(outcomes, values, strict=True)))
    for name in ("gradient_norm", "radius", "cosine"):
        values = [v for o in parts if (v := getattr(o, name)) is not None]
        setattr(out, name, sum(values) / len(values) if values else None)
    return out


class StepRecord:
    """Telemetry of a step. Values stay on the device until read: each property is a float and costs one transfer.

    ``loss`` at w; ``perturbed_loss`` at w + ε (all that a step of one pass there knows); ``sharpness``, their
    difference; ``gradient_norm`` ‖g‖₂ at w over the parameters that may move; ``perturbed_gradient_norm`` ‖·‖₂ of the
    gradient that the step computed, for a sharpener made with ``perturbed_norm=True``; ``radius`` of the step really
    taken, in the direction's own norm; ``cosine`` between the step taken and the one asked for; ``skipped``, whether an
    overflow was found; ``passes`` taken. nan where a step has no such quantity, or was not asked for it.
    """

    __slots__ = ("_values", "passes", "skipped")

    def __init__(self, passes: int = 0, skipped: bool = False,
                 values: Mapping[str, Tensor | float | None] | None = None):
        self.passes, self.skipped = passes, skipped
        self._values = dict(values or {})

    @classmethod
    def of(cls, outcome: Outcome, skipped: bool) -> StepRecord:
        return cls(outcome.passes, skipped, {name: getattr(outcome, name) for name in MEASURED})

    def _read(self, name: str) -> float:
        value = self._values.get(name)
        return math.nan if value is None else float(value)

    @property
    def loss(self) -> float:
        return self._read("loss")

    @property
    def perturbed_loss(self) -> float:
        return self._read("perturbed_loss")

    @property
    def sharpness(self) -> float:
        return self.perturbed_loss - self.loss

    @property
    def gradient_norm(self) -> float:
        return self._read("gradient_norm")

    @property
    def perturbed_gradient_norm(self) -> float:
        return self._read("perturbed_gradient_norm")

    @property
    def radius(self) -> float:
        return self._read("radius")

    @property
    def cosine(self) -> float:
        return self._read("cosine")

    @property
    def rounded(self) -> bool:
        """Whether the weights' precision may have rounded the step."""
        return isinstance(self._values.get("cosine"), Tensor)

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain numbers; nan where a step has none."""
        names = ("loss", "perturbed_loss", "sharpness", "gradient_norm", "perturbed_gradient_norm", "radius", "cosine")
        return {n: getattr(self, n) for n in names} | {"skipped": self.skipped, "passes": self.passes}

    def __repr__(self) -> str:
        return "StepRecord(" + ", ".join(f"{k}={v}" for k, v in self.to_dict().items()) + ")"

    def __reduce__(self) -> tuple[Any, ...]:
        return StepRecord, (self.passes, self.skipped, {name: self._read(name) for name in self._values})


def warn_of_skip() -> bool:
    """Say that a step was skipped; True, for callers that say it once."""
    warnings.warn("a loss or gradient of this step is inf or NaN: every p.grad is None now and optimizers skip the "
                  "step; last.skipped says so from here on. Look at the batch, the learning rate or the radius",
                  stacklevel=4)
    return True


def warn_of_rounding(record: StepRecord) -> bool:
    """Say that a step was rounded away, if it was; whether it was."""
    if not record.cosine < 0.95:
        return False
    warnings.warn(f"half-precision weights rounded the step away: radius {record.radius:.3g}, cosine "
                  f"{record.cosine:.2f} with the step asked for. Keep float32 weights and compute in half precision "
                  "(torch.autocast, or FSDP2's MixedPrecisionPolicy(param_dtype=...)).", stacklevel=4)
    return True
