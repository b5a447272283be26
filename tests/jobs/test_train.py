"""``flatmin train``: from one command to record, weights, log and page; through a kill, on two ranks, refused input."""

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

import flatmin
from flatmin import cli, report
from flatmin.errors import RunFolderError
from flatmin.jobs.recipe_fields import simple_fields, with_fields
from flatmin.recipes.language import Language
from flatmin.training.folder import RunFolder
from flatmin.training.log import Log, scalars
from flatmin.training.settings import TrainSettings
from flatmin.training.verdict import Verdict, findings

MINE = """
import os
import torch
from torch import nn
from flatmin.recipes.supervised import Supervised, classification
def data(n, seed):
    x = torch.randn(n, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
    return x, x[:, :3].argmax(1)
def net():
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)).float()
def recipe():
    return classification(net, data(200, 0), data(100, 1), epochs=4, name="mine")
def plain():
    return Supervised(net, nn.functional.cross_entropy, data(200, 0), data(100, 1))
def other():
    return classification(lambda: nn.Linear(8, 3).float(), data(200, 0))
def diverging():
    return classification(net, data(200, 0), lr=1e12)
def by_rank():
    return classification(net, data(200, 0), lr=0.1 + float(os.environ.get("RANK", 0)))
def fails_on_one():
    if os.environ.get("RANK") == "1":
        raise ValueError("no such disk")
    return recipe()
class Lacking:
    name = "lacking"
"""
QUICK = ["--steps", "24", "--log-every", "2", "--quiet", "--device", "cpu"]


@pytest.fixture(autouse=True)
def _mine(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("mine", None)


def train(*args):
    return cli.main(["train", *args])


def record_of(folder):
    return json.loads((folder / "record.json").read_text())


def same_weights(a, b):
    a, b = (load_file(folder / "checkpoints" / "model.safetensors") for folder in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_run_leaves_record_weights_log_and_page(tmp_path, capsys):
    assert train("mine:recipe", "--method", "sam", "--rho", "0.1", "--monitor", "one_step", "--monitor-every", "8",
                 "--lr", "0.05", *QUICK, "--out", "r") == 0
    out = capsys.readouterr().out
    assert "accuracy" in out and "±" in out and "r/report.html" in out and "samples/s" in out
    record = record_of(tmp_path / "r")
    assert (record["schema"], record["kind"], record["status"], record["steps"]) == (1, "train", "complete", 24)
    assert record["settings"]["rho"] == 0.1 and record["settings"]["fields"] == {"lr": "0.05"}
    assert record["recipe"]["lr"] == 0.05 and record["recipe"]["batch_size"] == 32
    accuracy = record["metrics"]["test"]["accuracy"]
    p = accuracy["value"]
    assert accuracy["stderr"] == pytest.approx((p * (1 - p) / 100) ** 0.5) and accuracy["higher_is_better"] is True
    assert record["throughput"]["value"] > 0 and record["throughput"]["unit"] == "samples/s"
    # the weights are those that the metrics are of
    import mine

    net = mine.net()
    net.load_state_dict(load_file(tmp_path / "r" / "checkpoints" / "model.safetensors"))
    x, y = mine.data(100, 1)
    assert (net(x).argmax(1) == y).double().mean().item() == pytest.approx(p)
    page = (tmp_path / "r" / "report.html").read_text()
    for heading in ("Metrics at the end", "Loss", "Learning rate", "Realised sharpness", "One step", "Accuracy"):
        assert heading in page, heading
    assert "aria-label=\"one step" in page


def test_every_run_is_loaded(tmp_path):
    train("mine:recipe", *QUICK, "--out", "r")
    run = flatmin.load("r")
    assert (run.kind, run.status, run.settings["steps"]) == ("train", "complete", 24)
    assert run.weight_names == ["model"] and set(run.weights()) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert [row["step"] for row in run.log() if "loss" in row] == [*range(0, 24, 2), 23]
    with pytest.raises(RunFolderError, match="no weights 'nosuch'; it holds: model"):
        run.weights("nosuch")
    with pytest.raises(RunFolderError, match="not a run folder"):
        flatmin.load(tmp_path)


@pytest.mark.parametrize("kind", ["compare", "measure"])
def test_other_runs_are_loaded_too(kind, tmp_path):
    folder = RunFolder.create(tmp_path / kind)
    folder.save_record({"kind": kind, "status": "complete", "settings": {"seed": 3}})
    run = flatmin.load(tmp_path / kind)
    assert (run.kind, run.settings, run.log(), run.weight_names, run.record["schema"]) == (kind, {"seed": 3}, [], [], 1)


def test_a_record_of_another_schema_is_refused(tmp_path):
    folder = RunFolder.create(tmp_path / "r")
    (folder.path / "record.json").write_text(json.dumps({"kind": "train", "schema": 2}))
    with pytest.raises(RunFolderError, match="schema 2, and this flatmin reads 1"):
        flatmin.load(folder.path)
    (folder.path / "record.json").write_text(json.dumps({"kind": "train"}))     # written before there was a number
    assert flatmin.load(folder.path).kind == "train"


def test_tables_as_csv(tmp_path, capsys):
    train("mine:recipe", "--method", "sam", *QUICK, "--out", "r")
    assert cli.main(["report", "r", "--csv"]) == 0
    assert "r/tables/steps.csv" in capsys.readouterr().out
    read = {file.stem: list(csv.DictReader(open(file))) for file in (tmp_path / "r" / "tables").glob("*.csv")}
    log = [row for row in flatmin.load("r").log() if "loss" in row]
    assert [float(row["loss"]) for row in read["steps"]] == [row["loss"] for row in log]
    metrics = flatmin.load("r").record["metrics"]
    assert {(row["split"], row["metric"]): float(row["value"]) for row in read["metrics"]} == {
        (split, name): found[name]["value"] for split, found in metrics.items() for name in found}
    assert all(f"{row['tune.accuracy']}" for row in read["evaluations"])


def test_tables_of_the_other_kinds():
    record = {"results": {"spectrum": {"eigenvalues": [3.0, 1.0], "residuals": [0.1, "nan"], "matvecs": 7,
                                       "settings": {"k": 2}},
                          "one_step": {"value": 0.25, "stderr": "nan"}},
              "runs": [{"method": "sam", "seed": 0, "final": {"accuracy": 0.9}, "steps": [{"loss": 1}]}]}
    found = report.csv_tables.tables(record)
    assert found["measures"] == [{"measure": "spectrum", "quantity": "matvecs", "value": 7},
                                 {"measure": "one_step", "quantity": "value", "value": 0.25},
                                 {"measure": "one_step", "quantity": "stderr", "value": "nan"}]
    assert found["spectrum"] == [{"index": 0, "eigenvalues": 3.0, "residuals": 0.1},
                                 {"index": 1, "eigenvalues": 1.0, "residuals": "nan"}]
    assert found["runs"] == [{"method": "sam", "seed": 0, "final.accuracy": 0.9}]


# what a run refuses


@pytest.mark.parametrize(("args", "says"), [
    ([], "needs a recipe"),
    (["nosuch"], "no recipe 'nosuch': choose"),
    (["mine:nosuch"], "has no 'nosuch'"),
    (["mine:Lacking"], "lacks model, train_batches"),
    (["mine:recipe", "--nosuch", "3"], "has no field --nosuch: choose from --batch-size"),
    (["mine:recipe", "--lr", "fast"], "--lr of recipe mine must be a number, got 'fast'"),
    (["mine:recipe", "--optimizer", "lion"], "must be one of sgd, adamw, got 'lion'"),
    (["mine:recipe", "--batch-size", "0"], "batch_size must be at least 1"),
    (["mine:recipe", "--steps", "many"], "--steps: expected"),
    (["mine:recipe", "--log-every", "0"], "--log-every must be at least 1"),
    (["mine:recipe", "--log_every", "0"], "--log-every must be at least 1"),
    (["mine:recipe", "--precision", "fp8"], "--precision"),
    (["mine:recipe", "--method", "sgd"], "unknown method 'sgd': choose from base, sam"),
    (["mine:recipe", "--steps", "3", "--epochs", "2"], "pass one of them"),
    (["mine:recipe", "--monitor", "nosuch"], "unknown measure 'nosuch'"),
    (["mine:recipe", "--start", "nowhere"], "no checkpoint there"),
])
def test_wrong_calls_get_one_line_and_write_nothing(args, says, tmp_path, capsys):
    assert train(*args, "--quiet", "--out", "r") == 2
    err = capsys.readouterr().err
    assert says in err and err.startswith("flatmin: ") and len(err.splitlines()) == 1
    assert not (tmp_path / "r").exists()


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_folder_of_another_run_stays_as_it_is(tmp_path, capsys):
    assert train("mine:recipe", *QUICK, "--out", "r") == 0
    before = files(tmp_path / "r")
    for args in (["mine:recipe", *QUICK[:2], "--out", "r"], ["mine:other", "--out", "r"]):
        assert train(*args, "--quiet") == 1
        assert "exists and is not empty" in capsys.readouterr().err and files(tmp_path / "r") == before
    for args in (["--rho", "0.2"], ["--lr", "0.2"], ["--steps", "30"], ["mine:other"]):
        assert train(*args, "--resume", "r", "--quiet") == 2
        assert "continues with the run's own settings" in capsys.readouterr().err
    assert cli.main(["measure", "--resume", "r"]) == 1
    assert "holds a run of flatmin train, not of measure" in capsys.readouterr().err
    assert files(tmp_path / "r") == before


def test_a_diverging_run_is_recorded_and_said(tmp_path, capsys):
    assert train("mine:diverging", *QUICK, "--out", "r") == 1
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1].startswith("flatmin: base, seed 0: the loss is not finite in step")
    assert record_of(tmp_path / "r")["status"] == "failed" and "is not finite" in record_of(tmp_path / "r")["failure"]
    assert "This run failed" in (tmp_path / "r" / "report.html").read_text()


def test_settings_from_a_file_with_fields_of_the_recipe(tmp_path):
    (tmp_path / "c.toml").write_text('recipe = "mine:recipe"\nsteps = 4\nlr = 0.05\nbatch_size = 8\n')
    assert train("--config", "c.toml", "--quiet", "--lr", "0.02", "--out", "r") == 0
    recipe = record_of(tmp_path / "r")["recipe"]
    assert (recipe["lr"], recipe["batch_size"]) == (0.02, 8)
    (tmp_path / "d.toml").write_text('recipe = "mine:recipe"\nsteps = "many"\n')
    assert train("--config", "d.toml", "--quiet", "--out", "s") == 2


# resuming


def test_ctrl_c_says_how_to_resume_and_the_bits_are_the_same(tmp_path, capsys, monkeypatch):
    from flatmin.jobs.train import TrainingRun

    options = ["mine:recipe", "--method", "looksam", *QUICK, "--save-every", "5"]
    assert train(*options, "--out", "whole") == 0
    tick = TrainingRun._tick

    def stop(job, done):
        tick(job, done)
        if done == 13:
            raise KeyboardInterrupt

    monkeypatch.setattr(TrainingRun, "_tick", stop)
    assert train(*options, "--out", "cut") == 130
    assert capsys.readouterr().err.strip().endswith("resume with: flatmin train --resume cut")
    assert record_of(tmp_path / "cut")["status"] == "interrupted" and not flatmin.load("cut").weight_names
    page = (tmp_path / "cut" / "report.html").read_text()
    assert "not complete" in page and "13 of 24 steps" in page and "Learning rate" in page
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    sys.path.insert(0, str(tmp_path))
    assert train("--resume", "cut", "--quiet") == 0
    assert same_weights(tmp_path / "whole", tmp_path / "cut")
    assert (tmp_path / "whole" / "log.jsonl").read_text() == (tmp_path / "cut" / "log.jsonl").read_text()
    assert record_of(tmp_path / "whole")["metrics"] == record_of(tmp_path / "cut")["metrics"]
    before = files(tmp_path / "cut" / "checkpoints")
    assert train("--resume", "cut", "--quiet") == 0 and files(tmp_path / "cut" / "checkpoints") == before
    sys.path.remove(str(tmp_path))


def start(tmp_path, *args, ranks=1, **environment):
    command = [sys.executable, "-m", "flatmin.cli", "train"] if ranks == 1 else [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m",
        "flatmin.cli", "train"]
    return subprocess.Popen([*command, *args], cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def below(pid):
    path = f"/proc/{pid}/task/{pid}/children"
    found = [int(child) for child in open(path).read().split()] if os.path.exists(path) else []
    return found + [inner for child in found for inner in below(child)]


def kill_half_way(process, folder, lines):
    end = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < end:
        log = folder / "log.jsonl"
        if log.exists() and log.read_text().count("\n") >= lines:
            break
        time.sleep(0.005)
    killed = process.poll() is None
    for pid in (process.pid, *below(process.pid)):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    process.communicate()
    return killed


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "args"), [
    (1, ["mine:recipe", "--method", "sam", "--steps", "300", "--monitor", "one_step", "--monitor-every", "50"]),
    (1, ["language", "--size", "2M", "--steps", "6", "--tokenizer", "bytes", "--data", "text.txt", "--context", "16",
         "--batch-size", "2", "--cache", "cache", "--method", "functional_sam", "--save-every", "2"]),
    (2, ["mine:recipe", "--method", "sam", "--steps", "300", "--accumulate", "2"]),
], ids=["one process", "language", "two ranks"])
def test_killed_half_way_and_resumed(ranks, args, tmp_path):
    (tmp_path / "text.txt").write_text("\n".join(f"line {i} has {i * i} words" for i in range(600)))
    args = [*args, "--quiet", "--log-every", "1", "--threads", "1", "--device", "cpu"]
    whole = start(tmp_path, *args, "--out", "whole", ranks=ranks)
    out, err = whole.communicate(timeout=300)
    assert whole.returncode == 0, err
    assert out.count("report whole/report.html") == 1, "the first rank alone speaks"
    assert kill_half_way(start(tmp_path, *args, "--out", "cut", ranks=ranks), tmp_path / "cut",
                         2 if "language" in args else 120)
    assert record_of(tmp_path / "cut")["status"] == "running"
    resumed = start(tmp_path, "--resume", "cut", "--quiet", ranks=ranks)
    _, err = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, err
    assert same_weights(tmp_path / "whole", tmp_path / "cut")
    kept = [[row for row in flatmin.load(tmp_path / name).log() if "sharpness" not in row] for name in ("whole", "cut")]
    assert kept[0] == kept[1]
    assert record_of(tmp_path / "whole")["metrics"] == record_of(tmp_path / "cut")["metrics"]


def ranks_of_different_calls(tmp_path, *calls):
    """Two ranks by hand, as torchrun would start them, but each with its own arguments: (status, output) of each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    started = [start(tmp_path, *args, RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="localhost",
                     MASTER_PORT=str(port)) for rank, args in enumerate(calls)]
    done = [process.communicate(timeout=120) for process in started]
    return [(p.returncode, out + err) for p, (out, err) in zip(started, done, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second", "says"), [
    (["mine:recipe", "--steps", "4"], ["mine:recipe", "--steps", "6"], "started with different settings"),
    (["mine:by_rank"], ["mine:by_rank"], "started with different settings, recipes"),
    (["mine:fails_on_one"], ["mine:fails_on_one"], "rank 1: mine:fails_on_one() raised ValueError: no such disk"),
    (["mine:nosuch"], ["mine:nosuch"], "'mine' has no 'nosuch'"),
])
def test_ranks_that_differ_end_with_one_line(first, second, says, tmp_path):
    (status, spoken), (other, silence) = ranks_of_different_calls(
        tmp_path, *([*args, "--quiet", "--device", "cpu", "--out", "r"] for args in (first, second)))
    assert status == 2 and other == 2
    lines = [line for line in (spoken + silence).splitlines() if line.startswith("flatmin:")]
    assert len(lines) == 1 and says in lines[0] and "Traceback" not in spoken + silence
    assert not (tmp_path / "r").exists()


@pytest.mark.slow
def test_a_run_of_two_ranks_is_not_resumed_by_one(tmp_path, capsys):
    assert train("mine:recipe", *QUICK, "--out", "r") == 0
    record = record_of(tmp_path / "r")
    record["place"]["ranks"], record["status"] = 2, "running"
    (tmp_path / "r" / "record.json").write_text(json.dumps(record))
    before = files(tmp_path / "r")
    assert train("--resume", "r", "--quiet") == 1
    assert "was begun by 2 processes, and these are 1" in capsys.readouterr().err
    assert files(tmp_path / "r") == before


# fields of a recipe


def test_fields_are_read_with_their_types():
    recipe = with_fields(Language(), {"betas": "0.8,0.95", "lr": "1e-2", "tokenizer": "bytes", "size": "24M",
                                      "context": "64", "data": "123"})
    assert recipe == Language(betas=(0.8, 0.95), lr=0.01, tokenizer="bytes", size="24M", context=64, data="123")
    assert "steps" not in simple_fields(recipe) and "name" not in simple_fields(recipe)
    for name, text in (("context", "1.5"), ("betas", "0.9"), ("lr", ""), ("size", "3M")):
        with pytest.raises(ValueError, match=f"--{name} of recipe language must be"):
            with_fields(Language(), {name: text})


def test_help_lists_the_fields_of_a_recipe(capsys):
    for args, there in ((["train", "--help"], False), (["train", "language", "--help"], True)):
        with pytest.raises(SystemExit):
            cli.main(args)
        shown = capsys.readouterr().out
        assert ("--held-out-windows" in shown) is there and "--log-every" in shown and "(default: 10)" in shown


def test_help_of_train_imports_no_torch(tmp_path):
    code = ("import contextlib, sys\nfrom flatmin import cli\n"
            "for a in (['train', '--help'], ['train'], ['train', 'x', '--steps', '0'], ['train', '--resume', 'no'], "
            "['train', 'x', '--method', 'nosuch']):\n"
            "    with contextlib.suppress(SystemExit):\n        cli.main(a)\n"
            "    assert 'torch' not in sys.modules, a")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("flatmin: ") == 4


# a verdict while it trains


@pytest.mark.parametrize(("rho", "named"), [("8", "rho too large"), ("0.00002", "rho too small"), ("0.1", None)])
def test_a_hopeless_radius_is_named_within_a_hundred_steps(rho, named, tmp_path, capsys):
    args = [a for a in QUICK if a != "--quiet"]
    args[args.index("--steps") + 1], args[args.index("--log-every") + 1] = "120", "10"
    assert train("mine:plain", "--method", "sam", "--rho", rho, "--lr", "0.01", *args, "--out", "r") == 0
    found = [row for row in flatmin.load("r").log() if "finding" in row]
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
    if named is None:
        assert not found and not said
    else:
        assert [(row["step"] < 100, row["finding"]["name"]) for row in found] == [(True, named)]
        assert len(said) == 1 and "ho is" in said[0]
        assert "Said after step 91" in (tmp_path / "r" / "report.html").read_text()


def rows(n, rise):
    return [{"step": 10 * i, "loss": 1.0, "perturbed_loss": 1.0 + rise, "gradient_norm": 1.0, "passes": 2}
            for i in range(n)]


def test_a_finding_is_named_once_also_after_a_resume():
    settings, steps, written = TrainSettings(method="sam", rho=0.1), [], []
    verdict = Verdict(steps, settings)
    for row in rows(40, 3.0):
        steps.append(row)
        written += verdict(row)
    assert [(row["step"], row["finding"]["name"]) for row in written] == [(90, "rho too large")]
    resumed = Verdict(list(steps), settings)
    assert resumed.named == verdict.named and resumed.next == verdict.next
    assert not Verdict(rows(9, 3.0), settings).named
    assert not Verdict(rows(40, 3.0), settings, first=350).named, "steps of the run that this one was forked from"


def test_a_plain_optimizer_and_a_one_pass_method_get_no_advice_on_rho():
    plain = [row | {"perturbed_loss": float("nan"), "gradient_norm": float("nan"), "passes": 1} for row in rows(40, 0)]
    one_pass = [row | {"gradient_norm": float("nan"), "passes": 1} for row in rows(40, 0)]
    assert not Verdict(plain, TrainSettings()).named
    assert not Verdict(one_pass, TrainSettings(method="momentum_sam")).named
    assert Verdict(rows(40, 0.0), TrainSettings(method="sam")).named == {"rho too small"}


def test_what_was_evaluated_stands_beside_a_step_and_does_not_replace_it():
    evaluations = [{"step": 10 * i + 5, "tune": {"loss": 0.9, "accuracy": 0.5}} for i in range(40)]
    found = findings(rows(40, 3.0), TrainSettings(method="sam"), evaluations)
    assert [f.name for f in found] == ["rho too large"] and found[0].evidence == {"sharpness over loss": 3.0}


# the page


def test_the_page_stands_holes_and_escapes_what_it_holds(tmp_path):
    train("mine:recipe", "--method", "sam", *QUICK, "--out", "r")
    run = flatmin.load("r")
    whole = run.record | {"log": run.log()}

    def stands(broken):
        page = report.page(broken)
        assert "<script>alert" not in page and "</html>" in page and report.table(broken)

    for name in whole:
        if name != "kind":
            stands({k: v for k, v in whole.items() if k != name})
            stands(whole | {name: "<script>alert(1)</script>"})
            stands(whole | {name: None})
    for i in range(0, len(whole["log"]), 5):
        for hole in ({}, None, {"step": "x", "loss": "nan"}, {"evaluation": 3}, {"step": 1, "sharpness": []}):
            stands(whole | {"log": [*whole["log"][:i], hole, *whole["log"][i + 1:]]})
    stands({"kind": "train"})


# TensorBoard


def test_tensorboard_gets_every_number_where_it_is_installed(tmp_path, monkeypatch):
    import importlib.util
    import types

    written = []

    class Writer:
        def __init__(self, folder, purge_step=None):
            written.append(("folder", folder, purge_step))

        def add_scalar(self, name, value, step):
            written.append((name, value, step))

        def close(self):
            written.append("closed")

    fake = types.ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: name == "tensorboard" or find(name, *a))
    log = Log(tmp_path)
    log.keep(4)
    log.write({"step": 4, "loss": 0.5, "perturbed_loss": float("nan"), "skipped": False})
    log.log_metrics({"sharpness/one_step": 0.1}, 4)
    log.write({"evaluation": {"step": 5, "train_loss": 0.4, "tune": {"accuracy": 0.9},
                              "stderr": {"tune": {"accuracy": 0.1}}}})
    log.close()
    assert written == [("folder", str(tmp_path / "tensorboard"), 4), ("train/loss", 0.5, 4),
                       ("sharpness/one_step", 0.1, 4), ("tune/accuracy", 0.9, 5), ("train/train_loss", 0.4, 5),
                       "closed"]


def test_without_tensorboard_the_log_alone_is_written(tmp_path):
    log = Log(tmp_path)
    log.write({"step": 0, "loss": 0.5})
    assert [path.name for path in tmp_path.iterdir() if path.name != "mine.py"] == ["log.jsonl"]
    assert scalars({"step": 0, "finding": {"name": "x", "evidence": {"a": 1.0}}})[1] == {}
