"""``flatmin measure``: what is known about the sharpness of one model at one checkpoint, each number with its error.

The model and its loss come from the user's own code as an :class:`flatmin.Objective`, or are a language model of the
``transformers`` library on a text; weights may come from a file. Each measure is written to the record as soon as it is
there, so that an interrupted run resumes where it stopped. Under ``torchrun`` the processes share the data, and the
first of them writes.
"""

from __future__ import annotations

import copy
import dataclasses
import datetime
import functools
import json
import math
import platform
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import __version__
from ..errors import RunFolderError
from ..files import digest
from ..landscape import line
from ..linalg.checkpoint import matvecs_in
from ..measures import METRICS as OFFERED
from ..measures import Options, find_metrics
from ..objective import Objective
from ..parallel import unwrapped
from ..progress import Display
from ..results import plain
from ..sharpness import compare
from ..sharpness.sharpness_warnings import samples_in
from ..tensorscope import objective_for
from ..training.folder import RunFolder
from ..training.launch import place
from ..training.protocol import Place
from ..training.settings import TrainSettings
from ..training.user_code import load_object, said
from ..training.weights import load_checkpoint
from .language_objective import PREFIX, TextSettings, language_objective
from .measure_cost import faster_threads, plan
from .measure_data import changed, moved, over_processes, share_of
from .measures import MEASURES
from .settings import MeasureSettings

EIGENVECTORS = "eigenvectors.safetensors"


class Measurement:
    """One measurement, kept in a folder; :meth:`run` takes the measures that the record does not hold yet."""

    def __init__(self, settings: MeasureSettings, folder: RunFolder, record: dict[str, Any] | None = None,
                 quiet: bool = False):
        self.settings, self.folder, self.quiet = settings, folder, quiet
        self.metrics = find_metrics(settings.metrics) + ["comparison"] * (settings.against is not None)
        with ExitStack() as stack:
            threads = settings.threads if record is None else record.get("versions", {}).get("threads")
            at = stack.enter_context(place(TrainSettings(seed=settings.seed, device=settings.device, threads=threads)))
            self.group = at.group
            self.objective, self.facts = self._found(at.device)
            self.other = None if settings.against is None else _with_weights(self.objective, settings.against)
            self._evaluate_once()
            if threads is None:
                torch.set_num_threads(self.group.gather(faster_threads(self.objective))[0])
            new = self._new_record()
            self.record = new if record is None else self._resumed(record, new)
            self._place = stack.pop_all()       # left at the end of run() or plan()

    def _found(self, device: torch.device) -> tuple[Objective, dict[str, Any]]:
        """The objective of this process on its share of the data, and what is recorded of the data."""
        own, error = None, None
        try:
            own = self._own(device)
        except (ValueError, FileNotFoundError) as raised:
            error = raised
        for rank, other in enumerate(self.group.gather(error and str(error))):
            if other and error is None:
                raise ValueError(f"process {rank}: {other}")
        if own is None:
            raise error or AssertionError
        objective, processes = over_processes(own[0], self.group)
        return objective, own[1] | processes

    def _own(self, device: torch.device) -> tuple[Objective, dict[str, Any]]:
        """What this process alone finds."""
        settings = self.settings
        if settings.of_transformers:
            assert settings.text is not None
            found = language_objective(settings.objective, TextSettings(
                settings.text, settings.context, settings.batch_size, settings.tokens, settings.dtype, settings.seed),
                device)
            objective, facts = found.objective, found.facts
        else:
            objective, facts = find_objective(settings.objective, settings.seed), {}
            if settings.device != "auto" or self.group.size > 1:
                objective = moved(objective, device)
        if settings.checkpoint is not None:
            load_checkpoint(objective.model, settings.checkpoint)
        if settings.mode is not None:
            objective = changed(objective, mode=settings.mode)
        objective, share = share_of(objective, settings.share, settings.seed)
        return objective, facts | share

    def run(self) -> dict[str, Any]:
        """Measure what is left; the record is saved after every measure, also when interrupted.

        A measure that cannot be taken of this model is recorded under ``failed`` with the reason; the others are taken.
        """
        with self._place:
            return self._run()

    def plan(self) -> str:
        """The predicted time and memory of each measure, as text; nothing is written."""
        with self._place:
            return plan(self.objective, self.metrics, self.settings.k, self.settings.product)

    def _run(self) -> dict[str, Any]:
        record = self.record
        left = [m for m in self.metrics if m not in record["results"]]
        record["status"], record["failed"] = "running", {}
        self._save()
        try:
            for i, name in enumerate(left):
                self._take(name, f"{len(self.metrics) - len(left) + i + 1}/{len(self.metrics)} {name}")
                self._save()
                if record["failed"] and self.group.size > 1:
                    break       # the other processes may wait for this one in the middle of the measure
            record["status"] = "failed" if record["failed"] else "complete"
        except BaseException:
            record["status"] = "interrupted"
            raise
        finally:
            self._save()
        return record

    def _save(self) -> None:
        if self.group.rank == 0:
            self.folder.save_record(self.record)

    @property
    def failure(self) -> str:
        """What a finished run did not reach, in one line; empty where nothing failed."""
        failed = self.record["failed"]
        if failed and self.group.size > 1:
            return "; ".join(f"{name} cannot be measured by {self.group.size} processes: {why}"
                             for name, why in failed.items())
        return "not measured: " + ", ".join(failed) if failed else ""

    def _take(self, name: str, title: str) -> None:
        record, start = self.record, time.monotonic()
        self.show = Display(title, quiet=self.quiet or self.group.rank > 0, resumed=self._matvecs_before(name))
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

    def _matvecs_before(self, name: str) -> int:
        """Those that an earlier session has done of a measure."""
        there = any((self.folder.path / "checkpoints").glob(f"{name}-*.pt"))
        return matvecs_in(self.file(name)) if there else 0

    def save_eigenvectors(self, found: Any) -> None:
        """Unit eigenvectors, (k, *shape) for each parameter by its name; rows in the order of the eigenvalues."""
        w, rows = self.objective.parameters, found.eigenvectors
        names = {id(p): n for n, p in unwrapped(self.objective.model).named_parameters()}
        parts = rows.split([p.numel() for p in w], dim=1)
        if self.group.rank == 0:
            self.folder.save_tensors(EIGENVECTORS, {
                names[id(p)]: part.reshape(len(rows), *p.shape) for p, part in zip(w, parts, strict=True)},
                {"eigenvalues": json.dumps(found.eigenvalues.tolist())})

    def file(self, name: str) -> str:
        """The file in which a long measure of these weights keeps its state."""
        state = self.objective.model.state_dict()
        weights = digest(*(part for name, t in state.items() if isinstance(t, torch.Tensor) for part in (name, t)))
        return str(self.folder.path / "checkpoints" / f"{name}-{weights[:16]}.pt")

    def _evaluate_once(self) -> None:
        """Raise a ValueError that says why the loss cannot be measured, if it cannot."""
        objective = self.objective
        if not objective.parameters:
            raise ValueError(f"the model of {self.settings.objective} has no parameter that requires a gradient")
        try:
            objective.check()
            self.loss = float(objective.value())
            self.samples = [samples_in(batch) for batch in objective.data]
        except ValueError:
            raise
        except Exception as error:  # the user's own model and loss may raise anything
            raise ValueError(f"the loss of {self.settings.objective} cannot be evaluated: {said(error)}") from error
        if not math.isfinite(self.loss):
            raise ValueError(f"the loss of {self.settings.objective} is {self.loss}: there is nothing to measure")

    def _new_record(self) -> dict[str, Any]:
        objective, model = self.objective, unwrapped(self.objective.model)
        batches, samples = map(int, self.group.total(len(self.samples), sum(self.samples)))
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
                      "weights": self.settings.checkpoint or _own_weights(self.settings),
                      **({} if self.other is None else {"against_norm": _norm(self.other)})},
            "data": {"name": self.settings.objective, "batches": batches, "samples": samples, "loss": self.loss,
                     "mode": objective.mode, "loss_function": _loss_name(objective.loss_fn), **self.facts},
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
    found = measure(job.objective, Options(rho=rho, k=settings.k, tol=settings.tol, rtol=settings.rtol,
                                           product=settings.product, seed=settings.seed, progress=job.show,
                                           checkpoint=file))
    if name == "spectrum" and settings.eigenvectors:
        job.save_eigenvectors(found)
        return plain(found) | {"eigenvectors": EIGENVECTORS}
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
    other = changed(objective, model=copy.deepcopy(objective.model))
    load_checkpoint(unwrapped(other.model), path)
    return other


def _own_weights(settings: MeasureSettings) -> str:
    source = settings.objective
    return source.removeprefix(PREFIX) if settings.of_transformers else f"as {source} returns them"


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
