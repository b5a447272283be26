"""What measures will cost: threads that are faster, and the time and memory of each measure before it is taken."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .. import memory
from ..curvature.hessian import Hessian
from ..measures import ALL, Range, Work, offered
from ..objective import Objective
from ..progress import clock

ROUNDS = 2
"""Timings of each kind, of which the shortest counts."""

WORK = {measure.name: measure.work for measure in ALL}
COST = {measure.name: measure.cost for measure in ALL}


def faster_threads(objective: Objective) -> int:
    """One thread or all of them: the faster for a forward and backward pass of one batch. It is set, and returned."""
    every = torch.get_num_threads()
    if every == 1 or objective.device.type != "cpu":
        return every
    one = _on_first_batch(objective)
    seconds = {1: math.inf, every: math.inf}
    torch.set_num_threads(1)
    one.evaluate(gradient=True)     # the first one allocates
    for _ in range(ROUNDS):
        for threads in seconds:
            torch.set_num_threads(threads)
            seconds[threads] = min(seconds[threads], _seconds(lambda: one.evaluate(gradient=True)))
    fastest = min(seconds, key=lambda n: seconds[n])
    torch.set_num_threads(fastest)
    return fastest


@dataclass(frozen=True)
class Cost:
    """Seconds of one pass over the data, forward, backward, and of a Hessian-vector product; bytes of their graphs.

    ``graph`` is of one batch in a forward and backward pass, ``matvec_graph`` what a Hessian-vector product keeps,
    ``vector`` the bytes of a vector as long as the weights, of ``size`` numbers.
    """

    forward: float
    backward: float
    matvec: float
    graph: int
    matvec_graph: int
    vector: int
    size: int

    def seconds(self, work: Work, k: int) -> tuple[float, float]:
        """The least and the most that a measure takes."""
        low, high = (f * self.forward + b * self.backward + self.matvec * min(h + k * each, self.size + k)
                     for f, b, h, each in zip(work.forward, work.backward, work.matvecs, work.each, strict=True))
        return low, high

    def bytes(self, work: Work, k: int) -> int:
        """The most that a measure holds beside the weights: the graph, a gradient, and its vectors."""
        vectors = 1 + min(work.vectors + k * work.vectors_each, self.size)
        return vectors * self.vector + max(self.graph * bool(work.forward[1]),
                                           self.matvec_graph * bool(work.matvecs[1]))


def cost_of(objective: Objective, product: Any = "auto") -> Cost:
    """Timed on the first batch, and scaled to the terms of all batches of this process."""
    one = _on_first_batch(objective)
    with objective.session():
        weights = [batch.weight for batch in objective.weighted_batches()]
    scale = math.fsum(weights) / weights[0]
    forward = scale * _least(one.evaluate)
    both = scale * _least(lambda: one.evaluate(gradient=True))
    graph = _bytes(one.evaluate)
    H = Hessian(one, product=product)
    v = torch.ones(H.length, dtype=H.dtype, device=H.device)
    whole, per_batch = _least(lambda: H.matvec(v)), _bytes(lambda: H.matvec(v))
    room = memory.available(objective.device) / 2
    kept = H.product in ("auto", "cached") and scale * per_batch <= room
    if kept:
        with H.session(check=False):
            whole = _least(lambda: H.matvec(v))
    return Cost(forward, max(0.0, both - forward), scale * whole, graph, int(scale * per_batch) if kept else per_batch,
                v.numel() * v.element_size(), H.size)


def plan(objective: Objective, names: Sequence[str], k: int, product: Any = "auto") -> str:
    """The predicted time and memory of each measure, as a table for the terminal."""
    cost = cost_of(objective, product)
    free = memory.available(objective.device)
    rows = [("measure", "cost", "time", "memory")]
    total = [0.0, 0.0]
    for name in names:
        work = _comparison() if name == "comparison" else WORK[name]
        seconds, needed = cost.seconds(work, k), cost.bytes(work, k)
        total = [a + b for a, b in zip(total, seconds, strict=True)]
        short = f", more than the {memory.size(free)} that are free" * (needed > free)
        rows.append((name, COST.get(name, "both models by every measure"), _range(*seconds),
                     f"{memory.size(needed)}{short}"))
    rows.append(("all", "", _range(*total), ""))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = ["  ".join([*(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=False)), row[3]]).rstrip()
             for row in rows]
    return "\n".join([
        f"{cost.size:,} parameters on {objective.device}; one pass over the data takes {_time(cost.forward)} forward "
        f"(F) and {_time(cost.backward)} backward (B), a Hessian-vector product (H) {_time(cost.matvec)}",
        *lines, f"memory is beside that of the weights, at most; {memory.size(free)} are free"])


def _comparison() -> Work:
    """Both models by each measure that compares them, and the loss on a line between them."""
    works = [WORK[name] for name in offered("compare")]

    def both(pick: Callable[[Work], Range]) -> Range:
        low, high = (2 * sum(pick(w)[i] for w in works) for i in (0, 1))
        return low, high

    forward = both(lambda w: w.forward)
    return Work(forward=(forward[0], forward[1] + 52), backward=both(lambda w: w.backward),
                matvecs=both(lambda w: w.matvecs), vectors=max(w.vectors for w in works))


def _on_first_batch(objective: Objective) -> Objective:
    """The objective on its first batch that has anything to average."""
    batch = next((batch for batch in objective.data if objective.weight(batch) > 0), None)
    if batch is None:
        raise ValueError("no batch of the data has anything to average")
    return objective.on_data([batch])


def _least(run: Callable[[], Any]) -> float:
    """Seconds of the fastest of a few runs, after one that allocates."""
    run()
    return min(_seconds(run) for _ in range(ROUNDS))


def _seconds(run: Callable[[], Any]) -> float:
    accelerator = torch.accelerator.is_available()
    start = time.perf_counter()
    run()
    if accelerator:
        torch.accelerator.synchronize()
    return time.perf_counter() - start


def _bytes(run: Callable[[], Any]) -> int:
    with memory.Meter() as meter:
        run()
    return meter.bytes


def _time(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 60 else clock(seconds)


def _range(low: float, high: float) -> str:
    a, b = _time(low), _time(high)
    return a if a == b else f"{a} to {b}"
