"""What a training run leaves for a comparison: its history by epoch, and what the diagnosis makes of it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..sharpness import Finding, diagnose, next_radius
from ..sharpness.diagnosis import LARGER, SMALLER, WITHOUT_RHO, beyond, consistent
from ..training.methods import Method
from ..training.run import RECORDED, Trained

HELD_OUT = "the run with held-out data"


def history_of(trained: Trained, metric: str, every: int, plain: bool) -> dict[str, list[Any]]:
    """Losses and metrics at each evaluation, and the recorded steps.

    Args:
        trained: of the training loop, where it stands.
        metric: the recipe's first, of which there is a curve on the test data.
        every: steps of an epoch.
        plain: whether it is a plain optimizer, whose record has the loss alone.
    """
    rows = trained.evaluations
    kept = ("loss",) if plain else RECORDED
    return {
        "epoch": [row["step"] // every if row["step"] % every == 0 else row["step"] / every for row in rows],
        "train_loss": [row["train_loss"] for row in rows],
        f"test_{metric}": [row["test"][metric] for row in rows if "test" in row],
        "train_accuracy": [row["train"]["accuracy"] for row in rows if "accuracy" in row.get("train", {})],
        "held_out": [row["tune"] for row in rows if "tune" in row],
        "steps": [{"step": row["step"]} | {name: row[name] for name in kept if name in row} | _unknown(row)
                  for row in trained.steps],
    }


def _unknown(row: Mapping[str, Any]) -> dict[str, float]:
    """The loss at w where the only pass was at w + ε, whose loss the training loop logs instead."""
    one_pass = row.get("passes") == 1 and row.get("perturbed_loss") == row["loss"]
    return {"loss": math.nan} if one_pass else {}


def steps_of(history: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the diagnosis reads: the recorded steps, and on the last of each epoch what was evaluated after it."""
    steps = [{k: float(v) if isinstance(v, str) else v for k, v in step.items()}    # "nan" and "inf" of a record
             for step in history["steps"]]
    epochs = len(history["epoch"])
    for name, values in (("train_accuracy", history["train_accuracy"]), *_columns(history["held_out"])):
        for epoch, value in enumerate(values, 1):
            steps[min(len(steps), math.ceil(epoch * len(steps) / epochs)) - 1][name] = value
    return steps


def _columns(rows: list[dict[str, float]]) -> list[tuple[str, list[float]]]:
    return [(name, [row[name] for row in rows]) for name in ("accuracy", "ece", "confidence")
            if rows and name in rows[0]]


def diagnosis(record: Mapping[str, Any], method: Method, base: str, grid: Sequence[float],
              rho: float | None) -> dict[str, Any]:
    """What all runs of a method show together, each fault with the runs that show it and its first evidence.

    Args:
        record: of the comparison.
        method: whose runs are read.
        base: the plain optimizer whose run with held-out data the method's is compared with.
        grid: the method's radii.
        rho: the one it was trained with.
    """
    data, held_out = record["data"], record["held_out"]
    length = rho if method.steps_by_rho else None
    labels: dict[str, Any] = {"noise": data.get("noise", 0.0), "classes": data.get("classes")}
    others = held_out.get(base, []) if method.name != base else []
    other = steps_of(others[0]["history"]) if others and others[0]["history"]["steps"] else None
    runs = [(f"seed {r['seed']}", diagnose(steps_of(r["history"]), rho=length, **labels))
            for r in record["runs"] if r["method"] == method.name and r["history"]["steps"]]
    for r in held_out.get(method.name, []):
        if not r["history"]["steps"]:
            continue
        steps = steps_of(r["history"])
        spread = math.hypot(*(_standard_error(s, data.get("held_out", 1)) for s in (steps, other)))
        runs.append((HELD_OUT, diagnose(steps, base=other, rho=length, spread=max(0.005, spread), **labels)))
    found = consistent([f for _, run in runs for f in run])
    first: dict[str, Finding] = {}
    for f in found:
        first.setdefault(f.name, f)
    chosen = record["selection"].get(method.name, {})
    after, why = _next(found, method, grid, chosen, rho)
    said = [(f, [run for run, its in runs if any(g.name == f.name for g in its)]) for f in first.values()]
    return {"runs": len(runs), "rho": rho, "next_rho": after, "next_rho_because": why,
            "findings": [advised(f, method, rho, chosen).to_dict() | {"runs": len(where), "in": where}
                         for f, where in said]}


def _next(found: list[Finding], method: Method, grid: Sequence[float], chosen: Mapping[str, Any],
          rho: float | None) -> tuple[float | None, str]:
    """The radius to try next, and why."""
    if rho is None:
        return None, ""
    tried = chosen.get("grid", [])[:len(chosen.get("scores", []))]
    after, why = next_radius(found, rho, low=min(grid, default=0.02) / 2, high=2 * max(grid, default=0.5), tried=tried)
    return (rho, f"{why}: set by {method.knobs}") if method.knobs and after != rho else (after, why)


def advised(finding: Finding, method: Method, rho: float | None, chosen: Mapping[str, Any]) -> Finding:
    """With the method's own settings where it has others than ρ, and without a radius that was tried and did worse."""
    name = finding.name
    if rho is None or name not in {*SMALLER, *LARGER, "no improvement at this radius"}:
        return finding
    scores = dict(zip(chosen.get("grid", []), chosen.get("scores", []), strict=False))
    sides = (True, False) if name == "no improvement at this radius" else (name in LARGER,)
    beside = [t for larger in sides for t in beyond(list(scores), rho, larger)[:1]]
    if not (beside or method.knobs):        # the radii tried end here, or none was
        return finding
    others = {"underfitting": WITHOUT_RHO["underfitting"][1], "unstable": WITHOUT_RHO["unstable"][1],
              "diverging": WITHOUT_RHO["diverging"][1]}
    cause = f"the correction is rescaled, so that {method.knobs} set how strong it is, and not rho" if method.knobs \
        else others.get(name, "it is not the radius, since those tried beside it did no better")
    also = {"underfitting": "train longer, or add capacity", "unstable": "warm up or lower the learning rate",
            "diverging": "lower the learning rate"}.get(name)
    solution = ", or ".join(filter(None, (f"change {method.knobs}" if method.knobs else "keep rho", also)))
    if beside:
        tried = " and ".join(f"rho {t:g} reached {float(scores[t]):.3g}" for t in beside)
        solution += f"; tried on held-out data, {tried}, no better than {float(scores.get(rho, math.nan)):.3g} " \
                    f"at {rho:g}"
    return dataclasses.replace(finding, cause=cause, solution=solution)


def _standard_error(steps: list[dict[str, Any]] | None, n: int) -> float:
    """Of the last accuracy on n examples."""
    p = next((step["accuracy"] for step in reversed(steps or []) if "accuracy" in step), 0.0)
    return math.sqrt(p * (1 - p) / n)
