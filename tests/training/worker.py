"""Trains every toy recipe in one of several processes; killed and called again by the tests."""

import os
import warnings
from pathlib import Path

import torch
from safetensors.torch import save_file
from toys import TOYS

from flatmin.training import launch
from flatmin.training.run import Training
from flatmin.training.settings import TrainSettings
from flatmin.training.state import weights


def main(rank, world, port, folder, options):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port)}     # as torchrun does
    warnings.simplefilter("ignore")
    torch.set_default_dtype(torch.float32)
    settings = TrainSettings(threads=1, device="cpu", **options)
    with launch.place(settings) as at:
        for toy in TOYS:
            final = Path(folder) / toy.name / "model.safetensors"
            if not final.exists():
                one(toy, settings, at, final)


def one(toy, settings, at, final):
    training = Training(toy, settings, at, final.parent)
    if at.rank == 0:
        with open(final.parent.parent / "began", "a") as file:
            file.write(f"{training.done}\n")
    state = weights(training.run().model)
    at.group.wait()
    if at.rank == 0:
        part = final.with_suffix(".part")
        save_file(state, part)
        part.rename(final)
    at.group.wait()
