"""Layers with a cheaper second derivative: the same numbers as torch's own, by differences and by the dense Hessian."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from flatmin import Objective
from flatmin.curvature import FunctionalPart, GaussNewton, Hessian
from flatmin.curvature.smooth import Smooth

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
    assert not H._smooth


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
