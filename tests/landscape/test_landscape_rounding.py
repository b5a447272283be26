"""Half-precision weights: between two points of a fine grid there is no weight, and that is said by name."""

import warnings

import pytest
import torch
from torch import nn

from flatmin import Objective
from flatmin.landscape import line, surface
from flatmin.sharpness import agreement, average_case, critical_sharpness, largest_random, worst_case
from flatmin.sharpness.sharpness_warnings import RoundingWarning


def objective(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).to(dtype)
    return Objective(model, nn.CrossEntropyLoss(), (torch.randn(40, 6).to(dtype), torch.randint(3, (40,))))


FINE = {
    "line": lambda o: line(o, steps=5, radius=1e-3),
    "surface": lambda o: surface(o, 3, radius=1e-3),
    "average_case": lambda o: average_case(o, 1e-5, samples=4),
    "largest_random": lambda o: largest_random(o, 1e-3, draws=2),
    "worst_case": lambda o: worst_case(o, 1e-3, iterations=3),
    "agreement": lambda o: agreement(o, 1e-3, iterations=2, restarts=1),
    "critical_sharpness": lambda o: critical_sharpness(o, most=1),
}


@pytest.mark.parametrize("name", [n for n in FINE if n != "critical_sharpness"])
def test_a_fine_step_in_bfloat16_is_named(name):
    with pytest.warns(RoundingWarning):
        FINE[name](objective(torch.bfloat16))


@pytest.mark.parametrize("name", FINE)
def test_full_precision_has_nothing_to_say_of_the_step(name):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        FINE[name](objective(torch.float32))
    assert not any("half-precision" in str(w.message) for w in caught)


@pytest.mark.parametrize("measure", [lambda o: line(o, steps=3, radius=8.0), lambda o: surface(o, 3, radius=8.0),
                                     lambda o: average_case(o, 0.5, samples=4), lambda o: largest_random(o, 8.0)])
def test_a_large_step_survives_rounding(measure):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        measure(objective(torch.bfloat16))
    assert not any("half-precision" in str(w.message) for w in caught)


def test_the_share_that_is_left_is_the_one_that_was_moved():
    """By hand: the step rounded in bfloat16 against the step asked for."""
    o = objective(torch.bfloat16)
    w = torch.cat([p.detach().flatten() for p in o.parameters])
    d = torch.randn(w.shape, generator=torch.Generator().manual_seed(3))
    asked = 1e-3 * d / d.norm()
    done = (w.float() - asked).bfloat16().float() - w.float()       # of the points nearest to w, the first
    parts = [t.view(p.shape) for t, p in zip(d.split([p.numel() for p in o.parameters]), o.parameters, strict=True)]
    with pytest.warns(RoundingWarning, match=f"{100 * float(done.norm() / asked.norm()):.0f} % of its length"):
        line(o, parts, steps=3, radius=1e-3)
