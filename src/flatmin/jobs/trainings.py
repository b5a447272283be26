"""The training runs of a comparison: how long they are, what is evaluated, where they are kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import perturbed
from ..errors import RunFolderError
from ..objective import Objective
from ..training.methods import Method
from ..training.protocol import Metric, Place, check_recipe, evaluated
from ..training.run import Training
from ..training.settings import TrainSettings
from ..training.streams import steps_an_epoch
from ..training.user_code import said
from .settings import CompareSettings

RECORDED_STEPS = 250
"""Steps of a run that are recorded for the diagnosis, at most; they are evenly spaced."""


def length(recipe: Any, settings: CompareSettings) -> tuple[int, int]:
    """Steps of a run on a recipe, and of one epoch (of a stream without epochs: a tenth of the run).

    Raises:
        ValueError: neither the settings nor the recipe say how long.
    """
    each = steps_an_epoch(recipe.train_batches(Place(folder=settings.data)), 1)
    epochs = settings.epochs if settings.epochs is not None else getattr(recipe, "epochs", None)
    steps = settings.steps
    if steps is None and epochs is not None and each is not None:
        steps = epochs * each
    steps = getattr(recipe, "steps", None) if steps is None else steps
    if steps is None:
        raise ValueError(f"recipe {recipe.name} says no number of steps, and its stream no length: pass --steps")
    return int(steps), each or math.ceil(steps / 10)


def endless(recipe: Any, at: Place) -> bool:
    """Whether the training data know no epochs."""
    return steps_an_epoch(recipe.train_batches(at), 1) is None


def training(recipe: Any, method: Method, rho: float | None, seed: int, settings: CompareSettings, *,
             splits: Sequence[str] = (), folder: Path | None = None, log_every: int | None = None,
             tick: Callable[[int], None] = lambda done: None) -> Training:
    """A run of a method on the recipe with the optimizer it needs; it resumes where a checkpoint in the folder is."""
    recipe = method.on(recipe)
    steps, each = length(recipe, settings)
    steps *= method.factor
    asked = TrainSettings(method=method.preset, rho=rho if method.rhos else None, seed=seed, steps=steps,
                          log_every=log_every or math.ceil(steps / RECORDED_STEPS), evaluate_every=each, device="cpu")
    return Training(recipe, asked, place(seed, settings), folder, tick, splits)


def place(seed: int, settings: CompareSettings) -> Place:
    return Place(seed, folder=settings.data)


def metrics_of(recipe: Any, model: nn.Module, split: str, at: Place) -> dict[str, Metric]:
    """What the recipe says of a model on a split."""
    with perturbed.unchanged_random_state([at.device]), torch.no_grad(), \
            perturbed.module_mode(model, training=False):
        torch.manual_seed(at.seed)
        return evaluated(recipe, model, recipe.held_out(split, at))


def objective_of(recipe: Any, model: nn.Module, at: Place) -> Objective:
    """The model on the data that sharpness and curvature are measured on."""
    return Objective(model, recipe.loss, list(recipe.held_out("measure", at)), forward=recipe.forward,
                     weight=recipe.weight)


def checked(recipe: Any, at: Place) -> dict[str, Metric]:
    """Pass one batch through model, loss and evaluation, so that what does not fit is said before any work is done.

    Returns:
        The metrics of the new model on training data.

    Raises:
        ValueError: what the recipe lacks, or what its parts raised.
    """
    check_recipe(recipe)
    if not hasattr(recipe, "evaluate"):
        raise ValueError(f"recipe {recipe.name} has no held_out and evaluate: compare has nothing to compare by "
                         "(flatmin.training.protocol.Recipe says what they do)")
    torch.manual_seed(0)
    stream = recipe.train_batches(at)
    torch.manual_seed(0)
    batch, = _passed(recipe, "the training data cannot be read", lambda: [next(iter(stream), None)])
    if batch is None:
        raise ValueError(f"recipe {recipe.name}: the training data gave no batch")
    which = "a batch of training data does not go through its model and loss"
    with torch.no_grad():
        model, outputs = _passed(recipe, which, lambda: (model := recipe.model(), recipe.forward(model, batch)))
        if hasattr(recipe, "check"):
            recipe.check(outputs, batch, at)
        loss = _passed(recipe, which, lambda: recipe.loss(outputs, batch))
    if loss.numel() != 1:
        raise ValueError(f"recipe {recipe.name}: the loss must be one number, the mean over the batch, it has the "
                         f"shape {tuple(loss.shape)}")
    try:
        return metrics_of(recipe, model, "measure", at)
    except (ValueError, RunFolderError):
        raise
    except Exception as error:
        raise ValueError(f"recipe {recipe.name}: its model cannot be evaluated: {said(error)}") from error


def _passed(recipe: Any, what: str, call: Callable[[], Any]) -> Any:
    """What the user's own code returns; whatever it raises becomes one line."""
    try:
        return call()
    except Exception as error:
        raise ValueError(f"recipe {recipe.name}: {what}: {said(error)}") from error
