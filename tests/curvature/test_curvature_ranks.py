"""Two gloo ranks equal one process: values, gradients, products, spectra and traces under DDP and FSDP2.

Each rank holds its share of the data, unequal in batches and in valid targets, so that means of means show. Nothing
else sees a product that is not reduced, a rank's own random probes, a dot product over a shard, ranks that wait for
each other because one has a batch less, or weights that a displacement leaves where the next gather does not look.

One launch of two processes runs everything; the tests only read what it wrote.
"""

from __future__ import annotations

import os
import tempfile

import pytest
import torch
import torch.distributed as dist
from torch import nn

import two_ranks
from flatmin import Objective, parallel
from flatmin.curvature import (
    Fisher,
    FunctionalPart,
    GaussNewton,
    Hessian,
    diagonal,
    eigenpairs,
    spectral_density,
    trace,
)
from nets import mlp, samples
from two_ranks import WORLD

DTYPES = {"float64": torch.float64, "float32": torch.float32}


def parts(dtype):
    """One batch for rank 0, three for rank 1; one target is ignored."""
    x, y = samples(21)
    cuts = [[(0, 7)], [(7, 12), (12, 19), (19, 21)]]
    return [[(x[a:b].to(dtype), y[a:b]) for a, b in rows] for rows in cuts]


class Around(nn.Module):
    """A model that contains a wrapped one."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return 2 * self.inner(x)


def net(dtype):
    model = mlp(dtype=dtype)
    model.insert(1, nn.BatchNorm1d(8, dtype=dtype))
    return model


def wrap(kind, model):
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    names = {"mesh_dim_names": ("replicate", "shard")} if kind == "mesh" else {}
    mesh = init_device_mesh("cpu", (WORLD, 1) if kind == "mesh" else (WORLD,), **names)
    for child in model:
        if any(True for _ in child.parameters()):
            fully_shard(child, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def objectives(kind, rank, dtype=torch.float64, around=False, loss=None, mode="eval"):
    """Over this rank's share, and in one process over everything."""
    loss = loss or nn.CrossEntropyLoss()
    data = parts(dtype)
    models = wrap(kind, net(dtype)), net(dtype)
    if around:
        models = [Around(m) for m in models]
    return (Objective(models[0], loss, data[rank], mode=mode), Objective(models[1], loss, data[0] + data[1], mode=mode))


def full(tensors):
    return torch.cat([(t.full_tensor() if hasattr(t, "full_tensor") else t).detach().reshape(-1) for t in tensors])


def off(a, b):
    return float((a - b).norm() / b.norm())


def agreed(*tensors):
    """The ranks hold the same numbers, bit for bit."""
    for t in tensors:
        other = [torch.empty_like(t) for _ in range(WORLD)]
        dist.all_gather(other, t.contiguous())
        assert torch.equal(*other)


def whole(operator, flat):
    return full(operator.split(flat))


# --- what runs on the ranks: returns (error, allowed) -----------------------------------------------------------------

def value_and_gradient(kind, rank, dtype):
    ours, theirs = objectives(kind, rank, dtype)
    value, g = ours.value(), full(ours.gradient())
    agreed(value, g)
    assert all(a.shape == p.shape for a, p in zip(ours.gradient(), ours.model.parameters(), strict=True))
    return max(off(g, full(theirs.gradient())), abs(float(value / theirs.value()) - 1)), exactly(dtype)


def gradient_of_a_measure(kind, rank, dtype):
    """The lean gradient that sharpness measures take."""
    ours, theirs = objectives(kind, rank, dtype)
    a, b = (o.evaluate(gradient=True) for o in (ours, theirs))
    assert a.samples == b.samples
    mine = full([parallel.like(g, p) for g, p in zip(a.gradient, ours.parameters, strict=True)])
    agreed(mine)
    return off(mine, full(b.gradient)), exactly(dtype)


def exactly(dtype):
    return 1e-12 if dtype == torch.float64 else 1e-6


def products(kind, rank, dtype):
    worst = 0.0
    for around in (False, True):
        ours, theirs = objectives(kind, rank, dtype, around)
        for make in (Hessian, GaussNewton, FunctionalPart, lambda o: Fisher(o, kind="exact"),
                     lambda o: Fisher(o, kind="empirical"), lambda o: Hessian(o, product="forward"),
                     lambda o: Hessian(o, product="recomputed"), lambda o: 2 * Hessian(o) - GaussNewton(o)):
            a, b = make(ours), make(theirs)
            v = b.random(torch.Generator().manual_seed(3))
            assert torch.equal(v, a.random(torch.Generator().manual_seed(3)))
            product = a @ v
            agreed(product)
            worst = max(worst, off(product, b @ v))
    return worst, exactly(dtype)


def spectrum(kind, rank, dtype):
    ours, theirs = (Hessian(o) for o in objectives(kind, rank, dtype))
    tol = 1e-9 if dtype == torch.float64 else 1e-5
    a, b = (eigenpairs(o, 4, "both", tol=tol) for o in (ours, theirs))
    agreed(a.eigenvalues, a.eigenvectors)
    assert bool(a.converged.all()) and a.certified and a.batches == b.batches == 4
    v = theirs.random(torch.Generator().manual_seed(3))
    mine, others = (o.matvec_with_forms(v)[1] for o in (ours, theirs))     # batch by batch, of all ranks
    agreed(*mine)
    assert torch.equal(mine[0].sort().values, others[0].sort().values)
    forms = off(mine[1].sort().values, others[1].sort().values)
    return max(off(a.eigenvalues, b.eigenvalues), forms), exactly(dtype)


def estimates(kind, rank, dtype):
    ours, theirs = (Hessian(o) for o in objectives(kind, rank, dtype))
    pairs = [(trace(o, max_matvecs=12, rtol=1e-9, method=method).value, diagonal(o, max_matvecs=5).relative_error,
              spectral_density(o, probes=1, steps=6).trace.value)
             for o in (ours, theirs) for method in ("hutchinson", "hutch++", "xtrace")]
    mine, others = torch.tensor(pairs[:3]), torch.tensor(pairs[3:])
    agreed(mine)
    return off(mine, others), 10 * exactly(dtype)


def differences(kind, rank, dtype):
    """Products under FSDP2 (or DDP) against the exact ones of one process, within the error that the record states."""
    ours, theirs = objectives(kind, rank, dtype)
    before, grads = full(ours.model.parameters()), []
    for p in ours.model.parameters():
        p.grad = torch.ones_like(p)
        grads.append(p.grad)
    a, b = Hessian(ours, product="finite_difference"), Hessian(theirs)
    v = b.random(torch.Generator().manual_seed(3))
    u = a.random(torch.Generator().manual_seed(3))
    assert torch.equal(whole(a, u), v)
    assert abs(a.norm(u) / float(v.norm()) - 1) < 1e-6 and abs(a.dot(u, u) / float(v @ v) - 1) < 1e-6
    product = whole(a, a @ u)
    agreed(product)
    assert torch.equal(full(ours.model.parameters()), before), "weights were not restored"
    assert all(p.grad is g and bool((g == 1).all()) for p, g in zip(ours.model.parameters(), grads, strict=True))
    as_list = full(a @ a.split(u))
    return max(off(product, b @ v), off(as_list, b @ v)), 3 * a.describe()["product_error"]


def differences_of_outputs(kind, rank, dtype):
    """What goes through the outputs, where the model's own outputs carry the hooks that gather weights."""
    worst, allowed = 0.0, 0.0
    for around in (False, True):
        ours, theirs = objectives(kind, rank, dtype, around)
        before = full(ours.model.parameters())
        for make in (GaussNewton, FunctionalPart, lambda o, **k: Fisher(o, kind="exact", **k),
                     lambda o, **k: Fisher(o, kind="empirical", **k)):
            a, b = make(ours, **({"product": "finite_difference"} if kind == "ddp" else {})), make(theirs)
            assert a.product == "finite_difference"
            v, u = (o.random(torch.Generator().manual_seed(3)) for o in (b, a))
            product = whole(a, a @ u)
            agreed(product)
            worst, allowed = max(worst, off(product, b @ v)), max(allowed, 3 * a.describe()["product_error"])
        assert torch.equal(full(ours.model.parameters()), before), "weights were not restored"
    return worst, allowed


class OwnLoss(nn.Module):
    """A model whose forward returns its loss beside the logits, both outputs of the wrapped module."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, labels):
        logits = self.inner(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def a_model_with_its_own_loss(kind, rank, dtype):
    from torch.distributed.fsdp import fully_shard

    data = [[{"x": x, "labels": y} for x, y in rows] for rows in parts(dtype)]
    model = OwnLoss(net(dtype))
    fully_shard(model.inner)
    ours = Objective(fully_shard(model), None, data[rank])
    theirs = Objective(OwnLoss(net(dtype)), None, data[0] + data[1])
    worst, allowed = 0.0, 0.0
    for make in (GaussNewton, Fisher, FunctionalPart, Hessian):
        a, b = make(ours), make(theirs)
        v, u = (o.random(torch.Generator().manual_seed(3)) for o in (b, a))
        worst = max(worst, off(whole(a, a @ u), b @ v))
        allowed = max(allowed, 3 * a.describe()["product_error"])
    return worst, allowed


def sharded_pairs(ours, theirs, dtype):
    """The top of the sharded and of the whole matrix, and what their eigenvalues may differ by."""
    tol = 1e-5 if dtype == torch.float64 else 1e-2
    a, b = eigenpairs(ours, 2, tol=tol), eigenpairs(theirs, 2, tol=1e-5)
    assert a.settings["product"] == "finite_difference" and bool(a.converged.all())
    agreed(a.eigenvalues, a.residuals)
    return a, b, 2 * a.settings["product_error"] + tol**2


def sharded_gauss_newton(kind, rank, dtype):
    a, b, allowed = sharded_pairs(*map(GaussNewton, objectives(kind, rank, dtype)), dtype)
    return off(a.eigenvalues, b.eigenvalues), allowed


def sharded_spectrum(kind, rank, dtype):
    ours, theirs = map(Hessian, objectives(kind, rank, dtype))
    a, b, allowed = sharded_pairs(ours, theirs, dtype)
    top = float(b.eigenvalues.abs().max())
    x = whole(ours, a.eigenvectors[-1].clone())
    truth = theirs @ x - a.largest * x
    assert float(truth.norm()) < 2 * (float(a.residuals[-1]) + a.settings["product_error"] * top)
    return float((a.eigenvalues - b.eigenvalues).abs().max()) / top, allowed


def sharded_trace(kind, rank, dtype):
    ours, theirs = (Hessian(o) for o in objectives(kind, rank, dtype))
    a, b = (trace(o, max_matvecs=10, rtol=1e-9) for o in (ours, theirs))
    size = (theirs.size * float((theirs.dense() ** 2).sum())) ** 0.5     # ‖z‖ ‖Hz‖ for signs z
    return abs(a.value - b.value) / size, 3 * ours.describe()["product_error"]


def exact_is_refused(kind, rank, dtype):
    ours, _ = objectives(kind, rank, dtype)
    for make in (Hessian, GaussNewton, Fisher, FunctionalPart):
        with pytest.raises(ValueError, match='no exact matvecs under FSDP2.*product="auto" takes differences'):
            make(ours, product="cached")
    with pytest.raises(ValueError, match="no rank can hold the dense matrix"):
        Hessian(ours).dense()
    return 0.0, 0.0


def sums_of_losses(kind, rank, dtype):
    ours, theirs = objectives(kind, rank, dtype, loss=nn.CrossEntropyLoss(reduction="sum"))
    return max(off(full(ours.gradient()), full(theirs.gradient())),
               abs(float(ours.value() / theirs.value()) - 1)), exactly(dtype)


def training_goes_on(kind, rank, dtype):
    """Measuring between two steps changes nothing: the reducer, the sharding and the buffers are as they were."""
    runs = []
    for measured in (False, True):
        torch.manual_seed(rank)
        ours, _ = objectives(kind, rank, dtype)
        ours.model.train()
        x, y = parts(dtype)[rank][0]
        optimizer = torch.optim.SGD(ours.model.parameters(), lr=0.1)
        for _ in range(3):
            nn.functional.cross_entropy(ours.model(x), y).backward()
            if measured:
                eigenpairs(Hessian(ours), tol=0.1)
                for make in (GaussNewton, FunctionalPart):
                    a = make(ours, product="finite_difference")
                    a @ a.random(torch.Generator().manual_seed(3))
                ours.gradient()
            optimizer.step()
            optimizer.zero_grad()
            if measured:
                ours.value()
        runs.append(torch.cat([full(ours.model.parameters()), full(list(ours.model.buffers()))]))
    assert torch.equal(*runs)
    return 0.0, 0.0


def a_rank_without_data(kind, rank, dtype):
    ours, theirs = objectives(kind, rank, dtype)
    x, y = parts(dtype)[0][0]
    nothing = (x, torch.full_like(y, -100))
    ours.data = [nothing] if rank else [(x, y)]
    theirs.data = [(x, y)]
    if kind != "ddp":
        with pytest.raises(ValueError, match="give each at least one"):
            ours.value()
        return 0.0, 0.0
    v = torch.ones(Hessian(ours).size, dtype=dtype)
    return max(off(Hessian(ours) @ v, Hessian(theirs) @ v), off(full(ours.gradient()), full(theirs.gradient())),
               abs(float(ours.value() / theirs.value()) - 1)), exactly(dtype)


def goes_on_after_a_kill(kind, rank, dtype):
    """Each rank from its own file, to the same bits; all from the start where one has lost its file."""
    folder = [tempfile.mkdtemp() if rank == 0 else None]
    dist.broadcast_object_list(folder)
    file = os.path.join(folder[0], "run.pt")
    operator = Hessian(objectives(kind, rank, dtype)[0])
    multiply, calls = operator._matvec, []

    def dying(*v):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return multiply(*v)

    def run(checkpoint):
        found = eigenpairs(operator, 2, tol=1e-2, checkpoint=checkpoint)
        return torch.cat([found.eigenvalues, found.residuals, torch.tensor([float(found.matvecs)])])

    operator._matvec = dying
    whole, results = None, []
    for lost in (False, True):
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            run(file)
        assert os.path.exists(f"{file}.1" if rank else file)
        dist.barrier()
        if lost and rank:
            os.remove(f"{file}.1")
        dist.barrier()
        results.append((run(file), len(calls)))
        whole = run(None)
        assert not os.path.exists(f"{file}.1" if rank else file)
    dist.barrier()
    if rank == 0:
        os.rmdir(folder[0])
    (found, few), (again, many) = results
    agreed(found, again)
    assert torch.equal(found, whole) and torch.equal(again, whole) and many > few
    return 0.0, 0.0


EVERYWHERE = [value_and_gradient, gradient_of_a_measure, differences, differences_of_outputs, sums_of_losses,
              training_goes_on, goes_on_after_a_kill, a_rank_without_data]
CHECKS = {"ddp": [*EVERYWHERE, products, spectrum, estimates],
          "fsdp": [*EVERYWHERE, sharded_spectrum, sharded_gauss_newton, sharded_trace, a_model_with_its_own_loss,
                   exact_is_refused],
          "mesh": [value_and_gradient, differences, differences_of_outputs, sharded_spectrum]}
CASES = [(kind, name, check) for kind in CHECKS for name in DTYPES for check in CHECKS[kind]]


def worker(rank, folder):
    two_ranks.run(rank, folder, CHECKS, lambda kind: [(f"{check.__name__}-{name}", check, (dtype,)) for name, dtype in
                                                      DTYPES.items() for check in CHECKS[kind]], seconds=30)


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    return two_ranks.launch(worker, str(tmp_path_factory.mktemp("ranks")), CHECKS)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name", "check"), CASES, ids=[f"{k}-{c.__name__}-{n}" for k, n, c in CASES])
def test_two_ranks_equal_one_process(launched, kind, name, check):
    for rank, (error, allowed) in two_ranks.results(launched, kind, f"{check.__name__}-{name}"):
        assert error <= allowed, f"rank {rank}: off by {error:.1e}, {allowed:.1e} is allowed"
