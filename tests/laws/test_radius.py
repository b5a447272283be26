"""Law 3: the step has the radius it says. ‖eps‖ in the direction's own norm equals rho, whatever the gradient's size.

eps is read off the weights that the second forward really sees, not from what the library reports. The twin comparison
would miss an additive guard in the denominator (``‖g‖ + 1e-12``), because gradients are never tiny there, and a report
(``last.radius``) that says something else than what was done.
"""

import pytest
import torch

import flatmin
import oracles
import problems
from problems import assert_same, batch, build, flat, flat_grad, loss_fn, standing
from rows import ROWS, Row, case_id, parts_for, presets, start, warm_up, whole

MEASURED = [row for row in ROWS if row.own_norm is not None]


def observe(row: Row, scale: float = 1.0, dtype=torch.float64):
    """Per micro-batch: the point, the gradient there and the eps that the last forward saw."""
    model = build(dtype=dtype)
    optimizer, sharpener = start(row, row.bases[-1], model)
    sharpened = []
    warm_up(row, sharpener, optimizer, model, 3 if row.stateful else 1)
    w = flat(model)
    parts = parts_for(row, *batch(0, dtype=dtype))
    seen: dict[int, list] = {}

    def loss(z, y):
        seen.setdefault(id(y), []).append(standing(model))
        return scale * loss_fn(z, y)

    row.backward(sharpener, model, parts, loss)
    for x, y, _ in parts:
        at = oracles.Point(build(dtype=torch.float64), whole(x.double(), y))
        at.w = w.double()
        sharpened.append((at, scale * at.gradient(at.w), seen[id(y)][-1].double() - w.double()))
    return sharpener, sharpened


# these ε grow with the gradient, or shrink below the rounding of w
BOUNDED = [(r, s) for r in MEASURED for s in (1.0, 1e-13, 1e13)
           if s <= 1 or not (r.preset == "unnormalized_sam" or "fisher" in r.name)]


@pytest.mark.parametrize(("row", "scale"), BOUNDED, ids=case_id)
def test_radius_is_rho_in_the_rows_own_norm(row, scale):
    _, observed = observe(row, scale)
    for at, g, eps in observed:
        # eps is the difference of two rounded weights: exact to about 1e-16 · ‖w‖
        rho = row.settings["rho"]
        if row.preset == "unnormalized_sam":
            assert (eps - rho * g).norm() < 1e-14
        else:
            length = torch.atleast_1d(row.own_norm(at, g, eps, row.settings))
            assert torch.allclose(length, torch.full_like(length, rho), rtol=1e-9, atol=0), length


@pytest.mark.parametrize("row", MEASURED, ids=case_id)
def test_radius_in_float32(row):
    """Single precision, as in use: to 1e-4 (rounding of w + eps included)."""
    _, observed = observe(row, dtype=torch.float32)
    for at, g, eps in observed:
        length = torch.atleast_1d(row.own_norm(at, g, eps, row.settings))
        assert torch.allclose(length, torch.full_like(length, row.settings["rho"]), rtol=1e-3, atol=0), length


@pytest.mark.parametrize("row", [r for r in ROWS if r.preset in ("sam", "asam") and r.own_norm and not r.micro],
                         ids=case_id)
def test_the_record_says_what_was_done(row):
    sharpener, [(at, g, eps)] = observe(row)
    last = sharpener.last
    assert float(last.radius) == pytest.approx(float(row.own_norm(at, g, eps, row.settings)), rel=1e-9)
    assert float(last.gradient_norm) == pytest.approx(float(g.norm()), rel=1e-12)
    assert float(last.loss) == pytest.approx(float(at.loss(at.w)), rel=1e-13)
    assert float(last.perturbed_loss) == pytest.approx(float(at.loss(at.w + eps)), rel=1e-13)
    assert float(last.sharpness) == pytest.approx(float(last.perturbed_loss) - float(last.loss), abs=1e-15)
    assert not last.skipped


@pytest.mark.parametrize("row", [r for r in ROWS if not r.random and r.name != "decay-in-ascent"], ids=case_id)
def test_a_zero_gradient_moves_nothing_and_stays_finite(row):
    """At a stationary point there is no uphill: no perturbation, a finite (zero) gradient, not a skipped step."""
    model = build()
    optimizer, sharpener = start(row, row.bases[-1], model)
    seen = []

    def loss(z, y):
        seen.append(standing(model))
        return 0.0 * z.sum() + 1.0

    value = row.backward(sharpener, model, parts_for(row, *batch(0)), loss)
    assert all(torch.equal(w, flat(model)) for w in seen)
    assert float(value) == pytest.approx(1.0)
    assert torch.equal(flat_grad(model), torch.zeros_like(flat(model)))
    assert not sharpener.last.skipped
    assert float(sharpener.last.radius) == 0
    optimizer.step()
    row.backward(sharpener, model, parts_for(row, *batch(1)))  # and the next step is an ordinary one
    assert flat_grad(model).isfinite().all() and flat_grad(model).any()


def test_one_tensor_with_a_zero_gradient_stays_where_it_is():
    model = torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)])
    seen = []
    x = torch.randn(3, 2)

    def loss():
        seen.append(model[1].weight.detach().clone())
        return model[0](x).square().mean() + 0.0 * model[1](x).sum()

    presets.sam(model, rho=0.1).backward(loss)
    assert_same(seen[0], seen[1])


def test_frozen_tensors_are_outside_the_norm_and_do_not_move():
    x, y = batch(0)
    model = build()
    model.head.requires_grad_(False)
    seen = []

    def loss():
        seen.append(torch.cat([p.detach().reshape(-1).clone() for p in model.parameters()]))
        return loss_fn(model(x), y)

    presets.sam(model, rho=0.1).backward(loss)
    eps = seen[1] - seen[0]
    assert eps.norm().item() == pytest.approx(0.1, rel=1e-12)
    assert not eps[-model.head.weight.numel() - model.head.bias.numel():].any()
    assert model.head.weight.grad is None


def test_parameters_frozen_or_thawed_later_are_noticed():
    """requires_grad may change after construction (progressive unfreezing)."""
    x, y = batch(0)
    model = build()
    model.head.requires_grad_(False)
    sharpener = presets.sam(model, rho=0.1)
    sharpener.backward(lambda: loss_fn(model(x), y))
    model.zero_grad()
    model.head.requires_grad_(True)
    model.first.requires_grad_(False)
    sharpener.backward(lambda: loss_fn(model(x), y))
    expected = oracles.sam(oracles.Point(model, whole(x, y)), 0.1)
    assert problems.relative(flat_grad(model), expected) < 1e-12


def test_a_group_with_rho_zero_is_outside_the_norm():
    x, y = batch(0)
    model = build()
    seen = []

    def loss():
        seen.append(standing(model))
        return loss_fn(model(x), y)

    presets.sam(model, rho=0.1, groups=[{"modules": [model.first, model.post], "rho": 0.0}]).backward(loss)
    at = oracles.Point(model, whole(x, y))
    eps = seen[1] - seen[0]
    assert not eps[at.slices["first.kernel"]].any() and not eps[at.slices["post.weight"]].any()
    assert eps.norm().item() == pytest.approx(0.1, rel=1e-12)


@pytest.mark.parametrize("rho", [-0.1, float("nan"), float("inf")])
def test_an_impossible_radius_is_refused(rho):
    with pytest.raises(ValueError, match="rho"):
        presets.sam(build(), rho=rho)


@pytest.mark.parametrize("named", (1, 2, 3))
def test_every_group_moves_by_its_own_radius(named):
    """ε = ρ_j g/‖g‖ on the tensors of group j; ``last.radius`` is the length of the whole step. One to four groups."""
    model = build()
    parameters = list(model.parameters())
    rhos = [0.1] * len(parameters)
    rhos[:named] = [0.02 * (i + 1) for i in range(named)]
    sharpener = flatmin.Sharpener(model, rho=0.1, groups=[{"params": [p], "rho": rho} for p, rho in
                                                          zip(parameters[:named], rhos, strict=False)])
    x, y = batch(0)
    g, w, seen = oracles.Point(build(), whole(x, y)), standing(model), []
    g = g.gradient(g.w)
    sharpener.backward(lambda: (seen.append(standing(model)), loss_fn(model(x), y))[1])
    eps = torch.cat([torch.full((p.numel(),), rho) for p, rho in zip(parameters, rhos, strict=True)]) * g / g.norm()
    torch.testing.assert_close(seen[-1] - w, eps, rtol=1e-9, atol=1e-14)
    assert sharpener.last.radius == pytest.approx(float(eps.norm()), rel=1e-9)
