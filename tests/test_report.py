"""The report: sentences, tables and the page, from made-up records."""

import math
import random

import pytest

from flatmin import report

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
            "line": {"x": x, "values": [0.4 * nll + 0.04 * top * t * t + 0.01 * t for t in x]}}


def summarize(record):
    import statistics

    parts = {"accuracy": "test", "nll": "test", "ece": "test", "value": "sharpness", "first_order": "sharpness",
             "second_order": "sharpness", "eigenvalue": "hessian", "residual": "hessian"}
    record["summary"] = {}
    for m in dict.fromkeys(r["method"] for r in record["runs"]):
        mine = [r for r in record["runs"] if r["method"] == m]
        values = {k: [r[p][k] for r in mine] for k, p in parts.items()}
        record["summary"][m] = {"sharpness" if k == "value" else k: {
            "mean": statistics.fmean(v), "sd": statistics.stdev(v) if len(v) > 1 else "nan", "n": len(v)}
            for k, v in values.items()}
    return record


def fake(levels=None, seeds=3, epochs=30, rng=0):
    levels, rng = levels or BEFORE, random.Random(rng)
    grid = [0.02, 0.05, 0.1, 0.2]
    return summarize({
        "kind": "compare", "status": "complete", "created": "2026-01-02T03:04:05",
        "settings": {"epochs": epochs, "noise": 0.6, "optimizer": {"lr": 0.05, "momentum": 0.9}, "grid": grid},
        "versions": {"flatmin": "0.1", "torch": "2.13.0", "python": "3.12.1", "platform": "Linux", "threads": 2},
        "data": {"name": "digits", "train": 1000, "test": 797, "classes": 10, "noise": 0.6, "held_out": 200},
        "selection": {m: {"grid": grid, "scores": [0.31 - (math.log(g / 0.1) / 9) ** 2 + 0.005 * i for g in grid],
                          "chosen": 0.1, "criterion": "accuracy on held-out training data"}
                      for i, m in enumerate(levels) if m != "sgd"},
        "runs": [run(m, s, level, rng, epochs) for m, level in levels.items() for s in range(seeds)],
        "timing": {m: {"seconds": 0.0007 * v[-1], "ratio": v[-1], "quartiles": [0.97 * v[-1], 1.04 * v[-1]]}
                   for m, v in levels.items()}})


def test_table_is_aligned():
    for record in (fake(), fake(seeds=1), fake({"sgd": BEFORE["sgd"], "名前": BEFORE["sam"]})):
        lines = report.table(record).splitlines()
        assert lines[1] == "─" * len(lines[1])
        if record["summary"].get("asam"):
            assert len({len(line) for line in lines[:5]}) == 1
    assert "± " in report.table(fake()) and "±" not in report.table(fake(seeds=1))


@pytest.mark.parametrize("seeds", [1, 3])
def test_findings_are_sentences(seeds):
    for line in report.findings(fake(seeds=seeds)):
        assert line[0].isupper() and line[-1] in ".)" and "nan" not in line
