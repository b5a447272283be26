"""What a run found, in plain sentences made from its numbers; what got worse is always among them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any

from .compare_record import CompareRecord
from .differences import MOST_SEEDS, Difference
from .fields import items, number, section
from .formatting import joined, minus, signed, significant
from .seed_statistics import over_seeds, plus_minus


def findings(record: Mapping[str, Any]) -> list[str]:
    """Honest sentences on a run record: who leads and whether that is decided, what else was seen, what got worse.

    A difference counts as decided where a paired t test over seeds says so at 5 %, after Holm's correction over the
    comparisons with one method; with one seed nothing is decided.
    """
    r = CompareRecord(record)
    return [verdict(r), *flatness(r), *worse(r)]


def headline(r: CompareRecord) -> str:
    """The shortest true sentence on test accuracy."""
    ranked = _ranked(r)
    if not ranked:
        return "No method has learnt" if any(r.stat(m, r.first).known for m in r.methods) else "No result yet"
    best, base = ranked[0], r.baseline
    if len(ranked) == 1:
        return f"{r.label(best)} reaches {_value(r, best)} {r.test_name}"
    tied = _tied(r, ranked)
    if not math.isfinite(r.stat(best, r.first).sd):
        return f"{r.label(best)} is ahead on {r.test_name}, in a single seed: undecided"
    if len(tied) == len(ranked) or base in tied and best != base:
        return f"No winner: the seeds do not tell {_few(r, tied, 'methods')} apart"
    if best == base:
        return f"Nothing beats {r.label(base)} here"
    points = r.metrics[r.first].size(r.difference(r.first, best, base).mean)
    verb = "is" if len(tied) == 2 else "are"
    also = "" if len(tied) == 1 else f"; {_few(r, tied[1:], 'others')} {verb} as good as far as the seeds tell"
    over = f" over {r.label(base)}" if base in ranked else ""
    return f"{r.label(best)} gains {points} of {r.test_name}{over}{also}"


def verdict(r: CompareRecord) -> str:
    """Who has the best test accuracy, by how much, against which spread."""
    ranked = _ranked(r)
    if not ranked:
        return "No method has learnt: none is above chance." if any(r.stat(m, r.first).known for m in r.methods) \
            else f"No run has finished with a {r.test_name}, so there is nothing to compare yet."
    best = ranked[0]
    metric = r.metrics[r.first]
    first = f"{r.label(best)} has the {'highest' if metric.higher_is_better else 'lowest'} {r.test_name}: " \
            f"{_value(r, best)}"
    if len(ranked) == 1:
        return f"{first}. It is the only method with a result that can be compared."
    other = r.baseline if r.baseline in ranked and best != r.baseline else ranked[1]
    step = r.difference(r.first, best, other)
    side = "above" if metric.higher_is_better else "below"
    if r.stat(best, r.first).mean == r.stat(other, r.first).mean:
        tie = f"{r.label(best)} and {r.label(other)} tie in {r.test_name}: {_value(r, best)}"
        rest = [m for m in _tied(r, ranked)[1:] if m != other]
        return f"{tie}." + (f" Undecided between them and {_names(r, rest)}." if rest else "")
    text = f"{first}, {metric.size(r.stat(best, r.first).mean - r.stat(other, r.first).mean)} {side} " \
           f"{r.label(other)} ({_value(r, other)}); {_against(r, step)}."
    tied = [m for m in _tied(r, ranked)[1:] if m != other]
    if tied and step.seeds > 1:
        text += f" Undecided between {r.label(best)} and {_names(r, tied)}."
    return text


def worse(r: CompareRecord) -> list[str]:
    """Everything measured that got worse than with the baseline, also where it is undecided."""
    base, out = r.baseline, _not_learnt(r)
    others = [m for m in r.methods if m != base and r.learnt(m)] if r.learnt(base) else []
    for name in r.columns:
        metric = r.metrics[name]
        lost = [m for m in others if metric.sign * (r.stat(m, name).mean - r.stat(base, name).mean) < 0]
        said = r.test_name.capitalize() if name == r.first else metric.sentence
        if lost:
            out.append(_listing(r, f"{said} is {'lower' if metric.higher_is_better else 'higher'}", name, lost))
    slow = [m for m in others if r.timing(m)[1] > 1.005]
    if slow:
        costs = _range(r, slow, lambda m: r.timing(m)[1], lambda m: f"{r.timing(m)[1]:.2f} times")
        out.append(f"A step costs more time than one of {r.label(base)}: {costs}.")
    for m in r.methods:
        broken = sum(not math.isfinite(v) for name in r.tests[:2] for v in r.seeds(m, name))
        if broken:
            out.append(f"{r.label(m)} diverged: {broken} of its test results are not finite numbers.")
    loose = [x for x in r.all_runs if section(x, "hessian").get("converged") is False]
    if loose:
        out.append(f"{len(loose)} of {len(r.all_runs)} Hessian eigenvalues did not converge to the tolerance; "
                   f"read them with their residuals.")
    return out


def _not_learnt(r: CompareRecord) -> list[str]:
    idle = r.not_learnt()
    if not idle:
        return []
    verb, they = ("has", "It is") if len(idle) == 1 else ("have", "They are")
    values = joined([f"{r.label(m)} {_value(r, m)}" for m in idle])
    return [f"{_names(r, idle)} {verb} not learnt: {values} is not above chance, {100 * r.chance:.1f} %. {they} not "
            f"compared with the others."]


def flatness(r: CompareRecord) -> list[str]:
    """Flatness, how well it goes with accuracy, and what training longer did."""
    return [*_flatter(r), *_parts(r), *_rankings(r), *_peaks(r)]


def _flatter(r: CompareRecord) -> list[str]:
    out = []
    for metric, name in (("sharpness", "one-step sharpness"), ("eigenvalue", "the largest Hessian eigenvalue")):
        base = r.stat(r.baseline, metric)
        lower = [m for m in r.methods if r.competes(m, metric) and r.learnt(r.baseline)
                 and r.stat(m, metric).mean < base.mean and r.difference(metric, m, r.baseline).decided]
        as_well = [m for m in lower if not _fitted_less(r, m)]
        if as_well:
            out.append(_listing(r, f"Flatter: {name} is lower", metric, as_well))
        less = [m for m in lower if m not in as_well]
        if less:
            losses = joined([f"{r.label(m)} {plus_minus(r.training_loss(m))}" for m in less])
            verb = "has" if len(less) == 1 else "have"
            out.append(_listing(r, f"{_names(r, less)} {verb} fitted the data less (training loss {losses} against "
                                   f"{r.label(r.baseline)}’s {plus_minus(r.training_loss(r.baseline))}) and {verb} a "
                                   f"{'lower' if r.metrics[r.first].higher_is_better else 'higher'} {r.test_name}, "
                                   f"so that this does not show a flatter solution: {name} is lower", metric, less))
    return sorted(out, key=lambda text: not text.startswith("Flatter"))


def _fitted_less(r: CompareRecord, method: str) -> bool:
    """Whether training loss is above and test result worse than the baseline's, both decided."""
    loss, test = (r.difference(name, method, r.baseline) for name in ("training_loss", r.first))
    return loss.decided and loss.mean > 0 and test.decided and r.metrics[r.first].sign * test.mean < 0


def _parts(r: CompareRecord) -> list[str]:
    able = [m for m in r.methods if r.competes(m, "sharpness") and r.stat(m, "first_order").known]
    beyond = [m for m in able if not r.explained(m)]
    out = [f"For {_names(r, beyond)}, a step of ρ = {r.probe():g} is beyond the range of slope and curvature at the "
           f"point: they leave more than a quarter of one-step sharpness unexplained."] if beyond else []
    shares = [(abs(r.stat(m, "first_order").mean) / r.stat(m, "sharpness").mean, m) for m in able
              if m not in beyond and r.stat(m, "sharpness").mean > 0]
    most = [m for share, m in shares if share > 0.5]
    if not most:
        return out
    whose = "every method" if len(most) == len(r.methods) > 1 else _names(r, most)
    low, high = min(s for s, m in shares if m in most), max(s for s, m in shares if m in most)
    part = f"{low:.0%}" if f"{low:.0%}" == f"{high:.0%}" else f"{low:.0%} to {high:.0%}"
    return [*out, f"For {whose}, {part.replace('%', ' %')} of one-step sharpness is its first-order part ρ‖g‖: it "
            f"tells how far training is from a stationary point more than how curved the loss is."]


def _rankings(r: CompareRecord) -> list[str]:
    clashes = []
    for a, b in combinations([m for m in r.methods if r.learnt(m)], 2):
        s, h = (r.difference(m, a, b) for m in ("sharpness", "eigenvalue"))
        if s.mean * h.mean < 0:
            clashes.append((s.decided and h.decided, (a, b) if s.mean < 0 else (b, a)))
    if not clashes:
        return []
    clear = [pair for decided, pair in clashes if decided]
    a, b = clear[0] if clear else clashes[0][1]
    text = (f"One-step sharpness and the largest Hessian eigenvalue disagree: {r.label(a)} is flatter than "
            f"{r.label(b)} by the first, sharper by the second")
    if not clear:
        text += " (undecided in one of them at least)"
    more = (len(clear) or len(clashes)) - 1
    rest = {0: "", 1: "; so for one more pair of methods"}.get(more, f"; so for {more} more pairs of methods")
    return [f"{text}{rest}."]


def _peaks(r: CompareRecord) -> list[str]:
    """Methods whose test accuracy fell clearly from its best epoch, which is read off the test set and never used."""
    fell: list[str] = []
    if r.first != "accuracy":
        return fell         # how far another metric may move without a meaning is not known
    for m in filter(r.learnt, r.methods):
        drop = over_seeds(max(c) - c[-1] for c in r.histories(m, "test_accuracy") if all(map(math.isfinite, c)))
        if drop.mean > 0.02:
            fell.append(f"{r.label(m)} by {100 * drop.mean:.1f} points" + " (undecided)" * (not drop.sd < drop.mean))
    return [f"{r.test_name.capitalize()} fell between its best epoch and the last one: {joined(fell)}. (No epoch was "
            f"picked; every result is that of the last one.)"] if fell else []


def diagnosed(r: CompareRecord) -> list[tuple[str, str]]:
    """What the runs of each method show to be wrong: the fault, and where, on what evidence, and what to do."""
    out = []
    for m in r.methods:
        part = section(r.record, "diagnosis", m)
        for fault in map(section, items(part.get("findings"))):
            evidence = ", ".join(f"{k} {number(v):.3g}" for k, v in section(fault, "evidence").items())
            where = joined([str(w) for w in items(fault.get("in"))])
            runs = f"{number(fault.get('runs')):.0f} of {number(part.get('runs')):.0f} runs"
            advice = f"{fault.get('cause')}; {fault.get('solution')}."
            out.append((f"{r.label(m)}: {fault.get('symptom')}",
                        f" in {where} ({runs}) ({evidence}). {advice[0].upper()}{advice[1:]}"))
        tried = r.next_radius(m)
        out += [(f"{r.label(m)}: try ρ = {tried[1]:g} next", f", after {tried[0]:g}.")] if tried else []
    return out


def compared(r: CompareRecord) -> list[str]:
    """A line for each method and reference: the difference paired over seeds, and whether it is decided."""
    out, metric = [], r.metrics[r.first]
    for method, reference, d in r.recorded_differences():
        if not math.isfinite(d.low + d.high):
            continue
        mean = f"{100 * d.mean:+.1f}" if metric.scale == 100 else signed(significant(d.mean))
        out.append(f"{r.label(method)} − {r.label(reference)}: {minus(mean)} [{metric.interval(d)}]"
                   f"{' points' * (metric.scale == 100)}, p = {significant(d.adjusted, 2)}, {_decision(d)}")
    head = f"{r.test_name}: mean difference over seeds [95 % interval], p after Holm's correction"
    return [head, *out] if out else []


def _decision(d: Difference) -> str:
    """Whether a difference is decided, and with how many seeds it would be."""
    if d.decided:
        return "decided"
    needed = f"about {d.seeds_needed:.0f}" if math.isfinite(d.seeds_needed) else f"more than {MOST_SEEDS}"
    return f"undecided; {needed} seeds would decide"


def _value(r: CompareRecord, method: str) -> str:
    return r.metrics[r.first].with_unit(r.stat(method, r.first))


def _ranked(r: CompareRecord) -> list[str]:
    sign = r.metrics[r.first].sign
    return sorted((m for m in r.methods if r.competes(m, r.first)), key=lambda m: -sign * r.stat(m, r.first).mean)


def _tied(r: CompareRecord, ranked: Sequence[str]) -> list[str]:
    """The best, and what cannot be told from it."""
    return [ranked[0], *(m for m in ranked[1:] if not r.difference(r.first, m, ranked[0]).decided)]


def _against(r: CompareRecord, step: Difference) -> str:
    if step.seeds < 2:
        return "with one seed in common there is no spread to compare this with, so it is undecided"
    return f"95 % interval of the difference over seeds {r.metrics[r.first].interval(step)}, {_decision(step)}"


def _listing(r: CompareRecord, start: str, metric: str, methods: Sequence[str]) -> str:
    base = r.stat(r.baseline, metric)
    show = r.metrics[metric].with_unit
    clear = [m for m in methods if r.difference(metric, m, r.baseline).decided]
    vague = [m for m in methods if m not in clear]
    parts = [_range(r, group, lambda m: r.stat(m, metric).mean, lambda m: show(r.stat(m, metric)))
             for group in (clear, vague) if group]
    if vague:
        parts[-1] += " (undecided)" if math.isfinite(base.sd) else " (undecided, one seed)"
    return f"{start} than {r.label(r.baseline)}’s {show(base)}: {'; '.join(parts)}."


def _names(r: CompareRecord, methods: Sequence[str]) -> str:
    return joined([r.label(m) for m in methods])


def _few(r: CompareRecord, methods: Sequence[str], noun: str) -> str:
    return _names(r, methods) if len(methods) <= 3 else f"{len(methods)} {noun}"


def _range(r: CompareRecord, methods: Sequence[str], value: Callable[[str], float], show: Callable[[str], str]) -> str:
    """Each method and its value; of many, all names but only the ends of their range."""
    if len(methods) <= 4:
        return joined([f"{r.label(m)} {show(m)}" for m in methods])
    low, high = min(methods, key=value), max(methods, key=value)
    who = f"all {len(methods)} others" if len(methods) == len(r.methods) - 1 else _names(r, methods)
    return f"{who}, from {show(low)} ({r.label(low)}) to {show(high)} ({r.label(high)})"

