"""Two gloo ranks equal one process: the paths of sharpness under DDP and FSDP2.

Nothing else sees a part that each rank keeps to itself, an influence of a batch counted twice, or a difference taken on
a shard. One launch of two processes runs everything; the tests only read what it wrote.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import two_ranks
from flatmin import Objective
from flatmin.curvature import Hessian
from flatmin.paths import preconditioned_spectrum, sharpness_paths
from flatmin.paths.standard_errors import NAMES
from two_ranks import wrap

DIFFERENCES = 1e-4      # what products under FSDP2 are
CUTS = [[(0, 3), (3, 5), (5, 9), (9, 10)], [(10, 14), (14, 17), (17, 18), (18, 20)]]


def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def samples():
    g = torch.Generator().manual_seed(0)
    return torch.randn(20, 4, generator=g, dtype=torch.float64), torch.randint(3, (20,), generator=g)


def loss(kind, model):
    """One that reaches weights beside the outputs."""
    return lambda z, y: nn.functional.cross_entropy(z, y) + sum(p.square().sum() for p in model.parameters())


def objectives(kind, rank, cuts=CUTS):
    x, y = samples()
    data = [[(x[a:b], y[a:b]) for a, b in rows] for rows in cuts]
    return (Objective(wrap(kind, net()), nn.CrossEntropyLoss(), data[rank]),
            Objective(net(), nn.CrossEntropyLoss(), data[0] + data[1]))


def trained(objective):
    """Adam's state from two gradients of the objective."""
    optimizer = torch.optim.Adam(objective.model.parameters(), lr=1e-2)
    for _ in range(2):
        for p, g in zip(objective.model.parameters(), objective.gradient(), strict=True):
            p.grad = g
        optimizer.step()
    optimizer.zero_grad()
    return optimizer


def off(a, b, names):
    return max(abs(getattr(a, n) - getattr(b, n)) / max(abs(getattr(b, n)), 1e-12) for n in names)


FIELDS = (*NAMES, "logit_curvature", "func_curvature", "gradient_norm", "loss", "batches")


def paths(kind, rank, direction, cuts=CUTS):
    ours, theirs = objectives(kind, rank, cuts)
    options = {"direction": direction, "per_layer": True, "keep_vectors": True}
    a = sharpness_paths(ours, optimizer=trained(ours), **options)
    b = sharpness_paths(theirs, optimizer=trained(theirs), **options)
    assert list(a.layers) == list(b.layers)
    worst = max(off(a, b, FIELDS), *(off(x, y, ("tau_logit", "tau_func", "tau_cross")) for x, y in
                                     zip(a.layers.values(), b.layers.values(), strict=True) if y.tau_func > 1e-9))
    if kind == "ddp":
        assert a.product_error is None and set(a.errors) == set(NAMES)
        worst = max(worst, off(a, b, ("gradient_noise",)),
                    *(abs(a.errors[n] / b.errors[n] - 1) for n in NAMES))
        whole = Hessian(ours).matvec(a.direction)
        for h, x, y in zip(whole, a.delta_logit, a.delta_func, strict=True):
            assert torch.allclose(h, x + y, atol=1e-12)
    else:
        assert 0 < a.product_error < DIFFERENCES and not a.errors
    return worst, 1e-9 if kind == "ddp" else DIFFERENCES


def along_the_gradient(kind, rank):
    return paths(kind, rank, "gradient")


def preconditioned(kind, rank):
    return paths(kind, rank, "preconditioned")


def unequal_numbers_of_batches(kind, rank):
    cuts = [CUTS[0], [(10, 12), (12, 14), (14, 16), (16, 17), (17, 20)]]
    return paths(kind, rank, "gradient", cuts)


def spectra(kind, rank):
    ours, theirs = objectives(kind, rank)
    a = preconditioned_spectrum(ours, trained(ours), k=3, tol=1e-6 if kind == "ddp" else 1e-4, certify=False)
    b = preconditioned_spectrum(theirs, trained(theirs), k=3, tol=1e-6, certify=False)
    return off(a, b, ("gradient_share", "direction_share", "metric_share", "chance")), 1e-6 if kind == "ddp" else 1e-3


def refused(kind, rank):
    model = wrap(kind, net())
    x, y = samples()
    with pytest.raises(ValueError, match="beside the outputs"):
        sharpness_paths(Objective(model, loss(kind, model), [(x[rank::2], y[rank::2])]))
    return 0.0, 0.0


CHECKS = [along_the_gradient, preconditioned, unequal_numbers_of_batches, spectra, refused]
KINDS = ("ddp", "fsdp")


def worker(rank, folder):
    two_ranks.run(rank, folder, KINDS, lambda kind: [(c.__name__, c, ()) for c in CHECKS], seconds=60)


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    return two_ranks.launch(worker, str(tmp_path_factory.mktemp("ranks")), KINDS)


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_equal_one_process(launched, kind, check):
    for rank, (error, allowed) in two_ranks.results(launched, kind, check.__name__):
        assert error <= allowed, f"rank {rank}: off by {error:.1e}, {allowed:.1e} is allowed"
