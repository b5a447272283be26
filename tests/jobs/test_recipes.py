"""The user's own recipe, and what a comparison does when something in it or around it is not as it should be."""

import dataclasses
import json
import math
import types

import pytest
import torch
from torch import nn

import flatmin.jobs.compare as module
from flatmin import cli
from flatmin.jobs import timing
from flatmin.jobs.compare import Comparison, summary
from flatmin.jobs.histories import HELD_OUT, advised
from flatmin.jobs.settings import CompareSettings
from flatmin.recipes import Data, Recipe, Supervised, find_recipe
from flatmin.report.formatting import joined
from flatmin.sharpness import Finding
from flatmin.training.folder import RunFolder
from flatmin.training.methods import METHODS
from flatmin.training.protocol import Place
from flatmin.training.run import Diverged, Training


@pytest.fixture(autouse=True)
def _float32():
    kept, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(kept)
    torch.set_num_threads(threads)


def data(folder=None):
    x = torch.randn(96, 4, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] > 0).long()
    return Data(x[:64], y[:64], x[64:], y[64:], classes=2)


MINE = Recipe("mine", lambda: nn.Linear(4, 2), data, epochs=1)


def module_with(monkeypatch, **attributes):
    """A module of the user's, importable as ``users_module``."""
    import sys

    module = types.ModuleType("users_module")
    vars(module).update(attributes)
    monkeypatch.setitem(sys.modules, "users_module", module)


def compare(*arguments, recipe="users_module:recipe"):
    return cli.main(["compare", recipe, "--methods", "sgd,sam", "--seeds", "2", "--rho", "0.1", "--quiet", *arguments])


def raises(*_):
    raise KeyError("gone")


@pytest.mark.parametrize(("change", "says"), [
    ({"model": lambda: nn.Linear(5, 2)}, "a batch of training data does not go through its model and loss: Runtime"),
    ({"model": lambda: nn.Linear(4, 1)}, "must return one row of 2 class scores for each of 32 inputs, it returned the "
                                         "shape (32, 1)"),
    ({"model": lambda: nn.LSTM(4, 2)}, "one row of 2 class scores for each of 32 inputs, it returned a tuple"),
    ({"model": raises}, "KeyError"),
    ({"criterion": nn.CrossEntropyLoss(reduction="none")}, "the loss must be one number, the mean over the batch"),
    ({"data": raises}, "the data of recipe mine raised KeyError"),
    ({"data": lambda folder: (1, 2)}, "must be a flatmin.recipes.Data, got tuple"),
])
def test_what_does_not_fit_is_said_before_anything_is_written(change, says, monkeypatch, tmp_path, capsys):
    module_with(monkeypatch, recipe=dataclasses.replace(MINE, **change))
    assert compare("--out", str(tmp_path / "run")) == 2
    error = capsys.readouterr().err
    assert says in error and error.startswith("flatmin: ") and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("source", "says"), [
    ("def broken(:\n", "cannot import 'unloadable' for 'unloadable:recipe': SyntaxError"),
    ("1 / 0\n", "ZeroDivisionError"),
    ("recipe = 3\n", "int is not a recipe: it lacks name, model, train_batches, forward, loss, weight, optimizers"),
])
def test_code_of_the_users_that_fails_is_one_line(source, says, monkeypatch, tmp_path, capsys):
    import sys

    (tmp_path / "unloadable.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    sys.modules.pop("unloadable", None)
    assert compare(recipe="unloadable:recipe") == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
    sys.modules.pop("unloadable", None)


def test_a_method_that_diverges_is_a_result_and_the_others_go_on(monkeypatch, tmp_path, capsys):
    module_with(monkeypatch, recipe=MINE)
    real = Training.run

    def run(self):
        if self.settings.method == "sam":
            raise Diverged("the loss is not finite")
        return real(self)

    monkeypatch.setattr(Training, "run", run)
    assert compare("--out", str(tmp_path / "run")) == 0
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    lost = [r for r in record["runs"] if "diverged" in r]
    assert record["status"] == "complete" and [r["method"] for r in lost] == ["sam", "sam"]
    assert record["summary"]["sgd"]["accuracy"]["n"] == 2 and record["summary"]["sam"]["accuracy"]["n"] == 0
    assert (tmp_path / "run" / "report.html").exists()


def test_where_everything_diverges_the_report_says_so(monkeypatch, tmp_path, capsys):
    module_with(monkeypatch, recipe=dataclasses.replace(MINE, lr=1e30, epochs=3))
    assert compare("--methods", "sgd", "--out", str(tmp_path / "run")) == 1
    assert "flatmin: every run diverged: base, seed 0: the loss is not finite in step" in capsys.readouterr().err
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert record["status"] == "complete" and all("not finite" in r["diverged"] for r in record["runs"])
    assert (tmp_path / "run" / "report.html").exists()
    assert [f["name"] for f in record["diagnosis"]["sgd"]["findings"]] == ["diverging"]
    assert "rho" not in str(record["diagnosis"]["sgd"]["findings"])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("part", ["train", "test"])
def test_data_that_are_not_finite_are_named(value, part, monkeypatch, tmp_path, capsys):
    def broken(folder=None):
        found = data()
        x = getattr(found, f"{part}_inputs").clone()
        x[7, 2] = x[9, 0] = value
        return dataclasses.replace(found, **{f"{part}_inputs": x})

    module_with(monkeypatch, recipe=dataclasses.replace(MINE, data=broken))
    assert compare("--out", str(tmp_path / "run")) == 2
    assert "inputs hold NaN or inf, the first of them at index 7" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_function_that_returns_a_recipe_works_in_both_verbs(monkeypatch, tmp_path):
    module_with(monkeypatch, recipe=lambda: MINE)
    assert compare("--methods", "sgd", "--seeds", "1", "--out", str(tmp_path / "a")) == 0
    weights = tmp_path / "a" / "checkpoints" / "sgd-seed0.safetensors"
    assert cli.main(["measure", "users_module:recipe", "--metrics", "one_step", "--checkpoint", str(weights), "--quiet",
                     "--out", str(tmp_path / "b")]) == 0
    a, b = (json.loads((tmp_path / n / "record.json").read_text()) for n in "ab")
    assert b["results"]["one_step"]["value"] == pytest.approx(a["runs"][0]["sharpness"]["value"], rel=1e-5)


def test_the_diagnosis_never_sees_the_test_data(monkeypatch, tmp_path):
    """Other test labels, the same diagnosis; and what is held out is not trained on."""
    records = []
    for flip in (0, 1):
        def labels(folder=None, flip=flip):
            found = data()
            return dataclasses.replace(found, test_targets=(found.test_targets + flip) % 2)

        module_with(monkeypatch, recipe=dataclasses.replace(MINE, data=labels, epochs=8))
        assert compare("--seeds", "1", "--out", str(tmp_path / str(flip))) == 0
        records.append(json.loads((tmp_path / str(flip) / "record.json").read_text()))
    assert records[0]["diagnosis"] == records[1]["diagnosis"]
    assert records[0]["runs"][0]["test"]["accuracy"] != records[1]["runs"][0]["test"]["accuracy"]
    for held_out in records[0]["held_out"].values():
        (run,) = held_out
        assert len(run["history"]["held_out"]) == 8 and {"accuracy", "ece", "confidence"} <= set(
            run["history"]["held_out"][0])


def test_a_summary_is_over_the_seeds_that_have_a_number():
    good = {"method": "sam", "test": {"accuracy": 0.5, "nll": 1.0, "ece": 0.1}}
    found = summary([good, {**good, "test": {**good["test"], "nll": "nan"}}])["sam"]
    assert found["accuracy"]["n"] == 2 and found["nll"]["n"] == 1 and math.isnan(found["nll"]["sd"])
    assert found["eigenvalue"]["n"] == 0 and math.isnan(found["eigenvalue"]["mean"])


def test_every_test_number_has_its_error_and_every_run_its_optimizer(monkeypatch, tmp_path):
    module_with(monkeypatch, recipe=MINE)
    assert compare("--out", str(tmp_path / "run")) == 0
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    for run in record["runs"]:
        assert {"accuracy", "nll", "ece"} <= set(run["test"]["stderr"])
        assert run["sharpness"]["samples"] == 64, "no more examples than there are"
        step = 4 if run["method"] == "sgd_2x" else 2
        state = torch.load(tmp_path / "run" / "checkpoints" / f"{run['method']}-seed{run['seed']}" / "checkpoints" /
                           f"step-0000000{step}" / "state.pt", weights_only=True)
        assert state["optimizers"][0]["state"][0]["momentum_buffer"].shape == (2, 4) and state["step"] == step


def test_a_run_goes_on_only_with_the_data_it_began_with(monkeypatch, tmp_path, capsys):
    module_with(monkeypatch, recipe=MINE)
    settings = CompareSettings(recipe="users_module:recipe", methods="sgd", seeds=1)
    folder = RunFolder.create(tmp_path / "run")
    folder.save_record(Comparison(settings, folder, quiet=True).record)
    other = dataclasses.replace(data(), train_inputs=data().train_inputs + 1)
    module_with(monkeypatch, recipe=dataclasses.replace(MINE, data=lambda folder: other))
    assert cli.main(["compare", "--resume", str(folder.path), "--quiet"]) == 1
    error = capsys.readouterr().err
    assert "are not those that" in error and error.count("\n") == 1
    module_with(monkeypatch, recipe=MINE)
    assert cli.main(["compare", "--resume", str(folder.path), "--quiet"]) == 0


@pytest.mark.parametrize("content", ['{"kind": "compare"}', '{"kind": "compare", "settings": 3}', "[]", "{", ""])
def test_a_damaged_record_is_one_line_and_stays_as_it_is(content, tmp_path, capsys):
    (tmp_path / "record.json").write_text(content)
    assert cli.main(["compare", "--resume", str(tmp_path), "--quiet"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("flatmin: ") and error.count("\n") == 1
    assert (tmp_path / "record.json").read_text() == content


@pytest.mark.parametrize(("line", "says"), [
    ('epochs = "many"', "epochs must be a whole number, got 'many'"),
    ("seeds = 1.5", "seeds must be a whole number, got 1.5"),
    ("noise = true", "noise must be a number, got True"),
    ("methods = 3", "methods must be text, got 3"),
])
def test_a_setting_of_the_wrong_type_is_named(line, says, tmp_path, capsys):
    (tmp_path / "c.toml").write_text(line)
    assert cli.main(["compare", "--config", str(tmp_path / "c.toml"), "--quiet"]) == 2
    assert says in capsys.readouterr().err


def test_the_radius_is_chosen_on_no_more_examples_than_the_recipe_says(monkeypatch, tmp_path):
    recipe = dataclasses.replace(find_recipe("digits"), epochs=1, folds=1, tuning_samples=100, noise=0.0,
                                 rhos={"sam": (0.05, 0.1)})
    monkeypatch.setattr(module, "find_recipe", lambda name: recipe)
    settings = CompareSettings(methods="sgd,sam", seeds=2, equal_compute=False)
    job = Comparison(settings, RunFolder.create(tmp_path / "run"), quiet=True)
    part, = job.parts
    (held, _), = part.held_out("tune", job.at)
    kept = {tuple(r.tolist()) for r in part.train_batches(job.at).tensors[0]}
    assert len(kept) == 80 and len(held) == 20 and not kept & {tuple(r.tolist()) for r in held}
    assert job._steps() == {"sgd": 3 + 2 * 32, "sam": 2 * 3 + 2 * 32}   # ⌈80 / 32⌉ held out, ⌈1000 / 32⌉ a seed
    assert job._criterion() == "mean accuracy over a held-out fifth of 100 examples of the training data"
    job.run()
    assert job.record["data"]["held_out"] == 20 and not any(job._steps().values())


def test_the_time_of_a_comparison_is_foretold(monkeypatch, tmp_path, capsys):
    """A step that takes a known time: as many of them as are left; nothing is said where nothing is left or wanted."""
    recipe = dataclasses.replace(find_recipe("digits"), epochs=1)
    monkeypatch.setattr(module, "find_recipe", lambda name: recipe)
    clock = iter(range(10**6))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(clock)))
    job = Comparison(CompareSettings(methods="sgd,sam", seeds=1), RunFolder(tmp_path / "none"), quiet=True)
    assert timing.predicted(job._trainings(True), {"sgd": 7, "sam": 5}) == 12
    monkeypatch.undo()
    monkeypatch.setattr(module, "find_recipe", lambda name: recipe)
    folder = RunFolder.create(tmp_path / "run")
    job = module.Comparison(module.CompareSettings(methods="sgd", seeds=1), folder)
    job.run()
    assert "57 training steps, about 0:0" in capsys.readouterr().err
    module.Comparison(module.CompareSettings(methods="sgd", seeds=1), folder, job.record).run()
    assert "training steps" not in capsys.readouterr().err


def test_the_advice_leaves_out_radii_that_were_tried_and_names_the_knobs_of_looksam():
    finding = Finding(name="rho too large", symptom="s", cause="rho is above its useful range", solution="lower rho")
    chosen = {"grid": [0.05, 0.1, 0.2, 0.4], "scores": [0.7, 0.8, 0.81, 0.85], "chosen": 0.4}
    for name, begins in (("sam", "keep rho; tried"), ("looksam", "change alpha and k; tried")):
        advice = advised(finding, METHODS[name], 0.4, chosen)
        assert advice.solution.startswith(begins) and "rho 0.2 reached 0.81, no better than 0.85" in advice.solution
        assert ("alpha and k" in advice.cause) == (name == "looksam") and "useful range" not in advice.cause
    assert advised(finding, METHODS["sam"], 0.05, chosen | {"chosen": 0.05}) == finding  # beyond the grid
    assert advised(finding, METHODS["sgd"], None, {}) == finding


def test_a_finding_says_which_runs_show_it(monkeypatch, tmp_path, capsys):
    module_with(monkeypatch, recipe=MINE)
    assert compare("--methods", "sgd,sam", "--rho", "0.05", "--seeds", "2", "--out", str(tmp_path / "run")) == 0
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    every = [(m, f) for m, part in record["diagnosis"].items() for f in part["findings"]]
    shown = " ".join(capsys.readouterr().out.split())
    page = (tmp_path / "run" / "report.html").read_text()
    assert every and "ρ" in shown.split("─")[0] and " 0.05 " in shown
    for _, fault in every:
        assert set(fault["in"]) <= {"seed 0", "seed 1", HELD_OUT} and fault["runs"] == len(fault["in"])
        said = f"in {joined(fault['in'])} ({len(fault['in'])} of 3 runs)"
        assert said in shown and said in page and fault["symptom"] in shown


# recipes of any loss


def regression(**changes):
    x = torch.randn(120, 3, generator=torch.Generator().manual_seed(0))
    y = (2 * x[:, :1]).sin()
    return Supervised(lambda: nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)), nn.functional.mse_loss,
                      (x[:80], y[:80]), (x[80:], y[80:]), name="regression", epochs=2, **changes)


def users(source):
    tensors = torch.utils.data.TensorDataset(*regression().train)
    return {"tensors": regression(), "data set": dataclasses.replace(regression(), train=tensors),
            "loader": dataclasses.replace(regression(), train=torch.utils.data.DataLoader(tensors, 16, shuffle=True)),
            "batches": dataclasses.replace(regression(), train=list(torch.utils.data.DataLoader(tensors, 16)))}[source]


@pytest.mark.parametrize("source", ["tensors", "data set", "loader", "batches"])
def test_a_regression_is_compared_by_its_loss(source, monkeypatch, tmp_path, capsys):
    module_with(monkeypatch, recipe=users(source))
    assert compare("--methods", "base,sam", "--rho", "0.05,50", "--out", str(tmp_path / "run")) == 0
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    chosen = record["selection"]["sam"]
    assert chosen["criterion"] == "mean loss over a held-out fifth of the training data"
    assert chosen["chosen"] == 0.05 and float(chosen["scores"][0]) < float(chosen["scores"][1]), "lower is better"
    assert record["metrics"] == {"loss": {"higher_is_better": False}} and record["base"] == "sgd"
    weights = {r["method"]: record["summary"][r["method"]]["loss"]["mean"] for r in record["runs"]}
    shown, page = capsys.readouterr().out, (tmp_path / "run" / "report.html").read_text()
    assert set(weights) == {"sgd", "sam", "sgd_2x"} and "accuracy" not in shown and "accura" not in page
    assert "lowest test loss" in page and "test loss: mean difference over seeds" in shown


@pytest.mark.parametrize("source", ["tensors", "data set", "loader", "batches"])
def test_what_is_held_out_is_not_trained_on(source):
    recipe, at = users(source), Place(3)

    def rows(batches):
        return {tuple(r.tolist()) for x, _ in batches for r in x}

    every = rows(recipe.train_batches(at))
    parts = [recipe.holding_out(i) for i in range(5)]
    held = [rows(p.held_out("tune", at)) for p in parts]
    for part, its in zip(parts, held, strict=True):
        kept = rows(part.train_batches(at))
        assert not kept & its and kept | its == every and kept == rows(part.train_batches(Place(4)))
    assert set().union(*held) == every and sum(map(len, held)) == len(every)


def test_a_stream_that_cannot_be_split_needs_a_radius(monkeypatch, tmp_path, capsys):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            x, y = regression().train
            return iter(zip(x.split(16), y.split(16), strict=True))

    module_with(monkeypatch, recipe=dataclasses.replace(regression(), train=torch.utils.data.DataLoader(
        Stream(), batch_size=None)))
    assert compare("--steps", "6", "--rho", "0.1,0.2", "--out", str(tmp_path / "a")) == 2
    assert "cannot be split into five parts" in capsys.readouterr().err and not (tmp_path / "a").exists()
    assert compare("--steps", "6", "--seeds", "1", "--rho", "0.1", "--out", str(tmp_path / "b")) == 0
    record = json.loads((tmp_path / "b" / "record.json").read_text())
    assert not record["held_out"] and record["settings"]["steps"] == 6 and record["settings"]["epochs"] is None


def test_a_recipe_that_makes_its_own_optimizer(monkeypatch, tmp_path, capsys):
    made = []

    def optimizer(model):
        made.append(torch.optim.Adam(model.parameters(), 1e-2))
        return made[-1]

    module_with(monkeypatch, recipe=regression(optimizer=optimizer))
    assert compare("--methods", "sgd,sam", "--out", str(tmp_path / "a")) == 2
    assert "makes its own optimizer: compare with base instead of sgd" in capsys.readouterr().err
    assert compare("--methods", "base,sam", "--seeds", "1", "--out", str(tmp_path / "b")) == 0
    record = json.loads((tmp_path / "b" / "record.json").read_text())
    assert {r["method"] for r in record["runs"]} == {"base", "sam", "base_2x"} and len(made) >= 3


def test_the_base_is_the_recipes_optimizer(monkeypatch, tmp_path):
    module_with(monkeypatch, recipe=regression(optimizer="adamw", lr=1e-2))
    job = Comparison(CompareSettings(recipe="users_module:recipe", rho="0.1"), RunFolder(tmp_path / "a"), quiet=True)
    assert [m.name for m in job.methods] == ["adamw", "sam", "asam"] and job.references[0].name == "adamw_2x"
    for run in job._trainings(True).values():
        group, = run.optimizers[0].param_groups
        assert isinstance(run.optimizers[0], torch.optim.AdamW) and group["lr"] == 1e-2


def test_a_recipe_without_evaluation_is_refused(monkeypatch, tmp_path, capsys):
    bare = types.SimpleNamespace(name="bare")
    for name in ("model", "train_batches", "forward", "loss", "weight", "optimizers"):
        setattr(bare, name, getattr(regression(), name))
    module_with(monkeypatch, recipe=bare)
    assert compare("--out", str(tmp_path / "run")) == 2
    assert "has no held_out and evaluate" in capsys.readouterr().err and not (tmp_path / "run").exists()
