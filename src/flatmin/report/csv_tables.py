"""The numbers of a run as CSV files, at full precision: one file a table, dotted names for what is nested."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import RunFolderError
from ..files import replace_file
from ..training.log import read_log
from .fields import items, section

Row = Mapping[str, Any]


def write_tables(folder: Path, record: Mapping[str, Any]) -> list[Path]:
    """Every table of a run as ``tables/<name>.csv``; returns the files.

    Raises:
        RunFolderError: a file cannot be written.
    """
    out = []
    for name, rows in tables({"log": read_log(folder), **record}).items():
        target, text = folder / "tables" / f"{name}.csv", as_csv(rows)
        try:
            replace_file(target, lambda part, text=text: part.write_text(text, newline=""))
        except OSError as error:
            raise RunFolderError(f"cannot write {target}: {error.strerror or error}") from error
        out.append(target)
    return out


def tables(record: Mapping[str, Any]) -> dict[str, list[Row]]:
    """The tables of a record with the rows of its log, by name; those without rows are left out."""
    log = [row for row in items(record.get("log")) if isinstance(row, Mapping)]
    found: dict[str, list[Row]] = {
        "steps": [row for row in log if "loss" in row],
        "evaluations": [section(row, "evaluation") for row in log if "evaluation" in row],
        "sharpness": [row for row in log if "sharpness" in row],
        "metrics": [{"split": split, "metric": metric, **section(record, "metrics", split, metric)}
                    for split in section(record, "metrics") for metric in section(record, "metrics", split)],
        "findings": [row for row in items(record.get("diagnosis")) if isinstance(row, Mapping)],
        "runs": [run for run in items(record.get("runs")) if isinstance(run, Mapping)],
        "summary": [{"method": name, **section(record, "summary", name)} for name in section(record, "summary")],
        "measures": [{"measure": name, "quantity": quantity, "value": value}
                     for name in section(record, "results")
                     for quantity, value in _numbers(section(record, "results", name))],
    }
    found |= {name: _columns(section(record, "results", name)) for name in section(record, "results")}
    return {name: [_flat(row) for row in rows] for name, rows in found.items() if rows}


def as_csv(rows: Iterable[Row]) -> str:
    """Rows as CSV with a head; a column for every name that a row has."""
    rows = list(rows)
    names = dict.fromkeys(name for row in rows for name in row)
    text = io.StringIO()
    writer = csv.DictWriter(text, [*names], restval="")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _flat(row: Row, prefix: str = "") -> dict[str, Any]:
    """A nested row under dotted names, without lists."""
    out: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            out |= _flat(value, f"{prefix}{name}.")
        elif not isinstance(value, list):
            out[f"{prefix}{name}"] = "" if value is None else value
    return out


def _numbers(result: Row) -> list[tuple[str, Any]]:
    """The numbers of a measure, without its settings."""
    return [(name, value) for name, value in _flat({k: v for k, v in result.items() if k != "settings"}).items()
            if isinstance(value, (int, float)) or value in ("nan", "inf", "-inf")]


def _columns(result: Row) -> list[Row]:
    """The lists of plain values in a measure that are as long as the first of them, side by side."""
    lists = {name: value for name, value in result.items() if isinstance(value, list) and len(value) > 1
             and not any(isinstance(v, (list, Mapping)) for v in value)}
    length = len(next(iter(lists.values()), []))
    kept = {name: value for name, value in lists.items() if len(value) == length}
    return [{"index": i, **{name: value[i] for name, value in kept.items()}} for i in range(length)]
