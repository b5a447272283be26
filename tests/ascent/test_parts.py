"""Facts that need neither an oracle nor a trajectory: the rules split the Hessian, radii follow depth."""

import pytest
import torch
from torch import nn

from flatmin import Sharpener, ascent, presets


def test_the_three_rules_split_the_hessian():
    """(g_func − g) + (g_logit − g) = g_sam − g up to O(ρ²): the error falls tenfold when ρ does."""
    torch.manual_seed(0)
    x, y = torch.randn(30, 5, dtype=torch.float64), torch.randint(3, (30,))

    def gradient(rule, rho):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
        Sharpener(model, rho=rho, rule=rule).backward(lambda: model(x), lambda z: nn.functional.cross_entropy(z, y))
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    g = gradient(ascent.Plain(), 0.0)
    errors = []
    for rho in (1e-2, 1e-3, 1e-4):
        change = (gradient(ascent.Plain(), rho) - g) / rho
        split = sum((gradient(rule, rho) - g) / rho for rule in (ascent.Functional(), ascent.LogitOnly()))
        errors.append(((change - split).norm() / change.norm()).item())
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.2) and errors[1] / errors[2] == pytest.approx(10, rel=0.2)


def test_radii_by_depth_grow_from_first_to_last():
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    groups = ascent.by_depth(model, 0.0, 0.4)
    assert [g["rho"] for g in groups] == pytest.approx([0.0, 0.2, 0.4])
    seen = []
    x = torch.randn(8, 2, dtype=torch.float64)

    def loss():
        seen.append([p.detach().clone() for p in model.parameters()])
        return model(x).square().mean()

    presets.sam(model, groups=groups).backward(loss)
    g = torch.autograd.grad(model(x).square().mean(), list(model.parameters()))
    norm = torch.cat([t.flatten() for t in g[2:]]).norm()  # the first layer, at ρ = 0, is outside the norm
    for i, rho in ((0, 0.0), (2, 0.2), (4, 0.4)):
        assert torch.allclose(seen[1][i] - seen[0][i], rho * g[i] / norm, rtol=1e-9, atol=1e-15)
