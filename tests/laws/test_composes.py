"""Law 7: what people put around ``loss.backward()`` goes on working around ``Sharpener.backward``.

Scaler, clipping, accumulation, activation checkpointing, tied and frozen weights, groups with their own rho, compiled
models, LR schedulers, somebody else's backward. Each is compared with the same row without it (or with the slow twin);
the other laws run every row bare. Autocast is in ``test_low_precision.py``.
"""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import oracles
import problems
from flatmin.ascent.record import MEASURED
from problems import BASES, batch, build, flat, flat_grad, loss_fn, relative
from rows import ROWS, TWINS, case_id, cut, parts_for, presets, start, warm_up, whole


def run(row, model, optimizer, sharpener, n=6, *, dtype=torch.float64, around=None, loss=loss_fn):
    for t in range(n):
        parts = parts_for(row, *batch(t, dtype=dtype))
        row.backward(sharpener, model, parts, loss)
        (around or optimizer.step)()
        optimizer.zero_grad()
    return flat(model)


@pytest.mark.parametrize("row", ROWS, ids=case_id)
def test_a_scaler_changes_nothing(row):
    """Also for rows that are not scale-free (Fisher, surrogate gap, re-used gradients): what they see is unscaled."""
    results = []
    for scaled in (False, True):
        model = build()
        optimizer = BASES[row.bases[0]](model.parameters())
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=2, enabled=scaled)
        sharpener = row.make(model, optimizer, scaler=scaler)

        def around(scaler=scaler, optimizer=optimizer, model=model):
            scaler.unscale_(optimizer)  # once, by the user, as always
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()

        results.append(run(row, model, optimizer, sharpener, around=around))
        if scaled:
            assert scaler.get_scale() > 2.0**12, "the scale never grew: the scaler did not see the steps"
    assert relative(results[1], results[0]) < 1e-12


@pytest.mark.parametrize("row", [r for r in ROWS if r.preset == "sam"], ids=case_id)
def test_loss_and_record_are_those_of_the_unscaled_loss(row):
    x, y = batch(0)
    model = build()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    sharpener = row.make(model, None, scaler=scaler)
    value = row.backward(sharpener, model, parts_for(row, x, y))
    at = oracles.Point(build(), whole(x, y))
    assert float(value) == pytest.approx(float(at.loss(at.w)), rel=1e-12)
    assert float(sharpener.last.loss) == pytest.approx(float(at.loss(at.w)), rel=1e-12)
    assert float(sharpener.last.perturbed_loss) < 10


@pytest.mark.parametrize("row", [r for r in TWINS if r.groups is None], ids=case_id)
def test_the_record_is_the_same_with_a_scaler(row):
    found = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=1024.0)):
        model = build()
        optimizer = BASES[row.bases[0]](model.parameters())
        sharpener = row.make(model, optimizer, scaler=scaler)
        for t in range(3):
            row.backward(sharpener, model, parts_for(row, *batch(t)))
            found.append([float(getattr(sharpener.last, name)) for name in MEASURED])
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
            optimizer.zero_grad()
    for plain, scaled in zip(found[:3], found[3:], strict=True):
        assert scaled == pytest.approx(plain, rel=1e-9, nan_ok=True)


@pytest.mark.parametrize("row", TWINS, ids=case_id)
def test_clipping_is_of_the_gradient_that_descends(row):
    base = row.bases[0]
    model = build()
    steps = [parts_for(row, *batch(t)) for t in range(6)]
    twin, _ = row.twin(model, BASES[base], steps, clip=0.3)
    optimizer, sharpener = start(row, base, model)

    def around():
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        assert norm > 0.3, "nothing was clipped"
        optimizer.step()

    assert relative(run(row, model, optimizer, sharpener, around=around), twin[-1]) < 1e-12


@pytest.mark.parametrize("row", [r for r in ROWS if not r.random and not r.stateful], ids=case_id)
def test_two_calls_before_a_step_add_up(row):
    """Accumulation by calling twice: the sum of the two sharpness-aware gradients."""
    alone = []
    for t in (0, 1):
        model = build()
        optimizer, sharpener = start(row, row.bases[-1], model)
        warm_up(row, sharpener, optimizer, model)
        row.backward(sharpener, model, parts_for(row, *batch(t)))
        alone.append(flat_grad(model))
    model = build()
    optimizer, sharpener = start(row, row.bases[-1], model)
    warm_up(row, sharpener, optimizer, model)
    for t in (0, 1):
        row.backward(sharpener, model, parts_for(row, *batch(t)))
    assert relative(flat_grad(model), alone[0] + alone[1]) < 1e-13


class Checkpointed(nn.Module):
    def __init__(self, inner, reentrant):
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, x):
        def tail(h):
            return self.inner.head(self.inner.drop(torch.tanh(self.inner.norm(h))))
        return checkpoint(tail, self.inner.first(x), use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("row", [r for r in ROWS if r.groups is None or r.name == "sam-groups"], ids=case_id)
def test_activation_checkpointing_changes_nothing(row, reentrant):
    """Recomputation happens during backward: at the weights, the mask and the statistics of its own pass."""
    results = []
    for wrap in (False, True):
        model = build(problems.NoisyNet, norm=nn.LayerNorm(8))
        wrapped = Checkpointed(model, reentrant) if wrap else model
        optimizer = BASES[row.bases[-1]](wrapped.parameters())
        sharpener = row.make(wrapped, optimizer, grouped=model)
        torch.manual_seed(5)
        for t in range(4):
            row.backward(sharpener, wrapped, parts_for(row, *batch(t)))
            optimizer.step()
            optimizer.zero_grad()
        results.append(flat(model))
    assert relative(results[1], results[0]) < 1e-13


@pytest.mark.parametrize("row", [r for r in TWINS if r.groups is None and r.preset != "sam_on"], ids=case_id)
def test_a_few_trainable_parameters_in_a_frozen_network(row):
    """As in LoRA: everything frozen but one small layer; the norm is over it alone, the rest has no gradient."""
    model = build()
    model.requires_grad_(False)
    model.norm_free.requires_grad_(True)
    twin, _ = row.twin(model, BASES[row.bases[-1]], [parts_for(row, *batch(t)) for t in range(5)])
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer, sharpener = start(row, row.bases[-1], model)
    assert relative(run(row, model, optimizer, sharpener, 5), twin[-1]) < 1e-12
    for name, p in model.named_parameters():
        if name in frozen:
            assert p.grad is None
            problems.assert_same(p.detach(), frozen[name])


def compiling_counter():
    graphs = []

    def backend(module, inputs):
        graphs.append(module)
        return module.forward

    return graphs, backend


@pytest.mark.parametrize("row", [r for r in ROWS if not r.random], ids=case_id)
def test_a_compiled_model_is_not_compiled_again_after_the_second_step(row):
    """Same weights as uncompiled, and no recompilation from the second step on."""
    torch._dynamo.reset()
    graphs, backend = compiling_counter()
    plain = build()
    optimizer, sharpener = start(row, row.bases[-1], plain)
    expected = run(row, plain, optimizer, sharpener)
    model = build()
    compiled = torch.compile(model, backend=backend)
    optimizer = BASES[row.bases[-1]](model.parameters())
    sharpener = row.make(compiled, optimizer, grouped=model)
    counts = []

    def around():
        optimizer.step()
        counts.append(len(graphs))

    result = run(row, compiled, optimizer, sharpener, around=around)
    assert counts[0] > 0, "nothing was compiled"
    assert relative(result, expected) < 1e-12
    settled = 1 if not row.stateful else 3  # the first step of a cadence that pays differently compiles for itself
    assert counts[-1] == counts[settled], f"graphs after each step: {counts}"
    torch._dynamo.reset()


@pytest.mark.parametrize("row", ROWS, ids=case_id)
def test_schedulers_see_an_ordinary_optimizer(row):
    model = build()
    optimizer, sharpener = start(row, row.bases[0], model)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for t in range(4):
            row.backward(sharpener, model, parts_for(row, *batch(t)))
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    assert flat(model).isfinite().all()


@pytest.mark.parametrize("row", ROWS, ids=case_id)
def test_a_framework_may_do_the_backward(row):
    """``backward=`` replaces ``loss.backward()`` in every pass; a framework that divides the loss is obeyed."""
    results, calls = [], []

    def insisting(loss, *args, **kwargs):
        calls.append(1)
        loss.backward(*args, **kwargs)

    for given in ({}, {"backward": insisting}):
        model = build()
        optimizer = BASES[row.bases[0]](model.parameters())
        results.append(run(row, model, optimizer, row.make(model, optimizer, **given), 4))
    assert calls
    problems.assert_same(results[1], results[0])


def test_accelerate_does_the_backward():
    import accelerate

    model = build()
    expected = oracles.sam(oracles.Point(model, whole(*batch(0))), 0.1)
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    x, y = batch(0)
    presets.sam(model, rho=0.1, backward=accelerator.backward).backward(lambda: loss_fn(model(x), y))
    assert relative(flat_grad(model), expected) < 1e-13


def test_groups_by_parameters_and_by_modules_are_the_same():
    found = []
    x, y = batch(0)
    for by in ("params", "modules"):
        model = build()
        chosen = list(model.head.parameters()) if by == "params" else [model.head]
        presets.sam(model, rho=0.1, groups=[{by: chosen, "rho": 0.4}]).backward(lambda m=model: loss_fn(m(x), y))
        found.append(flat_grad(model))
    problems.assert_same(*found)


def test_a_parameter_in_two_groups_is_refused():
    model = build()
    with pytest.raises(ValueError):
        presets.sam(model, groups=[{"modules": [model.head], "rho": 0.1}, {"params": [model.head.bias], "rho": 0.2}])


def test_a_group_with_a_stranger_is_refused():
    with pytest.raises(ValueError):
        presets.sam(build(), groups=[{"params": [nn.Parameter(torch.ones(2))], "rho": 0.1}])


def test_an_unknown_scope_is_refused():
    with pytest.raises(ValueError, match="micro_batch"):
        presets.sam(build(), scope="everything")


def test_rank_scope_without_a_data_parallel_module_names_the_alternative():
    x, y = batch(0)
    model = build()
    with pytest.raises(ValueError, match="micro"):
        presets.sam(model, scope="rank").backward(lambda: loss_fn(model(x), y))


def test_a_functional_rule_with_a_bare_loss_says_what_to_pass():
    x, y = batch(0)
    model = build()
    before = flat(model)
    with pytest.raises(ValueError, match="(?i)outputs|forward"):
        presets.functional_sam(model).backward(lambda: loss_fn(model(x), y))
    problems.assert_same(flat(model), before)


@pytest.mark.parametrize("name", ["momentum_sam", "preconditioned_sam", "preconditioned_functional_sam"])
def test_what_reads_the_optimizer_asks_for_it(name):
    with pytest.raises(ValueError, match="optimizer"):
        getattr(presets, name)(build())


def test_a_direction_without_its_moment_prescribes():
    """Plain SGD has no momentum, SGD-momentum no second moment: an error that says what to use instead."""
    x, y = batch(0)
    for name, make in (("momentum_sam", lambda p: torch.optim.SGD(p, lr=0.1)), ("preconditioned_sam", problems.sgd)):
        model = build()
        optimizer = make(model.parameters())
        with pytest.raises(ValueError):
            sharpener = getattr(presets, name)(model, optimizer=optimizer)
            for _ in range(2):
                sharpener.backward(lambda m=model: loss_fn(m(x), y))
                optimizer.step()


def test_a_model_without_trainable_parameters_is_refused():
    with pytest.raises((ValueError, RuntimeError)):
        model = build().requires_grad_(False)
        presets.sam(model).backward(lambda: loss_fn(model(batch(0)[0]), batch(0)[1]))


def test_a_forward_that_returns_no_loss_is_refused_by_name():
    model = build()
    before = flat(model)
    with pytest.raises((ValueError, TypeError)):
        presets.sam(model).backward(lambda: model(batch(0)[0]))
    problems.assert_same(flat(model), before)


def test_double_backward_and_deepcopied_sharpeners_do_not_share():
    """A deepcopied (model, sharpener) pair trains the copy, not the original."""
    model = build()
    sharpener = presets.sam(model, rho=0.1)
    twin, copied = copy.deepcopy((model, sharpener))
    x, y = batch(0)
    copied.backward(lambda: loss_fn(twin(x), y))
    assert all(p.grad is None for p in model.parameters()) and flat_grad(twin).any()
    assert relative(flat_grad(twin), oracles.sam(oracles.Point(model, cut(x, y)), 0.1)) < 1e-13
