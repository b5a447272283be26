"""What ``flatmin measure`` is asked beside the measures: data, mode, products, device, threads, processes, a plan."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from flatmin import Objective, cli
from flatmin.curvature import Hessian, dense_hessian, trace
from flatmin.curvature.objective_operator import ObjectiveOperator
from flatmin.jobs import measure_cost
from flatmin.jobs.measure_data import over_processes, share_of
from flatmin.jobs.measures import MEASURES
from flatmin.measures import METRICS, Options
from flatmin.parallel import Group
from flatmin.progress import Display

MODULE = """
import torch
from torch import nn
import flatmin

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()

def batches(count=8):
    g = torch.Generator().manual_seed(0)
    return [(torch.randn(n, 4, generator=g).double(), torch.randint(3, (n,), generator=g))
            for n in [5, 6, 7, 8, 5, 6, 7, 3][:count]]

def objective():
    return flatmin.Objective(net(), nn.CrossEntropyLoss(), batches())

def one():
    return flatmin.Objective(net(), nn.CrossEntropyLoss(), batches(1))

def whole():
    x, y = (torch.cat(part) for part in zip(*batches()))
    return flatmin.Objective(net(), nn.CrossEntropyLoss(), (x, y))

def own_share():
    import torch.distributed as dist
    model = nn.parallel.DistributedDataParallel(net())
    return flatmin.Objective(model, nn.CrossEntropyLoss(), batches()[dist.get_rank()::2])

def half():
    import os
    if os.environ.get("RANK") == "1":
        raise RuntimeError("no file")
    return objective()

def sharded():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    return flatmin.Objective(fully_shard(net(), mesh=init_device_mesh("cpu", (2,))), nn.CrossEntropyLoss(), batches())
"""


@pytest.fixture(autouse=True)
def _mine(tmp_path, monkeypatch):
    threads, kind = torch.get_num_threads(), torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)      # as in the processes that torchrun starts
    (tmp_path / "their.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    sys.modules.pop("their", None)
    yield
    sys.modules.pop("their", None)
    torch.set_num_threads(threads)
    torch.set_default_dtype(kind)


def run(*args):
    return cli.main(["measure", *args, "--quiet"])


def record_of(folder):
    return json.loads((folder / "record.json").read_text())


def theirs():
    import their  # pyright: ignore[reportMissingImports]

    return their


def test_a_share_of_the_batches_is_drawn_with_the_seed(tmp_path):
    for seed in "001":
        folder = f"r{len(list(tmp_path.glob('r*')))}"
        assert run("their:objective", "--share", "0.4", "--seed", seed, "--metrics", "one_step", "--out", folder) == 0
    a, b, c = (record_of(tmp_path / f"r{i}")["data"] for i in range(3))
    assert a == b and a["share"] == "3 of 8 batches, drawn with seed 0" and a["batches"] == 3
    assert c["share"].endswith("seed 1") and c["loss"] != a["loss"]
    whole = theirs().objective()
    part, _ = share_of(whole, 0.4, 0)
    assert all(any(x is batch[0] for batch in whole.data) for x, _ in part.data)
    assert float(part.value()) == pytest.approx(a["loss"], rel=1e-12)
    assert "3 of 8 batches" in (tmp_path / "r0" / "report.html").read_text()


def test_a_share_of_a_single_batch_is_of_its_samples():
    whole = theirs().whole()
    part, facts = share_of(whole, 0.25, 0)
    x, y = next(iter(part.data))
    inputs, targets = next(iter(whole.data))
    rows = [next(i for i in range(len(inputs)) if torch.equal(inputs[i], v)) for v in x]
    assert len(rows) == len(set(rows)) == 12 and torch.equal(targets[rows], y)
    assert facts == {"share": "12 of 47 samples, drawn with seed 0"} and share_of(whole, 1.0, 0)[0] is whole


@pytest.mark.parametrize(("flag", "value", "words"), [
    ("--share", "0", "above 0 and at most 1"), ("--share", "1.5", "above 0 and at most 1"),
    ("--mode", "test", "--mode must be one of eval, train"), ("--product", "fast", "--product must be one of auto"),
    ("--rtol", "0", "--rtol must be positive"), ("--threads", "0", "--threads must be at least 1"),
    ("--device", "nonsense", "nonsense")])
def test_wrong_values_are_refused_in_one_line(tmp_path, capsys, flag, value, words):
    assert run("their:objective", flag, value, "--out", "r") == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and not (tmp_path / "r").exists()


def test_mode_product_and_rtol_reach_the_measures(tmp_path):
    assert run("their:objective", "--mode", "batch_statistics", "--product", "recomputed", "--rtol", "0.2", "--metrics",
               "one_step,spectrum,trace", "--k", "1", "--threads", "1", "--device", "cpu", "--out", "r") == 0
    record = record_of(tmp_path / "r")
    found = record["results"]
    by_hand = Objective(theirs().net(), nn.CrossEntropyLoss(), theirs().batches(), mode="batch_statistics")
    assert record["data"]["mode"] == "batch_statistics"
    assert record["data"]["loss"] == pytest.approx(float(by_hand.value()), rel=1e-12)
    assert found["trace"]["settings"]["rtol"] == 0.2 and found["spectrum"]["settings"]["product"] == "recomputed"
    top = torch.linalg.eigvalsh(dense_hessian(by_hand))[-1]
    assert found["spectrum"]["eigenvalues"][0] == pytest.approx(float(top), rel=2e-3)


def test_a_smaller_error_of_the_trace_may_cost_more():
    """1000 matvecs are for 5 %; a tenth of that error takes a hundred times as many."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 50), nn.Tanh(), nn.Linear(50, 3)).double()
    objective = Objective(model, nn.CrossEntropyLoss(), (torch.randn(8, 30).double(), torch.randint(3, (8,))))
    found = MEASURES["trace"](objective, Options(rtol=0.012))
    assert found.matvecs > 1000 and found.converged
    assert found.value == pytest.approx(float(trace(Hessian(objective), rtol=1e-9, max_matvecs=10**6).value), rel=0.05)


def test_the_faster_number_of_threads_is_taken_and_kept(tmp_path, monkeypatch):
    """With a clock by which one thread is slower, or faster, than four."""
    taken = []

    def pretend(seconds):
        def measured(run):
            run()
            taken.append(torch.get_num_threads())
            return seconds[torch.get_num_threads()]
        return measured

    for seconds, best in (({1: 2.0, 4: 1.0}, 4), ({1: 1.0, 4: 100.0}, 1)):
        torch.set_num_threads(4)
        taken.clear()
        monkeypatch.setattr(measure_cost, "_seconds", pretend(seconds))
        assert run("their:objective", "--metrics", "one_step", "--out", f"r{best}") == 0
        assert set(taken) == {1, 4} and torch.get_num_threads() == best
        assert record_of(tmp_path / f"r{best}")["versions"]["threads"] == best
    taken.clear()
    torch.set_num_threads(4)
    assert run("--resume", "r1") == 0 and torch.get_num_threads() == 1 and not taken, "as recorded, not timed again"
    assert run("their:objective", "--metrics", "one_step", "--threads", "3", "--out", "r3") == 0
    assert not taken and record_of(tmp_path / "r3")["versions"]["threads"] == 3


def test_progress_after_resume_counts_this_session_alone(tmp_path, monkeypatch):
    """The matvecs of both sessions add up to those of the measure; each session's pace is of its own."""
    calls, multiply, shown = [], ObjectiveOperator._matvec, []

    def dying(self, *v):
        calls.append(1)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return multiply(self, *v)

    class Recorded(Display):
        def __init__(self, title, **kw):
            super().__init__(title, **(kw | {"quiet": True}))
            shown.append(self)

    monkeypatch.setattr("flatmin.jobs.measure.Display", Recorded)
    monkeypatch.setattr(ObjectiveOperator, "_matvec", dying)
    assert run("their:objective", "--metrics", "trace", "--out", "cut") == 130
    assert run("--resume", "cut") == 0
    first, second = shown
    assert first.resumed == 0 and second.resumed == first.done > 0
    assert second.done == record_of(tmp_path / "cut")["results"]["trace"]["matvecs"]


@pytest.mark.parametrize(("resumed", "line"), [
    (0, "trace: 11 matvecs, of about 20, 2.7 s a matvec, about 0:27 left"),
    (10, "trace: 1 matvecs after 10 of an earlier session, of about 20, 30 s a matvec, about 5:00 left")])
def test_the_pace_is_of_this_session(capsys, monkeypatch, resumed, line):
    clock = iter((0.0, 30.0))
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    Display("trace", resumed=resumed)(11, "of about 20", 10)
    assert capsys.readouterr().err.splitlines() == [line]


def counted(name, objective):
    """Passes over the data, with and without a gradient, and Hessian-vector products of a measure."""
    seen = {"forward": 0.0, "backward": 0.0, "matvecs": 0.0}
    with objective.session(check=True):
        pass
    with pytest.MonkeyPatch.context() as patch:
        evaluate, multiply = Objective.evaluate, ObjectiveOperator._matvec

        def evaluated(self, *args, gradient=False, **kw):
            share = sum(len(b[0]) for b in self.data) / 64      # a quarter of the data is a quarter of a pass
            seen["forward"] += share
            seen["backward"] += share * gradient
            return evaluate(self, *args, gradient=gradient, **kw)

        def multiplied(self, v, *args):
            seen["matvecs"] += v.numel() / self.length
            return multiply(self, v, *args)

        patch.setattr(Objective, "evaluate", evaluated)
        patch.setattr(ObjectiveOperator, "_matvec", multiplied)
        MEASURES[name](objective, Options(rho=0.05))
    return seen


@pytest.mark.parametrize("name", [name for name in METRICS if name != "surface"])
@pytest.mark.filterwarnings("ignore")
def test_the_work_that_is_predicted_is_the_work_that_is_done(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 80), nn.Tanh(), nn.Linear(80, 24), nn.Tanh(), nn.Linear(24, 3))
    objective = Objective(model, nn.CrossEntropyLoss(), (torch.randn(64, 12), torch.randint(3, (64,))))
    seen, work = counted(name, objective), METRICS[name].work
    for kind in ("forward", "backward", "matvecs"):
        low, high = getattr(work, kind)
        if kind == "matvecs":
            low, high = low + 5 * work.each[0], high + 5 * work.each[1] + 4     # beside them the check of the matvecs
        assert 0.8 * low - 0.2 <= seen[kind] <= high + 0.2 + 0.02 * high, (kind, seen, work)


def test_the_predicted_time_follows_from_the_work():
    cost = measure_cost.Cost(1.0, 2.0, 10.0, graph=100, matvec_graph=1000, vector=8, size=10**6)
    assert cost.seconds(METRICS["one_step"].work, 5) == (14.0, 14.0)
    assert cost.seconds(METRICS["spectrum"].work, 5) == (200.0, 600.0)
    assert cost.seconds(METRICS["spectrum"].work, 50) == (650.0, 1950.0)
    small = measure_cost.Cost(1.0, 2.0, 10.0, graph=100, matvec_graph=1000, vector=8, size=30)
    assert small.seconds(METRICS["trace"].work, 0) == (100.0, 300.0), "one product a coordinate is exact"
    assert cost.bytes(METRICS["average_case"].work, 5) == 3 * 8 + 100
    assert cost.bytes(METRICS["spectrum"].work, 5) == 68 * 8 + 1000


def test_a_plan_times_all_the_data(tmp_path, capsys):
    cost = measure_cost.cost_of(theirs().objective())
    assert cost.size == 53 and cost.vector == 8 * 53 and cost.forward > 0 and cost.matvec > 0
    assert measure_cost.cost_of(theirs().one()).matvec_graph < cost.matvec_graph
    torch.save(theirs().net().state_dict(), "w.pt")
    assert run("their:objective", "--plan", "--against", "w.pt", "--out", "r") == 0
    shown = capsys.readouterr().out
    assert [line.split()[0] for line in shown.splitlines()[2:-2]] == ["one_step", "spectrum", "trace", "density",
                                                                      "comparison"]
    assert not (tmp_path / "r").exists() and re.search(r"are free$", shown.strip()) and not math.isnan(cost.backward)


class Two(Group):
    """A group of two, of which the other holds the same, or other, values."""

    def __init__(self, alike):
        super().__init__(None)
        self.size, self.alike = 2, alike

    def gather(self, value):
        return [value, value if self.alike else "another"]


@pytest.mark.parametrize(("alike", "words"), [(True, "the data are 1 batches for 2 processes"),
                                              (False, "the processes hold different weights")])
def test_processes_need_the_same_weights_and_a_batch_each(alike, words):
    with pytest.raises(ValueError, match=words):
        over_processes(theirs().one(), Two(alike))


def two_processes(tmp_path, *args):
    """The command under torchrun; its status and what it says, without torchrun's own lines."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(
        [str(Path(cli.__file__).parents[1]), str(tmp_path)])}
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m",
                           "flatmin.cli", "measure", *args, "--quiet"], cwd=tmp_path, env=environment, timeout=300,
                          capture_output=True, text=True)
    return done.returncode, [line for line in done.stderr.splitlines() if line.startswith("flatmin:")], done.stdout


@pytest.mark.parametrize("name", ["their:objective", "their:own_share"])
def test_two_processes_measure_what_one_does(tmp_path, name):
    rest = "--metrics", "one_step,spectrum,trace", "--k", "2", "--eigenvectors"
    assert run("their:objective", *rest, "--out", "one") == 0
    status, errors, out = two_processes(tmp_path, name, *rest, "--out", "two")
    assert status == 0 and not errors and out.count("report two/report.html") == 1
    one, two = (record_of(tmp_path / n) for n in ("one", "two"))
    for key in ("loss", "samples", "batches"):
        assert two["data"][key] == pytest.approx(one["data"][key], rel=1e-12)
    assert two["data"]["processes"] == 2 and two["model"]["name"] == one["model"]["name"] == "Sequential"
    assert two["data"]["shared"].startswith("by your" if "own" in name else "every process takes its share")
    for measure, keys in {"one_step": ("value", "second_order", "data_stderr"), "trace": ("value", "data_stderr"),
                          "spectrum": ("eigenvalues", "data_stderr")}.items():
        for key in keys:
            assert two["results"][measure][key] == pytest.approx(one["results"][measure][key], rel=1e-5), (measure, key)
    from safetensors.torch import load_file

    a, b = (load_file(tmp_path / n / "eigenvectors.safetensors") for n in ("one", "two"))
    assert set(a) == set(b) == {n for n, _ in theirs().net().named_parameters()}
    assert {n: t.shape for n, t in a.items()} == {n: t.shape for n, t in b.items()}


@pytest.mark.parametrize(("name", "words"), [
    ("their:sharded", "FSDP2"), ("their:half", "process 1: their:half() raised")])
def test_what_two_processes_cannot_measure_is_refused_in_one_line(tmp_path, name, words):
    status, errors, _ = two_processes(tmp_path, name, "--metrics", "one_step", "--out", "r")
    assert status != 0 and len(errors) == 1 and words in errors[0] and not (tmp_path / "r").exists()
