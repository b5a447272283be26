"""Lines and planes through several models, and training trajectories on them."""

import copy

import pytest
import torch

from flatmin import Objective
from flatmin.landscape import line, surface
from problems import FEATURES, NoisyNet, RolesNet, TiedNet, batch, build, flat, loss_fn


def trained(cls, seed, steps=15, keep=False):
    model, states = build(cls, seed).train(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.5)
    for step in range(steps):
        states.append(copy.deepcopy(model.state_dict()))
        optimizer.zero_grad()
        loss_fn(model(batch(step)[0]), batch(step)[1]).backward()
        optimizer.step()
    return (model, [*states, copy.deepcopy(model.state_dict())]) if keep else model


@pytest.mark.parametrize("cls", [RolesNet, NoisyNet])
@pytest.mark.parametrize("form", ["module", "state_dict", "wrapped"])
def test_lines_and_planes_hit_the_models_own_losses(cls, form):
    models = [trained(cls, seed) for seed in range(3)]
    want = [float(Objective(m, loss_fn, batch(9)).value()) for m in models]
    given = {"module": models, "state_dict": [m.state_dict() for m in models],
             "wrapped": [{"model": {f"module.{k}": v for k, v in m.state_dict().items()}} for m in models]}[form]
    objective = Objective(build(cls, 7), loss_fn, batch(9))
    between = line(objective, models=given[:2], steps=7)
    assert between.values[[0, -1]].tolist() == pytest.approx(want[:2], rel=1e-10)
    assert float(between.x[-1]) == pytest.approx(float((flat(models[1]) - flat(models[0])).norm()))
    for count in (1, 2, 3):
        s = surface(objective, 3, models=given[:count])
        assert s.model_values.tolist() == pytest.approx(want[:count], rel=1e-10)
        assert s.models.shape == (count, 2)
        for c in s.models:
            assert s.x[0] <= c[0] <= s.x[-1] and s.y[0] <= c[1] <= s.y[-1]


def test_parameter_lists_are_models_too():
    models = [trained(RolesNet, seed) for seed in range(2)]
    objective = Objective(build(RolesNet, 7), loss_fn, batch(9))
    found = line(objective, models=[[p.detach() for p in m.parameters()] for m in models], steps=3)
    assert float(found.values[-1]) == pytest.approx(float(Objective(models[1], loss_fn, batch(9)).value()), rel=1e-10)
    noisy = Objective(build(NoisyNet), loss_fn, batch(9))
    with pytest.warns(UserWarning, match="bare parameters"):
        line(noisy, models=[list(build(NoisyNet, s).parameters()) for s in (1, 2)], steps=3)
    tied = Objective(build(TiedNet), lambda z, y: z.square().mean(), batch(9))
    assert line(tied, models=[build(TiedNet).state_dict()], steps=3, direction="filter").values.isfinite().all()


def test_models_that_do_not_fit_are_named():
    objective = Objective(build(RolesNet), loss_fn, batch(0))
    state = build(RolesNet).state_dict()
    for models, message in [([{k: v for k, v in state.items() if k != "head.weight"}], "head.weight"),
                            ([{**state, "head.weight": torch.zeros(2, 8)}], "shape"), ([[torch.zeros(1)]], "tensors"),
                            ([state, state], "length 0"), ([state] * 4, "at most 3")]:
        with pytest.raises(ValueError, match=message):
            surface(objective, 3, models=models)
    frozen = build(RolesNet)
    frozen.head.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="is frozen"):
        surface(Objective(frozen, loss_fn, batch(0)), 3, models=[build(RolesNet, 3).state_dict()])


def test_l18_trajectories_lie_where_the_grid_says():
    """w + x d₁ + y d₂ + something orthogonal, of the stated length, is the checkpoint."""
    model, path = trained(RolesNet, 0, keep=True)
    objective = Objective(model, loss_fn, batch(9))
    for kind in ("pca", "filter", "update", [[torch.randn_like(p) * 5 for p in model.parameters()], "gradient"]):
        s = surface(objective, 3, directions=kind, trajectory=path)
        d1, d2 = (torch.cat([t.reshape(-1) for t in d]) for d in s.directions)
        for state, x, y, off in zip(path, s.trajectory.x, s.trajectory.y, s.trajectory.distance, strict=True):
            w = torch.cat([state[n].reshape(-1) for n, _ in model.named_parameters()])
            rest = w - flat(model) - x * d1 - y * d2
            assert float(rest.norm()) == pytest.approx(float(off), abs=1e-6)
            assert abs(float(rest @ d1)) < 1e-10 and abs(float(rest @ d2)) < 1e-10
            assert s.x[0] <= x <= s.x[-1] and s.y[0] <= y <= s.y[-1]
    assert s.project(objective, path).coordinates.shape == (16, 2)


def test_principal_directions_explain_what_an_svd_says():
    model, path = trained(RolesNet, 0, keep=True)
    s = surface(Objective(model, loss_fn, batch(9)), 3, directions="pca", trajectory=path)
    w = torch.stack([torch.cat([p[n].reshape(-1) for n, _ in model.named_parameters()]) for p in path])
    values = torch.linalg.svdvals(w - w.mean(0)).square()
    assert s.trajectory.explained.tolist() == pytest.approx((values[:2] / values.sum()).tolist(), rel=1e-8)
    assert FEATURES and s.trajectory.explained.sum() <= 1


def test_interpolated_variances_stay_positive_outside_of_the_models():
    models = [trained(NoisyNet, seed) for seed in range(3)]
    s = surface(Objective(models[0], loss_fn, batch(9)), 7, models=models, margin=3.0)
    assert s.values.isfinite().all()
