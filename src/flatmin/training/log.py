"""What happens in a run, a JSON object a line, as it happens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..files import replace_file
from ..results import plain


class Log:
    """``log.jsonl`` in a folder, and TensorBoard's events beside it where tensorboard is installed; None: nowhere."""

    def __init__(self, folder: Path | None):
        self.path = None if folder is None else folder / "log.jsonl"

    def write(self, row: dict[str, Any]) -> None:
        """One line, given to the system at once: what was logged survives the process."""
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a") as file:
                file.write(json.dumps(plain(row), ensure_ascii=False) + "\n")

    def log(self, values: dict[str, float], step: int) -> None:
        """Numbers of a monitor."""
        self.write({"step": step, "sharpness": values})

    def keep(self, steps: int) -> None:
        """Drop what belongs to steps that will be done again: those after the first ``steps``."""
        if self.path is None or not self.path.exists():
            return
        kept = []
        for line in self.path.read_text().splitlines():
            try:
                row = json.loads(line)
            except ValueError:      # a line that a kill cut off
                continue
            if "evaluation" in row and row["evaluation"]["step"] <= steps or row.get("step", steps) < steps:
                kept.append(line + "\n")
        replace_file(self.path, lambda part: part.write_text("".join(kept)))
