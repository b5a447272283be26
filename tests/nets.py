"""Small nets and symmetric matrices that the curvature tests share."""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

from flatmin import Objective


def mlp(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """75 parameters, smooth."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def samples(n: int = 13, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Inputs (n, 5) and classes (n,), one of them ignored."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 5, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 3, (n,), generator=generator)
    y[2] = -100
    return x, y


def ragged(x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The same samples in batches of unequal size and of unequal numbers of valid targets."""
    return [(x[:6], y[:6]), (x[6:11], y[6:11]), (x[11:], y[11:])]


def classification(*, split: bool = False) -> Objective:
    x, y = samples()
    return Objective(mlp(), nn.CrossEntropyLoss(), ragged(x, y) if split else (x, y))


def symmetric(eigenvalues: Tensor, seed: int = 0) -> Tensor:
    """A dense matrix with these eigenvalues and random eigenvectors."""
    generator = torch.Generator().manual_seed(seed)
    n = len(eigenvalues)
    q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]
    return (q * eigenvalues.double()) @ q.T


def only_samples(monkeypatch) -> None:
    """No exact values instead of samples, for matrices so small that they would take no more products."""
    for name in ("confidence", "density", "trace", "xtrace"):
        monkeypatch.setattr(sys.modules[f"flatmin.linalg.{name}"], "exact_is_cheaper", lambda *_: False)


class Attention(nn.Module):
    """Torch's default attention, whose usual kernel has no second derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.head = nn.Linear(4, 12), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unsqueeze(1).chunk(3, -1)
        return self.head(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1).mean(1))
