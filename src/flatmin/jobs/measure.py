"""``flatmin measure``: what is known about the sharpness of one model at one checkpoint, each number with its error.

The model and its loss come from the user's own code as an :class:`flatmin.Objective`; weights may come from a file.
Each measure is written to the record as soon as it is there, so that an interrupted run resumes where it stopped.
"""

from __future__ import annotations

import copy
import dataclasses
import datetime
import functools
import math
import platform
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import __version__
from ..errors import RunFolderError
from ..files import digest
from ..landscape import line
from ..measures import METRICS as OFFERED
from ..measures import Options, find_metrics
from ..objective import Objective
from ..progress import Display
from ..results import plain
from ..sharpness import compare
from ..sharpness.sharpness_warnings import samples_in
from ..tensorscope import objective_for
from ..training.folder import RunFolder
from ..training.protocol import Place
from ..training.user_code import load_object, said
from ..training.weights import load_checkpoint
from .measures import MEASURES
from .settings import MeasureSettings


class Measurement:
    """One measurement, kept in a folder; :meth:`run` takes the measures that the record does not hold yet."""

    def __init__(self, settings: MeasureSettings, folder: RunFolder, record: dict[str, Any] | None = None,
                 quiet: bool = False):
        self.settings, self.folder, self.quiet = settings, folder, quiet
        self.metrics = find_metrics(settings.metrics)
        self.objective = find_objective(settings.objective, settings.seed)
        if settings.checkpoint is not None:
            load_checkpoint(self.objective.model, settings.checkpoint)
        self.other = None if settings.against is None else _with_weights(self.objective, settings.against)
        self.metrics += [] if self.other is None else ["comparison"]
        new = self._new_record()
        self.record = new if record is None else self._resumed(record, new)

    def run(self) -> dict[str, Any]:
        """Measure what is left; the record is saved after every measure, also when interrupted.

        A measure that cannot be taken of this model is recorded under ``failed`` with the reason; the others are taken.
        """
        record = self.record
        left = [m for m in self.metrics if m not in record["results"]]
        record["status"], record["failed"] = "running", {}
        self.folder.save_record(record)
        try:
            for i, name in enumerate(left):
                self._take(name, f"{len(self.metrics) - len(left) + i + 1}/{len(self.metrics)} {name}")
                self.folder.save_record(record)
            record["status"] = "failed" if record["failed"] else "complete"
        except BaseException:
            record["status"] = "interrupted"
            raise
        finally:
            self.folder.save_record(record)
        return record

    @property
    def failure(self) -> str:
        """What a finished run did not reach, in one line; empty where nothing failed."""
        return "not measured: " + ", ".join(self.record["failed"]) if self.record["failed"] else ""

    def _take(self, name: str, title: str) -> None:
        record, start = self.record, time.monotonic()
        self.show = Display(title, quiet=self.quiet)
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                result = (METRICS | {"comparison": _comparison})[name](self)
        except KeyboardInterrupt:
            self.show.end("interrupted")
            raise
        except (MemoryError, RuntimeError, ValueError, TypeError, NotImplementedError, ArithmeticError) as error:
            if isinstance(error, RunFolderError):
                raise
            record["failed"][name] = said(error)
            self.show.end(f"failed: {said(error)}")
            return
        record["results"][name] = plain(result)
        for file in (self.folder.path / "checkpoints").glob(f"{name}-*.pt"):
            file.unlink(missing_ok=True)
        record["timing"][name] = time.monotonic() - start
        found = {(w.category.__name__, str(w.message)): None for w in caught
                 if not issubclass(w.category, (DeprecationWarning, PendingDeprecationWarning, FutureWarning))}
        record["warnings"][name] = [{"kind": kind, "text": text} for kind, text in found]
        self.show.end(f"{record['timing'][name]:.1f} s" + (f", {len(found)} warning{'s' * (len(found) > 1)}" if found
                                                           else ""))

    def file(self, name: str) -> str:
        """The file in which a long measure of these weights keeps its state."""
        state = self.objective.model.state_dict()
        weights = digest(*(part for name, t in state.items() if isinstance(t, torch.Tensor) for part in (name, t)))
        return str(self.folder.path / "checkpoints" / f"{name}-{weights[:16]}.pt")

    def _new_record(self) -> dict[str, Any]:
        objective, model = self.objective, self.objective.model
        if not objective.parameters:
            raise ValueError(f"the model of {self.settings.objective} has no parameter that requires a gradient")
        try:
            objective.check()
            loss = float(objective.value())
            samples = [samples_in(batch) for batch in objective.data]
        except ValueError:
            raise
        except Exception as error:  # the user's own model and loss may raise anything
            raise ValueError(f"the loss of {self.settings.objective} cannot be evaluated: {said(error)}") from error
        if not math.isfinite(loss):
            raise ValueError(f"the loss of {self.settings.objective} is {loss}: there is nothing to measure")
        return {
            "kind": "measure", "status": "running",
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "settings": dataclasses.asdict(self.settings),
            "versions": {"flatmin": __version__, "torch": torch.__version__, "python": platform.python_version(),
                         "platform": platform.platform(), "threads": torch.get_num_threads()},
            "model": {"name": type(model).__name__, "parameters": sum(p.numel() for p in objective.parameters),
                      "frozen": sum(p.numel() for p in model.parameters() if not p.requires_grad),
                      "dtype": ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in objective.parameters})),
                      "device": str(objective.device), "norm": _norm(objective),
                      "weights": self.settings.checkpoint or f"as {self.settings.objective} returns them",
                      **({} if self.other is None else {"against_norm": _norm(self.other)})},
            "data": {"name": self.settings.objective, "batches": len(samples), "samples": sum(samples), "loss": loss,
                     "mode": objective.mode, "loss_function": _loss_name(objective.loss_fn)},
            "results": {}, "timing": {}, "warnings": {}, "failed": {},
        }

    def _resumed(self, record: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
        """An earlier record, where it is of the same weights, data and loss."""
        old, new = record["model"], now["model"]  # norms: a user's own training may differ in rounding
        norms = ("norm", "against_norm") if "against_norm" in new else ("norm",)
        if old.get("parameters") != new["parameters"] or not all(_close(old.get(k), new[k]) for k in norms):
            raise RunFolderError(f"the weights are not those that {self.folder.path} began with: restore them, or "
                                 "start a new run with --out")
        a, b = record["data"], now["data"]
        if a.get("samples") != b["samples"] or not _close(a.get("loss"), b["loss"]):
            raise RunFolderError(f"the data or the loss are not those that {self.folder.path} began with (loss "
                                 f"{a.get('loss')} then, {b['loss']} now): restore them, or start a new run with "
                                 "--out")
        return record


def _take(name: str, job: Measurement) -> Any:
    """One measure with the settings of the run, as it goes into the record."""
    measure, settings = MEASURES[name], job.settings
    # a radius of each coordinate: perturbations then have the length rho in the root mean square
    rho = settings.rho / (math.sqrt(job.record["model"]["parameters"]) if measure.radius == "coordinate" else 1)
    file = job.file(name) if measure.resumable else None
    found = measure(job.objective, Options(rho=rho, k=settings.k, tol=settings.tol, seed=settings.seed,
                                           progress=job.show, checkpoint=file))
    return _RECORDED[name](found) if name in _RECORDED else found


def _density(found: Any) -> dict[str, Any]:
    x, density, error = found.density()
    return plain(found) | {"x": x, "density": density, "density_stderr": error, "nodes": found.nodes,
                           "weights": found.weights}


def _surface(found: Any) -> dict[str, Any]:
    return plain(found) | {"names": found.plane.names, "units": found.units}


_RECORDED: dict[str, Callable[[Any], dict[str, Any]]] = {"density": _density, "surface": _surface}


def _comparison(job: Measurement) -> Any:
    """Both models side by side, and the loss on the straight line from one to the other."""
    assert job.other is not None and job.settings.against is not None
    own = job.settings.checkpoint
    names = (Path(own).name if own else f"{job.settings.objective} as returned"), Path(job.settings.against).name
    names = names if names[0] != names[1] else (str(job.settings.checkpoint), job.settings.against)
    compared = compare(job.objective, job.other, job.settings.rho, names=names, seed=job.settings.seed)
    found: dict[str, Any] = plain(compared)
    if own is None:
        found["sentence"] += (f" The first weights are those that {job.settings.objective} returns, since no "
                              "--checkpoint was given.")
    if all(map(torch.equal, job.objective.parameters, job.other.parameters)):
        return found
    path = line(job.objective, models=[job.objective.model, job.other.model], steps=31, margin=0.25)
    return found | {"path": {"x": path.x.tolist(), "values": plain(path.values), "models": plain(path.models)}}


METRICS: dict[str, Callable[[Measurement], Any]] = {name: functools.partial(_take, name) for name in OFFERED}


def find_objective(name: str, seed: int = 0) -> Objective:
    """``module:attribute`` from the user's own code as an objective.

    The attribute is a :class:`flatmin.Objective`, a :class:`flatmin.recipes.Recipe` (its new model, on the training
    examples that ``compare`` measures on), or a function without arguments that returns one of them, ``(model, data)``
    or ``(model, data, loss_fn)``: there, batches are ``(inputs, targets)`` or mappings as in the ``transformers``
    library, whose labels default to the inputs, and the loss to what their kind asks for. Torch is seeded before the
    import and before the call, so that a resumed run finds the same weights.

    Raises:
        ValueError: no such module or attribute, something else, or the user's code raised.
    """
    value = load_object(name, seed)
    if hasattr(value, "held_out"):
        torch.manual_seed(seed)
        value = Objective(value.model(), value.loss, list(value.held_out("measure", Place(seed))),
                          forward=value.forward, weight=value.weight)
    if isinstance(value, tuple) and len(value) in (2, 3) and isinstance(value[0], nn.Module):
        value = objective_for(*value)
    if not isinstance(value, Objective):
        raise ValueError(f"{name!r} is not a flatmin.Objective or Recipe, nor a function that returns one, (model, "
                         f"data) or (model, data, loss_fn) (found {type(value).__name__})")
    return value


def _with_weights(objective: Objective, path: str) -> Objective:
    """The same objective of a copy of its model that holds the weights of a file."""
    other = copy.copy(objective)
    other.model, other.product_checks = copy.deepcopy(objective.model), {}
    load_checkpoint(other.model, path)
    return other


def _loss_name(function: Any) -> str:
    """What the loss is called, as far as it has a name."""
    if function is None:
        return "the model's own"
    while isinstance(function, functools.partial):
        function = function.func
    name = type(function).__name__ if isinstance(function, nn.Module) else getattr(function, "__name__", None)
    return "a function without a name" if name == "<lambda>" else name or type(function).__name__


def _norm(objective: Objective) -> float:
    return math.sqrt(math.fsum(float(p.detach().double().square().sum()) for p in objective.parameters))


def _close(a: Any, b: float) -> bool:
    return isinstance(a, (int, float)) and math.isclose(a, b, rel_tol=1e-3, abs_tol=1e-9)
