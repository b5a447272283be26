"""Derivatives that torch's fused normalization has wrong are taken of elementary operations, for every evaluation."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from flatmin import Objective, perturbed
from flatmin.composite_norms import CompositeNorms
from flatmin.curvature import GaussNewton, Hessian, dense_hessian
from flatmin.sharpness import one_step

NORMS = {"layer norm": nn.LayerNorm(4), "layer norm without weights": nn.LayerNorm((4, 3), elementwise_affine=False),
         "batch norm": nn.BatchNorm1d(4), "instance norm": nn.InstanceNorm1d(4, affine=True),
         "batch norm of statistics": nn.BatchNorm1d(4).eval()}


@pytest.mark.parametrize("name", NORMS)
def test_the_values_are_those_of_torch(name):
    x = torch.randn(5, 3, 4, dtype=torch.float64) if name == "layer norm" else torch.randn(5, 4, 3, dtype=torch.float64)
    layer = NORMS[name].double()
    with CompositeNorms():
        ours = layer(x)
    assert torch.allclose(ours, layer(x), atol=1e-14)


@pytest.mark.parametrize("parameters", (torch.bfloat16, torch.float32))
@pytest.mark.parametrize("name", NORMS)
def test_half_precision_is_computed_in_float32(name, parameters):
    x = torch.randn(5, 4, 3).bfloat16()
    x = (x + 30).mT.contiguous() if name == "layer norm" else x     # torch itself rounds the means of the others
    layer = copy.deepcopy(NORMS[name]).to(parameters)
    with CompositeNorms():
        ours = layer(x)
    assert ours.dtype == layer(x).dtype == torch.bfloat16
    assert torch.allclose(ours, layer(x), atol=1e-5 if "layer" in name else 0.01, rtol=0.008)


def test_half_precision_of_weight_norm():
    v, g = torch.randn(400, 30).bfloat16(), torch.rand(400, 1).bfloat16()
    with CompositeNorms():
        ours = torch._weight_norm(v, g)
    assert ours.dtype == torch.bfloat16 and torch.allclose(ours, torch._weight_norm(v, g), rtol=0.008)


@pytest.mark.parametrize("shape, dim", (((4, 5), 0), ((4, 5), 1), ((4, 5), -1), ((4,), 0), ((4, 2, 3, 3), 0)))
def test_the_values_of_weight_norm_are_those_of_torch(shape, dim):
    v = torch.randn(shape)
    g = torch.rand([n if i == dim else 1 for i, n in enumerate(shape)]) if dim >= 0 else torch.rand(())
    with CompositeNorms():
        ours = torch._weight_norm(v, g, dim)
    assert torch.allclose(ours, torch._weight_norm(v, g, dim), atol=1e-14)


def richardson(objective):
    """The dense Hessian by differences of gradients at two step sizes, extrapolated."""
    w = objective.parameters
    space = Hessian(objective, product="finite_difference")

    def gradient(v, h):
        with perturbed.displaced(w, space.split(v), h):
            return space.join(objective.gradient())

    def central(v, h):
        return (gradient(v, h) - gradient(v, -h)) / (2 * h)

    return torch.stack([(4 * central(v, 1e-3) - central(v, 2e-3)) / 3 for v in torch.eye(space.size)])


def old_weight_norm(layer, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(layer, **options)


weight_norm = nn.utils.parametrizations.weight_norm
WEIGHT_NORMS = {
    "hook": lambda: nn.Sequential(old_weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2)),
    "parametrization": lambda: nn.Sequential(weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2)),
    "both, along other dimensions": lambda: nn.Sequential(old_weight_norm(nn.Linear(3, 4), dim=1), nn.Tanh(),
                                                          weight_norm(nn.Linear(4, 2), dim=None)),
    "convolution": lambda: nn.Sequential(nn.Unflatten(1, (1, 3)), weight_norm(nn.Conv1d(1, 2, 2)), nn.Tanh(),
                                         nn.Flatten(), nn.Linear(4, 2)),
    "bias": lambda: nn.Sequential(weight_norm(nn.Linear(3, 4), "bias"), nn.Tanh(), nn.Linear(4, 2)),
}


@pytest.mark.parametrize("name", WEIGHT_NORMS)
def test_weight_norm_has_the_right_second_derivative(name):
    torch.manual_seed(0)
    objective = Objective(WEIGHT_NORMS[name](), nn.CrossEntropyLoss(), (torch.randn(6, 3), torch.arange(6) % 2))
    truth = richardson(objective)
    for product in ("cached", "recomputed", "forward"):
        assert torch.allclose(Hessian(objective, product=product).dense(), truth, atol=1e-8), product
    assert torch.allclose(dense_hessian(objective), truth, atol=1e-8)
    # G by an explicit Jacobian of differences
    space, p = Hessian(objective), objective.model(objective.data.batch[0]).softmax(1).detach()

    def outputs(v, h):
        with perturbed.displaced(objective.parameters, space.split(v), h), torch.no_grad():
            return objective.model(objective.data.batch[0])

    J = torch.stack([(outputs(v, 1e-5) - outputs(v, -1e-5)) / 2e-5 for v in torch.eye(space.size)], -1)
    G = sum(j.T @ (torch.diag(q) - torch.outer(q, q)) @ j for j, q in zip(J, p, strict=True)) / len(p)
    assert torch.allclose(GaussNewton(objective).dense(), G, atol=1e-8)


@pytest.mark.parametrize("name", NORMS)
def test_third_derivatives_of_a_gradient_penalty(name):
    """Its Hessian goes three times through each layer: torch's own normalization is wrong there, in silence."""
    torch.manual_seed(0)
    shape = (3, 4) if name == "layer norm" else (4, 3)
    model = nn.Sequential(nn.Linear(5, 12), nn.Unflatten(1, shape), NORMS[name], nn.Flatten(), nn.Tanh(),
                          nn.Linear(12, 3)).double()

    def loss(z, y):
        g, = torch.autograd.grad(z.square().sum(), model[0].weight, create_graph=True)
        return F.cross_entropy(z, y) + g.square().mean()

    mode = "eval" if name.endswith("statistics") else "train"
    o = Objective(model, loss, (torch.randn(6, 5).double(), torch.arange(6) % 3), mode=mode)
    H, D = Hessian(o), Hessian(o, product="finite_difference")
    v = torch.randn(H.size, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hv = H @ v
    assert H.product == "auto"
    assert float((hv - D @ v).norm() / hv.norm()) < 1e-6


def energy(norm, by):
    """Score matching, ½‖s‖² + div s, of an energy: ∇ of it is a third derivative of the model."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), nn.Unflatten(1, (2, 3)), norm, nn.Flatten(), nn.Tanh(),
                          nn.Linear(6, 1)).double()

    def by_grad(net, batch):
        x = batch[0].clone().requires_grad_()
        s, = torch.autograd.grad(-net(x).sum(), x, create_graph=True)
        divergence = sum(torch.autograd.grad(s[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(3))
        return (divergence + s.square().sum(1) / 2).mean()

    def by_func(net, batch):
        def score(x):
            return torch.func.grad(lambda x: -net(x[None]).sum())(x)

        return torch.func.vmap(lambda x: torch.func.jacrev(score)(x).trace() + score(x).square().sum() / 2)(
            batch[0]).mean()

    def by_jvp(net, batch):
        s, t = torch.func.jvp(net, (batch[0],), (batch[0].sin(),))
        return (s.square() + t.square()).mean()

    ways = {"grad": by_grad, "func": by_func, "jvp": by_jvp}
    return Objective(model, lambda out, batch: out, [(torch.randn(5, 3),)], forward=ways[by], mode="train")


LAYERS = (nn.LayerNorm(3), nn.BatchNorm1d(2, track_running_stats=False), nn.InstanceNorm1d(2), nn.GroupNorm(2, 2))
INSIDE = [pytest.param(norm, by, id=f"{type(norm).__name__}-{by}") for norm in LAYERS for by in ("grad", "func", "jvp")
          if (type(norm), by) != (nn.BatchNorm1d, "func")]      # there a sample alone has no batch statistics


@pytest.mark.parametrize("norm, by", INSIDE)
def test_gradients_of_losses_that_differentiate_inside(norm, by):
    """By differences of the loss: value, gradient and product are of one function."""
    objective = energy(norm, by)
    H = Hessian(objective)
    g = H.join([t for t in objective.gradient()])
    v = torch.randn(H.size, generator=torch.Generator().manual_seed(1))

    def value(h):
        with perturbed.displaced(objective.parameters, H.split(v), h):
            return float(objective.value())

    assert float(g @ v) == pytest.approx((value(1e-5) - value(-1e-5)) / 2e-5, rel=1e-6)
    assert float(v @ (H @ v)) == pytest.approx((value(1e-4) - 2 * value(0) + value(-1e-4)) / 1e-8, rel=1e-3)
    fresh = energy(norm, by)
    assert float(fresh.value()) == float(objective.value())     # also where it is the first thing asked for
    if by != "jvp":
        small = one_step(fresh, rho=1e-4)
        assert small.value == pytest.approx(small.first_order, rel=0.05)


def test_a_loss_that_does_not_differentiate_inside_is_evaluated_once():
    calls = []
    model = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 3))
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    objective = Objective(model, nn.CrossEntropyLoss(), (torch.randn(6, 5), torch.arange(6) % 3))
    objective.gradient()
    assert len(calls) == 1


@pytest.mark.parametrize("checkpointed", (False, True))
def test_third_derivatives_where_the_layer_has_another_name_or_runs_again(checkpointed):
    torch.manual_seed(0)
    first = nn.Linear(5, 4).double()

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = first

        def forward(self, x):
            x = self.first(x)
            return checkpoint(F.layer_norm, x, (4,), use_reentrant=False) if checkpointed else \
                torch.native_layer_norm(x, (4,), None, None, 1e-5)[0]

    def loss(z, y):
        g, = torch.autograd.grad(z.pow(3).sum(), first.weight, create_graph=True)
        return F.cross_entropy(z, y) + g.square().mean()

    o = Objective(Model(), loss, (torch.randn(6, 5).double(), torch.arange(6) % 3))
    H, D = Hessian(o), Hessian(o, product="finite_difference")
    v = torch.randn(H.size, dtype=torch.float64)
    with pytest.warns(UserWarning, match="wrong third derivatives of NativeLayerNorm"):
        hv = H @ v
    assert H.product == "finite_difference" and torch.equal(hv, D @ v)


def test_weight_norm_inside_a_checkpoint():
    """Composite operations would not be the ones that the backward pass runs again; so the product is a difference."""
    torch.manual_seed(0)
    layers = [nn.Linear(5, 4), weight_norm(nn.Linear(4, 4)), nn.Linear(4, 3)]

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(layers)

        def forward(self, x):
            return layers[2](torch.tanh(checkpoint(layers[1], layers[0](x), use_reentrant=False)))

    data = torch.randn(6, 5), torch.arange(6) % 3
    o = Objective(Model(), nn.CrossEntropyLoss(), data)
    plain = Objective(nn.Sequential(*layers[:2], nn.Tanh(), layers[2]), nn.CrossEntropyLoss(), data)
    H = Hessian(o)
    with pytest.warns(UserWarning, match="_WeightNorm"):
        found = H.dense()
    assert H.product == "finite_difference" and torch.allclose(found, Hessian(plain).dense(), atol=1e-7)


def test_a_constant_gradient_into_a_function_that_is_once_differentiable():
    """torch's decorator then leaves no mark in the graph, and the Hessian would be zero in silence."""
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, g):
            return 2 * g * ctx.saved_tensors[0]

    model = nn.Linear(2, 1, bias=False).double()
    x = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    o = Objective(model, lambda z, y: Square.apply(z).mean(), (x, torch.zeros(2)))
    with pytest.warns(UserWarning, match="no second derivative"):
        assert torch.allclose(Hessian(o).dense(), torch.diag(torch.tensor([1.0, 4.0], dtype=torch.float64)), atol=1e-6)


def test_a_loss_that_autograd_cannot_follow_is_warned_about():
    model = nn.Linear(2, 1)
    H = Hessian(Objective(model, lambda z, y: (z.detach() - y).square().mean(), (torch.ones(3, 2), torch.ones(3, 1))))
    with pytest.warns(UserWarning, match="detached"):
        assert float((H @ torch.ones(3)).norm()) == 0


def test_arguments_by_name():
    x, b = torch.randn(2, 3, requires_grad=True), torch.randn(3, requires_grad=True)
    with CompositeNorms():
        F.layer_norm(input=x, normalized_shape=(3,), weight=b, bias=b, eps=0.1)
        F.batch_norm(input=x, running_mean=None, running_var=None, weight=b, bias=b, training=True, momentum=0.5)
        F.batch_norm(input=x, running_mean=b.detach(), running_var=b.detach() ** 2, weight=b, bias=b, eps=0.1)


@pytest.mark.parametrize("make", (lambda: nn.BatchNorm1d(3), lambda: nn.BatchNorm1d(3, momentum=None),
                                  lambda: nn.InstanceNorm1d(3, track_running_stats=True)))
def test_running_statistics_move_as_they_do_in_torch(make):
    """A landscape that re-estimates them needs it."""
    ours, theirs = make(), make()
    for _ in range(3):
        x = 2 * torch.randn(5, 3, 4) + 1
        with CompositeNorms():
            ours(x)
        theirs(x)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)
