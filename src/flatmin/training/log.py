"""What happens in a run, a JSON object a line, as it happens."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ..files import replace_file
from ..results import plain

Row = dict[str, Any]


class Log:
    """``log.jsonl`` in a folder, and TensorBoard's events beside it where tensorboard is installed; None: nowhere.

    A row is of a step (``{"step": 0, "loss": ..., ...}``), of an evaluation (``{"evaluation": {...}}``), of a monitor
    (``{"step": 0, "sharpness": {...}}``) or a verdict (``{"step": 90, "finding": {...}}``).

    ``listeners`` are called with each row; the rows that they return are written after it.
    """

    def __init__(self, folder: Path | None):
        self.path = None if folder is None else folder / "log.jsonl"
        self.listeners: list[Callable[[Row], Iterable[Row]]] = []
        self._done = 0
        self._events: Any = None

    def write(self, row: Row) -> None:
        """One line, given to the system at once: what was logged survives the process."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for one in (row, *(extra for listener in self.listeners for extra in listener(row))):
            with open(self.path, "a") as file:
                file.write(json.dumps(plain(one), ensure_ascii=False) + "\n")
            self._show(one)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Numbers of a monitor."""
        self.write({"step": step, "sharpness": dict(metrics)})

    def keep(self, steps: int) -> None:
        """Drop what belongs to steps that will be done again: those after the first ``steps``."""
        self._done = steps
        if self.path is None or not self.path.exists():
            return
        kept = [line + "\n" for line, row in _lines(self.path)
                if "evaluation" in row and row["evaluation"]["step"] <= steps or row.get("step", steps) < steps]
        replace_file(self.path, lambda part: part.write_text("".join(kept)))

    def close(self) -> None:
        """Flush TensorBoard's events."""
        if self._events is not None:
            self._events.close()
            self._events = None

    def _show(self, row: Row) -> None:
        """The numbers of a row as TensorBoard's scalars."""
        if self._events is None:
            self._events = _writer(self.path, self._done)
        if self._events is not None:
            step, values = scalars(row)
            for name, value in values.items():
                self._events.add_scalar(name, value, step)


def read_log(folder: Path) -> list[Row]:
    """The rows of a run's ``log.jsonl``; a line that a kill cut off is left out."""
    path = folder / "log.jsonl"
    return [row for _, row in _lines(path)] if path.exists() else []


def scalars(row: Row) -> tuple[int, dict[str, float]]:
    """The step and the finite numbers of a row, by the names that TensorBoard groups them by.

    >>> scalars({"step": 3, "loss": 0.5, "skipped": False})
    (3, {'train/loss': 0.5})
    """
    found = row.get("evaluation", row)
    if "sharpness" in row:
        found = {"step": row["step"], "": row["sharpness"]}
    groups = {name: value for name, value in found.items() if isinstance(value, Mapping) and name != "stderr"}
    groups["train"] = {k: v for k, v in found.items() if k != "step" and not isinstance(v, Mapping)}
    return int(found["step"]), {
        f"{group}/{name}".lstrip("/"): float(value) for group, values in groups.items() for name, value in
        values.items() if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)}


def _lines(path: Path) -> list[tuple[str, Row]]:
    found = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:      # a line that a kill cut off
            continue
        found.append((line, row))
    return found


def _writer(path: Path | None, done: int) -> Any:
    """TensorBoard's writer beside the log, where the package is installed."""
    if path is None or importlib.util.find_spec("tensorboard") is None:
        return None
    writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter
    return writer(str(path.parent / "tensorboard"), purge_step=done or None)
