"""Laws, memory and speed on CUDA and NCCL: ``make gpu``, or ``python benchmarks/gpu.py``, on a machine with a GPU.

1. The training loop on the GPU against the same run on the CPU, for every precision, and resumed bit for bit.
2. With two GPUs or more: DDP and FSDP2 over NCCL against one process that takes both ranks' micro-batches.
3. Peak memory of a SAM step over that of a plain step, and tokens a second of the loop beside a loop by hand.

Exits with 1 where a check fails, and with one line where there is no GPU. Figures are printed, not judged.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

if os.environ.get("WORLD_SIZE") is None and not torch.cuda.is_available():
    sys.exit("make gpu needs a CUDA device, and torch sees none: run it on a machine with a GPU")

from training_loop import RandomTokens
from training_loop import main as speed

from flatmin.training import launch
from flatmin.training.protocol import Place
from flatmin.training.run import Training
from flatmin.training.settings import TrainSettings
from flatmin.training.state import weights
from flatmin.training.streams import Shuffled


class Both:
    """For one process: the micro-batches of both ranks, in turn."""

    def __init__(self, at: Place, recipe: RandomTokens):
        self.streams: list[Shuffled] = [recipe.train_batches(Place(at.seed, rank, 2)) for rank in range(2)]

    def __iter__(self):
        for pair in zip(*self.streams, strict=True):
            yield from pair


class Twin(RandomTokens):
    def train_batches(self, at: Place) -> Both:
        return Both(at, RandomTokens())


def trained(recipe: RandomTokens, at: Place | None = None, folder: Path | None = None, stop: int | None = None,
            **options: object) -> dict[str, torch.Tensor]:
    """The weights after a few steps of SAM; ``stop``: interrupted there, and resumed."""
    settings = TrainSettings(**{"method": "sam", "rho": 0.05, "steps": 6, "clip": 1.0} | options)    # type: ignore
    at = at or Place(device=torch.device(settings.device))

    def interrupt(done: int) -> None:
        if done == stop:
            raise KeyboardInterrupt

    try:
        training = Training(recipe, settings, at, folder, interrupt)
        training.run()
    except KeyboardInterrupt:
        training = Training(recipe, settings, at, folder)
        training.run()
    return weights(training.model)


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """‖a − b‖ / ‖b‖."""
    apart, size = (math.sqrt(sum(float(t.double().square().sum()) for t in tensors)) for tensors in (
        [a[k] - b[k] for k in b], b.values()))
    return apart / size


def check(name: str, value: float, limit: float) -> bool:
    print(f"{'ok    ' if value <= limit else 'FAILED'} {name}: {value:.2e} (at most {limit:.0e})")
    return value <= limit


def one_gpu() -> bool:
    recipe, good = RandomTokens(), True
    for precision, limit in (("float32", 1e-4), ("bf16", 2e-2), ("fp16", 2e-2)):
        reference = trained(recipe, device="cpu", precision="float32")
        options = {"device": "cuda", "precision": precision, "accumulate": 1}
        found = trained(recipe, **options)
        good &= check(f"{precision}, GPU against CPU", distance(found, reference), limit)
        with tempfile.TemporaryDirectory() as folder:
            again = trained(recipe, folder=Path(folder), stop=4, save_every=3, **options)
        good &= check(f"{precision}, resumed", distance(again, found), 0.0 if precision == "float32" else 1e-3)
    return good


def two_gpus() -> bool:
    """Under torchrun: compare both kinds with one process, on rank 0."""
    good = True
    for kind in ("ddp", "fsdp2"):
        settings = TrainSettings(device="cuda", parallel=kind)
        with launch.place(settings) as at:
            found = trained(RandomTokens(), at, device="cuda", parallel=kind, accumulate=2)
            if at.rank == 0:
                single = trained(Twin(), Place(device=at.device), device="cuda", accumulate=4)
                good &= check(f"two GPUs, {kind}, against one", distance(found, single), 1e-4)
            at.group.wait()
    return good


def peak(method: str) -> float:
    torch.cuda.reset_peak_memory_stats()
    trained(RandomTokens(), device="cuda", method=method)
    return torch.cuda.max_memory_allocated() / 2**20


def main() -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if "WORLD_SIZE" in os.environ:
        sys.exit(0 if two_gpus() else 1)
    print(torch.cuda.get_device_name(), torch.__version__)
    good = one_gpu()
    if torch.cuda.device_count() > 1:
        good &= subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
                                __file__]).returncode == 0
    else:
        print("one GPU: DDP and FSDP2 over NCCL are left out")
    plain, sam = peak("base"), peak("sam")
    print(f"peak memory: plain {plain:.0f} MiB, SAM {sam:.0f} MiB, ratio {sam / plain:.2f}")
    speed(["--device", "cuda", "--steps", "20"])
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
