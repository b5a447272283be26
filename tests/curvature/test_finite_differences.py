"""Finite differences of the loss and of its gradient.

What the other families would miss: an operator that differentiates something else than the loss that training sees: a
detached branch, another mode, another batch. Differences know nothing of graphs.
"""

import pytest
import torch
from torch import nn

from flatmin import Objective, perturbed
from flatmin.curvature import Fisher, FunctionalPart, GaussNewton, Hessian, eigenpairs, trace
from nets import classification, mlp, ragged, samples


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


THROUGH_OUTPUTS = {
    "Gauss-Newton": GaussNewton, "functional": FunctionalPart, "exact": Fisher,
    "empirical": lambda o, **options: Fisher(o, kind="empirical", **options),
    "monte_carlo": lambda o, **options: Fisher(o, kind="monte_carlo", **options),
}


@pytest.mark.parametrize("mode", ("eval", "train"))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
@pytest.mark.parametrize("name", THROUGH_OUTPUTS)
def test_differences_of_outputs(name, dtype, mode):
    """With batches of unequal weight, batch statistics and dropout, for vectors of any length."""
    x, y = samples()
    model = mlp(dtype=dtype)
    model.insert(1, nn.BatchNorm1d(8, dtype=dtype))
    model.insert(3, nn.Dropout(0.3))
    objective = Objective(model, nn.CrossEntropyLoss(), ragged(x.to(dtype), y), mode=mode)
    before = [t.clone() for t in (*model.parameters(), *model.buffers())]
    exact, rough = (THROUGH_OUTPUTS[name](objective, **o) for o in ({}, {"product": "finite_difference"}))
    for length in (1.0, 1e4, 1e-6):
        v = torch.randn(exact.size, dtype=dtype) * length
        truth = exact @ v
        error = float((rough @ v - truth).norm() / truth.norm())
        assert error < 10 * rough.error and error < (1e-7 if dtype == torch.float64 else 0.01)
    assert 0 < rough.describe()["product_error"] == rough.error
    assert all(torch.equal(a, b) for a, b in zip(before, (*model.parameters(), *model.buffers()), strict=True))
    block = rough.restrict(rough.names[:2])
    assert block.product == "finite_difference"
    u = torch.randn(block.size, dtype=dtype)
    truth = exact.restrict(exact.names[:2]) @ u
    assert (block @ u - truth).norm() < (1e-7 if dtype == torch.float64 else 0.01) * truth.norm()


@pytest.mark.parametrize("make", (GaussNewton, FunctionalPart))
def test_a_step_too_long_for_the_outputs_is_made_shorter(make):
    """z = sin(50 w₀): the step of a smooth model spans whole periods."""
    class Sharp(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.full((1000,), 3.0, dtype=torch.float32))

        def forward(self, x):
            return torch.sin(50 * (self.w[:1] - 3) + 1) * x

    data = torch.ones(1, dtype=torch.float32), torch.zeros(1, dtype=torch.float32)
    objective = Objective(Sharp(), nn.MSELoss(), data)
    exact, rough = make(objective), make(objective, product="finite_difference")
    v = torch.zeros(1000, dtype=torch.float32)
    v[0] = 1
    assert (rough @ v)[0] == pytest.approx(float((exact @ v)[0]), rel=0.02) and rough.error < 0.05


def test_spectra_and_traces_of_differences_of_outputs():
    objective = classification(split=True)
    exact, rough = GaussNewton(objective), GaussNewton(objective, product="finite_difference")
    a, b = (eigenpairs(o, 3, tol=1e-6) for o in (exact, rough))
    assert torch.allclose(a.eigenvalues, b.eigenvalues, rtol=1e-7) and b.settings["product_error"] < 1e-6
    assert trace(rough).value == pytest.approx(trace(exact).value, rel=1e-7)


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
    for name, make in THROUGH_OUTPUTS.items():
        operator = make(H.objective)
        with pytest.warns(UserWarning, match="no second derivative"):
            found = operator.dense()
        assert operator.product == "finite_difference", name
        known = {} if name in ("Gauss-Newton", "functional") else {"likelihood": "softmax"}
        assert torch.allclose(found, make(twin, **known).dense(), atol=1e-6), name


def test_differences_across_kinks_are_said_to_mean_little():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 1)).float()
    objective = Objective(model, nn.MSELoss(), (torch.randn(64, 20).float(), torch.randn(64, 1).float()))
    exact, H = Hessian(objective), Hessian(objective, product="finite_difference")
    v = torch.randn(H.size, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    with pytest.warns(UserWarning, match="mean little"):
        off = float((H @ v - exact @ v).norm() / (exact @ v).norm())
    assert off > 0.2 and H.error is not None and H.error > 0.2


@pytest.mark.parametrize("scale", (1.0, 300.0))
def test_large_weights_get_a_large_step(scale):
    """A layer before a normalization: the function is the same at every scale of the weights, and so are the digits."""
    net = nn.Sequential(nn.Linear(5, 8, bias=False), nn.LayerNorm(8, elementwise_affine=False), nn.Tanh())
    with torch.no_grad():
        net[0].weight.mul_(scale)
    x, t, v = torch.randn(20, 5), torch.randn(20, 8), torch.randn(40)
    exact = Hessian(Objective(net, nn.MSELoss(), (x, t))) @ v
    narrow = Objective(net.float(), nn.MSELoss(), (x.float(), t.float()))
    found = Hessian(narrow, product="finite_difference") @ v.float()
    assert (found.double() - exact).norm() < 2e-3 * exact.norm()


def test_a_quadratic_needs_one_step():
    """Where differences are exact, no smaller step is tried: a gradient on either side, nothing more."""
    net = nn.Linear(5, 3)
    H = Hessian(Objective(net, nn.MSELoss(), (torch.randn(20, 5), torch.randn(20, 3))), product="finite_difference")
    counts = []
    with H.session():       # has checked the product
        net.register_forward_hook(lambda *_: counts.append(1))
        for passes in (5, 7):       # the first takes the value and a second step too, for the stated error
            _ = H @ torch.randn(H.size)
            assert len(counts) == passes
