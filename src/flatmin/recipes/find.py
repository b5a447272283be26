"""Recipes by name: the library's own, and ``module:attribute`` from the user's code."""

from __future__ import annotations

from ..training.recipe import Recipe
from ..training.user_code import load_object
from .images import cifar10, digits, fashion_mnist

RECIPES = {r.name: r for r in (digits, fashion_mnist, cifar10)}


def find_recipe(name: str) -> Recipe:
    """A recipe of the library by name, or ``module:attribute`` from the user's own code: one, or a function that
    returns one.

    Raises:
        ValueError: no such name, module or attribute, not a :class:`Recipe`, or the user's code raised.
    """
    if name in RECIPES:
        return RECIPES[name]
    if not name.partition(":")[2]:
        raise ValueError(f"no recipe {name!r}: choose {', '.join(RECIPES)}, or module:attribute for your own")
    value = load_object(name)
    if not isinstance(value, Recipe):
        raise ValueError(f"{name!r} is not a flatmin.recipes.Recipe, nor a function that returns one "
                         f"(found {type(value).__name__})")
    return value
