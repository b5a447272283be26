"""What one step did, read from the two passes it made anyway."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..results import plain


class StepRecord:
    """Telemetry of a step. Values stay on the device until read: each property is a float and costs one transfer.

    ``loss`` at w; ``perturbed_loss`` at w + ε (all that a step of one pass there knows); ``sharpness``, their
    difference; ``gradient_norm`` ‖g‖₂ at w over the parameters that move; ``perturbed_gradient_norm`` ‖·‖₂ of the
    gradient left in ``p.grad``, while it is there unchanged; ``radius`` of the step really taken, in the direction's
    own norm; ``cosine`` between the step taken and the one asked for; ``skipped``, whether an overflow was found;
    ``passes`` taken. nan where a step has no such quantity.
    """

    __slots__ = ("_left_norm", "_values", "passes", "skipped")

    def __init__(self, passes: int, skipped: bool, left_norm: Callable[[], float] | None = None,
                 **values: Tensor | float | None):
        self.passes = passes
        self.skipped = skipped
        self._values = values
        self._left_norm = left_norm

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
        return math.nan if self._left_norm is None else self._left_norm()

    @property
    def radius(self) -> float:
        return self._read("radius")

    @property
    def cosine(self) -> float:
        return self._read("cosine")

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain numbers."""
        names = ("loss", "perturbed_loss", "sharpness", "gradient_norm", "perturbed_gradient_norm", "radius", "cosine")
        return plain({n: getattr(self, n) for n in names} | {"skipped": self.skipped, "passes": self.passes})

    def __repr__(self) -> str:
        return "StepRecord(" + ", ".join(f"{k}={v}" for k, v in self.to_dict().items()) + ")"
