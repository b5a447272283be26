"""Which gradient is kept? Each rule says how the second pass is run and what is made of the two gradients.

g is the gradient at w, g_p the one of the second pass. ``second`` names the second pass: "loss" evaluates L at w + ε,
"frozen" back-propagates the output gradient of the first pass through the network at w + ε, "logit" the output
gradient found at w + ε through the network at w.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, final

from torch import Tensor

from ..vectors import Space


class Rule(Protocol):
    """``rule(space, perturbed, gradient)`` turns g_p in place into the gradient to descend on."""

    second: ClassVar[str]
    needs_gradient: ClassVar[bool]

    def __call__(self, space: Space, perturbed: Sequence[Tensor], gradient: Sequence[Tensor]) -> None: ...


@final
@dataclass(frozen=True)
class Plain:
    """∇L(w + ε) (arXiv:2010.01412, eq. 3)."""

    second: ClassVar[str] = "loss"
    needs_gradient: ClassVar[bool] = False

    def __call__(self, space: Space, perturbed: Sequence[Tensor], gradient: Sequence[Tensor]) -> None:
        pass
