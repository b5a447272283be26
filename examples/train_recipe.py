"""Train a recipe of your own: a class with a model, its data and a loss; the loop does the rest.

A student learns the outputs of a fixed teacher from noisy inputs. The teacher's outputs are computed once a step, in
``prepare``, and both passes of SAM see them.

    python examples/train_recipe.py [--method sam] [--steps 60] [--out FOLDER]
    torchrun --nproc-per-node=2 examples/train_recipe.py --accumulate 2

Run the second line again after a kill and it continues where its newest checkpoint stands.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flatmin.training.launch import place
from flatmin.training.protocol import Metric, Place
from flatmin.training.run import Trained, Training
from flatmin.training.settings import TrainSettings
from flatmin.training.streams import Shuffled


@dataclass(frozen=True)
class Distillation:
    """Fields are recorded with the run, and a checkpoint of other values is refused."""

    width: int = 16
    rows: int = 512
    noise: float = 0.1
    name: str = "distillation"

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(8, self.width), nn.ReLU(), nn.Linear(self.width, 4))

    def teacher(self) -> Tensor:
        return torch.randn(8, 4, generator=torch.Generator().manual_seed(1))

    def inputs(self, seed: int) -> Tensor:
        return torch.randn(self.rows, 8, generator=torch.Generator().manual_seed(seed))

    def train_batches(self, at: Place) -> Shuffled:
        return Shuffled((self.inputs(2),), 32, at)      # each rank takes its share

    def prepare(self, batch: tuple[Tensor, ...], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x = batch[0] + self.noise * torch.randn(batch[0].shape, generator=generator).to(batch[0].device)
        return x, (x @ self.teacher().to(x.device)).softmax(-1)

    def forward(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return model(batch[0])

    def loss(self, outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(outputs, batch[1])

    def weight(self, batch: tuple[Tensor, Tensor]) -> float:
        return len(batch[0])

    def optimizers(self, model: nn.Module) -> list[torch.optim.Optimizer]:
        return [torch.optim.AdamW(model.parameters(), lr=3e-2)]

    def held_out(self, split: str, at: Place) -> list[Tensor]:
        return [self.inputs(3)[at.rank::at.world].to(at.device)]

    def evaluate(self, model: nn.Module, batches: Iterable[Tensor]) -> dict[str, Metric]:
        right = torch.cat([model(x).argmax(-1) == (x @ self.teacher().to(x.device)).argmax(-1) for x in batches])
        p, n = right.double().mean().item(), len(right)
        return {"agreement": Metric(p, (p * (1 - p) / n) ** 0.5, n, higher_is_better=True)}


def main(arguments: list[str] | None = None) -> Trained:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="sam")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=None)
    options = vars(parser.parse_args(arguments))
    folder = options.pop("out")
    settings = TrainSettings(rho=0.05, **options)
    with place(settings) as at:
        trained = Training(Distillation(), settings, at, folder).run()
        if at.rank == 0:
            for row in trained.evaluations:
                print(f"step {row['step']}: training loss {row['train_loss']:.3f}, agreement with the teacher "
                      f"{row['tune']['agreement']:.3f} ± {row['stderr']['tune']['agreement']:.3f}")
    return trained


if __name__ == "__main__":
    main()
