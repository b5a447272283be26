"""Claim: a SAM step costs two passes, one base step and little else.

Times the parts of a step beyond two forward-backwards and one base step, flatmin against pytorch-optimizer, both in
one process on the same parameters and gradients, interleaved; prints medians, quartiles and ratios. The backward pass
is replaced by fresh gradient tensors of the right shapes, so that what is left is the optimizer's own traffic.

    python benchmarks/step_overhead.py [--repeats 15] [--threads 2]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import statistics
import time

import pytorch_optimizer
import torch
from torch import nn

from flatmin import presets


def mlp() -> nn.Module:
    """58 million parameters in four layers."""
    widths = [4096, 4096, 4096, 4096, 2048]
    return nn.Sequential(*[nn.Linear(a, b) for a, b in zip(widths, widths[1:], strict=False)])


def small_tensors() -> nn.Module:
    """150 tensors of a few hundred numbers."""
    return nn.Sequential(*[nn.Linear(24, 24) for _ in range(75)])


class Stub:
    """Represents forward and backward: returns gradients and counts the time that takes."""

    def __init__(self, model: nn.Module):
        self.parameters = list(model.parameters())
        generator = torch.Generator().manual_seed(0)
        self.gradients = [torch.randn(p.shape, generator=generator) for p in self.parameters]
        self.seconds = 0.0

    def __call__(self) -> torch.Tensor:
        start = time.perf_counter()
        for p, g in zip(self.parameters, self.gradients, strict=True):
            p.grad = g.clone()
        self.seconds += time.perf_counter() - start
        return _Loss()


class _Loss(torch.Tensor):
    """A loss whose gradient is there already."""

    @staticmethod
    def __new__(cls) -> _Loss:
        return torch.Tensor._make_subclass(cls, torch.zeros(()))

    def backward(self, *args: object, **kwargs: object) -> None:
        pass


def ours(name: str, model: nn.Module, stub: Stub, **options: float):
    sharpener = getattr(presets, name)(model, **options)

    def step() -> None:
        sharpener.backward(stub)

    return step


def theirs(name: str, model: nn.Module, stub: Stub, **options: float):
    kind = getattr(pytorch_optimizer, name)
    if name == "GSAM":
        base = torch.optim.SGD(model.parameters(), lr=0.0)
        scheduler = pytorch_optimizer.ProportionScheduler(torch.optim.lr_scheduler.LambdaLR(base, lambda _: 1.0),
                                                          max_lr=1.0, max_value=0.05, min_value=0.05)
        optimizer = kind(model.parameters(), base_optimizer=base, model=model, rho_scheduler=scheduler, **options)

        def gsam() -> None:
            stub()
            optimizer.perturb_weights(0.05)
            stub()
            optimizer.gradient_decompose(0.4)
            optimizer.un_perturb()
            model.zero_grad()

        return gsam
    optimizer = kind(model.parameters(), base_optimizer=NoStep, **options)

    def step() -> None:
        stub()
        optimizer.first_step(zero_grad=True)
        stub()
        optimizer.second_step(zero_grad=True)

    return step


class NoStep(torch.optim.Optimizer):
    """A base optimizer that does nothing, so that only SAM's own work is timed."""

    def __init__(self, params: object, **_: object):
        super().__init__(params, {"lr": 0.0})

    def step(self, closure: object = None) -> None:
        pass


def measure(step, model: nn.Module, stub: Stub) -> float:
    stub.seconds = 0.0
    start = time.perf_counter()
    step()
    elapsed = time.perf_counter() - start - stub.seconds
    for p in model.parameters():
        p.grad = None
    return elapsed


def compare(label: str, model: nn.Module, pairs: list[tuple[str, object, object]], stub: Stub, repeats: int) -> None:
    w = [p.detach() for p in model.parameters()]
    copies = [torch.empty_like(p) for p in w]
    for name, a, b in pairs:
        times: dict[str, list[float]] = {"ours": [], "theirs": [], "copy": []}
        for i in range(repeats + 2):
            for key, fn in (("ours", a), ("theirs", b)):
                seconds = measure(fn, model, stub)
                if i >= 2:
                    times[key].append(seconds)
            start = time.perf_counter()
            torch._foreach_copy_(copies, w)
            if i >= 2:
                times["copy"].append(time.perf_counter() - start)
        ratios = [x / y for x, y in zip(times["ours"], times["theirs"], strict=True)]
        q = statistics.quantiles(ratios, n=4)
        med = {k: statistics.median(v) for k, v in times.items()}
        print(f"{label:14s} {name:6s} flatmin {med['ours'] * 1e3:8.2f} ms ({med['ours'] / med['copy']:5.1f} copies)   "
              f"pytorch-optimizer {med['theirs'] * 1e3:8.2f} ms ({med['theirs'] / med['copy']:5.1f} copies)   "
              f"ratio {statistics.median(ratios):.2f} [{q[0]:.2f}, {q[2]:.2f}]")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, pytorch-optimizer {importlib.metadata.version('pytorch_optimizer')}, "
          f"{platform.processor() or platform.machine()}, {args.threads} threads, median [quartiles] of {args.repeats}")
    torch.manual_seed(0)
    for label, build in (("58M MLP", mlp), ("150 tensors", small_tensors)):
        model = build()
        stub = Stub(model)
        pairs = [("SAM", ours("sam", model, stub, rho=0.05), theirs("SAM", model, stub, rho=0.05)),
                 ("ASAM", ours("asam", model, stub, rho=0.5, eta=0.0),
                  theirs("SAM", model, stub, rho=0.5, adaptive=True))]
        if hasattr(presets, "gsam"):
            pairs.append(("GSAM", ours("gsam", model, stub, rho=0.05, alpha=0.4), theirs("GSAM", model, stub)))
        compare(label, model, pairs, stub, args.repeats if label == "58M MLP" else 20 * args.repeats)


if __name__ == "__main__":
    main()
