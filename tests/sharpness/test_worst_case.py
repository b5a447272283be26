"""Worst case: against the exact maximum on quadratics, brute force on two parameters, and the defects of peers."""

import math

import pytest
import torch
from test_one_step import A, W, quadratic
from torch import nn

from flatmin import Objective
from flatmin.sharpness import one_step, trust_region, worst_case
from problems import NoisyNet, Vector, assert_same, batch, build, flat, loss_fn

pytestmark = pytest.mark.filterwarnings("ignore::flatmin.sharpness.SharpnessWarning")


def brute(function, rho, p=2, c=(1.0, 1.0), n=721):
    """The maximum over a fine polar (p = 2) or square grid of a ball in two dimensions."""
    if p == 2:
        r, t = torch.meshgrid(torch.linspace(0, rho, 60), torch.linspace(0, 2 * math.pi, n), indexing="ij")
        x, y = r * t.cos(), r * t.sin()
    else:
        x, y = torch.meshgrid(*[torch.linspace(-rho, rho, 201)] * 2, indexing="ij")
    return float(function(c[0] * x, c[1] * y).max())


@pytest.mark.parametrize("rho", [0.01, 0.3, 3.0])
@pytest.mark.parametrize("g", [[0.1, -0.2], [0.0, 0.3], [0.0, 0.0]])
@pytest.mark.parametrize("h", [[[3.0, 0.0], [0.0, 1.0]], [[2.0, 1.0], [1.0, -1.0]], [[-2.0, 0.0], [0.0, -1.0]]])
def test_the_trust_region_against_brute_force(g, h, rho):
    g, h = torch.tensor(g), torch.tensor(h)
    s = trust_region(g, h, rho)
    e = s.maximizer
    assert float(e.norm()) <= rho * (1 + 1e-9)
    assert float(g @ e + 0.5 * e @ h @ e) == pytest.approx(s.value, abs=1e-12)
    angle = torch.linspace(0, 2 * math.pi, 4001)
    points = torch.stack([angle.cos(), angle.sin()], 1)[None] * torch.linspace(0, rho, 101)[:, None, None]
    seen = (points @ g + 0.5 * ((points @ h) * points).sum(-1)).max()
    assert float(seen) <= s.value + 1e-12
    assert float(seen) >= s.value - 1e-3 * max(abs(s.value), 1e-9) - 1e-9


def test_the_hard_case_is_named():
    s = trust_region(torch.tensor([0.0, 0.1]), torch.diag(torch.tensor([4.0, 1.0])), 1.0)
    assert s.hard_case and s.multiplier == pytest.approx(4.0) and float(s.maximizer.norm()) == pytest.approx(1.0)
    assert not trust_region(torch.tensor([0.1, 0.1]), torch.eye(2), 1.0).hard_case


@pytest.mark.parametrize(("w", "adaptive"), [(W, "none"), (W, "element"), (W, "layer"), (0 * W, "none")])
def test_equals_the_trust_region_on_a_quadratic(w, adaptive):
    s = worst_case(quadratic(w), 0.2, iterations=60, adaptive=adaptive, quadratic=True)
    assert s.value == pytest.approx(s.quadratic, rel=1e-3) and s.value <= s.quadratic * (1 + 1e-9)
    assert s.norm == pytest.approx(0.2) and s.value >= one_step(quadratic(w), 0.2).value * (adaptive == "none")


def test_infinity_norm_on_a_quadratic():
    corners = torch.cartesian_prod(*[torch.tensor([-0.2, 0.2])] * 3)
    best = max(float((A @ W) @ e + 0.5 * e @ A @ e) for e in corners)
    s = worst_case(quadratic(), 0.2, p=math.inf, iterations=60, restarts=4)
    assert best * 0.999 <= s.value
    inside = torch.cartesian_prod(*[torch.linspace(-0.2, 0.2, 41)] * 3)
    assert s.value <= float((inside @ (A @ W) + 0.5 * ((inside @ A) * inside).sum(1)).max()) * (1 + 1e-3)


@pytest.mark.parametrize("p", [2, math.inf])
@pytest.mark.parametrize("adaptive", ["none", "element"])
def test_brute_force_on_two_parameters(p, adaptive):
    w = torch.tensor([0.5, -1.5])

    def value(a, b):
        return torch.sin(3 * a) * torch.cos(2 * b) + 0.3 * a * a + 0.1 * b**4

    o = Objective(Vector(w), lambda z, _: value(z[0], z[1]), torch.zeros(8, 1), forward=lambda model, _: model())
    c = w.abs() if adaptive == "element" else torch.ones(2)
    rho, base = 0.5, value(*w)
    best = brute(lambda x, y: value(w[0] + x, w[1] + y) - base, rho, p, c)
    s = worst_case(o, rho, p=p, adaptive=adaptive, iterations=40, restarts=6)
    assert s.value == pytest.approx(best, rel=5e-3)
    assert len(s.runs) == 7 and max(s.runs) == s.value


@pytest.mark.parametrize("adaptive", ["element", "filter", "layer"])
@pytest.mark.parametrize("p", [2, math.inf])
def test_zeros_in_the_weights_stay_and_the_step_keeps_its_radius(adaptive, p):
    """The reference code divides 0/0 here, gets a NaN norm, never projects, and reports 0.359 for 0.010."""
    model = build(NoisyNet)
    with torch.no_grad():
        model.first.bias.zero_()
        model.head.weight[0] = 0
    s = worst_case(Objective(model, loss_fn, batch(0)), 0.05, p=p, adaptive=adaptive, iterations=5, restarts=1)
    assert math.isfinite(s.value) and 0 < s.norm <= 0.05 * (1 + 1e-6)
    names = [n for n, _ in model.named_parameters()]
    delta = dict(zip(names, s.direction, strict=True))
    if adaptive == "element":
        assert not delta["first.bias"].any() and not delta["head.weight"][0].any()
    if adaptive == "filter":
        assert not delta["head.weight"][0].any() and delta["head.weight"][1].any()


def test_everything_is_given_back_and_seeds_decide():
    model = build(NoisyNet)
    before, state = flat(model), torch.get_rng_state()
    first, second = (worst_case(Objective(model, loss_fn, batch(0)), 0.5, iterations=4, seed=3) for _ in range(2))
    assert first.value == second.value and torch.equal(torch.get_rng_state(), state)
    assert_same(flat(model), before)
    assert all(p.grad is None for p in model.parameters())


def test_a_flat_point_is_left_by_a_random_start():
    s = worst_case(quadratic(torch.zeros(3)), 0.1, iterations=60)
    assert s.start == "random" and s.value == pytest.approx(0.5 * 0.01 * float(torch.linalg.eigvalsh(A)[-1]), rel=1e-3)


@pytest.mark.parametrize("options", [{"rho": 0}, {"p": 1}, {"adaptive": "row"}, {"iterations": 0},
                                     {"quadratic": True, "p": math.inf}])
def test_bad_options(options):
    with pytest.raises(ValueError):
        worst_case(quadratic(), **{"iterations": 2, **options})


def relu_net(a=1.0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 3, bias=False))
        factors = a ** torch.linspace(-1, 1, 8)
    with torch.no_grad():
        model[0].weight.mul_(factors[:, None])
        model[2].weight.div_(factors[None])
    return Objective(model, nn.CrossEntropyLoss(), batch(0, 16))


def test_element_adaptive_is_invariant_to_rescaling_and_plain_is_not():
    plain = [worst_case(relu_net(a), 0.1, iterations=8, restarts=0).value for a in (1.0, 10.0)]
    for p, rho in ((2, 0.3), (math.inf, 0.02)):
        adaptive = [worst_case(relu_net(a), rho, p=p, adaptive="element", iterations=8, restarts=1).value
                    for a in (1.0, 10.0)]
        assert adaptive[0] == pytest.approx(adaptive[1], rel=1e-6)
    assert abs(plain[0] / plain[1] - 1) > 0.2
