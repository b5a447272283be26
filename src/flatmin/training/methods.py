"""The methods a job can compare: plain optimizers and every preset, each with its base and its radii to try.

A table alone, without torch, so that a wrong name is found at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .recipe import Recipe

_ONE, _SMALL = (0.05, 0.1, 0.2, 0.4, 0.8), (0.02, 0.05, 0.1, 0.2)


@dataclass(frozen=True)
class Method:
    """A name, the optimizer it descends with, and the grid its radius is chosen from (empty: it has none).

    ``steps_by_rho``: whether every step has the length ρ in the direction's own norm, which the diagnosis checks.
    ``knobs``: the settings that say how strong the correction is, where that is not ρ.
    """

    name: str
    base: str = "sgd"
    rhos: tuple[float, ...] = ()
    steps_by_rho: bool = True
    knobs: str = ""

    def grid(self, recipe: Recipe) -> tuple[float, ...]:
        """The radii to try on a recipe."""
        return tuple(recipe.rhos.get(self.name, self.rhos))


METHODS: Mapping[str, Method] = {m.name: m for m in (
    Method("sgd"),
    Method("adamw", "adamw"),
    Method("sam", rhos=_ONE),
    Method("asam", rhos=(0.5, 1.0, 2.0, 4.0)),
    Method("esam", rhos=_ONE, steps_by_rho=False),          # ρ over the share of the tensors that move
    Method("looksam", rhos=_ONE, steps_by_rho=False,        # 0 in the steps between
           knobs="alpha and k"),     # its correction has the length alpha ‖g‖, whatever ρ
    Method("layer_sam", rhos=(0.01, 0.02, 0.05, 0.1)),
    Method("momentum_sam", rhos=(0.1, 0.3, 1.0, 3.0)),
    Method("fisher_sam", rhos=_ONE),
    Method("functional_sam", rhos=(0.1, 0.2, 0.4, 0.8)),
    Method("preconditioned_sam", "adamw", _ONE),
    Method("preconditioned_functional_sam", "adamw", (0.1, 0.2, 0.4, 0.8)),
    Method("gsam", rhos=_ONE),
    Method("friendly_sam", rhos=_ONE),
    Method("wsam", rhos=_SMALL),
    Method("sam_on", rhos=(0.2, 0.5, 1.0, 2.0)),
    Method("random_sam", rhos=(0.1, 0.5, 2.0, 5.0)),
    Method("unnormalized_sam", rhos=_SMALL, steps_by_rho=False),       # ρ‖g‖
)}


def find_methods(text: str) -> list[Method]:
    """Methods from a comma-separated list, or all of them.

    Raises:
        ValueError: an unknown name, or none.
    """
    if text.strip() == "all":
        return list(METHODS.values())
    names = [n.strip() for n in text.split(",") if n.strip()]
    unknown = [n for n in names if n not in METHODS]
    if unknown or not names:
        raise ValueError(f"unknown method {', '.join(unknown) or text!r}: choose from all, {', '.join(METHODS)}")
    return [METHODS[n] for n in dict.fromkeys(names)]
