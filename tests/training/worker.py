"""Trains every toy recipe, in one process or under ``torchrun``: ``worker.py FOLDER JSON``; killed and called again by
the tests."""

import json
import sys
import warnings
from pathlib import Path

import torch
from safetensors.torch import save_file
from toys import TOYS

from flatmin.training import launch
from flatmin.training.run import Training
from flatmin.training.settings import TrainSettings
from flatmin.training.state import weights

warnings.simplefilter("ignore")
folder, options = Path(sys.argv[1]), json.loads(sys.argv[2])
names = options.pop("toys", [toy.name for toy in TOYS])
settings = TrainSettings(threads=1, device="cpu", **options)
with launch.place(settings) as at:
    for toy in TOYS:
        final = folder / toy.name / "model.safetensors"
        if toy.name not in names or final.exists():
            continue
        training = Training(toy, settings, at, folder / toy.name)
        if at.rank == 0:
            with open(folder / "began", "a") as file:
                file.write(f"{training.done}\n")
        trained = training.run()
        state = weights(trained.model)
        at.group.wait()
        if at.rank == 0:
            part = final.with_suffix(".part")
            save_file(state, part)
            part.rename(final)
            torch.save(trained.evaluations, folder / toy.name / "evaluations.pt")
        at.group.wait()
