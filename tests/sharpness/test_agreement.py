"""Agreement with the Hessian, correlations with their intervals, and two models side by side."""

import math
import warnings

import pytest
import torch
from test_one_step import A, W, quadratic
from test_worst_case import relu_net
from torch import nn

from flatmin import Objective
from flatmin.sharpness import agreement, compare, correlation
from flatmin.sharpness.agreement import observed_order
from flatmin.sharpness.cautions import DifferentScaleWarning
from problems import NoisyNet, Vector, batch, build, flat, loss_fn

pytestmark = pytest.mark.filterwarnings("ignore::flatmin.sharpness.SharpnessWarning")


def test_a_smooth_network_has_a_third_order_remainder():
    model = build(NoisyNet)
    before = flat(model)
    s = agreement(Objective(model, loss_fn, batch(0)), 0.02)
    assert s.third_order and s.value == pytest.approx(3, abs=0.2) and torch.equal(flat(model), before)
    assert not s.applies and math.isnan(s.ratio) and "different quantities" in s.sentence


def test_a_quadratic_has_none():
    s = agreement(quadratic(), 0.1)
    assert s.value == math.inf and s.third_order and "quadratic" in s.sentence


def test_a_kink_is_told():
    bent = Objective(Vector([-0.005]), lambda w, _: (w[0] ** 2 + 0.2 * w[0] + 1 + 3 * (w[0] - 0.0).relu()),
                     torch.zeros(8, 1), forward=lambda model, _: model())
    s = agreement(bent, 0.1)
    assert s.third_order is False and "kinks" in s.sentence


def test_at_a_minimum_the_worst_case_is_compared_with_the_top_eigenvalue():
    s = agreement(quadratic(1e-5 * W), 0.1, iterations=60)
    assert s.applies and s.ratio == pytest.approx(1, abs=0.01) and "½ρ²λ₁" in s.sentence
    assert s.bound == pytest.approx(0.005 * float(torch.linalg.eigvalsh(A)[-1]), rel=1e-3)


def test_the_order_is_not_read_from_rounding():
    assert math.isnan(observed_order([1e-15, 4e-16, 1e-16], 5e-16))
    assert observed_order([8e-3, 1e-3, 1e-16], 1e-15) == pytest.approx(3)


def test_correlation_and_its_interval_cover_the_truth():
    generator, inside = torch.Generator().manual_seed(0), 0
    for _ in range(300):
        x, e = torch.randn(2, 25, generator=generator)
        s = correlation(x.tolist(), (0.6 * x + 0.8 * e).tolist())
        inside += s.interval[0] <= 0.6 <= s.interval[1]
    assert 270 <= inside <= 297
    ranks = correlation([1, 2, 3, 4, 100], [1, 4, 9, 16, 25], rank=True)
    assert ranks.value == pytest.approx(1) and "rise together" in ranks.sentence
    few = correlation([1, 2, 3], [3, 1, 2])
    assert few.interval == (-1, 1) and "nothing is decided" in few.sentence
    assert correlation([1, 2, 2, 3], [1, 2, 2, 3], rank=True).value == pytest.approx(1)
    with pytest.raises(ValueError, match="one number a checkpoint"):
        correlation([1, 2], [1])


def test_rescaling_fools_the_plain_measures_and_is_warned_about():
    """The same function twice: every plain measure calls one of them sharper, the invariant ones do not."""
    a, b = relu_net(10.0), relu_net(1.0)
    with pytest.warns(DifferentScaleWarning, match="largest_eigenvalue"):
        s = compare(a, b, 0.05)
    assert s.signs["largest_eigenvalue"] == 1 and s.scale > 2 and not s.same_scale
    for name in ("adaptive_worst_case", "normalized_flatness"):
        assert s.rows[name].a == pytest.approx(s.rows[name].b, rel=1e-4)
    assert "invariant" in s.sentence and s.settings["headline"] == "adaptive_worst_case"


def test_comparing_like_with_like_does_not_warn():
    models = [build(NoisyNet, seed=0), build(NoisyNet, seed=0)]
    with torch.no_grad():
        models[1].head.weight.mul_(1.05)
    with warnings.catch_warnings():
        warnings.simplefilter("error", DifferentScaleWarning)
        s = compare(*(Objective(m, loss_fn, batch(0)) for m in models), measures=["one_step", "worst_case"])
    assert s.same_scale and set(s.signs) == {"one_step", "worst_case"} and s.agree in (True, False)


def test_other_shapes_are_another_scale():
    a, b = (Objective(nn.Linear(6, 3, bias=bias), loss_fn, batch(0)) for bias in (True, False))
    with pytest.warns(DifferentScaleWarning, match="different shapes"):
        assert compare(a, b, measures=["one_step"]).scale == math.inf
    with pytest.raises(ValueError, match="normalized_flatness"):
        compare(a, b, measures=["flat"])
