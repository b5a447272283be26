"""The page and the terminal summary of ``flatmin measure``: one model, each number with its error."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from html import escape
from typing import Any, NamedTuple

from . import versus
from .figures import RULE, color, draw
from .page import _count, _flat, _list, _text
from .reading import in_range, number, numbers, section, significant
from .style import sheet
from .turning import policy, turnable
from .versus import printable as _printable

NAMES = {"one_step": "one-step sharpness", "spectrum": "largest eigenvalues", "trace": "trace", "density": "density",
         "worst_case": "worst case", "adaptive_worst_case": "adaptive worst case",
         "critical_sharpness": "critical sharpness", "average_case": "average case",
         "largest_random": "largest random rise", "m_sharpness": "m-sharpness",
         "normalized_flatness": "normalized flatness", "agreement": "agreement", "line": "line", "surface": "surface"}
LARGEST, AT_ZERO = "largest eigenvalue", "share of eigenvalues next to 0"
FIRST = ("one-step", LARGEST, "trace", AT_ZERO, "worst case")                # what stands beside the headline
PARTS = (("first_order", "slope, ρ‖g‖"), ("second_order", "curvature, ½ρ²ĝᵀHĝ"), ("remainder", "remainder"))
OTHERS = ("worst_case", "adaptive_worst_case", "average_case", "largest_random", "m_sharpness", "normalized_flatness",
          "critical_sharpness")
CARE = (
    "Every number is of this model on these data and this loss. The error of the computation is for the data given; "
    "the standard error over batches says how far another sample of data would move the number. Where it is missing, "
    "there are too few batches to tell, or the measure does not have it yet.",
    "Plain sharpness and Hessian eigenvalues change when a network is rescaled without changing what it computes: "
    "compare them between models of one architecture that are trained alike.",
    "One-step sharpness mixes slope and curvature; its first-order part vanishes only at a stationary point.",
    "A worst case found by ascent is a lower bound; lines and surfaces show one or two of very many directions.",
    "Flatter does not always generalize better.",
)
CSS = """
.big{font:500 clamp(28px,3.4vw,40px)/1.1 var(--serif);margin:.1em 0 .3em}.big span{color:var(--soft);font-size:.6em}
.small{min-width:100%;width:max-content;font-size:14.5px}.small th,.small td{padding:7px 18px 7px 0}
.two .scroll{margin:0;padding:0}.small tbody th{border-left:0;
padding-left:0;max-width:none}.small td,.small td span{white-space:normal}.small th,.small td{max-width:22em}
.ranks.measures li .name{max-width:none;font-weight:500}
.ok{color:var(--c3)}.no{color:var(--warn);font-weight:600}dl.one{columns:1;margin-top:6px}
.ranks.measures li{grid-template-columns:1fr auto}.ranks.measures div{text-align:right}
"""


class Pair(NamedTuple):
    """An eigenvalue, its residual, whether it converged, and its standard error over batches."""

    value: float
    residual: float
    converged: bool | None
    data: float


class Row(NamedTuple):
    """A measured number as text: what it is, its two errors ("" where there is none), and how it was found."""

    what: str
    value: str
    computation: str = ""
    data: str = ""
    how: str = ""


HEADS = "", "value", "error of the computation", "standard error over batches"


class Measured:
    """What the page asks of a record; nothing in it is trusted to be there or to be a number."""

    def __init__(self, record: Mapping[str, Any]):
        self.record = record
        self.settings, self.data, self.model = (section(record, k) for k in ("settings", "data", "model"))
        self.results = section(record, "results")
        self.failed = section(record, "failed")

    def result(self, name: str) -> Mapping[str, Any]:
        return section(self.results, name)

    def get(self, name: str, key: str = "value") -> float:
        return number(self.result(name).get(key))

    @property
    def name(self) -> str:
        return _printable(str(self.data.get("name", "a model")))

    @property
    def rho(self) -> float:
        return number(section(self.result("one_step"), "settings").get("rho", self.settings.get("rho")))

    def pairs(self) -> list[Pair]:
        """The eigenvalues with their errors, the largest first."""
        r = self.result("spectrum")
        values, errors, data = (numbers(r.get(k)) for k in ("eigenvalues", "residuals", "data_stderr"))
        done = r.get("converged")
        done = list(done) if isinstance(done, list) else []
        n = len(values)
        errors, data = ((column + [math.nan] * n)[:n] for column in (errors, data))
        done = (done + [None] * n)[:n]
        found = [Pair(v, e, d if isinstance(d, bool) else None, s)
                 for v, e, d, s in zip(values, errors, done, data, strict=True)]
        return sorted(found, key=lambda p: -p.value if p.value == p.value else math.inf)

    def parts(self) -> list[tuple[str, str, float]]:
        r = self.result("one_step")
        found = {key: number(r.get(key)) for key, _ in PARTS}
        if not math.isfinite(found["remainder"]):
            found["remainder"] = self.get("one_step") - found["first_order"] - found["second_order"]
        return [(key, label, found[key]) for key, label in PARTS if math.isfinite(found[key])]

    def in_range(self) -> bool:
        """Whether slope and curvature say how the loss rises over the step; the record's own word where it has one."""
        said = self.result("one_step").get("expansion_holds")
        parts = [v for _, _, v in self.parts()]
        return said if isinstance(said, bool) else len(parts) < 3 or in_range(*parts)

    def warnings(self) -> list[tuple[str, str, list[str]]]:
        """(kind, text, the measures that gave it), each once."""
        found: dict[tuple[str, str], list[str]] = {}
        for metric, items in section(self.record, "warnings").items():
            for item in items if isinstance(items, list) else []:
                key = str(section(item).get("kind", "")), str(section(item).get("text", ""))
                found.setdefault(key, []).append(str(metric))
        return [(kind, text, metrics) for (kind, text), metrics in found.items()]


def sentence(m: Measured) -> str:
    """What the numbers say, in words."""
    out = []
    value, parts = m.get("one_step"), m.parts()
    loss = number(m.data.get("loss", m.result("one_step").get("loss")))
    if math.isfinite(value):
        moved = f"A step of length {m.rho:g} uphill {'raises' if value >= 0 else 'lowers'} the loss " + (
            f"from {significant(loss)} " if math.isfinite(loss) else "") + f"by {significant(abs(value))}"
        top = max(parts, key=lambda p: abs(p[2]), default=None)
        total = sum(abs(p[2]) for p in parts)
        named = m.result("one_step").get("warnings")
        if isinstance(named, list) and "RoundingWarning" in named:
            moved += ", which is within rounding: take a larger ρ"
        elif m.result("one_step").get("expansion_holds") is False:
            moved += (", which slope and curvature at the point do not explain: the step is beyond the range of the "
                      "expansion")
        elif top is not None and total > 0 and len(parts) == 3:
            shares = {key: f"{100 * abs(v) / total:.0f} %" for key, _, v in parts}
            if not m.in_range():
                moved += (f". Such a step is beyond the range of slope and curvature at the point, which leave "
                          f"{significant(parts[2][2])} unexplained ({shares['remainder']} of all parts): a smaller ρ "
                          "would tell them apart")
            elif abs(top[2]) <= total / 2:
                moved += f", by the slope ({shares['first_order']}) and curvature ({shares['second_order']})"
            else:
                moved += {"first_order": f", mostly by the slope ({shares['first_order']}): the gradient leads, so "
                                         "this is not yet the sharpness of a minimum",
                          "second_order": f", mostly by curvature ({shares['second_order']})"}[top[0]]
        out.append(moved + ".")
    pairs = m.pairs()
    if pairs:
        top, error, done, _ = pairs[0]
        sure = f"is {significant(top)}" + (f" within {significant(error, 2)}" if error > 0 else "") if done else \
            f"was not found to the tolerance asked for (so far {significant(top)}, residual {significant(error, 2)})"
        out.append(f"The largest Hessian eigenvalue {sure}" + (
            f", and a stable learning rate of plain gradient descent lies below 2/λ₁ = {significant(2 / top)}."
            if done and top > 0 else "."))
    low = number(next(iter(numbers(m.result("density").get("x"))), math.nan))
    zero = number(section(m.result("density"), "mass_at_zero").get("value"))
    bounds = numbers(section(m.result("density"), "mass_at_zero", "settings").get("bounds"))
    if len(bounds) == 2 and bounds[1] - bounds[0] > 0.5:
        out.append(f"Between {100 * bounds[0]:.0f} and {100 * bounds[1]:.0f} % of all eigenvalues are next to zero; "
                   "more steps of Lanczos would resolve it.")
    elif math.isfinite(zero) and math.isfinite(low):
        error = 100 * number(section(m.result("density"), "mass_at_zero").get("stderr"))
        out.append(f"{100 * zero:.0f}{f' ± {error:.2g}' if math.isfinite(error) else ''} % of all eigenvalues are next "
                   "to zero.")
    return " ".join(out) or "Nothing was measured yet."


def headline(m: Measured) -> str:
    value, pairs = m.get("one_step"), m.pairs()
    if math.isfinite(value) and pairs:
        return (f"Loss {'+' if value >= 0 else '−'}{significant(abs(value))} one step uphill, "
                f"largest curvature {significant(pairs[0].value)}")
    if pairs:
        return f"The largest Hessian eigenvalue is {significant(pairs[0].value)}"
    if math.isfinite(value):
        return f"Loss {'+' if value >= 0 else '−'}{significant(abs(value))} one step uphill"
    return f"What was measured of {m.name}"


def rows(m: Measured) -> list[Row]:
    """Every scalar, for the terminal and for the page."""
    out: list[Row] = []
    at = f"ρ = {m.rho:g}"
    if m.result("one_step"):
        how = " ".join(f"{'+' if v >= 0 else '−'} {significant(abs(v))} {label.split(',')[0]}" for _, label, v in
                       m.parts())
        how = how.removeprefix("+ ") + ("" if m.in_range() else "; beyond the range of both")
        out.append(Row(f"one-step sharpness, {at}", significant(m.get("one_step")), "",
                       _error(m.get("one_step", "data_stderr")), f"= {how}" if m.parts() else ""))
    for i, (value, error, done, data) in enumerate(m.pairs(), 1):
        mark = {True: "converged", False: "NOT CONVERGED", None: ""}[done]
        name = f"eigenvalue {i}" if i > 1 else LARGEST
        out.append(Row(name, significant(value, 5), _error(error), _error(data), mark))
    for name in ("trace", *OTHERS):
        if m.result(name):
            error = "" if name == "largest_random" else _error(m.get(name, "stderr"))       # of its mean, not its max
            out.append(Row(_title(name, m), significant(m.get(name)), error, _error(m.get(name, "data_stderr")),
                           _how(name, m)))
    zero = section(m.result("density"), "mass_at_zero")
    if zero:
        nodes = m.result("density").get("nodes")
        r = [v for row in nodes for v in numbers(row) if math.isfinite(v)] if isinstance(nodes, list) else []
        out.append(Row(AT_ZERO, significant(number(zero.get("value"))), _error(number(zero.get("stderr"))), "",
                       f"nodes from {significant(min(r))} to {significant(max(r))}" if r else ""))
    if m.result("agreement"):
        order = m.get("agreement")
        out.append(Row("agreement, order of remainder", significant(order) if math.isfinite(order) else "–",
                       how=_how("agreement", m)))
    return out


def _error(value: float) -> str:
    return significant(value, 2) if math.isfinite(value) else ""


def _title(name: str, m: Measured) -> str:
    at = number(section(m.result(name), "settings").get("rho"))
    size = number(section(m.result(name), "settings").get("m"))
    return {"trace": "trace of the Hessian", "average_case": f"average case, σ = {at:.3g} a weight",
            "m_sharpness": f"m-sharpness, m = {size:g}, ρ = {at:g}", "worst_case": f"worst case, ρ = {at:g}",
            "adaptive_worst_case": f"adaptive worst case, ρ = {at:g}",
            "critical_sharpness": "critical sharpness, 2/η_c", "largest_random": f"largest random rise, ρ = {at:g}",
            "normalized_flatness": "normalized flatness, Σ w²H"}[name]


def _how(name: str, m: Measured) -> str:
    r = m.result(name)
    if name == "trace":
        unmet = "" if r.get("converged") else ", NOT to the error asked for"
        return f"{number(r.get('matvecs')):.0f} products{unmet}"
    if name == "critical_sharpness":
        return f"the loss falls along −g up to η_c = {significant(number(r.get('critical_rate')))}"
    if name in ("worst_case", "adaptive_worst_case"):
        return f"a lower bound, {number(r.get('evaluations')):.0f} evaluations"
    if name == "largest_random":
        count = _count(len(numbers(r.get("draws"))), "random direction")
        return f"of {count}, mean {significant(number(r.get('mean')))}"
    if name == "average_case":
        return f"{number(r.get('evaluations')):.0f} evaluations"
    if name == "m_sharpness":
        return _count(len(numbers(r.get("chunks"))), "chunk")
    if name == "normalized_flatness":
        return "exact" if r.get("exact") is True else f"{number(r.get('products')):.0f} products"
    third = r.get("third_order")
    if math.isinf(m.get("agreement")):
        return "all rounding: quadratic along the gradient, as far as this precision tells"
    return "falls as ρ³, as it must" if third is True else "does not fall as ρ³" if third is False else \
        "too near rounding to be tested"


def summary(record: Mapping[str, Any]) -> str:
    """What was measured, as aligned plain text."""
    m = Measured(record)
    table = [Row("", "value", "computation", "data"), *rows(m)]
    shown = [i for i in range(4) if i < 2 or any(row[i] for row in table[1:])]
    widths = {i: max(len(row[i]) for row in table) for i in shown}
    lines = [f"{m.name} · {_size(m)}", *textwrap.wrap(_about(m), 100)]
    lines += ["─" * max(40, sum(widths.values()) + 2 * len(widths))]
    lines += [f"{'  '.join(f'{row[i]:<{widths[i]}}' for i in shown)}  {row.how}".rstrip() for row in table]
    named = [text for i, text in ((2, "computation: the residual of an eigenvalue, else the standard error over random "
                                      "draws"), (3, "data: the standard error over batches")) if i in shown]
    lines += textwrap.wrap("; ".join(named), 100)
    pictures = [NAMES[name] for name in ("density", "line", "surface") if m.result(name)]
    lines += versus.summary(m.result("comparison"))
    lines += [f"pictures in the report: {', '.join(pictures)}"] if pictures else []
    told = _printable(str(m.result("agreement").get("sentence", "")))
    lines += ["", *textwrap.wrap(f"{sentence(m)} {told}", 100)]
    lines += [f"warning ({', '.join(metrics)}): {_printable(text)}" for _, text, metrics in m.warnings()]
    lines += [f"not measured: {_printable(str(name))}: {_printable(str(why))}" for name, why in m.failed.items()]
    return "\n".join(lines)


def _size(m: Measured) -> str:
    parts = []
    for value, noun in ((m.model.get("parameters"), "parameter"), (m.data.get("samples"), "sample")):
        n = number(value)
        parts += [f"{n:,.0f} {noun}{'' if n == 1 else 's'}"] if math.isfinite(n) else []
    loss = number(m.data.get("loss"))
    return ", ".join(parts + ([f"loss {significant(loss, 4)}"] if math.isfinite(loss) else []))


def _about(m: Measured) -> str:
    """Which weights and which loss were measured."""
    file = m.settings.get("checkpoint")
    weights = m.model.get("weights") or (f"from {file}" if file else "")
    if weights:
        weights = str(weights) if str(weights).startswith(("as ", "from ")) else f"from {weights}"
    loss = m.data.get("loss_function")
    parts = [f"weights {weights}"] * bool(weights) + [f"loss: {loss}"] * bool(loss)
    return _printable("; ".join(parts))


def page(record: Mapping[str, Any]) -> str:
    """The whole HTML page of a record of ``flatmin measure``; what was not measured is left out."""
    m = Measured(record)
    parts = [_hero(m), _warned(m), _sharpness(m), _spectrum(m), _density(m), _others(m),
             versus.html(m.result("comparison")), _line(m), _surface(m),
             _details(m)]
    body = "\n".join(filter(None, parts))
    title = escape(f"{headline(m)} · flatmin measure, {m.name}")
    return (f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta name="viewport" content="width=device-width,initial-scale=1">'
            f'<meta http-equiv="Content-Security-Policy" content="{policy(body)}">'
            f"<title>{title}</title>\n<style>\n{sheet(4)}{CSS}</style></head>\n"
            f"<body><main>\n{body}\n</main></body></html>\n")


def _hero(m: Measured) -> str:
    status = str(m.record.get("status", "complete"))
    banner = "" if status in ("complete", "failed") else (
        f'<p class="banner" role="status"><b>This run is not complete</b> (status: {escape(status)}). Continue with '
        f"<code>flatmin measure --resume</code> and the run folder.</p>")
    about = _size(m)
    kind = _printable(str(m.model.get("name", "")))
    about += (f"; {kind}" if kind else "") + (f"; {_about(m)}" if _about(m) else "")
    about += f"; evaluated in mode “{_printable(str(m.data['mode']))}”" if m.data.get("mode") else ""
    items = "".join(f'<li><span class="name">{_text(what)}</span><div><b>{escape(value)}</b>'
                    f"{_beside(error, data)}</div></li>"
                    for what, value, error, data, _ in rows(m) if what.startswith(FIRST))
    aside = f'<div><ul class="ranks measures">{items}</ul></div>' if items else ""
    return (f'<header>{banner}<p class="over">flatmin measure · {escape(m.name)}</p><h1>{_text(headline(m))}</h1>'
            f'<div class="hero"><div><p class="lede">{_text(sentence(m))}</p><p class="quiet">{_text(about)}.</p></div>'
            f"{aside}</div></header>")


def _beside(computation: str, data: str) -> str:
    """Both errors of a number, named."""
    named = [f"{name} {value}" for name, value in (("computation", computation), ("data", data)) if value]
    return f"<br><span>error: {escape(', '.join(named))}</span>" if named else ""


def _warned(m: Measured) -> str:
    items = [f"{text} ({', '.join(metrics)})" for _, text, metrics in m.warnings()]
    items += [f"Not measured: {name}. {why}" for name, why in m.failed.items()]
    return (f'<section><div class="found worse"><h2>To know before reading on</h2>'
            f"{_list([_printable(i) for i in items])}</div></section>") if items else ""


def _sharpness(m: Measured) -> str:
    value, parts = m.get("one_step"), m.parts()
    if not (math.isfinite(value) and parts):
        return ""
    bars = [("rise of the loss", value), *((label, v) for _, label, v in parts)][::-1]

    def paint(axes: Any) -> None:
        for i, (_, v) in enumerate(bars):
            k = len(bars) - 1 - i
            axes.barh([i], [v], color=color(k), height=0.62, gid=f"s{k}|{significant(v)}")
            axes.annotate(significant(v), (max(v, 0.0), i), xytext=(6, 0), textcoords="offset points", va="center")
        axes.set_yticks(range(len(bars)), [label for label, _ in bars])
        axes.axvline(0, color=RULE, linewidth=1)
        axes.grid(False, axis="y")
        axes.margins(x=0.16)
        _few_ticks(axes.xaxis)

    shown = [(k, m.result("one_step").get(k)) for k in ("loss", "perturbed_loss", "gradient_norm", "radius")]
    words = {"loss": "loss", "perturbed_loss": "loss after the step", "gradient_norm": "norm of the gradient",
             "radius": "length of the step"}
    return _section("One step uphill", f"The rise of the loss over a step of length ρ = {m.rho:g} along the gradient, "
                    "and what it is made of.", f'<div class="two"><figure>'
                    f"{draw(paint, 'the parts of one-step sharpness', size=(6.2, 2.5))}</figure>"
                    f"{_dl([(words[k], significant(number(v), 5)) for k, v in shown if v is not None])}</div>")


def _spectrum(m: Measured) -> str:
    pairs, r = m.pairs(), m.result("spectrum")
    if not pairs and not m.result("trace"):
        return ""
    blocks = []
    if pairs:
        has_data = any(math.isfinite(p.data) for p in pairs)
        body = "".join(f"<tr><td>{i}</td><td><b>{escape(significant(v, 6))}</b></td>"
                       f"<td>{escape(significant(e, 2))}</td>{f'<td>{escape(_error(s))}</td>' * has_data}"
                       f"<td>{_mark(done)}</td></tr>" for i, (v, e, done, s) in enumerate(pairs[:200], 1))
        complete = "A search for missing ones found none, at 99 % confidence." if r.get("complete") is True else \
            "The search for missing ones ran out of its budget." if r.get("complete") is False else ""
        certified = "Residuals ‖Av − λv‖ are from fresh products" if r.get("certified") else \
            "Residuals are estimated by the recurrence"
        of_data = " The standard error is over batches of the data." if has_data else ""
        note = f"{certified}; the Hessian has an eigenvalue within each. {complete}{of_data} " \
               f"{number(r.get('matvecs')):.0f} products."
        blocks.append(f'<div><h3>Largest eigenvalues</h3><div class="scroll" tabindex="0"><table class="small">'
                      f"<thead><tr><th></th><th>λ</th>"
                      f"<th>residual</th>{'<th>standard error</th>' * has_data}<th></th></tr></thead>"
                      f"<tbody>{body}</tbody></table></div>"
                      f'<p class="quiet">{_text(note)}</p></div>')
        if len(pairs) > 1:
            blocks.insert(0, f"<figure><h3>λ, with residuals</h3><figcaption>a bar as long as the residual on each "
                             f"side; rings did not converge</figcaption>{_ladder(pairs)}</figure>")
    trace = m.result("trace")
    if trace:
        low, high = (numbers(trace.get("interval")) + [math.nan] * 2)[:2]
        size = number(m.model.get("parameters"))
        facts = [("standard error over random probes", _error(m.get("trace", "stderr"))),
                 ("standard error over batches", _error(m.get("trace", "data_stderr"))),
                 ("mean eigenvalue, trace / d", significant(m.get("trace") / size) if size > 0 else "nan"),
                 (f"interval, {100 * number(trace.get('confidence')):.0f} %",
                  f"{significant(low)} to {significant(high)}"),
                 ("products", f"{number(trace.get('matvecs')):.0f}"),
                 ("relative error asked for", str(section(trace, "settings").get("rtol", "")))]
        done = "" if trace.get("converged") else '<p class="no">The error asked for was not reached.</p>'
        facts = [(k, v) for k, v in facts if v]
        value = escape(significant(m.get("trace"), 4))
        blocks.append(f'<div><h3>Trace</h3><p class="big">{value}</p>{done}{_dl(facts)}</div>')
    return _section("Curvature", "Of the Hessian of the mean loss over all the data.",
                    f'<div class="two">{"".join(blocks)}</div>')


def _ladder(pairs: list[Pair]) -> str:
    finite = [(i, p.value, p.residual, p.converged) for i, p in enumerate(pairs, 1) if math.isfinite(p.value)]

    def paint(axes: Any) -> None:
        for i, v, e, done in finite:
            axes.plot([i, i], [0, v], color=color(1), linewidth=1, alpha=0.35)
            if math.isfinite(e):
                axes.plot([i, i], [v - e, v + e], color=color(1), linewidth=5, alpha=0.3)
            axes.plot([i], [v], "o", color=color(1), markersize=7, fillstyle="none" if done is False else "full",
                      gid=f"s1|λ {significant(v, 5)}, residual {significant(e, 2)}")
        axes.set_ylim(bottom=min(0.0, *(v for _, v, _, _ in finite)) if finite else 0)
        axes.set_xlabel("rank")
        axes.margins(0.08)
        axes.xaxis.get_major_locator().set_params(integer=True)

    return draw(paint, "the largest eigenvalues with their residuals", size=(5.6, 3.2))


def _mark(done: bool | None) -> str:
    return {True: '<span class="ok">✓ converged</span>', False: '<span class="no">✗ not converged</span>',
            None: ""}[done]


def _density(m: Measured) -> str:
    r = m.result("density")
    points = [p for p in zip(numbers(r.get("x")), numbers(r.get("density")),
                             numbers(r.get("density_stderr")) or [math.nan] * 10**6, strict=False)
              if math.isfinite(p[0]) and math.isfinite(p[1])]
    if len(points) < 2:
        return ""
    size = number(m.model.get("parameters", r.get("size")))
    floor = 0.1 / size if size > 0 else 1e-6

    def paint(axes: Any) -> None:
        x, y, e = zip(*points, strict=True)
        if all(map(math.isfinite, e)):
            axes.fill_between(x, [max(v - 2 * d, floor) for v, d in zip(y, e, strict=True)],
                              [max(v + 2 * d, floor) for v, d in zip(y, e, strict=True)], color=color(1), alpha=0.2,
                              linewidth=0)
        axes.plot(x, [max(v, floor) for v in y], color=color(1), linewidth=1.8, gid="s1|density")
        axes.set_yscale("log")
        axes.set_ylim(bottom=floor, top=3 * max(*y, 10 * floor))
        axes.axvline(0, color=RULE, linewidth=1, zorder=0.5)
        axes.set_xlabel("eigenvalue")
        axes.margins(x=0.01)
        low, high = (math.log10(v) for v in axes.get_ylim())
        step = max(1, math.ceil((high - low) / 6))
        powers = range(math.ceil(low), math.floor(high) + 1, step)
        axes.set_yticks([10.0**p for p in powers], [f"{10.0**p:g}" for p in powers])
        axes.minorticks_off()

    zero, whole = section(r, "mass_at_zero"), section(r, "trace")
    facts = [("share of eigenvalues next to zero", _pm(zero)), ("counted as zero", f"|λ| ≤ "
              f"{significant(number(r.get('zero')), 2)}"), ("trace from these probes", _pm(whole)),
             ("probes", str(section(r, "settings").get("probes", ""))),
             ("products", f"{number(r.get('matvecs')):.0f}")]
    return _section("Spectral density", "All eigenvalues at once, smoothed; a logarithmic scale, on which single "
                    "outliers show. The band is two standard errors over random probes; ± is one.",
                    f'<div class="two"><figure>{draw(paint, "spectral density", size=(6.2, 3.6))}</figure>'
                    f"{_dl(facts)}</div>")


def _pm(scalar: Mapping[str, Any]) -> str:
    value, error = number(scalar.get("value")), number(scalar.get("stderr"))
    return significant(value) + (f" ± {significant(error, 2)}" if math.isfinite(error) else "")


def _others(m: Measured) -> str:
    if not any(m.result(name) for name in (*OTHERS, "agreement")):
        return ""
    shown = [row for row in rows(m) if row.what.startswith(("worst", "adaptive", "average", "largest random", "m-",
                                                            "normalized", "critical", "agreement"))]
    kept = [i for i in (2, 3) if any(row[i] for row in shown)]
    head = "".join(f"<th>{h}</th>" for h in ("", "value", *(HEADS[i] for i in kept), ""))
    told = str(m.result("agreement").get("sentence", ""))
    body = "".join(f"<tr><th>{_text(row.what)}</th><td><b>{escape(row.value)}</b></td>"
                   f"{''.join(f'<td>{escape(row[i])}</td>' for i in kept)}<td>{_text(row.how)}</td></tr>"
                   for row in shown)
    average = "The average case moves every weight by a normal draw, so that the length of a move is ρ in the mean " \
              "square." if m.result("average_case") else ""
    return _section("Other measures", average, f'<div class="scroll"><table class="small"><thead><tr>{head}</tr>'
                    f'</thead><tbody>{body}</tbody></table></div><p>{_text(_printable(told))}</p>')


def _line(m: Measured) -> str:
    r = m.result("line")
    x, y = numbers(r.get("x")), numbers(r.get("values"))
    error = numbers(r.get("stderr"))
    if len(x) < 2 or len(x) != len(y):
        return ""
    error = error if len(error) == len(x) else [math.nan] * len(x)

    def paint(axes: Any) -> None:
        if all(map(math.isfinite, error)) and all(map(math.isfinite, y)):
            axes.fill_between(x, [v - 2 * e for v, e in zip(y, error, strict=True)],
                              [v + 2 * e for v, e in zip(y, error, strict=True)], color=color(1), alpha=0.2,
                              linewidth=0)
        axes.plot(x, [v if math.isfinite(v) else math.nan for v in y], color=color(1), linewidth=2, gid="s1|loss")
        axes.axvline(0, color=RULE, linewidth=1, zorder=0.5)
        axes.set_xlabel("distance from the weights, ‖w′ − w‖")
        axes.margins(x=0.01)

    samples = r.get("samples")
    draws = len(samples) if isinstance(samples, list) else 1
    text = f"Loss, the mean over {_count(draws, 'random filter-normalised direction')}"
    return _section("Along a line", text + ("; the band is two standard errors over them." if draws > 1 else "."),
                    f'<figure style="max-width:680px">{draw(paint, "loss along a line", size=(6.6, 3.3))}</figure>')


def _surface(m: Measured) -> str:
    r = m.result("surface")
    names = r.get("names")
    names = [_printable(str(n)) for n in names] if isinstance(names, list) and len(names) == 2 else ["", ""]
    piece = turnable(r, "values", "Loss surface", names)
    size = f"{len(numbers(r.get('x')))} × {len(numbers(r.get('y')))}"
    return _section("The surface around the weights", f"The loss at {size} points of a plane through the weights; "
                    "distances are true lengths in weight space. Drag it.", piece) if piece else ""


def _details(m: Measured) -> str:
    care = "".join(f"<li>{c}</li>" for c in CARE)
    seconds = {k: f"{number(v):.1f} s" for k, v in section(m.record, "timing").items()}
    each = {k: v for name in m.results for k, v in [(name, section(m.result(name), "settings"))] if v}
    lists = [("Settings", m.settings), ("Settings of each measure", each), ("Model", m.model), ("Data", m.data),
             ("Time", seconds), ("Versions", section(m.record, "versions"))]
    tables = "".join(f"<details><summary>{title}</summary><dl>{''.join(_flat(part))}</dl></details>"
                     for title, part in lists if part)
    versions = " · ".join(f"{k} {v}" for k, v in section(m.record, "versions").items())
    return (f'<section><h2>Read with care</h2><ul class="caveats">{care}</ul>{tables}</section>'
            f"<footer>{escape(str(m.record.get('created', '')))}{' · ' if versions else ''}{escape(versions)}</footer>")


def _section(title: str, text: str, inside: str) -> str:
    words = f"<p>{escape(text)}</p>" if text else ""
    return f"<section><h2>{escape(title)}</h2>{words}{inside}</section>"


def _dl(facts: list[tuple[str, str]]) -> str:
    return '<dl class="one">' + "".join(f"<div><dt>{_text(k)}</dt><dd>{_text(v)}</dd></div>" for k, v in facts) \
        + "</dl>"


def _few_ticks(axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(5))
