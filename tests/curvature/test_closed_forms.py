"""Closed forms: matrices known by pen and paper.

What the other families would miss: an error that they share, such as a wrong factor in the loss or a mean taken for a
sum, since autograd, finite differences and other libraries all differentiate the same code.
"""

import math

import pytest
import torch
from torch import nn

from flatmin import Objective
from flatmin.curvature import (
    Fisher,
    FunctionalPart,
    GaussNewton,
    Hessian,
    Matrix,
    compute_hessian_sharpness,
    condition_number,
    eigenpairs,
    power_iteration,
    spectral_density,
    trace,
)
from nets import only_samples, symmetric


def test_linear_regression():
    x, y = torch.randn(20, 6), torch.randn(20, 1)
    objective = Objective(nn.Linear(6, 1, bias=False), nn.MSELoss(), [(x[:13], y[:13]), (x[13:], y[13:])])
    assert torch.allclose(Hessian(objective).dense(), 2 / 20 * x.T @ x, atol=1e-14)


def test_logistic_regression():
    x, y = torch.randn(20, 4), torch.randint(0, 2, (20, 1)).double()
    model = nn.Linear(4, 1, bias=False)
    p = torch.sigmoid(model(x)).detach()
    expected = (x * p * (1 - p)).T @ x / 20
    objective = Objective(model, nn.BCEWithLogitsLoss(), (x, y))
    for operator in (Hessian(objective), GaussNewton(objective), Fisher(objective)):
        assert torch.allclose(operator.dense(), expected, atol=1e-15)


def test_softmax_regression_where_the_functional_part_vanishes():
    x, y = torch.randn(12, 4), torch.randint(0, 3, (12,))
    model = nn.Linear(4, 3, bias=False)
    p = model(x).softmax(1).detach()
    middle = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    expected = torch.einsum("nab,ni,nj->aibj", middle, x, x).reshape(12, 12) / 12
    objective = Objective(model, nn.CrossEntropyLoss(), (x, y))
    for operator in (Hessian(objective), GaussNewton(objective), Fisher(objective)):
        assert torch.allclose(operator.dense(), expected, atol=1e-15)
    assert FunctionalPart(objective).dense().abs().max() < 1e-16


def test_a_loss_that_is_linear_in_the_outputs_has_no_gauss_newton_part():
    x, a = torch.randn(12, 4), torch.randn(12, 3)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    objective = Objective(model, lambda z, t: (z * t).sum() / len(z), (x, a), weight=lambda batch: len(batch[0]))
    assert GaussNewton(objective).dense().abs().max() == 0
    assert torch.allclose(FunctionalPart(objective).dense(), Hessian(objective).dense(), atol=1e-15)


def test_the_two_parameter_linear_net():
    """f = abx at ab = 1 with targets x: eigenvalues 0 and 2E[x²](a² + b²)."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    with torch.no_grad():
        model[0].weight.fill_(2.0)
        model[1].weight.fill_(0.5)
    x = torch.tensor([[1.0], [2.0], [3.0]])
    spectrum = eigenpairs(Hessian(Objective(model, nn.MSELoss(), (x, x))), k=2)
    assert spectrum.eigenvalues.tolist() == pytest.approx([0, 2 * 14 / 3 * 4.25], abs=1e-12)


def test_marchenko_pastur_edges():
    """Squares of 400 × 1600 normal numbers: the spectrum of XXᵀ/1600 fills [(1 − ½)², (1 + ½)²]."""
    x = torch.randn(400, 1600)
    spectrum = eigenpairs(Matrix(x @ x.T / 1600), k=2, which="both", tol=1e-6)
    assert spectrum.eigenvalues.tolist() == pytest.approx([0.25, 2.25], rel=0.08)
    density = spectral_density(Matrix(x @ x.T / 1600), probes=4, steps=40)
    t, phi, _ = density.density(torch.linspace(0.4, 2.0, 9))
    expected = torch.sqrt((2.25 - t) * (t - 0.25)) / (2 * math.pi * 0.25 * t)
    assert torch.allclose(phi, expected, rtol=0.25)


def test_the_full_hessian_of_a_net_is_not_zero():
    """The widely copied snippet assigns ``p.data`` inside the differentiated function and returns zeros."""
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    x, y = torch.randn(16, 5), torch.randint(0, 3, (16,))
    before = [p.clone() for p in model.parameters()]
    found = compute_hessian_sharpness(model, nn.CrossEntropyLoss(), x, y)
    dense = Hessian(Objective(model, nn.CrossEntropyLoss(), (x, y))).dense()
    exact = torch.linalg.eigvalsh(dense)
    assert found["max_eigenvalue"] == pytest.approx(float(exact[-1]), rel=1e-12) and found["max_eigenvalue"] > 0.1
    assert found["trace"] == pytest.approx(float(exact.sum()), rel=1e-12)
    assert found["frobenius_norm"] == pytest.approx(float(exact.norm()), rel=1e-12)
    assert found["top_k_eigenvalues"] == pytest.approx(exact[-5:].tolist())
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))


def test_the_top_eigenvalue_is_the_algebraically_largest():
    """L = ½(w₀² − 5w₁²): the copied power iteration calls −5 the top eigenvalue."""
    A = Matrix(torch.diag(torch.tensor([1.0, -5.0])))
    assert power_iteration(A, tol=1e-8).value == pytest.approx(1)
    assert power_iteration(A, "magnitude", tol=1e-8).value == pytest.approx(-5)
    assert eigenpairs(A).largest == pytest.approx(1)
    assert eigenpairs(A, which="magnitude").largest == pytest.approx(-5)
    assert eigenpairs(A, which="smallest").smallest == pytest.approx(-5)


def test_the_variance_of_hutchinson(monkeypatch):
    """2(‖A‖_F² − Σ A_ii²) a probe, for signs."""
    a = symmetric(torch.linspace(-1, 3, 40))
    only_samples(monkeypatch)       # 40 products would give it exactly
    estimate = trace(Matrix(a), rtol=0.01, max_matvecs=20_000)
    variance = 2 * (a.square().sum() - a.diagonal().square().sum())
    assert estimate.stderr**2 * estimate.samples == pytest.approx(float(variance), rel=0.1)


def test_a_condition_number_only_where_there_is_one():
    def of(*values: float):
        return condition_number(Matrix(symmetric(torch.tensor(values))))

    assert of(8, 4, 2).value == pytest.approx(4)
    assert math.isnan(of(8, 4, -2).value) and "indefinite" in of(8, 4, -2).reason
    assert math.isnan(of(8, 4, 0).value) and "singular" in of(8, 4, 0).reason
