"""The loss along a line: closed form on a quadratic, true displacements, nothing changed, nothing smoothed over."""

import dataclasses

import pytest
import torch
from torch import nn

from flatmin import Objective
from flatmin.landscape import line


def quadratic() -> Objective:
    """L = mean of (w · x)² for a three-dimensional w."""
    return Objective(nn.Linear(3, 1, bias=False), nn.MSELoss(), (torch.eye(3), torch.zeros(3, 1)))


def test_a_quadratic_in_closed_form():
    objective = quadratic()
    w = objective.parameters[0].detach().clone().flatten()
    d = torch.tensor([[3.0, 0.0, 4.0]])
    found = line(objective, [d], steps=11, radius=2.0)
    assert found.x.tolist() == pytest.approx(torch.linspace(-2, 2, 11).tolist())
    expected = [(w + x * d.flatten() / 5).square().mean() for x in found.x]
    assert torch.allclose(found.values, torch.stack(expected), atol=1e-15)
    assert float(found.values[5]) == pytest.approx(float(objective.value()), rel=1e-15)
    assert torch.equal(d, torch.tensor([[3.0, 0.0, 4.0]]))


def test_directions_and_seeds():
    objective = quadratic()
    a, b, c = (line(objective, "random", steps=3, seed=s) for s in (0, 0, 1))
    assert torch.equal(a.values, b.values) and not torch.equal(a.values, c.values)
    g = line(objective, "gradient", steps=3, radius=1e-4)
    slope = float((g.values[2] - g.values[0]) / 2e-4)
    assert slope == pytest.approx(float(objective.gradient()[0].norm()), rel=1e-6)
    assert float(g.direction[0].norm()) == pytest.approx(1)


def test_the_weights_are_bitwise_what_they_were():
    objective = quadratic()
    before = objective.parameters[0].detach().clone()
    line(objective, steps=7, radius=100.0)
    assert torch.equal(before, objective.parameters[0])

    calls = []

    def interrupted(z, t):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return z.square().mean()

    model = objective.model
    with pytest.raises(KeyboardInterrupt):
        line(Objective(model, interrupted, (torch.eye(3), torch.zeros(3, 1))), steps=7)
    assert torch.equal(before, objective.parameters[0])


def test_nan_and_inf_are_kept():
    objective = quadratic()
    with torch.no_grad():
        objective.parameters[0].fill_(1.0)
    bad = Objective(objective.model, lambda z, t: z.sum().log(), (torch.eye(3), torch.zeros(3, 1)))
    values = line(bad, [torch.ones(1, 3)], steps=5, radius=2 * 3**0.5).values
    assert values[0].isnan() and not values[1].isfinite() and values[2:].isfinite().all()


def test_wrong_arguments():
    objective = quadratic()
    for direction in ("up", [torch.zeros(1, 3)], [torch.zeros(2)]):
        with pytest.raises(ValueError):
            line(objective, direction)
    with pytest.raises(ValueError):
        line(objective, radius=0.0)


def test_what_is_printed_is_short_and_names_ranges():
    found = line(quadratic(), [torch.tensor([[3.0, 0.0, 4.0]])], steps=11, radius=2.0)
    low, high = float(found.values.min()), float(found.values.max())
    assert repr(found) == f"Line(11 points, x -2 to 2, loss {low:.4g} to {high:.4g})"
    assert repr(line(quadratic(), "random", draws=3)).endswith(", 3 draws)")
    holes = dataclasses.replace(found, values=torch.where(found.x.abs() > 1.9, torch.inf, found.values))
    assert "(2 not finite)" in repr(holes)
