"""What is wrong with a sharpness-aware run: symptom, cause, solution and the evidence, read from its record.

Good training and poor validation accuracy is overfitting; underfitting asks for a smaller radius. Thresholds are this
library's conventions, made for records of some hundreds of steps. Each finding shows the numbers it rests on. Findings
that ask for a larger and for a smaller radius do not occur together: see ``consistent``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..results import plain

Step = Mapping[str, Any]
USEFUL = (0.01, 1.0)
"""The useful range of the realised sharpness over the loss, (L(w + ε) − L(w)) / L(w)."""

FEWEST = 20
"""Fewer recorded steps say nothing of how a loss went."""
KNOWN = ("loss", "perturbed_loss", "gradient_norm", "perturbed_gradient_norm", "radius", "cosine", "train_accuracy",
         "accuracy", "confidence", "ece", "tau_func")

TABLE = {  # name: symptom, cause, solution
    "diverging": ("training loss diverges", "rho is too large, or the learning rate",
                  "halve rho (0.01 to 0.02 is the floor), or lower the learning rate"),
    "unstable": ("training loss has spikes", "rho is too large, or the learning rate",
                 "halve rho (0.01 to 0.02 is the floor), warm it up, or lower the learning rate"),
    "no improvement": ("not measurably better than the base optimizer", "rho is too small to matter",
                       "double rho (0.1 to 0.2), as long as training stays stable"),
    "no improvement at this radius": ("not measurably better than the base optimizer", "another radius is needed, or "
                                      "flatness is not what limits this run", "choose rho on held-out data, or try "
                                      "another direction or rule"),
    "undecided": ("not measurably better than the base optimizer", "it is ahead, by no more than the spread",
                  "more held-out data or more seeds would tell"),
    "underfitting": ("training accuracy is low", "rho is too large, the model too small or the run too short",
                     "lower rho, train longer, or add capacity"),
    "overfitting": ("training is perfect and validation is poor", "the model memorises in spite of the flat minimum",
                    "check the augmentation, or add weight decay"),
    "spurious flattening": ("sharpness falls because predictions become one-hot", "the logit path lowers the sharpness "
                            "without flattening the function", "use a functional rule (functional_sam, "
                            "preconditioned_functional_sam), or label smoothing"),
    "rho too small": ("the loss hardly rises over the step", "rho is below its useful range",
                      "raise rho"),
    "rho too large": ("the loss more than doubles over the step", "rho is above its useful range", "lower rho"),
    "hallucinated minimizer": ("the perturbed gradient vanishes where the gradient does not",
                               "w + ε is a critical point and w is not, so that the steps stop early",
                               "lower rho, let it decay, or take plain steps at the end"),
    "too few records": ("there are too few records to judge the loss", f"the diagnosis needs {FEWEST} recorded steps",
                        "record more steps, or train longer"),
    "bf16 rounding": ("the step taken is not the one asked for", "half-precision weights round ε away",
                      "keep float32 weights, and compute in half precision under autocast"),
}
WITHOUT_RHO = {  # the same of a run that has no radius: a plain optimizer's
    "diverging": ("training loss diverges", "the learning rate is too large", "lower the learning rate"),
    "unstable": ("training loss has spikes", "the learning rate is too large", "warm it up, or lower it"),
    "underfitting": ("training accuracy is low", "the model is too small or the run too short",
                     "train longer, or add capacity"),
    "overfitting": ("training is perfect and validation is poor", "the model memorises",
                    "check the augmentation, or add weight decay"),
    "too few records": TABLE["too few records"],
}
MEMORISING = "training accuracy is beyond what can be had without memorising re-drawn labels, and validation is poor"
SMALLER = ("diverging", "unstable", "rho too large", "hallucinated minimizer", "underfitting")
LARGER = ("rho too small", "no improvement")
"""Findings that ask for another radius."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One fault: ``name`` and its row of the table, the numbers it rests on, and the first step that shows it."""

    name: str
    symptom: str
    cause: str
    solution: str
    evidence: dict[str, float] = field(default_factory=dict)
    step: int | None = None

    def __str__(self) -> str:
        shown = ", ".join(f"{key} {value:.3g}" for key, value in self.evidence.items())
        return f"{self.symptom[0].upper()}{self.symptom[1:]} ({shown}): {self.cause}. {self.solution[0].upper()}" \
               f"{self.solution[1:]}."

    def to_dict(self) -> dict[str, Any]:
        return plain(self)


def diagnose(steps: Sequence[Step], *, base: Sequence[Step] | None = None, rho: float | None = None,
             spread: float = 0.005, noise: float = 0.0, classes: int | None = None) -> list[Finding]:
    """Every fault that a run record shows, each with its evidence; an empty list where none does.

    Args:
        steps: one mapping a step, or every n-th step of a longer run; 20 at least, some hundreds are better. Read
            where present: ``loss``, ``perturbed_loss``, ``gradient_norm``, ``perturbed_gradient_norm``, ``radius``,
            ``cosine`` (as in ``Sharpener.last.to_dict()``), and on the steps where they were evaluated
            ``train_accuracy``, ``accuracy``, ``confidence``, ``ece``, ``tau_func``, all but the first on data held
            out from training (not on the test data, if the findings are to be acted upon). What is missing is not
            diagnosed. Steps without a finite ``loss`` but with a finite ``perturbed_loss`` are those of a one-pass
            method. A record without any ``perturbed_loss`` is a plain optimizer's and gets no advice on rho.
        base: the record of the base optimizer's run, for "no improvement" and underfitting.
        rho: the length that every step should have, for rounding; None where it is not rho by definition (ESAM,
            LookSAM, unnormalized SAM).
        spread: a difference of accuracy that means nothing.
        noise: the share of labels, in training and held-out data, that were re-drawn at random from all classes.
            Without memorising them, an accuracy of 1 − noise · (1 − 1/classes) can be had, which underfitting and
            overfitting are judged against.
        classes: how many; needed with ``noise``.

    Raises:
        ValueError: no steps, steps without any of these quantities, or noise that is no share or without classes.

    >>> steps = [{"loss": 2.0 / (1 + t), "perturbed_loss": 2.0004 / (1 + t)} for t in range(100)]
    >>> [finding.name for finding in diagnose(steps)]
    ['rho too small']
    """
    steps = list(steps)
    if not any(step.get(name) is not None for step in steps for name in KNOWN):
        what = f"{len(steps)} steps without any of them" if steps else "no steps"
        raise ValueError(f"a diagnosis needs steps with some of {', '.join(KNOWN)}; got {what}")
    if not 0 <= noise <= 1 or noise and (classes is None or classes < 1):
        raise ValueError(f"noise is a share from 0 to 1 and needs classes=, got noise={noise}, classes={classes}")
    attainable = 1 - noise * (1 - 1 / classes) if noise and classes else 1.0
    run = _Run(steps, list(base or []), rho, spread, attainable)
    found = [finding for check in CHECKS if (finding := check(run)) is not None]
    return consistent([_without_rho(f) for f in found if f.name in WITHOUT_RHO] if run.plain else found)


def consistent(findings: Sequence[Finding]) -> list[Finding]:
    """The findings of one or several runs of a method, without those that another of them explains or contradicts.

    What asks for a smaller radius goes before what asks for a larger one. Underfitting does so where the base run fits
    better; without a base run, a radius too small to matter is not its cause, and its advice leaves rho out. "No
    improvement" is said where nothing else asks for another radius.
    """
    names = {finding.name for finding in findings}
    harmed = any(finding.name == "underfitting" and "base train" in finding.evidence for finding in findings)
    dropped: set[str] = set()
    if harmed or names & {*SMALLER} - {"underfitting"}:
        dropped |= {*LARGER}
    elif "underfitting" in names:
        dropped.add("no improvement")
    if names & {*SMALLER, *LARGER, "bf16 rounding"}:
        dropped.add("no improvement at this radius")
    kept = [finding for finding in findings if finding.name not in dropped]
    if "rho too small" in names - dropped:
        kept = [_without_rho(finding) if finding.name == "underfitting" else finding for finding in kept]
    return kept


def next_radius(findings: Sequence[Finding], rho: float, *, low: float = 0.01, high: float = 1.0,
                tried: Sequence[float] = ()) -> tuple[float, str]:
    """The radius to try next, and why: half where a finding says too large, twice where one says too small, not beyond
    ``low`` and ``high``; the same radius otherwise. Instability goes before the rest.

    Where ``rho`` was chosen among the radii ``tried``, and one of them lies on the side that a finding asks for, no
    other radius is recommended.

    >>> next_radius([], 0.05)
    (0.05, 'no finding asks for another radius')
    """
    names = [finding.name for finding in consistent(findings)]
    larger = [name for name in LARGER if name in names]
    smaller = [name for name in SMALLER if name in names]
    if not smaller and not larger:
        return rho, "no finding asks for another radius"
    after = min(max(rho, high), 2 * rho) if larger else max(min(rho, low), rho / 2)
    name, size = (larger[0], "largest") if larger else (smaller[0], "smallest")
    beside = beyond(tried, rho, bool(larger))
    if beside:
        return rho, f"{name}, but {', '.join(f'{t:g}' for t in beside)} did no better on held-out data"
    return after, f"{name}, and {rho:g} is already the {size} to try" if after == rho else name


def beyond(tried: Sequence[float], rho: float, larger: bool) -> list[float]:
    """The radii tried that are larger, or smaller, than rho; the nearest first."""
    return sorted((t for t in tried if (t > rho if larger else t < rho)), key=lambda t: abs(t - rho))


class _Run:
    """Columns of a record, without what is missing or not finite."""

    def __init__(self, steps: list[Step], base: list[Step], rho: float | None, spread: float,
                 attainable: float = 1.0):
        self.steps, self.base, self.rho, self.spread, self.attainable = steps, base, rho, spread, attainable

    def column(self, *names: str, of: list[Step] | None = None) -> list[tuple[int, list[float]]]:
        """(position, values) of the steps that have all the names, finite."""
        rows = []
        for i, step in enumerate(self.steps if of is None else of):
            values = [float(step[n]) if step.get(n) is not None else math.nan for n in names]
            if all(map(math.isfinite, values)):
                rows.append((i, values))
        return rows

    def values(self, name: str, of: list[Step] | None = None) -> list[float]:
        return [v[0] for _, v in self.column(name, of=of)]

    def final(self, name: str, of: list[Step] | None = None) -> float:
        """The mean of the last three values; nan where there is none."""
        last = self.values(name, of)[-3:]
        return math.fsum(last) / len(last) if last else math.nan

    @property
    def plain(self) -> bool:
        """Whether this is the record of a plain optimizer, which has no radius."""
        return self.rho is None and not any(step.get("perturbed_loss") is not None for step in self.steps)

    def losses(self) -> list[float]:
        """The training loss by step, finite or not: at w, or at w + ε where a one-pass method knows no other."""
        out = []
        for step in self.steps:
            loss, moved = (math.nan if step.get(n) is None else float(step[n]) for n in ("loss", "perturbed_loss"))
            if step.get("loss") is not None or not math.isnan(moved):
                out.append(moved if math.isnan(loss) and not math.isnan(moved) else loss)
        return out

    def relative_sharpness(self) -> list[float]:
        """(L(w + ε) − L(w)) / L(w) while L(w) is at least a tenth of what it was at first; inf if L(w + ε) overflows.

        Where a network fits its data the loss goes to zero, and every step is large beside it.
        """
        out, rows = [], self.column("loss")
        first = median([a for _, (a,) in rows[:max(1, len(rows) // 10)]])
        for i, (a,) in rows:
            moved = self.steps[i].get("perturbed_loss")
            moved = math.nan if moved is None else float(moved)
            moved = math.inf if self.steps[i].get("skipped") and math.isnan(moved) else moved
            if a > 0.1 * first and not math.isnan(moved):
                out.append((moved - a) / a)
        return out


def median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    n = len(ordered)
    return math.nan if not n else (ordered[n // 2] + ordered[(n - 1) // 2]) / 2


def windows(values: Sequence[float], parts: int = 10) -> list[float]:
    """Medians of consecutive tenths."""
    n = len(values)
    return [median(values[i * n // parts:(i + 1) * n // parts]) for i in range(parts)] if n >= 2 * parts else []


def noise(losses: Sequence[float], window: int = 20) -> tuple[list[float], float]:
    """log L_t − log(median of the window before t) for t from the window on, and the standard deviation, by the MAD."""
    logs = [math.log(max(v, 1e-300)) for v in losses]
    steps = [logs[t] - median(logs[t - window:t]) for t in range(window, len(logs))]
    middle = median(steps)
    return steps, 1.4826 * median([abs(s - middle) for s in steps]) if steps else 0.0


def _finding(name: str, evidence: dict[str, float], step: int | None = None) -> Finding:
    symptom, cause, solution = TABLE[name]
    return Finding(name=name, symptom=symptom, cause=cause, solution=solution, evidence=evidence, step=step)


def _without_rho(finding: Finding) -> Finding:
    symptom, cause, solution = WITHOUT_RHO[finding.name]
    symptom = MEMORISING if finding.symptom == MEMORISING else symptom
    return replace(finding, symptom=symptom, cause=cause, solution=solution)


def unstable(run: _Run) -> Finding | None:
    """A loss that is not finite, or ends well above its first or its best; or 1 % of steps far above those before.

    "Well above" is 1.5 times and four standard errors of the medians compared; "far above", thrice the median of the
    twenty before and five standard deviations; both in the logarithm, whose noise is measured on the run itself.
    """
    losses = run.losses()
    for i, loss in enumerate(losses):
        if not math.isfinite(loss):
            return _finding("diverging", {"loss": loss}, i)
    parts = windows(losses)
    if not parts:
        return None
    jumps, sigma = noise(losses)
    best, last, first = min(parts), parts[-1], losses[0]
    error = 1.25 * sigma * math.sqrt(2 * len(parts) / len(losses))
    if _log_ratio(last, best) > max(math.log(1.5), 4 * error) and \
            last - best > 0.1 * max(parts[0] - best, 0.1 * parts[0]):
        return _finding("diverging", {"last": last, "best": best}, parts.index(best) * len(losses) // 10)
    if _log_ratio(last, first) > max(math.log(1.5), 5 * sigma):
        return _finding("diverging", {"last": last, "first": first}, 0)
    spikes = [i for i, jump in enumerate(jumps, len(losses) - len(jumps)) if jump > max(math.log(3), 5 * sigma)
              and losses[i] - median(losses[i - 20:i]) > 0.1 * parts[0]]
    if len(spikes) >= max(3, 0.01 * len(losses)):
        return _finding("unstable", {"spikes": len(spikes), "highest": max(losses[i] for i in spikes)}, spikes[0])
    return None


def _log_ratio(a: float, b: float) -> float:
    return math.log(max(a, 1e-300)) - math.log(max(b, 1e-300))


def no_improvement(run: _Run) -> Finding | None:
    """Held-out accuracy not above the base run's by more than the spread; no other radius is asked for where it is
    above."""
    ours, theirs = run.final("accuracy"), run.final("accuracy", run.base)
    if not ours - theirs <= run.spread:
        return None
    relative = median(run.relative_sharpness())
    name = "undecided" if ours > theirs else "no improvement" if relative < 5 * USEFUL[0] else \
        "no improvement at this radius"
    evidence = {"accuracy": ours, "base": theirs, "spread": run.spread}
    return _finding(name, evidence if math.isnan(relative) else evidence | {"sharpness over loss": relative})


def underfitting(run: _Run) -> Finding | None:
    """Training accuracy below the base run's, or what is attainable, by 2 points; without a base run, below 0.8 of what
    is attainable and at most 0.1 above validation."""
    train, validation = run.final("train_accuracy"), run.final("accuracy")
    theirs = run.final("train_accuracy", run.base)
    if math.isfinite(theirs):
        worse = run.final("accuracy", run.base) - validation > run.spread
        return _finding("underfitting", {"train": train, "base train": theirs, "validation": validation}) \
            if min(theirs, run.attainable) - train > 0.02 and worse else None
    if train < 0.8 * run.attainable and train - validation < 0.1:
        return _finding("underfitting", {"train": train, "validation": validation} | _attainable(run))
    return None


def overfitting(run: _Run) -> Finding | None:
    """Training accuracy of at most 0.02 below what is attainable, and validation 0.1 below it."""
    train, validation = run.final("train_accuracy"), run.final("accuracy")
    if train >= run.attainable - 0.02 and train - validation >= 0.1:
        found = _finding("overfitting", {"train": train, "validation": validation} | _attainable(run))
        return replace(found, symptom=MEMORISING) if run.attainable < 1 else found
    return None


def _attainable(run: _Run) -> dict[str, float]:
    return {"attainable without memorising": run.attainable} if run.attainable < 1 else {}


def too_few(run: _Run) -> Finding | None:
    """Fewer than 20 recorded steps, unless the loss is not finite."""
    count = len(run.steps)
    ended = any(not math.isfinite(loss) for loss in run.losses())
    return None if count >= FEWEST or ended else _finding("too few records", {"steps": count})


def spurious_flattening(run: _Run) -> Finding | None:
    """Sharpness falls by 30 % while confidence rises, and the functional part (else accuracy) does not explain it."""
    sharpness = windows([b - a for _, (a, b) in run.column("loss", "perturbed_loss")])
    confidence, functional, ece = run.values("confidence"), run.values("tau_func"), run.values("ece")
    if not sharpness or len(confidence) < 2 or not sharpness[-1] < 0.7 * sharpness[0]:
        return None
    rise = confidence[-1] - confidence[0]
    evidence = {"sharpness first": sharpness[0], "sharpness last": sharpness[-1], "confidence rise": rise}
    if rise < 0.05:
        return None
    if len(functional) > 1:
        if abs(functional[-1]) < 0.9 * abs(functional[0]):
            return None
        return _finding("spurious flattening", evidence | {"functional first": functional[0],
                                                           "functional last": functional[-1]})
    if len(ece) > 1 and ece[-1] - ece[0] > 0.02:
        return _finding("spurious flattening", evidence | {"ece first": ece[0], "ece last": ece[-1]})
    return None


def radius_out_of_range(run: _Run) -> Finding | None:
    """The realised sharpness over the loss, in its median, outside 0.01 to 1."""
    relative = run.relative_sharpness()
    if len(relative) < 10:
        return None
    middle = median(relative)
    if math.isnan(middle) or USEFUL[0] <= middle <= USEFUL[1]:
        return None
    return _finding("rho too small" if middle < USEFUL[0] else "rho too large", {"sharpness over loss": middle})


def hallucinated_minimizer(run: _Run) -> Finding | None:
    """In the last tenth ‖∇L(w + ε)‖ is below a tenth of ‖∇L(w)‖, which is not below a tenth of what it was at first."""
    rows = [row for row in run.column("gradient_norm", "perturbed_gradient_norm")
            if run.steps[row[0]].get("passes", 2) > 1]
    if len(rows) < 20:
        return None
    tenth = max(1, len(rows) // 10)
    at, there = ([v[k] for _, v in rows[-tenth:]] for k in (0, 1))
    first = median([v[0] for _, v in rows[:tenth]])
    if median(there) < 0.1 * median(at) and median(at) > 0.1 * first:
        return _finding("hallucinated minimizer", {"gradient": median(at), "perturbed gradient": median(there),
                                                   "gradient at first": first}, rows[-tenth][0])
    return None


def rounding(run: _Run) -> Finding | None:
    """The step taken has a cosine below 0.95 to the one asked for, or a length a tenth off ``rho``, in the median."""
    cosine = median(run.values("cosine"))
    radius = median(run.values("radius")) / run.rho if run.rho else math.nan
    evidence = {key: value for key, value in (("cosine", cosine), ("radius over rho", radius)) if math.isfinite(value)}
    if cosine < 0.95 or abs(radius - 1) > 0.1:
        return _finding("bf16 rounding", evidence)
    return None


CHECKS: tuple[Callable[[_Run], Finding | None], ...] = (
    unstable, hallucinated_minimizer, rounding, radius_out_of_range, spurious_flattening, no_improvement, underfitting,
    overfitting, too_few)
