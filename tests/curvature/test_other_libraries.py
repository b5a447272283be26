"""The same matrix in ``curvlinops`` and ``hessian-eigenthings``.

What the other families would miss: a convention of ours that nobody else has (which mean, which part of the Jacobian,
which order of parameters), since they are all written by the same hands as the code.
"""

import curvlinops
import hessian_eigenthings as eigenthings
import pytest
import torch
from torch import nn

from flatmin import Objective
from flatmin.curvature import Fisher, GaussNewton, Hessian, eigenpairs, trace
from nets import mlp, samples


@pytest.fixture
def case():
    x, y = samples()
    keep = y != -100
    model = mlp()
    return model, nn.CrossEntropyLoss(), (x[keep], y[keep])


@pytest.mark.filterwarnings("ignore")
def test_curvlinops(case):
    model, loss, (x, y) = case
    data = [(x[:8], y[:8]), (x[8:], y[8:])]
    objective = Objective(model, loss, data)
    params = list(model.parameters())
    v = torch.randn(Hessian(objective).size)
    for ours, theirs in ((Hessian, curvlinops.HessianLinearOperator), (GaussNewton, curvlinops.GGNLinearOperator)):
        assert torch.allclose(ours(objective) @ v, theirs(model, loss, params, data) @ v, atol=1e-12)
    empirical = curvlinops.EFLinearOperator(model, loss, params, data)
    assert torch.allclose(Fisher(objective, kind="empirical") @ v, empirical @ v, atol=1e-12)


@pytest.mark.filterwarnings("ignore")
def test_the_numbers_of_the_curvlinops_example():
    """docs example_eigenvalues: 88 parameters, top three 1.410913, 1.428171, 1.494305."""
    from scipy.sparse.linalg import eigsh

    model, loss, (x, y) = mlp(), nn.CrossEntropyLoss(), samples()
    H = Hessian(Objective(model, loss, (x, y)))
    values = eigsh(H.to_scipy(), k=5, which="LA", tol=1e-10)[0]
    assert eigenpairs(H, 5, tol=1e-9).eigenvalues.tolist() == pytest.approx(values.tolist(), rel=1e-8)


@pytest.mark.filterwarnings("ignore")
def test_hessian_eigenthings(case):
    model, loss, batch = case
    theirs = eigenthings.HessianOperator(model, [batch], eigenthings.supervised_loss(loss))
    H = Hessian(Objective(model, loss, batch))
    v = torch.randn(H.size)
    assert torch.allclose(H @ v, theirs.matvec(v), atol=1e-13)
    found = eigenthings.lanczos(theirs, k=4, max_iter=40, which="LA", seed=0)
    ours = eigenpairs(H, 4, tol=1e-8)
    assert ours.eigenvalues.tolist() == pytest.approx(sorted(found.eigenvalues.tolist()), rel=1e-6)
    assert trace(H, rtol=0.02).value == pytest.approx(float(H.dense().trace()), rel=0.08)
