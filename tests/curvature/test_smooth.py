"""Layers with a cheaper second derivative: the same numbers as torch's own, by differences and by the dense Hessian."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from flatmin import Objective
from flatmin.curvature import FunctionalPart, GaussNewton, Hessian
from flatmin.curvature.smooth import Smooth
from flatmin.curvature.thrice import Thrice

ACTIVATIONS = {"tanh": torch.tanh, "method": torch.Tensor.tanh, "sigmoid": torch.sigmoid, "silu": F.silu,
               "gelu": F.gelu, "gelu tanh": lambda x: F.gelu(x, approximate="tanh")}
OURS = {"_PointwiseBackward", "LinearBackward", "LayerNormBackward", "BatchNormBackward"}


def smooth(function):
    def inside(*args):
        with Smooth():
            return function(*args)
    return inside


def batch_norm(x, w, b):
    c = x.shape[1]
    mean, var = torch.linspace(-1, 1, c, dtype=x.dtype), torch.linspace(0.5, 2, c, dtype=x.dtype)
    return F.batch_norm(x, mean, var, w, b, eps=0.01)


LAYERS = {"layer norm": (lambda x, w, b: F.layer_norm(x, (5,), w, b, 0.01), (2, 3, 5)),
          "batch norm": (batch_norm, (4, 5)), "batch norm of pictures": (batch_norm, (2, 5, 3, 2))}


def graph(t):
    seen, stack = set(), [t.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node.name() not in seen:
            seen.add(node.name())
            stack += [n for n, _ in node.next_functions]
    return seen


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_by_differences(name):
    x = torch.linspace(-3, 3, 13, dtype=torch.float64, requires_grad=True)
    f = smooth(ACTIVATIONS[name])
    assert "_PointwiseBackward" in graph(f(x))
    assert torch.equal(f(x), ACTIVATIONS[name](x))
    assert torch.autograd.gradcheck(f, x) and torch.autograd.gradgradcheck(f, x)


@pytest.mark.parametrize("name", LAYERS)
def test_layers_by_differences(name):
    function, shape = LAYERS[name]
    generator = torch.Generator().manual_seed(0)
    args = [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in (shape, (5,), (5,))]
    f = smooth(function)
    assert graph(f(*args)) & {"LayerNormBackward", "BatchNormBackward"}
    assert torch.allclose(f(*args), function(*args), atol=1e-15)
    assert torch.autograd.gradcheck(f, args) and torch.autograd.gradgradcheck(f, args)


class Net(nn.Module):
    """Every layer once."""

    def __init__(self, checkpointed: bool = False):
        super().__init__()
        self.checkpointed = checkpointed
        self.conv, self.norm, self.fc = nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.Linear(8, 4)
        self.after, self.head = nn.LayerNorm(4), nn.Linear(4, 3)

    def middle(self, x):
        return F.silu(self.after(torch.tanh(self.fc(x.flatten(1)))))

    def forward(self, x):
        x = F.gelu(self.norm(self.conv(x)))
        return self.head(checkpoint(self.middle, x, use_reentrant=False) if self.checkpointed else self.middle(x))


def objective(**options):
    torch.manual_seed(0)
    net = Net(**options).double()
    net.norm.running_mean.uniform_(-0.5, 0.5)
    net.norm.running_var.uniform_(0.5, 2)
    return Objective(net, nn.CrossEntropyLoss(), (torch.randn(6, 1, 3, 3).double(), torch.arange(6) % 3))


@pytest.mark.parametrize("kind", (Hessian, GaussNewton, FunctionalPart))
def test_matrices_of_a_net_with_all_of_them(kind, monkeypatch):
    ours = kind(objective()).dense()
    monkeypatch.setattr("flatmin.curvature.smooth._LAYERS", {})
    assert torch.allclose(ours, kind(objective()).dense(), atol=1e-14)
    assert float(ours.norm()) > 0.1


def test_against_forward_over_reverse():
    assert torch.allclose(Hessian(objective()).dense(), Hessian(objective(), product="forward").dense(), atol=1e-14)


def test_a_block_of_vectors_and_frozen_weights():
    o = objective()
    o.model.norm.weight.requires_grad_(False)
    o.model.after.bias.requires_grad_(False)
    truth = Hessian(o, product="forward").dense()
    assert torch.allclose(Hessian(o, vmap=True).dense(), truth, atol=1e-14)


def test_a_block_that_cannot_be_batched_goes_one_by_one():
    o = objective()
    o.model.fc.register_forward_hook(lambda module, args, out: Stubborn.apply(out))
    H = Hessian(o, vmap=True)
    assert torch.allclose(H.dense(), Hessian(objective()).dense(), atol=1e-14)
    assert not H.vmap and H.product == "auto"


class Stubborn(torch.autograd.Function):
    """The identity, with a backward pass that no batching rule knows."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g.flatten(0).view(g.shape)


def test_checkpointed_layers():
    H = Hessian(objective(checkpointed=True))
    assert torch.allclose(H.dense(), Hessian(objective()).dense(), atol=1e-14)
    assert H._modes[0] not in (Smooth, Thrice)


NORMS = {"layer norm": nn.LayerNorm(4), "layer norm without weights": nn.LayerNorm((4, 3), elementwise_affine=False),
         "batch norm": nn.BatchNorm1d(4), "instance norm": nn.InstanceNorm1d(4, affine=True),
         "batch norm of statistics": nn.BatchNorm1d(4).eval()}


@pytest.mark.parametrize("name", NORMS)
def test_normalization_from_primitives(name):
    x = torch.randn(5, 3, 4, dtype=torch.float64) if name == "layer norm" else torch.randn(5, 4, 3, dtype=torch.float64)
    layer = NORMS[name].double()
    with Thrice():
        ours = layer(x)
    assert torch.allclose(ours, layer(x), atol=1e-14)


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
    assert H._modes[0] is Thrice and H.product == "auto"
    assert float((hv - D @ v).norm() / hv.norm()) < 1e-6


def test_a_loss_that_is_linear_in_an_inner_derivative():
    """Score matching: the gradient that comes in is a constant, and what is built on it must not become one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 7), nn.GELU(), nn.LayerNorm(7), nn.Linear(7, 3)).double()
    x = torch.randn(5, 3, dtype=torch.float64)

    def forward(net, batch):
        x = batch[0].clone().requires_grad_()
        s = net(x)
        divergence = sum(torch.autograd.grad(s[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(3))
        return (divergence + s.square().sum(1) / 2).mean()

    o = Objective(model, lambda out, batch: out, [(x,)], forward=forward)
    H, D = Hessian(o), Hessian(o, product="finite_difference")
    v = torch.randn(H.size, dtype=torch.float64)
    assert float((H @ v - D @ v).norm() / (D @ v).norm()) < 1e-7


@pytest.mark.parametrize("checkpointed", (False, True))
def test_third_derivatives_that_torch_has_wrong_are_not_used(checkpointed):
    """Where primitives cannot come in: layer norm called by another name, or run again by a checkpoint."""
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


def test_large_and_absent_inputs():
    x = torch.tensor([-3e4, -300.0, -60.0, 60.0, 300.0, 3e4], dtype=torch.float16)
    for f in ACTIVATIONS.values():
        z = x.clone().requires_grad_()
        with Smooth():
            y = f(z)
        g, = torch.autograd.grad(y.sum(), z, create_graph=True)
        h, = torch.autograd.grad(g.sum(), z)
        assert bool(torch.isfinite(g).all()) and float(h.abs().max()) == 0
    with Smooth():
        assert F.batch_norm(torch.ones(0, 5, requires_grad=True), torch.zeros(5), torch.ones(5), torch.ones(5),
                            torch.ones(5)).shape == (0, 5)


def test_results_may_be_changed_in_place():
    x = torch.linspace(-1, 1, 5, dtype=torch.float64, requires_grad=True)
    with Smooth():
        y = F.gelu(x).mul_(2)
        z = F.linear(x.view(1, 5), torch.eye(5, dtype=torch.float64)).add_(1)
    g, = torch.autograd.grad(y.sum() + z.sum(), x)
    assert torch.allclose(g, 1 + 2 * torch.autograd.grad(F.gelu(x).sum(), x)[0])


def test_arguments_by_name():
    x, w, b = (torch.randn(s, requires_grad=True) for s in ((2, 3), (3, 3), (3,)))
    for mode in (Smooth, Thrice):
        with mode():
            F.linear(input=x, weight=w, bias=b)
            F.layer_norm(input=x, normalized_shape=(3,), weight=b, bias=b, eps=0.1)
            F.batch_norm(input=x, running_mean=None, running_var=None, weight=b, bias=b, training=True, momentum=0.5)
            F.batch_norm(input=x, running_mean=b.detach(), running_var=b.detach() ** 2, weight=b, bias=b, eps=0.1)
            F.gelu(input=x, approximate="tanh")
            F.silu(input=x)
            torch.tanh(input=x.detach(), out=torch.empty(2, 3))
            F.linear(x[:0], w, b)


def test_what_is_left_to_torch():
    x = torch.randn(4, 5, requires_grad=True)
    with Smooth():
        left = [F.batch_norm(x, torch.zeros(5), torch.ones(5), torch.ones(5), torch.zeros(5), True),
                F.layer_norm(x, (4, 5)), F.silu(x * 1, inplace=True)]
        with torch.autocast("cpu", torch.bfloat16):
            left.append(F.gelu(x))
        with torch.no_grad():
            left.append(torch.tanh(x))
    assert not any(name in OURS for t in left for name in graph(t))


def test_a_loss_that_autograd_cannot_follow_is_warned_about():
    model = nn.Linear(2, 1)
    H = Hessian(Objective(model, lambda z, y: (z.detach() - y).square().mean(), (torch.ones(3, 2), torch.ones(3, 1))))
    with pytest.warns(UserWarning, match="use_reentrant"):
        assert float((H @ torch.ones(3)).norm()) == 0
