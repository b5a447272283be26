"""What the page of ``flatmin compare`` shows, as plain data; ``templates/compare.html`` lays it out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..training.methods import TWICE
from . import compare_figures as draw
from .compare_findings import compared, diagnosed, flatness, headline, verdict, worse
from .compare_record import PARTS, CompareRecord
from .compare_table import parts, power, step_time
from .fields import details, items, number, numbers, section
from .figures import Figure, LineStyle, line_style
from .formatting import count, joined
from .seed_statistics import Stat
from .surface import turnable


@dataclass(frozen=True)
class Method:
    """A line of the legend."""

    index: int
    label: str
    style: LineStyle


@dataclass(frozen=True)
class Strip:
    """The seeds of a method on the scale that all methods of a column share, and their mean."""

    width: int
    ticks: str
    mean: str


@dataclass(frozen=True)
class Cell:
    """A mean with its spread; below it a strip of the seeds, bars of two parts and a remark."""

    value: str
    spread: str = ""
    strong: bool = False
    strip: Strip | None = None
    bars: tuple[str, str] | None = None
    remark: str = ""


def contents(record: Mapping[str, Any]) -> dict[str, Any]:
    """What the template of the page shows of a record."""
    r = CompareRecord(record)
    first = r.metrics[r.first]
    low, high = (first.with_unit(Stat(v)) for v in r.range_of(r.first))
    return {
        "name": str(r.data.get("name")), "unfinished": "" if r.complete else str(record.get("status")),
        "trainings": count(len(r.all_runs), "training"), "headline": headline(r), "verdict": verdict(r),
        "setting": _setting(r), "test_name": r.test_name.capitalize(), "baseline": r.label(r.baseline),
        "seeds": r.most_seeds(), "noisy": r.noisy, "few": draw.few(r), "ranks": _ranks(r),
        "scale": f"{low.removesuffix(' %')} to {high}" if low != high else "", "test_label": _capital(r.test_label),
        "better": "Up" if first.higher_is_better else "Down", "accurate": r.first == "accuracy",
        "compared": [_capital(line) for line in compared(r)],
        "twice": any(m.endswith(TWICE) for m in r.methods), "found": flatness(r), "worse": worse(r),
        "results": _results(r), "methods": [_method(r, m) for m in r.methods], "learning": _learning(r),
        "sharpness": _sharpness(r), "lines": _lines(r), "plane": section(record, "plane"), **_plane(r),
        "radii": _radii(r), "looked": bool(section(record, "diagnosis")), "diagnosis": diagnosed(r),
        "details": details(("Settings", record.get("settings")), ("Data", r.data),
                           ("Versions", record.get("versions")), ("Left out", record.get("left_out"))),
    }


def _capital(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}"


def _method(r: CompareRecord, method: str) -> Method:
    i = r.methods.index(method)
    return Method(i, r.label(method), line_style(i))


def _setting(r: CompareRecord) -> str:
    """What was compared on what, in words."""
    train, test, noise = (number(r.data.get(k)) for k in ("train", "test", "noise"))
    what = "examples" if r.first == "accuracy" else str(r.data.get("units", "samples"))
    parts = [count(len(r.methods), "method") + f", {count(r.most_seeds(), 'seed')}"]
    noisy = f" of which {100 * noise:g} % have their label re-drawn at random" if r.noisy else ""
    parts += [f"{train:,.0f} training {what}{noisy}"] if math.isfinite(train) else []
    parts += [f"{test:,.0f} {'clean ' * r.noisy}test {what}"] if math.isfinite(test) else []
    return f"{'; '.join(parts)}. Everything but the method is equal, unless the settings below say otherwise."


def _ranks(r: CompareRecord) -> list[tuple[Method, Cell]]:
    sign = r.metrics[r.first].sign
    ranked = sorted((m for m in r.methods if r.stat(m, r.first).known), key=lambda m: -sign * r.stat(m, r.first).mean)
    return [(_method(r, m), _cell(r, m, r.first, width=130 if len(ranked) < 6 else 220)) for m in ranked]


def _results(r: CompareRecord) -> dict[str, Any] | None:
    """The table: (heading, remark) of each column, (method, cells) of each row."""
    shown = [c for c in r.columns if any(r.stat(m, c).known for m in r.methods)]
    if not shown:
        return None
    best = {c: _best(r, c) for c in shown}
    heads = [(r.metrics[c].heading, _remark(r, c)) for c in shown]
    rows = [(_method(r, m), [_cell(r, m, c, m in best[c]) for c in shown]) for m in r.methods]
    if any(map(math.isfinite, (r.timing(m)[1] for m in r.methods))):
        heads.append(("Time a step, ms", f"× {r.label(r.baseline)} (middle half)"))
        for method, (_, cells) in zip(r.methods, rows, strict=True):
            ms, ratio = step_time(r, method)
            cells.append(Cell(ms, remark=f"{ratio} ×{_quartiles(r, method)}" if ratio != "–" else ""))
    return {"heads": heads, "rows": rows}


def _best(r: CompareRecord, metric: str) -> set[str]:
    """The best of a column and what cannot be told from it; none where that is every method."""
    known = [m for m in r.methods if r.competes(m, metric)]
    if len(known) < 2:
        return set()
    top = max(known, key=lambda m: r.metrics[metric].sign * r.stat(m, metric).mean)
    tied = {m for m in known if not r.difference(metric, m, top).decided}
    return tied if len(tied) < len(r.methods) else set()


def _remark(r: CompareRecord, metric: str) -> str:
    if metric == "sharpness":
        return f"ρ = {r.probe():g}; first ■ and second □ order"
    if metric == "eigenvalue":
        return "of the training loss"
    return "higher is better" if r.metrics[metric].higher_is_better else "lower is better"


def _cell(r: CompareRecord, method: str, metric: str, strong: bool = False, width: int = 100) -> Cell:
    value, _, spread = r.metrics[metric].text(r.stat(method, metric)).partition(" ± ")
    bars, remark = (_bars(r, method), parts(r, method)) if metric == "sharpness" else (None, "")
    residual = r.stat(method, "residual")
    if metric == "eigenvalue" and residual.known:
        remark = f"residual {power(residual.mean)}"
    return Cell(value, spread, strong, _strip(r, method, metric, width), bars, remark)


def _strip(r: CompareRecord, method: str, metric: str, width: int) -> Strip | None:
    low, high = r.range_of(metric)
    mean = r.stat(method, metric).mean
    if not (math.isfinite(mean) and low < high):
        return None
    places = [f"{4 + (width - 8) * (v - low) / (high - low):.1f}" for v in [*r.seeds(method, metric), mean]
              if math.isfinite(v)]
    return Strip(width, "".join(f"M{x} 1.5V10.5" for x in places[:-1]), places[-1])


def _bars(r: CompareRecord, method: str) -> tuple[str, str] | None:
    """The two parts of one-step sharpness, in percent of the widest bar."""
    most = max((abs(r.stat(m, p).mean) for m in r.methods for p in PARTS if r.stat(m, p).known), default=0.0)
    shares = [100 * max(r.stat(method, p).mean, 0.0) / (1.4 * most) for p in PARTS] if most else [math.nan]
    return (f"{shares[0]:.1f}", f"{min(shares[1], 100 - shares[0]):.1f}") if all(map(math.isfinite, shares)) else None


def _quartiles(r: CompareRecord, method: str) -> str:
    """The middle half of the ratios step by step, where it was measured against the baseline."""
    low, high, *_ = [*numbers(section(r.record, "timing", method).get("quartiles")), math.nan, math.nan]
    unit = number(section(r.record, "timing", r.baseline).get("ratio"))
    return f" ({low:.2f} to {high:.2f})" if unit == 1 and low < high else ""


def _learning(r: CompareRecord) -> list[Figure]:
    if not any(r.histories(m, "train_loss") for m in r.methods):
        return []
    trained = "labels" if r.first == "accuracy" else "data"
    return [Figure("Training loss", f"on the {trained} trained on", draw.curves(r, "train_loss", "training loss")),
            Figure(r.test_name.capitalize(), "watched, never used to pick an epoch",
                   draw.curves(r, f"test_{r.first}", r.test_label, r.metrics[r.first].scale))]


def _sharpness(r: CompareRecord) -> list[Figure]:
    against = {"sharpness": (f"one-step sharpness at ρ = {r.probe():g}", "the rise of the training loss over one step "
                             "uphill"),
               "eigenvalue": ("largest Hessian eigenvalue", "the curvature of the training loss in its steepest "
                              "direction")}
    return [Figure(f"{r.test_name.capitalize()} and {xlabel.split(' at ')[0]}", f"against {caption}",
                   draw.scatter(r, metric, xlabel))
            for metric, (xlabel, caption) in against.items() if any(r.stat(m, metric).known for m in r.methods)]


def _lines(r: CompareRecord) -> list[Figure]:
    if not any(numbers(section(x, "line").get("values")) for x in r.all_runs):
        return []
    return [Figure("Training loss", "against the distance from the solution", draw.loss_lines(r, False)),
            Figure("Its rise above the solution", "against the distance in lengths of the weights, which rescaling a "
                   "network does not change", draw.loss_lines(r, True))]


def _plane(r: CompareRecord) -> dict[str, Any]:
    """Training and test loss over the plane through the solutions, as surfaces to turn."""
    part = section(r.record, "plane")
    names = [r.label(str(m)) for m in items(part.get("methods"))]
    axes = [f"{n} − {names[0]}{', orthogonal part' * k}" for k, n in enumerate(names[1:3])]
    axes += ["random, filter-normalised"] * 2
    surfaces = [turnable(part, key, title, axes[:2], names) for key, title in
                (("train", "Training loss"), ("test", f"{'Clean-test' if r.noisy else 'Test'} loss"))]
    solutions = {1: "solution", 2: "solutions"}.get(len(names), "three solutions")
    return {"surfaces": surfaces if names and all(surfaces) else [], "through": f"{solutions} of {joined(names)}",
            "points": f"{len(numbers(part.get('x')))} × {len(numbers(part.get('y')))}"}


def _radii(r: CompareRecord) -> dict[str, Any] | None:
    """How ρ was chosen."""
    tried = {m: section(r.record, "selection", m) for m in r.methods}
    tried = {m: c for m, c in tried.items() if numbers(c.get("scores"))}
    if not tried:
        return None
    chosen = {m: number(c.get("chosen")) for m, c in tried.items()}
    grids = {m: numbers(c.get("grid")) for m, c in tried.items()}
    edge = [r.label(m) for m, grid in grids.items() if len(grid) > 1 and chosen[m] in (min(grid), max(grid))]
    return {"criterion": str(next(iter(tried.values())).get("criterion")), "svg": draw.radii(r),
            "at_edge": joined(edge), "methods": [_method(r, m) for m in tried],
            "chosen": [(_method(r, m), f"ρ = {v:g}" if math.isfinite(v) else "not yet") for m, v in chosen.items()]}
