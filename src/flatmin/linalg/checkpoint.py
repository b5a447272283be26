"""Long computations that resume after a kill: their state in a file, and a journal for what is rewritten in place."""

from __future__ import annotations

import os
import pickle
import time
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..files import remove_file, replace_file
from .operator import CurvatureOperator

State = dict[str, Any]
"""Tensors and plain values from which a run resumes to the same bits; "matvecs" counts those already done."""


class Checkpoint:
    """The state of a run in a file: written each minute and on Ctrl-C, resumed by the same call, removed at the end.

    On ranks each has its own file; they write together, and start over where their states are not of the same step.
    A basis on disk is a part of the state that has a file of its own, ``basis``. The state of ``generator``
    is saved and restored. ``fixed`` is added to all further states.

    Raises:
        ValueError: the file is of another computation: another matrix, method or seed.
    """

    def __init__(self, file: str | None, operator: CurvatureOperator, *, on_disk: bool = False,
                 generator: torch.Generator | None = None, **settings: Any):
        self.file = file and f"{file}.{operator.rank}" if operator.rank else file
        self.operator, self.every = operator, 5 if on_disk else 60
        self.basis = f"{self.file}.basis" if self.file and on_disk else None
        self.generator, self.fixed = generator, State()
        self._state: State | None = None
        self._saved: State | None = None
        self._written = time.monotonic()
        if self.file:
            seed = settings.get("seed")
            settings |= {"seed": seed if isinstance(seed, int) else None, "disk": on_disk, "dtype": operator.dtype,
                         "size": (operator.size, operator.length), "operator": operator.name}
            self._run = repr(sorted(settings.items())) + operator.fingerprint()
            self._saved = self._read(self.file)
        if self._saved and generator is not None:
            generator.set_state(self._saved["generator"])

    @property
    def saved(self) -> State:
        """The saved state; empty at a first start."""
        return self._saved or {}

    def take(self) -> State | None:
        """Return the saved state and clear it."""
        saved, self._saved = self._saved, None
        return saved

    def tick(self, state: State | Callable[[], State]) -> None:
        """The state after a step; it must not change before the next ``tick`` or ``changing``."""
        if self.file:
            self._set_state(state)
            if self.operator.min_over_ranks(int(time.monotonic() - self._written < self.every)) == 0:
                self.write()

    def changing(self) -> None:
        """The state is about to be changed in place: until the next ``tick`` the one in the file is the last."""
        self._state = None

    def write(self) -> None:
        """Write the last state into the file, unless it is there."""
        if self.file and self._state is not None:
            replace_file(self.file, partial(torch.save, {"run": self._run, "state": self._state}))
            self._state = None
            self._written = time.monotonic()

    def rewriting(self, state: Callable[[], State]) -> Journal | None:
        """A journal for the basis on disk, which is about to be rewritten as ``state`` says; None where it is not."""
        self.changing()
        if self.basis is None:
            return None
        remove_file(f"{self.basis}.journal")
        self._set_state(state)
        self.write()
        return self.journal()

    def rewritten(self, state: Callable[[], State]) -> None:
        """Replace the saved state: the old one no longer matches the basis file."""
        if self.file:
            self._set_state(state)
        if self.basis:
            self.write()
            remove_file(f"{self.basis}.journal")

    def journal(self) -> Journal:
        return Journal(f"{self.basis}.journal")

    def _set_state(self, state: State | Callable[[], State]) -> None:
        self._state = self.fixed | (state() if callable(state) else state)
        if self.generator is not None:
            self._state["generator"] = self.generator.get_state()

    def _read(self, file: str) -> State | None:
        """The saved state, if all ranks have that of the same step."""
        try:
            saved = torch.load(file, weights_only=True, mmap=True, map_location="cpu") if os.path.exists(file) else None
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(f"{file} is no checkpoint: remove it, or name another file") from error
        if saved is not None and (not isinstance(saved, dict) or saved.get("run") != self._run):
            raise ValueError(f"{file} belongs to another computation: remove it, or name another file")
        state = saved and saved["state"]
        if self.basis and not os.path.exists(self.basis):
            state = None
        mark = zlib.crc32(repr((state["matvecs"], sorted(state))).encode()) if state else 0
        if self.operator.min_over_ranks(mark) != -self.operator.min_over_ranks(-mark):
            state = None
        if state is None:
            self._remove_basis()
        return state

    def _remove_basis(self) -> None:
        if self.basis:
            remove_file(self.basis)
            remove_file(f"{self.basis}.journal")

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            self.write()
        elif kind is None and self.file:
            remove_file(self.file)
            self._remove_basis()


def matvecs_in(file: str) -> int:
    """How many matvecs the state in a file stands for; 0 where there is none."""
    try:
        saved = torch.load(file, weights_only=True, mmap=True, map_location="cpu") if os.path.exists(file) else None
    except (RuntimeError, EOFError, pickle.UnpicklingError):
        return 0
    state = saved.get("state") if isinstance(saved, dict) else None
    return int(state.get("matvecs", 0)) if isinstance(state, dict) else 0


class Journal:
    """The block of a file that is being rewritten, with its old content: after a kill at most one block is incomplete.

    A process may be killed at any point; a machine that loses power may lose more.
    """

    def __init__(self, file: str):
        self.file = file
        saved = torch.load(file, weights_only=True) if os.path.exists(file) else {"index": 0, "block": None}
        self.index, self.block = saved["index"], saved["block"]

    def enter(self, index: int, block: Tensor) -> bool:
        """Whether a block is still to be rewritten; then it has its old content, which is saved."""
        if index < self.index:
            return False
        if self.block is None:
            replace_file(self.file, partial(torch.save, {"index": index, "block": block.clone()}))
        else:
            block.copy_(self.block)
            self.block = None
        return True
