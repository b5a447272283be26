"""Streams of micro-batches that can be resumed: where they stand is a few numbers."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .protocol import Place


def epoch_seed(seed: int, epoch: int) -> int:
    """The seed of the order of an epoch."""
    return 1_000_003 * (seed + 1) + epoch


def step_seed(seed: int, step: int, rank: int, *use: int) -> int:
    """The seed of what is drawn in a step on a rank: splitmix64 of the numbers, 63 bits.

    ``use``: numbers that tell draws for different purposes apart.
    """
    mask = (1 << 64) - 1
    state = 0
    for number in (seed, step, rank, *use):
        state = (state + number + 0x9E3779B97F4A7C15) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        state ^= state >> 31
    return state >> 1


class Shuffled:
    """Micro-batches of tensors in memory, in an order that is a function of (seed, epoch) alone.

    An epoch is one pass over all rows: a permutation, cut into parts of ``batch_size`` · world rows, of which each rank
    takes its share. A last part with fewer rows than ranks is left out.

    Args:
        tensors: as many rows each.
        batch_size: rows of a micro-batch on each rank.
        at: seed, rank and world.
    """

    def __init__(self, tensors: Sequence[Tensor], batch_size: int, at: Place):
        sizes = {len(t) for t in tensors}
        if len(sizes) != 1 or 0 in sizes:
            raise ValueError(f"expected tensors of as many rows each, and some rows, got {[len(t) for t in tensors]}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.tensors, self.batch_size, self.at = list(tensors), batch_size, at
        self.epoch, self.index = 0, 0

    def _parts(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(epoch_seed(self.at.seed, self.epoch))
        order = torch.randperm(len(self.tensors[0]), generator=generator)
        parts = order.split(self.batch_size * self.at.world)
        return [p.tensor_split(self.at.world)[self.at.rank] for p in parts if len(p) >= self.at.world]

    def __len__(self) -> int:
        """Micro-batches an epoch."""
        n, size = len(self.tensors[0]), self.batch_size * self.at.world
        return n // size + (n % size >= self.at.world)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for part in self._parts()[self.index:]:
            self.index += 1
            yield tuple(t[part] for t in self.tensors)
        self.epoch, self.index = self.epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "index": self.index}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.index = int(state["epoch"]), int(state["index"])


class Loaded:
    """The batches of a loader that can be iterated again and again.

    The global generators are seeded with (seed, epoch) before each epoch, so that a ``DataLoader`` with
    ``shuffle=True`` gives the same order again, and with (seed, epoch, rank, batch) before each later batch.
    Generators of the loader's own are seeded with (seed, epoch), and a sampler with ``set_epoch``
    (``DistributedSampler``) is told the epoch. Resuming reads the batches of the current epoch up to where the stream
    stood, and leaves them out.

    Workers that persist over epochs keep random states that no one can give back: where the data set itself draws
    random numbers leave ``persistent_workers`` off.

    Args:
        make: ``make()`` returns the loader, or the loader itself.
        at: the seed; under several ranks the loader must give each its own share.
    """

    def __init__(self, make: Any, at: Place):
        self.loader: Any = make() if callable(make) and not hasattr(make, "__iter__") else make
        if iter(self.loader) is self.loader:
            raise ValueError(f"{type(self.loader).__name__} can be read once only: pass a list, a DataLoader, or a "
                             "function that returns one")
        self.at = at
        self.epoch, self.index = 0, 0

    def __iter__(self) -> Iterator[Any]:
        self._begin_epoch()
        batches, i = iter(self.loader), 0
        while True:
            if i:       # the sampler draws its order with the first batch
                seed_generators(step_seed(self.at.seed, self.epoch, self.at.rank, i))
            try:
                batch = next(batches)
            except StopIteration:
                break
            i += 1
            if i > self.index:
                self.index = i
                yield batch
        if i == 0:
            raise ValueError(f"the loader of the training data ({type(self.loader).__name__}) is empty")
        self.epoch, self.index = self.epoch + 1, 0

    def _begin_epoch(self) -> None:
        seed = epoch_seed(self.at.seed, self.epoch)
        whole = getattr(self.loader, "batch_sampler", None)
        for part in (self.loader, getattr(self.loader, "sampler", None), whole, getattr(whole, "sampler", None)):
            if hasattr(part, "set_epoch"):
                part.set_epoch(self.epoch)      # type: ignore[union-attr]
            generator = getattr(part, "generator", None)
            if isinstance(generator, torch.Generator):
                generator.manual_seed(seed)
        seed_generators(seed)

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "index": self.index}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.index = int(state["epoch"]), int(state["index"])


def seed_generators(seed: int) -> None:
    """Seed the global generators of torch, Python and, where it is imported, NumPy."""
    torch.manual_seed(seed)
    random.seed(seed)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(seed % 2**32)


def steps_an_epoch(batches: Any, accumulate: int) -> int | None:
    """Steps of an epoch, or None where the stream does not know its length."""
    try:
        n = len(batches) if hasattr(batches, "__len__") else len(batches.loader)
    except (TypeError, AttributeError):
        return None
    return -(-n // accumulate)


def groups(batches: Any, count: int) -> Iterator[list[Any]]:
    """The micro-batches of each step, epoch after epoch; the last step of an epoch may have fewer than ``count``."""
    empty = 0
    while empty < 2:        # a stream that was saved at the end of an epoch has nothing left in it
        group: list[Any] = []
        empty += 1
        for batch in batches:
            empty = 0
            group.append(batch)
            if len(group) == count:
                yield group
                group = []
        if group:
            yield group
    raise ValueError("the training data gave no batch")
