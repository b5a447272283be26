"""Law 6, first half: an inf or NaN in either pass leaves weights and optimizer state untouched, and says so.

Without a scaler every ``p.grad`` is None afterwards, so that any optimizer skips; with one the inf stays in ``p.grad``,
where the scaler looks. Nothing remembered between steps may be poisoned. The other laws see only finite numbers.
"""

import copy
import math

import pytest
import torch

import problems
from flatmin import vectors
from problems import BASES, assert_same, batch, build, flat, flat_grad, loss_fn
from rows import ROWS, case_id, cut, parts_for, presets, start, warm_up, whole

BAD = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


class Poison:
    """A loss that is multiplied by something on its n-th evaluation since armed."""

    def __init__(self, value: float, call: int, where: str = "loss"):
        self.value, self.call, self.where, self.calls = value, call, where, 0

    def __call__(self, z, y):
        self.calls += 1
        if self.calls == self.call:
            if self.where == "loss":
                return loss_fn(z, y) * self.value
            # a finite loss with a non-finite gradient: sqrt at zero, say
            z.register_hook(lambda g: g * self.value)
        return loss_fn(z, y)


def setup(row, base=None):
    model = build()
    optimizer, sharpener = start(row, base or row.bases[-1], model)
    warm_up(row, sharpener, optimizer, model, 3 if row.stateful else 1)
    return model, optimizer, sharpener


PASSES = [(row, which) for row in ROWS for which in range(1, row.passes(3) + 1)]


# the last loss of a functional rule is telemetry: no gradient comes from it
BAD_PASSES = [(row, which, where) for row, which in PASSES for where in ("loss", "gradient")
              if not (row.pair and which == row.passes(3) and where == "loss")]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize(("row", "which", "where"), BAD_PASSES, ids=case_id)
def test_a_bad_pass_skips_the_step_and_says_so(row, which, where, bad):
    model, optimizer, sharpener = setup(row)
    before, state = flat(model), copy.deepcopy(optimizer.state_dict())
    parts = parts_for(row, *batch(0))
    poison = Poison(BAD[bad], which, where)
    row.backward(sharpener, model, parts, poison)
    assert poison.calls >= which, "the poisoned pass was never run"
    assert all(p.grad is None for p in model.parameters()), "another optimizer would not skip this"
    assert_same(flat(model), before, "weights after backward")
    assert sharpener.last.skipped
    optimizer.step()
    assert_same(flat(model), before, "weights after step")
    after = optimizer.state_dict()
    for i, slot in state["state"].items():
        for key, value in slot.items():
            if torch.is_tensor(value):
                assert_same(after["state"][i][key], value, f"optimizer state {key}")


@pytest.mark.parametrize(("row", "which"), PASSES, ids=case_id)
def test_the_steps_after_a_skip_are_ordinary(row, which):
    """For rows without memory: bitwise those of a run that never met the bad batch. With memory: finite, not skipped,
    and the memory holds nothing but finite numbers."""
    model, optimizer, sharpener = setup(row)
    twin, twin_optimizer, twin_sharpener = setup(row)
    row.backward(sharpener, model, parts_for(row, *batch(0)), Poison(math.nan, which, "gradient"))
    optimizer.step()
    optimizer.zero_grad()

    def tensors(value):
        if torch.is_tensor(value):
            yield value
        elif isinstance(value, dict):
            for v in value.values():
                yield from tensors(v)
        elif isinstance(value, (list, tuple)):
            for v in value:
                yield from tensors(v)

    assert all(t.isfinite().all() for t in tensors(sharpener.state_dict()) if t.is_floating_point())
    for t in range(1, 8):
        row.backward(sharpener, model, parts_for(row, *batch(t)))
        assert not sharpener.last.skipped
        assert flat_grad(model).isfinite().all() and flat_grad(model).any()
        if not row.stateful and not row.random:
            row.backward(twin_sharpener, twin, parts_for(row, *batch(t)))
            assert_same(flat_grad(model), flat_grad(twin), f"step {t} after the skip")
            twin_optimizer.step()
            twin_optimizer.zero_grad()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("row", [r for r in ROWS if r.passes(0) == 2], ids=case_id)
def test_a_step_that_is_bad_from_the_first_pass_on_the_very_first_step(row):
    model = build()
    optimizer, sharpener = start(row, row.bases[-1], model)
    before = flat(model)
    row.backward(sharpener, model, parts_for(row, *batch(0)), Poison(math.inf, 1))
    assert all(p.grad is None for p in model.parameters()) and sharpener.last.skipped
    assert_same(flat(model), before)
    for t in range(4):
        row.backward(sharpener, model, parts_for(row, *batch(t)))
        assert flat_grad(model).isfinite().all() and not sharpener.last.skipped
        optimizer.step()
        optimizer.zero_grad()


def test_one_bad_micro_batch_of_three_skips_the_whole_step():
    for scope in ("batch", "micro_batch"):
        for call in range(1, 7):
            model = build()
            sharpener = presets.sam(model, rho=0.1, scope=scope)
            poison = Poison(math.inf, call)
            from rows import backward
            backward(sharpener, model, cut(*batch(0)), loss=poison)
            assert sharpener.last.skipped and all(p.grad is None for p in model.parameters()), (scope, call)


def test_an_infinite_loss_with_finite_gradients_does_not_move_the_weights():
    """log(0) whose gradient is masked out, say: the step is taken or skipped, but weights are finite either way."""
    x, y = batch(0)
    model = build()
    optimizer = BASES["sgd"](model.parameters())
    sharpener = presets.sam(model, rho=0.1)
    sharpener.backward(lambda: loss_fn(model(x), y) + torch.tensor(math.inf))
    optimizer.step()
    assert flat(model).isfinite().all()


# --- with a scaler ---------------------------------------------------------------------------------------------------

def with_scaler(row, init_scale):
    model = build(dtype=torch.float32)
    optimizer = BASES[row.bases[-1]](model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, growth_interval=1000)
    return model, optimizer, scaler, row.make(model, optimizer, scaler=scaler)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize(("row", "which"), PASSES, ids=case_id)
def test_with_a_scaler_the_inf_stays_and_the_scaler_skips(row, which, bad):
    model, optimizer, scaler, sharpener = with_scaler(row, 2.0**10)
    for t in range(3):
        row.backward(sharpener, model, parts_for(row, *batch(t, dtype=torch.float32)))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    before, state = flat(model), copy.deepcopy(optimizer.state_dict()["state"])
    assert scaler.get_scale() == 2.0**10
    row.backward(sharpener, model, parts_for(row, *batch(3, dtype=torch.float32)), Poison(BAD[bad], which, "gradient"))
    assert sharpener.last.skipped
    assert_same(flat(model), before)
    assert not flat_grad(model).isfinite().all(), "nothing for the scaler to find"
    scaler.step(optimizer)
    scaler.update()
    assert_same(flat(model), before)
    assert scaler.get_scale() == 2.0**9
    for i, slot in state.items():
        for key, value in slot.items():
            if torch.is_tensor(value):
                assert_same(optimizer.state_dict()["state"][i][key], value, f"optimizer state {key}")
    optimizer.zero_grad()
    row.backward(sharpener, model, parts_for(row, *batch(4, dtype=torch.float32)))
    assert not sharpener.last.skipped
    scaler.step(optimizer)
    assert not torch.equal(flat(model), before)


@pytest.mark.parametrize("row", [r for r in ROWS if r.preset in ("sam", "asam")], ids=case_id)
def test_a_scale_too_large_for_the_dtype_recovers_by_itself(row):
    """Start at a scale where half precision overflows even in the first pass; after a few skips training goes on."""
    model, optimizer, scaler, sharpener = with_scaler(row, 2.0**24)
    before = flat(model)
    skipped = 0
    for t in range(12):
        row.backward(sharpener, model, parts_for(row, *batch(t, dtype=torch.float32)),
                     lambda z, y: loss_fn(z.half().float(), y))
        skipped += bool(sharpener.last.skipped)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert 0 < skipped < 12
    assert flat(model).isfinite().all() and not torch.equal(flat(model), before)


def test_an_overflow_is_not_taken_for_a_zero_gradient():
    """With a tiny first group frozen out, and the other way round: skipped tells the two apart."""
    x, y = batch(0)
    model = build(problems.LinearNet)
    sharpener = presets.sam(model, rho=0.1)
    sharpener.backward(lambda: 0 * model(x).sum())
    assert not sharpener.last.skipped
    sharpener.backward(lambda: math.inf * loss_fn(model(x), y))
    assert sharpener.last.skipped
    assert whole(x, y)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32, torch.float64))
def test_finite_is_every_number_finite(dtype):
    """Also where their squares are not."""
    tensors = [torch.full((3, 2), torch.finfo(dtype).max, dtype=dtype), torch.zeros(2, dtype=dtype)]
    space = vectors.Space([torch.nn.Parameter(t) for t in tensors])
    assert space.finite(tensors)
    for bad in (math.inf, -math.inf, math.nan):
        assert not space.finite([tensors[0], torch.tensor([0, bad], dtype=dtype)])
        assert not space.finite([torch.where(torch.arange(6).view(3, 2) == 5, bad, 1.0).to(dtype), tensors[1]])
