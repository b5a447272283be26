"""Rows of text under their heads, for the templates' ``table``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """Rows of text under their heads; the first cell names the row."""

    title: str
    heads: list[str]
    rows: list[list[str]]
