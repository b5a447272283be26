"""The results of ``flatmin train`` as aligned plain text for the terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from .fields import number
from .formatting import printable, significant
from .measure_table import aligned
from .train_record import TrainRecord, sentence


def table(record: Mapping[str, Any]) -> str:
    """The metrics at the end with their standard errors, the speed, and what the diagnosis finds."""
    r = TrainRecord(record)
    rows = [(f.metric, f.split, f.value, f"± {f.error}" if f.error else "") for f in r.finals()]
    loss = number(record.get("train_loss"))
    rows = [("loss", "training data, in training", significant(loss, 4), ""), *rows] if loss == loss else rows
    head = f"{r.name} · {r.method}{f', ρ = {r.rho}' if r.rho else ''} · {r.size()}"
    steps = f"{number(record.get('steps')):,.0f} steps in {number(record.get('seconds')):.1f} s"
    lines = [head, "─" * len(head), *aligned(rows), f"{steps}, {r.speed()}" if r.speed() else ""]
    found = [line for f in r.findings() for line in textwrap.wrap(sentence(*f), 100, subsequent_indent="  ")]
    failure = [printable(record["failure"])] if record.get("failure") else []
    return "\n".join(line for line in [*lines, *found, *failure] if line)
