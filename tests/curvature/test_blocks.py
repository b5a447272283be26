"""Several vectors through one graph at once give what they give one after the other, or an error that is seen.

torch batches the second reverse pass, which the Python code of a custom function or a draw inside a checkpoint may not
bear. Where that is known in advance vectors go one by one; an error of unknown cause is never an invitation to retry.
"""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from flatmin import Objective
from flatmin.curvature import Hessian, eigenpairs
from nets import classification, samples


class Stubborn(torch.autograd.Function):
    """The identity, with a backward pass that no batching rule knows."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g.flatten(0).view(g.shape)


class Unbatched(torch.autograd.Function):
    """The identity, with a backward pass that reads a number."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g * (1.0 if float(g.detach().sum()) < 1e300 else 2.0)


class Through(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.first, self.head, self.function = nn.Linear(5, 4), nn.Linear(4, 3), function

    def forward(self, x):
        return self.head(self.function(self.first(x)))


def dropped(x):
    return torch.nn.functional.dropout(torch.tanh(x), 0.5)


ONE_BY_ONE = {
    "no batching rule": (lambda x: torch.tanh(Stubborn.apply(x)), "eval"),
    "reads a number": (lambda x: torch.tanh(Unbatched.apply(x)), "eval"),
    "behind the loss": (lambda x: torch.tanh(Stubborn.apply(Unbatched.apply(x))), "eval"),
    "draws in a checkpoint": (lambda x: checkpoint(dropped, x, use_reentrant=False), "train"),
}
AT_ONCE = {
    "tanh": (torch.tanh, "eval"),
    "checkpoint": (lambda x: checkpoint(torch.tanh, x, use_reentrant=False), "eval"),
}


@pytest.mark.parametrize("split", (False, True))
@pytest.mark.parametrize("name", [*ONE_BY_ONE, *AT_ONCE])
def test_a_block_is_its_vectors(name, split):
    torch.manual_seed(0)
    function, mode = (ONE_BY_ONE | AT_ONCE)[name]
    x, y = samples()
    data = [(x[:7], y[:7]), (x[7:], y[7:])] if split else (x, y)
    objective = Objective(Through(function).double(), nn.CrossEntropyLoss(), data, mode=mode)
    H = Hessian(objective, vmap=True)
    assert torch.allclose(H.dense(), Hessian(objective, vmap=False).dense(), atol=1e-14)
    assert H.product == "auto"


@pytest.mark.parametrize("name", AT_ONCE)
def test_a_block_takes_one_pass(name, monkeypatch):
    passes, grad = [], torch.autograd.grad

    def counted(*args, is_grads_batched=False, **options):
        passes.append(is_grads_batched)
        return grad(*args, is_grads_batched=is_grads_batched, **options)

    torch.manual_seed(0)
    objective = Objective(Through(AT_ONCE[name][0]).double(), nn.CrossEntropyLoss(), samples())
    H = Hessian(objective, vmap=True)
    with H.session():
        monkeypatch.setattr(torch.autograd, "grad", counted)
        H @ torch.eye(H.size, dtype=torch.float64)
    assert passes == [False, True]      # the gradient, and all rows


@pytest.mark.parametrize("error", (RuntimeError("CUDA error: an illegal memory access was encountered"),
                                   torch.OutOfMemoryError("out of memory"), NotImplementedError("no such kernel")))
@pytest.mark.parametrize("measure", (lambda H: H.dense(), lambda H: eigenpairs(H, 2, block=2)))
def test_an_error_of_unknown_cause_surfaces_once(error, measure, monkeypatch):
    raised, grad = [], torch.autograd.grad

    def broken(*args, is_grads_batched=False, **options):
        if is_grads_batched:
            raised.append(1)
            raise error
        return grad(*args, **options)

    H = Hessian(classification(), vmap=True)
    with H.session():       # checked
        monkeypatch.setattr(torch.autograd, "grad", broken)
        with pytest.raises(type(error)) as caught:
            measure(H)
    assert caught.value is error and len(raised) == 1 and H.vmap
