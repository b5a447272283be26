"""A landscape is the objective's own: every point, and the one in the middle is checked against ``value()``."""

import pytest
import torch
from torch import nn

from flatmin import Objective, perturbed
from flatmin.errors import RunFolderError
from flatmin.landscape import line, plane, surface
from problems import NoisyNet, RolesNet, batch, build, loss_fn


def repeated(kind):
    """Networks in which one module object stands at two places."""
    torch.manual_seed(0)
    act, square, norm = nn.ReLU(), nn.Linear(6, 6), nn.LayerNorm(6)
    block = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
    return {"activation": lambda: nn.Sequential(nn.Linear(6, 9), act, nn.Linear(9, 9), act, nn.Linear(9, 3)),
            "linear": lambda: nn.Sequential(square, nn.ReLU(), square, nn.ReLU(), nn.Linear(6, 3)),
            "norm": lambda: nn.Sequential(norm, nn.Linear(6, 6), norm, nn.Linear(6, 3)),
            "block": lambda: nn.Sequential(block, block, nn.Linear(6, 3)),
            "dropout": lambda: nn.Sequential(square, nn.Dropout(0.5), square, nn.Linear(6, 3))}[kind]()


@pytest.mark.parametrize("kind", ["activation", "linear", "norm", "block", "dropout"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_module_used_twice_is_evaluated_twice(kind, dtype):
    objective = Objective(repeated(kind).to(dtype), loss_fn, [batch(0, 40, dtype)])
    s = surface(objective, 3)
    for i in range(3):
        for j in range(3):
            step = [float(s.x[i]) * a + float(s.y[j]) * b for a, b in zip(*s.directions, strict=True)]
            with perturbed.displaced(objective.parameters, step):
                assert float(s.values[i, j]) == pytest.approx(float(objective.value()), rel=2e-6)
    assert float(s.values[1, 1]) == float(objective.value())


class Fading:
    """Data that change after so many passes."""

    def __init__(self, after):
        self.passes, self.after = 0, after

    def __len__(self):
        return 1

    def __iter__(self):
        self.passes += 1
        x, y = batch(0)
        yield (x, y) if self.passes <= self.after else (2 * x, y)


class Warming(nn.Linear):
    """A model that answers otherwise once its weights were written to."""

    def forward(self, x):
        first = self.__dict__.setdefault("first", self.weight._version)
        return super().forward(x) + (self.weight._version > first)


def test_an_evaluation_that_is_not_the_objectives_is_refused():
    torch.manual_seed(0)
    for objective in (Objective(build(RolesNet), loss_fn, Fading(3)),
                      Objective(Warming(6, 3), lambda z, y: z.square().mean(), batch(0))):
        with pytest.raises(ValueError, match=r"the middle of the landscape.*objective\.value\(\)"):
            line(objective, steps=3)


def test_weights_put_wrongly_are_refused(monkeypatch):
    """Also where no point of the grid is the middle, and on a plane through other models."""
    objective, real = Objective(build(RolesNet), loss_fn, batch(0)), plane.PlaneModel.put

    def put(self, coordinates):
        real(self, coordinates)
        self._w[0].mul_(1.01)

    monkeypatch.setattr(plane.PlaneModel, "put", put)
    models = [build(RolesNet, seed).state_dict() for seed in (1, 2, 3)]
    for run in (lambda: surface(objective, 3), lambda: line(objective, models=models[:2], steps=2),
                lambda: surface(objective, 4, models=models)):
        with pytest.raises(ValueError, match="the middle of the landscape"):
            run()


@pytest.mark.parametrize("batch_norm", ["frozen", "interpolated", "reestimated"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_healthy_landscapes_pass(batch_norm, dtype):
    models = [build(NoisyNet, seed).to(dtype).train() for seed in range(3)]
    for m in models:
        m(batch(5)[0].to(dtype))       # statistics of their own
    x, y = batch(0)
    objective = Objective(models[0], lambda z, t: loss_fn(z.float(), t), [(x.to(dtype), y)])
    assert surface(objective, 3, models=models, batch_norm=batch_norm).values.isfinite().all()
    if batch_norm != "interpolated":
        found = line(objective, "filter", steps=3, batch_norm=batch_norm)
        assert batch_norm == "reestimated" or float(found.values[1]) == float(objective.value())


@pytest.mark.parametrize("at", [float("inf"), float("nan"), 0.0])
def test_a_middle_that_is_not_a_number_is_no_reason(at):
    objective = Objective(nn.Linear(6, 3), lambda z, y: z.sum() * 0 + at, batch(0), check=False)
    assert torch.equal(line(objective, steps=3).values.nan_to_num(7), torch.full((3,), at).double().nan_to_num(7))


@pytest.mark.parametrize("steps", [2, 4, 50])
def test_an_axis_around_the_weights_holds_them(steps):
    objective = Objective(build(RolesNet), loss_fn, batch(0))
    for run in (lambda: line(objective, steps=steps), lambda: surface(objective, steps),
                lambda: line(objective, steps=steps, radius=0.1)):
        with pytest.raises(ValueError, match=f"steps must be odd.*got {steps}; use {steps + 1}"):
            run()
    two = [build(RolesNet, seed).state_dict() for seed in (1, 2)]
    assert len(line(objective, models=two, steps=steps).x) == steps      # from one model to the other: any number


def test_a_landscape_of_other_data_is_not_gone_on_with(tmp_path):
    line(Objective(build(RolesNet), loss_fn, batch(0)), steps=3, checkpoint=tmp_path / "a")
    with pytest.raises(RunFolderError, match="data or another loss"):
        line(Objective(build(RolesNet), loss_fn, batch(1)), steps=3, checkpoint=tmp_path / "a")
