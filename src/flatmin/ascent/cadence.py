"""When is the second pass paid for?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol, final


class Cadence(Protocol):
    """``cadence(t)`` says whether step t (from 0) takes the second pass; ``reuse`` how strongly its sharpness
    component is added in the steps between (None: not at all)."""

    reuse: float | None

    def __call__(self, step: int) -> bool: ...


@final
@dataclass(frozen=True)
class EveryStep:
    """Every step takes both passes."""

    reuse: ClassVar[float | None] = None

    def __call__(self, step: int) -> bool:
        return True
