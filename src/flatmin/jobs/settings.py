"""What a comparison is asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ..training.methods import find_methods

_KINDS: dict[str, tuple[Any, str]] = {
    **dict.fromkeys(("recipe", "methods", "rho", "data"), (str, "text")),
    **dict.fromkeys(("seeds", "epochs", "threads"), (int, "a whole number")), "noise": ((int, float), "a number"),
}


@dataclass(frozen=True)
class CompareSettings:
    """Settings of a comparison; None takes the recipe's own."""

    recipe: str = "digits"
    methods: str = "sgd,sam,asam"
    seeds: int = 3
    noise: float | None = None
    epochs: int | None = None
    rho: str | None = None
    data: str | None = None
    threads: int = 1

    def __post_init__(self) -> None:
        for name, (kind, what) in _KINDS.items():
            value = getattr(self, name)
            if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
                raise ValueError(f"{name} must be {what}, got {value!r}")
        if self.seeds < 1:
            raise ValueError(f"--seeds must be at least 1, got {self.seeds}")
        if self.epochs is not None and self.epochs < 1:
            raise ValueError(f"--epochs must be at least 1, got {self.epochs}")
        if self.noise is not None and not 0 <= self.noise <= 1:
            raise ValueError(f"--noise is a share from 0 to 1, got {self.noise}")
        if self.threads < 1:
            raise ValueError(f"--threads must be at least 1, got {self.threads}")
        find_methods(self.methods)
        fixed_radii(self.rho)


def fixed_radii(text: str | None) -> dict[str, float]:
    """``"0.1"`` for all methods (under the key ``""``), or ``"sam=0.1,asam=1"``.

    Raises:
        ValueError: not a number, negative, or an unknown method.
    """
    out: dict[str, float] = {}
    for part in (text or "").split(","):
        name, _, number = part.rpartition("=")
        if not part.strip():
            continue
        try:
            value = float(number)
        except ValueError:
            raise ValueError(f"--rho takes a number or method=number, got {part!r}") from None
        if not math.isfinite(value) or value < 0:
            raise ValueError(f"--rho must not be negative, got {number.strip()}")
        if name.strip():
            find_methods(name)
        out[name.strip()] = value
    return out
