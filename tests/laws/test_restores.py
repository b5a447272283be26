"""Law 1: after ``Sharpener.backward`` the weights and mode flags are bit-identical to before; buffers and the random
state are as one plain forward-backward would leave them. Also when the second pass raises, is interrupted, or meets a
parameter without a gradient in one of the passes.

The oracle comparison would miss all of it: a restore by subtraction is right to 1e-17 and drifts over a million steps;
batch statistics that move twice do not change the weights of the next step; a weight left at w + eps by an exception is
only seen by whoever catches it.
"""

import copy
import warnings

import pytest
import torch
from torch import nn

import problems
from problems import assert_same, batch, build, flat, loss_fn
from rows import ROWS, case_id, parts_for, presets, start, warm_up

NETS = {"norm1d": problems.NoisyNet, "norm2d": problems.ConvNet}
PLAIN_ROWS = [row for row in ROWS if row.groups is None and row.preset != "sam_on"]
TWO_PASSES = [row for row in ROWS if row.passes(0) == 2]


class Stop(Exception):
    pass


def snapshot(model):
    return {name: t.detach().clone() for name, t in (*model.named_parameters(), *model.named_buffers())}


def assert_weights_kept(model, before):
    for name, p in model.named_parameters():
        assert_same(p.detach(), before[name], name)


def plain_pass(model, parts):
    """What one ordinary forward-backward over the same micro-batches leaves behind: buffers and random state."""
    twin = copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]):
        for x, y, weight in parts:
            (weight * loss_fn(twin(x), y)).backward()
        return dict(twin.named_buffers()), torch.get_rng_state()


def prepared(row, model):
    optimizer, sharpener = start(row, row.bases[-1], model)
    warm_up(row, sharpener, optimizer, model, 3 if row.stateful else 1)
    return optimizer, sharpener


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("row", ROWS, ids=case_id)
def test_leaves_what_one_plain_pass_would(row, net):
    model = build(NETS[net]) if row.groups is None and row.preset != "sam_on" else build()
    optimizer, sharpener = prepared(row, model)
    before = snapshot(model)
    addresses = [p.data_ptr() for p in model.parameters()]
    identities = [id(p) for p in model.parameters()]
    views = [p.detach().view(-1) for p in model.parameters()]
    parts = parts_for(row, *batch(0))
    buffers, rng = plain_pass(model, parts)
    twin, stood = copy.deepcopy(model), []
    handle = model.register_forward_pre_hook(lambda *_: stood.append([p.detach().clone() for p in model.parameters()]))
    row.backward(sharpener, model, parts)
    handle.remove()
    if row.one_pass:  # its single pass is at w + eps: so are its statistics
        with torch.no_grad():
            for p, value in zip(twin.parameters(), stood[0], strict=True):
                p.copy_(value)
        buffers, _ = plain_pass(twin, parts)
    assert_weights_kept(model, before)
    for name, value in model.named_buffers():
        assert_same(value, buffers[name], f"buffer {name}")
    assert_same(torch.get_rng_state(), rng, "random state")
    assert [p.data_ptr() for p in model.parameters()] == addresses, "storage was swapped: views and buckets go stale"
    assert [id(p) for p in model.parameters()] == identities
    for view, p in zip(views, model.parameters(), strict=True):
        assert_same(view, p.detach().reshape(-1))
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all(p.requires_grad and p.is_leaf for p in model.parameters())


@pytest.mark.parametrize("row", [r for r in PLAIN_ROWS if not r.random], ids=case_id)
def test_dropout_draws_the_same_mask_in_both_passes(row):
    model = build(problems.NoisyNet)
    masks = []
    model.drop.register_forward_hook(lambda m, i, o: masks.append((o == 0).detach()))
    _, sharpener = prepared(row, model)
    masks.clear()
    parts = parts_for(row, *batch(0))
    row.backward(sharpener, model, parts)
    n = len(parts)
    assert len(masks) in (n, 2 * n, 3 * n)
    if n > 1:  # by micro-batch, whichever way the passes are ordered
        for size in {len(x) for x, *_ in parts}:
            assert len({m.numpy().tobytes() for m in masks if len(m) == size}) == 1
    else:
        assert all(torch.equal(m, masks[0]) for m in masks)
    row.backward(sharpener, model, parts)
    assert not torch.equal(masks[-1], masks[0]) or masks[-1].shape != masks[0].shape, "the same mask every step"


@pytest.mark.parametrize("row", PLAIN_ROWS, ids=case_id)
def test_mode_flags_stay_as_they_were_module_by_module(row):
    """A fine-tuned network with its normalization in eval mode: the flags stay mixed and its statistics do not move."""
    model = build(problems.NoisyNet)
    model.norm.eval()
    _, sharpener = start(row, row.bases[-1], model)
    before = snapshot(model)
    flags = [m.training for m in model.modules()]
    row.backward(sharpener, model, parts_for(row, *batch(0)))
    assert [m.training for m in model.modules()] == flags
    for name, value in model.named_buffers():
        assert_same(value, before[name], name)


NORMS_1D = {
    "plain": lambda: nn.BatchNorm1d(8), "momentum-none": lambda: nn.BatchNorm1d(8, momentum=None),
    "momentum-0.01": lambda: nn.BatchNorm1d(8, momentum=0.01), "no-stats": lambda: nn.BatchNorm1d(8,
    track_running_stats=False), "sync": lambda: nn.SyncBatchNorm(8), "custom": lambda: problems.CustomNorm(8),
    "lazy": lambda: nn.LazyBatchNorm1d(),
}


@pytest.mark.parametrize("kind", NORMS_1D)
@pytest.mark.parametrize("row", [r for r in PLAIN_ROWS if r.passes(0) == 2], ids=case_id)
def test_every_kind_of_batch_normalization_moves_once_a_step(row, kind):
    model = build(problems.NoisyNet, norm=NORMS_1D[kind]())
    if kind == "lazy":
        model(batch(9)[0])
        model.norm.reset_running_stats()
    momentum = model.norm.momentum
    _, sharpener = start(row, row.bases[-1], model)
    for t in range(3):
        parts = parts_for(row, *batch(t))
        buffers, _ = plain_pass(model, parts)
        row.backward(sharpener, model, parts)
        model.zero_grad()
        for name, value in model.named_buffers():
            assert_same(value, buffers[name], f"step {t}, {name}")
    if kind != "no-stats":
        assert int(model.norm.num_batches_tracked) == 3 * len(parts_for(row, *batch(0)))
    assert model.norm.momentum == momentum


def test_sync_batch_norm_in_eval_mode_is_left_alone():
    model = build(problems.NoisyNet, norm=nn.SyncBatchNorm(8)).eval()
    before = snapshot(model)
    x, y = batch(0)
    presets.sam(model, rho=0.1).backward(lambda: loss_fn(model(x), y))
    assert_weights_kept(model, before)
    for name, value in model.named_buffers():
        assert_same(value, before[name], name)


def test_a_buffer_that_is_rebound_instead_of_written_ends_as_after_one_pass():
    """Research code writes ``self.ema = 0.9 * self.ema + 0.1 * h``: the buffer is a new tensor each call."""
    class Rebinding(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(problems.FEATURES, problems.CLASSES)
            self.register_buffer("ema", torch.zeros(problems.CLASSES))

        def forward(self, x):
            h = self.first(x)
            self.ema = 0.9 * self.ema + 0.1 * h.detach().mean(0)
            return h

    model = build(Rebinding)
    x, y = batch(0)
    buffers, _ = plain_pass(model, [(x, y, 1.0)])
    presets.sam(model, rho=0.5).backward(lambda: loss_fn(model(x), y))
    assert_same(model.ema, buffers["ema"])


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt, torch.OutOfMemoryError])
@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("row", TWO_PASSES, ids=case_id)
def test_an_exception_in_the_second_pass_gives_the_weights_back(row, where, error):
    model = build(problems.NoisyNet) if row in PLAIN_ROWS else build()
    optimizer, sharpener = start(row, row.bases[-1], model)
    before, flags = snapshot(model), [m.training for m in model.modules()]
    parts = parts_for(row, *batch(0))[:1]
    parts = [(*parts[0][:2], 1.0)]
    buffers, rng = plain_pass(model, parts)
    calls = []

    def stop(*_):
        raise error("in the second pass")

    def watch(module, inputs, output):
        calls.append(1)
        if len(calls) == 2 and where == "forward":
            stop()
        if len(calls) == 2 and where == "backward":
            output.register_hook(stop)

    handle = model.register_forward_hook(watch)
    with pytest.raises(error):
        row.backward(sharpener, model, parts)
    handle.remove()
    assert len(calls) == 2, "the second pass was never reached"
    assert_weights_kept(model, before)
    assert [m.training for m in model.modules()] == flags
    for name, value in model.named_buffers():
        assert_same(value, buffers[name], f"buffer {name}")
    if error is not KeyboardInterrupt:
        assert_same(torch.get_rng_state(), rng, "random state")
    # and nothing is poisoned: the next step is that of a sharpener to which it never happened
    optimizer.zero_grad()
    reference = build(problems.NoisyNet) if row in PLAIN_ROWS else build()
    reference.load_state_dict(model.state_dict())
    _, fresh = start(row, row.bases[-1], reference)
    for m, s in ((model, sharpener), (reference, fresh)):
        torch.manual_seed(7)
        row.backward(s, m, parts)
    if not row.random and not row.stateful:
        for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
            assert_same(p.grad, q.grad, name)
    assert problems.flat_grad(model).isfinite().all()


@pytest.mark.parametrize("row", [r for r in ROWS if not r.micro and r.groups is None and r.preset != "sam_on"
                                 and not r.pair], ids=case_id)
@pytest.mark.parametrize("schedule", ["ab", "ba"])
def test_a_gradient_in_only_one_of_the_passes(row, schedule):
    """Branch a in one pass, b in the other, both ways: all weights come back, and no gradient of the first pass is
    mistaken for one of the second."""
    model = build(problems.FickleNet, schedule=schedule)
    optimizer, sharpener = start(row, row.bases[-1], model)
    warm_up(row, sharpener, optimizer, model, 3 if row.stateful else 2)  # both branches have optimizer state
    model.calls = 0
    before = snapshot(model)
    row.backward(sharpener, model, parts_for(row, *batch(0)))
    assert_weights_kept(model, before)
    assert problems.flat_grad(model).isfinite().all()
    if row.plain and model.calls == 2:
        unused, used = (model.branches[name] for name in schedule)
        assert used.weight.grad is not None and used.weight.grad.any()
        assert unused.weight.grad is None or not unused.weight.grad.any()


@pytest.mark.parametrize("row", ROWS, ids=case_id)
def test_unused_parameters_keep_no_gradient(row):
    model = build()
    model.register_parameter("spare", nn.Parameter(torch.randn(3, 3)))
    optimizer, sharpener = start(row, row.bases[-1], model)
    before = snapshot(model)
    row.backward(sharpener, model, parts_for(row, *batch(0)))
    assert_weights_kept(model, before)
    assert model.spare.grad is None or not model.spare.grad.any()
    optimizer.step()
    row.backward(sharpener, model, parts_for(row, *batch(1)))


@pytest.mark.parametrize("row", [r for r in ROWS if not r.random], ids=case_id)
def test_adds_to_an_existing_gradient_like_backward(row):
    grads = []
    for primed in (False, True):
        model = build()
        optimizer, sharpener = prepared(row, model)
        if primed:
            for i, p in enumerate(model.parameters()):
                p.grad = torch.full_like(p, 0.25 * (i + 1))
        row.backward(sharpener, model, parts_for(row, *batch(0)))
        grads.append([p.grad.clone() for p in model.parameters()])
    for i, (alone, added) in enumerate(zip(*grads, strict=True)):
        assert torch.allclose(added, alone + 0.25 * (i + 1), rtol=0, atol=1e-14)


@pytest.mark.parametrize("row", ROWS, ids=case_id)
def test_the_same_call_twice_from_the_same_state_is_bitwise_the_same(row):
    grads = []
    for _ in range(2):
        model = build()
        _, sharpener = prepared(row, model)
        row.backward(sharpener, model, parts_for(row, *batch(0)))
        grads.append(problems.flat_grad(model))
    assert_same(*grads)


@pytest.mark.parametrize("row", ROWS, ids=case_id)
def test_an_ordinary_step_warns_of_nothing(row):
    model = build()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, sharpener = prepared(row, model)
        row.backward(sharpener, model, parts_for(row, *batch(0)))
        assert flat(model).isfinite().all()


def test_weights_under_no_grad_views_of_other_tensors_come_back():
    """A parameter that is a non-contiguous view (channels-last, a transposed tensor) is restored in place."""
    model = build(problems.ConvNet).to(memory_format=torch.channels_last)
    model.first = nn.Linear(4, 5)
    model.first.weight = nn.Parameter(torch.randn(4, 5).t())
    x, y = batch(0)
    before = snapshot(model)
    strides = [p.stride() for p in model.parameters()]
    presets.sam(model, rho=0.1).backward(lambda: loss_fn(model(x), y) + model.first(torch.ones(4)).square().sum())
    assert_weights_kept(model, before)
    assert [p.stride() for p in model.parameters()] == strides


def test_evaluation_inside_the_loop_sees_w():
    """Between steps there is nothing to undo: the model is at w for evaluation and checkpoints, for every row."""
    for row in ROWS:
        model = build()
        optimizer, sharpener = start(row, row.bases[-1], model)
        previous = flat(model)
        for t in range(3):
            row.backward(sharpener, model, parts_for(row, *batch(t)))
            assert_same(flat(model), previous, row.name)
            optimizer.step()
            optimizer.zero_grad()
            previous = flat(model)


class Two(nn.Module):
    """Two layers of equal shapes: their copies could be exchanged unnoticed."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        return self.b(self.a(x).tanh())


def _wider(model):
    model.double()
    for p in model.parameters():
        p.data += 1e-10


def _another_shape(model):
    for layer in (model.a, model.b):
        layer.weight.data = torch.cat([layer.weight.data] * 2)[:, :3].clone()
        layer.bias.data = torch.cat([layer.bias.data] * 2)
    model.b.weight.data = torch.cat([model.b.weight.data] * 2, 1)


def _frozen(model):
    model.a.weight.requires_grad_(False)


@pytest.mark.parametrize("radii", [(0.5, 0.5), (0.5, 0.1)], ids=["one radius", "two radii"])
@pytest.mark.parametrize("change", [_wider, _another_shape, _frozen, lambda model: None])
def test_a_later_step_is_that_of_a_new_sharpener(change, radii):
    """Memory for the copy of w is kept from step to step: never for two things at once, nor for other tensors."""
    torch.manual_seed(0)
    model, x = Two().float(), torch.randn(5, 3).float()

    def sharpener(of):
        return presets.sam(of, groups=[{"modules": of.a, "rho": radii[0]}, {"modules": of.b, "rho": radii[1]}]
                           if radii[0] != radii[1] else None, rho=radii[0])

    old = sharpener(model)
    old.backward(lambda: model(x).square().mean())
    model.zero_grad()
    change(model)
    x, twin, before = x.to(model.a.weight.dtype), copy.deepcopy(model), snapshot(model)
    old.backward(lambda: model(x).square().mean())
    sharpener(twin).backward(lambda: twin(x).square().mean())
    assert_weights_kept(model, before)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        if p.requires_grad:
            assert_same(p.grad, q.grad)
