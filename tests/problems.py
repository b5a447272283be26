"""Small models and data that the laws are run on; each is here for one difficulty, named in its docstring.

Everything is built from a seed, so that two calls give bitwise equal twins. Nothing here imports flatmin.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FEATURES, CLASSES = 6, 3


class Kernel(nn.Module):
    """A linear map whose tensors are named to fool whoever chooses by substring: its bias is called a weight."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(outputs, inputs) / inputs**0.5)
        self.weight_shift = nn.Parameter(torch.randn(outputs) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.kernel.T + self.weight_shift


class RolesNet(nn.Module):
    """Smooth, without state; weights, biases and normalization scales under misleading names.

    ``bias_table`` is a weight (two dimensions), ``weight_shift`` a bias, ``norm_free`` a plain linear layer, and
    ``post`` and ``mixer`` are normalization layers. Sizes do not divide evenly over two ranks.
    """

    def __init__(self, classes: int = CLASSES):
        super().__init__()
        self.first = Kernel(FEATURES, 8)
        self.post = nn.LayerNorm(8)
        self.bias_table = nn.Parameter(torch.randn(2, 8) * 0.3)
        self.norm_free = nn.Linear(8, 8)
        self.mixer = nn.GroupNorm(2, 8)
        self.head = nn.Linear(8, classes)
        with torch.no_grad():  # scales away from one, so that |w| matters
            self.post.weight.uniform_(0.5, 1.5)
            self.mixer.weight.uniform_(0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.post(self.first(x))) + self.bias_table.sum(0)
        return self.head(torch.tanh(self.mixer(self.norm_free(h))))


class NoisyNet(nn.Module):
    """Batch normalization and dropout: what a second pass would disturb."""

    def __init__(self, norm: nn.Module | None = None, classes: int = CLASSES):
        super().__init__()
        self.first = nn.Linear(FEATURES, 8)
        self.norm = nn.BatchNorm1d(8) if norm is None else norm
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(torch.tanh(self.norm(self.first(x)))))


class ConvNet(nn.Module):
    """BatchNorm2d and Dropout2d behind a convolution, on the same flat features as the others."""

    def __init__(self, norm: nn.Module | None = None, classes: int = CLASSES):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 2)
        self.norm = nn.BatchNorm2d(4) if norm is None else norm
        self.drop = nn.Dropout2d(0.3)
        self.head = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x.reshape(-1, 1, 2, 3))
        return self.head(self.drop(torch.tanh(self.norm(h))).flatten(1))


class TiedNet(nn.Module):
    """One tensor used twice (as first map and as head), and a frozen linear layer between."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(FEATURES, 4, bias=False)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.head = nn.Linear(FEATURES, 4, bias=False)
        self.head.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.frozen(torch.tanh(self.first(x)))) @ self.head.weight


class LinearNet(nn.Module):
    """Linear in its weights: the functional rule must equal the plain gradient exactly."""

    def __init__(self, classes: int = CLASSES):
        super().__init__()
        self.head = nn.Linear(FEATURES, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)


class FickleNet(nn.Module):
    """Which branch is used depends on how often it was called: a gradient in only one of the passes.

    ``schedule`` names the branches of successive calls, cyclically.
    """

    def __init__(self, schedule: str):
        super().__init__()
        self.schedule, self.calls = schedule, 0
        self.stem = nn.Linear(FEATURES, 5)
        self.branches = nn.ModuleDict({name: nn.Linear(5, CLASSES) for name in sorted(set(schedule))})

    def forward(self, x: Tensor) -> Tensor:
        branch = self.schedule[self.calls % len(self.schedule)]
        self.calls += 1
        return self.branches[branch](torch.tanh(self.stem(x)))


class CustomNorm(nn.modules.batchnorm._NormBase):
    """Someone's own normalization on top of torch's private base, as found in research code."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.num_batches_tracked.add_(1)
                self.running_mean.lerp_(x.mean(0), 0.25)
                self.running_var.lerp_(x.var(0, correction=0), 0.25)
            mean, var = x.mean(0), x.var(0, correction=0)
        else:
            mean, var = self.running_mean, self.running_var
        return (x - mean) / (var + self.eps).sqrt() * self.weight + self.bias


class Vector(nn.Module):
    """A bare parameter vector, for losses in closed form; the loss is written by the test."""

    def __init__(self, values):
        super().__init__()
        self.w = nn.Parameter(torch.as_tensor(values, dtype=torch.get_default_dtype()).clone())

    def forward(self) -> Tensor:
        return self.w


def build(cls=RolesNet, seed: int = 0, dtype: torch.dtype | None = None, **kwargs) -> nn.Module:
    """A model from a seed, leaving the global generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cls(**kwargs)
    return model if dtype is None else model.to(dtype)


def batch(step: int, n: int = 12, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """The data of one step: always the same for the same step."""
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(n, FEATURES, generator=generator, dtype=torch.float64)
    y = torch.randint(CLASSES, (n,), generator=generator)
    return x.to(dtype or torch.get_default_dtype()), y


def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets)


def flat(model: nn.Module) -> Tensor:
    """A copy of all trainable parameters as one vector."""
    return torch.cat([p.detach().reshape(-1) for p in model.parameters() if p.requires_grad])


def standing(model: nn.Module) -> Tensor:
    """A copy of all parameters as one vector, for looking from inside a pass, where some may be set not to require a
    gradient."""
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def flat_grad(model: nn.Module) -> Tensor:
    """All gradients as one vector; a missing one counts as zero."""
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).detach().reshape(-1).clone()
                      for p in model.parameters() if p.requires_grad])


def sgd(parameters, lr: float = 0.05):
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=1e-3)


def adamw(parameters, lr: float = 0.01):
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=0.02)


BASES = {"sgd": sgd, "adamw": adamw}


def assert_same(a: Tensor, b: Tensor, what: str = "") -> None:
    """Bitwise equality (NaN counts as equal to itself)."""
    assert a.dtype == b.dtype and a.shape == b.shape, (what, a.dtype, b.dtype, a.shape, b.shape)
    same = torch.equal(torch.nan_to_num(a, nan=1.25e30), torch.nan_to_num(b, nan=1.25e30))
    assert same, f"{what}: differs by up to {(a.double() - b.double()).abs().max().item():.3e}"


def relative(a: Tensor, b: Tensor) -> float:
    """‖a − b‖ / ‖b‖."""
    return float((a - b).norm() / b.norm())
