"""Fields of a record that was read from JSON: parts may be missing, numbers may be the strings "nan" and "inf"."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any


def number(value: Any) -> float:
    """A float; nan for everything that is no number."""
    try:
        return math.nan if value is None or isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return math.nan


def numbers(values: Any) -> list[float]:
    """The numbers of a list; none where it is no list."""
    return [number(v) for v in items(values)]


def items(values: Any) -> list[Any]:
    """The elements of a list; none where it is no list."""
    return list(values) if isinstance(values, Sequence) and not isinstance(values, str) else []


def section(parent: Any, *path: str) -> Mapping[str, Any]:
    """The mapping at ``path``, empty where any part of it is missing."""
    for name in path:
        parent = parent.get(name) if isinstance(parent, Mapping) else None
    return parent if isinstance(parent, Mapping) else {}


def flat(value: Any, name: str = "") -> list[tuple[str, str]]:
    """A nested mapping as (dotted name, value) pairs.

    >>> flat({"optimizer": {"lr": 0.1}, "grid": [1, 2]})
    [('optimizer.lr', '0.1'), ('grid', '1, 2')]
    """
    if isinstance(value, Mapping):
        return [pair for k, v in value.items() for pair in flat(v, f"{name}.{k}" if name else str(k))]
    if isinstance(value, list):
        value = ", ".join(map(str, value))
    return [(name, str(value))] if name else []


def details(*parts: tuple[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Parts of a record for reading them up: (title, flat pairs), without what is empty."""
    return [(title, flat(part)) for title, part in parts if flat(part)]
