"""The main job from the command line: what it writes, how it resumes, how it refuses.

Runs the real verb in this process on the real digits with few epochs; what it measures is tested elsewhere.
"""

import dataclasses
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flatmin import cli
from flatmin.jobs.compare import Comparison
from flatmin.jobs.settings import CompareSettings, MeasureSettings, given_radii
from flatmin.recipes import find_recipe
from flatmin.results import plain
from flatmin.training.folder import RunFolder
from flatmin.training.protocol import Metric
from flatmin.training.run import Training

QUICK = ["--epochs", "2", "--seeds", "1", "--rho", "sam=0.1,asam=1", "--quiet"]


@pytest.fixture(autouse=True)
def _float32():
    kept, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(kept)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    torch.set_default_dtype(torch.float32)
    folder = tmp_path_factory.mktemp("run") / "digits"
    assert cli.main(["compare", *QUICK, "--out", str(folder)]) == 0
    return folder


def record_of(folder: Path) -> dict:
    return json.loads((folder / "record.json").read_text())


def test_a_run_folder_holds_record_checkpoints_and_report(finished):
    record = record_of(finished)
    assert record["status"] == "complete"
    assert [r["method"] for r in record["runs"]] == ["sgd", "sam", "asam", "sgd_2x"]
    assert [len(r["history"]["epoch"]) for r in record["runs"]] == [2, 2, 2, 4]
    assert record["settings"]["rho"] == "sam=0.1,asam=1" and record["versions"]["torch"] == torch.__version__
    for run in record["runs"]:
        assert run["hessian"]["converged"] and run["hessian"]["residual"] >= 0
        parts = run["sharpness"]
        total = parts["first_order"] + parts["second_order"] + parts["remainder"]
        assert parts["value"] == pytest.approx(total)
        weights = load_file(finished / "checkpoints" / f"{run['method']}-seed0.safetensors")
        assert {"0.weight", "4.bias"} <= set(weights)
    assert {"seconds", "ratio", "quartiles"} <= set(record["timing"]["sam"])
    assert record["base"] == "sgd" and record["twice"] == {"sam": "sgd_2x", "asam": "sgd_2x"}
    assert (finished / "report.html").stat().st_size > 10_000


def test_resume_takes_the_same_settings_again_and_no_others(finished, capsys):
    again = ["compare", *QUICK, "--out", str(finished), "--resume"]
    before = record_of(finished)["runs"]
    assert cli.main(again) == 0 and record_of(finished)["runs"] == before, "a finished run has nothing left to do"
    assert cli.main([*again, "--seeds", "2"]) == 2
    assert "--resume continues with the run's own settings: seeds was 1, not 2" in capsys.readouterr().err


def test_the_report_verb_writes_the_page_again(finished, capsys):
    (finished / "report.html").unlink()
    assert cli.main(["report", str(finished)]) == 0
    assert str(finished) in capsys.readouterr().out and (finished / "report.html").exists()


def test_the_radius_is_chosen_without_the_test_data(tmp_path, monkeypatch):
    """Selection on a recipe whose test data may not be touched until the radius stands."""
    import flatmin.jobs.compare as module

    recipe = dataclasses.replace(find_recipe("digits"), epochs=1, folds=2, rhos={"sam": (0.01, 0.1)})
    monkeypatch.setattr(module, "find_recipe", lambda name: recipe)
    job = Comparison(CompareSettings(methods="sam", seeds=1), RunFolder.create(tmp_path / "run"), quiet=True)
    job.progress = module.Display("", total=1, quiet=True)
    seen, real = [], type(recipe).held_out

    def held_out(self, split, at):
        seen.append(split)
        return real(self, split, at)

    monkeypatch.setattr(type(recipe), "held_out", held_out)
    monkeypatch.setattr(type(recipe), "evaluate", lambda self, model, batches: {"accuracy": Metric(
        0.5, higher_is_better=True)})
    job._choose(job.methods[0])
    assert job.record["selection"]["sam"]["chosen"] == 0.01, "ties go to the smaller radius"
    assert set(seen) == {"tune", "train"} and seen.count("tune") == 6     # four scores, two epochs watched
    data, at = recipe.load(None), job.at
    rows = {tuple(r.tolist()) for r in data.test_inputs}
    held = [torch.cat([x for x, _ in real(part, "tune", at)]) for part in job.parts]
    assert not any(tuple(r.tolist()) in rows for x in held for r in x) and [len(x) for x in held] == [200, 200]
    for x, part in zip(held, job.parts, strict=True):
        kept = {tuple(r.tolist()) for r in part.train_batches(at).tensors[0]}
        assert not kept & {tuple(r.tolist()) for r in x}
    assert not {tuple(r.tolist()) for r in held[0]} & {tuple(r.tolist()) for r in held[1]}


@pytest.mark.slow
def test_interrupted_anywhere_it_resumes_bitwise(finished, tmp_path, monkeypatch, capsys):
    """Ctrl-C in the middle of an epoch of the second method; --resume ends with the same weights and numbers."""
    folder, calls, real = tmp_path / "run", [], Training._step

    def stop_once(self, micro, weights):
        calls.append(self.steps)
        if len(calls) == 64 + 32 + 7:
            raise KeyboardInterrupt
        return real(self, micro, weights)

    monkeypatch.setattr(Training, "_step", stop_once)
    assert cli.main(["compare", *QUICK, "--out", str(folder)]) == 130
    message = capsys.readouterr().err
    assert f"--resume {folder}" in message and message.count("\n") == 1
    half = record_of(folder)
    assert half["status"] == "interrupted" and [r["method"] for r in half["runs"]] == ["sgd"]
    assert cli.main(["compare", "--resume", str(folder), "--quiet"]) == 0
    # since the last checkpoint (every 4 steps), the rest of sam, asam, twice sgd; held out; timing
    assert len(calls) == 64 + 32 + 7 + (64 - 36) + 64 + 128 + 3 * 2 * 25 + 3 * 65
    same_results(folder, finished)


def same_results(folder, finished):
    a, b = record_of(folder), record_of(finished)
    for name in ("sgd", "sam", "asam", "sgd_2x"):
        ours = load_file(folder / "checkpoints" / f"{name}-seed0.safetensors")
        whole = load_file(finished / "checkpoints" / f"{name}-seed0.safetensors")
        assert all(torch.equal(ours[k], whole[k]) for k in whole)
    for key in set(b) - {"created", "timing"}:
        assert a[key] == b[key], key


@pytest.mark.slow
def test_killed_in_an_epoch_it_resumes_bitwise(finished, tmp_path):
    """SIGKILL in a process of its own, in the 41st of 64 steps of the second method."""
    folder = tmp_path / "run"
    (tmp_path / "killed.py").write_text(
        "import os, signal, sys\nfrom flatmin import cli\nfrom flatmin.training.run import Training\n"
        "real, calls = Training._step, []\n"
        "def step(self, *args):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 64 + 41:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(self, *args)\n"
        "Training._step = step\ncli.main(sys.argv[1:])\n")
    done = subprocess.run([sys.executable, str(tmp_path / "killed.py"), "compare", *QUICK, "--out", str(folder)],
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == -9 and [r["method"] for r in record_of(folder)["runs"]] == ["sgd"], done.stderr
    assert cli.main(["compare", "--resume", str(folder), "--quiet"]) == 0
    same_results(folder, finished)


def test_interrupted_while_a_radius_is_chosen_it_ends_in_the_same_record(tmp_path, monkeypatch):
    """In the second of two held-out parts of a radius, whose first run the record holds already."""
    import flatmin.jobs.compare as module

    recipe = dataclasses.replace(find_recipe("digits"), epochs=1, folds=2)
    monkeypatch.setattr(module, "find_recipe", lambda name: recipe)
    settings = CompareSettings(methods="sam", seeds=1, rho="0.05,0.2", equal_compute=False)
    whole = Comparison(settings, RunFolder.create(tmp_path / "whole"), quiet=True).run()
    real, calls = Training._step, []

    def stop_once(self, micro, weights):
        calls.append(1)
        if len(calls) == 25 + 7:
            raise KeyboardInterrupt
        return real(self, micro, weights)

    monkeypatch.setattr(Training, "_step", stop_once)
    folder = RunFolder.create(tmp_path / "half")
    with pytest.raises(KeyboardInterrupt):
        Comparison(settings, folder, quiet=True).run()
    assert len(record_of(folder.path)["held_out"]["sam"]) == 1
    again = Comparison(settings, folder, record_of(folder.path), quiet=True).run()
    for key in ("selection", "held_out", "runs", "diagnosis"):
        assert plain(again[key]) == plain(whole[key]), key
    assert len(again["held_out"]["sam"]) == 1 and again["selection"]["sam"]["grid"] == [0.05, 0.2]


@pytest.mark.parametrize(("arguments", "says"), [
    (["--methods", "sgd,adam"], "unknown method 'adam': choose from all, base, sgd"),
    (["--rho", "-0.1"], "--rho must not be negative, got -0.1"),
    (["--rho", "nan"], "--rho must not be negative, got nan"),
    (["--rho", "large"], "--rho takes a number or method=number, got 'large'"),
    (["--rho", "0.1,large"], "--rho takes a number or method=number, got 'large'"),
    (["--rho", "sam=0.1/x"], "--rho takes a number or method=number, got 'sam=0.1/x'"),
    (["--rho", "sgd=0.1"], "--rho gives a radius of sgd, which has none"),
    (["--rho", "gsam=0.1"], "--rho gives a radius of gsam, which is not among --methods base,sam,asam"),
    (["--steps", "3", "--epochs", "2"], "--steps and --epochs are two ways to say one thing"),
    (["language", "--noise", "0.5"], "recipe language knows no noise"),
    (["--seeds", "0"], "--seeds must be at least 1"),
    (["--noise", "1.5"], "--noise must be a share from 0 to 1, got 1.5"),
    (["--epochs", "0"], "--epochs must be at least 1"),
    (["no-such-recipe"], "no recipe 'no-such-recipe': choose digits, fashion-mnist, cifar10, language, or module:"),
    (["no_such_module:recipe"], "cannot import 'no_such_module'"),
    (["json:dumps"], "json:dumps"),
    (["--methods", "sam_on"], "the model has no normalization layers"),
    (["fashion-mnist", "--data", "nowhere"], "dataset-fashion-mnist"),
    (["cifar10", "--data", "nowhere"], "binary version"),
    (["--resume", "nowhere"], "nowhere is not a run folder: it has no record.json"),
    (["--resume", "nowhere", "--out", "elsewhere"], "name two folders"),
    (["--resume"], "runs/compare is not a run folder"),
    (["--config", "nowhere.toml"], "cannot read nowhere.toml"),
])
def test_a_wrong_call_is_one_clear_line(arguments, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    status = cli.main(["compare", *arguments, "--quiet"])
    error = capsys.readouterr().err
    assert status in (1, 2) and says in error
    assert error.startswith("flatmin: ") and error.count("\n") == 1
    assert not list(tmp_path.iterdir()), "nothing may be written by a call that was wrong"


@pytest.mark.parametrize(("arguments", "says"), [
    (["compare", "--seeds", "many"], "--seeds: expected a whole number, got many; see flatmin compare --help"),
    (["compare", "--seeds", "1.5"], "--seeds: expected a whole number, got 1.5; see flatmin compare --help"),
    (["compare", "--noise", "much"], "--noise: expected a number, got much; see flatmin compare --help"),
    (["compare", "--noise"], "argument --noise: expected one argument; see flatmin compare --help"),
    (["compare", "--nose", "1"], "unrecognized arguments: --nose; see flatmin compare --help"),
    (["compare", "--seeds", "0"], "--seeds must be at least 1, got 0; see flatmin compare --help"),
    (["measure", "m:o", "--tol", "small"], "--tol: expected a number, got small; see flatmin measure --help"),
    (["measure"], "measure needs module:objective, or hf:FOLDER with --text FILE; see flatmin measure --help"),
    (["report"], "the following arguments are required: folder; see flatmin report --help"),
    (["fit"], "argument VERB: invalid choice: 'fit' (choose from 'train', 'compare', 'measure', 'report'); see flatmin "
                "--help"),
])
def test_what_the_parser_refuses_is_one_plain_line(arguments, says, capsys):
    assert cli.main(arguments) == 2
    assert capsys.readouterr().err == f"flatmin: {says}\n"


@pytest.mark.parametrize(("text", "value"), [("0.1", "0.1"), ("1", "1"), ("sam=0.1,asam=1", "sam=0.1,asam=1")])
def test_a_radius_stays_text(text, value):
    assert cli._parser().parse_args(["compare", "--rho", text]).compare.rho == value


@pytest.mark.parametrize(("kind", "names"), [(CompareSettings, ("noise", "epochs", "rho", "data")),
                                             (MeasureSettings, ("checkpoint", "against"))])
def test_each_setting_is_a_flag_with_the_default_and_the_help_of_its_field(kind, names):
    """The parser holds nothing of its own: the settings class is the one place where a setting is stated."""
    verb = "compare" if kind is CompareSettings else "measure"
    parser = next(a for a in cli._parser()._actions if a.dest == "verb").choices[verb]
    actions = {a.dest: a for a in parser._actions}
    for field in dataclasses.fields(kind):
        action = actions[field.name]
        assert action.help and action.help in inspect.getsource(kind)
        if action.option_strings:
            assert action.default == field.default, field.name
    assert all(actions[name].default is None for name in names)


def test_an_existing_run_is_never_overwritten(finished, capsys):
    before = (finished / "record.json").read_bytes()
    assert cli.main(["compare", *QUICK, "--out", str(finished)]) == 1
    assert f"--resume {finished}" in capsys.readouterr().err
    assert (finished / "record.json").read_bytes() == before


def test_an_out_that_cannot_be_written_is_one_clear_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert cli.main(["compare", *QUICK, "--out", str(tmp_path / "file" / "run")]) == 1
    error = capsys.readouterr().err
    assert "cannot write to" in error and error.count("\n") == 1


def test_a_config_file_and_flags_over_it(tmp_path, capsys):
    config = tmp_path / "c.toml"
    config.write_text('methods = "sgd"\nseeds = 1\nepochs = 3\n')
    assert cli.main(["compare", "--config", str(config), "--epochs", "1", "--quiet", "--out", str(tmp_path / "r")]) == 0
    settings = record_of(tmp_path / "r")["settings"]
    assert settings["epochs"] == 1 and settings["methods"] == "sgd"
    config.write_text("rate = 3\n")
    assert cli.main(["compare", "--config", str(config)]) == 2
    assert "unknown settings rate: choose from recipe, methods" in capsys.readouterr().err


def test_the_flags_are_these():
    """A new flag is a decision: it fails here first."""
    verbs = next(a for a in cli._parser()._actions if a.dest == "verb").choices
    flags = {name: sorted(o for a in p._actions for o in a.option_strings if o.startswith("--"))
             for name, p in verbs.items()}
    assert flags["compare"] == ["--config", "--data", "--epochs", "--equal-compute", "--help", "--methods",
                                "--noise", "--out", "--quiet", "--resume", "--rho", "--seeds", "--steps", "--threads"]
    assert flags["report"] == ["--csv", "--help"]
    assert "examples:" in verbs["compare"].format_help()


def test_the_users_own_recipe(tmp_path):
    """module:attribute from the working directory, in a process of its own; a model with BatchNorm."""
    (tmp_path / "mine.py").write_text(
        "import torch\nfrom torch import nn\nfrom flatmin.recipes import Data, Recipe\n"
        "def data(folder=None):\n"
        "    x = torch.randn(300, 4, generator=torch.Generator().manual_seed(0)); y = (x[:, 0] > 0).long()\n"
        "    return Data(x[:200], y[:200], x[200:], y[200:], classes=2)\n"
        "recipe = Recipe('mine', lambda: nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)),"
        " data, epochs=2)\n")
    done = subprocess.run(
        [sys.executable, "-m", "flatmin.cli", "compare", "mine:recipe", "--methods", "sgd,sam_on,esam", "--seeds", "2",
         "--rho", "0.1", "--out", "run", "--quiet"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    record = record_of(tmp_path / "run")
    assert record["data"]["name"] == "mine" and len(record["runs"]) == 8
    assert all(r["test"]["accuracy"] > 0.6 for r in record["runs"])


def test_radii_given_by_hand():
    assert given_radii("0.1") == {"": (0.1,)} and given_radii("sam=0.1, asam=1") == {"sam": (0.1,), "asam": (1.0,)}
    assert given_radii("0.1,0.25,0.5") == {"": (0.1, 0.25, 0.5)} and given_radii("0.1,0.1") == {"": (0.1,)}
    assert given_radii("sam=0.1/0.2,asam=1,0.5") == {"sam": (0.1, 0.2), "asam": (1.0,), "": (0.5,)}
    assert given_radii("sam=0.1,sam=0.2") == {"sam": (0.1, 0.2)}
    with pytest.raises(ValueError, match="unknown method 'nosam'"):
        given_radii("nosam=1")


def test_a_grid_is_chosen_from_and_a_single_radius_is_not(tmp_path):
    folder = tmp_path / "run"
    assert cli.main(["compare", "--epochs", "1", "--seeds", "1", "--methods", "sgd,sam,asam", "--rho",
                     "0.05,0.2,asam=1", "--equal-compute", "false", "--quiet", "--out", str(folder)]) == 0
    record = record_of(folder)
    chosen = record["selection"]["sam"]
    assert set(record["selection"]) == {"sam"} and chosen["grid"] == [0.05, 0.2] and len(chosen["scores"]) == 2
    assert chosen["chosen"] == chosen["grid"][chosen["scores"].index(max(chosen["scores"]))]
    rhos = {r["method"]: r["rho"] for r in record["runs"]}
    assert rhos == {"sgd": None, "sam": chosen["chosen"], "asam": 1.0} and not record["twice"]
