"""The training loop: one for all recipes and methods, resumable bit for bit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..ascent import Sharpener
from ..ascent.presets import PRESETS
from .folder import RunFolder
from .methods import Method
from .metrics import classification, logits_of
from .recipe import Recipe


@dataclass(frozen=True)
class Plan:
    """One training run: recipe, method, seed, data and number of epochs."""

    key: str
    recipe: Recipe
    method: Method
    rho: float | None
    seed: int
    epochs: int
    inputs: Tensor
    targets: Tensor
    watch: tuple[Tensor, Tensor] | None = None      # inputs and targets whose accuracy is recorded by epoch
    held_out: tuple[Tensor, Tensor] | None = None   # training data left out of this run, for its diagnosis


RECORDED = 250
"""Steps of a run that are recorded for the diagnosis, at most; they are evenly spaced."""


class Diverged(ArithmeticError):
    """The loss is no longer finite; ``history`` goes up to there."""

    def __init__(self, text: str, history: dict[str, list[Any]] | None = None):
        super().__init__(text)
        self.history = history


def batches(n: int, batch_size: int, seed: int, epoch: int) -> Iterator[Tensor]:
    """Index batches of an epoch: a function of seed and epoch alone, so that methods see the same batches."""
    generator = torch.Generator().manual_seed(1_000_003 * (seed + 1) + epoch)
    yield from torch.randperm(n, generator=generator).split(batch_size)


def train(plan: Plan, tick: Callable[[], None] = lambda: None, folder: RunFolder | None = None,
          state: dict[str, Any] | None = None) -> tuple[nn.Module, dict[str, list[Any]]]:
    """Train and return the model and its history by epoch, with every n-th step under "steps".

    With a folder the state is saved after every epoch; ``state``, loaded from it, resumes the run bit for bit.
    ``tick`` is called once a step.
    """
    torch.manual_seed(plan.seed)
    model = plan.recipe.model()
    optimizer = optimizer_for(plan.method.base, model, plan.recipe)
    sharpener = sharpener_for(plan.method, model, optimizer, plan.rho)
    n, size = len(plan.inputs), plan.recipe.batch_size
    steps = plan.epochs * math.ceil(n / size)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    history: dict[str, list[Any]] = {"epoch": [], "train_loss": [], "test_accuracy": [], "train_accuracy": [],
                                     "held_out": [], "steps": []}
    start, done, every = 0, 0, math.ceil(steps / RECORDED)
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        if sharpener is not None:
            sharpener.load_state_dict(state["sharpener"])
        torch.set_rng_state(state["rng"])
        history, start = state["history"], state["epoch"]
        done = start * math.ceil(n / size)
    for epoch in range(start, plan.epochs):
        model.train()
        total = torch.zeros((), dtype=torch.float64)
        for index in batches(n, size, plan.seed, epoch):
            recorded = done % every == 0
            if sharpener is not None:
                sharpener.perturbed_norm = recorded
            loss = gradient(sharpener, model, plan.recipe, plan.inputs[index], plan.targets[index])
            if recorded:
                history["steps"].append({"step": done} | _step(sharpener, loss))
            done += 1
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            total += loss.double() * len(index)
            tick()
        if not math.isfinite(total.item()):
            history["steps"].append({"step": done, "loss": total.item()})
            cure = "the learning rate" if sharpener is None else "the radius or the learning rate"
            raise Diverged(f"{plan.method.name} with rho={plan.rho}, seed {plan.seed}: the loss is not finite in epoch "
                           f"{epoch + 1}; lower {cure}", history)
        history["epoch"].append(epoch + 1)
        history["train_loss"].append(total.item() / n)
        if plan.watch is not None:
            history["test_accuracy"].append(accuracy(model, *plan.watch))
        if plan.held_out is not None:
            x, y = plan.held_out
            history["held_out"].append(classification(logits_of(model, x), y))
        if plan.watch is not None or plan.held_out is not None:
            history["train_accuracy"].append(accuracy(model, plan.inputs, plan.targets))
        if folder is not None:
            folder.save_state({
                "key": plan.key, "epoch": epoch + 1, "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                "scheduler": scheduler.state_dict(), "rng": torch.get_rng_state(), "history": history,
                "sharpener": sharpener.state_dict() if sharpener is not None else None,
            })
    return model, history


def sharpener_for(method: Method, model: nn.Module, optimizer: torch.optim.Optimizer,
                  rho: float | None) -> Sharpener | None:
    """The preset that a method is, over a model; None for a plain optimizer."""
    if method.name not in PRESETS:
        return None
    return PRESETS[method.name](model, rho=rho, optimizer=optimizer)


def optimizer_for(base: str, model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The base optimizer a method descends with."""
    if base == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=recipe.adamw_lr, weight_decay=recipe.weight_decay)
    return torch.optim.SGD(model.parameters(), lr=recipe.lr, momentum=recipe.momentum,
                           weight_decay=recipe.weight_decay)


def gradient(sharpener: Sharpener | None, model: nn.Module, recipe: Recipe, x: Tensor, y: Tensor) -> Tensor:
    """Leave the method's gradient of one batch in ``p.grad``; returns the loss."""
    if sharpener is None:
        loss = recipe.loss(model(x), y)
        loss.backward()
        return loss.detach()
    if sharpener.rule.second.needs_samples:
        options: dict[str, Any] = {"reduction": "none"}
        return sharpener.backward(lambda s: model(x[s]), lambda z, s: recipe.loss(z, y[s], **options))
    return sharpener.backward(lambda: model(x), lambda z: recipe.loss(z, y))


def _step(sharpener: Sharpener | None, loss: Tensor) -> dict[str, Any]:
    """What the diagnosis reads of a step whose gradient is in ``p.grad``."""
    if sharpener is None:
        return {"loss": loss.item()}
    return {name: value for name, value in sharpener.last.to_dict().items() if name in STEP}


STEP = ("loss", "perturbed_loss", "gradient_norm", "perturbed_gradient_norm", "radius", "cosine", "skipped", "passes")


def accuracy(model: nn.Module, inputs: Tensor, targets: Tensor) -> float:
    """Share of examples whose class is predicted."""
    return (logits_of(model, inputs).argmax(-1) == targets).double().mean().item()
