"""The time of a training step: measured side by side for the record, and predicted before a run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any

from ..training.run import Training
from ..training.streams import groups


def side_by_side(trainings: Mapping[str, Training], steps: int = 60) -> dict[str, Any]:
    """Seconds a step, methods alternating on the same batches; ratios to the first method, step by step."""
    streams = {name: groups(training.stream, 1) for name, training in trainings.items()}
    times: dict[str, list[float]] = {name: [] for name in trainings}
    for i in range(steps + 5):
        for name, training in trainings.items():
            taken = _step(training, next(streams[name]))
            if i >= 5:
                times[name].append(taken)
    first = next(iter(times))
    out = {}
    for name, seconds in times.items():
        ratios = [a / b for a, b in zip(seconds, times[first], strict=True)]
        quartiles = statistics.quantiles(ratios, n=4)
        out[name] = {"seconds": statistics.median(seconds), "ratio": statistics.median(ratios),
                     "mean_ratio": sum(seconds) / sum(times[first]), "quartiles": [quartiles[0], quartiles[2]],
                     "relative_to": first}
    return out


def predicted(trainings: Mapping[str, Training], steps: Mapping[str, int], tries: int = 5) -> float:
    """Seconds that so many steps of each method will take, from a few of each."""
    total = 0.0
    for name, training in trainings.items():
        batch = next(groups(training.stream, 1))
        total += steps[name] * statistics.median([_step(training, batch) for _ in range(tries)][1:])
    return total


def _step(training: Training, batch: list[Any]) -> float:
    """Seconds of one training step that is not logged."""
    training.done = 1
    start = time.perf_counter()
    training.step(batch)
    return time.perf_counter() - start
