"""The methods a job can compare: plain optimizers and every preset, each with the radii to try.

"base" is the recipe's own optimizer. A table alone, without torch, so that a wrong name is found at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

_ONE, _SMALL = (0.05, 0.1, 0.2, 0.4, 0.8), (0.02, 0.05, 0.1, 0.2)


@dataclass(frozen=True)
class Method:
    """A name, what it is trained with, and the grid its radius is chosen from (empty: it has none).

    ``optimizer``: the one it needs, None for the recipe's own. ``preset``: False for a plain optimizer.
    ``steps_by_rho``: whether every step has the length ρ in the direction's own norm, which the diagnosis checks.
    ``knobs``: the settings that say how strong the correction is, where that is not ρ.
    ``factor``: how many times as many steps as the others.
    """

    name: str
    optimizer: str | None = None
    rhos: tuple[float, ...] = ()
    steps_by_rho: bool = True
    knobs: str = ""
    factor: int = 1

    @property
    def preset(self) -> str:
        """What the training loop calls it."""
        return self.name if self.rhos else "base"

    def grid(self, recipe: Any) -> tuple[float, ...]:
        """The radii to try on a recipe."""
        return tuple(getattr(recipe, "rhos", {}).get(self.name, self.rhos))

    def twice(self) -> Method:
        """The same for twice the steps, as many passes as a method with two passes a step."""
        return replace(self, name=f"{self.name}{TWICE}", factor=2)

    def base(self, recipe: Any) -> Method:
        """The plain optimizer that the method is compared with on a recipe."""
        name = self.optimizer if hasattr(recipe, "with_optimizer") and self.optimizer else own_optimizer(recipe)
        return METHODS[name]

    def on(self, recipe: Any) -> Any:
        """The recipe with the optimizer that the method needs.

        Raises:
            ValueError: another one than the recipe's own, and the recipe knows no other.
        """
        if self.optimizer is None:
            return recipe
        if hasattr(recipe, "with_optimizer"):
            return recipe.with_optimizer(self.optimizer)
        if self.rhos:           # preconditioned by the state of whatever optimizer the recipe has
            return recipe
        raise ValueError(f"recipe {recipe.name} makes its own optimizer: compare with base instead of {self.name}")


TWICE = "_2x"
"""What is appended to the name of a method that trains for twice the steps."""


def own_optimizer(recipe: Any) -> str:
    """The name of the method that is the recipe's own optimizer: "sgd", "adamw", or "base" for any other."""
    name = getattr(recipe, "optimizer", None)
    return name if isinstance(name, str) and name in ("sgd", "adamw") and hasattr(recipe, "with_optimizer") else "base"


METHODS: Mapping[str, Method] = {m.name: m for m in (
    Method("base"),
    Method("sgd", "sgd"),
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


def equal_compute(methods: list[Method], recipe: Any) -> list[Method]:
    """The plain optimizers under the sharpness-aware methods, each trained for twice the steps."""
    bases = dict.fromkeys(m.base(recipe).name for m in methods if m.rhos)
    return [METHODS[name].twice() for name in bases]
