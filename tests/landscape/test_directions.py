"""Directions: norms of filters, orthogonality, invariance, and what other tools got wrong."""

import pytest
import torch
from torch import nn

from flatmin import Objective
from flatmin.landscape import line, random_direction, surface
from flatmin.vectors import Space
from problems import ConvNet, NoisyNet, RolesNet, assert_same, batch, build, loss_fn


def filters(t):
    return t.reshape(t.shape[0], -1).norm(dim=1)


@pytest.mark.parametrize("cls", [RolesNet, ConvNet])
def test_filter_norms_are_those_of_the_weights(cls):
    w = [p.detach() for p in build(cls).parameters()]
    first = random_direction(w, 0)
    second = random_direction(w, 1, orthogonal_to=[first])
    for d in (first, second):
        for p, t in zip(w, d, strict=True):
            if p.dim() > 1:
                assert torch.allclose(filters(t), filters(p), rtol=1e-12)
    for p, a, b in zip(w, first, second, strict=True):
        if p.dim() > 1:
            assert (a * b).reshape(len(p), -1).sum(1).abs().max() < 1e-12


def test_l17_tensors_of_one_dimension_get_zero():
    w = [p.detach() for p in build(NoisyNet).parameters()]
    assert all((d == 0).all() == (p.dim() < 2) for p, d in zip(w, random_direction(w, 0), strict=True))
    layer = random_direction(w, 0, normalize="layer")
    assert all(torch.allclose(d.norm(), p.norm()) for p, d in zip(w, layer, strict=True) if p.dim() > 1)


@pytest.mark.parametrize("kind", ["filter", "layer", "random", ["gradient", "filter"], "eigenvectors"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_l1_directions_are_orthonormal(kind, dtype):
    x, y = batch(0, dtype=dtype)
    s = surface(Objective(build(RolesNet, dtype=dtype), loss_fn, (x, y)), 1, directions=kind)
    d1, d2 = (torch.cat([t.double().reshape(-1) for t in d]) for d in s.directions)
    tight = 1e-12 if dtype == torch.float64 else 1e-6
    assert abs(float(d1 @ d2)) < tight
    assert abs(float(d1.norm()) - 1) < tight and abs(float(d2.norm()) - 1) < tight


def test_l1_a_million_coordinates_are_orthogonal():
    w = [torch.ones(1000, 1000, dtype=torch.float32)]
    a = random_direction(w, 0)
    b = random_direction(w, 1, orthogonal_to=[a])
    space = Space(w)
    assert abs(float(space.dot(a, b) / space.norm(a) / space.norm(b))) < 1e-7


def test_collinear_and_empty_directions_are_refused():
    objective = Objective(build(RolesNet), loss_fn, batch(0))
    d = [torch.randn_like(p) for p in objective.parameters]
    with pytest.raises(ValueError, match="lies within"):
        surface(objective, 3, directions=[d, [-2 * t for t in d]])
    with pytest.raises(ValueError, match="length 0"):
        surface(objective, 3, directions=[d, [0 * t for t in d]])
    with pytest.raises(ValueError, match='"gradient" is one direction: pass another kind with it'):
        surface(objective, 3, directions="gradient")
    with pytest.raises(ValueError, match="no direction is left"):
        random_direction([torch.randn(3)], 0)


def test_a_rescaled_relu_network_looks_the_same():
    """W₁ · 4, W₂ / 4: the filter-normalised plot stays, the plain one does not."""
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 3, bias=False))
    data = batch(0)
    before = [surface(Objective(model, loss_fn, data), 5, directions=kind).values for kind in ("filter", "random")]
    with torch.no_grad():
        model[0].weight.mul_(4)
        model[2].weight.div_(4)
    after = [surface(Objective(model, loss_fn, data), 5, directions=kind).values for kind in ("filter", "random")]
    assert torch.allclose(before[0], after[0], rtol=1e-12)
    assert not torch.allclose(before[1], after[1], rtol=1e-2)


def test_l15_l16_eigenvector_directions_average_over_batches_and_hold_every_parameter():
    """However the data are cut, the direction and the loss are those of the whole; biases take part."""
    x, y = batch(0)
    whole, cut = (line(Objective(build(RolesNet), loss_fn, data), "eigenvectors", steps=5, radius=0.1)
                  for data in ((x, y), [(x[:5], y[:5]), (x[5:7], y[5:7]), (x[7:], y[7:])]))
    cosine = sum(float((a * b).sum()) for a, b in zip(whole.direction, cut.direction, strict=True))
    assert abs(cosine) == pytest.approx(1, abs=1e-3)
    assert sorted(cut.values[[0, 4]].tolist()) == pytest.approx(sorted(whole.values[[0, 4]].tolist()), rel=1e-4)
    names = [n for n, _ in build(RolesNet).named_parameters()]
    assert all(t.abs().max() > 0 for n, t in zip(names, whole.direction, strict=True) if "bias" in n or "post" in n)


def test_l20_running_statistics_are_no_coordinates():
    model = build(NoisyNet).train()
    for step in range(5):
        model(batch(step)[0])
    s = surface(Objective(model, loss_fn, batch(0)), 9)
    assert s.values.isfinite().all()
    assert len(s.directions[0]) == len(list(model.parameters()))


def test_reestimated_statistics_are_those_of_the_data():
    """With one batch, evaluating with its own statistics but the unbiased variance."""
    model = build(NoisyNet)
    x, y = batch(0)
    found = line(Objective(model, loss_fn, (x, y)), "filter", steps=3, batch_norm="reestimated")
    h = model.first(x)
    model.norm.running_mean.copy_(h.mean(0).detach())
    model.norm.running_var.copy_(h.var(0).detach())
    assert float(found.values[1]) == pytest.approx(float(Objective(model, loss_fn, (x, y)).value()), rel=1e-12)


def test_seeds_and_generators():
    w = [torch.randn(4, 4)]
    assert_same(random_direction(w, 5)[0], random_direction(w, torch.Generator().manual_seed(5))[0])
    state = torch.get_rng_state()
    random_direction(w, 5)
    assert torch.equal(state, torch.get_rng_state())
