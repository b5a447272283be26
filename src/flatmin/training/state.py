"""Checkpoints of a training run: a folder a step, complete or not there, read without unpickling.

``step-00000100/`` holds ``state.pt`` (what all ranks share: tensors and plain values, read with ``weights_only=True``)
and ``rank-0.pt`` and so on (where the stream of each rank stands). Where the model is sharded, weights and optimizer
state are there as safetensors of each rank, written by ``torch.distributed.checkpoint``.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)

from ..errors import RunFolderError
from ..files import digest, move_file, sync
from ..parallel import is_sharded, like, shard_of, unwrapped
from .protocol import Place

_NAME = re.compile(r"step-(\d{8})")


class Checkpoints:
    """The checkpoints of one run, in a folder of their own.

    Args:
        folder: where they lie; made when the first is saved.
        at: the place of the run; rank 0 writes what all share.
        sharded: whether weights and optimizer state are DTensors (FSDP2).
        keep_every: steps between checkpoints that stay; the others are removed once a newer one is complete.
    """

    def __init__(self, folder: Path, at: Place, *, sharded: bool, keep_every: int | None = None):
        self.folder, self.at, self.sharded, self.keep_every = folder, at, sharded, keep_every

    def save(self, step: int, shared: dict[str, Any], own: dict[str, Any], model: nn.Module,
             optimizers: list[torch.optim.Optimizer]) -> None:
        """Write the checkpoint of a step and remove the one before it.

        A kill at any moment leaves the last complete one: everything is written into a folder with another name,
        synchronised to the disk, and renamed.
        """
        target = self.folder / f"step-{step:08d}"
        folder = _unfinished(target)

        def write() -> None:
            if self.sharded:
                self._save_shards(folder, model, optimizers, shared)
            elif self.at.rank == 0:
                plain = {"model": unwrapped(model).state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
                shared.update(plain)
            if self.at.rank == 0:
                _write(shared, folder / "state.pt")
            _write(own, folder / f"rank-{self.at.rank}.pt")

        self._on_all(target, lambda: self.at.rank == 0 and self._make(folder))
        self._on_all(target, write)
        self._on_all(target, lambda: self.at.rank == 0 and self._complete(folder, target))
        if self.at.rank == 0:
            for old, path in self._found():
                if old < step and not (self.keep_every and old % self.keep_every == 0):
                    _remove(path)
        self.at.group.wait()

    def _on_all(self, target: Path, action: Callable[[], Any]) -> None:
        """Do something on every rank; raise on all of them where one fails."""
        error: BaseException | None = None
        try:
            action()
        except (OSError, RuntimeError, CheckpointException) as failed:      # torch wraps a full disk in the last two
            error = failed
        said = [text for text in self.at.group.gather(error and _in_a_line(error)) if text]
        if said:
            if self.at.rank == 0:
                shutil.rmtree(_unfinished(target), ignore_errors=True)
            raise RunFolderError(f"cannot write {target}: {said[0]}; what was saved before is untouched, and --resume "
                                 "continues from there") from error

    def _make(self, part: Path) -> None:
        """An empty folder to write into; what earlier kills left is removed."""
        for left in self.folder.glob("*.part"):
            shutil.rmtree(left, ignore_errors=True)
        part.mkdir(parents=True)

    def _complete(self, part: Path, target: Path) -> None:
        """Everything in the folder to the disk, then its name; a checkpoint of the same step is replaced."""
        for path in part.rglob("*"):
            sync(path)
        if target.exists():
            _remove(target)
        move_file(part, target)

    def newest(self) -> Path | None:
        """The last complete checkpoint."""
        found = self._found()
        return found[-1][1] if found else None

    def remove(self) -> None:
        """All checkpoints of the run."""
        if self.at.rank == 0:
            shutil.rmtree(self.folder, ignore_errors=True)

    def read(self, path: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """What all ranks share, and this rank's own; None where the checkpoint has nothing of such a rank."""
        own = path / f"rank-{self.at.rank}.pt"
        return read(path / "state.pt"), read(own) if own.exists() else None

    def restore(self, path: Path, shared: dict[str, Any], model: nn.Module,
                optimizers: list[torch.optim.Optimizer]) -> None:
        """Weights and optimizer states into place, however the ranks of then and now share them."""
        if (path / "shards").is_dir():
            _load_shards(path, shared, model, optimizers)
            return
        load_weights(model, shared["model"])
        for optimizer, saved in zip(optimizers, shared["optimizers"], strict=True):
            owned = [p for group in optimizer.param_groups for p in group["params"]]
            state = {i: {k: _placed(v, owned[i]) for k, v in values.items()} for i, values in saved["state"].items()}
            optimizer.load_state_dict(saved | {"state": state})

    def _found(self) -> list[tuple[int, Path]]:
        if not self.folder.is_dir():
            return []
        matched = ((_NAME.fullmatch(p.name), p) for p in self.folder.iterdir())
        return sorted((int(m[1]), p) for m, p in matched if m)

    def _save_shards(self, part: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer],
                     shared: dict[str, Any]) -> None:
        from torch.distributed.checkpoint import HuggingFaceStorageWriter, save

        tensors, values = _flat(model, optimizers)
        shared["values"] = values
        save(tensors, storage_writer=HuggingFaceStorageWriter(str(part / "shards"), save_distributed=True))


def _load_shards(path: Path, shared: dict[str, Any], model: nn.Module,
                 optimizers: list[torch.optim.Optimizer]) -> None:
    from torch.distributed.checkpoint import HuggingFaceStorageReader, load

    tensors, _ = _flat(model, optimizers)
    load(tensors, storage_reader=HuggingFaceStorageReader(str(path / "shards")))
    merged: dict[str, Any] = {**tensors, **shared["values"]}
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    state = {k.removeprefix("model."): v for k, v in merged.items() if k.startswith("model.")}
    states = {k.removeprefix("optimizer."): v for k, v in merged.items() if k.startswith("optimizer.")}
    set_state_dict(model, optimizers, model_state_dict=state, optim_state_dict=states, options=options)


def load_weights(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """A whole ``state_dict`` into a model, wrapped or sharded as it may be.

    Raises:
        ValueError: of another model.
    """
    model = unwrapped(model)
    own: dict[str, torch.Tensor] = model.state_dict()
    for name in dict.fromkeys([*own, *state]):
        there, here = (tuple(d[name].shape) if name in d else "missing" for d in (state, own))
        if there != here:
            raise ValueError(f"these are the weights of another model: {name} is {there} there and {here} in the model "
                             "of this recipe")
    model.load_state_dict({name: _placed(value, own[name]) for name, value in state.items()})


def _placed(value: Any, parameter: torch.Tensor) -> Any:
    """This rank's part of a tensor that belongs to a parameter; anything else as it is."""
    if not is_sharded(parameter) or not isinstance(value, torch.Tensor) or value.shape != parameter.shape:
        return value
    return like(shard_of(value, parameter).clone(), parameter)


def described(value: Any) -> str:
    """A value in words that are the same in every process: to tell recipes apart.

    Tensors by their digest, functions and objects by their names, dataclasses and containers by what they hold.
    """
    if isinstance(value, torch.Tensor):
        return digest(value)[:16]
    if isinstance(value, (str, int, float, type(None))):
        return repr(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k!r}: {described(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(described(v) for v in value) + "]"
    if is_dataclass(value) and not isinstance(value, type):
        held = ", ".join(f"{f.name}={described(getattr(value, f.name))}" for f in fields(value))
        return f"{type(value).__qualname__}({held})"
    return getattr(value, "__qualname__", type(value).__qualname__)


class OptimizerStates:
    """The parameter groups and states of several optimizers, for what reads those of one."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]):
        self.optimizers = optimizers

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @property
    def state(self) -> OptimizerStates:
        return self

    def get(self, parameter: torch.Tensor, default: Any = None) -> Any:
        """The state of a parameter in the optimizer that has one."""
        return next((o.state[parameter] for o in self.optimizers if parameter in o.state), default)


def _flat(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Weights and optimizer states by name: the tensors, and the plain values among them."""
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    state, states = get_state_dict(model, optimizers, options=options)
    every = {f"model.{k}": v for k, v in state.items()} | {f"optimizer.{k}": v for k, v in states.items()}
    tensors = {k: v for k, v in every.items() if isinstance(v, torch.Tensor)}
    return tensors, {k: v for k, v in every.items() if k not in tensors}


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The whole ``state_dict`` on the CPU, gathered where it is sharded (every rank must call; rank 0 gets it)."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state: dict[str, Any] = get_model_state_dict(model, options=options)
    return {k: v.detach().cpu().contiguous().clone() for k, v in state.items()}


def read(path: Path) -> dict[str, Any]:
    """Tensors and plain values from a file."""
    try:
        return torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:
        raise RunFolderError(f"{path} cannot be read ({type(error).__name__}): delete its folder to continue from an "
                             "earlier checkpoint") from error


def _unfinished(target: Path) -> Path:
    """The name of a checkpoint that is not complete, or no longer."""
    return target.with_name(f"{target.name}.part")


def _remove(target: Path) -> None:
    """Remove a checkpoint, of which a kill leaves all or nothing."""
    gone = _unfinished(target)
    shutil.rmtree(gone, ignore_errors=True)
    move_file(target, gone)
    shutil.rmtree(gone, ignore_errors=True)


def _in_a_line(error: BaseException) -> str:
    failures = list(error.failures.values()) if isinstance(error, CheckpointException) else []
    return " ".join(str(failures[0][0] if failures else error).split()) or type(error).__name__


def _write(state: dict[str, Any], path: Path) -> None:
    with open(path, "wb") as file:
        torch.save(state, file)
