"""``flatmin measure``: what is known about the sharpness of one model at one checkpoint, each number with its error.

The model and its loss come from the user's own code as an :class:`flatmin.Objective`; weights may come from a file.
Each measure is written to the record as soon as it is there, so that an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import copy
import dataclasses
import datetime
import functools
import hashlib
import math
import platform
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import __version__
from ..errors import RunFolderError
from ..landscape import line, models
from ..measures import DEFAULT_METRICS, Options, find_metrics
from ..measures import METRICS as OFFERED
from ..objective import Objective
from ..results import plain
from ..sharpness import compare
from ..sharpness.cautions import samples_in
from ..tensorscope import objective_for
from ..training.folder import RunFolder
from ..training.recipe import Recipe
from ..training.user_code import said, users_own
from .measures import MEASURES


@dataclass(frozen=True)
class MeasureSettings:
    """What to measure of which objective.

    Args:
        objective: ``module:attribute``, an objective or what makes one (see :func:`find_objective`).
        checkpoint: a file of weights for its model.
        metrics: names from ``METRICS`` with commas between, or "all".
        k: how many of the largest eigenvalues.
        rho: the radius of the sharpness measures.
        tol: residual of the eigenvalues, relative to the largest.
        seed: of random starts, probes and directions, and of torch before the user's code is called.
        against: a file of other weights, to be compared with on the same data.
    """

    objective: str
    checkpoint: str | None = None
    metrics: str = DEFAULT_METRICS
    k: int = 5
    rho: float = 0.05
    tol: float = 1e-3
    seed: int = 0
    against: str | None = None

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value, kind = getattr(self, f.name), _KINDS[f.name]
            if not isinstance(value, kind) or isinstance(value, bool):
                raise ValueError(f"{f.name} cannot be {value!r}")
        find_metrics(self.metrics)
        if self.k < 1:
            raise ValueError(f"--k must be at least 1, got {self.k}")
        if self.seed < 0:
            raise ValueError(f"--seed must not be negative, got {self.seed}")
        for name in ("rho", "tol"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"--{name} must be positive, got {getattr(self, name)}")


_KINDS: dict[str, Any] = {"objective": str, "checkpoint": (str, type(None)), "metrics": str, "k": int,
                          "rho": (int, float), "tol": (int, float), "seed": int, "against": (str, type(None))}


class Measurement:
    """One run of the job over a folder; :meth:`run` does what the record does not hold yet."""

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
        self.record = new if record is None else self._taken_up(record, new)

    def run(self) -> dict[str, Any]:
        """Measure what is left; the record is saved after every measure, also when interrupted.

        A measure that cannot be taken of this model is recorded under ``failed`` with the reason; the others go on.
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

    def _take(self, name: str, title: str) -> None:
        record, start = self.record, time.monotonic()
        self.show = _Line(title, self.quiet)
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
        """Where a long measure of these very weights keeps its state."""
        return str(self.folder.path / "checkpoints" / f"{name}-{_fingerprint(self.objective.model)}.pt")

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

    def _taken_up(self, record: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
        old, new = record["model"], now["model"]  # norms: a user's own training may differ in rounding
        norms = ("norm", "against_norm") if "against_norm" in new else ("norm",)
        if old.get("parameters") != new["parameters"] or not all(_close(old.get(k), new[k]) for k in norms):
            raise RunFolderError(f"the weights are not those that {self.folder.path} began with: bring them back, or "
                                 "start a new run with --out")
        a, b = record["data"], now["data"]
        if a.get("samples") != b["samples"] or not _close(a.get("loss"), b["loss"]):
            raise RunFolderError(f"the data or the loss are not those that {self.folder.path} began with (loss "
                                 f"{a.get('loss')} then, {b['loss']} now): bring them back, or start a new run with "
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
    import and before the call, so that the same weights come back when a run is resumed.

    Raises:
        ValueError: no such module or attribute, something else, or the user's code raised.
    """
    value = users_own(name, seed)
    if isinstance(value, Recipe):
        torch.manual_seed(seed)
        data, n = value.load(None).with_noise(value.noise), value.curvature_samples
        value = Objective(value.model(), value.loss, [(data.train_inputs[:n], data.train_targets[:n])])
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


def load_checkpoint(model: nn.Module, path: str | Path) -> None:
    """Weights and buffers from a ``.safetensors`` file or a torch file of tensors; all of them fit, or none is set.

    ``{"model": ...}`` and ``{"state_dict": ...}`` are looked into, a prefix that all names share (a wrapper's, or
    Lightning's ``model.``) is taken off where the names fit only without it, and weights tied to one that is there may
    be missing. Nothing but tensors and plain values is unpickled.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it cannot be read, or names or shapes do not fit; the first of them are listed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of pickle, zip files, safetensors
        raise ValueError(f"cannot read the checkpoint {path} ({type(error).__name__}): it must hold a state_dict of "
                         "tensors, as .safetensors or by torch.save(model.state_dict(), ...), not a whole model"
                         ) from error
    state = models.fitting(models._inner(state), model.state_dict()) if isinstance(state, Mapping) else state
    if not isinstance(state, dict) or not any(isinstance(v, torch.Tensor) for v in state.values()):
        raise ValueError(f"the checkpoint {path} holds no state_dict, it holds {_held(state)}")
    own = model.state_dict()
    own = {name: t for name, t in own.items() if isinstance(t, torch.Tensor)}
    there = {t.data_ptr() for name, t in own.items() if name in state and t.numel()}
    missing = [name for name, t in own.items() if name not in state and t.data_ptr() not in there]
    unexpected = [name for name in state if name not in own and not str(name).endswith("_extra_state")]
    shapes = [f"{name} {tuple(state[name].shape)} instead of {tuple(t.shape)}" for name, t in own.items()
              if name in state and isinstance(state[name], torch.Tensor) and state[name].shape != t.shape]
    wrong = [f"{what} {_first(names)}" for what, names in
             (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes)) if names]
    if wrong:
        raise ValueError(f"the checkpoint {path} does not fit the model {type(model).__name__}: {'; '.join(wrong)}")
    broken = [name for name, t in own.items() if name in state and t.is_floating_point()
              and bool(state[name].isnan().any())]
    if broken:
        raise ValueError(f"the checkpoint {path} holds NaN in {_first(broken)}")
    model.load_state_dict(state, strict=False)


def _first(names: list[str], most: int = 3) -> str:
    rest = len(names) - most
    return ", ".join(map(str, names[:most])) + (f" and {rest} more" if rest > 0 else "")


def _held(state: Any) -> str:
    return f"{_first(list(state), 5) or 'nothing'}" if isinstance(state, Mapping) else f"a {type(state).__name__}"


def _fingerprint(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, t in model.state_dict().items():
        if isinstance(t, torch.Tensor):
            digest.update(f"{name} {tuple(t.shape)} {t.dtype}".encode())
            digest.update(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


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


class _Line:
    """The progress of one measure: a line that is written over on a terminal, one now and then elsewhere."""

    def __init__(self, title: str, quiet: bool, every: float = 20.0):
        self._title, self._quiet, self._terminal = title, quiet, sys.stderr.isatty()
        self._every = 0.2 if self._terminal else every
        self._start = self._last = time.monotonic()
        if self._terminal:
            self._write("...")

    def __call__(self, products: int, text: str) -> None:
        now = time.monotonic()
        if now - self._last > self._every:
            self._last, gone = now, now - self._start
            self._write(f"{products} products, {text}, {gone:.0f} s gone, {gone / max(1, products):.2g} s a product")

    def end(self, text: str) -> None:
        self._write(text, last=True)

    def _write(self, text: str, last: bool = False) -> None:
        if not self._quiet:
            start, end = ("\r", "\x1b[K" + "\n" * last) if self._terminal else ("", "\n")
            sys.stderr.write(f"{start}{self._title}: {text}{end}")
            sys.stderr.flush()
