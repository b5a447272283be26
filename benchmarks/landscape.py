"""Claim: a 51 × 51 surface of the digits net takes under a minute on two cores, and at most 0.7 of the time of
``loss-landscapes`` on the same grid.

Both in one process, alternating, on the same network (64-256-256-10), the same 1000 samples and as many points; wall
and processor time, their ratios with median and range. The peer runs as its documentation shows it, on a copy of the
model, since it leaves the user's own moved; its time falls by a third once the C library has stopped giving memory
back to the system (a large tensor freed once does it), so that this is measured as a second case.

    OMP_NUM_THREADS=2 python benchmarks/landscape.py [--repeats 5] [--steps 51] [--threads 2]
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import platform
import statistics
import time
from collections.abc import Callable

import loss_landscapes
import loss_landscapes.metrics
import torch

from flatmin import Objective, perturbed
from flatmin.landscape import Surface, surface
from flatmin.recipes import find_recipe


def seconds(run: Callable[[], object]) -> tuple[float, float]:
    """Wall and processor time of one run."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - cpu


def summary(numbers: list[float]) -> str:
    return f"{statistics.median(numbers):.2f} ({min(numbers):.2f} to {max(numbers):.2f})"


def largest_difference(objective: Objective, found: Surface) -> float:
    """Relative, from evaluations one by one, on every 97th point of the grid."""
    worst, steps = 0.0, len(found.x)
    for k in range(0, steps * steps, 97):
        i, j = divmod(k, steps)
        d = [found.x[i].item() * a + found.y[j].item() * b for a, b in zip(*found.directions, strict=True)]
        with perturbed.displaced(objective.parameters, d):
            value = objective.value()
        worst = max(worst, float((value - found.values[i, j]).abs() / value))
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=51)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    recipe = find_recipe("digits")
    data = recipe.data(None)
    x, y = data.train_inputs, data.train_targets
    torch.manual_seed(0)
    model = recipe.model()
    objective = Objective(model, torch.nn.CrossEntropyLoss(), (x, y))
    metric = loss_landscapes.metrics.Loss(torch.nn.CrossEntropyLoss(), x, y)
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {arguments.threads} threads, "
          f"loss-landscapes {importlib.metadata.version('loss-landscapes')}, {arguments.steps} × {arguments.steps}")

    def ours() -> Surface:
        return surface(objective, arguments.steps)

    def theirs() -> object:
        return loss_landscapes.random_plane(copy.deepcopy(model), metric, steps=arguments.steps)

    surface(objective, 3)
    for case in ("as found", "after 31 MB were freed once"):
        if case != "as found":
            torch.empty(31 << 20, dtype=torch.uint8)
        pairs = [(seconds(ours), seconds(theirs)) for _ in range(arguments.repeats)]
        for k, clock in enumerate(("wall", "processor")):
            mine, peer = [a[k] for a, _ in pairs], [b[k] for _, b in pairs]
            ratios = [a / b for a, b in zip(mine, peer, strict=True)]
            print(f"{case:28} {clock:9}  flatmin {summary(mine)} s   loss-landscapes {summary(peer)} s   "
                  f"ratio {summary(ratios)}")
    print(f"largest relative difference from evaluations one by one: {largest_difference(objective, ours()):.1e}")


if __name__ == "__main__":
    main()
