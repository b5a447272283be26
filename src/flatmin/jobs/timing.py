"""The time of a training step: measured side by side for the record, and predicted before a run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..ascent import Sharpener
from ..training.loop import batches, gradient, optimizer_for, sharpener_for
from ..training.methods import Method
from ..training.recipe import Data, Recipe

Trainee = tuple[nn.Module, torch.optim.Optimizer, Sharpener | None]


def side_by_side(recipe: Recipe, data: Data, methods: Sequence[Method], rhos: Mapping[str, float | None],
                 steps: int = 60) -> dict[str, Any]:
    """Seconds a step, methods alternating on the same batches; ratios to the first method, step by step."""
    trained = _trainees(recipe, methods, rhos)
    times: list[list[float]] = [[] for _ in trained]
    index = list(batches(len(data.train_inputs), recipe.batch_size, 0, 0))
    for i in range(steps + 5):
        x, y = (t[index[i % len(index)]] for t in (data.train_inputs, data.train_targets))
        for trainee, seconds in zip(trained, times, strict=True):
            taken = _step(recipe, trainee, x, y)
            if i >= 5:
                seconds.append(taken)
    out = {}
    for method, seconds in zip(methods, times, strict=True):
        ratios = [a / b for a, b in zip(seconds, times[0], strict=True)]
        quartiles = statistics.quantiles(ratios, n=4)
        out[method.name] = {"seconds": statistics.median(seconds), "ratio": statistics.median(ratios),
                            "mean_ratio": sum(seconds) / sum(times[0]), "quartiles": [quartiles[0], quartiles[2]],
                            "relative_to": methods[0].name}
    return out


def predicted(recipe: Recipe, data: Data, methods: Sequence[Method], steps: Mapping[str, int], tries: int = 5) -> float:
    """Seconds that so many steps of each method will take, from a few of each."""
    x, y = (t[:recipe.batch_size] for t in (data.train_inputs, data.train_targets))
    total = 0.0
    for method, trainee in zip(methods, _trainees(recipe, methods, {m.name: min(m.grid(recipe), default=None)
                                                                    for m in methods}), strict=True):
        total += steps[method.name] * statistics.median([_step(recipe, trainee, x, y) for _ in range(tries)][1:])
    return total


def _trainees(recipe: Recipe, methods: Sequence[Method], rhos: Mapping[str, float | None]) -> list[Trainee]:
    """A new model, optimizer and sharpener of every method."""
    out = []
    for method in methods:
        torch.manual_seed(0)
        model = recipe.model()
        optimizer = optimizer_for(method.base, model, recipe)
        out.append((model, optimizer, sharpener_for(method, model, optimizer, rhos[method.name])))
    return out


def _step(recipe: Recipe, trainee: Trainee, x: Tensor, y: Tensor) -> float:
    """Seconds of one training step."""
    model, optimizer, sharpener = trainee
    start = time.perf_counter()
    gradient(sharpener, model, recipe, x, y)
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - start
