"""Agreement with the Hessian, correlations with their intervals, and two models side by side."""

import copy
import math
import re
import warnings

import pytest
import torch
from test_one_step import A, W, quadratic
from test_worst_case import relu_net
from torch import nn

from flatmin import Objective
from flatmin.sharpness import agreement, compare, correlation, normalized_flatness, one_step
from flatmin.sharpness.agreement import _sentence, observed_order
from flatmin.sharpness.sharpness_warnings import DifferentScaleWarning
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


def two_nets(noise, batches, size=10):
    """A net and the same with noise on its weights, on the same batches."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(batches * size, 4, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (batches * size,), generator=generator)
    a = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).double()
    b = copy.deepcopy(a)
    with torch.no_grad():
        for p in b.parameters():
            p += noise * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    data = list(zip(x.split(size), y.split(size), strict=True))
    return [Objective(m, torch.nn.CrossEntropyLoss(), data) for m in (a, b)]


def test_the_error_of_a_difference_is_that_of_the_differences_by_batch():
    a, b = two_nets(0.3, 12)
    row = compare(a, b, measures=["one_step", "normalized_flatness"]).rows

    def rises(objective):       # by hand, batch by batch
        w = [p.detach().clone() for p in objective.parameters]
        losses = lambda: torch.stack([objective.loss_fn(objective.model(x), y) for x, y in objective.data])  # noqa: E731
        g = torch.autograd.grad(losses().mean(), objective.parameters)
        length = torch.cat([t.flatten() for t in g]).norm()
        with torch.no_grad():
            before = losses()
            for p, t in zip(objective.parameters, g, strict=True):
                p += 0.05 * t / length
            after = losses()
            for p, t in zip(objective.parameters, w, strict=True):
                p.copy_(t)
        return after - before

    change = rises(a) - rises(b)
    side = row["one_step"]
    assert side.paired and side.value == pytest.approx(float(change.mean()), rel=1e-9)
    assert side.stderr == side.data_stderr == pytest.approx(float(change.std() / 12**0.5), rel=1e-9)
    assert side.sign == (0 if abs(side.value) <= 2 * side.stderr else 1 if side.value > 0 else -1)

    def flatness(objective, only):
        return normalized_flatness(Objective(objective.model, objective.loss_fn, [only])).value

    change = torch.tensor([flatness(a, one) - flatness(b, one) for one in a.data], dtype=torch.float64)
    side = row["normalized_flatness"]
    assert side.value == pytest.approx(float(change.mean()), rel=1e-6) and side.paired
    assert side.data_stderr == pytest.approx(float(change.std() / 12**0.5), rel=1e-6)


def test_the_largest_eigenvalues_of_nearly_the_same_weights_are_undecided():
    found = compare(*two_nets(1e-3, 12), measures=["largest_eigenvalue"])
    row = found.rows["largest_eigenvalue"]
    assert row.sign == 0 and row.stderr > abs(row.value) / 2 and "undecided" in found.sentence
    assert "sharper" not in found.sentence and "no error" not in found.sentence.lower()


def test_with_few_batches_the_sentence_says_that_the_data_have_no_error():
    found = compare(*two_nets(0.3, 4), measures=["one_step"])
    assert math.isnan(found.rows["one_step"].data_stderr) and "these data alone" in found.sentence
    found = compare(*two_nets(0.0, 4), measures=["one_step"])
    assert found.signs == {"one_step": 0} and "undecided" in found.sentence


def test_what_is_printed():
    objective = two_nets(0.0, 6)[0]
    s = agreement(objective, 0.1)
    assert str(s) == s.sentence
    kinks = _sentence(1.0, False, 0.1, 0.1, math.nan)
    assert kinks.index("kinks (ReLU)") < kinks.index("the Hessian is wrong")
    step = one_step(objective, 0.5)
    shown, *parts = re.findall(r"-?[0-9.]+(?:e-?[0-9]+)?", str(step).replace("− ", "-"))
    assert float(shown) == pytest.approx(step.value, rel=1e-2)
    assert math.fsum(map(float, parts[:3])) == pytest.approx(float(shown), rel=2e-2)
    assert str(step).endswith(f", data ± {step.data_stderr:.2g}")
    for name in ("(first order)", "(second order)", "(rest)"):
        assert name in str(step)
