"""``flatmin compare``: methods side by side on one recipe; everything else equal.

For each method with a radius: choose ρ on held-out parts of the *training* data. For each seed: train on all of it,
then look at the test data once and measure sharpness and curvature on training examples. The plain optimizer is trained
for twice the steps too, as many passes as a method with two passes a step. The diagnosis reads the steps of these runs,
and of one more a method, trained on four fifths of the training data and watched on the last.
"""

from __future__ import annotations

import dataclasses
import datetime
import math
import platform
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import __version__
from ..ascent.parameters import is_normalization
from ..batches import leaves
from ..curvature import Hessian, eigenpairs
from ..errors import RunFolderError
from ..files import digest
from ..progress import Display, clock
from ..recipes import find_recipe
from ..report.differences import against_references
from ..sharpness import one_step
from ..training.folder import RunFolder
from ..training.methods import Method, equal_compute, find_methods, own_optimizer
from ..training.run import Diverged, Training
from . import landscape, timing, trainings
from .histories import diagnosis, history_of
from .settings import CompareSettings, given_radii

MEASURED_RHO = 0.05
"""The radius at which one-step sharpness is measured, the same for every method."""


class Comparison:
    """One comparison, kept in a folder; :meth:`run` does what the record does not hold yet."""

    def __init__(self, settings: CompareSettings, folder: RunFolder, record: dict[str, Any] | None = None,
                 quiet: bool = False):
        self.settings, self.folder, self.quiet = settings, folder, quiet
        torch.set_num_threads(settings.threads)
        self.recipe = self._recipe()
        self.at = trainings.place(0, settings)
        metrics = trainings.checked(self.recipe, self.at)
        self.metric = next(iter(metrics))
        self.maximized = bool(metrics[self.metric].higher_is_better)
        self.methods = self._usable(self._asked())
        self.references = equal_compute(self.methods, self.recipe) if settings.equal_compute else []
        self.radii = given_radii(settings.rho)
        self.parts = self._parts()
        self.record = self._new_record(metrics) if record is None else self._resumed(record)

    def run(self) -> dict[str, Any]:
        """Do what is left; the record is saved after every piece of work, also when interrupted."""
        steps = self._steps()
        self.progress = Display("", unit="step", total=sum(steps.values()), quiet=self.quiet)
        try:
            self.record["status"] = "running"
            self.folder.save_record(self.record)
            if not self.quiet and any(steps.values()):
                left = timing.predicted(self._trainings(True), steps)
                self.progress.line(f"{sum(steps.values())} training steps, about {clock(left)} on this machine")
            self._do()
            self.record["status"] = "complete"
        except BaseException:
            self.record["status"] = "interrupted"
            self._summarize()
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

    def _do(self) -> None:
        record = self.record
        for method in self.methods:
            self._choose(method)
        for seed in range(self.settings.seeds):
            for method in [*self.methods, *self.references]:
                self._train_and_measure(method, seed)
        for method in self.methods:
            self._hold_out(method)
        record["diagnosis"] = {m.name: diagnosis(record, m, m.base(self.recipe).name, self._grid(m), self._rho(m))
                               for m in self.methods}
        if "timing" not in record:
            self.progress.say("timing")
            record["timing"] = timing.side_by_side(self._trainings(False))
        if "plane" not in record:
            record["plane"] = self._plane()
        self._summarize()

    # what is compared

    def _recipe(self) -> Any:
        """The recipe with the share of noise that is asked for."""
        found, noise = find_recipe(self.settings.recipe), self.settings.noise
        if noise is None:
            return found
        if not hasattr(found, "noise"):
            raise ValueError(f"recipe {found.name} knows no noise: leave out --noise")
        return dataclasses.replace(found, noise=noise)

    def _asked(self) -> list[Method]:
        """The methods by name; the base is called by the name of the recipe's optimizer."""
        own, = find_methods(own_optimizer(self.recipe))
        asked = [own if m.name == "base" else m for m in find_methods(self.settings.methods)]
        return list(dict.fromkeys(asked))

    def _usable(self, methods: list[Method]) -> list[Method]:
        """Leave out, with the reason in the record, what this model or recipe cannot be trained with."""
        torch.manual_seed(0)
        norms = any(is_normalization(m) for m in self.recipe.model().modules())
        self.left_out: dict[str, str] = {}
        for method in methods:
            if method.name == "sam_on" and not norms:
                self.left_out[method.name] = "the model has no normalization layers"
            if method.name == "esam" and not hasattr(self.recipe, "losses"):
                self.left_out[method.name] = "the recipe gives no loss of each sample (losses)"
            try:
                method.on(self.recipe)
            except ValueError as error:
                if self.settings.methods.strip() != "all":
                    raise
                self.left_out[method.name] = str(error)
        kept = [m for m in methods if m.name not in self.left_out]
        if not kept:
            raise ValueError("; ".join(f"{k}: {v}" for k, v in self.left_out.items()))
        return kept

    def _twice(self) -> dict[str, str]:
        """The plain optimizer with twice the steps that each sharpness-aware method is compared with."""
        trained = {m.name for m in self.references}
        found = {m.name: m.base(self.recipe).twice().name for m in self.methods if m.rhos}
        return {name: reference for name, reference in found.items() if reference in trained}

    def _parts(self) -> list[Any]:
        """The recipe trained without a part of its training data, once for each part that a radius is chosen on.

        Without such parts, where each radius is given, there is no run with held-out data.
        """
        if not hasattr(self.recipe, "holding_out"):
            return [self.recipe]
        try:
            return [self.recipe.holding_out(i) for i in range(getattr(self.recipe, "folds", 1))]
        except ValueError:
            if any(len(self._grid(m)) > 1 for m in self.methods):
                raise
            return []

    def _resumed(self, record: dict[str, Any]) -> dict[str, Any]:
        """An earlier record, where it is of the same data."""
        known = record["data"].get("fingerprint")
        if known not in (None, self._facts()["fingerprint"]):
            raise RunFolderError(f"the data of recipe {self.settings.recipe} are not those that {self.folder.path} "
                                 "began with: restore them, or start a new run with --out")
        return record

    def _facts(self) -> dict[str, Any]:
        if hasattr(self.recipe, "facts"):
            return self.recipe.facts(self.at)
        test = list(self.recipe.held_out("test", self.at))
        every = [leaf for batch in [*test, *self.recipe.held_out("measure", self.at)] for leaf in leaves(batch)]
        endless = {"epochs": None} if trainings.endless(self.recipe, self.at) else {}
        return endless | {
                "test": math.fsum(self.recipe.weight(b) for b in test),
                "units": getattr(self.recipe, "units", "samples"),
                "fingerprint": digest(*(t if isinstance(t, torch.Tensor) else str(t) for t in every))[:16]}

    def _new_record(self, metrics: dict[str, Any]) -> dict[str, Any]:
        recipe: Any = self.recipe
        steps, each = trainings.length(recipe, self.settings)
        asked = dataclasses.asdict(self.settings)
        fields: dict[str, Any] = getattr(recipe, "__dataclass_fields__", {})
        plain = {name: value for name in fields if name not in ("name", "part", *asked)
                 and isinstance(value := getattr(recipe, name), (int, float, str))}
        return {
            "kind": "compare", "status": "running",
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "settings": asked | plain | {
                "noise": getattr(self.recipe, "noise", None),
                "epochs": None if self.settings.steps or trainings.endless(self.recipe, self.at) else steps // each,
                "schedule": "cosine", "measured_rho": MEASURED_RHO},
            "versions": {"flatmin": __version__, "torch": torch.__version__, "python": platform.python_version(),
                         "platform": platform.platform(), "threads": self.settings.threads},
            "data": {"name": recipe.name} | self._facts(),
            "metrics": {k: {"higher_is_better": m.higher_is_better} for k, m in metrics.items()
                        if m.higher_is_better is not None},
            "base": own_optimizer(self.recipe), "twice": self._twice(),
            "left_out": self.left_out, "selection": {}, "held_out": {}, "runs": [],
        }

    # choosing the radius, on training data alone

    def _grid(self, method: Method) -> tuple[float, ...]:
        """The radii to choose from; a single one is not chosen."""
        if not method.grid(self.recipe):
            return ()
        return self.radii.get(method.name, self.radii.get("", method.grid(self.recipe)))

    def _choose(self, method: Method) -> None:
        grid = self._grid(method)
        if len(grid) < 2:
            return
        entry = self.record["selection"].setdefault(method.name, {
            "grid": list(grid), "scores": [], "stderr": [], "chosen": None, "criterion": self._criterion()})
        for rho in grid[len(entry["scores"]):]:
            self.progress.say(f"choosing ρ for {method.name}: {rho:g}")
            found = [self._held_out_score(method, rho, i) for i in range(len(self.parts))]
            entry["scores"].append(statistics.fmean(found))
            spread = len(found) > 1 and all(map(math.isfinite, found))
            entry["stderr"].append(statistics.stdev(found) / math.sqrt(len(found)) if spread else math.nan)
            self.folder.save_record(self.record)
        sign = 1 if self.maximized else -1
        best = max(range(len(grid)), key=lambda i: (sign * float(entry["scores"][i]), -grid[i]))
        entry["chosen"] = grid[best]
        runs = self.record["held_out"].get(method.name, [])
        self.record["held_out"][method.name] = [run for run in runs if run["rho"] == entry["chosen"]]

    def _criterion(self) -> str:
        if not hasattr(self.recipe, "holding_out"):
            return f"{self.metric} on the recipe's data for tuning"
        samples = getattr(self.recipe, "tuning_samples", None)
        some = f" {min(samples, self._facts()['train'])} examples of" if samples else ""
        noisy = ", noisy labels" if getattr(self.recipe, "noise", 0) else ""
        parts = f"{len(self.parts)} held-out parts" if len(self.parts) > 1 else "a held-out fifth"
        return f"mean {self.metric} over {parts} of{some} the training data{noisy}"

    def _held_out_score(self, method: Method, rho: float | None, part: int) -> float:
        """The first metric on a held-out part; the run on the first of them is kept for the diagnosis."""
        recipe = self.parts[part]
        run = trainings.training(recipe, method, rho, 500 + part, self.settings, tick=self._tick,
                                 splits=() if part else self._splits("tune"))
        try:
            model = run.run().model
            self._check_finite(run)
            score = trainings.metrics_of(recipe, model, "tune", run.at)[self.metric].value
        except Diverged:
            score = 0.0 if self.maximized else math.inf
        if part == 0:
            history = self._history(run, method)
            others = [r for r in self.record["held_out"].get(method.name, []) if r["rho"] != rho]
            self.record["held_out"][method.name] = [*others, {"rho": rho, "history": history}]
        return score

    def _hold_out(self, method: Method) -> None:
        """One run with a held-out part, where the choice of the radius has not left one."""
        if self.parts and not self.record["held_out"].get(method.name):
            self.progress.say(f"diagnosis of {method.name}")
            self._held_out_score(method, self._rho(method), 0)
            self.folder.save_record(self.record)

    def _rho(self, method: Method) -> float | None:
        grid = self._grid(method)
        if not grid:
            return None
        return grid[0] if len(grid) == 1 else self.record["selection"][method.name]["chosen"]

    # training and measuring

    def _tick(self, done: int) -> None:
        self.progress.step()

    def _splits(self, split: str) -> tuple[str, ...]:
        return (split, "train") if "train" in getattr(self.recipe, "splits", ()) else (split,)

    def _history(self, run: Training, method: Method) -> dict[str, Any]:
        _, each = trainings.length(run.recipe, self.settings)
        return history_of(run.trained, self.metric, each, not method.rhos)

    def _check_finite(self, run: Training) -> None:
        """Raise Diverged where a loss or a weight that was not recorded is not finite."""
        losses = [row["train_loss"] for row in run.trained.evaluations]
        if not all(map(math.isfinite, losses)) or not all(bool(p.isfinite().all()) for p in run.model.parameters()):
            raise Diverged(f"{run.settings.method}, seed {run.at.seed}: the loss or the weights are not finite; lower "
                           "the learning rate" + (" or rho" if run.settings.rho else ""))

    def _train_and_measure(self, method: Method, seed: int) -> None:
        if any(r["method"] == method.name and r["seed"] == seed for r in self.record["runs"]):
            return
        key = f"{method.name}-seed{seed}"
        self.progress.say(key)
        rho = self._rho(method)
        training = trainings.training(self.recipe, method, rho, seed, self.settings, splits=self._splits("test"),
                                      folder=self._folder(key), tick=self._tick)
        run: dict[str, Any] = {"method": method.name, "seed": seed, "rho": rho}
        try:
            training.run()
            self._check_finite(training)
            run |= {"history": self._history(training, method)} | self._measure(training.model)
            self.folder.save_weights(key, training.model)
        except Diverged as error:  # a result like any other: the other runs are still done
            run |= {"history": self._history(training, method), "diverged": str(error),
                    "test": dict.fromkeys(self.record["metrics"], math.nan)}
            shutil.rmtree(self._folder(key), ignore_errors=True)
        self.record["runs"].append(run)
        self.folder.save_record(self.record)

    def _folder(self, key: str) -> Path:
        return self.folder.path / "checkpoints" / key

    def _measure(self, model: nn.Module) -> dict[str, Any]:
        objective = trainings.objective_of(self.recipe, model, self.at)
        n = round(math.fsum(self.recipe.weight(batch) for batch in objective.data))
        step = one_step(objective, rho=MEASURED_RHO)
        spectrum = eigenpairs(Hessian(objective), k=1, tol=1e-3)
        found = trainings.metrics_of(self.recipe, model, "test", self.at)
        errors = {name: m.stderr for name, m in found.items() if math.isfinite(m.stderr)}
        return {
            "test": {name: m.value for name, m in found.items()} | {"stderr": errors},
            "sharpness": {"rho": MEASURED_RHO, "value": step.value, "first_order": step.first_order,
                          "second_order": step.second_order, "remainder": step.remainder, "samples": n},
            "hessian": {"eigenvalue": spectrum.largest, "residual": float(spectrum.residuals[-1]),
                        "converged": bool(spectrum.converged[-1]), "matvecs": spectrum.matvecs, "samples": n},
            "line": landscape.profile(objective),
        }

    def _summarize(self) -> None:
        runs = self.record["runs"]
        self.record["summary"] = summary(runs, tuple(self.record["metrics"]))
        self.record["differences"] = against_references(runs, self.metric, self.record["base"],
                                                        self.record["twice"])

    def _plane(self) -> dict[str, Any]:
        """The plane through solutions of the first seed: of the first method and the two best others."""
        self.progress.say("landscape")
        found = summary(self.record["runs"], (self.metric,))
        names = [m.name for m in self.methods]
        kept = [r["method"] for r in self.record["runs"]
                if r["seed"] == 0 and "diverged" not in r and r["method"] in names]
        sign = -1 if self.maximized else 1
        kept = kept[:1] + sorted(kept[1:], key=lambda m: sign * found[m][self.metric]["mean"])[:2]
        states = {m: self.folder.load_weights(f"{m}-seed0") for m in kept}
        return landscape.plane(self.recipe, self.at, states, self.folder.path / "checkpoints") if kept else {}

    # steps and time

    def _trainings(self, before: bool) -> dict[str, Training]:
        """A new run of every method, for its time; before a radius is chosen with the smallest one."""
        return {m.name: trainings.training(self.recipe, m, min(self._grid(m), default=None) if before else self._rho(m),
                                           0, self.settings, log_every=sys.maxsize) for m in self.methods}

    def _steps(self) -> dict[str, int]:
        """Training steps that are left, by method; those of twice the steps are the base's."""
        full, _ = trainings.length(self.recipe, self.settings)
        part, _ = trainings.length(self.parts[0], self.settings) if self.parts else (0, 0)
        out = dict.fromkeys([m.name for m in self.methods], 0)
        for method in [*self.methods, *self.references]:
            name = method.name if method.factor == 1 else next(iter(out))
            grid = self._grid(method)
            tried = len(self.record["selection"].get(method.name, {}).get("scores", []))
            done = sum(r["method"] == method.name for r in self.record["runs"])
            out[name] += method.factor * full * (self.settings.seeds - done)
            out[name] += (len(grid) - tried) * len(self.parts) * part if len(grid) > 1 else 0
            if method.factor == 1 and len(grid) < 2 and not self.record["held_out"].get(method.name):
                out[name] += part
        return out


def summary(runs: list[dict[str, Any]], metrics: tuple[str, ...] = ("accuracy", "nll", "ece")) -> dict[str, Any]:
    """Mean, standard deviation and number over the seeds where a quantity is finite, by method and quantity."""
    quantities = {name: ("test", name) for name in metrics} | _MEASURED
    out: dict[str, Any] = {}
    for name in dict.fromkeys(r["method"] for r in runs):
        mine = [r for r in runs if r["method"] == name]
        out[name] = {key: _mean_and_sd([float(r.get(part, {}).get(field, "nan")) for r in mine])
                     for key, (part, field) in quantities.items()}
    return out


_MEASURED = {"sharpness": ("sharpness", "value")} | {k: ("sharpness", k) for k in ("first_order", "second_order")} | {
    k: ("hessian", k) for k in ("eigenvalue", "residual")}


def _mean_and_sd(values: list[float]) -> dict[str, Any]:
    v = [x for x in values if math.isfinite(x)]
    return {"mean": statistics.fmean(v) if v else math.nan, "sd": statistics.stdev(v) if len(v) > 1 else math.nan,
            "n": len(v)}
