"""Micro-batches as data, lists that are one batch several times, and frameworks that divide the loss too.

The other laws hand over what is right; here are the ways of handing over something else that trains without an error.
"""

import functools

import pytest
import torch
from torch import nn

import oracles
import problems
from flatmin import Sharpener, ascent, presets
from problems import batch, build, flat, flat_grad, loss_fn, relative
from rows import cut

DATA = cut(*batch(0, dtype=torch.float64))  # unequal sizes
WEIGHTS = [weight for *_, weight in DATA]


def evaluated(model, b):
    return loss_fn(model(b[0]), b[1])


def sam_gradient(rule=oracles.sam, parts=DATA):
    return rule(oracles.Point(build(), parts), 0.1)


@pytest.mark.parametrize("make", [list, tuple, iter, lambda data: (b for b in data)], ids=["list", "tuple", "iterator",
                                                                                         "generator"])
def test_batches_are_data(make):
    model = build()
    sharpener = presets.sam(model, rho=0.1)
    value = sharpener.backward(lambda b: evaluated(model, b), batches=make(DATA), weights=WEIGHTS)
    assert relative(flat_grad(model), sam_gradient()) < 1e-13
    at = oracles.Point(build(), DATA)
    assert float(value) == pytest.approx(float(at.loss(at.w)), rel=1e-13)


def test_batches_are_weighted_equally_by_default():
    model = build()
    presets.sam(model, rho=0.1).backward(lambda b: model(b[0]), lambda z, b: loss_fn(z, b[1]), batches=DATA)
    assert relative(flat_grad(model), sam_gradient(parts=[(x, y, 1 / 3) for x, y, _ in DATA])) < 1e-13


def test_batches_with_a_rule_that_needs_the_outputs():
    model = build()
    presets.functional_sam(model, rho=0.1).backward(lambda b: model(b[0]), lambda z, b: loss_fn(z, b[1]), batches=DATA,
                                                    weights=WEIGHTS)
    assert relative(flat_grad(model), sam_gradient(oracles.functional_sam)) < 1e-13


def test_batches_with_data_selection_take_the_samples_last():
    expected = build()
    one = presets.esam(expected, rho=0.1, beta=1.0)
    pairs = [(lambda s, b=b: expected(b[0][s]), lambda z, s, b=b: nn.functional.cross_entropy(z, b[1][s],
                                                                                          reduction="none"))
             for b in DATA]
    one.backward(pairs)
    model = build()
    presets.esam(model, rho=0.1, beta=1.0).backward(
        lambda b, s: model(b[0][s]), lambda z, b, s: nn.functional.cross_entropy(z, b[1][s], reduction="none"),
        batches=DATA)
    problems.assert_same(flat_grad(model), flat_grad(expected))
    assert relative(flat_grad(model), sam_gradient(parts=[(x, y, 1 / 3) for x, y, _ in DATA])) > 1e-3


@pytest.mark.parametrize("batches", [torch.ones(3, 6), {"x": 1}, "abc", []], ids=["tensor", "dict", "text", "empty"])
def test_what_is_no_list_of_batches_is_refused(batches):
    model = build()
    with pytest.raises(ValueError, match="batches"):
        presets.sam(model).backward(lambda b: model(b).sum(), batches=batches)


def test_one_lambda_of_the_last_variables_is_refused():
    """[lambda: f(x, y) for x, y in data] would train on the last batch n times."""
    model = build()
    for text in ("[lambda: loss_fn(model(x), y) for x, y, _ in DATA]",
                 "list(lambda: loss_fn(model(x), y) for x, y, _ in DATA)",
                 "[(lambda: model(x), lambda z: loss_fn(z, y)) for x, y, _ in DATA]"):
        steps = eval(text, {"model": model, "loss_fn": loss_fn, "DATA": DATA})  # a linter refuses it in plain code
        with pytest.raises(ValueError, match="batches="):
            presets.sam(model).backward(steps)


def test_functions_of_their_own_variables_are_not():
    model = build()

    def step(x, y):
        return lambda: loss_fn(model(x), y)

    class Step:
        def __init__(self, x, y):
            self.data = x, y

        def __call__(self):
            return evaluated(model, self.data)

        def method(self):
            return evaluated(model, self.data)

    objects = [Step(x, y) for x, y, _ in DATA]
    for steps in ([step(x, y) for x, y, _ in DATA], [lambda x=x, y=y: loss_fn(model(x), y) for x, y, _ in DATA],
                  [functools.partial(evaluated, model, b) for b in DATA], objects, [s.method for s in objects]):
        model.zero_grad()
        presets.sam(model, rho=0.1).backward(steps, weights=WEIGHTS)
        assert relative(flat_grad(model), sam_gradient()) < 1e-13


def test_a_loss_instead_of_a_function_is_one_clear_error():
    model = build()
    for argument in (evaluated(model, DATA[0]), model(DATA[0][0])):
        with pytest.raises(TypeError, match="lambda"):
            presets.sam(model).backward(argument)
    assert all(p.grad is None for p in model.parameters())


# --- the first micro-batch chooses for all ---------------------------------------------------------------------------

@pytest.mark.parametrize("n", [1, 3])
def test_the_first_micro_batch_chooses_for_all(n):
    model, data = build(), DATA[:n]
    sharpener, calls = presets.sam(model, rho=0.1, scope="first"), []
    model.register_forward_hook(lambda *_: calls.append(1))
    value = sharpener.backward(lambda b: evaluated(model, b), batches=data)
    at = oracles.Point(build(), [(x, y, 1 / n) for x, y, _ in data])
    g = oracles.Point(build(), [(*data[0][:2], 1.0)]).gradient(at.w)
    there = at.w + 0.1 * g / g.norm()
    assert relative(flat_grad(model), at.gradient(there)) < 1e-13
    assert len(calls) == n + 1
    assert float(value) == pytest.approx(float(at.loss(there)), rel=1e-13) == sharpener.last.perturbed_loss
    assert sharpener.last.gradient_norm == pytest.approx(float(g.norm()), rel=1e-13)
    assert sharpener.last.loss != sharpener.last.loss, "no loss of the whole batch at w is known"


def test_the_first_micro_batch_chooses_and_every_statistic_moves_once():
    model = build(problems.NoisyNet)
    twin = build(problems.NoisyNet)
    torch.manual_seed(3)
    for b in DATA:
        twin(b[0])
    after, count = torch.get_rng_state(), twin.norm.num_batches_tracked
    torch.manual_seed(3)
    masks = []
    model.drop.register_forward_hook(lambda m, i, o: masks.append(o == 0))
    presets.sam(model, rho=0.1, scope="first").backward(lambda b: evaluated(model, b), batches=DATA)
    assert torch.equal(torch.get_rng_state(), after)
    assert int(model.norm.num_batches_tracked) == int(count) == 3
    assert torch.equal(masks[0], masks[1])


@pytest.mark.parametrize("options", [{"rule": ascent.Functional()}, {"rule": ascent.SurrogateGap()},
                                     {"rule": ascent.Selected()}, {"cadence": ascent.Every(2, ascent.Reuse())}],
                         ids=str)
def test_what_needs_every_micro_batch_at_w_refuses_the_first(options):
    with pytest.raises(ValueError, match="first"):
        ascent.Sharpener(build(), scope="first", **options)


# --- frameworks that divide the loss ---------------------------------------------------------------------------------

def dividing(by, scale=1.0):
    return lambda loss: (loss * scale / by).backward()


@pytest.mark.parametrize("rule", [ascent.Plain(), ascent.Functional(), ascent.LogitOnly()], ids=str)
@pytest.mark.parametrize("scope", ["batch", "micro_batch"])
def test_a_framework_that_divides_does_not_divide_a_list_again(scope, rule):
    found = []
    for backward in (None, dividing(3)):
        model = build()
        sharpener = ascent.Sharpener(model, rho=0.1, scope=scope, rule=rule, backward=backward)
        for _ in range(2):
            model.zero_grad()
            sharpener.backward(lambda b, m=model: m(b[0]), lambda z, b: loss_fn(z, b[1]), batches=DATA)
        found.append(flat_grad(model))
    assert relative(found[1], found[0]) < 1e-14


@pytest.mark.parametrize("rule", [ascent.Plain(), ascent.Functional(), ascent.LogitOnly()], ids=str)
def test_one_micro_batch_a_call_keeps_the_division(rule):
    found = []
    for backward in (None, dividing(2)):
        model = build()
        sharpener = ascent.Sharpener(model, rho=0.1, rule=rule, backward=backward)
        for x, y, _ in DATA[:2]:
            sharpener.backward(lambda m=model, x=x: m(x), lambda z, y=y: loss_fn(z, y))
        found.append(flat_grad(model))
    assert relative(2 * found[1], found[0]) < 1e-14


def test_accelerate_with_accumulation_steps():
    import accelerate

    for several in (True, False):
        model = build()
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        sharpener = presets.sam(model, rho=0.1, backward=accelerator.backward)
        if several:
            sharpener.backward(lambda b, m=model: evaluated(m, b), batches=DATA[:2])
            expected = sam_gradient(parts=[(x, y, 0.5) for x, y, _ in DATA[:2]])
        else:
            for b in DATA[:2]:
                sharpener.backward(lambda b=b, m=model: evaluated(m, b))
            expected = sum(sam_gradient(parts=[(x, y, 1.0)]) for x, y, _ in DATA[:2]) / 2
        assert relative(flat_grad(model), expected) < 1e-13


@pytest.mark.parametrize("several", [True, False])
def test_a_framework_that_scales_the_loss_shares_its_scaler(several):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    data = DATA if several else DATA[:1]
    model = build()
    framework = dividing(2, 2.0**12)
    with pytest.raises(ValueError, match="scaler="):
        presets.sam(model, backward=framework).backward(lambda b: evaluated(model, b), batches=data)
    assert all(p.grad is None for p in model.parameters())
    presets.fisher_sam(model, rho=0.1, backward=lambda loss: scaler.scale(loss / 2).backward(), scaler=scaler).backward(
        lambda b: evaluated(model, b), batches=data)
    expected = oracles.fisher_sam(oracles.Point(build(), [(x, y, 1 / len(data)) for x, y, _ in data]), 0.1, 1.0)
    # one micro-batch a call keeps the framework's half, of a gradient whose metric did not see it
    assert relative(flat_grad(model), 2.0**12 * (1 if several else 0.5) * expected) < 1e-12


@pytest.mark.parametrize("scale, division", ((1024.0, 4), (4.0, 4), (2.0, 4), (1.0, 1)))
def test_the_scale_is_applied_once_whatever_its_size(scale, division):
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1)
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    sharpener = presets.sam(model, scaler=scaler, backward=lambda loss: scaler.scale(loss / division).backward())
    norms = []
    for _ in range(3):
        sharpener.backward(lambda: evaluated(model, DATA[0]))
        scaler.unscale_(optimizer)
        norms.append(float(flat_grad(model).norm()) * division)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    twin = build()
    presets.sam(twin).backward(lambda: evaluated(twin, DATA[0]))
    assert norms == pytest.approx([float(flat_grad(twin).norm())] * 3, rel=1e-6)    # the scaler works in float32


@pytest.mark.parametrize("preset, options", (("unnormalized_sam", {}), ("fisher_sam", {"eta": 50.0}), ("looksam", {})))
def test_a_division_is_no_part_of_the_step(preset, options):
    """One micro-batch a call under a framework that accumulates: ε and the record are those without it."""
    results = []
    for division in (1, 4):
        model = build()
        sharpener = getattr(presets, preset)(model, rho=0.5, backward=lambda loss, n=division: (loss / n).backward(),
                                             **options)
        for b in DATA[:2]:
            model.zero_grad()
            sharpener.backward(lambda b=b, model=model: evaluated(model, b))
        results.append((division * flat_grad(model), sharpener.last.gradient_norm, sharpener.last.radius))
    assert relative(results[1][0], results[0][0]) < 1e-12
    assert results[1][1:] == pytest.approx(results[0][1:], rel=1e-12, nan_ok=True)


def test_a_scaler_beside_a_framework_that_does_not_scale():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    model = build()
    presets.sam(model, rho=0.1, backward=dividing(1), scaler=scaler).backward(lambda b: evaluated(model, b),
                                                                             batches=DATA, weights=WEIGHTS)
    assert relative(flat_grad(model), 2.0**12 * sam_gradient()) < 1e-13
    assert flat(model).isfinite().all()


def test_the_record_of_micro_batches_is_their_mean():
    model = build()
    norms = [float(torch.cat([g.flatten() for g in torch.autograd.grad(evaluated(model, b), list(model.parameters()))])
                   .norm()) for b in DATA]
    sharpener = presets.sam(model, rho=0.1, scope="micro_batch")
    sharpener.backward(lambda b: evaluated(model, b), batches=DATA)
    assert sharpener.last.gradient_norm == pytest.approx(sum(norms) / len(norms), rel=1e-12)
    assert sharpener.last.radius == pytest.approx(0.1) and sharpener.last.cosine == pytest.approx(1.0)


def test_output_gradients_that_share_memory_with_a_parameters_gradient_survive_the_next_micro_batch():
    """autograd may give a parameter's ``.grad`` the memory of ∂L/∂z, and the next micro-batch adds to it in place."""

    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))

        def forward(self):
            return self.w.view(3)

    model = Bare()
    data = [torch.tensor(v, dtype=torch.float64) for v in ([1.0, 2.0, 3.0], [3.0, 1.0, 1.0], [0.5, 1.0, 4.0])]
    presets.functional_sam(model, rho=0.1).backward(lambda b: model(), lambda z, b: (z * b).square().sum(),
                                                    batches=data)
    expected = sum(2 * b.square() * model.w.detach() for b in data) / 3     # z = w: J is the identity everywhere
    assert torch.allclose(model.w.grad, expected, rtol=1e-12)


@pytest.mark.parametrize("cadence", [ascent.Every(3), ascent.WarmStart(2)])
def test_data_selection_takes_plain_steps_over_all_samples(cadence):
    torch.manual_seed(0)
    x, y = torch.randn(8, 3, dtype=torch.float64), torch.randint(2, (8,))
    model = nn.Linear(3, 2).double()
    sharpener = Sharpener(model, rule=ascent.Selected(0.5), cadence=cadence)
    for t in range(3):
        model.zero_grad()
        sharpener.backward(lambda s: nn.functional.cross_entropy(model(x[s]), y[s], reduction="none"))
        if not cadence(t):
            g = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), model.weight)[0]
            assert torch.allclose(model.weight.grad, g, rtol=1e-12)


def test_friendlys_mean_is_left_as_it_is_by_a_micro_batch_that_does_not_reach_a_parameter():
    """m = g is a fixed point of m ← λ m + (1 − λ) g, whichever micro-batches reach the parameter."""
    torch.manual_seed(0)
    heads = nn.ModuleList([nn.Linear(2, 1), nn.Linear(2, 1)]).double()
    x = torch.randn(3, 4, 2, dtype=torch.float64)
    sharpener = presets.friendly_sam(heads, scope="micro_batch")
    steps = [lambda: heads[0](x[0]).square().mean(), lambda: (heads[0](x[1]) + heads[1](x[1])).square().mean(),
             lambda: heads[0](x[2]).square().mean()]
    means = []
    for _ in range(3):
        heads.zero_grad()
        sharpener.backward(steps, weights=[0.2, 0.5, 0.3])
        means.append(sharpener.state_dict()["memory"]["average"])
    g = torch.autograd.grad(steps[1](), heads[1].weight)[0]
    for mean in means:
        assert torch.allclose(mean["1.weight"], g, rtol=1e-12)
        assert torch.allclose(mean["0.weight"], means[0]["0.weight"], rtol=1e-12)
