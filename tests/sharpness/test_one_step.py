"""One-step sharpness: closed forms, memory, and that nothing is changed by measuring."""

import copy
import math
import warnings

import pytest
import torch
from torch import nn

from flatmin import Objective
from flatmin.sharpness import first_order, one_step, scaled_radius
from flatmin.sharpness import sharpness_warnings as cautions
from problems import NoisyNet, TiedNet, Vector, assert_same, batch, build, flat, loss_fn

A = torch.tensor([[10.0, 1.0, 0.0], [1.0, 2.0, 0.5], [0.0, 0.5, -1.0]], dtype=torch.float64)
W = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64)


def quadratic(w=W, a=A, b=None, **settings):
    """½ wᵀAw + bᵀw as an objective over 8 samples."""
    def loss(w, _):
        return 0.5 * w @ a @ w + (0 if b is None else b @ w) + 3.0

    return Objective(Vector(w), loss, torch.zeros(8, 1), forward=lambda model, _: model(), **settings)


def test_the_parts_on_a_quadratic():
    rho, g = 0.1, A @ W
    s = one_step(quadratic(), rho)
    assert s.first_order == pytest.approx(rho * float(g.norm()), rel=1e-12)
    assert s.second_order == pytest.approx(0.5 * rho**2 * float(g @ A @ g / g.dot(g)), rel=1e-12)
    assert abs(s.remainder) < 1e-12
    assert float(s) == s.value == pytest.approx(s.first_order + s.second_order, rel=1e-12)
    assert s.curvature == pytest.approx(float(g @ A @ g / g.dot(g)))
    assert s.dominant == "first_order" and sum(s.parts.values()) == pytest.approx(1)
    assert float(first_order(quadratic(), rho)) == pytest.approx(s.first_order, rel=1e-12)


def test_the_radius_scales_with_the_root_of_the_size():
    s = one_step(quadratic(), 0.5, adaptive_epsilon=True)
    rho = scaled_radius(0.5, 3)
    assert s.settings["epsilon"] == 0.5 and s.settings["rho"] == rho == 0.5 * math.sqrt(3e-6)
    assert s.value == one_step(quadratic(), rho).value


def test_a_critical_point_has_no_direction():
    s = one_step(quadratic(torch.zeros(3)), 0.1)
    assert (s.value, s.first_order, s.second_order, s.radius, s.dominant) == (0, 0, 0, 0, "none")


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_everything_is_given_back(mode):
    model = build(NoisyNet)
    model.head.weight.grad = torch.randn_like(model.head.weight)
    objective = Objective(model, loss_fn, [batch(0), batch(1, 5)], mode=mode)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    grads, modes, state = model.head.weight.grad.clone(), [m.training for m in model.modules()], torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one_step(objective, 0.5, second_order=False)
    for key, value in model.state_dict().items():
        assert_same(value, before[key], key)
    assert_same(model.head.weight.grad, grads)
    assert [m.training for m in model.modules()] == modes and torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters() if p is not model.head.weight)


def test_the_weights_come_back_when_the_second_pass_raises():
    calls = []

    def loss(outputs, targets):
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("second pass")
        return loss_fn(outputs, targets)

    model = build(NoisyNet)
    before = flat(model)
    with pytest.raises(RuntimeError, match="second pass"):
        one_step(Objective(model, loss, batch(0), check=False), second_order=False)    # the check would be the second
    assert_same(flat(model), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cls", [NoisyNet, TiedNet])
def test_the_lean_gradient_is_the_gradient(cls, dtype):
    objective = Objective(build(cls, dtype=dtype), nn.CrossEntropyLoss(), [batch(0, dtype=dtype),
                                                                           batch(1, 5, dtype=dtype)])
    objective.model.eval()
    loss = sum(nn.functional.cross_entropy(objective.model(x), y, reduction="sum") for x, y in objective.data) / 17
    expected = torch.autograd.grad(loss, objective.parameters)
    for lean, plain in zip(objective.evaluate(gradient=True).gradient, expected, strict=True):
        torch.testing.assert_close(lean, plain, rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=1e-7)


def test_two_forwards_and_one_backward():
    model = build(NoisyNet)
    calls = {"forward": 0, "backward": 0}
    model.register_forward_hook(lambda *_: calls.__setitem__("forward", calls["forward"] + 1))
    model.register_full_backward_hook(lambda *_: calls.__setitem__("backward", calls["backward"] + 1))
    objective = Objective(model, loss_fn, batch(0))
    objective.check()       # two evaluations more, once an objective
    for _ in range(2):
        calls.update(forward=0, backward=0)
        one_step(objective, second_order=False)
        assert calls == {"forward": 2, "backward": 1}


def test_bfloat16_says_what_it_really_did():
    model = nn.Linear(64, 3, bias=False).to(torch.bfloat16)
    data = torch.randn(16, 64, dtype=torch.bfloat16), torch.arange(16) % 3
    before = model.weight.detach().clone()
    with pytest.warns(cautions.RoundingWarning):
        s = one_step(Objective(model, loss_fn, data), 1e-5, second_order=False)
    assert s.radius < 0.9e-5
    assert_same(model.weight.detach(), before)


@pytest.mark.parametrize(("kind", "objective"), [
    (cautions.SmallBatchWarning, lambda: Objective(build(NoisyNet), loss_fn, batch(0, 4))),
    (cautions.TrainingModeWarning, lambda: Objective(build(NoisyNet), loss_fn, batch(0), mode="train")),
    (cautions.LossNearZeroWarning, lambda: Objective(Vector([1e-4, 2e-4]), lambda w, _: w @ w, torch.zeros(8, 1),
                                                     forward=lambda model, _: model())),
    (cautions.MissingGradientWarning, lambda: Objective(
        nn.ModuleDict({"used": nn.Linear(6, 3), "idle": nn.Linear(2, 2)}), lambda z, b: loss_fn(z, b[1]), batch(0),
        forward=lambda model, b: model["used"](b[0]))),
])
def test_warned_about_by_name(kind, objective):
    with pytest.warns(kind):
        s = one_step(objective())
    assert kind.__name__ in s.warnings


def test_a_good_measurement_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert one_step(Objective(build(NoisyNet), loss_fn, batch(0))).warnings == ()


@pytest.mark.parametrize(("loss", "rho", "holds"), [
    (lambda w, _: 3 + w.sum() + w.square().sum(), 0.5, True),
    (lambda w, _: 3 + w.sum() + 40 * w.pow(4).sum(), 1.5, False),
    (lambda w, _: 3 + 9 * w.sum() + 5 * w.cos().sum(), 0.1, True),
    (lambda w, _: 3 + (20 * w).sin().sum() / 10, 1.0, False),
])
def test_says_where_the_expansion_does_not_hold(loss, rho, holds):
    s = one_step(Objective(Vector([0.1, -0.1]), loss, torch.zeros(8, 1), forward=lambda m, _: m()), rho)
    assert s.expansion_holds is holds and (s.dominant == "remainder") is not holds
    assert holds == (abs(s.remainder) <= (abs(s.first_order) + abs(s.second_order)) / 2)
    assert one_step(quadratic(), rho, second_order=False).expansion_holds is None


@pytest.mark.filterwarnings("ignore::flatmin.sharpness.SharpnessWarning")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rho", [0.01, 0.05, 0.2, 1.0])
def test_half_precision_is_right_to_a_per_cent_or_warned_of(dtype, rho):
    for seed in range(6):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 3)).to(dtype)
        x, y = torch.randn(64, 20).to(dtype), torch.randint(0, 3, (64,))
        found = one_step(Objective(model, nn.CrossEntropyLoss(), (x, y)), rho, second_order=False)
        exact = one_step(Objective(copy.deepcopy(model).double(), nn.CrossEntropyLoss(), (x.double(), y)), rho,
                         second_order=False)
        assert "RoundingWarning" in found.warnings or found.value == pytest.approx(exact.value, rel=0.02)


def test_the_rounding_of_autocast_and_of_a_coarse_loss_is_seen():
    model = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 3)).float()
    data = torch.randn(64, 20).float(), torch.randint(0, 3, (64,))
    assert one_step(Objective(model, nn.CrossEntropyLoss(), data), 0.01).warnings == ()
    with pytest.warns(cautions.RoundingWarning), torch.autocast("cpu", torch.bfloat16):
        one_step(Objective(model, nn.CrossEntropyLoss(), data), 0.01, second_order=False)
    with pytest.warns(cautions.RoundingWarning):
        one_step(Objective(model, lambda z, y: nn.functional.cross_entropy(z, y).half(), data), 0.01,
                 second_order=False)


def test_a_step_too_short_to_be_seen_is_within_rounding():
    """The loss does not change at all in float32, although the gradient says that it should."""
    torch.manual_seed(0)
    data = torch.randn(40, 3), torch.randn(40, 1)
    objective = Objective(torch.nn.Linear(3, 1).float(), torch.nn.MSELoss(), [t.float() for t in data])
    with pytest.warns(cautions.RoundingWarning):
        found = one_step(objective, 1e-12)
    assert found.first_order > 0 and "RoundingWarning" in found.warnings
