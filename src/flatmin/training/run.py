"""The training loop: one for any recipe, method, device and number of ranks, resumable bit for bit.

What a step computes is a function of the weights, the optimizer's state and (seed, step, rank) alone: batches come from
a stream that knows where it stands, augmentation and dropout draw from generators seeded with the three. So a run that
is killed and resumed ends in the bits of one that was not.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .. import batches as data
from .. import perturbed
from ..errors import RunFolderError
from ..files import digest
from ..parallel import local, unwrapped
from . import launch
from .log import Log
from .protocol import Metric, Place, check_recipe, evaluated, over_ranks
from .settings import TrainSettings
from .state import Checkpoints, described, load_weights
from .streams import groups, seed_generators, step_seed

RECORDED = ("loss", "perturbed_loss", "gradient_norm", "perturbed_gradient_norm", "radius", "cosine", "skipped",
            "passes")
"""What is logged of a step, of ``Sharpener.last``."""


MAY_CHANGE = frozenset((
    "evaluate_every", "save_every", "keep_every", "log_every", "monitor", "monitor_every", "threads", "device"))
"""Settings that may be others when a run is resumed: they do not change what is trained."""


class Diverged(ArithmeticError):
    """The loss is no longer finite."""


@dataclass
class Trained:
    """A trained model, and what was seen on the way: logged steps, evaluations, seconds and units a second."""

    model: nn.Module
    steps: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    throughput: float = math.nan


class Training:
    """One run: :meth:`run` trains from where the newest checkpoint stands, or from the beginning.

    Args:
        recipe: a :class:`~flatmin.training.protocol.Recipe`.
        settings: the method, how long and in what way.
        at: the place; see :func:`flatmin.training.launch.place`.
        folder: where ``log.jsonl`` and ``checkpoints/`` go; None keeps nothing.
        tick: called after every step with the number of steps done.
        splits: what is evaluated, as the recipe's ``held_out`` names it.

    Raises:
        ValueError: a recipe that lacks something, an empty loader, ranks whose data are the same or of unequal length.
        Diverged: the loss is not finite.
        RunFolderError: a checkpoint cannot be written or read, or is of another run.
    """

    def __init__(self, recipe: Any, settings: TrainSettings, at: Place, folder: Path | None = None,
                 tick: Callable[[int], None] = lambda done: None, splits: Sequence[str] = ("tune",)):
        check_recipe(recipe)
        self.recipe, self.settings, self.at, self.tick = recipe, settings, at, tick
        self.splits = tuple(splits)
        seed_generators(at.seed)
        self.stream = recipe.train_batches(at)
        self.steps = launch.number_of_steps(recipe, settings, self.stream)
        seed_generators(at.seed)
        self.model = launch.wrapped(recipe, recipe.model(), settings, at)
        self.inner = unwrapped(self.model)
        self.sharded = at.world > 1 and settings.parallel == "fsdp2"
        self.optimizers: list[torch.optim.Optimizer] = list(recipe.optimizers(self.inner))
        self.schedulers = [launch.scheduler(settings, o, self.steps) for o in self.optimizers]
        self.scaler = launch.scaler(settings, at)
        self.sharpener = launch.sharpener(settings, self.model, self.optimizers, self.scaler, self.steps)
        self.log = Log(folder if at.rank == 0 else None)
        self.checkpoints = None if folder is None else Checkpoints(
            folder / "checkpoints", at, sharded=self.sharded, keep_every=settings.keep_every)
        self.monitor = launch.monitor(recipe, settings, self.model, self.optimizers, at, self.log)
        self.done, self.seconds, self.units = 0, 0.0, 0.0
        self.loss_sum, self.loss_units = torch.zeros((), dtype=torch.float64), 0.0      # since the last evaluation
        self.trained = Trained(self.model)
        self.started: dict[str, Any] | None = None
        self._begin()

    def run(self) -> Trained:
        """Train to the last step, evaluating, measuring and saving on the way."""
        for done in self.iterate():
            self.tick(done)
        units, = self.at.group.total(self.units)
        self.trained.seconds, self.trained.throughput = self.seconds, units / max(self.seconds, 1e-9)
        return self.trained

    def iterate(self) -> Iterator[int]:
        """The same, yielding the number of steps done after each."""
        settings = self.settings
        save_every = settings.save_every or math.ceil(self.steps / 20)
        evaluate_every = math.ceil(self.steps / 10) if settings.evaluate_every is None else settings.evaluate_every
        stream = groups(self.stream, settings.accumulate)
        self.model.train()
        while self.done < self.steps:
            start = time.perf_counter()
            self._step(*self._next(stream))
            self.done += 1
            self.seconds += time.perf_counter() - start
            last = self.done == self.steps
            if last or evaluate_every and self.done % evaluate_every == 0:
                self.evaluate()
            if self.checkpoints and (last or self.done % save_every == 0 or
                                     settings.keep_every and self.done % settings.keep_every == 0):
                self.save()
            yield self.done

    def evaluate(self) -> dict[str, dict[str, Metric]]:
        """What the recipe says of the model on each split, over all ranks; into the log, with the mean training loss
        since the last evaluation."""
        total, units = self._check_loss(), self.at.group.total(self.loss_units)[0]
        self.loss_sum, self.loss_units = torch.zeros((), dtype=torch.float64), 0.0
        found = self.metrics(self.splits)
        row: dict[str, Any] = {"step": self.done, "train_loss": total / units if units else math.nan} | {
            split: {name: metric.value for name, metric in metrics.items()} for split, metrics in found.items()}
        row["stderr"] = {split: {name: metric.stderr for name, metric in metrics.items()}
                         for split, metrics in found.items()}
        self.trained.evaluations.append(row)
        self.log.write({"evaluation": row})
        return found

    def metrics(self, splits: Sequence[str]) -> dict[str, dict[str, Metric]]:
        """What the recipe says of the model on each split, over all ranks; empty where it has no ``evaluate``."""
        found: dict[str, dict[str, Metric]] = {}
        if hasattr(self.recipe, "evaluate"):
            self.at.group.broadcast(list(self.inner.buffers()))
            with perturbed.unchanged_random_state([self.at.device]), torch.no_grad(), \
                    perturbed.module_mode(self.model, training=False), launch.autocast(self.settings, self.at):
                for split in splits:
                    seed_generators(self.at.seed)
                    found[split] = self._evaluated(split)
        return found

    def _evaluated(self, split: str) -> dict[str, Metric]:
        """The metrics over all ranks' data, each rank with its own share; all ranks raise where one does."""
        group, error, found = self.at.group, None, {}
        batches: Any = []
        try:
            batches = self.recipe.held_out(split, self.at)
            batches = list(batches) if self.sharded else batches
        except Exception as failed:
            error = failed
        group.raise_everywhere(error)
        counts = group.gather(len(batches) if hasattr(batches, "__len__") else None)
        if self.sharded and len(set(counts)) > 1:
            raise ValueError(f"held_out of recipe {self.recipe.name} gives the ranks {counts} batches of {split!r}: "
                             "under FSDP2 every forward pass takes all ranks, so give each as many")
        try:
            if counts[self.at.rank] != 0 or not any(n != 0 for n in counts):
                found = evaluated(self.recipe, self.inner, batches)
        except Exception as failed:
            error = failed
        group.raise_everywhere(error)
        return over_ranks(group.gather(found))

    def save(self) -> None:
        """A checkpoint of this moment."""
        assert self.checkpoints is not None
        self._check_loss()
        sharpener = self.sharpener.state_dict()
        sharpener["memory"] = {kind: {name: local(t) for name, t in tensors.items()}
                               for kind, tensors in sharpener["memory"].items()}
        shared = {
            "step": self.done, "steps": self.trained.steps, "evaluations": self.trained.evaluations,
            "sharpener": sharpener, "schedulers": [s.state_dict() for s in self.schedulers],
            "scaler": {} if self.scaler is None else self.scaler.state_dict(), "seconds": self.seconds,
            "optimizer_types": self._optimizer_types(),
            "monitor": {} if self.monitor is None else self.monitor.state_dict()}
        own = {"stream": self.stream.state_dict(), "units": self.units, "loss_sum": self.loss_sum.cpu(),
               "loss_units": self.loss_units, "run": self._fingerprint()}
        if self.sharded:
            own["sharpener"] = shared.pop("sharpener")
            self.at.group.broadcast(list(self.inner.buffers()))     # any rank may be the one that writes them
        self.checkpoints.save(self.done, shared, own, self.model, self.optimizers)

    # one step

    def step(self, micro: list[Any]) -> None:
        """One optimizer step on the micro-batches of this rank."""
        self._step(*self._next(iter([micro])))

    def _next(self, stream: Iterator[list[Any]]) -> tuple[list[Any], list[float]]:
        """The micro-batches of a step as both passes see them, and the weights of their losses.

        These are n_i · world / Σ n, the sum over all micro-batches of all ranks, whose gradients are averaged.
        """
        batches, counts, error = [], [], None
        try:
            batches = self._prepared(next(stream))
            counts = [float(self.recipe.weight(batch)) for batch in batches]
            if not all(math.isfinite(n) and n >= 0 for n in counts):
                raise ValueError(f"weight of recipe {self.recipe.name} must be finite and not negative, got {counts}")
        except Exception as failed:     # of the user's recipe or data, on this rank
            error = failed
        n, world, group = len(counts), self.at.world, self.at.group
        every, number, squares, failures = group.total(math.fsum(counts), n, n * n, error is not None)
        if failures:
            group.raise_everywhere(error)
        if number**2 != squares * world:
            raise ValueError(f"the ranks have {group.gather(n)} micro-batches in step {self.done + 1}: give every rank "
                             "as many")
        if every <= 0:
            raise ValueError(f"no batch of step {self.done + 1} has anything to average: weight of recipe "
                             f"{self.recipe.name} is 0 for all")
        if self.done == self.begun:
            self._refuse_same(batches)
        self.units += math.fsum(counts)
        self.step_units = every / world
        return batches, [n * world / every for n in counts]

    def _prepared(self, micro: list[Any]) -> list[Any]:
        batches = [data.move(batch, self.at.device) for batch in micro]
        if not hasattr(self.recipe, "prepare"):
            return batches
        generator = torch.Generator().manual_seed(step_seed(self.at.seed, self.done, self.at.rank, 1))
        return [self.recipe.prepare(batch, generator) for batch in batches]

    def _refuse_same(self, batches: list[Any]) -> None:
        """Raise where all ranks hold the same data."""
        if self.at.world > 1:
            tensors = [t for t in tree_leaves(batches) if isinstance(t, Tensor)]
            if len(set(self.at.group.gather(digest(*tensors)))) == 1 and tensors:
                raise ValueError(f"all {self.at.world} ranks read the same batches: give each its own share, by "
                                 "at.rank and at.world, or by a DistributedSampler")

    def _step(self, batches: list[Any], weights: list[float]) -> None:
        settings, at, step = self.settings, self.at, self.done
        logged = step % settings.log_every == 0 or step == self.steps - 1
        if self.sharded:    # as DDP does
            at.group.broadcast(list(self.inner.buffers()))
        seed_generators(step_seed(at.seed, step, at.rank))
        self.sharpener.perturbed_norm = logged
        losses = self._losses if self.sharpener.rule.second.needs_samples else self._loss
        loss = self.sharpener.backward(self._forward, losses, batches=batches, weights=weights)
        self._update()
        # each rank's loss is weighted by its share of all ranks' samples
        self.loss_sum = self.loss_sum.to(loss.device) + loss.double() * self.step_units
        self.loss_units += self.step_units
        if logged:
            self._record(step, loss)
        for scheduler in self.schedulers:
            scheduler.step()
        if self.monitor is not None:
            self.monitor.step(step)

    def _update(self) -> None:
        """Clip, and let the optimizers step."""
        scaler = self.scaler
        for optimizer in self.optimizers:
            if scaler is not None:
                scaler.unscale_(optimizer)
        if self.settings.clip is not None:
            nn.utils.clip_grad_norm_(self.inner.parameters(), self.settings.clip)
        for optimizer in self.optimizers:
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
            optimizer.zero_grad()
        if scaler is not None:
            scaler.update()

    def _forward(self, batch: Any, *samples: Any) -> Any:
        with launch.autocast(self.settings, self.at):
            return self.recipe.forward(self.model, _part(batch, *samples))

    def _loss(self, outputs: Any, batch: Any) -> Tensor:
        with launch.autocast(self.settings, self.at):
            return self.recipe.loss(outputs, batch)

    def _losses(self, outputs: Any, batch: Any, samples: Any) -> Tensor:
        """One loss a sample, of some samples of a batch, for ESAM."""
        if not hasattr(self.recipe, "losses"):
            raise ValueError(f"esam chooses among samples, and recipe {self.recipe.name} gives no loss of each: add "
                             "losses(outputs, batch)")
        with launch.autocast(self.settings, self.at):
            return self.recipe.losses(outputs, _part(batch, samples))

    def _record(self, step: int, loss: Tensor) -> None:
        """Log a step; a loss that was not finite since the last evaluation ends the run."""
        row = {name: value for name, value in self.sharpener.last.to_dict().items() if name in RECORDED}
        total = self.at.group.total(float(loss), *(row.get(k) or 0.0 for k in ("perturbed_loss",)))
        row["loss"] = total[0] / self.at.world
        if row.get("perturbed_loss") is not None:
            row["perturbed_loss"] = total[1] / self.at.world
        row = {"step": step} | row | {"lr": float(self.optimizers[0].param_groups[0]["lr"])}
        self.trained.steps.append(row)
        self.log.write(row)
        self._check_loss()

    def _check_loss(self) -> float:
        """The sum of the losses since the last evaluation, over all ranks."""
        total, = self.at.group.total(float(self.loss_sum))
        if not math.isfinite(total) and (self.scaler is None or self.scaler.get_scale() < 1):
            raise Diverged(f"{self.settings.method}, seed {self.at.seed}: the loss is not finite in step "
                           f"{self.done + 1} or shortly before; lower the learning rate"
                           f"{'' if self.settings.rho in (None, 0) else ' or rho'}")
        return total

    # the beginning

    def _optimizer_types(self) -> list[str]:
        return [type(optimizer).__name__ for optimizer in self.optimizers]

    def _fingerprint(self) -> dict[str, str]:
        """What decides the bits of a run."""
        settings = {k: repr(v) for k, v in self.settings.to_dict().items() if k not in MAY_CHANGE}
        own = {"processes": str(self.at.world), "recipe": described(self.recipe)}
        return own | settings | {"steps": str(self.steps)}

    def _begin(self) -> None:
        """Where the newest checkpoint of this folder stands, or the run that this one starts from."""
        every = self.at.group.gather(self.steps)
        if len(set(every)) > 1:
            raise ValueError(f"the ranks would take {every} steps: give every rank as many micro-batches, or pass "
                             "--steps")
        newest = self.checkpoints.newest() if self.checkpoints else None
        if newest is not None:
            self._resume(newest)
        elif self.settings.start is not None:
            self._start_from(Path(self.settings.start))
        self.begun = self.done
        self.log.keep(self.done)
        if self.started is not None:
            self.log.write(self.started)

    def _resume(self, path: Path) -> None:
        """Continue a run where its newest checkpoint stands."""
        assert self.checkpoints is not None
        shared, own = self.checkpoints.read(path)
        before, now = own["run"] if own else {}, self._fingerprint()
        differing = [name for name in now if own is None or before.get(name) != now[name]]
        if own is None:
            raise RunFolderError(f"{path} was written by fewer processes than the {self.at.world} of now: resume with "
                                 "as many as the run began with")
        if differing:
            name = differing[0]
            raise RunFolderError(f"{path} belongs to another run: {name} was {_short(before.get(name))} there and is "
                                 f"{_short(now[name])} here; choose another folder, or begin from it with --start")
        self.checkpoints.restore(path, shared, self.model, self.optimizers)
        self.sharpener.load_state_dict(own["sharpener"] if self.sharded else shared["sharpener"])
        if self.monitor is not None and shared["monitor"]:
            self.monitor.load_state_dict(shared["monitor"])
        for scheduler, state in zip(self.schedulers, shared["schedulers"], strict=True):
            scheduler.load_state_dict(state)
        self._continue(shared, own)

    def _continue(self, shared: dict[str, Any], own: dict[str, Any] | None) -> None:
        """Take over the step, what was recorded, and this rank's place in the data."""
        self.done, self.seconds = int(shared["step"]), float(shared["seconds"])
        self.trained.steps, self.trained.evaluations = list(shared["steps"]), list(shared["evaluations"])
        if self.scaler is not None and shared["scaler"]:
            self.scaler.load_state_dict(shared["scaler"])
        if own is not None:
            self.units = float(own["units"])
            self.loss_sum, self.loss_units = own["loss_sum"], float(own["loss_units"])
            self.stream.load_state_dict(own["stream"])

    def _start_from(self, path: Path) -> None:
        """Another run's weights; from a checkpoint also its optimizer's state, its step and its place in the data.

        Learning rates, their schedule and other options of the optimizers are this run's. Where recipe or number of
        processes differ, the data begin anew.
        """
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            load_weights(self.model, load_file(path))
            return
        found = path if (path / "state.pt").exists() else Checkpoints(path / "checkpoints", self.at,
                                                                      sharded=False).newest()
        if found is None:
            raise ValueError(f"--start {path}: no checkpoint there (a run folder, a folder step-..., or a "
                             ".safetensors file of weights)")
        loader = Checkpoints(found.parent, self.at, sharded=self.sharded)
        shared, own = loader.read(found)
        self._refuse_start(found, shared)
        options = [[{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
                   for optimizer in self.optimizers]
        loader.restore(found, shared, self.model, self.optimizers)
        for optimizer, groups_of in zip(self.optimizers, options, strict=True):
            for group, option in zip(optimizer.param_groups, groups_of, strict=True):
                group.update(option)
        now = self._fingerprint()
        same = own is not None and all(own["run"][name] == now[name] for name in ("recipe", "processes"))
        self._continue(shared, own if same else None)
        self.sharpener.load_state_dict({"step": self.done, "memory": {}})
        self._advance_schedulers()
        self.started = {"step": self.done, "start": str(found), "data": "continued" if same else "from the beginning"}

    def _refuse_start(self, found: Path, shared: dict[str, Any]) -> None:
        if int(shared["step"]) >= self.steps:
            raise ValueError(f"--start {found}: that checkpoint stands at step {shared['step']}, and this run has "
                             f"{self.steps} steps: pass more --steps, or start from a .safetensors file of its weights")
        if shared["optimizer_types"] != self._optimizer_types():
            raise ValueError(f"--start {found}: its optimizers are {shared['optimizer_types']}, this recipe's "
                             f"{self._optimizer_types()}: start from a .safetensors file of its weights")

    def _advance_schedulers(self) -> None:
        """The learning rates of step ``done``, by this run's schedule."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")     # the optimizers stepped in the other run
            for scheduler in self.schedulers:
                for _ in range(self.done):
                    scheduler.step()


def _short(text: str | None) -> str:
    return "unknown" if text is None else text if len(text) <= 120 else f"{text[:117]}..."


def _part(batch: Any, samples: Any = None) -> Any:
    """Some samples of a batch; all of them for None."""
    if samples is None:
        return batch
    part = data.samples(batch, samples)
    if part is None:
        raise ValueError("esam chooses among samples, and this batch has tensors without one row a sample")
    return part


__all__ = ["Diverged", "Trained", "Training"]
