"""Classifiers of tensors in memory: what ``flatmin compare`` trains, and the class for your own."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..files import digest
from ..training.metrics import classification, standard_errors
from ..training.protocol import Metric, Place
from ..training.streams import Shuffled
from ..training.user_code import said

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Data:
    """Training and test tensors; targets are class numbers from 0 to ``classes`` − 1."""

    train_inputs: Tensor
    train_targets: Tensor
    test_inputs: Tensor
    test_targets: Tensor
    classes: int

    def __post_init__(self) -> None:
        for name in ("train", "test"):
            x, y = getattr(self, f"{name}_inputs"), getattr(self, f"{name}_targets")
            if len(x) != len(y) or len(x) == 0:
                raise ValueError(f"the {name} data has {len(x)} inputs and {len(y)} targets")
            if y.is_floating_point() or y.dim() != 1 or y.min() < 0 or y.max() >= self.classes:
                raise ValueError(f"the {name} targets must be class numbers from 0 to {self.classes - 1}")
            broken = ~x.isfinite().flatten(1).all(1) if x.dim() > 1 else ~x.isfinite()
            if bool(broken.any()):
                raise ValueError(f"{int(broken.sum())} of {len(x)} {name} inputs hold NaN or inf, the first of them at "
                                 f"index {int(broken.nonzero()[0])}: leave them out, or fill them in")

    def fingerprint(self) -> str:
        """Differs where any value, shape or dtype does: a run resumes only with the data that it began with."""
        return digest(self.train_inputs, self.train_targets, self.test_inputs, self.test_targets)[:16]

    def with_noise(self, share: float, seed: int = 0) -> Data:
        """A share of the training labels re-drawn uniformly from all classes; test labels stay clean."""
        generator = torch.Generator().manual_seed(1_000 + seed)
        n = len(self.train_targets)
        picked = torch.randperm(n, generator=generator)[: round(share * n)]
        targets = self.train_targets.clone()
        targets[picked] = torch.randint(self.classes, (len(picked),), generator=generator)
        return Data(self.train_inputs, targets, self.test_inputs, self.test_targets, self.classes)


@dataclass(frozen=True)
class Classification:
    """A classifier, its data in memory and a loss, with settings that suit them.

    Args:
        name: for the report.
        model: builds the model; called after the random state was set from the seed.
        data: loads the data; called with the ``--data`` folder or None, once a process.
        criterion: mean loss of (outputs, targets); with a ``reduction="none"`` option it also serves ESAM.
        epochs, batch_size: passes over the training data, and rows of a batch on each rank.
        optimizer: "sgd" or "adamw".
        lr, momentum: of SGD.
        weight_decay: of either optimizer.
        adamw_lr: of AdamW.
        noise: the share of training labels re-drawn at random.
        folds: over how many held-out parts of the training data a radius is chosen.
        tuning_samples: training examples that a radius is chosen on, at most (None: all of them).
        rhos: radii to choose from, by method, where they differ from the library's own.
        curvature_samples: training examples that sharpness and curvature are measured on.
        part: the fifth of the training data that is held out from training; None: none is.

    Example:
        >>> import torch
        >>> def data(folder=None):
        ...     x = torch.randn(200, 4); y = (x[:, 0] > 0).long()
        ...     return Data(x[:100], y[:100], x[100:], y[100:], classes=2)
        >>> recipe = Classification("mine", lambda: torch.nn.Linear(4, 2), data, epochs=5)
    """

    name: str
    model: Callable[[], nn.Module]
    data: Callable[[str | None], Data]
    criterion: Callable[..., Tensor] = nn.functional.cross_entropy
    epochs: int = 40
    batch_size: int = 32
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    adamw_lr: float = 1e-3
    noise: float = 0.0
    folds: int = 1
    tuning_samples: int | None = None
    rhos: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    curvature_samples: int = 1000
    part: int | None = None
    splits: ClassVar[tuple[str, ...]] = ("train", "tune", "test", "measure")

    def load(self, folder: str | None) -> Data:
        """The data with :attr:`noise`, or a ``ValueError`` that says what is wrong with what :attr:`data` does."""
        return _loaded(self.data, folder, self.noise, self.name)

    def with_optimizer(self, name: str) -> Classification:
        """The same recipe on "sgd" or "adamw"."""
        return dataclasses.replace(self, optimizer=name)

    def holding_out(self, part: int) -> Classification:
        """The same recipe trained without a fifth of its training data, on which "tune" then evaluates."""
        return dataclasses.replace(self, part=part)

    def train_batches(self, at: Place) -> Shuffled:
        return Shuffled(self._training(self.load(at.folder)), self.batch_size, at)

    def held_out(self, split: str, at: Place) -> list[Pair]:
        """Batches of "train" (what is trained on), "tune" (the held-out fifth), "test", or "measure" (some of "train").

        Where nothing is held out, "tune" is the test data: to watch, not to choose by.
        """
        data = self.load(at.folder)
        x, y = self._training(data)
        if split == "measure":
            x, y = x[:self.curvature_samples], y[:self.curvature_samples]
            rows = slice(at.rank, None, at.world)
            return [(x[rows], y[rows])]
        if split == "test" or split == "tune" and self.part is None:
            x, y = data.test_inputs, data.test_targets
        elif split == "tune":
            held = self._fifth(len(data.train_targets))[1]
            x, y = data.train_inputs[held], data.train_targets[held]
        rows = slice(at.rank, None, at.world)
        return list(zip(x[rows].split(1024), y[rows].split(1024), strict=True))

    def forward(self, model: nn.Module, batch: Pair) -> Any:
        return model(batch[0])

    def loss(self, outputs: Any, batch: Pair) -> Tensor:
        return self.criterion(outputs, batch[1])

    def losses(self, outputs: Any, batch: Pair) -> Tensor:
        return self.criterion(outputs, batch[1], reduction="none")

    def weight(self, batch: Pair) -> float:
        return float(len(batch[1]))

    def optimizers(self, model: nn.Module) -> list[torch.optim.Optimizer]:
        if self.optimizer == "adamw":
            return [torch.optim.AdamW(model.parameters(), lr=self.adamw_lr, weight_decay=self.weight_decay)]
        return [torch.optim.SGD(model.parameters(), lr=self.lr, momentum=self.momentum,
                                weight_decay=self.weight_decay)]

    def evaluate(self, model: nn.Module, batches: list[Pair]) -> dict[str, Metric]:
        """Accuracy, mean negative log-likelihood, expected calibration error and mean confidence."""
        device = next(model.parameters()).device
        logits = torch.cat([model(x.to(device)).cpu() for x, _ in batches])
        targets = torch.cat([y for _, y in batches])
        errors = standard_errors(logits, targets)
        return {name: Metric(value, errors.get(name, math.nan), len(targets),
                             None if name == "confidence" else name == "accuracy")
                for name, value in classification(logits, targets).items()}

    def check(self, outputs: Any, batch: Pair, at: Place) -> None:
        """Raise a ``ValueError`` where outputs are not scores of the classes of the data."""
        classes, n = self.load(at.folder).classes, len(batch[1])
        shape = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        if not isinstance(outputs, Tensor) or outputs.dim() != 2 or len(outputs) != n or outputs.shape[1] < classes:
            raise ValueError(f"recipe {self.name}: the model must return one row of {classes} class scores for each of "
                             f"{n} inputs, it returned {'the shape' if isinstance(outputs, Tensor) else 'a'} {shape}")

    def facts(self, at: Place) -> dict[str, Any]:
        """What the record of a run says of the data; ``chance`` is the share of the most frequent class."""
        data = self.load(at.folder)
        n = len(data.test_targets)
        return {"train": len(data.train_targets), "test": n, "classes": data.classes, "noise": self.noise,
                "chance": float(data.test_targets.bincount().max()) / n,
                "held_out": len(self.holding_out(0)._fifth(len(data.train_targets))[1]),
                "fingerprint": data.fingerprint()}

    def _training(self, data: Data) -> Pair:
        if self.part is None:
            return data.train_inputs, data.train_targets
        kept = self._fifth(len(data.train_targets))[0]
        return data.train_inputs[kept], data.train_targets[kept]

    def _fifth(self, n: int) -> Pair:
        """The rows that are trained on, and those that are held out."""
        order = torch.randperm(n, generator=torch.Generator().manual_seed(77))[:self.tuning_samples]
        parts = [order[i::5] for i in range(5)]
        return torch.cat([p for j, p in enumerate(parts) if j != self.part]), parts[self.part or 0]


def Recipe(name: str, model: Callable[[], nn.Module], data: Callable[[str | None], Data],
           loss: Callable[..., Tensor] = nn.functional.cross_entropy, **options: Any) -> Classification:
    """A :class:`Classification`; ``loss`` is its criterion, ``options`` any other field of it."""
    return Classification(name, model, data, loss, **options)


@functools.lru_cache(maxsize=4)
def _loaded(load: Callable[[str | None], Data], folder: str | None, noise: float, name: str) -> Data:
    try:
        data = load(folder)
    except (ValueError, OSError):
        raise
    except Exception as error:
        raise ValueError(f"the data of recipe {name} raised {said(error)}") from error
    if not isinstance(data, Data):
        raise ValueError(f"the data of recipe {name} must be a flatmin.recipes.Data, got {type(data).__name__}")
    return data.with_noise(noise)
