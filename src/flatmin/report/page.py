"""One page about a run: self-contained, offline, safe to show whatever the record holds."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ..errors import RunFolderError
from ..files import replace_file
from . import figures
from .findings import diagnosed, headline, joined, seen, verdict, worse
from .reading import METRICS, Reading, number, numbers, plus_minus, section
from .style import sheet
from .table import COLUMNS, html_table, scale, strip
from .turning import policy, turnable


def write(folder: str | Path) -> Path:
    """Read ``record.json`` in a run folder and write ``report.html`` beside it, whole or not at all.

    Raises:
        RunFolderError: there is no readable record, or the page cannot be written; an earlier page stays as it was.
    """
    folder = Path(folder)
    try:
        record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{folder} holds no record.json that can be read ({error}); give the folder that flatmin "
                             f"compare or measure wrote") from error
    if not isinstance(record, dict):
        raise RunFolderError(f"{folder / 'record.json'} is not the record of a run")
    text, target = page(record).encode("utf-8", "replace"), folder / "report.html"
    try:
        replace_file(target, lambda temporary: temporary.write_bytes(text))
    except OSError as error:
        raise RunFolderError(f"cannot write {target}: {error.strerror or error}") from error
    return target


def page(record: Mapping[str, Any]) -> str:
    """The whole HTML page of a record; parts whose data are missing are left out."""
    if record.get("kind") == "measure":
        from . import measured

        return measured.page(record)
    r = Reading(record)
    name = str(r.data.get("name", "a run"))
    parts = [_hero(r), _words(r), _results(r), _learning(r), _sharpness(r), _lines(r), _plane(r), _radii(r),
             _diagnosis(r), _fine_print(r)]
    body = "\n".join(filter(None, parts))
    title = escape(f"{headline(record)} · flatmin {record.get('kind', 'compare')}, {name}")
    return (f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta name="viewport" content="width=device-width,initial-scale=1">'
            f'<meta http-equiv="Content-Security-Policy" content="{policy(body)}">'
            f"<title>{title}</title>\n<style>\n{sheet(len(r.methods))}\n</style></head>\n"
            f"<body><main>\n{body}\n</main></body></html>\n")


def _hero(r: Reading) -> str:
    status = str(r.record.get("status"))
    banner = "" if r.complete else (
        f'<p class="banner" role="status"><b>This run is not complete</b> (status: {escape(status)}). '
        f"{_count(len(r.all_runs), 'training')} finished so far, and everything below is about those alone. Continue "
        f"with <code>flatmin compare --resume</code> and the run folder.</p>")
    ranked = sorted((m for m in r.methods if r.stat(m, "accuracy").n),
                    key=lambda m: (not r.stat(m, "accuracy").known, -r.stat(m, "accuracy").mean))
    rows = []
    for m in ranked:
        value, _, spread = plus_minus(r.stat(m, "accuracy"), 100, 1).partition(" ± ")
        rows.append(f'<li class="s{r.methods.index(m)}"><span class="name">{escape(r.label(m))}</span>'
                    f"{strip(r, m, COLUMNS[0], 220 if len(ranked) > 5 else 130)}<div><b>{escape(value)}</b> <span>"
                    f"{'± ' + escape(spread) + ' ' if spread else ''}%</span></div></li>")
    low, high = scale(r, COLUMNS[0])
    span = f"; {100 * low:.1f} to {100 * high:.1f} %" if low < high else ""
    kind = "ranks many" if len(rows) > 5 else "ranks"
    ranks = (f'<div><h3>{escape(r.test_name.capitalize())}</h3><small>a tick for each seed, a dot for the mean{span}'
             f'</small><ul class="{kind}">{"".join(rows)}</ul></div>') if rows else ""
    kind, name = str(r.record.get("kind", "compare")), str(r.data.get("name", ""))
    head = _text(headline(r.record)).replace("clean-test", '<span class="nb">clean-test</span>')
    return (f'<header>{banner}<p class="over">flatmin {escape(kind)}{" · " + escape(name) if name else ""}</p>'
            f"<h1>{head}</h1><div class=\"hero\"><div><p class=\"lede\">"
            f'{_text(verdict(r.record))}</p><p class="quiet">{_text(_setting(r))}</p></div>{ranks}</div></header>')


def _setting(r: Reading) -> str:
    """What was compared on what, in words."""
    train, test, noise = (number(r.data.get(k)) for k in ("train", "test", "noise"))
    text = f"{_count(len(r.methods), 'method')}, {_count(_seeds(r), 'seed')}"
    if math.isfinite(train):
        text += f"; {train:,.0f} training examples"
        text += f" of which {100 * noise:g} % have their label re-drawn at random" if noise > 0 else ""
    if math.isfinite(test):
        text += f"; {test:,.0f} {'clean ' if noise > 0 else ''}test examples"
    return text + ". Everything but the method is equal, unless the settings below say otherwise."


def _words(r: Reading) -> str:
    good, bad = seen(r.record), worse(r.record)
    if not r.all_runs and not section(r.record, "summary"):
        return ""
    none = [f"Nothing measured here got worse than with {r.label(r.baseline)}."]
    found = f'<div class="found"><h2>What was found</h2>{_list(good)}</div>' if good else ""
    return (f'<section class="two">{found}<div class="found worse"><h2>What got worse</h2>{_list(bad or none)}</div>'
            f"</section>")


def _results(r: Reading) -> str:
    if not any(r.stat(m, x).n for m in r.methods for x in METRICS):
        return ""
    spread = "Mean ± standard deviation over seeds" if _seeds(r) > 1 else "One seed, so no spread"
    bold = " Bold: the best, and what cannot be told from it." if _seeds(r) > 1 else ""
    return (f"<section><h2>Results</h2><p>{spread}. Under each number, every seed as a tick and the mean as a dot, "
            f"on one scale for the column.{bold}</p>{html_table(r.record)}</section>")


def _learning(r: Reading) -> str:
    panels = [(figures.curves(r, "train_loss", "training loss at each epoch"), "Training loss",
               "on the labels trained on"),
              (figures.curves(r, "test_accuracy", f"{r.test_name} in percent at each epoch", percent=True),
               f"{r.test_name.capitalize()}, %", "watched, never used to pick an epoch")]
    has = any(section(x, "history") for x in r.all_runs)
    band = "Lines are means over seeds, bands run from the lowest seed to the highest."
    return _section(r, "Learning", band if _seeds(r) > 1 else "One seed.", panels) if has else ""


def _sharpness(r: Reading) -> str:
    panels = []
    if any(map(math.isfinite, (v for m in r.methods for v in r.seeds(m, "sharpness")))):
        at = f" at ρ = {r.probe():g}" if math.isfinite(r.probe()) else ""
        panels.append((figures.scatter(r, "sharpness", f"one-step sharpness{at}"), f"{r.test_name.capitalize()}, %",
                       "against the rise of the training loss over one step uphill"))
    if any(map(math.isfinite, (v for m in r.methods for v in r.seeds(m, "eigenvalue")))):
        panels.append((figures.scatter(r, "eigenvalue", "largest Hessian eigenvalue"), f"{r.test_name.capitalize()}, %",
                       "against the curvature of the training loss in its steepest direction"))
    ring = ", a ring at the mean of a method" if len(r.methods) <= figures.FEW and _seeds(r) > 1 else ""
    return _section(r, "Does flat go with accurate?", f"A point for each seed{ring}. Up is more accurate, "
                    "left is flatter; a trend between methods is no proof of a cause.", panels)


def _lines(r: Reading) -> str:
    every = [section(x, "line") for x in r.all_runs]
    if not any(numbers(x.get("values")) for x in every):
        return ""
    draws = max((number(x.get("draws", 1)) for x in every), default=1)
    panels = [(figures.lines(r, False), "Training loss", "against the distance from the solution, ‖w′ − w‖"),
              (figures.lines(r, True), "Its rise above the solution", "against the distance in lengths of the weights, "
               "which rescaling a network does not change" if figures.has_units(r) else "flat bottoms stay low")]
    text = "The mean over straight lines in random directions, each filter scaled like the weights it stands on" \
        if draws > 1 else "Along one straight line through each solution, a direction among very many"
    text += "; bands are two standard errors over them" * (draws > 1)
    thin = " Thick: the mean over seeds; thin: every seed." if len(r.methods) <= figures.FEW and _seeds(r) > 1 else ""
    return _section(r, "The valley each method found", f"{text}.{thin}", panels)


def _plane(r: Reading) -> str:
    """Training and test loss over the plane through the solutions, as surfaces to turn."""
    part = section(r.record, "plane")
    methods = part.get("methods")
    names = [r.label(str(m)) for m in methods] if isinstance(methods, list) else []
    axes = [f"{n} − {names[0]}{', orthogonal part' * k}" for k, n in enumerate(names[1:3])]
    axes += ["random, filter-normalised"] * 2
    pieces = [turnable(part, key, title, axes[:2], names) for key, title in
              (("train", "Training loss"), ("test", f"{'Clean-test' if r.noisy else 'Test'} loss"))]
    if not (names and all(pieces)):
        return ""
    through = {1: "the solution", 2: "the solutions"}.get(len(names), "the three solutions")
    steps, seed = len(numbers(part.get("x"))), _text(str(part.get("seed", 0)))
    batch_norm = {"interpolated": " BatchNorm statistics are interpolated between the solutions.",
                  "frozen": ""}.get(str(part.get("batch_norm")), "")
    return (f"<section><h2>Between the solutions</h2><p>The plane through {through} of {escape(joined(names))} from "
            f"seed {seed}, at {steps} × {steps} points; distances are true lengths in weight space. A valley of the "
            f"training loss need not be one of the test loss.{batch_norm}</p>"
            f'<div class="two">{"".join(pieces)}</div></section>')


def _radii(r: Reading) -> str:
    chosen = {m: section(r.record, "selection", m) for m in r.methods}
    chosen = {m: c for m, c in chosen.items() if numbers(c.get("scores"))}
    if not chosen:
        return ""
    methods = [m for m in r.methods if m in chosen]
    edge = [m for m, c in chosen.items() if len(numbers(c.get("grid"))) > 1 and number(c.get("chosen")) in
            (min(numbers(c["grid"])), max(numbers(c["grid"])))]
    criterion = next((str(c["criterion"]) for c in chosen.values() if c.get("criterion")), "accuracy on held-out data")
    picks = "".join(f'<div><dt class="s{r.methods.index(m)}"><b>{escape(r.label(m))}</b></dt><dd>'
                    f"{_chosen(chosen[m])}</dd></div>" for m in methods)
    note = (f"<p class=quiet>{escape(joined([r.label(m) for m in edge]))}: the choice lies at the edge of the "
            f"grid, so a better radius may lie outside.</p>") if edge else ""
    return (f'<section><h2>How the radius was chosen</h2><p>By {escape(criterion)}. <b>The test set was never used</b> '
            f'to choose anything.</p>{figures.key(r, methods)}<div class="two"><figure><h3>Held-out accuracy, %</h3>'
            f"<figcaption>against ρ; the ring marks the choice</figcaption>{figures.radii(r)}</figure>"
            f"<div><h3>Chosen</h3><dl>{picks}</dl>{note}</div></div></section>")


def _chosen(part: Mapping[str, Any]) -> str:
    rho = number(part.get("chosen"))
    return f"ρ = {rho:g}" if math.isfinite(rho) else "not yet"


def _diagnosis(r: Reading) -> str:
    """What the runs of each method show to be wrong, with the numbers it rests on, and the radius to try next."""
    looked = [m for m in r.methods if section(r.record, "diagnosis", m)]
    items = [f"<li><b>{escape(head)}</b>{escape(rest)}</li>" for head, rest in diagnosed(r)]
    if not looked:
        return ""
    body = f"<ul>{''.join(items)}</ul>" if items else "<p>No run shows any of the faults that are looked for.</p>"
    return (f"<section><h2>Diagnosis</h2><p>Read from some hundreds of steps of each run, and of one more run for each "
            f"method that left a fifth of the training data out, to be evaluated on it. The test data were not used. "
            f"The functional share of sharpness is not recorded: whether sharpness falls because predictions become "
            f"one-hot is judged by confidence and calibration.</p>{body}</section>")


def _fine_print(r: Reading) -> str:
    noise = number(r.data.get("noise")) > 0
    caveats = [
        "“Decided” means that two means differ by more than √(sd² + sd²), the spread of a difference between two "
        "single runs. It is a plain yardstick, not a test of significance, and a handful of seeds knows its spread "
        "badly.",
        "Seeds change the initial weights and the order of the data, not the data set: another split would move every "
        "number.",
        "Sharpness does not always predict generalization. It depends on how a network is scaled, and is comparable "
        "here because all methods train the same one.",
        "One-step sharpness mixes slope and curvature; its first-order part vanishes only at a stationary point.",
        "A sharpness-aware step usually takes two passes. At equal time, the baseline could train longer.",
    ]
    if noise:
        caveats.append("With re-drawn labels, calibration and likelihood are measured on clean labels: a model that "
                       "fits the noise rightly is unsure, and pays for it here.")
    versions = " · ".join(f"{k} {v}" for k, v in section(r.record, "versions").items())
    lists = [(title, _flat(r.record.get(key))) for key, title in (
        ("settings", "Settings"), ("data", "Data"), ("versions", "Versions"), ("left_out", "Left out"))]
    tables = "".join(f"<details><summary>{t}</summary><dl>{''.join(rows)}</dl></details>" for t, rows in lists if rows)
    care = "".join(f"<li>{c}</li>" for c in caveats)
    return (f'<section><h2>Read with care</h2><ul class="caveats">{care}</ul>{tables}</section>'
            f"<footer>{escape(str(r.record.get('created', '')))}{' · ' if versions else ''}"
            f"{escape(versions)}</footer>")


def _section(r: Reading, title: str, text: str, panels: Sequence[tuple[str, str, str]]) -> str:
    shown = "".join(f"<figure><h3>{escape(head)}</h3><figcaption>{escape(under)}</figcaption>{svg}</figure>"
                    for svg, head, under in panels)
    return (f'<section><h2>{escape(title)}</h2><p>{escape(text)}</p>{figures.key(r, r.methods)}<div class="two">{shown}'
            f"</div></section>") if panels else ""


def _flat(value: Any, name: str = "") -> list[str]:
    """A nested mapping as rows of a list, with dotted names."""
    if isinstance(value, Mapping):
        return [row for k, v in value.items() for row in _flat(v, f"{name}.{k}" if name else str(k))]
    if isinstance(value, Sequence) and not isinstance(value, str):
        value = ", ".join(map(str, value))
    return [f"<div><dt>{escape(name)}</dt><dd>{escape(str(value))}</dd></div>"] if name else []


def _list(items: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{_text(item)}</li>' for item in items)}</ul>"


def _text(sentence: str) -> str:
    """Escaped, and never broken inside a number with its spread or its unit."""
    return escape(sentence).replace(" ± ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}").replace(" %", "\N{NO-BREAK SPACE}%")


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"


def _seeds(r: Reading) -> int:
    return max((max(r.stat(m, x).n for x in METRICS) for m in r.methods), default=0)
