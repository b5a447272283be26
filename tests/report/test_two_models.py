"""``flatmin measure --against``: two sets of weights side by side, what may be compared and what may not."""

import json
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from flatmin import cli, report
from flatmin.report.measure_record import MeasureRecord

MODULE = """
import torch
from torch import nn
import flatmin

def objective():
    g = torch.Generator().manual_seed(0)
    data = torch.randn(40, 4, generator=g), torch.randint(3, (40,), generator=g)
    net = nn.Sequential(nn.Linear(4, 8, bias=False), nn.ReLU(), nn.Linear(8, 3, bias=False))
    return flatmin.Objective(net, nn.CrossEntropyLoss(), data)
"""


@pytest.fixture(autouse=True)
def _mine(tmp_path, monkeypatch):
    kept = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    (tmp_path / "ours.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    sys.modules.pop("ours", None)
    torch.manual_seed(5)
    state = nn.Sequential(nn.Linear(4, 8, bias=False), nn.ReLU(), nn.Linear(8, 3, bias=False)).state_dict()
    save_file(state, "a.safetensors")
    save_file({"0.weight": 8 * state["0.weight"], "2.weight": state["2.weight"] / 8}, "rescaled.safetensors")
    save_file({name: 3 * t for name, t in state.items()}, "larger.safetensors")
    yield
    sys.modules.pop("ours", None)
    torch.set_default_dtype(kept)


def run(*args):
    return cli.main(["measure", *args, "--quiet"])


def compared(other, out="r"):
    assert run("ours:objective", "--checkpoint", "a.safetensors", "--against", other, "--metrics", "one_step", "--out",
               out) == 0
    with open(f"{out}/record.json") as file:
        return json.load(file)


def test_a_rescaled_twin_is_the_same_function_and_plain_measures_are_warned_of(capsys):
    record = compared("rescaled.safetensors")
    found, shown = record["results"]["comparison"], " ".join(capsys.readouterr().out.split())
    assert found["scale"] == pytest.approx(8) and found["same_scale"] is False
    rows = found["rows"]
    assert rows["normalized_flatness"]["a"] == pytest.approx(rows["normalized_flatness"]["b"], rel=1e-3)
    assert rows["largest_eigenvalue"]["sign"] == -1 and rows["largest_eigenvalue"]["b"] > 4 * \
        rows["largest_eigenvalue"]["a"]
    assert [w["kind"] for w in record["warnings"]["comparison"]] == ["DifferentScaleWarning"]
    assert "compare weights of norms up to 8 times apart" in shown and "only the invariant measures" in shown
    text = report.page(record)
    assert "<h2>a.safetensors and rescaled.safetensors</h2>" in text and "up to 8 times apart" in text
    assert "loss on the line between two models" in text


def test_the_numbers_are_those_of_each_model_alone(capsys):
    both = compared("larger.safetensors")["results"]["comparison"]["rows"]
    for side, file in (("a", "a.safetensors"), ("b", "larger.safetensors")):
        assert run("ours:objective", "--checkpoint", file, "--metrics", "one_step,spectrum", "--k", "1", "--out",
                   side) == 0
        with open(f"{side}/record.json") as f:
            alone = json.load(f)["results"]
        assert both["one_step"][side] == pytest.approx(alone["one_step"]["value"], rel=1e-4)
        assert both["largest_eigenvalue"][side] == pytest.approx(alone["spectrum"]["eigenvalues"][-1], rel=1e-3)


def test_the_line_between_them_holds_both_losses():
    record = compared("larger.safetensors")
    path = record["results"]["comparison"]["path"]
    assert path["models"][0] == 0 and path["x"][0] < 0 < path["models"][1] < path["x"][-1]
    near = min(range(len(path["x"])), key=lambda i: abs(path["x"][i]))
    assert path["values"][near] == pytest.approx(record["data"]["loss"], rel=0.2)


def test_the_same_weights_cannot_be_told_apart_and_have_no_line():
    found = compared("a.safetensors")["results"]["comparison"]
    assert {row["sign"] for row in found["rows"].values()} == {0} and "path" not in found


def test_what_does_not_fit_is_said_before_anything_is_measured(tmp_path, capsys):
    save_file({"0.weight": torch.zeros(8, 4)}, "half.safetensors")
    for other, says in (("half.safetensors", "missing 2.weight"), ("nosuch.pt", "there is no checkpoint nosuch.pt")):
        assert run("ours:objective", "--against", other, "--out", "r") == 2
        assert says in capsys.readouterr().err and not (tmp_path / "r").exists()


def test_resumed_with_other_weights_it_refuses(capsys):
    compared("larger.safetensors")
    assert run("--resume", "r") == 0
    save_file({"0.weight": torch.ones(8, 4), "2.weight": torch.ones(3, 8)}, "larger.safetensors")
    assert run("--resume", "r") == 1 and "the weights are not those" in capsys.readouterr().err


@pytest.mark.parametrize("part", [{}, {"rows": 3}, {"rows": {"one_step": None}, "settings": {"names": [1]}, "path": []},
                                  {"rows": {"<b>": {"a": "nan", "sign": "x"}}, "sentence": None, "scale": "inf"}])
def test_the_page_stands_whatever_the_record_holds(part):
    record = {"kind": "measure", "results": {"comparison": part}}
    text = report.page(record)
    assert "<h1>" in text and report.table(record)
    assert "<b></th>" not in text and ("&lt;b&gt;</th>" in text) == ("<b>" in [row[0] for row in
                                                                              MeasureRecord(record).compared()])


def test_the_error_of_the_difference_is_shown(capsys):
    compared("larger.safetensors")
    shown = " ".join(capsys.readouterr().out.split())
    assert "this is said of these data alone" in shown and ", on these data alone" in shown, shown
    part = {"rows": {"one_step": {"a": 0.0450, "b": 0.0439, "value": 0.0011, "stderr": 0.0008, "data_stderr": 0.0008,
                                  "sign": 0}}}
    record = {"kind": "measure", "results": {"comparison": part}}
    text = report.page(record).replace("\N{NO-BREAK SPACE}", " ")
    for shown in (text, report.table(record)):
        assert "difference ± standard error" in shown and "+0.00110 ± 0.00080" in shown
        assert "undecided" in shown and "these data alone" not in shown
