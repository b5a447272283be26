"""The first layer's output on a plane, from one product a direction: the same numbers as putting the weights there."""

import pytest
import torch
from torch import nn

from flatmin import Objective
from flatmin.landscape import fast, line, surface

NETS = {"plain": lambda: nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3)),
        "no bias": lambda: nn.Sequential(nn.Linear(6, 9, bias=False), nn.Tanh(), nn.Linear(9, 3)),
        "flattened": lambda: nn.Sequential(nn.Flatten(), nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 3)),
        "one layer": lambda: nn.Sequential(nn.Linear(6, 3), nn.Identity())}


def objective(name, dtype=torch.float64, frozen=()):
    torch.manual_seed(0)
    model = NETS[name]().to(dtype)
    for key, p in model.named_parameters():
        p.requires_grad_(key not in frozen)
    x = torch.randn(11, 2, 3, dtype=dtype) if name == "flattened" else torch.randn(11, 6, dtype=dtype)
    return Objective(model, nn.CrossEntropyLoss(), [(x[:7], torch.arange(7) % 3), (x[7:], torch.arange(4) % 3)])


@pytest.mark.parametrize("frozen", ((), ("0.bias",), ("0.weight",)))
@pytest.mark.parametrize("name", NETS)
def test_equal_to_evaluations_one_by_one(name, frozen, monkeypatch):
    used = []
    first = fast._First.__call__
    monkeypatch.setattr(fast._First, "__call__", lambda self, c: used.append(c) or first(self, c))
    ours = surface(objective(name, frozen=frozen), steps=5).values
    assert bool(used) == ("0.weight" not in frozen or name == "flattened")
    profile = line(objective(name, frozen=frozen), steps=7).values
    monkeypatch.setattr(fast, "ROOM", 0)
    assert torch.allclose(ours, surface(objective(name, frozen=frozen), steps=5).values, atol=1e-13)
    assert torch.allclose(profile, line(objective(name, frozen=frozen), steps=7).values, atol=1e-13)


def test_the_middle_is_the_loss_itself():
    o = objective("plain", torch.float32)
    assert float(surface(o, steps=5).values[2, 2]) == pytest.approx(float(o.value()), rel=1e-6)
