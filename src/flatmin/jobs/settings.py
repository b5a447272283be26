"""What a job is asked for: each setting once, with its type, default and help; the command line is made from this.

Nothing here imports torch, so that a help text or a wrong call takes no time. What only torch can check (recipes,
names of measures, the user's own code) is checked when a job starts, before anything is written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..measures import DEFAULT_METRICS
from ..training.methods import METHODS, find_methods
from ..training.settings import TrainSettings, check_types


@dataclass(frozen=True)
class CompareSettings:
    """What to compare on which recipe.

    Raises:
        ValueError: a value of the wrong type or out of its range, or an unknown method.
    """

    recipe: str = "digits"
    """what is trained: digits, fashion-mnist, cifar10, or module:attribute"""
    methods: str = "base,sam,asam"
    """methods with commas between, or all; base is the recipe's own optimizer"""
    seeds: int = 3
    """runs per method"""
    noise: float | None = None
    """share of training labels drawn again at random (default: the recipe's)"""
    epochs: int | None = None
    """passes over the training data (default: the recipe's)"""
    steps: int | None = None
    """optimizer steps, instead of epochs"""
    rho: str | None = None
    """radius, or radii to choose from, of all methods: 0.1 or 0.1,0.25; of one: sam=0.1/0.25 (default: a small grid)"""
    equal_compute: bool = True
    """whether the base optimizer is also trained for twice the steps"""
    data: str | None = None
    """folder with the recipe's files"""
    threads: int = 1
    """threads of the process; one is fastest for small models"""

    def __post_init__(self) -> None:
        check_types(self)
        _check(self, "seeds", lambda v: v >= 1, "at least 1")
        _check(self, "epochs", lambda v: v >= 1, "at least 1")
        _check(self, "steps", lambda v: v >= 1, "at least 1")
        if self.steps is not None and self.epochs is not None:
            raise ValueError("--steps and --epochs are two ways to say one thing: pass one of them")
        _check(self, "noise", lambda v: 0 <= v <= 1, "a share from 0 to 1")
        _check(self, "threads", lambda v: v >= 1, "at least 1")
        known = {m.name for m in find_methods(self.methods)}
        unused = [name for name in given_radii(self.rho) if name and name not in known]
        if unused:
            raise ValueError(f"--rho gives a radius of {', '.join(unused)}, which is not among --methods "
                             f"{self.methods}")


@dataclass(frozen=True)
class MeasureSettings:
    """What to measure of which model.

    Raises:
        ValueError: a value of the wrong type or out of its range.
    """

    objective: str
    """what is measured, from your own code: module:attribute"""
    checkpoint: str | None = None
    """file of weights for its model (default: as your code made them)"""
    metrics: str = DEFAULT_METRICS
    """measures with commas between, or all"""
    k: int = 5
    """how many of the largest eigenvalues"""
    rho: float = 0.05
    """radius of the sharpness measures"""
    tol: float = 1e-3
    """residual of the eigenvalues, relative to the largest"""
    seed: int = 0
    """of random starts, probes and directions, and of torch before your code is called"""
    against: str | None = None
    """file of other weights to compare with, by every measure"""

    def __post_init__(self) -> None:
        check_types(self)
        _check(self, "k", lambda v: v >= 1, "at least 1")
        _check(self, "rho", lambda v: math.isfinite(v) and v > 0, "positive")
        _check(self, "tol", lambda v: math.isfinite(v) and v > 0, "positive")
        _check(self, "seed", lambda v: v >= 0, "at least 0")


@dataclass(frozen=True)
class TrainJobSettings(TrainSettings):
    """What to train, and how.

    Raises:
        ValueError: as :class:`TrainSettings`, or an unknown method.
    """

    recipe: str = ""
    """what is trained: language, another name of flatmin.recipes, or module:attribute"""
    fields: Mapping[str, str] = field(default_factory=dict)
    """values of the recipe's own fields, as text; each field is a flag"""

    def __post_init__(self) -> None:
        super().__post_init__()
        known = ["base", *(name for name, method in METHODS.items() if method.rhos)]
        if self.method not in known:
            raise ValueError(f"unknown method {self.method!r}: choose from {', '.join(known)}")


def given_radii(text: str | None) -> dict[str, tuple[float, ...]]:
    """The radii to choose from, by method; those of all methods under the key ``""``.

    ``"0.1"`` or ``"0.1,0.25"`` for all methods, ``"sam=0.1/0.25,asam=1"`` for some. A single one is not chosen but set.

    Raises:
        ValueError: not a number, negative, or a method that is unknown or has no radius.
    """
    out: dict[str, tuple[float, ...]] = {}
    for part in filter(str.strip, (text or "").split(",")):
        name, _, numbers = part.rpartition("=")
        if name.strip() and not all(m.rhos for m in find_methods(name)):
            raise ValueError(f"--rho gives a radius of {name.strip()}, which has none")
        values = tuple(_radius(number, part) for number in numbers.split("/"))
        out[name.strip()] = tuple(dict.fromkeys(out.get(name.strip(), ()) + values))
    return out


def _radius(number: str, part: str) -> float:
    try:
        value = float(number)
    except ValueError:
        raise ValueError(f"--rho takes a number or method=number, got {part!r}") from None
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"--rho must not be negative, got {number.strip()}")
    return value


def _check(settings: Any, name: str, holds: Callable[[Any], bool], what: str) -> None:
    value = getattr(settings, name)
    if value is not None and not holds(value):
        raise ValueError(f"--{name} must be {what}, got {value}")
