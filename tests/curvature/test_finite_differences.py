"""Finite differences of the loss and of its gradient.

What the other families would miss: an operator that differentiates something else than the loss that training sees: a
detached branch, another mode, another batch. Differences know nothing of graphs.
"""

import pytest
import torch
from nets import classification, mlp, samples
from torch import nn

from flatmin import Objective, perturbed
from flatmin.curvature import Hessian


def test_second_differences_of_the_loss():
    objective = classification(split=True)
    H, h = Hessian(objective), 1e-3
    for seed in range(3):
        v = torch.randn(H.size, generator=torch.Generator().manual_seed(seed))
        v /= v.norm()
        values = []
        for step in (-h, 0.0, h):
            with perturbed.displaced(objective.parameters, H.split(v), step):
                values.append(float(objective.value()))
        assert float(v @ (H @ v)) == pytest.approx((values[0] - 2 * values[1] + values[2]) / h**2, abs=1e-6)


@pytest.mark.parametrize("length", (1.0, 1e4, 1e-6))
def test_differences_of_gradients_as_a_product(length):
    """The step is scaled by ‖v‖, so that long vectors are not stepped along too far, nor short ones lost."""
    objective = classification(split=True)
    exact, H = Hessian(objective), Hessian(objective, product="finite_difference")
    v = torch.randn(H.size) * length
    before = [p.clone() for p in objective.parameters]
    truth = exact @ v
    assert (H @ v - truth).norm() < 1e-7 * truth.norm()
    assert 0 < H.error < 1e-6 and H.describe()["product_error"] == H.error
    assert all(torch.equal(p, q) for p, q in zip(before, objective.parameters, strict=True))


def test_the_stated_error_is_of_the_right_size_in_single_precision():
    x, y = samples()
    objective = Objective(mlp(dtype=torch.float32), nn.CrossEntropyLoss(), (x.float(), y))
    exact, H = Hessian(objective), Hessian(objective, product="finite_difference")
    v = torch.randn(H.size, dtype=torch.float32)
    truth = exact @ v
    error = float((H @ v - truth).norm() / truth.norm())
    assert error < 0.02 and error < 3 * H.error


def test_no_second_derivative_falls_back_and_says_so():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, g):
            x, = ctx.saved_tensors
            return 3 * x**2 * g

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(5, 3)

        def forward(self, x):
            return Once.apply(self.linear(x))

    x, y = samples()
    H = Hessian(Objective(Model(), nn.CrossEntropyLoss(), (x, y)))
    with pytest.warns(UserWarning, match="no second derivative"):
        found = H.dense()
    z = lambda model, x: model.linear(x) ** 3  # noqa: E731
    twin = Objective(H.objective.model, lambda out, batch: nn.functional.cross_entropy(out, batch[1]), (x, y),
                     forward=lambda model, batch: z(model, batch[0]))
    assert torch.allclose(found, Hessian(twin).dense(), atol=1e-6)
    with pytest.raises(RuntimeError):
        Hessian(H.objective, product="cached").dense()
