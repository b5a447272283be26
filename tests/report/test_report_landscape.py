"""The landscape on the page of a comparison: what is drawn is what the record holds, and only its script may run."""

import base64
import copy
import hashlib
import json
import re

import pytest
import torch
from test_report import EVIL, Tags, fake

from flatmin import report
from flatmin.jobs.compare import Comparison
from flatmin.jobs.settings import CompareSettings
from flatmin.report.surface import turnable
from flatmin.training.folder import RunFolder


def with_landscape(methods=("sgd", "sam", "asam")):
    record = fake()
    grid = [[0.1 * (i - 1) ** 2 + 0.2 * (j - 1) ** 2 + 0.3 for j in range(4)] for i in range(5)]
    points = [[0.0, 0.0], [3.0, 0.0], [1.0, 2.0]][:len(methods)]
    record["plane"] = {"methods": list(methods), "seed": 0, "x": [-1.0, 0.0, 1.0, 2.0, 4.0], "y": [-1.0, 0.0, 1.0, 3.0],
                       "train": grid, "test": [[2 * v for v in row] for row in grid], "models": points,
                       "names": ["a", "b"], "batch_norm": "interpolated"}
    return record


def data_of(text):
    return [json.loads(s) for s in re.findall(r'<script type="application/json">(.*?)</script>', text, re.S)]


def test_both_surfaces_turn_and_name_their_solutions():
    record = with_landscape()
    text = report.page(record)
    train, test = data_of(text)
    for drawn, part in ((train, "train"), (test, "test")):
        assert torch.allclose(torch.tensor(drawn["v"]), torch.tensor(record["plane"][part]), rtol=1e-6)
    assert train["names"] == ["SGD", "SAM", "ASAM"] and train["models"] == record["plane"]["models"]
    assert "ASAM − SGD, orthogonal part" in train["labels"][1] and "interpolated between" in text
    scripts = re.findall(r"<script>(.*?)</script>", text, re.S)
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert len(scripts) == 2 and text.count(f"'sha256-{digest}'") == 1 and "script-src 'sha256-" in text
    parser = Tags()
    parser.feed(text)
    assert not parser.open and text.count("<canvas") == 2


def test_lines_have_their_band_and_both_scales():
    text = report.page(with_landscape())
    assert "two standard errors" in " ".join(text.split()) and "distance / length of the weights" in text


@pytest.mark.parametrize("methods", [("sgd",), ("sgd", "sam")])
def test_with_fewer_methods_random_directions_fill_up(methods):
    labels = data_of(report.page(with_landscape(methods)))[0]["labels"]
    assert labels[1].endswith("random, filter-normalised") and ("SAM − SGD" in labels[0]) == (len(methods) == 2)


def test_names_are_escaped_and_holes_stay_holes():
    record = with_landscape(("sgd", EVIL, "asam"))
    record["plane"]["train"][1][2] = "nan"
    text = report.page(record)
    assert text.count("<script>") == 2 and "onerror=" not in text.replace("&quot;", "").split("</style>")[0]
    assert data_of(text)[0]["v"][1][2] is None and "1 of 20 points" in text
    parser = Tags()
    parser.feed(text)
    assert parser.tags.count("script") == 4 and not [a for a in parser.attributes if a[0].startswith("on")]


@pytest.mark.parametrize("broken", [{}, {"left_out": "twice"}, None, [1], {"methods": ["sgd"], "train": [[1]]}])
def test_without_a_grid_the_page_does_without(broken):
    record = with_landscape()
    record["plane"] = broken
    text = report.page(record)
    assert "Between the solutions" not in text and "script-src" not in text


@pytest.mark.parametrize("key", ["x", "train", "models", "methods", "names"])
def test_any_part_of_it_may_be_missing(key):
    record = copy.deepcopy(with_landscape())
    del record["plane"][key]
    assert turnable(record["plane"], "train", "a", ["x", "y"], ["SGD"]) == "" or key in ("models", "methods", "names")
    if key in ("methods", "models"):
        assert "<h1>" in report.page(record)


def compared(tmp_path, **settings):
    kept, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.set_default_dtype(torch.float32)
    try:
        folder = RunFolder.create(tmp_path / "run")
        job = Comparison(CompareSettings(**{"epochs": 1, "seeds": 1} | settings), folder, quiet=True)
        job.run()
        return job
    finally:
        torch.set_default_dtype(kept)
        torch.set_num_threads(threads)


def test_a_comparison_lays_the_plane_through_its_solutions(tmp_path):
    """The loss at each solution on the plane is the one that was measured there; distances are those of the weights."""
    job = compared(tmp_path, methods="sgd,sam,asam,gsam", rho="0.1")
    found = job.record["plane"]
    assert found["methods"][0] == "sgd" and len(found["methods"]) == 3 and found["batch_norm"] == "frozen"
    w = [job.folder.load_weights(f"{m}-seed0") for m in found["methods"]]
    for k, point in enumerate(found["models"].tolist()):
        length = sum(float((w[k][n] - w[0][n]).double().square().sum()) for n in w[0]) ** 0.5
        assert sum(c * c for c in point) ** 0.5 == pytest.approx(length, rel=1e-4)
    run = job.record["runs"][0]
    middle = len(run["line"]["x"]) // 2
    assert run["line"]["x"][middle] == 0 and len(run["line"]["stderr"]) == len(run["line"]["x"])
    assert not list((job.folder.path / "checkpoints").glob("plane-*"))


def test_the_same_solution_twice_is_left_out_with_the_reason(tmp_path):
    found = compared(tmp_path, methods="sgd,sam", rho="0").record["plane"]
    assert "length 0" in found["left_out"] and "train" not in found
