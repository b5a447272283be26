"""Claim: what a step costs is its passes. Time of a step of each preset over that of a plain step.

A convolutional network with BatchNorm where computing dominates (batch 128); plain and sharpness-aware steps alternate
on the same batch in one process. Prints medians of the ratios of CPU time with quartiles (wall time with --wall: on a
shared machine other programs count too).

    python benchmarks/passes.py [--repeats 30] [--threads 1] [--wall]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from flatmin import Sharpener, presets


def network() -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for a, b in ((3, 32), (32, 64), (64, 64)):
        layers += [nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 16, 10))


def stepper(name: str, x: torch.Tensor, y: torch.Tensor, **options: float) -> Callable[[], None]:
    """One whole training step of a preset, or of the base optimizer."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    loss = nn.functional.cross_entropy
    sharpener: Sharpener | None = None
    if name != "sgd":
        sharpener = presets.PRESETS[name](model, optimizer=optimizer, **options)

    def step() -> None:
        if sharpener is None:
            loss(model(x), y).backward()
        elif sharpener.rule.second.needs_samples:
            sharpener.backward(lambda s: model(x[s]), lambda z, s: loss(z, y[s], reduction="none"))
        else:
            sharpener.backward(lambda: model(x), lambda z: loss(z, y))
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=30, help="rounds; a round is 5 steps, a whole cycle of LookSAM")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--wall", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock = time.perf_counter if args.wall else time.process_time
    x, y = torch.randn(128, 3, 32, 32), torch.randint(10, (128,))
    names = ["sam", "asam", "gsam", "esam", "looksam", "momentum_sam", "random_sam", "sam_on", "functional_sam"]
    print(f"torch {torch.__version__}, {args.threads} threads, {'wall' if args.wall else 'CPU'} time")
    for name in names:
        pair = stepper(name, x, y, rho=0.05), stepper("sgd", x, y)
        ratios = []
        for i in range(args.repeats + 1):
            seconds = []
            for step in pair:
                start = clock()
                for _ in range(5):
                    step()
                seconds.append(clock() - start)
            if i:
                ratios.append(seconds[0] / seconds[1])
        q = statistics.quantiles(ratios, n=4)
        print(f"{name:16s} {statistics.median(ratios):.2f} plain steps [{q[0]:.2f}, {q[2]:.2f}]", flush=True)


if __name__ == "__main__":
    main()
