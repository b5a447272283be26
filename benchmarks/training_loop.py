"""Claim: the training loop costs at most 3 % of a loop written by hand.

Trains a transformer of 2 million parameters on random tokens by flatmin's loop and by hand, in one process, in turns of
a few steps; prints tokens a second of both and the ratio of their CPU times (median over the turns, and quartiles).
"sam" by hand calls the same ``Sharpener``, so that what is compared is the loop.

    python benchmarks/training_loop.py [--methods base,sam] [--turns 15] [--steps 4] [--device cpu]
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flatmin import presets
from flatmin.recipes.transformer import SIZES, Transformer
from flatmin.training.protocol import Place
from flatmin.training.run import Training
from flatmin.training.settings import TrainSettings
from flatmin.training.streams import Shuffled


@dataclass(frozen=True)
class RandomTokens:
    """Windows of random tokens."""

    context: int = 64
    batch_size: int = 8
    name: str = "random tokens"

    def model(self) -> nn.Module:
        return Transformer(SIZES["2M"], self.context)

    def train_batches(self, at: Place) -> Shuffled:
        generator = torch.Generator().manual_seed(0)
        return Shuffled((torch.randint(8192, (1024, self.context + 1), generator=generator),), self.batch_size, at)

    def forward(self, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        return model(batch[0][:, :-1])

    def loss(self, outputs: Tensor, batch: tuple[Tensor, ...]) -> Tensor:
        return F.cross_entropy(outputs.flatten(0, 1), batch[0][:, 1:].flatten())

    def weight(self, batch: tuple[Tensor, ...]) -> float:
        return batch[0][:, 1:].numel()

    def optimizers(self, model: nn.Module) -> list[torch.optim.Optimizer]:
        return [torch.optim.AdamW(model.parameters(), lr=1e-3)]


def by_hand(recipe: RandomTokens, method: str, steps: int, device: torch.device) -> Callable[[], None]:
    """One step of the bare loop."""
    torch.manual_seed(0)
    model = recipe.model().to(device)
    optimizer, = recipe.optimizers(model)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    sharpener = None if method == "base" else getattr(presets, method)(model, rho=0.05)
    stream = epochs(recipe)

    def step() -> None:
        x = next(stream)[0].to(device)
        if sharpener is None:
            recipe.loss(recipe.forward(model, (x,)), (x,)).backward()
        else:
            sharpener.backward(lambda: model(x[:, :-1]), lambda z: recipe.loss(z, (x,)))
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()

    return step


def epochs(recipe: RandomTokens) -> Iterator[tuple[Tensor, ...]]:
    batches = recipe.train_batches(Place())
    return itertools.chain.from_iterable(iter(batches) for _ in itertools.count())



def by_loop(recipe: RandomTokens, method: str, steps: int, device: torch.device) -> Callable[[], None]:
    """One step of flatmin's loop, as ``Training.run`` makes it; every tenth is logged."""
    settings = TrainSettings(method=method, rho=0.05, steps=steps, evaluate_every=0, device=str(device))
    training = Training(recipe, settings, Place(device=device))
    run = training.iterate()
    return lambda: next(run)


def seconds(step: Callable[[], None], count: int, device: torch.device) -> float:
    """CPU seconds of some steps; on an accelerator the time until it is done."""
    if device.type != "cpu":
        torch.accelerator.synchronize()
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    start = clock()
    for _ in range(count):
        step()
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return clock() - start


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default="base,sam")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    recipe, device, found = RandomTokens(), torch.device(options.device), {}
    tokens = options.steps * recipe.batch_size * recipe.context
    for method in options.methods.split(","):
        total = (options.turns + 1) * options.steps
        ours, theirs = (make(recipe, method, total, device) for make in (by_loop, by_hand))
        times: list[tuple[float, float]] = []
        for turn in range(options.turns + 1):
            pair = [(0, ours), (1, theirs)][::1 if turn % 2 else -1]
            spent = dict((i, seconds(step, options.steps, device)) for i, step in pair)
            times += [(spent[0], spent[1])] if turn else []      # the first turn warms up
        ratios = [b / a for a, b in times]
        low, median, high = statistics.quantiles(ratios, n=4)
        found[method] = median
        print(f"{method}: loop {tokens / statistics.median(a for a, _ in times):.0f} tokens/s, by hand "
              f"{tokens / statistics.median(b for _, b in times):.0f}; loop over hand {median:.3f} "
              f"(quartiles {low:.3f} to {high:.3f}, {len(times)} turns of {options.steps} steps)")
    return found


if __name__ == "__main__":
    main()
