"""Spectra of the Gauss-Newton matrix before and after M^-½ on both sides, against dense ones built from .grad alone."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from flatmin import Objective
from flatmin.ascent.directions import Preconditioned
from flatmin.curvature import GaussNewton, Matrix, eigenpairs
from flatmin.paths import eigenspace_share, preconditioned_spectrum
from flatmin.paths.direction import inverse_metric


def problem(steps=8, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    x, y = torch.randn(30, 5), torch.randint(3, (30,))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.99))
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    optimizer.zero_grad()
    return Objective(model, nn.CrossEntropyLoss(), (x, y)), optimizer


def bare(**options):
    """Adam's own M, without a floor under entries that have had no gradient, which later versions have."""
    later = {"floor": 0.0} if "floor" in {f.name for f in dataclasses.fields(Preconditioned)} else {}
    return Preconditioned(**options, **later)


def flat(tensors):
    return torch.cat([t.detach().reshape(-1) for t in tensors])


@pytest.mark.parametrize("power", [0.5, 1])
def test_equals_dense_spectra(power):
    """M from the states of Adam by hand; eigenvalues, eigenspaces and shares from ``torch.linalg.eigh``."""
    objective, optimizer = problem()
    preconditioner = bare(power=power)
    second = flat([optimizer.state[p]["exp_avg_sq"] for p in objective.parameters]) / (1 - 0.99**8)
    inverse = 1 / (second**power + 1e-8)
    found = preconditioned_spectrum(objective, optimizer, k=4, preconditioner=preconditioner, tol=1e-9)
    G, g = GaussNewton(objective).dense(), flat(objective.gradient())
    root = inverse.sqrt()
    for spectrum, matrix in ((found.before, G), (found.after, root[:, None] * G * root)):
        assert spectrum.eigenvalues.tolist() == pytest.approx(torch.linalg.eigvalsh(matrix)[-4:].tolist(), rel=1e-7)
        assert spectrum.certified and bool(spectrum.converged.all())

    def share(matrix, v):
        top = torch.linalg.eigh(matrix)[1][:, -4:]
        return float((top.T @ v).square().sum() / v.square().sum())

    assert found.gradient_share == pytest.approx(share(G, g), rel=1e-6)
    assert found.direction_share == pytest.approx(share(G, inverse * g), rel=1e-6)
    assert found.metric_share == pytest.approx(share(root[:, None] * G * root, root * g), rel=1e-6)
    assert found.chance == pytest.approx(4 / len(g))
    ratio = torch.linalg.eigvalsh(G)
    assert found.spread[0] == pytest.approx(float(ratio[-1] / ratio[-4]), rel=1e-6)


def test_a_metric_that_is_the_matrix_flattens_the_spectrum():
    """Independent coordinates: z_i = w_i x_i has G = diag, and M ∝ √v̂ = G is met by gradients that are ±G."""

    class Diagonal(nn.Module):
        def __init__(self, n):
            super().__init__()
            self.w = nn.Parameter(torch.ones(n))

        def forward(self, x):
            return self.w * x

    scales = torch.tensor([1.0, 2.0, 5.0, 10.0])
    model = Diagonal(4)
    objective = Objective(model, lambda z, y: (z - y).square().sum() / 2, (scales.sqrt(), torch.zeros(4)),
                          weight=lambda batch: 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0)
    model.w.grad = objective.gradient()[0]      # G w = diag(scales) 1
    optimizer.step()
    found = preconditioned_spectrum(objective, optimizer, k=4, preconditioner=bare())
    assert found.before.eigenvalues.tolist() == pytest.approx(scales.tolist())
    assert found.spread == pytest.approx((10.0, 1.0), rel=1e-6)
    assert found.after.eigenvalues.tolist() == pytest.approx([1.0] * 4, rel=1e-6)
    assert "before" in str(found) and "after" in str(found)


def test_the_metric_is_that_of_the_preconditioned_direction():
    objective, optimizer = problem()
    inverse = inverse_metric(objective, optimizer, bare())
    second = [optimizer.state[p]["exp_avg_sq"] / (1 - 0.99**8) for p in objective.parameters]
    for d, v in zip(inverse, second, strict=True):
        assert torch.allclose(d, 1 / (v.sqrt() + 1e-8), rtol=1e-12)


def test_shares():
    A = Matrix(torch.diag(torch.tensor([5.0, 4.0, 1.0, 0.5])))
    top = eigenpairs(A, 2)
    assert eigenspace_share(A, top, torch.tensor([3.0, 0.0, 4.0, 0.0])) == pytest.approx(9 / 25)
    assert eigenspace_share(A, top, [torch.tensor([1.0, 1.0, 0.0, 0.0])]) == pytest.approx(1)
    assert math.isnan(eigenspace_share(A, top, torch.zeros(4)))
    torch.manual_seed(0)
    mean = sum(eigenspace_share(A, top, torch.randn(4)) for _ in range(2000)) / 2000
    assert mean == pytest.approx(2 / 4, abs=0.03)


def test_an_optimizer_without_a_second_moment_is_refused():
    objective, _ = problem()
    with pytest.raises(ValueError, match="after its first step"):
        preconditioned_spectrum(objective, torch.optim.AdamW(objective.model.parameters()))
