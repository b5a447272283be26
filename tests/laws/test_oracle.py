"""Law 4: every row equals its slow twin, and the closed form where there is one.

The twins in ``oracles.py`` are written from the formulas with ``torch.autograd.grad`` on a flat float64 vector and
torch's own optimizers; 20 steps must agree to 1e-12. The other laws compare a row with itself (restored, resumed,
parallel): they would all pass for a rule that is consistently wrong. The closed forms below come from paper, not from
autograd, and would catch a twin that misreads its paper in the same way as the library does.
"""

import copy
import math

import pytest
import torch

import oracles
import problems
from flatmin import ascent
from problems import BASES, batch, build, flat, flat_grad, relative, standing
from rows import ROWS, TWIN_CASES, TWINS, Row, case_id, cut, parts_for, presets, start, whole

TOLERANCE = 1e-12


def steps_for(row: Row, n: int = 20):
    return [parts_for(row, *batch(t)) for t in range(n)]


def train(row: Row, base: str, model, steps):
    model = copy.deepcopy(model)
    optimizer, sharpener = start(row, base, model)
    weights, losses = [], []
    for parts in steps:
        losses.append(row.backward(sharpener, model, parts).detach().clone())
        optimizer.step()
        optimizer.zero_grad()
        weights.append(flat(model))
    return weights, losses


@pytest.mark.parametrize(("row", "base"), TWIN_CASES, ids=case_id)
def test_equals_the_slow_twin_over_twenty_steps(row, base):
    model, steps = build(), steps_for(row)
    mine, losses = train(row, base, model, steps)
    twin, twin_losses = row.twin(model, BASES[base], steps)
    plain, _ = oracles.train(model, BASES[base], oracles.base, steps)
    assert relative(twin[-1], plain[-1]) > 1e-6, "this twin is the base optimizer: the test would see nothing"
    worst = max(relative(a, b) for a, b in zip(mine, twin, strict=True))
    assert worst < TOLERANCE, f"differs from its twin by {worst:.1e}"
    if not row.one_pass:  # one pass returns the loss where it was evaluated
        assert torch.stack(losses).sub(torch.stack(twin_losses)).abs().max() < 1e-11


@pytest.mark.parametrize("row", [r for r in TWINS if r.groups is None and r.preset != "sam_on"], ids=case_id)
def test_equals_the_slow_twin_with_a_tied_and_a_frozen_tensor(row):
    """A tied tensor counts once in every norm; a frozen one not at all. (Rows that name tensors have other nets.)"""
    base = row.bases[-1]
    model = build(problems.TiedNet)
    steps = [[(x, y, w) for x, y, w in parts] for parts in steps_for(row, 6)]

    def loss(z, y):
        return problems.loss_fn(z, y)

    mine = copy.deepcopy(model)
    optimizer, sharpener = start(row, base, mine)
    for parts in steps:
        row.backward(sharpener, mine, parts, loss)
        optimizer.step()
        optimizer.zero_grad()
    twin, _ = row.twin(model, BASES[base], steps)
    assert relative(flat(mine), twin[-1]) < TOLERANCE
    assert torch.equal(mine.frozen.weight, model.frozen.weight)


@pytest.mark.parametrize("row", [r for r in ROWS if not r.pair], ids=case_id)
def test_a_forward_and_a_loss_apart_are_the_same_as_one_callable(row):
    """The same computation in the other call form; the loss of outputs is the loss."""
    results = []
    for pair in (False, True):
        torch.manual_seed(3)
        model = build()
        optimizer, sharpener = start(row, row.bases[-1], model)
        for t in range(4):
            from rows import backward
            backward(sharpener, model, parts_for(row, *batch(t)), pair=pair)
            optimizer.step()
            optimizer.zero_grad()
        results.append(flat(model))
    assert relative(results[0], results[1]) < 1e-13


@pytest.mark.parametrize("row", [r for r in ROWS if r.plain and not r.micro], ids=case_id)
def test_the_gradient_kept_is_the_gradient_where_the_last_pass_stood(row):
    """Also for random directions, which have no twin: whatever eps was, p.grad is the gradient there."""
    model = build()
    optimizer, sharpener = start(row, row.bases[-1], model)
    from rows import warm_up
    warm_up(row, sharpener, optimizer, model, 2)
    x, y = batch(0)
    stood = []

    def forward():
        stood.append(standing(model))
        return problems.loss_fn(model(x), y)

    sharpener.backward(forward)
    at = oracles.Point(build(), whole(x, y))
    assert relative(stood[-1], flat(model)) > 1e-4, "the last pass stood at w"
    assert relative(flat_grad(model), at.gradient(stood[-1])) < 1e-13


# --- closed forms ----------------------------------------------------------------------------------------------------

def descend(name, model, loss, steps, lr, **settings):
    sharpener = getattr(presets, name)(model, **settings)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    path = []
    for _ in range(steps):
        sharpener.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        path.append(model.w.detach().clone())
    return path


def test_one_step_on_a_quadratic():
    """L = ½wᵀHw: the SAM gradient is H(w + rho Hw/‖Hw‖)."""
    H, w, rho = torch.diag(torch.tensor([5.0, 1.0, 0.2])), torch.tensor([1.0, -2.0, 3.0]), 0.3
    model = problems.Vector(w)
    presets.sam(model, rho=rho).backward(lambda: 0.5 * model.w @ H @ model.w)
    assert torch.allclose(model.w.grad, H @ (w + rho * (H @ w) / (H @ w).norm()), rtol=0, atol=1e-15)


@pytest.mark.parametrize("lam", [1.0, 10.0, 15.0])
def test_two_cycle_on_a_one_dimensional_quadratic(lam):
    """Section 4: normalised SAM ends in a two-cycle of amplitude lr·lam·rho/(2 − lr·lam)."""
    lr, rho = 0.1, 0.05
    model = problems.Vector([1.0])
    path = descend("sam", model, lambda: 0.5 * lam * model.w.square().sum(), 400, lr, rho=rho)
    amplitude = lr * lam * rho / (2 - lr * lam)
    assert abs(path[-1].item()) == pytest.approx(amplitude, rel=1e-10)
    assert path[-2].item() == pytest.approx(-path[-1].item(), rel=1e-10)


@pytest.mark.parametrize(("rho", "steps", "flatness"), [(0.0, 1000, 16.06), (0.1, 8000, 2), (0.2, 4000, 2)])
def test_scalar_factorisation_goes_to_its_flattest_solution(rho, steps, flatness):
    """L = ½(uv − 1)² from (4, .26): gradient descent stops near u² + v² = 16.06, SAM near the flattest value, 2."""
    model = problems.Vector([4.0, 0.26])
    path = descend("sam", model, lambda: 0.5 * (model.w[0] * model.w[1] - 1) ** 2, steps, 0.02, rho=rho)
    assert path[-1].square().sum().item() == pytest.approx(flatness, abs=0.05)


def test_asam_on_two_dimensions_by_hand():
    """A 1x2 weight (1, −2), no bias, L = x·w with x = (3, 1), eta 0: e = rho T²g/‖Tg‖ = rho (3, 4)/√(9 + 4)."""
    model = torch.nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, -2.0]]))
    seen = []

    def loss():
        seen.append(model.weight.detach().clone())
        return (model.weight * torch.tensor([[3.0, 1.0]])).sum()

    presets.asam(model, rho=0.5, eta=0.0).backward(loss)
    assert torch.allclose(seen[1] - seen[0], 0.5 * torch.tensor([[3.0, 4.0]]) / math.sqrt(13), atol=1e-15)


def test_asam_does_not_change_when_a_relu_network_is_rescaled():
    """W1·a, W2/a is the same function; with eta 0 ASAM's perturbed loss is the same number, and SAM's is not."""
    x, y = batch(0)
    found = {"sam": [], "asam": []}
    for a in (1.0, 7.0):
        for name, values in found.items():
            torch.manual_seed(0)
            net = torch.nn.Sequential(torch.nn.Linear(6, 8, bias=False), torch.nn.ReLU(),
                                      torch.nn.Linear(8, 3, bias=False))
            with torch.no_grad():
                net[0].weight.mul_(a)
                net[2].weight.div_(a)
            sharpener = presets.sam(net, rho=0.1) if name == "sam" else presets.asam(net, rho=0.1, eta=0.0)
            sharpener.backward(lambda net=net: problems.loss_fn(net(x), y))
            values.append(float(sharpener.last.perturbed_loss))
    assert found["asam"][0] == pytest.approx(found["asam"][1], rel=1e-12)
    assert found["sam"][0] != pytest.approx(found["sam"][1], rel=1e-3)


@pytest.mark.parametrize(("factor", "stable"), [(1.5, True), (1.9, True), (2.1, False)])
def test_unnormalized_step_is_stable_below_two(factor, stable):
    """Section 4: stable iff lr·lam(1 + rho·lam) < 2."""
    lam, rho = 3.0, 0.2
    model = problems.Vector([1.0])
    path = descend("unnormalized_sam", model, lambda: 0.5 * lam * model.w.square().sum(), 200,
                   factor / (lam * (1 + rho * lam)), rho=rho)
    assert (abs(path[-1].item()) < 1e-4) == stable


def test_functional_rule_on_a_network_linear_in_its_weights_is_the_plain_gradient():
    x, y = batch(0)
    model = build(problems.LinearNet)
    presets.functional_sam(model, rho=0.5).backward(lambda: model(x), lambda z: problems.loss_fn(z, y))
    at = oracles.Point(model, whole(x, y))
    assert relative(flat_grad(model), at.gradient(at.w)) < 1e-14


def test_functional_rule_with_a_loss_linear_in_the_outputs_is_sam():
    x, _ = batch(0)
    a = torch.randn(len(x), problems.CLASSES)
    gradients = []
    for name in ("functional_sam", "sam"):
        model = build()
        getattr(presets, name)(model, rho=0.5).backward(lambda m=model: m(x), lambda z: (a * z).sum())
        gradients.append(flat_grad(model))
    assert relative(*gradients) < 1e-14


def test_functional_rule_is_the_functional_path_to_first_order():
    """(g_func − g)/rho → H_F ĝ, and the error falls tenfold with rho: H_F v by finite differences of J(w)ᵀc."""
    x, y = batch(0)
    model = build()
    at = oracles.Point(model, whole(x, y))
    g = at.gradient(at.w)
    direction, h = g / g.norm(), 1e-5
    path = (oracles.functional_gradient(at, at.w, at.w + h * direction)
            - oracles.functional_gradient(at, at.w, at.w - h * direction)) / (2 * h)
    errors = []
    for rho in (1e-2, 1e-3):
        model.zero_grad()
        presets.functional_sam(model, rho=rho).backward(lambda: model(x), lambda z: problems.loss_fn(z, y))
        errors.append(relative((flat_grad(model) - g) / rho, path))
    assert errors[1] < 0.2 * errors[0] < 0.1


class Penalty:
    """A loss with ½ decay ‖w‖² inside, which no output shows."""

    def __init__(self, model, decay=0.7):
        self.parameters, self.decay = list(model.parameters()), decay

    def __call__(self, z, y):
        return problems.loss_fn(z, y) + 0.5 * self.decay * sum(p.square().sum() for p in self.parameters)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("parts", [[1.0], [0.25, 0.75]], ids=["whole", "two micro-batches"])
@pytest.mark.parametrize("rule", ["Functional", "LogitOnly"])
def test_a_penalty_inside_the_loss_is_kept_by_rules_on_the_outputs(rule, parts, scaled):
    twin = {"Functional": oracles.functional_penalised, "LogitOnly": oracles.logit_penalised}[rule]
    x, y = batch(0)
    data = cut(x, y, [int(w * len(x)) for w in parts])
    model = build()
    loss = Penalty(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if scaled else None
    sharpener = ascent.Sharpener(model, rho=0.3, rule=getattr(ascent, rule)(), scaler=scaler)
    sharpener.backward(lambda b: model(b[0]), lambda z, b: loss(z, b[1]), batches=data, weights=parts)
    expected = twin(oracles.Point(build(), data), 0.3, 0.7)
    assert relative(flat_grad(model) / (1024.0 if scaled else 1.0), expected) < 1e-12


def test_outputs_that_depend_on_each_other_count_once():
    """Features and logits of one network, both used by the loss: each dependence of the loss is its own."""
    x, y = batch(0)

    def gradients(pair):
        model = build()
        sharpener = presets.functional_sam(model, rho=0.3)

        def outputs():
            h = torch.tanh(model.first(x))
            z = model.head(torch.tanh(model.mixer(model.norm_free(h))))
            return (h, z) if pair else {"z": z, "h": h}

        def loss(out):
            h, z = out if pair else (out["h"], out["z"])
            return problems.loss_fn(z, y) + h.square().mean()

        sharpener.backward(outputs, loss)
        return model, flat_grad(model), outputs

    model, found, outputs = gradients(True)
    torch.testing.assert_close(gradients(False)[1], found, rtol=1e-13, atol=1e-15)
    # by hand: output gradients at w with the outputs cut, through the network at w + eps
    h, z = (t.detach().requires_grad_() for t in outputs())
    (problems.loss_fn(z, y) + h.square().mean()).backward()
    params = [p for p in model.parameters() if p.grad is not None]
    out = outputs()
    g = torch.autograd.grad(out, params, [h.grad, z.grad])
    with torch.no_grad():
        norm = torch.cat([t.flatten() for t in g]).norm()
        for p, t in zip(params, g, strict=True):
            p.add_(0.3 * t / norm)
    expected = torch.autograd.grad(outputs(), params, [h.grad, z.grad])
    used = torch.cat([p.grad.flatten() for p in params])
    assert relative(used, torch.cat([t.flatten() for t in expected])) < 1e-12


def test_surrogate_gap_keeps_the_component_along_the_perturbed_gradient():
    """2.8: <update, g_p> = ‖g_p‖², and alpha 0 is SAM."""
    x, y = batch(0)
    g = {}
    for alpha in (0.0, 0.7):
        model = build()
        presets.gsam(model, rho=0.1, alpha=alpha).backward(lambda m=model: problems.loss_fn(m(x), y))
        g[alpha] = flat_grad(model)
    at = oracles.Point(build(), whole(x, y))
    g_p = oracles.sam(at, 0.1)
    assert relative(g[0.0], g_p) < 1e-13
    assert float(g[0.7] @ g_p) == pytest.approx(float(g_p @ g_p), rel=1e-12)


def test_weighted_rule_at_a_half_is_sam_and_at_zero_the_base():
    x, y = batch(0)
    at = oracles.Point(build(), whole(x, y))
    for gamma, expected in ((0.5, oracles.sam(at, 0.1)), (0.0, at.gradient(at.w))):
        model = build()
        presets.wsam(model, rho=0.1, gamma=gamma).backward(lambda m=model: problems.loss_fn(m(x), y))
        assert relative(flat_grad(model), expected) < 1e-13


def test_fisher_with_no_eta_is_sam():
    x, y = batch(0)
    model = build()
    presets.fisher_sam(model, rho=0.1, eta=0.0).backward(lambda: problems.loss_fn(model(x), y))
    assert relative(flat_grad(model), oracles.sam(oracles.Point(build(), whole(x, y)), 0.1)) < 1e-13


@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_momentum_direction_before_any_momentum_is_a_plain_step(base):
    x, y = batch(0)
    model = build()
    sharpener = presets.momentum_sam(model, rho=0.5, optimizer=BASES[base](model.parameters()))
    sharpener.backward(lambda: problems.loss_fn(model(x), y))
    at = oracles.Point(build(), whole(x, y))
    assert relative(flat_grad(model), at.gradient(at.w)) < 1e-14


def test_random_fraction_is_scaled_by_its_inverse():
    """2.3: a random half of the tensors moves, by (rho/beta) g_i/‖m∘g‖.

    The norm is that of the gradients taken part in, as in the authors' code, which takes no gradient of the others.
    """
    x, y = batch(0)
    model = build()
    at = oracles.Point(build(), whole(x, y))
    g = at.gradient(at.w)
    sharpener = presets.esam(model, rho=0.1, beta=0.5, gamma=1.0)
    share = []
    for _ in range(60):
        stood = []

        def forward(stood=stood):
            stood.append(standing(model))
            return problems.loss_fn(model(x), y)

        sharpener.backward(forward)
        model.zero_grad()
        eps = stood[1] - stood[0]
        moved = eps != 0
        if not moved.any():
            continue
        expected = (0.1 / 0.5) * g / g[moved].norm()
        assert torch.allclose(eps[moved], expected[moved], rtol=1e-9, atol=1e-15)
        share.append(moved[g != 0].double().mean())
    assert torch.stack(share).mean().item() == pytest.approx(0.5, abs=0.2)
    assert torch.stack(share).std() > 0, "the same coordinates every time"


def test_micro_batch_scope_differs_from_whole_batch_scope():
    """Both exist and they are different algorithms: otherwise their rows could not tell them apart."""
    model = build()
    at = oracles.Point(model, cut(*batch(0)))
    assert relative(oracles.micro_batch(oracles.sam)(at, rho=0.1), oracles.sam(at, 0.1)) > 1e-3
