"""The fields of a recipe as flags: what kind of value each takes, its default and its help."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import operator
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from jsonargparse import ArgumentParser

from ..training.settings import TrainSettings

SIMPLE = (int, float, str, bool, type(None))
NAMES = ("name", "units")
"""Fields that say what a recipe is, not how it is trained."""
TAKEN = tuple(f.name for f in dataclasses.fields(TrainSettings))
"""Flags of every training run, such as ``--steps``, whose default a recipe's field may be."""


def with_fields(recipe: Any, given: Mapping[str, str]) -> Any:
    """The recipe with other values of its fields, which are read from text.

    Raises:
        ValueError: no such field, or a text that its type does not take.
    """
    if not given:
        return recipe
    parser, known = _parser(recipe, {}), simple_fields(recipe)
    unknown = [name for name in given if name not in known]
    if unknown:
        raise ValueError(f"recipe {recipe.name} has no field {', '.join(map(flag, unknown))}: "
                         f"{f'choose from {_listed(known)}' if known else 'it has none that is a flag'}")
    found: dict[str, Any] = {}
    for name, value in given.items():
        try:
            found[name] = parser.parse_args([flag(name), _as_typed(known[name], value)])[name]
        except argparse.ArgumentError as error:
            raise ValueError(f"{flag(name)} of recipe {recipe.name} must be {_words(known[name])}, got "
                             f"{value!r}") from error
    try:
        return dataclasses.replace(recipe, **found)
    except (TypeError, ValueError) as error:        # its own __post_init__
        raise ValueError(f"recipe {recipe.name}: {error}") from error


def simple_fields(recipe: Any) -> dict[str, Any]:
    """The fields of a recipe that can be flags, by name: each with the simple part of its type."""
    if not dataclasses.is_dataclass(recipe):
        return {}
    try:
        hints = typing.get_type_hints(type(recipe))
    except NameError:       # a name that is imported for type checkers alone
        hints = {}
    found = {f.name: _simple(hints.get(f.name, type(getattr(recipe, f.name))))
             for f in dataclasses.fields(recipe) if f.init and f.name not in (*NAMES, *TAKEN)}
    return {name: kind for name, kind in found.items() if kind is not None}


def help_of(recipe: Any) -> str:
    """The flags of a recipe's fields as ``--help`` shows them."""
    from docstring_parser import parse_from_object

    described = {name.strip(): " ".join((p.description or "").replace("``", "").split())
                 for p in parse_from_object(type(recipe)).params for name in p.arg_name.split(",")}
    text = _parser(recipe, described).format_help()
    return text[text.index("--"):].rstrip() if "--" in text else ""


def values(recipe: Any) -> dict[str, Any]:
    """The values of a recipe's simple fields, for the record."""
    return {name: getattr(recipe, name) for name in simple_fields(recipe)}


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _parser(recipe: Any, described: Mapping[str, str]) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False, add_help=False, usage=argparse.SUPPRESS)
    for name, kind in simple_fields(recipe).items():
        words = described.get(name) or _words(kind)
        parser.add_argument(flag(name), type=kind, default=getattr(recipe, name), metavar=name.upper(), help=words)
    return parser


def _simple(hint: Any) -> Any:
    """The part of a type that is made of numbers, texts and tuples of them; None where there is no such part."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        kept = [part for part in map(_simple, parts) if part is not None]
        return functools.reduce(operator.or_, kept) if any(k is not type(None) for k in kept) else None
    if origin is tuple:
        return hint if all(part is Ellipsis or _simple(part) is not None for part in parts) else None
    return hint if origin is Literal or hint in SIMPLE else None


def _as_typed(kind: Any, value: str) -> str:
    """A tuple may be typed without its brackets."""
    return f"[{value}]" if typing.get_origin(kind) is tuple and not value.startswith(("[", "(")) else value


def _words(kind: Any) -> str:
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return f"one of {', '.join(map(str, parts))}"
    if origin is tuple:
        return f"{len(parts)} values with commas between"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_words(part) for part in parts if part is not type(None))
    return {int: "a whole number", float: "a number", str: "text", bool: "true or false"}.get(kind, "a value")


def _listed(known: Mapping[str, Any]) -> str:
    return ", ".join(map(flag, known))
