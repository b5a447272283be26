"""A run record in, plain sentences, a table, figures and one self-contained HTML page out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import compare_table, measure_table, train_table
from .compare_findings import findings
from .csv_tables import write_tables
from .page import page, write

__all__ = ["findings", "page", "table", "write", "write_tables"]
_TABLES = {"measure": measure_table.table, "train": train_table.table}


def table(record: Mapping[str, Any]) -> str:
    """The results of a run of ``flatmin train``, ``compare`` or ``measure`` as plain text for the terminal."""
    return _TABLES.get(str(record.get("kind")), compare_table.table)(record)
