"""``flatmin compare``: methods side by side on one recipe; everything else equal.

For each method with a radius: choose ρ on held-out parts of the *training* data. For each seed: train on all of it,
then look at the clean test data once and measure sharpness and curvature on training examples. The diagnosis reads the
steps of these runs, and of one more a method, trained on four fifths of the training data and watched on the last.
"""

from __future__ import annotations

import dataclasses
import datetime
import math
import platform
import statistics
from typing import Any

import torch
from torch import Tensor, nn

from .. import __version__
from ..ascent.parameters import is_normalization
from ..curvature import Hessian, eigenpairs
from ..errors import RunFolderError
from ..objective import Objective
from ..progress import Display, clock
from ..recipes import find_recipe
from ..sharpness import Finding, diagnose, next_radius, one_step
from ..sharpness.diagnosis import LARGER, SMALLER, WITHOUT_RHO, beyond, consistent
from ..training.folder import RunFolder
from ..training.loop import Diverged, Plan, accuracy, train
from ..training.methods import Method, find_methods
from ..training.metrics import classification, logits_of, standard_errors
from ..training.recipe import Data, Recipe
from . import landscape, timing
from .settings import CompareSettings, fixed_radii

MEASURED_RHO = 0.05
"""The radius at which one-step sharpness is measured, the same for every method."""
HELD_OUT = "the run with held-out data"


class Comparison:
    """One comparison, kept in a folder; :meth:`run` does what the record does not hold yet."""

    def __init__(self, settings: CompareSettings, folder: RunFolder, record: dict[str, Any] | None = None,
                 quiet: bool = False):
        self.settings, self.folder, self.quiet = settings, folder, quiet
        self.recipe: Recipe = find_recipe(settings.recipe)
        self.noise = self.recipe.noise if settings.noise is None else settings.noise
        self.epochs = self.recipe.epochs if settings.epochs is None else settings.epochs
        torch.set_num_threads(settings.threads)
        self.data: Data = self.recipe.load(settings.data).with_noise(self.noise)
        self.recipe.probe(self.data)
        self.methods = self._usable(find_methods(settings.methods))
        self.radii = fixed_radii(settings.rho)
        self.record = self._new_record() if record is None else self._resumed(record)

    def run(self) -> dict[str, Any]:
        """Do what is left; the record is saved after every piece of work, also when interrupted."""
        steps = self._steps()
        self.progress = Display("", unit="step", total=sum(steps.values()), quiet=self.quiet)
        try:
            self.record["status"] = "running"
            self.folder.save_record(self.record)
            if not self.quiet and any(steps.values()):
                left = timing.predicted(self.recipe, self.data, self.methods, steps)
                self.progress.line(f"{sum(steps.values())} training steps, about {clock(left)} on this machine")
            for method in self.methods:
                self._choose(method)
            for seed in range(self.settings.seeds):
                for method in self.methods:
                    self._train_and_measure(method, seed)
            for method in self.methods:
                self._hold_out(method)
            self.record["diagnosis"] = {method.name: self._diagnosis(method) for method in self.methods}
            if "timing" not in self.record:
                self.progress.say("timing")
                self.record["timing"] = timing.side_by_side(self.recipe, self.data, self.methods,
                                                            {m.name: self._rho(m) for m in self.methods})
            if "plane" not in self.record:
                self.record["plane"] = self._plane()
            self.record["summary"] = summary(self.record["runs"])
            self.record["status"] = "complete"
        except BaseException:
            self.record["status"] = "interrupted"
            self.record["summary"] = summary(self.record["runs"])
            raise
        finally:
            self.progress.end()
            self.folder.save_record(self.record)
        return self.record

    @property
    def failure(self) -> str:
        """What a finished run did not reach, in one line; empty where a run ended well."""
        lost = [run["diverged"] for run in self.record["runs"] if "diverged" in run]
        return "every run diverged: " + lost[0] if lost and len(lost) == len(self.record["runs"]) else ""

    def _usable(self, methods: list[Method]) -> list[Method]:
        """Leave out, with the reason in the record, what this model cannot be trained with."""
        torch.manual_seed(0)
        norms = any(is_normalization(m) for m in self.recipe.model().modules())
        self.left_out = {} if norms else {m.name: "the model has no normalization layers" for m in methods
                                          if m.name == "sam_on"}
        kept = [m for m in methods if m.name not in self.left_out]
        if not kept:
            raise ValueError("; ".join(f"{k}: {v}" for k, v in self.left_out.items()))
        return kept

    def _resumed(self, record: dict[str, Any]) -> dict[str, Any]:
        """An earlier record, where it is of the same data."""
        known = record["data"].get("fingerprint")
        if known not in (None, self.data.fingerprint()):
            raise RunFolderError(f"the data of recipe {self.settings.recipe} are not those that {self.folder.path} "
                                 "began with: restore them, or start a new run with --out")
        return record

    def _new_record(self) -> dict[str, Any]:
        held = self._folds()[0][1]
        return {
            "kind": "compare", "status": "running",
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "settings": dataclasses.asdict(self.settings) | {
                "noise": self.noise, "epochs": self.epochs, "batch_size": self.recipe.batch_size, "lr": self.recipe.lr,
                "momentum": self.recipe.momentum, "weight_decay": self.recipe.weight_decay,
                "adamw_lr": self.recipe.adamw_lr, "schedule": "cosine", "folds": self.recipe.folds,
                "measured_rho": MEASURED_RHO},
            "versions": {"flatmin": __version__, "torch": torch.__version__, "python": platform.python_version(),
                         "platform": platform.platform(), "threads": self.settings.threads},
            "data": {"name": self.recipe.name, "train": len(self.data.train_targets),
                     "test": len(self.data.test_targets), "classes": self.data.classes, "noise": self.noise,
                     "chance": float(self.data.test_targets.bincount().max()) / len(self.data.test_targets),
                     "held_out": len(held), "fingerprint": self.data.fingerprint()},
            "left_out": self.left_out, "selection": {}, "held_out": {}, "runs": [],
        }

    # choosing the radius, on training data alone

    def _folds(self) -> list[tuple[Tensor, Tensor]]:
        """(kept, held-out) index pairs; one fifth is held out each time."""
        n = len(self.data.train_targets)
        order = torch.randperm(n, generator=torch.Generator().manual_seed(77))[:self.recipe.tuning_samples]
        parts = [order[i::5] for i in range(5)]
        return [(torch.cat([p for j, p in enumerate(parts) if j != i]), parts[i]) for i in range(self.recipe.folds)]

    def _choose(self, method: Method) -> None:
        grid = () if method.name in self.radii or "" in self.radii else method.grid(self.recipe)
        if not grid:
            return
        entry = self.record["selection"].setdefault(method.name, {
            "grid": list(grid), "scores": [], "stderr": [], "chosen": None,
            "criterion": self._criterion()})
        for rho in grid[len(entry["scores"]):]:
            self.progress.say(f"choosing ρ for {method.name}: {rho:g}")
            found = [self._held_out_score(method, rho, i) for i in range(self.recipe.folds)]
            entry["scores"].append(statistics.fmean(found))
            entry["stderr"].append(statistics.stdev(found) / math.sqrt(len(found)) if len(found) > 1 else math.nan)
            self.folder.save_record(self.record)
        best = max(range(len(grid)), key=lambda i: (entry["scores"][i], -grid[i]))
        entry["chosen"] = grid[best]
        runs = self.record["held_out"].get(method.name, [])
        self.record["held_out"][method.name] = [run for run in runs if run["rho"] == entry["chosen"]]

    def _criterion(self) -> str:
        kept, held = self._folds()[0]
        some = f" {len(kept) + len(held)} examples of" if self.recipe.tuning_samples else ""
        noisy = ", noisy labels" if self.noise else ""
        parts = f"{self.recipe.folds} held-out parts" if self.recipe.folds > 1 else "a held-out fifth"
        return f"mean accuracy over {parts} of{some} the training data{noisy}"

    def _held_out_score(self, method: Method, rho: float | None, fold: int) -> float:
        """Accuracy on a held-out part; the run on the first of them is kept for the diagnosis."""
        x, y = self.data.train_inputs, self.data.train_targets
        kept, held = self._folds()[fold]
        plan = Plan(f"choose-{method.name}-{rho}-{fold}", self.recipe, method, rho, 500 + fold, self.epochs, x[kept],
                    y[kept], held_out=None if fold else (x[held], y[held]))
        try:
            model, history = train(plan, self.progress.step)
            score = accuracy(model, x[held], y[held])
        except Diverged as error:
            history, score = error.history, 0.0
        if fold == 0 and history is not None:
            self.record["held_out"].setdefault(method.name, []).append({"rho": rho, "history": history})
        return score

    def _hold_out(self, method: Method) -> None:
        """One run with a held-out part, where the choice of the radius has not left one."""
        if not self.record["held_out"].get(method.name):
            self.progress.say(f"diagnosis of {method.name}")
            self._held_out_score(method, self._rho(method), 0)
            self.folder.save_record(self.record)

    def _rho(self, method: Method) -> float | None:
        if not method.rhos and not self.recipe.rhos.get(method.name):
            return None
        fixed = self.radii.get(method.name, self.radii.get(""))
        return self.record["selection"][method.name]["chosen"] if fixed is None else fixed

    # training and measuring

    def _train_and_measure(self, method: Method, seed: int) -> None:
        if any(r["method"] == method.name and r["seed"] == seed for r in self.record["runs"]):
            return
        key = f"{method.name}-seed{seed}"
        self.progress.say(key)
        rho = self._rho(method)
        plan = Plan(key, self.recipe, method, rho, seed, self.epochs, self.data.train_inputs, self.data.train_targets,
                    (self.data.test_inputs, self.data.test_targets))
        state = self.folder.load_state()
        state = state if state is not None and state["key"] == key else None
        run: dict[str, Any] = {"method": method.name, "seed": seed, "rho": rho}
        try:
            model, run["history"] = train(plan, self.progress.step, self.folder, state)
            run |= self._measure(model)
            self.folder.save_weights(key, model)
        except Diverged as error:  # a result like any other: the other runs are still done
            run["history"] = error.history or run.get("history")
            run |= {"diverged": str(error), "test": dict.fromkeys(("accuracy", "nll", "ece"), math.nan)}
        self.record["runs"].append(run)
        self.folder.save_record(self.record)
        self.folder.keep_state(key)

    def _diagnosis(self, method: Method) -> dict[str, Any]:
        """What all runs of a method show together, each fault with the runs that show it and its first evidence."""
        held_out, rho = self.record["held_out"], self._rho(method)
        length = rho if method.steps_by_rho else None
        labels: dict[str, Any] = {"noise": self.noise, "classes": self.data.classes}
        base = held_out.get(method.base, []) if method.name != method.base else []
        base = steps_of(base[0]["history"]) if base else None
        runs = [(f"seed {r['seed']}", diagnose(steps_of(r["history"]), rho=length, **labels))
                for r in self.record["runs"] if r["method"] == method.name and r.get("history")]
        for r in held_out.get(method.name, []):
            spread = math.hypot(*(_standard_error(s, len(self._folds()[0][1])) for s in (steps_of(r["history"]), base)))
            runs.append((HELD_OUT, diagnose(steps_of(r["history"]), base=base, rho=length, spread=max(0.005, spread),
                                            **labels)))
        found = consistent([f for _, run in runs for f in run])
        first: dict[str, Finding] = {}
        for f in found:
            first.setdefault(f.name, f)
        grid = method.grid(self.recipe)
        chosen = self.record["selection"].get(method.name, {})
        tried = chosen.get("grid", [])[:len(chosen.get("scores", []))]
        low, high = min(grid, default=0.02) / 2, 2 * max(grid, default=0.5)
        after, why = (None, "") if rho is None else next_radius(found, rho, low=low, high=high, tried=tried)
        after, why = (rho, f"{why}: set by {method.knobs}") if method.knobs and after != rho else (after, why)
        said = [(f, [run for run, its in runs if any(g.name == f.name for g in its)]) for f in first.values()]
        return {"runs": len(runs), "rho": rho, "next_rho": after, "next_rho_because": why,
                "findings": [_advised(f, method, rho, chosen).to_dict() | {"runs": len(where), "in": where}
                             for f, where in said]}

    def _measure(self, model: nn.Module) -> dict[str, Any]:
        if not all(bool(p.isfinite().all()) for p in model.parameters()):
            raise Diverged("the weights are not finite after the last epoch")
        n = min(self.recipe.curvature_samples, len(self.data.train_targets))
        objective = Objective(model, self.recipe.loss, [(self.data.train_inputs[:n], self.data.train_targets[:n])])
        step = one_step(objective, rho=MEASURED_RHO)
        spectrum = eigenpairs(Hessian(objective), k=1, tol=1e-3)
        logits = logits_of(model, self.data.test_inputs)
        return {
            "test": classification(logits, self.data.test_targets)
            | {"stderr": standard_errors(logits, self.data.test_targets)},
            "sharpness": {"rho": MEASURED_RHO, "value": step.value, "first_order": step.first_order,
                          "second_order": step.second_order, "remainder": step.remainder, "samples": n},
            "hessian": {"eigenvalue": spectrum.largest, "residual": float(spectrum.residuals[-1]),
                        "converged": bool(spectrum.converged[-1]), "matvecs": spectrum.matvecs, "samples": n},
            "line": landscape.profile(objective),
        }

    def _plane(self) -> dict[str, Any]:
        """The plane through solutions of the first seed: of the first method and the two most accurate others."""
        self.progress.say("landscape")
        found = summary(self.record["runs"])
        kept = [r["method"] for r in self.record["runs"] if r["seed"] == 0 and "diverged" not in r]
        kept = kept[:1] + sorted(kept[1:], key=lambda m: -found[m]["accuracy"]["mean"])[:2]
        states = {m: self.folder.load_weights(f"{m}-seed0") for m in kept}
        return landscape.plane(self.recipe, self.data, states, self.folder.path / "checkpoints") if kept else {}

    def _steps(self) -> dict[str, int]:
        """Training steps that are left, by method."""
        full = self.epochs * math.ceil(len(self.data.train_targets) / self.recipe.batch_size)
        part = self.epochs * math.ceil(len(self._folds()[0][0]) / self.recipe.batch_size)
        out = {}
        for method in self.methods:
            grid = () if method.name in self.radii or "" in self.radii else method.grid(self.recipe)
            tried = len(self.record["selection"].get(method.name, {}).get("scores", []))
            done = sum(r["method"] == method.name for r in self.record["runs"])
            out[method.name] = (len(grid) - tried) * self.recipe.folds * part + full * (self.settings.seeds - done)
            if not grid and not self.record["held_out"].get(method.name):
                out[method.name] += part
        return out


def _advised(finding: Finding, method: Method, rho: float | None, chosen: dict[str, Any]) -> Finding:
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
        solution += (f"; tried on held-out data, {' and '.join(f'rho {t:g} reached {scores[t]:.3g}' for t in beside)}, "
                     f"no better than {scores.get(rho, math.nan):.3g} at {rho:g}")
    return dataclasses.replace(finding, cause=cause, solution=solution)


def steps_of(history: dict[str, Any]) -> list[dict[str, Any]]:
    """What the diagnosis reads: the recorded steps, and on the last of each epoch what was evaluated after it."""
    steps = [dict(step) for step in history["steps"]]
    epochs = len(history["epoch"])
    for name, values in (("train_accuracy", history["train_accuracy"]), *_columns(history["held_out"])):
        for epoch, value in enumerate(values, 1):
            steps[min(len(steps), math.ceil(epoch * len(steps) / epochs)) - 1][name] = value
    return steps


def _standard_error(steps: list[dict[str, Any]] | None, n: int) -> float:
    """Of the last accuracy on n examples."""
    p = next((step["accuracy"] for step in reversed(steps or []) if "accuracy" in step), 0.0)
    return math.sqrt(p * (1 - p) / n)


def _columns(rows: list[dict[str, float]]) -> list[tuple[str, list[float]]]:
    return [(name, [row[name] for row in rows]) for name in ("accuracy", "ece", "confidence")] if rows else []


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean, standard deviation and number over the seeds where a quantity is finite, by method and quantity."""
    out: dict[str, Any] = {}
    for name in dict.fromkeys(r["method"] for r in runs):
        mine = [r for r in runs if r["method"] == name]
        out[name] = {key: _mean_and_sd([float(r.get(part, {}).get(field, "nan")) for r in mine])
                     for key, (part, field) in _SUMMARISED.items()}
    return out


_SUMMARISED = {
    **{k: ("test", k) for k in ("accuracy", "nll", "ece")}, "sharpness": ("sharpness", "value"),
    **{k: ("sharpness", k) for k in ("first_order", "second_order")},
    **{k: ("hessian", k) for k in ("eigenvalue", "residual")},
}


def _mean_and_sd(values: list[float]) -> dict[str, Any]:
    v = [x for x in values if math.isfinite(x)]
    return {"mean": statistics.fmean(v) if v else math.nan, "sd": statistics.stdev(v) if len(v) > 1 else math.nan,
            "n": len(v)}
