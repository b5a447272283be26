"""Frozen records: a value never travels without its error, its cost and its settings."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

FEWEST_BATCHES = 5
"""Below this many batches no standard error over them is given."""


@dataclass(frozen=True, kw_only=True)
class Scalar:
    """A measured number with its error; ``float(record)`` is the value.

    ``stderr`` is a standard error (nan where the number is not random), ``settings`` what it was computed with.
    """

    value: float
    stderr: float = math.nan
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __float__(self) -> float:
        return float(self.value)

    def __str__(self) -> str:
        return f"{type(self).__name__}({uncertain(self.value, self.stderr)})"

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values, as written to ``record.json``."""
        return plain(self)


def weighted_mean(values: Sequence[float], weights: Sequence[float], *, fewest: int = 2,
                  total: Callable[..., list[float]] | None = None) -> tuple[float, float]:
    """m = Σ n_b x_b / Σ n_b and its standard error √(B/(B − 1) Σ n_b² (x_b − m)²) / Σ n_b, for B independent batches.

    The error is that of a ratio of sums, to first order; nan for fewer than ``fewest`` batches.

    Args:
        values: x_b.
        weights: n_b, positive.
        fewest: at least 2.
        total: where ranks hold different batches: gives the sums over all ranks of its arguments.

    W. Cochran, Sampling Techniques, 3rd ed., Wiley 1977, sections 6.3 to 6.5.

    >>> weighted_mean([1.0, 2.0, 3.0], [1.0, 1.0, 1.0])     # the error is the standard deviation, 1, over √3
    (2.0, 0.5773502691896257)
    """
    sums = [float(len(values)), math.fsum(weights), math.fsum(n * x for n, x in zip(weights, values, strict=True))]
    count, n, weighted = total(*sums) if total else sums
    mean = weighted / n if n > 0 else math.nan
    spread = math.hypot(*(n * (x - mean) for n, x in zip(weights, values, strict=True)))     # squares cannot overflow
    spread = math.sqrt(total(spread ** 2)[0]) if total else spread
    return mean, math.nan if count < fewest else math.sqrt(count / (count - 1)) * spread / n


@dataclass(frozen=True, kw_only=True)
class PerBatch:
    """A measure's values batch by batch and the terms that each averages; of this rank's batches or of all ranks'."""

    values: tuple[float, ...] = ()
    weights: tuple[float, ...] = ()
    of_all_ranks: bool = False


def uncertain(value: float, error: float = math.nan) -> str:
    """``value ± error`` with as many digits as the error supports; the bare value where there is no error.

    >>> uncertain(3.14159, 0.02)
    '3.142 ± 0.020'
    >>> uncertain(3.14159)
    '3.1416'
    """
    if not math.isfinite(error) or not math.isfinite(value):
        return f"{value:.5g}"
    if error == 0 or not 1e-4 <= abs(error) < 1e5:
        return f"{value:.5g} ± {error:.2g}"
    digits = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def plain(value: Any) -> Any:
    """A value as JSON can hold it: records become mappings, small tensors lists, non-finite numbers their names."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.repr}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, float):
        return value if math.isfinite(value) else repr(value)
    if isinstance(value, (str, int, bool)) or value is None:
        return value
    if hasattr(value, "tolist") and not isinstance(value, type):
        return plain(value.tolist())  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(value, Sequence) or isinstance(value, (set, frozenset)):
        return [plain(v) for v in value]
    return str(value)
