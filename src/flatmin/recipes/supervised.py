"""Recipes made in a line from a model, a loss and data: tensors, data sets or loaders."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import batches as data
from ..training.protocol import Metric, Place
from ..training.streams import Loaded, Shuffled

Optimizers = torch.optim.Optimizer | list[torch.optim.Optimizer]

Measure = Callable[[Any, Any], Tensor]
"""``measure(outputs, targets)``: one number a sample, (n,)."""


@dataclass(frozen=True)
class Supervised:
    """A model, a mean loss of (outputs, targets), and pairs of inputs and targets.

    Args:
        model: builds the model; called after torch was seeded.
        loss: the mean loss of (outputs, targets); a ``reduction="none"`` option serves ESAM too.
        train: ``(inputs, targets)`` tensors; a ``torch.utils.data.Dataset``; a loader of ``(inputs, targets)``, whose
            batch size is then its own; or a function that returns one of them.
        test: the same; what the model is evaluated on. None: on the training data.
        tune: the same; what a radius is chosen on. None: a fifth of the training data, held out.
        name: for the record.
        batch_size: rows of a micro-batch on each rank.
        epochs: passes over the training data.
        optimizer: "sgd" or "adamw", or a function of the model that returns an optimizer or a list of them.
        lr, momentum, weight_decay: of the optimizer; ``momentum`` of SGD.
        adamw_lr: of AdamW where ``flatmin compare`` takes it in place of SGD.
        metrics: by name, functions of (outputs, targets) that give one number a sample; the loss is always there.
        higher_is_better: the names of those that should be large.
        augment: ``augment(inputs, generator)``, called once a step before both passes.

    Example:
        >>> import torch
        >>> x = torch.randn(64, 4)
        >>> recipe = Supervised(lambda: torch.nn.Linear(4, 1), torch.nn.functional.mse_loss, (x, x[:, :1]), epochs=2)
    """

    model: Callable[[], nn.Module]
    loss_fn: Callable[..., Tensor]
    train: Any
    test: Any = None
    tune: Any = None
    name: str = "supervised"
    batch_size: int = 32
    epochs: int = 20
    optimizer: Literal["sgd", "adamw"] | Callable[[nn.Module], Optimizers] = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    adamw_lr: float = 1e-3
    metrics: Mapping[str, Measure] = field(default_factory=dict)
    higher_is_better: tuple[str, ...] = ()
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None

    def with_optimizer(self, name: str) -> Supervised:
        """The same recipe on "sgd" or "adamw"."""
        if name == self.optimizer:
            return self
        if not isinstance(self.optimizer, str):
            raise ValueError(f"recipe {self.name} makes its own optimizer: compare with base instead of {name}")
        return dataclasses.replace(self, optimizer=name, lr=self.adamw_lr if name == "adamw" else self.lr)

    def holding_out(self, part: int) -> Supervised:
        """The same recipe trained without a fifth of its training data, on which "tune" then evaluates.

        With data for tuning of its own, the recipe itself.

        Raises:
            ValueError: data that cannot be split, such as a stream.
        """
        if self.tune is not None:
            return self
        kept, held = _split(_made(self.train), part, self.name)
        return dataclasses.replace(self, train=kept, tune=held)

    def train_batches(self, at: Place) -> Any:
        return self._stream(_made(self.train), at)

    def held_out(self, split: str, at: Place) -> Iterable[Any]:
        """The data for tuning, else for testing, in "tune"; the training data in a fixed order in "measure"."""
        source = self.train if split == "measure" or self.test is None else self.test
        source = _made(self.tune if split == "tune" and self.tune is not None else source)
        tensors = _tensors(source)
        if tensors is None:
            return _rank_share(source, at)
        rows = slice(at.rank, None, at.world)
        return list(zip(*(t[rows].split(1024) for t in tensors), strict=True))

    def prepare(self, batch: Any, generator: torch.Generator) -> Any:
        if self.augment is None:
            return batch
        return (self.augment(batch[0], generator), *batch[1:])

    def forward(self, model: nn.Module, batch: Any) -> Any:
        return model(batch[0])

    def loss(self, outputs: Any, batch: Any) -> Tensor:
        return self.loss_fn(outputs, batch[1])

    def losses(self, outputs: Any, batch: Any) -> Tensor:
        each = self.loss_fn(outputs, batch[1], reduction="none")
        return each.flatten(1).mean(1) if each.dim() > 1 else each

    def weight(self, batch: Any) -> float:
        return float(data.count_loss_terms(batch, self.loss_fn, False))

    def optimizers(self, model: nn.Module) -> list[torch.optim.Optimizer]:
        if not isinstance(self.optimizer, str):
            made = self.optimizer(model)
            return [made] if isinstance(made, torch.optim.Optimizer) else list(made)
        trained = [p for p in model.parameters() if p.requires_grad]
        if self.optimizer == "adamw":
            return [torch.optim.AdamW(trained, lr=self.lr, weight_decay=self.weight_decay)]
        return [torch.optim.SGD(trained, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)]

    def evaluate(self, model: nn.Module, batches: Iterable[Any]) -> dict[str, Metric]:
        """The mean loss and each metric, with standard errors over samples where one number a sample is known."""
        sums: dict[str, list[float]] = {name: [0.0, 0.0, 0.0] for name in ("loss", *self.metrics)}
        for batch in batches:
            batch = data.move(batch, next(model.parameters()).device)
            outputs = self.forward(model, batch)
            n = self.weight(batch)
            _add(sums["loss"], float(self.loss(outputs, batch)) * n, math.nan, n)
            for name, measure in self.metrics.items():
                each = measure(outputs, batch[1]).double()
                _add(sums[name], float(each.sum()), float(each.square().sum()), each.numel())
        return {name: _metric(first, second, n, name in self.higher_is_better)
                for name, (first, second, n) in sums.items() if n > 0}

    def _stream(self, source: Any, at: Place) -> Any:
        tensors = _tensors(source)
        if tensors is not None:
            return Shuffled(tensors, self.batch_size, at)
        if isinstance(source, torch.utils.data.Dataset) and not isinstance(source, torch.utils.data.IterableDataset):
            sampler = torch.utils.data.DistributedSampler(source, at.world, at.rank, seed=at.seed)  # type: ignore[arg-type]
            return Loaded(torch.utils.data.DataLoader(source, self.batch_size, sampler=sampler), at)
        return Loaded(source, at)


def classification(model: Callable[[], nn.Module], train: Any, test: Any = None, **options: Any) -> Supervised:
    """A recipe with cross-entropy, and accuracy as its metric.

    ``options``: any field of :class:`Supervised`.
    """
    def right(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs.argmax(1) == targets).double()

    return Supervised(model, nn.functional.cross_entropy, train, test, **{
        "name": "classification", "metrics": {"accuracy": right}, "higher_is_better": ("accuracy",), **options})


def _made(source: Any) -> Any:
    made = source() if callable(source) and not isinstance(source, torch.utils.data.Dataset) else source
    if made is None:
        raise ValueError("the data are None: pass (inputs, targets), a data set, a loader, or a function that returns "
                         "one of them")
    return made


def _tensors(source: Any) -> tuple[Tensor, ...] | None:
    """A pair of tensors, or those of a ``TensorDataset``; None for anything else."""
    if isinstance(source, torch.utils.data.TensorDataset):
        return tuple(source.tensors)
    if isinstance(source, (tuple, list)) and len(source) == 2 and all(isinstance(t, Tensor) for t in source):
        return tuple(source)
    return None


def _split(source: Any, part: int, name: str) -> tuple[Any, Any]:
    """A source without a fifth of its rows or batches, and that fifth."""
    tensors = _tensors(source)
    loader = source if isinstance(source, torch.utils.data.DataLoader) else None
    dataset: Any = source if loader is None else loader.dataset
    splits = isinstance(source, (list, tuple)) or isinstance(dataset, torch.utils.data.Dataset)
    sized: Any = tensors[0] if tensors else dataset if splits and hasattr(dataset, "__len__") else ()
    n = len(sized)
    if n < 5:
        raise ValueError(f"recipe {name}: {type(source).__name__} cannot be split into five parts to choose a radius "
                         "on: pass tune= data, or one --rho for each method")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(77))
    held, kept = order[part::5], torch.cat([order[i::5] for i in range(5) if i != part])
    if tensors is not None:
        return tuple(t[kept] for t in tensors), tuple(t[held] for t in tensors)
    if isinstance(source, (list, tuple)):
        return [source[i] for i in kept.sort().values], [source[i] for i in held]
    subsets = [torch.utils.data.Subset(dataset, rows.tolist()) for rows in (kept, held)]
    if loader is None:
        return subsets[0], subsets[1]
    shuffled = isinstance(loader.sampler, torch.utils.data.RandomSampler)
    again = [torch.utils.data.DataLoader(subset, loader.batch_size, shuffle=shuffled and i == 0,
                                         collate_fn=loader.collate_fn) for i, subset in enumerate(subsets)]
    return again[0], again[1]


def _rank_share(source: Any, at: Place) -> list[Any]:
    """Of the batches of a loader those of this rank; a data set is cut into batches first."""
    if isinstance(source, torch.utils.data.Dataset) and not isinstance(source, torch.utils.data.IterableDataset):
        source = torch.utils.data.DataLoader(source, 256)
    return [batch for i, batch in enumerate(source) if i % at.world == at.rank]


def _add(sums: list[float], first: float, second: float, n: float) -> None:
    for i, value in enumerate((first, second, n)):
        sums[i] += value


def _metric(first: float, second: float, n: float, higher: bool) -> Metric:
    mean = first / n
    spread = math.sqrt(max(second / n - mean**2, 0.0) / n) if math.isfinite(second) else math.nan
    return Metric(mean, spread, n, higher)
