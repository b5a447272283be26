"""Average case, m-sharpness, normalised logits, normalised flatness, critical sharpness and the edge of stability."""

import math

import pytest
import torch
from test_one_step import A, W, quadratic
from test_worst_case import relu_net
from torch import nn

from flatmin import Objective
from flatmin.sharpness import (
    average_case,
    critical_sharpness,
    edge_of_stability,
    largest_random,
    m_sharpness,
    normalized_flatness,
    one_step,
    update_of,
    worst_case,
)
from problems import NoisyNet, assert_same, batch, build, flat, loss_fn

pytestmark = pytest.mark.filterwarnings("ignore::flatmin.sharpness.SharpnessWarning")


@pytest.mark.parametrize(("p", "variance"), [(2, 1.0), (math.inf, 1 / 3)])
def test_the_average_on_a_quadratic_is_half_rho_squared_trace(p, variance):
    s = average_case(quadratic(), 0.1, p=p, samples=2000)
    assert abs(s.value - 0.5 * 0.01 * variance * float(A.trace())) < 4 * s.stderr
    assert s.evaluations == 2001 and len(s.draws) == 1000
    adaptive = average_case(quadratic(), 0.1, p=p, adaptive="element", samples=2000)
    assert abs(adaptive.value - 0.5 * 0.01 * variance * float((W**2 * A.diagonal()).sum())) < 4 * adaptive.stderr


def test_pairs_cancel_the_first_order():
    paired = average_case(quadratic(), 1e-3, samples=200)
    single = average_case(quadratic(), 1e-3, samples=200, antithetic=False)
    assert paired.stderr < 0.02 * single.stderr
    assert abs(paired.value - single.value) < 5 * single.stderr


def test_the_stated_error_covers_the_truth():
    truth, inside = 0.5 * 0.01 * float(A.trace()), 0
    for seed in range(60):
        s = average_case(quadratic(), 0.1, samples=60, seed=seed)
        inside += abs(s.value - truth) < 2 * s.stderr
    assert inside >= 50


def test_the_largest_draw_is_below_the_worst_case():
    s = largest_random(quadratic(), 0.2, draws=50)
    assert s.value == max(s.draws) <= worst_case(quadratic(), 0.2, iterations=40).value
    assert s.value > s.mean


def net(data):
    return Objective(build(NoisyNet), loss_fn, data)


def test_m_sharpness_with_all_samples_is_the_measure():
    whole = net(batch(0))
    assert m_sharpness(whole, 12, 0.1, measure="one_step").value == pytest.approx(one_step(whole, 0.1).value)
    assert m_sharpness(whole, 99, 0.1, measure="one_step").value == pytest.approx(one_step(whole, 0.1).value)


def test_m_sharpness_cuts_across_batches_and_weighs_the_rest():
    x, y = batch(0)
    s = m_sharpness(net([(x[:7], y[:7]), (x[7:], y[7:])]), 5, 0.1, measure="one_step")
    assert s.weights == (5, 5, 2)
    expected = [one_step(net((x[i:i + 5], y[i:i + 5])), 0.1).value for i in (0, 5, 10)]
    assert list(s.chunks) == pytest.approx(expected)
    assert s.value == pytest.approx((5 * expected[0] + 5 * expected[1] + 2 * expected[2]) / 12)


def test_m_sharpness_grows_as_m_falls():
    values = [m_sharpness(net(batch(0)), m, 0.3, iterations=15, restarts=1).value for m in (12, 4, 1)]
    assert values[0] < values[1] < values[2]


def test_m_sharpness_of_mappings():
    x, y = batch(0)
    o = Objective(build(NoisyNet), lambda z, b: loss_fn(z, b["y"]), {"x": x, "y": y}, forward=lambda m, b: m(b["x"]))
    assert m_sharpness(o, 4, 0.1, measure="one_step").value == \
        pytest.approx(m_sharpness(net((x, y)), 4, 0.1, measure="one_step").value)


def test_unknown_measures_list_the_choices():
    with pytest.raises(ValueError, match="one_step, worst_case, average_case"):
        m_sharpness(net(batch(0)), 4, measure="sharp")


@pytest.mark.parametrize("kind", ["element", "row", "column", "row_column"])
def test_flatness_and_rescaling(kind):
    """W1·D, D⁻¹W2 is the same function: "element" and "row_column" must not change, the one-sided ones do."""
    one, other = (normalized_flatness(relu_net(a), kind, samples=1000) for a in (1.0, 10.0))
    same = one.value == pytest.approx(other.value, rel=1e-4)
    assert one.exact and same == (kind in ("element", "row_column"))


def rescaled(width, depth, by):
    """A ReLU net whose hidden units are multiplied by factors up to ``by`` and divided out again: one function."""
    g = torch.Generator().manual_seed(5)
    sizes = [6] + [width] * depth + [3]
    layers = []
    for a, b in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(a, b), nn.ReLU()]
    net = nn.Sequential(*layers[:-1]).double()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=p.dtype) / p.shape[-1] ** 0.5)
        for first, second in zip(net[0:-2:2], net[2::2], strict=True):
            d = by ** (2 * torch.rand(len(first.weight), generator=g, dtype=torch.float64) - 1)
            first.weight.mul_(d[:, None])
            first.bias.mul_(d)
            second.weight.div_(d)
    return net


@pytest.mark.parametrize("kind", ["element", "row_column"])
@pytest.mark.parametrize(("width", "depth"), [(5, 1), (12, 1), (20, 2), (9, 4)])
@pytest.mark.parametrize("zeros", [False, True])
def test_flatness_is_invariant_at_any_size(kind, width, depth, zeros):
    """Exact up to 100 parameters, estimated beyond, with pruned weights too: 68, 123, 603 and 360 parameters."""
    found = []
    for by in (1.0, 20.0):
        net = rescaled(width, depth, by)
        if zeros:
            with torch.no_grad():
                net[0].weight[:, ::2] = 0
                net[2].weight[1, 1:] = 0
        found.append(normalized_flatness(Objective(net, nn.CrossEntropyLoss(), batch(0, 40, torch.float64)), kind))
    assert found[0].exact == (width == 5)
    assert found[1].value == pytest.approx(found[0].value, rel=1e-6)


def test_convolutions_are_rescaled_by_channel():
    found = []
    for a in (1.0, 30.0):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.ReLU(), nn.Flatten(),
                            nn.Linear(16, 3))
        with torch.no_grad():
            d = a ** torch.linspace(-1, 1, 6)
            net[0].weight.mul_(d.view(-1, 1, 1, 1))
            net[0].bias.mul_(d)
            net[2].weight.div_(d.view(1, -1, 1, 1))
        x = torch.randn(10, 1, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        found.append(normalized_flatness(Objective(net, nn.CrossEntropyLoss(), (x, torch.arange(10) % 3)),
                                         "row_column", samples=20).value)
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_the_estimated_relatives_come_near_the_exact_ones():
    o = Objective(rescaled(12, 1, 5.0), nn.MSELoss(), (batch(0, 40, torch.float64)[0], torch.zeros(40, 3)))
    for kind in ("row", "column", "row_column"):
        exact, drawn = normalized_flatness(o, kind, samples=1000), normalized_flatness(o, kind, samples=120)
        assert exact.exact and not drawn.exact
        assert drawn.value == pytest.approx(exact.value, rel=0.25)


def test_flatness_in_closed_form_and_by_sampling():
    expected = float((W**2 * A.diagonal()).sum())
    exact = normalized_flatness(quadratic())
    assert exact.value == pytest.approx(expected) and exact.layers == {"w": pytest.approx(expected)}
    o = relu_net()
    exact, drawn = normalized_flatness(o, samples=1000), normalized_flatness(o, samples=60)
    assert not drawn.exact and 0 < abs(drawn.value - exact.value) < 4 * drawn.stderr
    assert average_case(o, 1e-3, adaptive="element", samples=400).value * 2e6 == pytest.approx(exact.value, rel=0.3)


def test_row_column_is_the_least_of_its_form():
    from flatmin.sharpness.normalized_flatness import _row_column

    h, q = torch.rand(4, 5), torch.rand(4, 5)
    value = _row_column(h, q)
    logs = torch.zeros(9, requires_grad=True)
    optimizer = torch.optim.LBFGS([logs], max_iter=500, tolerance_change=1e-14, line_search_fn="strong_wolfe")

    def objective():
        s, t = logs[:4].exp()[:, None], logs[4:].exp()
        return (h * s * t + q / (s * t)).sum()

    def closure():
        optimizer.zero_grad()
        out = objective()
        out.backward()
        return out

    optimizer.step(closure)
    assert value == pytest.approx(float(objective()), rel=1e-7)


@pytest.mark.parametrize("lr", [None, 1e-4, 0.01, 10.0])
def test_critical_sharpness_along_the_gradient_is_its_curvature(lr):
    g = A @ W
    s = critical_sharpness(quadratic(), lr=lr, rtol=1e-6)
    assert s.value == pytest.approx(float(g @ A @ g / g.dot(g)), rel=1e-5)
    assert math.isnan(s.ratio) if lr is None else s.ratio == pytest.approx(s.value * lr / 2)


def test_critical_sharpness_costs_few_evaluations():
    assert critical_sharpness(quadratic(), lr=0.1).evaluations <= 12


def test_critical_sharpness_along_any_update_and_where_there_is_none():
    d, g = torch.tensor([1.0, 0.3, 0.0]), A @ W
    assert critical_sharpness(quadratic(), [d], rtol=1e-6).value == pytest.approx(float(d @ A @ d / (g @ d)), rel=1e-5)
    assert critical_sharpness(quadratic(), [-d]).value == math.inf
    falling = quadratic(W, -torch.eye(3))
    assert critical_sharpness(falling).value == 0
    with pytest.raises(ValueError, match="one tensor for each"):
        critical_sharpness(quadratic(), [d, d])


@pytest.mark.parametrize("make", [lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.01),
                                  lambda p: torch.optim.AdamW(p, 0.01)])
def test_the_update_of_an_optimizer_is_its_next_step(make):
    model = build(NoisyNet)
    optimizer = make(model.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    for step in range(3):
        optimizer.zero_grad()
        loss_fn(model(batch(step)[0]), batch(step)[1]).backward()
        before, lr = flat(model), optimizer.param_groups[0]["lr"]
        update = torch.cat([t.reshape(-1) for t in update_of(optimizer)])
        assert_same(flat(model), before)
        optimizer.step()
        torch.testing.assert_close(before - lr * update, flat(model), rtol=1e-12, atol=1e-14)
        scheduler.step()


def test_the_edge_of_stability():
    top = float(torch.linalg.eigvalsh(A)[-1])
    assert edge_of_stability(quadratic(), 0.01).value == pytest.approx(top * 0.005, rel=1e-4)
    assert edge_of_stability(quadratic(), 0.01, momentum=0.9).value == pytest.approx(top * 0.01 / 3.8, rel=1e-4)
    length, rho = float((A @ W).norm()), 0.1
    edge = length / (2 * rho) * (math.sqrt(1 + 8 * rho / (0.01 * length)) - 1)
    assert edge_of_stability(quadratic(), 0.01, rho=rho).value == pytest.approx(top / edge, rel=1e-4)
