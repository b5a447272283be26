"""``flatmin train``: one recipe, one method, one seed; on one process, or on those that ``torchrun`` started."""

from __future__ import annotations

import dataclasses
import datetime
import json
import platform
from contextlib import ExitStack
from typing import Any

import torch

from .. import __version__
from ..errors import RunFolderError
from ..parallel import unwrapped
from ..progress import Display
from ..recipes.find import RECIPES
from ..recipes.language import language
from ..results import plain
from ..sharpness import Finding
from ..training import launch, state
from ..training.folder import RunFolder
from ..training.protocol import check_recipe
from ..training.run import Training
from ..training.user_code import load_object
from ..training.verdict import Verdict, findings
from .recipe_fields import simple_fields, values, with_fields
from .settings import TrainJobSettings

BUILT_IN: dict[str, Any] = {**RECIPES, language.name: language}


class TrainingRun:
    """One training run, kept in a folder; :meth:`run` resumes from the newest checkpoint there.

    Under ``torchrun`` every rank makes one; the first alone writes the record. All of them end where one cannot begin.

    Raises:
        ValueError: settings or a recipe that cannot be trained, or ranks with different settings.
        RunFolderError: a run that began with another number of ranks, or a checkpoint that cannot be read.
    """

    def __init__(self, settings: TrainJobSettings, folder: RunFolder, record: dict[str, Any] | None = None,
                 quiet: bool = False):
        self.settings, self.folder = settings, folder
        with ExitStack() as stack:
            self.recipe, error = _attempt(settings, folder if record is None else None)
            data = None if "data" in simple_fields(self.recipe) else settings.fields.get("data")
            self.at = stack.enter_context(launch.place(settings, data))
            self._agree(error, record)
            self.show = Display(f"{self.recipe.name} {settings.method}", unit="step", quiet=quiet or self.at.rank > 0)
            self.training = Training(self.recipe, settings, self.at, self.folder.path, self._tick)
            self._leave = stack.pop_all()
        self.record = self._new_record() if record is None else record

    def run(self) -> dict[str, Any]:
        """Train, evaluate, and save weights and record; the record is saved also when interrupted."""
        record, training = self.record, self.training
        with self._leave:
            if record["status"] == "complete":
                return record
            self._save("running")
            if self.at.rank == 0:
                training.log.listeners.append(Verdict(training.trained.steps, self.settings, record["first_step"],
                                                      self._say))
            try:
                training.run()
                self._finish()
            except ArithmeticError as error:
                record["failure"] = str(error)
                self._save("failed")
            except BaseException:
                self._save("interrupted")
                raise
            finally:
                self.show.end()
                training.log.close()
        return record

    @property
    def failure(self) -> str:
        """Why the run did not reach its end, in one line; empty where it did."""
        return self.record.get("failure", "")

    def _finish(self) -> None:
        """Weights, metrics with their errors, and what the diagnosis finds."""
        training, record = self.training, self.record
        metrics = plain(training.metrics(("tune", "test")))
        weights = state.weights(training.model)
        if self.at.rank == 0:
            self.folder.save_tensors("checkpoints/model.safetensors", weights)
        trained = training.trained
        steps = [row for row in trained.steps if row["step"] >= record["first_step"]]
        record |= {
            "metrics": metrics, "seconds": trained.seconds,
            "train_loss": next((row["train_loss"] for row in reversed(trained.evaluations)), None),
            "throughput": {"value": trained.throughput, "unit": f"{_units(self.recipe)}/s"},
            "diagnosis": [finding.to_dict() for finding in findings(steps, self.settings, trained.evaluations)]}
        record.pop("failure", None)
        self._save("complete")

    def _save(self, status: str) -> None:
        self.record["status"] = status
        if self.at.rank == 0:
            self.folder.save_record(self.record)

    def _tick(self, done: int) -> None:
        steps = self.training.trained.steps
        self.show(done, f"loss {steps[-1]['loss']:.4g}" if steps else "", left=self.training.steps - done)

    def _say(self, finding: Finding) -> None:
        self.show.line(f"step {self.training.done + 1}: {finding}")

    def _agree(self, error: Exception | None, record: dict[str, Any] | None) -> None:
        """All ranks go on, with one recipe, the same settings and the folder of the first; or all end with one line."""
        key = json.dumps(plain([dataclasses.asdict(self.settings), None if error else values(self.recipe),
                                record and record["created"]]))
        ranks = self.at.group.gather((None if error is None else str(error), key, str(self.folder.path)))
        failed = next(((rank, text) for rank, (text, _, _) in enumerate(ranks) if text is not None), None)
        if failed is not None:
            self._refuse(error if error is not None else ValueError(f"rank {failed[0]}: {failed[1]}"))
        if len({key for _, key, _ in ranks}) > 1:
            self._refuse(ValueError("the ranks were started with different settings, recipes or run folders: start all "
                                    "of them by one command"))
        world = self.at.world if record is None else record["place"]["ranks"]
        if world != self.at.world:
            self._refuse(RunFolderError(f"{self.folder.path} was begun by {world} processes, and these are "
                                        f"{self.at.world}: resume it with as many"))
        self.folder = RunFolder(ranks[0][2])

    def _refuse(self, error: Exception) -> None:
        """The first rank says why; the others end in silence."""
        if self.at.rank > 0:
            raise SystemExit(2 if isinstance(error, ValueError) else 1)
        raise error

    def _new_record(self) -> dict[str, Any]:
        training, parameters = self.training, list(self.training.model.parameters())
        return {
            "kind": "train", "status": "running",
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "settings": dataclasses.asdict(self.settings),
            "recipe": {"name": self.recipe.name, "units": _units(self.recipe), **values(self.recipe)},
            "versions": {"flatmin": __version__, "torch": torch.__version__, "python": platform.python_version(),
                         "platform": platform.platform(), "threads": torch.get_num_threads()},
            "place": {"ranks": self.at.world, "device": str(self.at.device)},
            "model": {"name": type(unwrapped(training.model)).__name__,
                      "parameters": sum(p.numel() for p in parameters if p.requires_grad),
                      "frozen": sum(p.numel() for p in parameters if not p.requires_grad)},
            "steps": training.steps, "first_step": training.done,
        }


def find_trainable(name: str) -> Any:
    """A recipe of the training loop: a built-in name, or ``module:attribute`` from the user's own code.

    Raises:
        ValueError: no such name, or something that lacks what :class:`flatmin.training.protocol.Recipe` asks for.
    """
    if name not in BUILT_IN and ":" not in name:
        raise ValueError(f"no recipe {name!r}: choose {', '.join(BUILT_IN)}, or module:attribute for your own")
    recipe = BUILT_IN[name] if name in BUILT_IN else load_object(name)
    check_recipe(recipe)
    return recipe


def _attempt(settings: TrainJobSettings, new: RunFolder | None) -> tuple[Any, Exception | None]:
    """The recipe, or why there is none to train: said once all ranks are there."""
    try:
        recipe = find_trainable(settings.recipe)
        own = {k: v for k, v in settings.fields.items() if k != "data" or "data" in simple_fields(recipe)}
        recipe = with_fields(recipe, own)
        if new is not None:
            new.refuse_used()
    except (ValueError, RunFolderError) as error:
        return None, error
    return recipe, None


def _units(recipe: Any) -> str:
    return getattr(recipe, "units", "samples")
