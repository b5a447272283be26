"""What a job is asked for: each setting once, with its type, default and help; the command line is made from this.

Nothing here imports torch, so that a help text or a wrong call takes no time. What only torch can check (recipes,
names of measures, the user's own code) is checked when a job starts, before anything is written.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..measures import DEFAULT_METRICS, find_metrics
from ..training.methods import find_methods

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
    methods: str = "sgd,sam,asam"
    """methods with commas between, or all"""
    seeds: int = 3
    """runs per method"""
    noise: float | None = None
    """share of training labels drawn again at random (default: the recipe's)"""
    epochs: int | None = None
    """passes over the training data (default: the recipe's)"""
    rho: str | None = None
    """one radius for all, or method=radius,... (default: chosen from a small grid)"""
    data: str | None = None
    """folder with the recipe's files"""
    threads: int = 1
    """threads of the process; one is fastest for small models"""

    def __post_init__(self) -> None:
        check_types(self)
        _check(self, "seeds", lambda v: v >= 1, "at least 1")
        _check(self, "epochs", lambda v: v >= 1, "at least 1")
        _check(self, "noise", lambda v: 0 <= v <= 1, "a share from 0 to 1")
        _check(self, "threads", lambda v: v >= 1, "at least 1")
        find_methods(self.methods)
        fixed_radii(self.rho)


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


def check_types(settings: Any) -> None:
    """Raise a ``ValueError`` where a field of a dataclass does not have the type that it is declared with."""
    hints = typing.get_type_hints(type(settings))
    for field in dataclasses.fields(settings):
        value, hint = getattr(settings, field.name), hints[field.name]
        kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        accepted = (*kinds, int) if float in kinds else kinds
        if not isinstance(value, accepted) or isinstance(value, bool) and bool not in kinds:
            raise ValueError(f"{field.name} must be {_NAMES.get(kinds[0], kinds[0].__name__)}, got {value!r}")


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


_NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


def _check(settings: Any, name: str, holds: Callable[[Any], bool], what: str) -> None:
    value = getattr(settings, name)
    if value is not None and not holds(value):
        raise ValueError(f"--{name.replace('_', '-')} must be {what}, got {value}")
