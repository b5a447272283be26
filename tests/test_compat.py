"""The classes and functions of notes and of the most used SAM class: their own code runs, and computes what it says."""

import copy
import gc
import inspect
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import flatmin
import note_blocks
import two_ranks
from flatmin import ascent, compat
from flatmin.compat import (
    ASAM,
    SAM,
    EfficientSAM,
    LookSAM,
    MemoryEfficientSAM,
    MomentumSAM,
    compute_hessian_vector_product,
    compute_sam_sharpness,
    disable_running_stats,
    enable_running_stats,
    power_iteration_top_eigenvalue,
    train_sam_distributed,
    train_sam_with_accumulation,
)
from flatmin.curvature import dense_hessian
from problems import assert_same, batch, build, flat, loss_fn

OPTIONS = {"lr": 0.05, "momentum": 0.9}


def closure_of(optimizer, model, t, calls=None):
    x, y = batch(t)

    def closure():
        if calls is not None:
            calls.append(t)
        optimizer.zero_grad()
        loss = loss_fn(model(x), y)
        loss.backward()
        return loss
    return closure


def by_two_steps(optimizer, model, t):
    """The loop of the notes; returns w + ε − w and the gradients at w."""
    x, y = batch(t)
    loss_fn(model(x), y).backward()
    gradients, start = [p.grad.clone() for p in model.parameters()], [p.detach().clone() for p in model.parameters()]
    optimizer.first_step(zero_grad=True)
    moved = [p.detach() - w for p, w in zip(model.parameters(), start, strict=True)]
    loss_fn(model(x), y).backward()
    optimizer.second_step(zero_grad=True)
    return moved, gradients


def defined(block, **names):
    """The names that a block of the note defines after the import lines of this library."""
    space = {"SAM": SAM, "enable_running_stats": enable_running_stats, "disable_running_stats": disable_running_stats,
             "compute_sam_sharpness": compute_sam_sharpness, "torch": torch, "nn": nn, "F": F, **names}
    exec(compile(getattr(note_blocks, block), block, "exec"), space)
    return space


def norm(tensors):
    return math.sqrt(sum(float(t.square().sum()) for t in tensors))


# --- the note's own code

def test_the_note_s_training_loop_equals_the_sharpener():
    def net():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5, momentum=0.01), nn.Tanh(), nn.Linear(5, 3))

    data, settings = [batch(0), batch(1)], dict(lr=0.1, momentum=0.9, weight_decay=5e-4)
    model, other = net(), net()
    defined("TRAINING_LOOP")["train_with_sam"](model, data, epochs=2, device="cpu")
    base, sharpener = SGD(other.parameters(), **settings), flatmin.presets.sam(other, rho=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(base, T_max=2)
    for _ in range(2):
        for x, y in data:
            base.zero_grad()
            sharpener.backward(lambda x=x, y=y: F.cross_entropy(other(x), y))
            base.step()
        schedule.step()
    assert torch.allclose(flat(model), flat(other), rtol=0, atol=1e-12)
    enable_running_stats(model)
    for a, b in zip(model.buffers(), other.buffers(), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)
    assert model[1].momentum == 0.01 and int(model[1].num_batches_tracked) == 4


@pytest.mark.parametrize("name,block", [("EfficientSAM", "EFFICIENT"), ("MomentumSAM", "MOMENTUM")])
def test_a_subclass_with_its_own_first_step_moves_and_comes_back(name, block):
    model = build()
    optimizer = defined(block)[name](model.parameters(), SGD, rho=0.1, lr=0.0)
    start = flat(model)
    moved, g = by_two_steps(optimizer, model, 0)
    chosen = sorted(range(len(g)), key=lambda i: -float(g[i].norm()))[:len(g) // 2 if name == "EfficientSAM" else None]
    for i, (d, t) in enumerate(zip(moved, g, strict=True)):
        torch.testing.assert_close(d, 0.1 * t / norm(g) if i in chosen else torch.zeros_like(d))
    assert_same(flat(model), start)
    assert not any("old_p" in state for state in optimizer.state.values())


def test_a_subclass_with_its_own_first_step_is_asked_by_step_too():
    class Tenfold(SAM):
        @torch.no_grad()
        def first_step(self, zero_grad=False):
            for p in self.param_groups[0]["params"]:
                self.state[p]["old_p"] = p.data.clone()
                p.add_(10 * self.param_groups[0]["rho"] * p.grad / self._grad_norm())
            if zero_grad:
                self.zero_grad()

    weights = []
    for cls, rho in ((Tenfold, 0.01), (SAM, 0.1)):
        model = build()
        optimizer = cls(model.parameters(), torch.optim.AdamW, rho=rho, lr=0.05)
        for t in range(3):
            optimizer.step(closure_of(optimizer, model, t))
        weights.append(flat(model))
    assert torch.allclose(*weights, rtol=0, atol=1e-9)


def test_the_note_s_asam_and_looksam_run_as_subclasses():
    for block, name, settings in (("ADAPTIVE", "ASAM", {}), ("LOOK", "LookSAM", {"k": 2})):
        model = build()
        optimizer = defined(block)[name](model.parameters(), SGD, lr=0.05, **settings)
        start, calls = flat(model), []
        for t in range(4):
            closure = closure_of(optimizer, model, t, calls)
            if name == "LookSAM":
                closure()       # the note's loop: "first forward-backward pass already done"
            optimizer.step(closure)
        assert not torch.equal(flat(model), start) and torch.isfinite(flat(model)).all()


def test_the_note_s_relevance_loop(capsys):
    class Scorer(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 3)

        def forward(self, images, texts=0.0):
            return self.linear(images) + texts

    data = [(batch(0)[0], torch.ones(1, 3), torch.zeros(len(batch(0)[0]), 3))]
    defined("RELEVANCE")["train_relevance_model_with_sam"](Scorer(), data, epochs=2)
    assert "Sharpness=" in capsys.readouterr().out


# --- the classes

def test_signatures():
    def default(function, name):
        return inspect.signature(function).parameters[name].default

    assert default(ASAM, "rho") == 2.0 and default(MomentumSAM, "perturbation_momentum") == 0.9
    assert default(EfficientSAM, "perturbation_ratio") == 0.5
    assert default(MemoryEfficientSAM, "checkpoint_segments") == 2
    assert default(LookSAM, "k") == 5 and default(train_sam_with_accumulation, "accumulation_steps") == 4
    assert list(inspect.signature(compute_sam_sharpness).parameters) == ["model", "loss_fn", "inputs", "targets", "rho"]
    for name in ("ASAM", "LookSAM", "EfficientSAM", "MomentumSAM", "MemoryEfficientSAM"):
        assert getattr(ascent, name) is getattr(compat, name) and issubclass(getattr(compat, name), flatmin.SAM)
    assert not hasattr(ascent, "XSAM")


def test_asam_is_the_adaptive_form_with_a_radius_of_two():
    weights = []
    for make in (lambda p: ASAM(p, SGD, **OPTIONS), lambda p: flatmin.SAM(p, SGD, rho=2.0, adaptive=True, **OPTIONS)):
        model = build()
        optimizer = make(model.parameters())
        for t in range(3):
            optimizer.step(closure_of(optimizer, model, t))
        weights.append(flat(model))
    assert_same(*weights)


@pytest.mark.parametrize("adaptive", [False, True])
def test_the_gradient_norm_for_subclasses(adaptive):
    model = build()
    groups = [{"params": list(model.parameters())[:2], "adaptive": adaptive}, {"params": list(model.parameters())[2:]}]
    optimizer = SAM(groups, SGD, lr=0.1)
    loss_fn(model(batch(0)[0]), batch(0)[1]).backward()
    w = list(model.parameters())
    expected = norm([p.grad * (p.detach().abs() if adaptive and i < 2 else 1) for i, p in enumerate(w)])
    assert float(optimizer._grad_norm()) == pytest.approx(expected, rel=1e-12)


def test_looksam_says_which_steps_evaluate_twice():
    model = build()
    optimizer, said, paid = LookSAM(model.parameters(), SGD, k=3, **OPTIONS), [], []
    for t in range(7):
        calls = []
        said.append(optimizer.should_apply_sam())
        optimizer.step(closure_of(optimizer, model, t, calls))
        paid.append(len(calls) == 2)
        if t == 4:
            optimizer, model = pickle.loads(pickle.dumps((optimizer, model)))
    assert said == paid == [True, False, False] * 2 + [True]
    assert optimizer.k == 3 and optimizer.step_count == 7


@pytest.mark.parametrize("ratio", [0.5, 0.25, 0.01])
def test_efficient_sam_moves_the_tensors_with_the_largest_gradients(ratio):
    model = build()
    optimizer = EfficientSAM(model.parameters(), SGD, rho=0.1, perturbation_ratio=ratio, **OPTIONS)
    for t in range(2):
        moved, g = by_two_steps(optimizer, model, t)
        chosen = sorted(range(len(g)), key=lambda i: -float(g[i].norm()))[:max(1, int(ratio * len(g)))]
        size = norm([g[i] for i in chosen])
        for i, (d, t_) in enumerate(zip(moved, g, strict=True)):
            torch.testing.assert_close(d, 0.1 * t_ / size if i in chosen else torch.zeros_like(d))
    with pytest.raises(ValueError, match="fraction"):
        EfficientSAM(model.parameters(), SGD, perturbation_ratio=0.0, lr=0.1)


def operations(step):
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def deep(width=32, depth=16):
    torch.manual_seed(0)
    return nn.Sequential(*[layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.Tanh())])


def test_efficient_sam_costs_two_plain_steps():
    """What its docstring says; counted in floating-point operations."""
    model, x = deep(), torch.randn(8, 32)
    plain = operations(lambda: F.mse_loss(model(x), x).backward())
    optimizer = EfficientSAM(model.parameters(), SGD, lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), x)
        loss.backward()
        return loss
    assert operations(lambda: optimizer.step(closure)) / plain == pytest.approx(2.0, abs=0.01)


def test_momentum_sam_with_its_own_average_is_that_of_sgd():
    """With momentum 0.9 and no weight decay, SGD's buffer is the average times ten."""
    weights = []
    for own in (0.9, None):
        model, calls = build(), []
        optimizer = MomentumSAM(model.parameters(), SGD, rho=0.5, perturbation_momentum=own, **OPTIONS)
        for t in range(6):
            optimizer.step(closure_of(optimizer, model, t, calls))
        assert len(calls) == 6 and optimizer.perturbation_momentum == own
        weights.append(flat(model))
    assert torch.allclose(*weights, rtol=0, atol=1e-10)


@pytest.mark.parametrize("base,options", [(SGD, {"lr": 0.1}), (torch.optim.AdamW, {"lr": 0.01}),
                                          (torch.optim.RMSprop, {"lr": 0.01})])
def test_momentum_sam_needs_no_momentum_of_the_base_and_resumes_bitwise(base, options):
    def make(m):
        return MomentumSAM(m.parameters(), base, rho=0.5, perturbation_momentum=0.8, **options)

    model, other = build(), build(seed=1)
    optimizer, m = make(model), None
    for t in range(4):
        moved, _ = by_two_steps(optimizer, model, t)
        if m is None:
            assert not any(bool(d.any()) for d in moved)
        else:
            for d, average in zip(moved, m, strict=True):
                torch.testing.assert_close(d, -0.5 * average / norm(m))
        m = [optimizer.state[p]["perturbation_buffer"].clone() for p in model.parameters()]
    other.load_state_dict(model.state_dict())
    resumed = make(other)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for t in range(4, 7):
        optimizer.step(closure_of(optimizer, model, t))
        resumed.step(closure_of(resumed, other, t))
    assert_same(flat(other), flat(model))


def peak(step):
    """The largest number of bytes held at once beyond those held before; garbage of other tests is freed first."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    changes = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = largest = 0
    for event in sorted(changes, key=lambda e: e.start_ns()):
        held += event.nbytes()
        largest = max(largest, held)
    return largest


def test_the_checkpointed_step_holds_less_and_is_the_same_step():
    """As the docstring says, for 16 pairs of layers: 0.7 of SAM's peak with two segments, 0.6 with four."""
    x, weights, peaks = torch.randn(1024, 32), [], []
    for segments in (None, 2, 4):
        model = deep()
        model.insert(2, nn.BatchNorm1d(32))
        model.insert(5, nn.Dropout(0.1))
        optimizer = (SAM if segments is None else MemoryEfficientSAM)(
            model.parameters(), SGD, lr=0.1, **({} if segments is None else {"checkpoint_segments": segments}))

        def closure(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = F.mse_loss(model(x), x)
            loss.backward()
            return loss

        def step(model=model, optimizer=optimizer, closure=closure, segments=segments):
            torch.manual_seed(7)
            if segments is None:
                return float(optimizer.step(closure).detach())
            return optimizer.step_with_checkpointing(model, x, x, F.mse_loss)

        losses = [step()]
        assert int(model[2].num_batches_tracked) == (2 if segments is None else 1)
        peaks.append(peak(step))
        weights.append((flat(model), losses))
    for (found, losses) in weights[1:]:
        assert losses == weights[0][1]
        assert torch.allclose(found, weights[0][0], rtol=0, atol=1e-12)
    assert 0.6 < peaks[1] / peaks[0] < 0.8 and 0.5 < peaks[2] / peaks[0] < 0.7
    with pytest.raises(ValueError, match="nn.Sequential.*step\\(closure\\)"):
        optimizer.step_with_checkpointing(nn.Linear(32, 32), x, x, F.mse_loss)


# --- running statistics

@pytest.mark.parametrize("layer", [lambda: nn.BatchNorm1d(6, momentum=0.01), lambda: nn.BatchNorm1d(6, momentum=None),
                                   lambda: nn.SyncBatchNorm(6), lambda: nn.BatchNorm1d(6, track_running_stats=False)])
def test_running_statistics_are_switched_off_and_on(layer):
    model, x = nn.Sequential(layer()), torch.randn(8, 6, 4)
    if isinstance(model[0], nn.SyncBatchNorm):
        before = model[0].momentum
        disable_running_stats(model)
        assert not model[0].track_running_stats and model[0].momentum == before     # its forward needs a process group
        return
    momentum, kept = model[0].momentum, model[0].track_running_stats
    model(x)
    before, expected = copy.deepcopy(model.state_dict()), model(x)
    model.load_state_dict(before)
    disable_running_stats(model)
    disable_running_stats(model)
    assert_same(model(x), expected)         # still the statistics of the batch
    assert all(map(torch.equal, model.state_dict().values(), before.values()))
    enable_running_stats(model)
    assert model[0].momentum == momentum and model[0].track_running_stats == kept
    model(x)
    assert all(map(torch.equal, model.state_dict().values(), before.values())) == (not kept)


# --- the functions

def test_the_functions_on_a_model():
    model, (x, y) = build(), batch(0)
    model.train()
    before = flat(model)
    H = dense_hessian(flatmin.Objective(model, loss_fn, (x, y)))
    v = torch.randn(len(before))
    torch.testing.assert_close(compute_hessian_vector_product(model, loss_fn, x, y, v), H @ v)
    assert power_iteration_top_eigenvalue(model, loss_fn, x, y) == pytest.approx(
        float(torch.linalg.eigvalsh(H)[-1]), rel=1e-6)
    step = flatmin.sharpness.one_step(flatmin.Objective(model, loss_fn, (x, y)), 0.05)
    assert compute_sam_sharpness(model, loss_fn, x, y) == step.value and type(step.value) is float
    assert_same(flat(model), before)
    assert model.training


def test_the_top_eigenvalue_is_the_largest_and_not_the_largest_in_magnitude():
    model = nn.Linear(2, 1, bias=False)

    def loss(z, y):
        return 0.5 * (model.weight[0, 0] ** 2 - 5 * model.weight[0, 1] ** 2) + 0 * z.mean()

    assert power_iteration_top_eigenvalue(model, loss, torch.ones(8, 2), torch.ones(8)) == pytest.approx(1.0)


def test_accumulation_is_the_step_of_the_merged_batches():
    data = [(x[:n], y[:n]) for n, (x, y) in zip((8, 5, 8, 3, 8), map(batch, range(5)), strict=True)]
    model, other = build(), build()
    optimizer = SAM(model.parameters(), SGD, rho=0.1, **OPTIONS)
    loss = train_sam_with_accumulation(model, iter(data), optimizer, accumulation_steps=2)
    merged, losses = SAM(other.parameters(), SGD, rho=0.1, **OPTIONS), []
    for group in (data[:2], data[2:4], data[4:]):
        x, y = (torch.cat(t) for t in zip(*group, strict=True))

        def closure(x=x, y=y):
            merged.zero_grad()
            value = F.cross_entropy(other(x), y)
            value.backward()
            return value
        losses.append((len(x), float(merged.step(closure).detach())))
    assert torch.allclose(flat(model), flat(other), rtol=0, atol=1e-12)
    assert loss == pytest.approx(sum(n * v for n, v in losses) / 32)
    assert math.isnan(train_sam_with_accumulation(model, [], optimizer))
    with pytest.raises(ValueError, match="accumulation_steps"):
        train_sam_with_accumulation(model, data, optimizer, accumulation_steps=0)


def test_accumulation_moves_statistics_once():
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    train_sam_with_accumulation(model, [batch(0), batch(1)], SAM(model.parameters(), SGD, **OPTIONS), 2)
    assert int(model[1].num_batches_tracked) == 2


def by_rank(kind, rank):
    """Two epochs in this rank; the twin takes both ranks' gradients by itself."""
    torch.set_default_dtype(torch.float64)
    model, twin = build(), build()
    data = [[batch(2 * t + r) for t in range(2)] for r in range(2)]
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = SAM(wrapped.parameters(), SGD, rho=0.5, **OPTIONS)
    for _ in range(2):
        train_sam_distributed(wrapped, data[rank], optimizer)
    base, w = SGD(twin.parameters(), **OPTIONS), list(twin.parameters())
    for t in [0, 1] * 2:
        start, total = [p.detach().clone() for p in w], [torch.zeros_like(p) for p in w]
        for x, y in (data[0][t], data[1][t]):
            g = torch.autograd.grad(F.cross_entropy(twin(x), y), w)
            with torch.no_grad():
                for p, d in zip(w, g, strict=True):
                    p.add_(0.5 * d / norm(g))
            g = torch.autograd.grad(F.cross_entropy(twin(x), y), w)
            with torch.no_grad():
                for p, s, a, d in zip(w, start, total, g, strict=True):
                    p.copy_(s)
                    a.add_(d / 2)
        for p, a in zip(w, total, strict=True):
            p.grad = a
        base.step()
    return float((flat(model) - flat(twin)).abs().max())


def worker(rank, folder):
    two_ranks.run(rank, folder, ["ddp"], lambda kind: [("by_rank", by_rank, ())], 120)


def test_each_rank_perturbs_by_its_own_gradient(tmp_path):
    launched = two_ranks.launch(worker, str(tmp_path), ["ddp"])
    assert all(difference < 1e-12 for _, difference in two_ranks.results(launched, "ddp", "by_rank"))


def test_distributed_training_needs_the_wrapper():
    model = build()
    with pytest.raises(ValueError, match="DistributedDataParallel"):
        train_sam_distributed(model, [batch(0)], SAM(model.parameters(), SGD, lr=0.1))
