"""The report: sentences, tables and the page, from made-up records."""

import doctest
import html
import json
import math
import random
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.figure import Figure
from scipy import stats

from flatmin import report
from flatmin.errors import RunFolderError
from flatmin.report import compare_figures, compare_findings, fields, formatting
from flatmin.report import differences as differences_module
from flatmin.report import seed_statistics as spread
from flatmin.report.compare_record import CompareRecord
from flatmin.report.differences import against_references, differences, holm, seeds_needed
from flatmin.report.figures import line_style
from flatmin.report.measure_findings import sentence
from flatmin.report.measure_record import MeasureRecord
from flatmin.report.page import policy
from flatmin.report.seed_statistics import Stat, plus_minus

BEFORE = {"sgd": (0.66, 2.10, 0.21, 0.110, 0.020, 31.0, 1.0), "sam": (0.79, 1.31, 0.25, 0.052, 0.008, 12.0, 1.93),
          "asam": (0.785, 1.42, 0.23, 0.071, 0.011, 9.5, 2.11)}


def run(method, seed, level, rng, epochs):
    accuracy, nll, ece, sharp, second, top, _ = level

    def near(v):
        return v * (1 + 0.03 * rng.gauss(0, 1))

    accuracy, epoch = near(accuracy), list(range(1, epochs + 1))
    history = {"epoch": epoch, "train_loss": [0.3 * nll + 2.0 * math.exp(-3 * e / epochs) + 0.02 * rng.random()
                                              for e in epoch],
               "test_accuracy": [accuracy + (0.14 if method == "sgd" else 0.01) * (1 - e / epochs)
                                 - 0.7 * math.exp(-12 * e / epochs) for e in epoch]}
    x = [i / 12.5 - 1 for i in range(26)]
    first, second, top = near(sharp - second), near(second), near(top)
    return {"method": method, "seed": seed, "rho": 0.0 if method == "sgd" else 0.1, "history": history,
            "test": {"accuracy": accuracy, "nll": near(nll), "ece": near(ece)},
            "sharpness": {"rho": 0.05, "value": first + second + 1e-4, "first_order": first, "second_order": second,
                          "remainder": 1e-4},
            "hessian": {"eigenvalue": top, "residual": 2e-3, "converged": True, "matvecs": 40},
            "line": {"x": x, "values": [0.4 * nll + 0.04 * top * t * t + 0.01 * t for t in x], "stderr": [0.01] * 26,
                     "unit": 2.0, "draws": 5}}


def headline(record):
    return compare_findings.headline(CompareRecord(record))


def worse(record):
    return compare_findings.worse(CompareRecord(record))


def fake(levels=None, seeds=3, epochs=30, rng=0):
    levels, rng = levels or BEFORE, random.Random(rng)
    grid = [0.02, 0.05, 0.1, 0.2]
    return {
        "kind": "compare", "status": "complete", "created": "2026-01-02T03:04:05",
        "settings": {"epochs": epochs, "noise": 0.6, "optimizer": {"lr": 0.05, "momentum": 0.9}, "grid": grid},
        "versions": {"flatmin": "0.1", "torch": "2.13.0", "python": "3.12.1", "platform": "Linux", "threads": 2},
        "data": {"name": "digits", "train": 1000, "test": 797, "chance": 0.1, "noise": 0.6, "held_out": 200},
        "selection": {m: {"grid": grid, "scores": [0.31 - (math.log(g / 0.1) / 9) ** 2 + 0.005 * i for g in grid],
                          "chosen": 0.1, "criterion": "accuracy on held-out training data"}
                      for i, m in enumerate(levels) if m != "sgd"},
        "runs": [run(m, s, level, rng, epochs) for m, level in levels.items() for s in range(seeds)],
        "timing": {m: {"seconds": 0.0007 * v[-1], "ratio": v[-1], "quartiles": [0.97 * v[-1], 1.04 * v[-1]]}
                   for m, v in levels.items()}}


def test_table_is_aligned():
    for record in (fake(), fake(seeds=1), fake({"sgd": BEFORE["sgd"], "名前": BEFORE["sam"]})):
        lines = report.table(record).splitlines()
        assert lines[1] == "─" * len(lines[1])
        if "名前" not in lines[-2]:
            assert len({len(line) for line in lines[:5]}) == 1
    assert report.table(fake()).startswith("mean ± sd  ") and "±" not in report.table(fake(seeds=1))


@pytest.mark.parametrize("seeds", [1, 3])
def test_findings_are_sentences(seeds):
    for line in report.findings(fake(seeds=seeds)):
        assert line[0].isupper() and line[-1] in ".)" and "nan" not in line


def levels(**changes):
    """SAM beside SGD, better in everything but for the changes (and time)."""
    names = ["accuracy", "nll", "ece", "sharpness", "second_order", "eigenvalue", "ratio"]
    good = dict(zip(names, (0.8, 1.0, 0.10, 0.05, 0.01, 10.0, 1.0), strict=True)) | changes
    return {"sgd": (0.6, 2.0, 0.20, 0.11, 0.02, 30.0, 1.0), "sam": tuple(good[n] for n in names)}


WORSE = {"accuracy": (0.4, "Clean-test accuracy is lower"), "nll": (3.0, "Negative log-likelihood is higher"),
         "ece": (0.4, "Calibration got worse"), "sharpness": (0.3, "One-step sharpness is higher"),
         "eigenvalue": (90.0, "The largest Hessian eigenvalue is higher"), "ratio": (2.0, "A step costs more time")}


@pytest.mark.parametrize("metric", WORSE)
@pytest.mark.parametrize("seeds", [1, 3])
def test_what_got_worse_is_said_and_only_that(metric, seeds):
    value, sentence = WORSE[metric]
    record = fake(levels(**{metric: value}), seeds=seeds)
    said = [other for other, (_, text) in WORSE.items() if any(text in line for line in report.findings(record))]
    assert said == [metric]
    assert html.escape(sentence) in report.page(record)


def test_nothing_worse_is_said_too():
    record = fake(levels())
    assert not worse(record) and "Nothing measured here got worse than with SGD" in report.page(record)


def test_the_differences_over_seeds_decide():
    clear, close, single = fake(levels()), fake(levels(accuracy=0.601)), fake(levels(), seeds=1)
    assert report.findings(clear)[0].endswith(", decided.") and "ndecided" not in report.findings(clear)[0]
    assert "undecided" in report.findings(close)[0] and headline(close).startswith("No winner")
    assert "undecided" in report.findings(single)[0] and "undecided" in headline(single)
    assert headline(fake(levels(accuracy=0.4))) == "Nothing beats SGD here"


def test_flatness_measures_that_disagree_are_named():
    assert "disagree: SAM is flatter than SGD by the first" in "".join(report.findings(fake(levels(eigenvalue=90.0))))
    assert "disagree" not in "".join(report.findings(fake(levels())))


def test_an_unconverged_eigenvalue_is_said():
    record = fake()
    record["runs"][0]["hessian"]["converged"] = False
    assert "1 of 9 Hessian eigenvalues did not converge" in "".join(report.findings(record))


def test_the_time_ratio_is_to_the_baseline_whatever_the_record_took():
    record = fake({"sam": (*BEFORE["sam"][:-1], 1.0), "sgd": (*BEFORE["sgd"][:-1], 0.5)})
    assert any("SAM 2.00 times" in line for line in worse(record))


EVIL = '<script>alert("x")</script>\'&$x_1$'


def test_everything_from_the_record_is_escaped():
    record = fake({"sgd": BEFORE["sgd"], EVIL: BEFORE["sam"]})
    record["settings"][EVIL] = {"deep": [EVIL, {EVIL: EVIL}]}
    for part in ("versions", "data"):
        record[part]["name"] = record[part][EVIL] = EVIL
    record |= {"created": EVIL, "kind": EVIL, "status": EVIL, "left_out": {EVIL: EVIL}}
    record["selection"][EVIL]["criterion"] = EVIL
    for r in record["runs"]:
        r["seed"] = EVIL
    parser = Tags()
    parser.feed(report.page(record))
    assert "script" not in parser.tags and parser.tags.count("html") == 1
    assert not [a for a in parser.attributes if a[0].startswith("on")]
    assert "alert" in html.unescape(report.page(record))


@pytest.mark.parametrize("record", [fake(), fake(seeds=1, epochs=1)], ids=["three seeds", "one epoch"])
def test_the_page_is_whole_and_asks_for_nothing(record):
    text = report.page(record)
    parser = Tags()
    parser.feed(text)
    assert not parser.open, f"unclosed: {parser.open}"
    assert not {"script", "link", "img", "iframe", "object", "embed", "base", "form"} & set(parser.tags)
    targets = [v for k, v in parser.attributes if k in ("src", "href", "xlink:href", "action", "srcset", "data")]
    targets += re.findall(r"url\(([^)]*)\)", text)
    assert targets and all(t.startswith("#") for t in targets)
    assert "@import" not in text and "http://" not in text and "https://" not in text
    ids = [v for k, v in parser.attributes if k == "id"]
    assert {t[1:] for t in targets} <= set(ids)
    assert text.count("<figure") == 7 and "default-src 'none'" in text
    assert report.page(record) == text, "the same record gives the same page"


def test_an_interrupted_run_shows_what_it_has():
    record = fake(seeds=1)
    record |= {"status": "interrupted", "runs": record["runs"][:2]}
    del record["timing"]
    record["selection"]["asam"] |= {"scores": [0.3], "chosen": None}
    text = report.page(record)
    assert "This run is not complete" in text and "2 trainings finished" in text and "not yet" in text
    assert "1 seed" in report.table(record)
    assert "This run is not complete" not in report.page(fake())
    record["runs"] = []
    assert "No result yet" in report.page(record) and "How the radius was chosen" in report.page(record)


@pytest.mark.parametrize("cut", ["runs", "timing", "selection", "settings", "versions", "data", "created"])
def test_any_section_may_be_missing(cut):
    record = fake()
    del record[cut]
    assert "<h1>" in report.page(record) and report.table(record)
    for r in (record, {**fake(), cut: None}):
        assert all("nan" not in line for line in report.findings(r))
    for part in ("history", "test", "sharpness", "hessian", "line", "rho"):
        record = fake()
        del record["runs"][0][part]
        assert "<h1>" in report.page(record)


def test_an_empty_record_says_so():
    assert "No result yet" in report.page({"kind": "compare", "status": "interrupted", "runs": []})
    assert report.findings({}) == ["No run has finished with a test accuracy, so there is nothing to compare yet."]


@pytest.mark.parametrize("bounds, said", (([0.66, 0.72], "69 ± 2.6 % of all"), ([0.1, 0.8], "Between 10 and 80 %")))
def test_a_share_next_to_zero_that_is_not_resolved(bounds, said):
    zero = {"value": 0.69, "stderr": 0.026, "settings": {"bounds": bounds}}
    assert said in sentence(MeasureRecord({"results": {"density": {"x": [0.0], "mass_at_zero": zero}}}))


def test_numbers_that_are_not_finite():
    def spoil(value):
        if isinstance(value, dict):
            return {k: v if k in ("method", "seed", "epoch") else spoil(v) for k, v in value.items()}
        if isinstance(value, list):
            return ["nan", "inf", *value[2:]]
        return random.choice(["nan", "inf", "-inf"]) if isinstance(value, float) else value

    record = fake()
    record["runs"][3:6] = [spoil(r) for r in record["runs"][3:6]]
    assert any("SAM diverged: " in line for line in worse(record))
    assert report.findings(record)[0].startswith("ASAM has the highest")
    sam = next(line for line in report.table(record).splitlines() if line.startswith("SAM "))
    assert sam.split()[1:6] == ["–"] * 5 and "<h1>" in report.page(record)
    record["runs"] = [spoil(r) for r in record["runs"]]
    assert "No result yet" in report.page(record)


def test_small_numbers_keep_their_digits():
    record = fake(levels(sharpness=0.0064, second_order=0.0004))
    record["runs"] = [r for r in record["runs"] if r["method"] == "sam"]
    assert re.search(r"<text[^>]*>0\.006\d*</text>", report.page(record))
    assert plus_minus(Stat(0.9134, 0.0018, 3), 100, 1) == "91.3 ± 0.2"
    assert plus_minus(Stat(0.83123, 0.0012, 3)) == "0.8312 ± 0.0012" and plus_minus(Stat(12.0, n=1)) == "12.0"


def test_many_methods():
    record = fake({"sgd": BEFORE["sgd"], **{f"m{i}": BEFORE["sam"] for i in range(17)}}, seeds=2)
    text = report.page(record)
    assert all(f"<span>m{i}</span>" in text for i in range(17))
    looks = [line_style(i) for i in range(18)]
    assert len({str(look) for look in looks}) == 18 and [look.color for look in looks].count(0) == 1


def test_write_replaces_whole_or_not_at_all(tmp_path, monkeypatch):
    (tmp_path / "record.json").write_text(json.dumps(fake()))
    target = report.write(tmp_path)
    before = target.read_text()
    assert target == tmp_path / "report.html" and before == report.page(fake())

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(RunFolderError, match="No space left"):
        report.write(tmp_path)
    assert target.read_text() == before and sorted(p.name for p in tmp_path.iterdir()) == ["record.json", "report.html"]


@pytest.mark.parametrize("text", [None, "{", "[1]"])
def test_a_folder_without_a_record(tmp_path, text):
    if text is not None:
        (tmp_path / "record.json").write_text(text)
    with pytest.raises(RunFolderError, match="record"):
        report.write(tmp_path)


def test_the_report_is_imported_without_matplotlib():
    code = "import sys, flatmin.report; assert not {'matplotlib', 'numpy.random'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", "import torch; " + code.replace(", 'numpy.random'", "")], check=True)


@pytest.mark.parametrize("module", [differences_module, fields, formatting, spread])
def test_the_examples_of_the_docstrings(module):
    found = doctest.testmod(module)
    assert found.attempted and not found.failed


def test_a_negative_part_is_subtracted():
    record = fake()
    for r in record["runs"]:
        r["sharpness"]["second_order"] *= -0.1
        r["sharpness"]["value"] = r["sharpness"]["first_order"] + r["sharpness"]["second_order"]
    for shown in (report.table(record), report.page(record)):
        assert re.search(r"0\.0\d+ − 0\.00\d+", shown) and "+ −" not in shown and "+ -" not in shown


def test_the_calibration_error_is_in_percent_everywhere():
    """0.2 and 0.4 in the record."""
    record = fake(levels(ece=0.4))
    sgd, sam = ([r["test"]["ece"] for r in record["runs"] if r["method"] == m] for m in ("sgd", "sam"))
    percent = pytest.approx([100 * sum(v) / 3 for v in (sgd, sam)], abs=0.5)
    line, = [line for line in report.findings(record) if "Calibration" in line]
    assert list(map(float, re.findall(r"([\d.]+) ± [\d.]+ %", line))) == percent
    assert "ECE %" in report.table(record) and "Calibration error, %</th>" not in report.page(record)
    cells = re.findall(r'data-head="Calibration error, %"><div><b>([\d.]+)', report.page(record))
    assert list(map(float, cells)) == percent


def test_every_axis_has_a_name(monkeypatch):
    named = []

    def named_axes(paint, title, height=3.7):
        axes = Figure().add_subplot()
        paint(axes)
        named.append((title, axes.get_xlabel(), axes.get_ylabel()))
        return ""

    monkeypatch.setattr(compare_figures, "draw", named_axes)
    report.page(fake())
    assert len(named) == 7 == len({title for title, *_ in named}) and all(all(row) for row in named), named


def test_on_a_phone_every_cell_names_its_column():
    """The style sheet shows data-head in front of a cell, instead of the heads."""
    text = report.page(fake())
    heads = re.findall(r'<th scope="col">([^<]+)', text)[1:]
    assert re.findall(r'<td[^>]* data-head="([^"]+)"', text) == 3 * heads and len(heads) == 6
    assert "content:attr(data-head)" in text and "thead{display:none}" in text


def test_only_the_scripts_of_surfaces_may_run():
    assert "script-src" not in policy([]) and policy(["<script>a</script>"] * 2).count("sha256") == 1
    assert "default-src 'none'" in policy([])


class Tags(HTMLParser):
    """The tags and attributes of a page, and whatever was opened and not closed."""

    VOID = {"meta", "br", "hr", "input"}

    def __init__(self):
        super().__init__()
        self.tags, self.attributes, self.open = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(k, v or "") for k, v in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(k, v or "") for k, v in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.mark.parametrize("idle", ["sgd", "sam", "asam"])
def test_a_method_at_chance_competes_for_nothing(idle):
    """It is flattest and best calibrated, since its outputs are constant."""
    chosen = dict(BEFORE) | {idle: (0.104, 2.303, 0.001, 1e-5, 1e-6, 0.01, 1.0)}
    record = fake(chosen)
    said = report.findings(record)
    name = {"sgd": "SGD", "sam": "SAM", "asam": "ASAM"}[idle]
    assert sum(f"{name} has not learnt" in line for line in said) == 1
    others = [line for line in said if "has not learnt" not in line and "costs more time" not in line]
    assert not any(re.search(rf"\b{name}\b", line) for line in others), others
    assert not headline(record).startswith(name)
    row = re.search(rf'<tr class="s\d"><th scope="row">{name}</th>(.*?)</tr>', report.page(record), re.S).group(1)
    assert "strong" not in row and "<td" in row
    assert 'class="strong"' in report.page(record)
    assert f"not above chance (10.0 %), so not compared: {name}" in report.table(record)


def test_chance_is_judged_by_its_standard_error():
    """Two standard errors of 797 draws at 10 % are 2.1 points."""
    def said(accuracy):
        record = fake({"sgd": BEFORE["sgd"], "sam": (accuracy, *BEFORE["sam"][1:])})
        return "has not learnt" in " ".join(report.findings(record))

    assert said(0.118) and not said(0.135)
    record = fake(dict.fromkeys(BEFORE, (0.1, 2.3, 0.0, 0.0, 0.0, 0.0, 1.0)))
    assert headline(record) == "No method has learnt" and report.findings(record)[0].startswith("No method has learnt")


def test_the_diagnosis_prints_the_radius_to_try_next():
    record = fake()
    record["diagnosis"] = {
        "sgd": {"runs": 4, "rho": None, "next_rho": None, "next_rho_because": "", "findings": []},
        "sam": {"runs": 4, "rho": 0.1, "next_rho": 0.05, "next_rho_because": "rho too large", "findings": [
            {"name": "rho too large", "symptom": "the loss more than doubles over the step", "cause": "c<", "runs": 2,
             "in": ["seed 0", "seed 2"],
             "solution": "lower rho", "evidence": {"sharpness over loss": 1.5}}]},
        "asam": {"runs": 4, "rho": 1.0, "next_rho": 1.0, "next_rho_because": "no finding", "findings": []}}
    page, table = report.page(record), report.table(record)
    assert "SAM: the loss more than doubles over the step</b> in seed 0 and seed 2 (2 of 4 runs)" in page
    assert "C&lt;; lower rho." in page
    assert page.count("next</b>") == 1 and "SAM: try ρ\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}0.05 next" in page
    assert "SAM: rho too large at ρ = 0.1; try 0.05 next" in table and "ASAM: " not in table
    for broken in ({}, {"sam": None}, {"sam": {"findings": [3, {}], "runs": "nan"}}, {"sam": {"findings": "x"}}):
        report.page(record | {"diagnosis": broken})


def test_a_comparison_beyond_the_expansion_says_so():
    record = fake()
    for run in record["runs"]:
        if run["method"] == "sam":
            run["sharpness"]["value"] *= 3
    said = " ".join(report.findings(record))
    assert "For SAM, a step of ρ = 0.05 is beyond the range of slope and curvature" in said
    assert "a third part is what slope and curvature leave unexplained" in report.table(record)
    assert "unexplained" not in report.table(fake()) and "beyond the range" not in " ".join(report.findings(fake()))


def test_a_method_that_fitted_the_data_less_does_not_lead_as_flatter():
    def said(accuracy, loss):
        record = fake(levels(accuracy=accuracy))
        for run in record["runs"]:
            run["history"]["train_loss"][-1] = (loss if run["method"] == "sam" else 0.3) + 0.001 * run["seed"]
        return [line for line in report.findings(record) if "one-step sharpness is lower" in line]

    line, = said(0.4, 1.2)
    assert line.startswith("SAM has fitted the data less (training loss SAM 1.2") and "SGD’s 0.3" in line
    for accuracy, loss in ((0.8, 1.2), (0.4, 0.3)):         # more accurate, or fitted as well
        line, = said(accuracy, loss)
        assert line.startswith("Flatter: one-step sharpness is lower")


def test_a_fall_in_a_single_seed_is_undecided():
    line, = [line for line in report.findings(fake(seeds=1)) if "fell between" in line]
    assert "(undecided)" in line
    line, = [line for line in report.findings(fake(seeds=3)) if "fell between" in line]
    assert "undecided" not in line


# differences paired over seeds


def by_seed(*values):
    return {str(seed): v for seed, v in enumerate(values)}


def test_a_paired_difference_is_scipys():
    rng = random.Random(1)
    a, b, c = ([rng.gauss(mean, 1) for _ in range(6)] for mean in (1, 0, 0.2))
    found = differences({"a": by_seed(*a), "c": by_seed(*c)}, by_seed(*b))
    tests = [stats.ttest_rel(x, b) for x in (a, c)]
    adjusted = stats.false_discovery_control([t.pvalue for t in tests])     # at most Holm's
    for (_, d), test, x, fdr in zip(found.items(), tests, (a, c), adjusted, strict=True):
        interval = test.confidence_interval(0.95)
        assert (d.low, d.high, d.p) == pytest.approx((interval.low, interval.high, test.pvalue))
        assert d.mean == pytest.approx(sum(x) / 6 - sum(b) / 6) and d.p <= fdr - 1e-12 or d.adjusted >= fdr - 1e-12


def test_holms_correction_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([0.02, math.nan])[0] == 0.02 and math.isnan(holm([math.nan])[0])


def test_more_comparisons_decide_less():
    a, b = by_seed(1.0, 1.3, 0.9), by_seed(0.0, 0.0, 0.0)
    alone = differences({"a": a}, b)["a"]
    among = differences({"a": a} | {str(i): by_seed(1.0, -1.0, 0.1) for i in range(9)}, b)["a"]
    assert alone.decided and not among.decided and among.mean == alone.mean and among.p == alone.p


def test_the_number_of_seeds_has_the_power():
    """By simulation: 80 % of draws of so many seeds are decided, and fewer of one seed less."""
    rng, effect = np.random.default_rng(0), 0.9
    n = seeds_needed(effect, 0.05)

    def power(n):
        return (stats.ttest_1samp(rng.normal(effect, 1, (20_000, n)), 0, axis=1).pvalue < 0.05).mean()

    assert power(n) > 0.79 and power(n - 1) < 0.81
    assert seeds_needed(1e-4, 0.05) == math.inf and seeds_needed(100, 0.05) == 2
    assert seeds_needed(effect, 0.01) > n


def test_differences_that_are_not_known():
    one = differences({"a": by_seed(1.0)}, by_seed(0.5))["a"]
    assert one.mean == 0.5 and math.isnan(one.p) and not one.decided
    assert not differences({"a": by_seed(math.nan, 1.0)}, by_seed(0.0, 0.0))["a"].decided
    same = differences({"a": by_seed(1.0, 1.0), "b": by_seed(0.0, 0.0)}, by_seed(0.0, 0.0))
    assert same["a"].decided and not same["b"].decided
    other = differences({"a": {"7": 1.0, "1": 2.0, "2": 2.1}}, by_seed(9.0, 1.0, 1.0))["a"]
    assert other.mean == pytest.approx(1.05) and other.seeds == 2, "pairs of one seed alone"


def test_the_differences_of_a_record_are_shown():
    record = fake({**BEFORE, "sgd_2x": (0.7, 1.9, 0.2, 0.1, 0.02, 28.0, 1.0)})
    twice = {"sam": "sgd_2x", "asam": "sgd_2x"}
    record |= {"base": "sgd", "twice": twice,
               "differences": against_references(record["runs"], "accuracy", "sgd", twice)}
    pairs = [(d["method"], d["minus"]) for d in record["differences"]]
    assert pairs == [("sam", "sgd"), ("asam", "sgd"), ("sgd_2x", "sgd"), ("sam", "sgd_2x"), ("asam", "sgd_2x")]
    for shown in (report.table(record), html.unescape(report.page(record))):
        assert "SAM − SGD: +" in shown and "SAM − SGD (2× steps): +" in shown and "would decide" in shown


def test_a_lower_loss_is_better_where_the_metric_says_so():
    record = fake()
    record["metrics"] = {"mean_error": {"higher_is_better": False}}
    del record["selection"]
    for r in record["runs"]:
        r["test"] = {"mean_error": r["test"]["nll"]}
    assert "SAM has the lowest clean-test mean error" in report.findings(record)[0]
    assert headline(record).startswith("SAM gains 0.") and "accuracy" not in report.table(record)
    assert "<h1>" in report.page(record) and "accura" not in report.page(record)
