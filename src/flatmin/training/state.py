"""Checkpoints of a training run: a folder a step, complete or not there, read without unpickling.

``step-00000100/`` holds ``state.pt`` (what all ranks share: tensors and plain values, read with ``weights_only=True``)
and ``rank-0.pt`` and so on (where the stream of each rank stands). Where the model is sharded, weights and optimizer
state are there as safetensors of each rank, written by ``torch.distributed.checkpoint``.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)

from ..errors import RunFolderError
from ..files import move_file
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
        part = self.folder / f"step-{step:08d}.part"
        if self.at.rank == 0:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
        self.at.group.wait()
        error: Exception | None = None
        try:
            if self.sharded:
                self._save_shards(part, model, optimizers, shared)
            elif self.at.rank == 0:
                shared |= {"model": _plain(model).state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
            if self.at.rank == 0:
                _write(shared, part / "state.pt")
            _write(own, part / f"rank-{self.at.rank}.pt")
        except (OSError, RuntimeError) as failed:      # torch wraps a full disk in a RuntimeError
            error = failed
        if self.at.group.largest(float(error is not None)):
            if self.at.rank == 0:
                shutil.rmtree(part, ignore_errors=True)
            raise RunFolderError(f"cannot write {target}: {error or 'another rank says why'}; what was saved before is "
                                 "untouched, and --resume goes on from there") from error
        if self.at.rank == 0:
            for path in part.rglob("*"):
                _sync(path)
            move_file(part, target)
            for old, path in self._found():
                if old < step and not (self.keep_every and old % self.keep_every == 0):
                    shutil.rmtree(path, ignore_errors=True)
        self.at.group.wait()

    def newest(self) -> Path | None:
        """The last complete checkpoint."""
        found = self._found()
        return found[-1][1] if found else None

    def remove(self) -> None:
        """All checkpoints of the run."""
        if self.at.rank == 0:
            shutil.rmtree(self.folder, ignore_errors=True)

    def load(self, path: Path, model: nn.Module,
             optimizers: list[torch.optim.Optimizer] | None) -> tuple[dict[str, Any], dict[str, Any]]:
        """Weights and optimizer states into place; returns what all ranks share, and this rank's own."""
        shared = read(path / "state.pt")
        if (path / "shards").is_dir():
            self._load_shards(path, model, optimizers, shared)
        else:
            if self.sharded:
                raise RunFolderError(f"{path} was written without FSDP2: continue it with --parallel ddp or in one "
                                     "process")
            _plain(model).load_state_dict(shared.pop("model"))
            for optimizer, state in zip(optimizers or (), shared.pop("optimizers"), strict=optimizers is not None):
                optimizer.load_state_dict(state)
        if not (path / f"rank-{self.at.rank}.pt").exists():
            raise RunFolderError(f"{path} was written by fewer ranks than the {self.at.world} of now: continue it with "
                                 "as many as it began with")
        return shared, read(path / f"rank-{self.at.rank}.pt")

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

    def _load_shards(self, path: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer] | None,
                     shared: dict[str, Any]) -> None:
        from torch.distributed.checkpoint import HuggingFaceStorageReader, load

        if not self.sharded:
            raise RunFolderError(f"{path} was written under FSDP2: continue it with --parallel fsdp2 under torchrun")
        tensors, _ = _flat(model, optimizers or [])
        load(tensors, storage_reader=HuggingFaceStorageReader(str(path / "shards")))
        merged: dict[str, Any] = {**tensors, **shared.pop("values")}
        options = StateDictOptions(flatten_optimizer_state_dict=True)
        state = {k.removeprefix("model."): v for k, v in merged.items() if k.startswith("model.")}
        states = {k.removeprefix("optimizer."): v for k, v in merged.items() if k.startswith("optimizer.")}
        set_state_dict(model, optimizers or [], model_state_dict=state, optim_state_dict=states, options=options)


def _flat(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Weights and optimizer states by name: the tensors, and the plain values among them."""
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    state, states = get_state_dict(model, optimizers, options=options)
    every = {f"model.{k}": v for k, v in state.items()} | {f"optimizer.{k}": v for k, v in states.items()}
    tensors = {k: v for k, v in every.items() if isinstance(v, torch.Tensor)}
    return tensors, {k: v for k, v in every.items() if k not in tensors}


def _plain(model: nn.Module) -> nn.Module:
    """The module itself, out of ``torch.compile`` and DDP."""
    model = getattr(model, "_orig_mod", model)
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


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


def _write(state: dict[str, Any], path: Path) -> None:
    with open(path, "wb") as file:
        torch.save(state, file)


def _sync(path: Path) -> None:
    """A file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
