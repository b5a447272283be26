"""Law 8: two ranks equal one process. DDP and FSDP2 on gloo, each rank with its half of the batch.

Whole-batch scope must equal one process on the merged batch; micro-batch scope one process whose i-th micro-batch is
the ranks' i-th micro-batches merged; rank scope under DDP really uses each rank's own eps, which is one process with
the ranks' halves as micro-batches. Nothing else sees a norm that is taken over a rank's own shard, gradients that
bypass the reducer, a restore that does nothing to a DTensor, or ranks that disagree about an overflow and wait for
each other.

One launch of two processes a wrapper runs everything; the tests below only read what it wrote.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn

import problems
import two_ranks
from flatmin import Objective
from problems import BASES, batch, build, flat, flat_grad, loss_fn, relative
from rows import ROWS, Row, backward, case_id, cut, presets, whole
from two_ranks import WORLD

STEPS, N = 5, 12
ROWS_HERE = [row for row in ROWS if not row.random]


def merged_parts(row: Row, t: int):
    """What one process is fed: micro-batch i is both ranks' micro-batch i."""
    x, y = batch(t, N)
    if not row.micro:
        return whole(x, y)
    order = torch.tensor([0, 1, 6, 7, 2, 3, 4, 5, 8, 9, 10, 11])  # sizes 2 + 2 and 4 + 4
    return cut(x[order], y[order], (4, 8))


def rank_parts(row: Row, t: int, rank: int):
    x, y = (z.chunk(WORLD)[rank] for z in batch(t, N))
    return cut(x, y, (2, 4)) if row.micro else whole(x, y)


def gathered(model: nn.Module) -> torch.Tensor:
    return torch.cat([(p.full_tensor() if hasattr(p, "full_tensor") else p).detach().reshape(-1)
                      for p in model.parameters()])


def serial(row: Row, base: str, net=problems.RolesNet, steps=STEPS, feed=merged_parts, **override):
    model = build(net)
    optimizer = BASES[base](model.parameters())
    sharpener = row.make(model, optimizer, **override)
    for t in range(steps):
        row.backward(sharpener, model, feed(row, t))
        optimizer.step()
        optimizer.zero_grad()
    return flat(model), sharpener


def wrap(kind: str, model: nn.Module) -> nn.Module:
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (WORLD,)) if kind == "fsdp" else init_device_mesh(
        "cpu", (WORLD, 1), mesh_dim_names=("replicate", "shard"))
    for child in (model.first, model.norm_free, model.head):
        fully_shard(child, mesh=mesh)
    return fully_shard(model, mesh=mesh)


# --- what runs on the ranks: each returns plain numbers or True -------------------------------------------------------

def equals_serial(kind, rank, row):
    """Largest relative difference in weights over both bases, and whether ranks agree bit for bit."""
    worst = 0.0
    for base in row.bases:
        expected, record = serial(row, base)
        inner = build()
        model = wrap(kind, inner)
        optimizer = BASES[base](model.parameters())
        sharpener = row.make(model, optimizer, grouped=inner)
        for t in range(STEPS):
            before = gathered(model)
            row.backward(sharpener, model, rank_parts(row, t, rank))
            assert torch.equal(gathered(model), before), "weights were not restored"
            optimizer.step()
            optimizer.zero_grad()
        mine = gathered(model)
        other = [torch.empty_like(mine) for _ in range(WORLD)]
        dist.all_gather(other, mine)
        assert torch.equal(*other), "the ranks' weights drift apart"
        for name in ("radius", "gradient_norm"):
            ours, theirs = float(getattr(sharpener.last, name)), float(getattr(record.last, name))
            # each micro-batch has its own norm, and records may average them
            assert row.micro or math.isnan(theirs) or abs(ours - theirs) <= 1e-9 * abs(theirs), (name, ours, theirs)
        worst = max(worst, relative(mine, expected))
    return worst


def accumulated(kind, rank, row):
    """Unequal micro-batches, whole-batch scope: one eps from all of them on both ranks."""
    expected, _ = serial(row, row.bases[0], steps=3)
    inner = build()
    model = wrap(kind, inner)
    optimizer = BASES[row.bases[0]](model.parameters())
    sharpener = row.make(model, optimizer, grouped=inner)
    for t in range(3):
        x, y = (z.chunk(WORLD)[rank] for z in batch(t, N))
        backward(sharpener, model, cut(x, y, (1, 5)), pair=row.pair)
        optimizer.step()
        optimizer.zero_grad()
    return relative(gathered(model), expected)


def rank_scope(kind, rank):
    row = next(r for r in ROWS if r.name == "sam")
    micro = next(r for r in ROWS if r.name == "sam-micro")
    expected, _ = serial(micro, "sgd", feed=lambda _, t: cut(*batch(t, N), (6, 6)))
    pooled, _ = serial(row, "sgd")
    inner = build()
    model = wrap(kind, inner)
    optimizer = BASES["sgd"](model.parameters())
    sharpener = presets.sam(model, rho=0.1, scope="rank")
    for t in range(STEPS):
        row.backward(sharpener, model, rank_parts(row, t, rank))
        optimizer.step()
        optimizer.zero_grad()
    assert relative(gathered(model), pooled) > 1e-6, "rank scope is whole-batch scope"
    return relative(gathered(model), expected)


def rank_scope_with_accumulation(kind, rank):
    """Each rank's eps comes from all its micro-batches."""
    micro = next(r for r in ROWS if r.name == "sam-micro")
    expected, _ = serial(micro, "sgd", feed=lambda _, t: cut(*batch(t, N), (6, 6)))
    model = wrap(kind, build())
    optimizer = BASES["sgd"](model.parameters())
    sharpener = presets.sam(model, rho=0.1, scope="rank")
    for t in range(STEPS):
        x, y = (z.chunk(WORLD)[rank] for z in batch(t, N))
        backward(sharpener, model, cut(x, y, (2, 4)))
        optimizer.step()
        optimizer.zero_grad()
    return relative(gathered(model), expected)


def rank_scope_is_refused(kind, rank):
    x, y = batch(0)
    model = wrap(kind, build())
    try:
        presets.sam(model, rho=0.1, scope="rank").backward(lambda: loss_fn(model(x), y))
    except ValueError as error:
        assert "micro" in str(error), error
        return 0.0
    raise AssertionError("one shard has one value for all ranks, and nobody said so")


def no_sync_is_refused(kind, rank):
    x, y = batch(0)
    model = wrap(kind, build())
    sharpener = presets.sam(model, rho=0.1)
    before = gathered(model)
    try:
        if kind == "ddp":
            with model.no_sync():
                sharpener.backward(lambda: loss_fn(model(x), y))
        else:
            model.set_requires_gradient_sync(False)
            sharpener.backward(lambda: loss_fn(model(x), y))
    except (RuntimeError, ValueError) as error:
        assert "sync" in str(error), error
    else:
        raise AssertionError("eps became per-rank in silence")
    finally:
        if kind != "ddp":
            model.set_requires_gradient_sync(True)
    assert torch.equal(gathered(model), before)
    sharpener.backward(lambda: loss_fn(model(x), y))  # and it works afterwards
    return 0.0


def overflow_on_one_rank(kind, rank):
    """Rank 1 alone meets an inf, in either pass: both skip, nobody waits, and the next step is ordinary."""
    row = next(r for r in ROWS if r.name == "sam")
    for scope in ("batch", "micro_batch", *(("rank",) if kind == "ddp" else ())):
        for which in (1, 2):
            model = wrap(kind, build())
            optimizer = BASES["sgd"](model.parameters())
            sharpener = presets.sam(model, rho=0.1, scope=scope)
            calls = []

            def loss(z, y, calls=calls, which=which):
                calls.append(1)
                return loss_fn(z, y) * (math.inf if rank == 1 and len(calls) == which else 1.0)

            before = gathered(model)
            row.backward(sharpener, model, rank_parts(row, 0, rank), loss)
            assert sharpener.last.skipped, (scope, which)
            assert all(p.grad is None for p in model.parameters()), (scope, which)
            optimizer.step()
            assert torch.equal(gathered(model), before), (scope, which)
            row.backward(sharpener, model, rank_parts(row, 1, rank))
            assert not sharpener.last.skipped
            optimizer.step()
    return 0.0


def overflow_with_a_scaler(kind, rank):
    row = next(r for r in ROWS if r.name == "sam")
    for which in (1, 2):
        model = wrap(kind, build().float())
        optimizer = BASES["sgd"](model.parameters())
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        sharpener = presets.sam(model, rho=0.1, scaler=scaler)
        calls = []

        def loss(z, y, calls=calls, which=which):
            calls.append(1)
            return loss_fn(z, y) * (math.inf if rank == 1 and len(calls) == which else 1.0)

        before = gathered(model)
        parts = [(x.float(), y, w) for x, y, w in rank_parts(row, 0, rank)]
        row.backward(sharpener, model, parts, loss)
        assert sharpener.last.skipped
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 512.0, (which, scaler.get_scale())
        assert torch.equal(gathered(model), before), which
    return 0.0


def bucket_views(kind, rank):
    """Gradients that lie in DDP's buckets are still there, once, after accumulation and ``set_to_none=False``."""
    row = next(r for r in ROWS if r.name == "sam")
    worst = 0.0
    # the last one is made before the wrapper, and cannot know of it
    for preset, to_none, early in (("sam", True, False), ("sam", False, False), ("gsam", False, False),
                                   ("sam", True, True)):
        results = []
        for views in (False, True):
            inner = build()
            sharpener = getattr(presets, preset)(inner, rho=0.1) if early else None
            model = nn.parallel.DistributedDataParallel(inner, gradient_as_bucket_view=views)
            optimizer = BASES["sgd"](model.parameters())
            sharpener = sharpener or getattr(presets, preset)(model, rho=0.1)
            for t in range(3):
                row.backward(sharpener, model, rank_parts(row, 2 * t, rank))
                row.backward(sharpener, model, rank_parts(row, 2 * t + 1, rank))
                optimizer.step()
                optimizer.zero_grad(set_to_none=to_none)
            results.append(gathered(model))
        worst = max(worst, relative(results[1], results[0]))
    return worst


def a_failed_pass_leaves_bucket_views(kind, rank):
    x, y = (z.chunk(WORLD)[rank] for z in batch(0, N))
    model = nn.parallel.DistributedDataParallel(build(), gradient_as_bucket_view=True)
    loss_fn(model(x), y).backward()
    before, calls = flat_grad(model), []

    def fails():
        calls.append(1)
        if len(calls) == 2:
            raise KeyError
        return loss_fn(model(x), y)

    try:
        presets.sam(model, rho=0.1).backward(fails)
    except KeyError:
        return float((flat_grad(model) - before).norm())
    raise AssertionError("the second pass was not reached")


def trainable_outside_the_wrapper_is_refused(kind, rank):
    def outer(trainable):
        inner = build()
        out = nn.ModuleDict({"inner": wrap(kind, inner), "own": nn.Linear(3, 3)})
        out["own"].requires_grad_(trainable)
        return out

    presets.sam(outer(False))
    for scope in ("batch", "micro_batch", "first"):
        try:
            presets.sam(outer(True), scope=scope)
        except ValueError as error:
            assert "own.weight" in str(error), error
        else:
            raise AssertionError("each rank has its own norm, and nobody said so")
    if kind == "ddp":
        presets.sam(outer(True), scope="rank")
    return 0.0


def fsdp1_is_refused(kind, rank):
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(nn.Linear(4, 4), device_id=torch.device("cpu"))
    for use in (presets.sam, lambda m: Objective(m, nn.MSELoss(), (torch.eye(4), torch.eye(4))).value()):
        try:
            use(model)
        except ValueError as error:
            assert "fully_shard" in str(error)
        else:
            raise AssertionError("FSDP1 was accepted")
    return 0.0


def one_rank_may_print(kind, rank):
    """No collective hides in a record: rank 0 alone prints it."""
    row = next(r for r in ROWS if r.name == "sam")
    model = wrap(kind, build())
    sharpener = presets.sam(model, rho=0.1, perturbed_norm=True)
    row.backward(sharpener, model, rank_parts(row, 0, rank))
    if rank == 0:
        assert "perturbed_gradient_norm" in repr(sharpener.last)
    reference = presets.sam(twin := build(), rho=0.1, perturbed_norm=True)
    row.backward(reference, twin, merged_parts(row, 0))
    return abs(sharpener.last.perturbed_gradient_norm / reference.last.perturbed_gradient_norm - 1)


def penalty_inside_the_loss(kind, rank):
    """A functional rule with a weight penalty: both reach the reducer in one backward."""
    row = next(r for r in ROWS if r.name == "functional_sam")
    results = []
    for wrapped in (False, True):
        model = wrap(kind, build()) if wrapped else build()
        sharpener = presets.functional_sam(model, rho=0.1)

        def loss(z, y, model=model):
            return loss_fn(z, y) + 0.1 * sum(p.square().sum() for p in model.parameters())

        row.backward(sharpener, model, rank_parts(row, 0, rank) if wrapped else merged_parts(row, 0), loss)
        results.append(flat_grad(model))
    return relative(results[1], results[0])


def inside_another_module(kind, rank):
    """The model may contain the wrapped module: its own parts are replicated by hand here."""
    row = next(r for r in ROWS if r.name == "sam")

    class Outer(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return 1.5 * self.inner(x)

    plain = Outer(build())
    reference = presets.sam(plain, rho=0.1)
    row.backward(reference, plain, merged_parts(row, 0))
    model = Outer(wrap(kind, build()))
    sharpener = presets.sam(model, rho=0.1)
    row.backward(sharpener, model, rank_parts(row, 0, rank))
    ours = torch.cat([(p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad).reshape(-1)
                      for p in model.parameters()])
    return relative(ours, flat_grad(plain))


def buffers_and_dropout(kind, rank):
    """Batch normalization moves once a step on every rank; each rank replays its own masks."""
    inner = build(problems.NoisyNet)
    twin = build(problems.NoisyNet)
    if kind == "ddp":
        model = nn.parallel.DistributedDataParallel(inner)
    else:
        from torch.distributed.fsdp import fully_shard
        model = fully_shard(inner)
    masks = []
    inner.drop.register_forward_hook(lambda m, i, o: masks.append((o == 0).detach()))
    x, y = (z.chunk(WORLD)[rank] for z in batch(0, N))
    torch.manual_seed(rank)
    loss_fn(twin(x), y).backward()
    after = torch.get_rng_state()
    torch.manual_seed(rank)
    presets.sam(model, rho=0.1).backward(lambda: loss_fn(model(x), y))
    assert torch.equal(torch.get_rng_state(), after)
    assert len(masks) == 2 and torch.equal(*masks)
    assert torch.equal(inner.norm.running_mean, twin.norm.running_mean)
    assert int(inner.norm.num_batches_tracked) == 1
    return 0.0


def drop_in_class(kind, rank):
    """The façade's two steps on a wrapped model: the caller's own passes, synchronised by the wrapper."""
    from flatmin import SAM

    def train(model, parts):
        optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.05, momentum=0.9)
        for t in range(3):
            for step in (optimizer.first_step, optimizer.second_step):
                (x, y, _), = parts(t)
                loss_fn(model(x), y).backward()
                step(zero_grad=True)
        return gathered(model)

    row = next(r for r in ROWS if r.name == "sam")
    expected = train(build(), lambda t: merged_parts(row, t))
    return relative(train(wrap(kind, build()), lambda t: rank_parts(row, t, rank)), expected)


def half_precision(kind, rank):
    """bf16 weights: restored bit for bit, ranks agree, and the record tells the radius that was realised."""
    row = next(r for r in ROWS if r.name == "sam")
    model = wrap(kind, build().bfloat16())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sharpener = presets.sam(model, rho=0.5)
    for t in range(3):
        before = gathered(model)
        row.backward(sharpener, model, [(x.bfloat16(), y, w) for x, y, w in rank_parts(row, t, rank)])
        assert torch.equal(gathered(model), before)
        assert abs(float(sharpener.last.radius) - 0.5) < 0.05
        assert float(sharpener.last.sharpness) > 0.01
        optimizer.step()
        optimizer.zero_grad()
    mine = gathered(model)
    other = [torch.empty_like(mine) for _ in range(WORLD)]
    dist.all_gather(other, mine)
    assert torch.equal(*other)
    return 0.0


def distributed_checkpoint(kind, rank):
    """Saved with ``torch.distributed.checkpoint`` and reloaded into fresh objects: bitwise the uninterrupted run."""
    import tempfile

    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    worst = 0.0
    for name in ("sam", "looksam", "friendly_sam"):
        row = next((r for r in ROWS if r.name == name), None)
        if row is None:
            continue

        def fresh(row=row):
            inner = build()
            model = wrap(kind, inner)
            optimizer = BASES["adamw"](model.parameters())
            return model, optimizer, row.make(model, optimizer, grouped=inner)

        def train(model, optimizer, sharpener, first, last, row=row):
            for t in range(first, last):
                row.backward(sharpener, model, rank_parts(row, t, rank))
                optimizer.step()
                optimizer.zero_grad()

        model, optimizer, sharpener = fresh()
        train(model, optimizer, sharpener, 0, 4)
        folder = [tempfile.mkdtemp() if rank == 0 else None]
        dist.broadcast_object_list(folder)
        weights, moments = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": moments, "sharpener": sharpener.state_dict()},
                 checkpoint_id=folder[0])
        train(model, optimizer, sharpener, 4, 7)
        expected = gathered(model)
        model, optimizer, sharpener = fresh()
        train(model, optimizer, sharpener, 20, 21)  # so that every entry exists to be loaded into
        weights, moments = get_state_dict(model, optimizer)
        state = {"model": weights, "optimizer": moments, "sharpener": sharpener.state_dict()}
        dcp.load(state, checkpoint_id=folder[0])
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        sharpener.load_state_dict(state["sharpener"])
        train(model, optimizer, sharpener, 4, 7)
        assert torch.equal(gathered(model), expected), name
    return worst


CHECKS = {
    "ddp": [rank_scope, rank_scope_with_accumulation, no_sync_is_refused, overflow_on_one_rank, overflow_with_a_scaler,
            inside_another_module, buffers_and_dropout, half_precision, drop_in_class, distributed_checkpoint,
            bucket_views, a_failed_pass_leaves_bucket_views, trainable_outside_the_wrapper_is_refused, fsdp1_is_refused,
            one_rank_may_print, penalty_inside_the_loss],
    "fsdp": [rank_scope_is_refused, no_sync_is_refused, overflow_on_one_rank, inside_another_module,
             buffers_and_dropout, half_precision, drop_in_class, distributed_checkpoint,
             trainable_outside_the_wrapper_is_refused, one_rank_may_print],
    "mesh": [rank_scope, inside_another_module],
}
ON_MESH = ("sam", "asam", "sam-micro", "functional_sam", "looksam")


def rows_on(kind):
    return [row for row in ROWS_HERE if kind != "mesh" or row.name in ON_MESH]


def jobs(kind):
    found = [(f"{f.__name__}[{row}]", f, (row,)) for row in rows_on(kind) for f in (equals_serial, accumulated)
             if f is equals_serial or (not row.micro and kind != "mesh")]
    return found + [(f.__name__, f, ()) for f in CHECKS[kind]]


def worker(rank, folder):
    torch.set_default_dtype(torch.float64)
    two_ranks.run(rank, folder, CHECKS, jobs, seconds=40)


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """Replicated and sharded run one after the other in the same two processes."""
    return two_ranks.launch(worker, str(tmp_path_factory.mktemp("ranks")), CHECKS, seconds=240)


def read(launched, kind, name):
    for rank, result in two_ranks.results(launched, kind, name):
        assert result < 1e-12, f"rank {rank}: differs from one process by {result:.1e}"


KINDS_AND_ROWS = [(kind, row) for kind in CHECKS for row in rows_on(kind)]
ACCUMULATED = [(kind, row) for kind, row in KINDS_AND_ROWS if not row.micro and kind != "mesh"]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "row"), KINDS_AND_ROWS, ids=case_id)
def test_two_ranks_equal_one_process(launched, kind, row):
    read(launched, kind, f"equals_serial[{row}]")


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "row"), ACCUMULATED, ids=case_id)
def test_accumulation_on_two_ranks_equals_the_merged_batch(launched, kind, row):
    read(launched, kind, f"accumulated[{row}]")


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), [(k, f.__name__) for k in CHECKS for f in CHECKS[k]])
def test_two_ranks(launched, kind, name):
    read(launched, kind, name)
