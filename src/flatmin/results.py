"""Frozen records: a value never travels without its error, its cost and its settings."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
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
