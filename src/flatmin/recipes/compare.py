"""``flatmin compare``: methods side by side on one recipe; everything else equal.

For each method with a radius: choose ρ on held-out parts of the *training* data. For each seed: train on all of it,
then look at the clean test data once and measure sharpness and curvature on training examples.
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
from ..ascent.rows import is_normalization
from ..curvature import Hessian, eigenpairs
from ..errors import RunFolderError
from ..objective import Objective
from ..sharpness import diagnose, one_step
from . import landscape, timing
from .folder import RunFolder
from .loop import Diverged, Plan, accuracy, train
from .methods import Method, find_methods
from .metrics import classification, logits_of, standard_errors
from .progress import Progress, clock
from .recipe import Data, Recipe, find_recipe
from .settings import CompareSettings, fixed_radii

MEASURED_RHO = 0.05
"""The radius at which one-step sharpness is measured, the same for every method."""


class Comparison:
    """One run of the job over a folder; :meth:`run` continues whatever the record already holds."""

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
        self.record = self._new_record() if record is None else self._taken_up(record)

    def run(self) -> dict[str, Any]:
        """Do what is left; the record is saved after every piece of work, also when interrupted."""
        steps = self._steps()
        self.progress = Progress(sum(steps.values()), self.quiet)
        try:
            self.record["status"] = "running"
            self.folder.save_record(self.record)
            if not self.quiet and any(steps.values()):
                left = timing.foretold(self.recipe, self.data, self.methods, steps)
                self.progress.announce(f"{sum(steps.values())} training steps, about {clock(left)} on this machine")
            for method in self.methods:
                self._choose(method)
            for seed in range(self.settings.seeds):
                for method in self.methods:
                    self._train_and_measure(method, seed)
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
            self.progress.close()
            self.folder.save_record(self.record)
        return self.record

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

    def _taken_up(self, record: dict[str, Any]) -> dict[str, Any]:
        known = record["data"].get("fingerprint")
        if known not in (None, self.data.fingerprint()):
            raise RunFolderError(f"the data of recipe {self.settings.recipe} are not those that {self.folder.path} "
                                 "began with: bring them back, or start a new run with --out")
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
                     "held_out": len(held), "fingerprint": self.data.fingerprint()},
            "left_out": self.left_out, "selection": {}, "runs": [],
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
            found = [self._held_out_score(method, rho, i, *fold) for i, fold in enumerate(self._folds())]
            entry["scores"].append(statistics.fmean(found))
            entry["stderr"].append(statistics.stdev(found) / math.sqrt(len(found)) if len(found) > 1 else math.nan)
            self.folder.save_record(self.record)
        best = max(range(len(grid)), key=lambda i: (entry["scores"][i], -grid[i]))
        entry["chosen"] = grid[best]

    def _criterion(self) -> str:
        kept, held = self._folds()[0]
        some = f" {len(kept) + len(held)} examples of" if self.recipe.tuning_samples else ""
        noisy = ", noisy labels" if self.noise else ""
        parts = f"{self.recipe.folds} held-out parts" if self.recipe.folds > 1 else "a held-out fifth"
        return f"mean accuracy over {parts} of{some} the training data{noisy}"

    def _held_out_score(self, method: Method, rho: float, fold: int, kept: Tensor, held: Tensor) -> float:
        x, y = self.data.train_inputs, self.data.train_targets
        plan = Plan(f"choose-{method.name}-{rho}-{fold}", self.recipe, method, rho, 500 + fold, self.epochs, x[kept],
                    y[kept])
        try:
            model, _ = train(plan, self.progress.tick)
        except Diverged:
            return 0.0
        return accuracy(model, x[held], y[held])

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
            model, run["history"] = train(plan, self.progress.tick, self.folder, state)
            run |= self._measure(model)
            base = self._base_steps(method, seed)
            run["findings"] = [f.to_dict() for f in diagnose(steps_of(run), base=base, rho=rho)]
            self.folder.save_weights(key, model)
        except Diverged as error:  # a result like any other: the comparison goes on
            run |= {"diverged": str(error), "test": dict.fromkeys(("accuracy", "nll", "ece"), math.nan)}
        self.record["runs"].append(run)
        self.folder.save_record(self.record)
        self.folder.keep_state(key)

    def _base_steps(self, method: Method, seed: int) -> list[dict[str, Any]] | None:
        """The record of the plain base optimizer's run from the same seed, if it is part of the comparison."""
        plain = [r for r in self.record["runs"]
                 if r["method"] == method.base and r["seed"] == seed and "history" in r]
        return steps_of(plain[0]) if plain and method.name != method.base else None

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
        return out


def steps_of(run: dict[str, Any]) -> list[dict[str, Any]]:
    """What the diagnosis reads: one step an epoch, with the accuracies after it."""
    history = run["history"]
    rows = zip(history["steps"], history["test_accuracy"], history["train_accuracy"], strict=True)
    return [step | {"accuracy": test, "train_accuracy": train} for step, test, train in rows]


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
