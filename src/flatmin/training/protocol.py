"""What the training loop asks of a recipe: a model, its data, a loss, optimizers, and how it is evaluated."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..parallel import Group


@dataclass(frozen=True)
class Place:
    """Where a run takes place: its seed, this process among ``world`` processes, its device, the folder of the data.

    ``group``: the processes.
    """

    seed: int = 0
    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")
    folder: str | None = None
    group: Group = field(default=Group(None), compare=False, repr=False)


@dataclass(frozen=True)
class Metric:
    """A mean over ``weight`` samples or tokens, its standard error (nan: not known), and which way is better.

    Several ranks' means are averaged by their weights; a bare number has the weight 1. ``higher_is_better`` is None
    where neither is.
    """

    value: float
    stderr: float = math.nan
    weight: float = 1.0
    higher_is_better: bool | None = False


class Batches(Protocol):
    """The micro-batches of one rank.

    Iterating yields what is left of the current epoch (a stream without epochs never ends), and the next iteration
    begins the next epoch. ``state_dict`` says where the stream stands, in tensors and plain values; a new stream that
    loads it goes on with the same batches.
    """

    def __iter__(self) -> Iterator[Any]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Recipe(Protocol):
    """What is trained. A frozen dataclass serves well: its fields are recorded with the run.

    Optional attributes, looked up by name:
        prepare(batch, generator): called once a step and micro-batch, before both passes: augmentation, a teacher's
            outputs. ``generator`` (on the CPU) is seeded with (seed, step, rank), so that a resumed run draws the same.
        held_out(split, at), evaluate(model, batches): data apart from training ("tune", "test" or "measure"), on each
            rank its share, and the metrics of a model on them, a dict of :class:`Metric`. A rank whose share is an
            empty list does not evaluate; under FSDP2 all ranks must have equally many batches.
        losses(outputs, batch): one loss a sample, for ESAM.
        blocks(model): the modules that are sharded and checkpointed one by one, such as the layers of a transformer.
        splits: the names that ``held_out`` knows, where "train" (all that is trained on) is among them.
        holding_out(part), folds: the recipe without a fifth of its training data, which is then its "tune" split; over
            how many of the fifths ``flatmin compare`` chooses a radius. Without it, "tune" must not be test data.
        with_optimizer(name): the recipe on "sgd" or "adamw".
        check(outputs, batch, at): raises a ValueError where the outputs of a batch do not fit the data.
        facts(at): what the record says of the data, with a "fingerprint" that differs where they do.
        units: what ``weight`` counts, for the record: "samples" (the default) or "tokens".
    """

    @property
    def name(self) -> str: ...

    def model(self) -> nn.Module:
        """A new model; torch is seeded before."""
        ...

    def train_batches(self, at: Place) -> Batches: ...

    def forward(self, model: nn.Module, batch: Any) -> Any: ...

    def loss(self, outputs: Any, batch: Any) -> Tensor:
        """The mean loss of a batch."""
        ...

    def weight(self, batch: Any) -> float:
        """How many samples or tokens the loss of a batch is a mean of."""
        ...

    def optimizers(self, model: nn.Module) -> list[torch.optim.Optimizer]:
        """Optimizers over the model's parameters; the model comes without its wrappers of ``compile`` and DDP."""
        ...


REQUIRED = ("name", "model", "train_batches", "forward", "loss", "weight", "optimizers")


def check_recipe(recipe: Any) -> None:
    """Raise a ValueError that names what a recipe lacks."""
    missing = [name for name in REQUIRED if not hasattr(recipe, name)]
    if missing:
        raise ValueError(f"{type(recipe).__name__} is not a recipe: it lacks {', '.join(missing)} "
                         "(flatmin.training.protocol.Recipe says what they do)")
    if hasattr(recipe, "evaluate") != hasattr(recipe, "held_out"):
        raise ValueError(f"recipe {recipe.name} has one of held_out and evaluate: evaluation needs both, or neither")


def evaluated(recipe: Any, model: nn.Module, batches: Iterable[Any]) -> dict[str, Metric]:
    """What the recipe says of a model, checked.

    Raises:
        ValueError: something else than a dict of metrics whose values are numbers.
    """
    found = recipe.evaluate(model, batches)
    if not isinstance(found, dict) or not found:
        raise ValueError(f"evaluate of recipe {recipe.name} must return a dict of flatmin.training.Metric, "
                         f"got {type(found).__name__}")
    out = {}
    for name, metric in found.items():
        if isinstance(metric, (int, float)) and not isinstance(metric, bool):
            metric = Metric(float(metric))
        if not isinstance(metric, Metric):
            raise ValueError(f"the metric {name!r} of recipe {recipe.name} must be a flatmin.training.Metric or a "
                             f"number, got {type(metric).__name__}")
        if not 0 <= metric.weight < math.inf:
            raise ValueError(f"the weight of the metric {name!r} of recipe {recipe.name} must be finite and not "
                             f"negative, got {metric.weight}")
        out[str(name)] = metric
    return out


def over_ranks(shares: Sequence[dict[str, Metric]]) -> dict[str, Metric]:
    """The metrics of all ranks' data together: means and errors by weight; a share of weight 0 says nothing."""
    names = dict.fromkeys(name for share in shares for name in share)
    return {name: _together([share[name] for share in shares if name in share]) for name in names}


def _together(metrics: list[Metric]) -> Metric:
    metrics = [m for m in metrics if m.weight > 0]
    if len(metrics) < 2:
        return metrics[0] if metrics else Metric(math.nan, weight=0.0)
    n = math.fsum(m.weight for m in metrics)
    return Metric(math.fsum(m.weight * m.value for m in metrics) / n,
                  math.hypot(*(m.weight * m.stderr for m in metrics)) / n, n, metrics[0].higher_is_better)
