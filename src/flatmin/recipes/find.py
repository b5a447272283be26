"""Recipes by name: the library's own, and ``module:attribute`` from the user's code."""

from __future__ import annotations

from typing import Any

from ..training.protocol import check_recipe
from ..training.user_code import load_object
from .images import cifar10, digits, fashion_mnist
from .language import language

RECIPES: dict[str, Any] = {r.name: r for r in (digits, fashion_mnist, cifar10, language)}


def find_recipe(name: str) -> Any:
    """A recipe of the library by name, or ``module:attribute`` from the user's own code: one, or a function that
    returns one.

    Raises:
        ValueError: no such name, module or attribute, it lacks what a recipe has, or the user's code raised.
    """
    if name in RECIPES:
        return RECIPES[name]
    if not name.partition(":")[2]:
        raise ValueError(f"no recipe {name!r}: choose {', '.join(RECIPES)}, or module:attribute for your own")
    value = load_object(name)
    check_recipe(value)
    return value
