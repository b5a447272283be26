"""Claim: a SAM step holds the weights, one copy, one gradient, and the largest single tensor at most.

Peak resident memory of a process that trains five steps, above what it had before them, in parameter sizes: plain
(gradient alone: 1), flatmin's SAM (copy and gradient: 2), pytorch-optimizer's SAM. Each in a process of its own.

    python benchmarks/step_memory.py [--millions 58]
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn


def build(millions: float) -> nn.Module:
    width = int((millions * 1e6 / 6) ** 0.5)
    return nn.Sequential(*[nn.Linear(width, width, bias=False) for _ in range(6)])


def peak() -> int:
    """The process's largest resident memory so far, in KiB; ru_maxrss would start from the parent's on Linux."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


STEPS = 5


def peak_of_steps(who: str, millions: float) -> float:
    """Peak growth of resident memory over five steps, gradients cleared between, in sizes of the parameters."""
    torch.set_num_threads(1)
    model = build(millions)
    x = torch.randn(1, model[0].in_features)
    for p in model.parameters():
        p.grad = None
    if who == "flatmin":
        from flatmin import presets

        sharpener = presets.sam(model)
    elif who == "pytorch-optimizer":
        import pytorch_optimizer

        optimizer = pytorch_optimizer.SAM(model.parameters(), base_optimizer=torch.optim.SGD, rho=0.05, lr=0.0)
    model(x).sum().item()
    before = peak()
    for _ in range(STEPS):
        if who == "flatmin":
            sharpener.backward(lambda: model(x).square().mean())
        else:
            model(x).square().mean().backward()
            if who == "pytorch-optimizer":
                optimizer.first_step(zero_grad=True)
                model(x).square().mean().backward()
                optimizer.second_step()
        model.zero_grad()
    after = peak()
    size = sum(p.numel() * p.element_size() for p in model.parameters()) / 1024
    return (after - before) / size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=float, default=58.0)
    parser.add_argument("--who", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.who:
        if "MALLOC_MMAP_THRESHOLD_" not in os.environ:  # what glibc keeps of freed tensors varies from run to run
            os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"})
        print(peak_of_steps(args.who, args.millions))
        return
    print(f"peak above the weights over {STEPS} steps, in sizes of {args.millions:g} M float32 parameters")
    for who in ("plain", "flatmin", "pytorch-optimizer"):
        done = subprocess.run([sys.executable, __file__, "--who", who, "--millions", str(args.millions)],
                              capture_output=True, text=True, check=True)
        print(f"{who:18s} {float(done.stdout):.2f}")


if __name__ == "__main__":
    main()
