"""Surfaces in closed form, true axes, untouched models."""

import pytest
import torch

from flatmin import Objective
from flatmin.landscape import line, surface
from problems import ConvNet, NoisyNet, RolesNet, Vector, assert_same, batch, build, flat, loss_fn


def quadratic(a, w):
    """½ wᵀAw as an objective of a bare vector."""
    return Objective(Vector(w), lambda out, _: 0.5 * out @ a @ out, [torch.zeros(1)],
                     forward=lambda model, _: model(), weight=lambda _: 1)


def symmetric(n, seed=0):
    m = torch.randn(n, n, generator=torch.Generator().manual_seed(seed))
    return m @ m.T + torch.eye(n)


def as_vector(d):
    return torch.cat([t.reshape(-1) for t in d])


def test_the_surface_of_a_quadratic_is_the_quadratic():
    a, w = symmetric(7), torch.randn(7)
    s = surface(quadratic(a, w), 9, directions="random", radius=2.0)
    d1, d2 = map(as_vector, s.directions)
    for i, x in enumerate(s.x):
        for j, y in enumerate(s.y):
            v = w + x * d1 + y * d2
            assert s.values[i, j] == pytest.approx(float(0.5 * v @ a @ v), rel=1e-12)


def test_the_line_of_a_quadratic_is_a_parabola():
    a, w = symmetric(5), torch.randn(5)
    found = line(quadratic(a, w), "gradient", steps=11, radius=0.5)
    d = a @ w / (a @ w).norm()
    want = [float(0.5 * (w + x * d) @ a @ (w + x * d)) for x in found.x]
    assert found.values.tolist() == pytest.approx(want, rel=1e-12)


def test_eigenvector_directions_show_the_eigenvalues():
    a, w = symmetric(8), torch.zeros(8)
    s = surface(quadratic(a, w), 3, directions="eigenvectors", radius=1.0)
    top = torch.linalg.eigvalsh(a).flip(0)
    assert s.values[2, 1] == pytest.approx(float(top[0]) / 2, rel=1e-4)
    assert s.values[1, 2] == pytest.approx(float(top[1]) / 2, rel=1e-4)


@pytest.mark.parametrize("steps", [1, 3, 5, 41, 51])
def test_l4_axes_are_true_displacements(steps):
    """Both ends are reached exactly, the axis is symmetric, and holds w itself."""
    objective = Objective(build(RolesNet), loss_fn, batch(0))
    before = flat(objective.model)
    seen = []
    objective.loss_fn = lambda z, y: (seen.append(flat(objective.model)), loss_fn(z, y))[1]
    found = line(objective, steps=steps, radius=0.7)
    walked = seen[-steps:]
    assert torch.equal(found.x, -found.x.flip(0))
    for x, w in zip(found.x, walked, strict=True):
        assert float((w - before).norm()) == pytest.approx(abs(float(x)), abs=1e-13)
    if steps > 1:
        assert float(found.x[0]) == -0.7 and float(found.x[-1]) == 0.7
    assert found.x[steps // 2] == 0
    assert_same(walked[steps // 2], before)


def test_l6_l11_every_point_is_set_from_the_exact_weights():
    """Row by row at w + x d₁ + y d₂ with the coordinates it is filed under, without drift."""
    model = build(RolesNet, dtype=torch.float32)
    w = flat(model)
    seen = []
    x, y = batch(0, dtype=torch.float32)
    objective = Objective(model, lambda z, t: (seen.append(flat(model)), loss_fn(z, t))[1], (x, y))
    s = surface(objective, 5, radius=3.0)
    d1, d2 = map(as_vector, s.directions)
    points = iter(seen[-25:])
    for i in range(5):
        for j in range(5):
            want = torch.add(torch.add(w, d1, alpha=float(s.x[i])), d2, alpha=float(s.y[j]))
            assert_same(next(points), want, f"{i} {j}")


def test_l2_the_same_grid_twice_is_bitwise_the_same():
    objective = Objective(build(RolesNet), loss_fn, batch(0))
    first, second = (surface(objective, 5, seed=3) for _ in range(2))
    assert_same(first.values, second.values)
    assert_same(as_vector(first.directions[1]), as_vector(second.directions[1]))
    assert not torch.equal(first.values, surface(objective, 5, seed=4).values)


def test_nan_and_infinity_are_kept():
    def loss(out, _):
        return torch.log(1 - out[0])

    objective = Objective(Vector([0.5, 0.5]), loss, [torch.zeros(1)], forward=lambda m, _: m(), weight=lambda _: 1)
    d1, d2 = [torch.tensor([1.0, 0.0])], [torch.tensor([0.0, 1.0])]
    s = surface(objective, 5, directions=[d1, d2], radius=2.0)
    assert s.values[-1].isnan().all()
    assert torch.isfinite(s.values[0]).all()
    t = surface(Objective(Vector([0.5, 0.5]), lambda out, _: 1 / out.sum().relu(), [torch.zeros(1)],
                          forward=lambda m, _: m(), weight=lambda _: 1), 3, directions=[d1, d2], radius=2.0)
    assert t.values[0, 0] == float("inf")


@pytest.mark.parametrize("cls", [NoisyNet, ConvNet, RolesNet])
@pytest.mark.parametrize("batch_norm", ["frozen", "reestimated"])
@pytest.mark.parametrize("fails", [False, True])
def test_l12_the_model_is_bitwise_what_it_was(cls, batch_norm, fails):
    model = build(cls).train()
    model.head.eval()
    loss_fn(model(batch(1)[0]), batch(1)[1]).backward()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    grads = [p.grad.clone() for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    momenta = [getattr(m, "momentum", None) for m in model.modules()]
    random = torch.get_rng_state()
    calls = []

    def loss(z, y):
        calls.append(1)
        if fails and len(calls) > 9:
            raise RuntimeError("in the middle")
        return loss_fn(z, y)

    objective = Objective(model, loss, [batch(0), batch(1, n=5)])
    if fails:
        with pytest.raises(RuntimeError, match="in the middle"):
            surface(objective, 3, batch_norm=batch_norm)
    else:
        surface(objective, 3, directions=["gradient", "filter"], batch_norm=batch_norm)
    for key, value in model.state_dict().items():
        assert_same(value, state[key], key)
    for p, g in zip(model.parameters(), grads, strict=True):
        assert_same(p.grad, g)
    assert [m.training for m in model.modules()] == modes
    assert [getattr(m, "momentum", None) for m in model.modules()] == momenta
    assert torch.equal(torch.get_rng_state(), random)


def test_error_bars_cover_the_draws():
    objective = Objective(build(RolesNet), loss_fn, batch(0))
    found = line(objective, "filter", steps=5, draws=6, seed=2)
    assert found.samples.shape == (6, 5)
    assert torch.allclose(found.values, found.samples.mean(0), rtol=1e-14)
    assert torch.allclose(found.stderr, found.samples.std(0) / 6**0.5)
    assert_same(found.samples[0], line(objective, "filter", steps=5, seed=2).values)
    assert found.stderr[2] == 0 and (found.stderr[[0, 4]] > 0).all()
    assert surface(objective, 3, draws=2).stderr.shape == (3, 3)
    with pytest.raises(ValueError, match="none of these is random"):
        line(objective, "gradient", draws=2)


def test_a_radius_counts_lengths_or_relative_units():
    objective = Objective(build(RolesNet), loss_fn, batch(0))
    lengths = surface(objective, 3, radius=1.5)
    assert lengths.x.tolist() == [-1.5, 0, 1.5]
    unit = surface(objective, 3)
    assert unit.x[-1] == pytest.approx(unit.units[0])
    matrices = [p for p in objective.parameters if p.dim() > 1]
    assert unit.units[0] == pytest.approx(sum(float(p.detach().square().sum()) for p in matrices) ** 0.5)
    assert_same(surface(objective, 3, radius=1.0, relative=True).values, unit.values)


def test_wrong_arguments_are_named():
    objective = Objective(build(RolesNet), loss_fn, batch(0))
    for arguments, message in [({"steps": 0}, "steps"), ({"radius": -1.0}, "radius"), ({"draws": 0}, "draws"),
                               ({"directions": "hessian"}, "'filter'"), ({"directions": ["filter"]}, "2 directions"),
                               ({"directions": "pca"}, "trajectory="), ({"batch_norm": "train"}, "batch_norm"),
                               ({"directions": [[torch.zeros(2)], "filter"]}, "one tensor for each")]:
        with pytest.raises(ValueError, match=message):
            surface(objective, **{"steps": 3, **arguments})


def test_vectors_alone_fall_back_to_plain_directions():
    with pytest.warns(UserWarning, match="no tensor of two dimensions"):
        s = surface(quadratic(symmetric(4), torch.randn(4)), 3)
    assert s.x.tolist() == [-1, 0, 1]




def test_what_is_printed_is_short_and_names_ranges():
    shown = repr(surface(quadratic(symmetric(7), torch.randn(7)), 9, directions="random", radius=2.0))
    assert shown.startswith("Surface(9 × 9 points, x -2 to 2, y -2 to 2, loss ") and len(shown) < 120
