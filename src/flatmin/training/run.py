"""The training loop: one for any recipe, method, device and number of ranks, resumable bit for bit.

What a step computes is a function of the weights, the optimizer's state and (seed, step, rank) alone: batches come from
a stream that knows where it stands, augmentation and dropout draw from generators seeded with the three. So a run that
is killed and resumed ends in the bits of one that was not.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import batches as data
from .. import perturbed
from ..ascent import Sharpener
from ..ascent.presets import PRESETS
from ..objective import Objective
from ..sharpness import SharpnessMonitor
from . import launch
from .log import Log
from .protocol import Metric, Place, check_recipe, evaluated, prepared
from .settings import TrainSettings, learning_rate_factor
from .state import Checkpoints
from .streams import groups, step_seed, steps_an_epoch

RECORDED = ("loss", "perturbed_loss", "gradient_norm", "perturbed_gradient_norm", "radius", "cosine", "skipped",
            "passes")
"""What is logged of a step, of ``Sharpener.last``."""


class Diverged(ArithmeticError):
    """The loss is no longer finite."""


@dataclass(frozen=True)
class Late:
    """ρ from step ``first`` on, 0 before it: the method acts in the last share of training."""

    rho: float | Callable[[int, float | None], float]
    first: int

    def __call__(self, step: int, lr: float | None) -> float:
        if step < self.first:
            return 0.0
        return float(self.rho(step, lr) if callable(self.rho) else self.rho)


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
        ValueError: a recipe that lacks something, data that end on one rank before the others, an empty loader.
        Diverged: the loss is not finite.
        RunFolderError: a checkpoint cannot be written or read.
    """

    def __init__(self, recipe: Any, settings: TrainSettings, at: Place, folder: Path | None = None,
                 tick: Callable[[int], None] = lambda done: None, splits: Sequence[str] = ("tune",)):
        check_recipe(recipe)
        self.recipe, self.settings, self.at, self.tick = recipe, settings, at, tick
        self.splits = tuple(splits)
        torch.manual_seed(at.seed)
        self.stream = recipe.train_batches(at)
        self.steps = self._number_of_steps()
        torch.manual_seed(at.seed)
        self.model = launch.wrapped(recipe, recipe.model(), settings, at)
        self.optimizers: list[torch.optim.Optimizer] = list(recipe.optimizers(self.model))
        self.schedulers = [self._scheduler(o) for o in self.optimizers]
        self.scaler = launch.scaler(settings, at)
        self.sharpener = self._sharpener()
        self.log = Log(folder if at.rank == 0 else None)
        self.checkpoints = None if folder is None else Checkpoints(
            folder / "checkpoints", at, sharded=at.world > 1 and settings.parallel == "fsdp2",
            keep_every=settings.keep_every)
        self.monitor = self._monitor()
        self.done, self.seconds, self.units = 0, 0.0, 0.0
        self.loss_sum, self.loss_units = torch.zeros((), dtype=torch.float64), 0.0      # since the last evaluation
        self.trained = Trained(self.model)
        self._begin()

    def run(self) -> Trained:
        """Train to the last step, evaluating, measuring and saving on the way."""
        settings = self.settings
        save_every = settings.save_every or math.ceil(self.steps / 20)
        evaluate_every = math.ceil(self.steps / 10) if settings.evaluate_every is None else settings.evaluate_every
        stream = groups(self.stream, settings.accumulate)
        self.model.train()
        while self.done < self.steps:
            start = time.perf_counter()
            self._step(next(stream))
            self.done += 1
            self.seconds += time.perf_counter() - start
            last = self.done == self.steps
            if last or evaluate_every and self.done % evaluate_every == 0:
                self.evaluate()
            if self.checkpoints and (last or self.done % save_every == 0 or
                                     settings.keep_every and self.done % settings.keep_every == 0):
                self.save()
            self.tick(self.done)
        units, = self.at.group.total(self.units)
        self.trained.seconds, self.trained.throughput = self.seconds, units / max(self.seconds, 1e-9)
        return self.trained

    def evaluate(self) -> dict[str, dict[str, Metric]]:
        """What the recipe says of the model on each split, over all ranks; into the log, with the mean training loss
        since the last evaluation."""
        total, units = self.at.group.total(float(self.loss_sum), self.loss_units)
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
            with perturbed.unchanged_random_state([self.at.device]), torch.no_grad(), \
                    perturbed.module_mode(self.model, training=False), launch.autocast(self.settings, self.at):
                for split in splits:
                    torch.manual_seed(self.at.seed)
                    metrics = evaluated(self.recipe, self.model, self.recipe.held_out(split, self.at))
                    found[split] = {name: self._reduced(metric) for name, metric in metrics.items()}
        return found

    def save(self) -> None:
        """A checkpoint of this moment."""
        assert self.checkpoints is not None
        shared = {
            "step": self.done, "steps": self.trained.steps, "evaluations": self.trained.evaluations,
            "sharpener": self.sharpener.state_dict(), "schedulers": [s.state_dict() for s in self.schedulers],
            "scaler": {} if self.scaler is None else self.scaler.state_dict(), "seconds": self.seconds,
            "monitor": {} if self.monitor is None else self.monitor.state_dict()}
        own = {"stream": self.stream.state_dict(), "units": self.units, "loss_sum": self.loss_sum.cpu(),
               "loss_units": self.loss_units}
        self.checkpoints.save(self.done, shared, own, self.model, self.optimizers)

    # one step

    def _step(self, micro: list[Any]) -> None:
        settings, at, step = self.settings, self.at, self.done
        logged = step % settings.log_every == 0
        generator = torch.Generator().manual_seed(step_seed(at.seed, step, at.rank))
        batches = [prepared(self.recipe, self._moved(batch), generator) for batch in micro]
        torch.manual_seed(step_seed(at.seed, step, at.rank))
        self.sharpener.perturbed_norm = logged
        losses = self._losses if self.sharpener.rule.second.needs_samples else self._loss
        loss = self.sharpener.backward(self._forward, losses, batches=batches, weights=self._weights(batches))
        for optimizer in self.optimizers:
            if self.scaler is not None:
                self.scaler.unscale_(optimizer)
        if settings.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip)
        for optimizer in self.optimizers:
            if self.scaler is None:
                optimizer.step()
            else:
                self.scaler.step(optimizer)
            optimizer.zero_grad()
        if self.scaler is not None:
            self.scaler.update()
        # each rank's loss is weighted by its share of all ranks' samples
        self.loss_sum = self.loss_sum.to(loss.device) + loss.double() * self.step_units
        self.loss_units += self.step_units
        if logged:
            self._record(step, loss)
        for scheduler in self.schedulers:
            scheduler.step()
        if self.monitor is not None:
            self.monitor.step(step)

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

    def _weights(self, batches: list[Any]) -> list[float]:
        """n_i · world / Σ n, the sum over all micro-batches of all ranks, whose gradients are averaged."""
        counts = [float(self.recipe.weight(batch)) for batch in batches]
        if not all(math.isfinite(n) and n >= 0 for n in counts):
            raise ValueError(f"weight of recipe {self.recipe.name} must be finite and not negative, got {counts}")
        every, number = self.at.group.total(math.fsum(counts), len(counts))
        if number != len(counts) * self.at.world:
            raise ValueError(f"rank {self.at.rank} has {len(counts)} micro-batches in step {self.done + 1}, all "
                             f"{self.at.world} ranks together {number:g}: give every rank as many")
        if every <= 0:
            raise ValueError(f"no batch of step {self.done + 1} has anything to average: weight of recipe "
                             f"{self.recipe.name} is 0 for all")
        self.units += math.fsum(counts)
        self.step_units = every / self.at.world
        return [n * self.at.world / every for n in counts]

    def _moved(self, batch: Any) -> Any:
        return data.move(batch, self.at.device)

    def _record(self, step: int, loss: Tensor) -> None:
        """Log a step; a loss that is not finite on any rank ends the run."""
        row = {name: value for name, value in self.sharpener.last.to_dict().items() if name in RECORDED}
        total = self.at.group.total(float(loss), *(row.get(k) or 0.0 for k in ("perturbed_loss",)))
        row["loss"] = total[0] / self.at.world
        if row.get("perturbed_loss") is not None:
            row["perturbed_loss"] = total[1] / self.at.world
        row = {"step": step} | row | {"lr": float(self.optimizers[0].param_groups[0]["lr"])}
        self.trained.steps.append(row)
        self.log.write(row)
        if not math.isfinite(row["loss"]) and (self.scaler is None or step > 0 and self.scaler.get_scale() < 1):
            raise Diverged(f"{self.settings.method}, seed {self.at.seed}: the loss is not finite in step {step + 1}; "
                           f"lower the learning rate{'' if self.settings.rho in (None, 0) else ' or rho'}")

    # the beginning

    def _number_of_steps(self) -> int:
        settings = self.settings
        if settings.steps is not None:
            return settings.steps
        epochs = settings.epochs or getattr(self.recipe, "epochs", None)
        each = steps_an_epoch(self.stream, settings.accumulate)
        if epochs is not None and each is not None:
            return int(epochs) * each
        steps = getattr(self.recipe, "steps", None)
        if steps is None:
            raise ValueError(f"how long? recipe {self.recipe.name} says no number of steps, and its stream no length: "
                             "pass --steps")
        return int(steps)

    def _scheduler(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        settings = self.settings
        if settings.schedule == "cosine" and not settings.warmup:
            return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        return torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate_factor(step, self.steps, settings.schedule, settings.warmup))

    def _sharpener(self) -> Sharpener:
        """The method over the model; a plain optimizer is the radius 0."""
        name, optimizer = self.settings.method, self.optimizers[0]
        if name == "base":
            return Sharpener(self.model, rho=0.0, optimizer=optimizer, scaler=self.scaler)
        if name not in PRESETS:
            raise ValueError(f"unknown method {name!r}: choose from base, {', '.join(PRESETS)}")
        rho: Any = self.settings.rho
        if rho is None:
            rho = inspect.signature(PRESETS[name]).parameters["rho"].default
        if self.settings.late < 1:
            rho = Late(rho, round((1 - self.settings.late) * self.steps))
        return PRESETS[name](self.model, rho=rho, optimizer=optimizer, scaler=self.scaler)

    def _monitor(self) -> SharpnessMonitor | None:
        names = [n.strip() for n in self.settings.monitor.split(",") if n.strip()]
        if not names:
            return None
        if not hasattr(self.recipe, "held_out"):
            raise ValueError(f"--monitor measures on held-out data and recipe {self.recipe.name} has none (held_out)")
        objective = Objective(self.model, self.recipe.loss, list(self.recipe.held_out("measure", self.at)),
                              forward=self.recipe.forward, weight=self.recipe.weight)
        return SharpnessMonitor(objective, names, every=self.settings.monitor_every, logger=self.log,
                                optimizer=self.optimizers[0])

    def _begin(self) -> None:
        """Where the newest checkpoint of this folder stands, or the run that this one starts from."""
        newest = self.checkpoints.newest() if self.checkpoints else None
        if newest is not None:
            assert self.checkpoints is not None
            shared, own = self.checkpoints.load(newest, self.model, self.optimizers)
            self.sharpener.load_state_dict(shared["sharpener"])
            if self.monitor is not None:
                self.monitor.load_state_dict(shared["monitor"])
            self._continue(shared, own)
        elif self.settings.start is not None:
            self._start_from(Path(self.settings.start))
        self.log.keep(self.done)

    def _continue(self, shared: dict[str, Any], own: dict[str, Any]) -> None:
        self.done, self.seconds, self.units = int(shared["step"]), float(shared["seconds"]), float(own["units"])
        self.trained.steps, self.trained.evaluations = list(shared["steps"]), list(shared["evaluations"])
        self.loss_sum, self.loss_units = own["loss_sum"], float(own["loss_units"])
        self.stream.load_state_dict(own["stream"])
        for scheduler, state in zip(self.schedulers, shared["schedulers"], strict=True):
            scheduler.load_state_dict(state)
        if self.scaler is not None and shared["scaler"]:
            self.scaler.load_state_dict(shared["scaler"])

    def _start_from(self, path: Path) -> None:
        """Another run's weights; from a checkpoint also its optimizer, its place in the data and its step."""
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            self.model.load_state_dict(load_file(path))
            return
        found = path if (path / "state.pt").exists() else Checkpoints(path / "checkpoints", self.at,
                                                                      sharded=False).newest()
        if found is None:
            raise ValueError(f"--start {path}: no checkpoint there (a run folder, a folder step-..., or a "
                             ".safetensors file of weights)")
        loader = Checkpoints(found.parent, self.at, sharded=self.at.world > 1 and self.settings.parallel == "fsdp2")
        shared, own = loader.load(found, self.model, self.optimizers)
        self._continue(shared, own)

    def _reduced(self, metric: Metric) -> Metric:
        """A metric over all ranks, each with its own share of the data."""
        n = metric.weight
        sums = self.at.group.total(n, n * metric.value, (n * metric.stderr) ** 2)
        return Metric(sums[1] / sums[0], math.sqrt(sums[2]) / sums[0] if sums[2] >= 0 else math.nan, sums[0],
                      metric.higher_is_better) if sums[0] > 0 else metric


def _part(batch: Any, samples: Any = None) -> Any:
    """Some samples of a batch; all of them for None."""
    if samples is None:
        return batch
    part = data.samples(batch, samples)
    if part is None:
        raise ValueError("esam chooses among samples, and this batch has tensors without one row a sample")
    return part


__all__ = ["Diverged", "Late", "Trained", "Training"]
