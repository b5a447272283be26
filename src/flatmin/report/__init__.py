"""A run record in, plain sentences, a table, figures and one self-contained HTML page out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import compare_table, measure_table
from .compare_findings import findings
from .page import page, write

__all__ = ["findings", "page", "table", "write"]


def table(record: Mapping[str, Any]) -> str:
    """The results of a run of ``flatmin compare`` or ``flatmin measure`` as plain text for the terminal."""
    return (measure_table if record.get("kind") == "measure" else compare_table).table(record)
