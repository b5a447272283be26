"""When is the second pass paid for?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol, final

from torch import Tensor

from .. import vectors
from ..vectors import Space


@final
@dataclass(frozen=True)
class Reuse:
    """What the steps between two full ones do with the sharpness component of the last (LookSAM, arXiv:2203.02714).

    At a full step g_v = g_s − (⟨g, g_s⟩/‖g‖²) g is kept; the others use g + α (‖g‖/‖g_v‖) g_v. ``per_tensor`` takes
    these products and norms tensor by tensor, as some implementations do; the paper's are over the whole vector.
    """

    alpha: float = 0.7
    per_tensor: bool = False

    def component(self, space: Space, perturbed: Sequence[Tensor], gradient: Sequence[Tensor]) -> list[Tensor]:
        """g_v, the part of g_s orthogonal to g."""
        out = [t.clone() for t in perturbed]
        for one, g, v in self._parts(space, gradient, out):
            vectors.combine(1.0, v, -one.share(v, g), g)
        return out

    def add(self, space: Space, gradient: Sequence[Tensor], component: Sequence[Tensor]) -> None:
        """g ← g + α (‖g‖/‖g_v‖) g_v."""
        for one, g, v in self._parts(space, gradient, component):
            vectors.combine(1.0, g, self.alpha * vectors.ratio(one.norm(g), one.norm(v)), v)

    def _parts(self, space: Space, a: Sequence[Tensor], b: Sequence[Tensor]
               ) -> Iterator[tuple[Space, Sequence[Tensor], Sequence[Tensor]]]:
        if not self.per_tensor:
            yield space, a, b
            return
        for parameter, x, y in zip(space.parameters, a, b, strict=True):
            yield Space([parameter]), [x], [y]


class Cadence(Protocol):
    """``cadence(t)`` says whether step t, counted from 0, takes the second pass.

    ``reuse`` says what the other steps do with the last full one; None: they are plain steps. ``counts_steps`` says
    whether the number of the step has to be saved.
    """

    @property
    def counts_steps(self) -> bool: ...
    @property
    def reuse(self) -> Reuse | None: ...

    def __call__(self, step: int) -> bool: ...


@final
@dataclass(frozen=True)
class EveryStep:
    """Every step takes both passes."""

    counts_steps = False

    @property
    def reuse(self) -> Reuse | None:
        return None

    def __call__(self, step: int) -> bool:
        return True


@final
@dataclass(frozen=True)
class Every:
    """Every k-th step takes both passes, the first one included; the others are plain, or ``reuse`` the last."""

    k: int = 5
    reuse: Reuse | None = None
    counts_steps = True

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k must be at least 1, got {self.k}")

    def __call__(self, step: int) -> bool:
        return step % self.k == 0


@final
@dataclass(frozen=True)
class WarmStart:
    """The first ``steps`` steps are plain, then ``then`` takes over (its own count starts there)."""

    steps: int
    then: Cadence = field(default_factory=EveryStep)
    counts_steps = True

    @property
    def reuse(self) -> Reuse | None:
        return self.then.reuse

    def __call__(self, step: int) -> bool:
        return step >= self.steps and self.then(step - self.steps)
