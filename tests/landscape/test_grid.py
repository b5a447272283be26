"""Interrupted and shared grids are bitwise the grid of one uninterrupted process; points equal single evaluations."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

from flatmin import Objective, perturbed
from flatmin.errors import RunFolderError
from flatmin.landscape import line, surface
from problems import NoisyNet, RolesNet, assert_same, batch, build, loss_fn


class Stop(Exception):
    pass


def counted(calls, stop=None):
    def loss(z, y):
        calls.append(1)
        if stop is not None and len(calls) > stop:
            raise Stop
        return loss_fn(z, y)

    return loss


@pytest.mark.parametrize("stopped_by", [Stop, KeyboardInterrupt])
def test_a_resumed_grid_is_bitwise_the_uninterrupted_one(tmp_path, stopped_by, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "Stop", stopped_by)
    file, data = tmp_path / "grid.pt", batch(0)
    whole = surface(Objective(build(RolesNet), loss_fn, data), 5)
    with pytest.raises(stopped_by):
        surface(Objective(build(RolesNet), counted([], 14), data, check=False), 5, checkpoint=file)
    state = torch.load(file, weights_only=True)
    assert 5 < int(state["done"].sum()) < 25
    calls = []
    resumed = surface(Objective(build(RolesNet), counted(calls), data, check=False), 5, checkpoint=file)
    assert len(calls) == 25 - int(state["done"].sum()) + 2      # the middle, and what it is checked against
    assert_same(resumed.values, whole.values)
    assert [p.name for p in tmp_path.iterdir()] == ["grid.pt"]


def test_a_file_of_another_landscape_is_refused(tmp_path):
    file = tmp_path / "grid.pt"
    objective = Objective(build(RolesNet), loss_fn, batch(0))
    line(objective, steps=3, checkpoint=file)
    for other in [lambda: line(objective, steps=3, seed=1, checkpoint=file),
                  lambda: line(objective, steps=5, checkpoint=file),
                  lambda: line(Objective(build(RolesNet, 1), loss_fn, batch(0)), steps=3, checkpoint=file),
                  lambda: line(Objective(build(RolesNet), loss_fn, batch(1)), steps=3, checkpoint=file)]:
        with pytest.raises(RunFolderError, match="another file"):
            other()
    file.write_bytes(b"half")
    with pytest.raises(RunFolderError, match="not a landscape"):
        line(objective, steps=3, checkpoint=file)


def test_draws_are_resumed_too(tmp_path):
    objective = Objective(build(RolesNet), loss_fn, batch(0))
    first, second = (line(objective, steps=3, draws=3, checkpoint=tmp_path / "a") for _ in range(2))
    assert_same(first.samples, second.samples)
    assert_same(first.values, line(objective, steps=3, draws=3).values)


def test_two_ranks_share_a_grid(tmp_path):
    code = textwrap.dedent(f"""
        import os, sys; sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
        import torch, torch.distributed as dist, torch.multiprocessing as mp
        def work(rank):
            torch.set_num_threads(1); torch.set_default_dtype(torch.float64)
            dist.init_process_group("gloo", init_method="file://{tmp_path}/store", rank=rank, world_size=2)
            from problems import RolesNet, batch, build, loss_fn
            from flatmin import Objective
            from flatmin.landscape import surface
            calls = []
            def loss(z, y):
                calls.append(1)
                return loss_fn(z, y)
            objective = Objective(build(RolesNet), loss, batch(0), check=False)
            everyone = dist.group.WORLD
            whole = surface(objective, 5).values
            calls.clear()
            assert torch.equal(surface(objective, 5, group=everyone).values, whole)
            assert len(calls) in (14, 15), calls
            path = "{tmp_path}/grid"
            calls.clear()
            assert torch.equal(surface(objective, 5, group=everyone, checkpoint=path).values, whole)
            calls.clear()
            assert torch.equal(surface(objective, 5, group=everyone, checkpoint=path).values, whole)
            assert len(calls) == 2
            try:
                surface(objective, 3, seed=rank, group=everyone)
            except ValueError as e:
                assert "same seed" in str(e)
            else:
                raise AssertionError
            def broken(z, y):
                if rank: raise ArithmeticError("no")
                return loss_fn(z, y)
            try:
                surface(Objective(build(RolesNet), broken, batch(0), check=False), 3, group=everyone)
            except (ArithmeticError, RuntimeError) as e:
                assert "no" in str(e)
            else:
                raise AssertionError
            dist.barrier()
            os._exit(0)  # gloo's threads sometimes abort the interpreter's own shutdown
        if __name__ == "__main__":
            mp.spawn(work, nprocs=2)
        """)
    script = tmp_path / "ranks.py"
    script.write_text(code)
    out = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert out.returncode == 0, out.stderr[-3000:]
    assert not list(tmp_path.glob("grid.rank*"))


def chain(*extra):
    return nn.Sequential(nn.Linear(6, 40), nn.ReLU(), *extra, nn.Linear(40, 40, bias=False), nn.ReLU(), nn.Tanh(),
                         nn.Identity(), nn.Linear(40, 3))


@pytest.mark.parametrize("make", [chain, lambda: chain(nn.BatchNorm1d(40), nn.Dropout(0.5)),
                                  lambda: nn.Sequential(nn.Flatten(), chain(), nn.ReLU()),
                                  lambda: nn.Sequential(nn.Linear(6, 3), nn.ReLU()), NoisyNet])
@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 0.0), (torch.float32, 2e-6)])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_points_equal_evaluations_one_by_one(make, dtype, tolerance, mode):
    torch.manual_seed(0)
    model = make().to(dtype)
    objective = Objective(model, loss_fn, [batch(0, 700, dtype), batch(1, 30, dtype)], mode=mode)
    s = surface(objective, 3)
    for i in range(3):
        for j in range(3):
            d1 = [float(s.x[i]) * a for a in s.directions[0]]
            with perturbed.displaced(objective.parameters, d1), perturbed.displaced(
                    objective.parameters, [float(s.y[j]) * b for b in s.directions[1]]):
                want = float(objective.value())
            assert float(s.values[i, j]) == pytest.approx(want, rel=tolerance or 1e-12)


def test_hooks_are_respected():
    model = chain()
    seen = []
    model[0].register_forward_hook(lambda *_: seen.append(1))
    line(Objective(model, loss_fn, batch(0), check=False), "filter", steps=3)
    assert len(seen) == 3 + 2
