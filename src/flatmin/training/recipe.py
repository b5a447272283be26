"""What a job trains: a model, its data and a loss, with settings that suit them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..files import digest
from .user_code import said


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
class Recipe:
    """A model, its data and a loss: what ``flatmin compare my_module:recipe`` looks for.

    Args:
        name: for the report.
        model: builds the model; called after the random state was set from the seed.
        data: loads the data; called with the ``--data`` folder or None.
        loss: mean loss of (outputs, targets); with a ``reduction="none"`` option it also serves data selection.
        epochs, batch_size, lr, momentum, weight_decay: of SGD with a cosine schedule.
        adamw_lr: of AdamW, the base of the preconditioned methods.
        noise: the share of training labels re-drawn by default.
        folds: over how many held-out parts of the training data a radius is chosen.
        tuning_samples: training examples that a radius is chosen on, at most (None: all of them).
        rhos: radii to choose from, by method, where they differ from the library's own.
        curvature_samples: training examples that sharpness and curvature are measured on.

    Example:
        >>> import torch
        >>> def data(folder=None):
        ...     x = torch.randn(200, 4); y = (x[:, 0] > 0).long()
        ...     return Data(x[:100], y[:100], x[100:], y[100:], classes=2)
        >>> recipe = Recipe("mine", lambda: torch.nn.Linear(4, 2), data, epochs=5)
    """

    name: str
    model: Callable[[], nn.Module]
    data: Callable[[str | None], Data]
    loss: Callable[..., Tensor] = nn.functional.cross_entropy
    epochs: int = 40
    batch_size: int = 32
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    adamw_lr: float = 1e-3
    noise: float = 0.0
    folds: int = 1
    tuning_samples: int | None = None
    rhos: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    curvature_samples: int = 1000

    def load(self, folder: str | None) -> Data:
        """The data, or a ``ValueError`` that says what is wrong with what :attr:`data` does."""
        try:
            data = self.data(folder)
        except (ValueError, OSError):
            raise
        except Exception as error:
            raise ValueError(f"the data of recipe {self.name} raised {said(error)}") from error
        if not isinstance(data, Data):
            raise ValueError(f"the data of recipe {self.name} must be a flatmin.recipes.Data, "
                             f"got {type(data).__name__}")
        return data

    def probe(self, data: Data) -> None:
        """Pass one batch through the model and the loss, so that what does not fit is said before any work is done."""
        x, y = data.train_inputs[:self.batch_size], data.train_targets[:self.batch_size]
        torch.manual_seed(0)
        try:
            with torch.no_grad():
                outputs = self.model()(x)
                shape = tuple(outputs.shape)
                loss = self.loss(outputs, y) if len(shape) == 2 and shape[1] >= data.classes else None
        except Exception as error:
            raise ValueError(f"recipe {self.name}: a batch of training data does not go through its model and loss: "
                             f"{said(error)}") from error
        if loss is None:
            raise ValueError(f"recipe {self.name}: the model must return one row of {data.classes} class scores for "
                             f"each of {len(y)} inputs, it returned the shape {shape}")
        if loss.numel() != 1:
            raise ValueError(f"recipe {self.name}: the loss must be one number, the mean over the batch, it has the "
                             f"shape {tuple(loss.shape)}")
