"""``flatmin measure``: from a user's own module to numbers, record and page; what it refuses, and how it resumes.

The modules are tiny and written to a temporary folder; what the measures compute is tested elsewhere.
"""

import json
import math
import re
import sys
import warnings

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from flatmin import Objective, cli, report
from flatmin.curvature.objective_operator import ObjectiveOperator
from flatmin.jobs import measure
from flatmin.report import measure_figures
from flatmin.training.weights import load_checkpoint

MODULE = """
import torch
from torch import nn
import flatmin

def net():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))

def data(n=40):
    g = torch.Generator().manual_seed(0)
    return torch.randn(n, 4, generator=g), torch.randint(3, (n,), generator=g)

def objective():
    return flatmin.Objective(net(), nn.CrossEntropyLoss(), data())

def small():
    return flatmin.Objective(net(), nn.CrossEntropyLoss(), data(4))

def pair():
    return net(), data()

def broken():
    raise RuntimeError("no disk")

def misfit():
    return flatmin.Objective(nn.Linear(5, 3), nn.CrossEntropyLoss(), data())

torch.manual_seed(1)
ready = objective()
number = 3
"""


@pytest.fixture(autouse=True)
def _mine(tmp_path, monkeypatch):
    kept = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    (tmp_path / "mine.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    sys.modules.pop("mine", None)
    yield
    sys.modules.pop("mine", None)
    torch.set_default_dtype(kept)


def run(*args):
    return cli.main(["measure", *args, "--quiet"])


def record_of(folder):
    return json.loads((folder / "record.json").read_text())


def trained():
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def test_the_default_measures_with_errors_record_and_page(tmp_path, capsys):
    assert run("mine:objective", "--out", "r", "--k", "3") == 0
    record, shown = record_of(tmp_path / "r"), capsys.readouterr().out
    assert record["status"] == "complete" and list(record["results"]) == ["one_step", "spectrum", "trace", "density"]
    spectrum, step, trace = (record["results"][k] for k in ("spectrum", "one_step", "trace"))
    assert len(spectrum["eigenvalues"]) == len(spectrum["residuals"]) == 3 and all(spectrum["converged"])
    assert step["settings"]["rho"] == 0.05 and step["second_order"] is not None
    assert trace["stderr"] >= 0 and trace["settings"]["rtol"] == 0.05
    assert record["model"]["parameters"] == 51 and record["data"]["samples"] == 40
    assert not list((tmp_path / "r" / "checkpoints").iterdir())
    assert "largest eigenvalue" in shown and "computation: the residual of an eigenvalue" in shown
    assert "report r/report.html" in shown
    text = (tmp_path / "r" / "report.html").read_text()
    assert "✓ converged" in text and "Spectral density" in text
    assert not re.search(r"https?://|<link|<script", text)


def test_the_numbers_are_those_of_the_library(tmp_path):
    """Against the dense Hessian in float64, of the same weights."""
    from flatmin.curvature import dense_hessian

    assert run("mine:ready", "--out", "r", "--k", "2", "--tol", "1e-5") == 0
    import mine  # pyright: ignore[reportMissingImports]

    values = torch.linalg.eigvalsh(dense_hessian(mine.ready).double())
    record = record_of(tmp_path / "r")["results"]
    assert record["spectrum"]["eigenvalues"] == pytest.approx(values[-2:].tolist(), rel=1e-4)
    assert record["trace"]["settings"]["method"] == "exact"     # so few parameters; float32 rounds
    assert record["trace"]["value"] == pytest.approx(float(values.sum()), rel=1e-6)


def test_all_measures_and_the_surface_that_turns(tmp_path):
    assert run("mine:objective", "--metrics", "all", "--out", "r") == 0
    record = record_of(tmp_path / "r")
    assert list(record["results"]) == list(measure.METRICS)
    assert len(record["results"]["surface"]["values"]) == 51 and len(record["results"]["line"]["x"]) == 51
    text = (tmp_path / "r" / "report.html").read_text()
    assert "51 × 51" in text and text.count("<canvas") == 1
    assert "script-src 'sha256-" in text and text.count("<script>") == 1
    assert "unsafe-inline'; script-src" in text                # styles inline, scripts by their hash alone
    import base64
    import hashlib

    script = re.findall(r"<script>(.*?)</script>", text, re.S)[0]
    assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in text


@pytest.mark.parametrize("wrap", ["safetensors", "plain", "model", "state_dict", "module", "lightning", "both"])
def test_a_checkpoint_sets_the_weights(tmp_path, wrap):
    state = trained().state_dict()
    if wrap == "safetensors":
        save_file(state, "w.safetensors")
    else:
        torch.save({"plain": state, "model": {"model": state, "epoch": 3}, "state_dict": {"state_dict": state},
                    "module": {f"module.{k}": v for k, v in state.items()},
                    "lightning": {"state_dict": {f"model.{k}": v for k, v in state.items()}, "epoch": 3},
                    "both": {f"net.module._orig_mod.{k}": v for k, v in state.items()}}[wrap], "w.pt")
    name = "w.safetensors" if wrap == "safetensors" else "w.pt"
    assert run("mine:objective", "--metrics", "one_step", "--out", "a") == 0
    assert run("mine:objective", "--metrics", "one_step", "--out", "b", "--checkpoint", name) == 0
    a, b = (record_of(tmp_path / n)["results"]["one_step"] for n in "ab")
    assert a["loss"] != b["loss"] and a["value"] != b["value"]
    import mine  # pyright: ignore[reportMissingImports]

    expected = Objective(trained(), nn.CrossEntropyLoss(), mine.data())
    assert b["loss"] == pytest.approx(float(expected.value()), rel=1e-6)


def test_bad_checkpoints_are_named_and_nothing_is_written(tmp_path, capsys):
    state = trained().state_dict()

    def refused(value, name="w.pt"):
        if value is not None:
            torch.save(value, name)
        assert run("mine:objective", "--checkpoint", name, "--out", "r") == 2
        assert not (tmp_path / "r").exists()
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    assert "no checkpoint gone.pt" in refused(None, "gone.pt")
    assert "missing 0.weight; unexpected first" in refused({("first" if k == "0.weight" else k): v
                                                            for k, v in state.items()})
    assert "0.bias (7,) instead of (6,)" in refused({**state, "0.bias": torch.zeros(7)})
    assert "NaN in 2.bias" in refused({**state, "2.bias": torch.full((3,), math.nan)})
    assert "missing 0.weight, 0.bias, 2.weight and 1 more" in refused({"x": torch.zeros(1)})
    assert "torch.save(model.state_dict(), ...), not a whole model" in refused(trained())
    assert "holds no state_dict" in refused([1, 2])
    (tmp_path / "w.safetensors").write_bytes(b"nothing of the kind")
    assert "cannot read the checkpoint w.safetensors" in refused(None, "w.safetensors")


def test_what_does_not_fit_leaves_the_model_as_it_was():
    model = trained()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    torch.save({**{k: v + 1 for k, v in before.items()}, "0.bias": torch.zeros(7)}, "w.pt")
    with pytest.raises(ValueError, match="does not fit"):
        load_checkpoint(model, "w.pt")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("args, words", [
    (["mine:objective", "--metrics", "one_step,nosuch"], "unknown metric 'nosuch': choose from one_step, spectrum"),
    (["mine:objective", "--metrics", ","], "choose from one_step"),
    (["mine:objective", "--k", "0"], "--k must be at least 1"),
    (["mine:objective", "--rho", "-1"], "--rho must be positive"),
    (["mine:objective", "--tol", "nan"], "--tol: expected a number, got nan"),
    (["mine:objective", "--seed", "-1"], "--seed must be at least 0, got -1"),
    (["mine"], "module:attribute"),
    ([], "needs module:objective"),
    (["nosuch:objective"], "cannot import 'nosuch'"),
    (["mine:nosuch"], "has no 'nosuch'"),
    (["mine:number"], "is not a flatmin.Objective"),
    (["mine:broken"], "raised RuntimeError: no disk"),
    (["mine:misfit"], "cannot be evaluated: RuntimeError"),
])
def test_wrong_calls_write_nothing(tmp_path, capsys, args, words):
    assert run(*args, "--out", "r") == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert not (tmp_path / "r").exists() and not (tmp_path / "runs").exists()


def test_models_with_data_and_mappings_of_a_language_model(tmp_path):
    """(model, data) with labels that default to the inputs, and padding that does not count; tied weights."""
    pytest.importorskip("transformers")
    (tmp_path / "lm.py").write_text(
        "import torch, transformers\n"
        "def objective():\n"
        "    c = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=17, n_positions=12)\n"
        "    ids = torch.randint(17, (8, 9), generator=torch.Generator().manual_seed(0))\n"
        "    mask = torch.ones_like(ids); mask[0, 5:] = 0\n"
        "    batches = [{'input_ids': i, 'attention_mask': m} for i, m in zip(ids.split(3), mask.split(3))]\n"
        "    return transformers.GPT2LMHeadModel(c), batches\n")
    sys.modules.pop("lm", None)
    model = measure.find_objective("lm:objective").model
    torch.manual_seed(9)
    state = {k: torch.randn_like(v) * 0.1 for k, v in model.state_dict().items() if k != "lm_head.weight"}
    save_file(state, "lm.safetensors")                                  # as transformers saves tied weights
    assert run("lm:objective", "--checkpoint", "lm.safetensors", "--k", "1", "--metrics", "one_step,spectrum",
               "--out", "r") == 0
    record = record_of(tmp_path / "r")
    assert record["data"]["samples"] == 8 and record["data"]["batches"] == 3
    assert record["results"]["spectrum"]["converged"] == [True] and not record["failed"]
    load_checkpoint(model, "lm.safetensors")
    assert torch.equal(model.state_dict()["lm_head.weight"], state["transformer.wte.weight"])
    assert run("mine:pair", "--metrics", "one_step", "--out", "p") == 0


def test_ctrl_c_leaves_a_folder_that_resume_continues(tmp_path, capsys, monkeypatch):
    taken, kept = [], dict(measure.METRICS)

    def stop(job):
        raise KeyboardInterrupt

    monkeypatch.setitem(measure.METRICS, "trace", stop)
    assert run("mine:objective", "--metrics", "one_step,trace,density", "--out", "r") == 130
    assert "resume with: flatmin measure --resume r" in capsys.readouterr().err
    record = record_of(tmp_path / "r")
    assert record["status"] == "interrupted" and list(record["results"]) == ["one_step"]
    assert "not complete" in (tmp_path / "r" / "report.html").read_text()

    for name, function in kept.items():
        monkeypatch.setitem(measure.METRICS, name, lambda job, n=name, f=function: taken.append(n) or f(job))
    assert run("--resume", "r") == 0
    assert taken == ["trace", "density"]
    after = record_of(tmp_path / "r")
    assert after["status"] == "complete" and after["results"]["one_step"] == record["results"]["one_step"]
    assert "not complete" not in (tmp_path / "r" / "report.html").read_text()
    assert run("--resume", "r", "--k", "3") == 2 and run("--resume", "nosuch") == 1


@pytest.mark.parametrize("metric", ("spectrum", "trace", "density"))
def test_a_measure_that_was_cut_short_goes_on_in_its_middle(metric, tmp_path, monkeypatch):
    assert run("mine:objective", "--metrics", metric, "--out", "whole") == 0
    calls, multiply = [], ObjectiveOperator._matvec

    def dying(self, *v):
        calls.append(1)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return multiply(self, *v)

    monkeypatch.setattr(ObjectiveOperator, "_matvec", dying)
    assert run("mine:objective", "--metrics", metric, "--out", "cut") == 130
    assert len(list((tmp_path / "cut" / "checkpoints").glob(f"{metric}-*.pt"))) == 1
    assert run("--resume", "cut") == 0
    whole, cut = (record_of(tmp_path / name)["results"] for name in ("whole", "cut"))
    # beside the products: each run's fingerprint and check of the products, and the one that was cut short
    assert cut == whole and len(calls) == whole[metric]["matvecs"] + 5
    assert not list((tmp_path / "cut" / "checkpoints").iterdir())


def test_resume_refuses_other_weights_and_other_data(tmp_path, capsys):
    assert run("mine:objective", "--metrics", "one_step", "--out", "r") == 0
    for part, key, words in (("model", "norm", "the weights are not those"), ("data", "loss", "the data or the loss")):
        record = record_of(tmp_path / "r")
        record[part][key] *= 1.1
        (tmp_path / "s").mkdir(exist_ok=True)
        (tmp_path / "s" / "record.json").write_text(json.dumps(record))
        assert run("--resume", "s") == 1
        assert words in capsys.readouterr().err
    (tmp_path / "s" / "record.json").write_text('{"kind": "compare"}')
    assert run("--resume", "s") == 1 and "not of measure" in capsys.readouterr().err
    (tmp_path / "s" / "record.json").write_text('{"kind": "measure"}')
    assert run("--resume", "s") == 1 and "lacks what a run needs" in capsys.readouterr().err


def test_warnings_are_recorded_and_shown(tmp_path, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run("mine:small", "--metrics", "one_step,worst_case", "--out", "r") == 0
    found = record_of(tmp_path / "r")["warnings"]
    assert found["one_step"][0]["kind"] == "SmallBatchWarning"
    assert "measured on 4 samples" in capsys.readouterr().out
    assert "measured on 4 samples" in (tmp_path / "r" / "report.html").read_text()


def test_a_measure_that_fails_does_not_stop_the_others(tmp_path, capsys, monkeypatch):
    def fail(job):
        raise RuntimeError("no second\nderivative <b>")

    with monkeypatch.context() as patch:
        patch.setitem(measure.METRICS, "one_step", fail)
        assert run("mine:objective", "--metrics", "one_step,trace", "--out", "r") == 1
    record, said = record_of(tmp_path / "r"), capsys.readouterr()
    assert record["failed"] == {"one_step": "RuntimeError: no second derivative <b>"} and "trace" in record["results"]
    assert "not measured: one-step sharpness" in said.out and said.err.count("\n") == 1
    assert "derivative &lt;b&gt;" in (tmp_path / "r" / "report.html").read_text()
    assert run("--resume", "r") == 0 and record_of(tmp_path / "r")["failed"] == {}


def test_the_page_escapes_whatever_the_record_holds(tmp_path):
    assert run("mine:objective", "--metrics", "all", "--out", "r") == 0
    evil = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'"

    def poison(value):
        if isinstance(value, dict):
            return {k: poison(v) for k, v in value.items()} | {evil: evil}
        if isinstance(value, list):
            return [poison(v) for v in value]
        return evil if isinstance(value, str) and value != "measure" else value

    text = report.page(poison(record_of(tmp_path / "r")))
    assert "<img" not in text and text.count("<script>") == 1 and "alert(1)</script>" not in text
    assert report.table(poison(record_of(tmp_path / "r")))


def test_the_page_stands_holes_anywhere_in_the_record(tmp_path, monkeypatch):
    """Every part of the record in turn is of the wrong kind; figures are painted, but not written out."""
    from matplotlib.figure import Figure

    assert run("mine:objective", "--metrics", ",".join(m for m in measure.METRICS if m != "surface"), "--out", "r") == 0
    record = record_of(tmp_path / "r")
    monkeypatch.setattr(measure_figures, "draw", lambda paint, title, height=None: paint(Figure().add_subplot()) or "")

    def stands(broken, *where):
        try:
            assert report.page(broken).endswith("</html>\n") and report.table(broken)
        except Exception as error:
            raise AssertionError(where) from error

    holes = [None, "nan", [], {}, "x", True, -math.inf, [1, None], {"a": []}]
    places = [(name, key) for name, result in record["results"].items() for key in result]
    for i, (name, key) in enumerate(places):
        for hole in holes[i % 3::3]:
            results = record["results"] | {name: record["results"][name] | {key: hole}}
            stands(record | {"results": results}, name, key, hole)
    for key in set(record) - {"kind"}:
        for hole in holes:
            stands(record | {key: hole}, key, hole)
    monkeypatch.undo()
    assert report.page({"kind": "measure"}).endswith("</html>\n") and report.table({"kind": "measure"})


def test_report_writes_the_page_again(tmp_path, capsys):
    assert run("mine:objective", "--metrics", "one_step", "--out", "r") == 0
    (tmp_path / "r" / "report.html").unlink()
    assert cli.main(["report", "r"]) == 0 and (tmp_path / "r" / "report.html").exists()
    assert run("mine:objective", "--metrics", "one_step", "--out", "r") == 1   # an earlier result is not overwritten


def test_the_flags_are_these():
    """A new flag is a decision: it fails here first."""
    verbs = next(a for a in cli._parser()._actions if a.dest == "verb").choices
    flags = sorted(o for a in verbs["measure"]._actions for o in a.option_strings if o.startswith("--"))
    assert flags == ["--against", "--batch-size", "--checkpoint", "--config", "--context", "--device", "--dtype",
                     "--eigenvectors", "--help", "--k", "--metrics", "--mode", "--out", "--plan", "--product",
                     "--quiet", "--resume", "--rho", "--rtol", "--seed", "--share", "--text", "--threads",
                     "--tokens", "--tol"]
    shown = verbs["measure"].format_help()
    assert "examples:" in shown and all(name in shown for name in measure.METRICS)


def made_up(one_step=(0.3, 0.2, 0.09, 0.01), **data):
    value, first, second, rest = one_step
    return {"kind": "measure", "status": "complete", "settings": {"rho": 0.1}, "data": {"name": "n", "loss": 1.0},
            "model": {"parameters": 10}, "results": {
                "one_step": {"value": value, "first_order": first, "second_order": second,
                             "expansion_holds": abs(rest) <= (abs(first) + abs(second)) / 2,
                             "settings": {"rho": 0.1}, **({"data_stderr": 0.0456} if data else {})},
                "spectrum": {"eigenvalues": [1.0, 4.0], "residuals": [1e-3, 2e-3], "converged": [True, True],
                             **({"data_stderr": [0.125, 0.75]} if data else {})},
                "trace": {"value": 6.0, "stderr": 0.31, "converged": True, "matvecs": 9,
                          **({"data_stderr": 0.98} if data else {})}}}


def test_three_errors_stand_beside_each_number():
    """The solver's, and that of the data where the record has it; older records have no column for it."""
    shown, page = report.table(made_up(data=True)), report.page(made_up(data=True))
    head, top = (line for line in shown.splitlines() if "computation  data" in line or "largest eigen" in line)
    assert top.split()[2:5] == ["4.0000", "0.0020", "0.75"] and head.index("data") == top.index("0.75")
    words = " ".join(shown.split())
    assert all(text in words for text in ("0.31", "0.98", "0.046", "data: the standard error over batches"))
    assert all(text in page for text in ("0.75", "0.12", "0.98", "standard error over batches"))
    old, page = report.table(made_up()), report.page(made_up())
    assert "computation" in old and "data: the standard error" not in old
    assert "standard error over batches</th>" not in page
    assert not any("±" in line for line in shown.splitlines()[1:7])       # two columns with a head each, no ±


@pytest.mark.parametrize(("parts", "says", "not_said"), [
    ((0.3, 0.2, 0.09, 0.01), "mostly by the slope (67 %)", "beyond"),
    ((0.3, 0.04, 0.25, 0.01), "mostly by curvature (83 %)", "beyond"),
    ((0.3, 0.144, 0.14, 0.016), "by the slope (48 %) and curvature (47 %)", "mostly"),
    ((0.02, 0.2, 0.15, -0.33), "beyond the range of slope and curvature", "mostly"),       # 29 % slope, 49 % remainder
    ((0.06, 0.39, 0.03, -0.36), "beyond the range of slope and curvature", "mostly"),      # the slope leads
    ((0.5, 0.2, 0.1, 0.2), "beyond the range of slope and curvature", "mostly"),
])
def test_a_step_beyond_the_expansion_is_not_split(parts, says, not_said):
    shown = " ".join(report.table(made_up(parts)).split())
    assert says in shown and not_said not in shown
    record = made_up((0.3, 0.2, 0.09, 0.01))
    record["results"]["one_step"]["expansion_holds"] = False       # the record's own word goes first
    assert "beyond the range" in " ".join(report.table(record).split())


def test_the_weights_and_the_loss_that_were_measured_are_named(tmp_path, capsys):
    (tmp_path / "mine.py").write_text(MODULE + """
def floats():
    return net(), (data()[0], torch.ones(40, 3))
""")
    save_file({k: v for k, v in trained().state_dict().items()}, "w.safetensors")
    for arguments, says in ((["mine:floats"], ("weights as mine:floats returns them",
                                               "MSELoss, the default for floating-point targets")),
                            (["mine:objective", "--checkpoint", "w.safetensors"], ("weights from w.safetensors",
                                                                                   "loss: CrossEntropyLoss"))):
        out = f"r-{len(arguments)}"
        assert cli.main(["measure", *arguments, "--metrics", "one_step", "--quiet", "--out", out]) == 0
        shown = " ".join(capsys.readouterr().out.split())
        with open(f"{out}/record.json") as file:
            record = json.load(file)
        page = report.page(record)
        assert record["data"]["loss_function"] in shown
        assert all(said in text for said in says for text in (shown, page))
        assert "average case moves" not in page


def test_without_a_checkpoint_a_comparison_says_what_stands_on_the_first_side(capsys):
    save_file({k: v for k, v in trained().state_dict().items()}, "w.safetensors")
    assert cli.main(["measure", "mine:objective", "--against", "w.safetensors", "--metrics", "one_step", "--quiet",
                     "--out", "r"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "mine:objective as returned" in shown and "no --checkpoint was given" in shown
