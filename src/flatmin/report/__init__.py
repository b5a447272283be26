"""A run record in, plain sentences, a table, figures and one self-contained HTML page out."""

from __future__ import annotations

from .findings import findings
from .page import page, write
from .table import table

__all__ = ["findings", "page", "table", "write"]
