"""Landscaper's side of ``landscape.py --landscaper``: it runs in an environment of its own, a grid for a line read.

    python landscaper_worker.py INPUT.npz OUTPUT.npy STEPS DISTANCE THREADS

INPUT holds the weights of a multilayer perceptron (w0, b0, w1, ...), two directions (d0_0, ..., d1_0, ...) and x, y.
For every number on its standard input it allocates and frees so many bytes, then prints the wall and processor seconds
of one grid; OUTPUT is the last grid.
"""

from __future__ import annotations

import contextlib
import io
import sys
import time

import numpy as np
import torch
from landscaper import LossLandscape
from torch import nn


def main() -> None:
    source, target, steps, distance, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    held = {name: torch.from_numpy(array) for name, array in np.load(source).items()}
    depth = sum(name.startswith("w") for name in held)
    layers: list[nn.Module] = []
    for k in range(depth):
        w = held[f"w{k}"]
        layers += [nn.Linear(w.shape[1], w.shape[0]), nn.ReLU()]
        with torch.no_grad():
            layers[-2].weight.copy_(w)
            layers[-2].bias.copy_(held[f"b{k}"])
    model = nn.Sequential(*layers[:-1]).eval()
    directions = [[held[f"d{side}_{k}"] for k in range(2 * depth)] for side in (0, 1)]
    loss = nn.CrossEntropyLoss()

    def scalar(model: nn.Module, data: tuple[torch.Tensor, torch.Tensor]) -> float:
        return loss(model(data[0]), data[1]).item()

    print("ready", flush=True)
    for size in sys.stdin:
        torch.empty(int(size), dtype=torch.uint8)
        wall, cpu = time.perf_counter(), time.process_time()
        with contextlib.redirect_stdout(io.StringIO()):
            found = LossLandscape.compute(model, (held["x"], held["y"]), directions, scalar, steps=int(steps),
                                          distance=float(distance), dim=2, device="cpu")
        taken = time.perf_counter() - wall, time.process_time() - cpu
        np.save(target, found.loss)
        print(*taken, flush=True)


if __name__ == "__main__":
    main()
