"""What the page of ``flatmin train`` shows, as plain data; ``templates/train.html`` lays it out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from . import train_figures as draw
from .fields import details, number
from .formatting import printable, significant
from .table import Table
from .train_record import TrainRecord, sentence


def contents(record: Mapping[str, Any]) -> dict[str, Any]:
    """What the template of the page shows of a record with the rows of its log."""
    r = TrainRecord(record)
    status = str(record.get("status"))
    finals = r.finals()
    steps = number(record.get("steps"))
    return {
        "name": r.name, "unfinished": "" if status in ("complete", "failed") else status, "headline": _headline(r),
        "failure": printable(record.get("failure") or ""),
        "progress": f"{r.done:,} of {steps:,.0f} steps" if math.isfinite(steps) else f"{r.done:,} steps",
        "setting": f"{r.size()}; seed {r.settings.get('seed')}; {r.settings.get('precision')}.",
        "facts": _facts(r), "findings": [sentence(*found) for found in r.findings()],
        "finals": Table("Metrics at the end", ["metric", "data", "value", "standard error", "samples or tokens"],
                        [[f.metric, f.split, f.value, f.error, f.weight] for f in finals]) if finals else None,
        "losses": draw.losses(r), "schedule": draw.schedule(r), "perturbation": draw.perturbation(r),
        "monitored": draw.monitored(r), "surfaces": [],
        "details": details(("Settings", r.settings), ("Recipe", r.recipe), ("Model", r.model), ("Place", r.place),
                           ("Versions", record.get("versions"))),
    }


def _headline(r: TrainRecord) -> str:
    """The method, and the first metric of the end."""
    radius = f" at ρ = {r.rho}" if r.rho else ""
    finals = [f for f in r.finals() if f.split == "test data"] or r.finals()
    finals = [f for f in finals if f.higher_is_better] or finals
    method = "the recipe’s own optimizer" if r.method == "base" else r.method
    value = f": {finals[0].metric} {finals[0].value} on {finals[0].split}" if finals else ""
    return f"{r.name} with {method}{radius}{value}"


def _facts(r: TrainRecord) -> list[tuple[str, str]]:
    seconds, loss = (number(r.record.get(k)) for k in ("seconds", "train_loss"))
    found = [("training loss since the last evaluation", significant(loss, 4) if math.isfinite(loss) else ""),
             ("time in training steps", f"{seconds:,.1f} s" if math.isfinite(seconds) else ""), ("speed", r.speed())]
    return [(name, value) for name, value in found if value]
