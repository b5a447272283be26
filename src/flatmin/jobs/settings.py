"""What a job is asked for: each setting once, with its type, default and help; the command line is made from this.

Nothing here imports torch, so that a help text or a wrong call takes no time. What only torch can check (recipes,
names of measures, the user's own code) is checked when a job starts, before anything is written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..measures import DEFAULT_METRICS, find_metrics
from ..training.methods import METHODS, find_methods
from ..training.settings import TrainSettings, check_types

PRODUCTS = ("auto", "cached", "recomputed", "forward", "finite_difference")
MODES = ("eval", "train", "batch_statistics", "as_is")


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
    """what is measured: module:attribute of your own code, or hf:FOLDER, a model of transformers"""
    text: str | None = None
    """file of text on which a model of transformers is measured"""
    tokens: int | None = None
    """how many tokens of the text, from its beginning (default: 16384)"""
    context: int | None = None
    """tokens of a window of the text (default: as many as the model takes, 512 at most)"""
    batch_size: int | None = None
    """windows of a batch (default: 8, fewer where that makes five batches)"""
    dtype: str | None = None
    """of a model of transformers: float32 (the default), float64, bfloat16, float16, or auto"""
    checkpoint: str | None = None
    """file of weights for its model (default: as your code or the folder has them)"""
    metrics: str = DEFAULT_METRICS
    """measures with commas between, or all"""
    k: int = 5
    """how many of the largest eigenvalues"""
    rho: float = 0.05
    """radius of the sharpness measures"""
    tol: float = 1e-3
    """residual of the eigenvalues, relative to the largest"""
    rtol: float = 0.05
    """standard error of the trace, relative to the trace"""
    product: str = "auto"
    """how Hessian-vector products are computed: auto, cached, recomputed, forward or finite_difference"""
    mode: str | None = None
    """how the model is evaluated: eval, train, batch_statistics or as_is (default: as your code says, or eval)"""
    share: float = 1.0
    """share of the data, drawn with the seed: of the batches, or of the samples of a single one"""
    eigenvectors: bool = False
    """save the eigenvectors as eigenvectors.safetensors, by the names of the parameters"""
    device: str = "auto"
    """auto (an accelerator where there is one), cpu, cuda, ..."""
    threads: int | None = None
    """of the process (default: the faster of one and all, on one batch)"""
    seed: int = 0
    """of random starts, probes and directions, and of torch before your code is called"""
    against: str | None = None
    """file of other weights to compare with, by every measure"""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("k", "tokens", "context", "batch_size", "threads"):
            _check(self, name, lambda v: v >= 1, "at least 1")
        for name in ("rho", "tol", "rtol"):
            _check(self, name, lambda v: math.isfinite(v) and v > 0, "positive")
        _check(self, "seed", lambda v: v >= 0, "at least 0")
        _check(self, "share", lambda v: 0 < v <= 1, "above 0 and at most 1")
        for name, known in (("product", PRODUCTS), ("mode", MODES)):
            _check(self, name, lambda v, known=known: v in known, f"one of {', '.join(known)}")
        if self.eigenvectors and "spectrum" not in find_metrics(self.metrics):
            raise ValueError("--eigenvectors needs spectrum among the --metrics")
        self._check_text()

    @property
    def of_transformers(self) -> bool:
        """Whether a model of the ``transformers`` library is measured on a text."""
        return self.objective.startswith("hf:")

    def _check_text(self) -> None:
        if self.of_transformers and self.text is None:
            raise ValueError(f"{self.objective} needs a text to be measured on: pass --text FILE")
        of_text = ("text", "tokens", "context", "batch_size", "dtype")
        given = [name for name in of_text if getattr(self, name) is not None]
        if given and not self.of_transformers:
            raise ValueError(f"--{given[0].replace('_', '-')} is for hf: models, and {self.objective} brings its own "
                             "data: leave it out")


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
        raise ValueError(f"--{name.replace('_', '-')} must be {what}, got {value}")
