"""The error by the data: what the spread over batches says, held against data sets drawn again and again.

A wrong formula, a batch that is weighed twice, a rank that is left out: none changes an eigenvalue, and only the
coverage over many data sets, or a slow twin, shows it.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from flatmin import Objective
from flatmin.curvature import (
    CurvatureOperator,
    GaussNewton,
    Hessian,
    Matrix,
    eigenpairs,
    frobenius,
    power_iteration,
    spectral_density,
    trace,
)
from flatmin.linalg.confidence import data_stderr
from nets import classification, mlp, only_samples, samples, symmetric


def batches(x, y, size):
    return [(x[i:i + size], y[i:i + size]) for i in range(0, len(x), size)]


def many(dtype=torch.float64, **options):
    """103 samples in 11 batches, the last one short."""
    x, y = samples(103)
    return Objective(mlp(dtype=dtype), nn.CrossEntropyLoss(**options), batches(x.to(dtype), y, 10))


def by_hand(objective, v):
    """The formula over the dense Hessians of the batches, each an objective of its own."""
    n, q = [], []
    for batch in objective.data:
        alone = Objective(objective.model, objective.loss_fn, batch)
        n.append(1.0 if objective.sums else alone.weight(batch))
        q.append(float(v @ (Hessian(alone) @ v)) if v is not None else float(Hessian(alone).dense().trace()))
    n, q = torch.tensor(n, dtype=torch.float64), torch.tensor(q, dtype=torch.float64)
    mean = (n * q).sum() / n.sum()
    B = len(n)
    error = math.sqrt(B / (B - 1) * float((n**2 * (q - mean) ** 2).sum())) / float(n.sum())
    return error * (B if objective.sums else 1)


@pytest.mark.parametrize("product", ("cached", "recomputed", "forward"))
def test_the_formula_by_hand(product):
    objective = many()
    H = Hessian(objective, product=product)
    found = eigenpairs(H, 3, "both", tol=1e-6)
    assert found.batches == 11
    for row, error in zip(found.eigenvectors, found.data_stderr.tolist(), strict=True):
        assert error == pytest.approx(by_hand(objective, row), rel=1e-9)
    total = trace(H, rtol=1e-3)
    assert total.settings["method"] == "exact"
    assert total.data_stderr == pytest.approx(by_hand(objective, None), rel=1e-9) and total.batches == 11
    density = spectral_density(H).trace
    assert density.data_stderr == pytest.approx(total.data_stderr, rel=1e-9)
    top = power_iteration(H, tol=1e-6)
    assert top.data_stderr == pytest.approx(float(found.data_stderr[-1]), rel=1e-3)


def test_a_loss_that_is_a_sum():
    objective = many(reduction="sum")
    found = eigenpairs(Hessian(objective), tol=1e-6)
    assert float(found.data_stderr[0]) == pytest.approx(by_hand(objective, found.eigenvectors[0]), rel=1e-9)
    assert float(found.data_stderr[0]) > 0.02 * found.largest


@pytest.mark.parametrize("method", ("hutchinson", "hutch++", "xtrace"))
def test_the_trace_by_probes_has_about_the_error_of_the_exact_one(method, monkeypatch):
    H = Hessian(many())
    exact = trace(H, rtol=1e-6)
    only_samples(monkeypatch)
    found = trace(H, rtol=0.03, method=method)
    assert found.stderr > 0 and found.batches == 11
    assert 0.7 * exact.data_stderr < found.data_stderr < 1.6 * exact.data_stderr
    density = spectral_density(H, probes=30, steps=4).trace
    assert 0.7 * exact.data_stderr < density.data_stderr < 1.6 * exact.data_stderr


def test_composed_operators_pass_it_on():
    objective = many()
    H, G = Hessian(objective), GaussNewton(objective)
    error = eigenpairs(H, tol=1e-8).data_stderr
    assert torch.allclose(eigenpairs(-3 * H, 1, "smallest", tol=1e-8).data_stderr, 3 * error)
    assert torch.allclose(eigenpairs(2 * H + H, tol=1e-8).data_stderr, 3 * error)
    assert float(eigenpairs(H - H + 1e-9 * G, tol=0.1).data_stderr[0]) < 1e-8    # batch by batch: what cancels
    ones = torch.ones(H.size, dtype=torch.float64)
    assert torch.allclose(eigenpairs(H.preconditioned(4 * ones), tol=1e-8).data_stderr, 4 * error)
    block = H.restrict("0")
    v = eigenpairs(block, tol=1e-8)
    whole = CurvatureOperator.restrict(H, "0")
    assert type(whole) is not type(block)
    assert torch.allclose(eigenpairs(whole, tol=1e-8).data_stderr, v.data_stderr)
    differences = Hessian(objective, product="finite_difference")
    again = Hessian(objective, product="recomputed")        # its graphs do not stay while differences move the weights
    assert eigenpairs(again + differences).data_stderr is None
    assert eigenpairs(H + Hessian(classification())).data_stderr is None        # of other batches


def test_nothing_is_said_where_nothing_is_known():
    few = classification(split=True)
    found = eigenpairs(Hessian(few), 2)
    assert found.data_stderr is None and found.batches == 3 and "data" not in str(found)
    assert trace(Hessian(few)).data_stderr is None and power_iteration(Hessian(few), tol=0.1).data_stderr is None
    assert eigenpairs(Matrix(symmetric(torch.rand(9)))).batches is None
    assert eigenpairs(Hessian(many()), certify=False).data_stderr is None
    assert eigenpairs(Hessian(many(), product="finite_difference"), tol=1e-2).data_stderr is None
    assert frobenius(Hessian(many())).data_stderr is None


def test_it_is_printed_beside_the_solvers():
    H = Hessian(many())
    assert "residual" in str(eigenpairs(H)) and "data ± " in str(eigenpairs(H)) and "11 batches" in str(eigenpairs(H))
    assert "data ± " in str(trace(H)) and "±" in str(trace(H)).split("data")[0]
    assert "residual" in str(power_iteration(H, tol=0.1)) and "11 batches" in str(power_iteration(H, tol=0.1))


def test_no_pass_over_the_data_is_added():
    calls = []
    x, y = samples(60)

    def forward(model, batch):
        calls.append(1)
        return model(batch[0])

    objective = Objective(mlp(), lambda z, b: nn.functional.cross_entropy(z, b[1]), batches(x, y, 10), forward=forward,
                          check=False)
    with Hessian(objective).session():
        before = len(calls)         # the products are checked once, on a few samples
    found = eigenpairs(Hessian(objective), 2)
    assert found.data_stderr is not None and len(calls) - before == 12      # once for the run, once for the certificate


@pytest.mark.parametrize("scale", (1e-30, 1e30))
def test_extreme_scales_in_float32(scale):
    objective = many(torch.float32)
    H = Hessian(objective)
    plain, scaled = eigenpairs(H, tol=1e-3), eigenpairs(scale * H, tol=1e-3)
    assert torch.allclose(scaled.data_stderr / scale, plain.data_stderr, rtol=1e-2)


def test_formula_of_equal_batches_is_that_of_a_mean():
    q = torch.randn(50, dtype=torch.float64)
    assert data_stderr((torch.full((50,), 7.0, dtype=torch.float64), q)) == pytest.approx(float(q.std()) / 50**0.5)
    assert data_stderr((torch.ones(4), q[:4])) is None


class Mean(Matrix):
    """The Hessian of linear or logistic regression, mean of s(x) xxᵀ, batch by batch."""

    def __init__(self, x, s, size):
        self.parts = [(len(b), b.T @ (b * c[:, None]) / len(b)) for b, c in zip(x.split(size), s.split(size),
                                                                               strict=True)]
        super().__init__(x.T @ (x * s[:, None]) / len(x))

    def matvec_with_forms(self, v):
        n, a = zip(*self.parts, strict=True)
        return self._matvec(v), (torch.tensor(n, dtype=torch.float64), torch.stack([v @ m @ v for m in a]))


@pytest.mark.parametrize("logistic", (False, True))
def test_coverage_over_many_data_sets(logistic):
    """Regression at fixed weights, with the population in closed form or 400 000 samples; the last batch is short."""
    d, w = torch.tensor([2.0, 1.0, 0.5], dtype=torch.float64), torch.tensor([0.6, -1.0, 0.3], dtype=torch.float64)

    def draw(n, seed):
        x = torch.randn(n, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * d
        p = (x @ w).sigmoid()
        return x, p * (1 - p) if logistic else torch.full((n,), 2.0, dtype=torch.float64)

    top, total = 8.0, 10.5
    if logistic:
        exact = Mean(*draw(400_000, 12345), 400_000).matrix
        top, total = float(torch.linalg.eigvalsh(exact)[-1]), float(exact.trace())
    held = {"eigenvalue": 0, "trace": 0}
    for seed in range(300):
        A = Mean(*draw(310, seed), 20)
        found, sums = eigenpairs(A), trace(A)
        held["eigenvalue"] += abs(found.largest - top) <= 2 * float(found.data_stderr[0])
        held["trace"] += abs(sums.value - total) <= 2 * sums.data_stderr
    # Student's t with 15 degrees of freedom: 281 of 300 within two standard errors
    assert 270 <= held["eigenvalue"] <= 294 and 270 <= held["trace"] <= 294, held


def test_the_interval_is_printed_with_its_confidence():
    found = trace(Hessian(many()), confidence=0.9)
    low, high = found.interval
    assert str(found).endswith(f", {low:.5g} to {high:.5g} at 90%)")
