"""Batch by batch: what a model gives for one, what its loss is, and how much it weighs in the mean."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import batches, perturbed
from .composite_norms import CompositeNorms, Watch
from .ranks import Ranks

EMPTY = ("the data gave no batch with anything to average. If they can be iterated only once, pass list(data) or the "
         "DataLoader itself")


@dataclass(frozen=True)
class Term:
    """One batch of an objective: ``outputs()`` runs the model, ``loss(outputs)`` is the mean of ``weight`` terms.

    ``total`` is the weight of the batches that other ranks evaluate in the same pass, this one included.
    """

    objective: Batchwise
    batch: Any
    weight: float
    index: int
    total: float = 0.0

    def outputs(self) -> Any:
        return self.objective._outputs(self.batch, self.index)

    def loss(self, outputs: Any) -> Tensor:
        return self.objective._loss(outputs, self.batch, self.index)

    def outputs_and_loss(self) -> tuple[Any, Tensor]:
        """What the model returns and the loss as a function of it, in one graph."""
        outputs, composite = self.outputs(), self.objective._composite
        loss = self.loss(outputs)
        if self.objective._composite != composite:      # the loss was taken of other outputs
            outputs = self.outputs()
            loss = self.loss(outputs)
        return outputs, loss

    def logits(self, outputs: Any) -> Tensor:
        """The tensor through which the loss depends on the weights."""
        return batches.logits(outputs)


class Batchwise:
    """A model and a loss bound to data that can be read again and again; ``Objective`` is the mean of it."""

    def __init__(self, model: nn.Module, loss_fn: Callable[..., Tensor] | None, data: Any,
                 forward: Callable[[nn.Module, Any], Any] | None, weight: Callable[[Any], Any] | None, seed: int):
        self.model, self.loss_fn, self.data, self.seed = model, loss_fn, data, seed
        self._forward, self._weight = forward, weight
        self._shift = batches.predicts_next_label(model)
        self.sums = weight is None and batches.option(loss_fn, "reduction") == "sum"
        self._depth = 0
        self._devices: list[torch.device] | None = None     # known inside a session
        self._model_seed = seed
        self._ranks: Ranks | None = None
        self._composite = False             # whether normalization is taken from composite_norms
        self._watch: Watch | None = None    # from the start of a session until its first loss
        self._reentrant = False
        self.product_checks: dict[Any, Any] = {}    # what flatmin.curvature has found out about its products
        self._session = ExitStack()
        self._around: Callable[[], AbstractContextManager[Any]] = nullcontext   # what model and loss run in

    @property
    def ranks(self) -> Ranks:
        """The processes that share the data."""
        return Ranks(self.model) if self._ranks is None else self._ranks

    @property
    def devices(self) -> list[torch.device]:
        if self._devices is None or not self._depth:
            self._devices = list({p.device: None for p in self.model.parameters()})
        return self._devices

    @property
    def device(self) -> torch.device:
        """Where batches are moved: the device of the first parameter."""
        return next(iter(self.devices), torch.device("cpu"))

    def terms(self) -> Iterator[Term]:
        """The batches, moved to the model's device, that hold at least one term. Use inside ``session()``."""
        assert self._depth, "terms() outside session()"
        _seed(self.seed, self.devices)
        ranks = self.ranks
        if ranks.in_step:
            yield from self._in_step(ranks)
            return
        empty = True
        for index, batch, n in self._weighted():
            empty = False
            yield Term(self, batches.move(batch, self.device), n, index * ranks.world + ranks.rank, n)
        if empty and not ranks:
            raise ValueError(EMPTY)

    def _weighted(self) -> Iterator[tuple[int, Any, float]]:
        for index, batch in enumerate(self.data):
            n = self.weight(batch)
            if n > 0:
                yield index, batch, n

    def _in_step(self, ranks: Ranks) -> Iterator[Term]:
        """As many batches on every rank: one that has no more repeats its last one, with weight 0."""
        found = self._weighted()
        item = None
        try:
            while True:
                following = next(found, None)
                item = item if following is None else following
                n = 0.0 if following is None else following[2]
                total, without = ranks.total(n, float(item is None))
                if total == 0 and not without:
                    return
                if item is None or without:
                    raise ValueError(EMPTY if total == 0 else "under FSDP2 all ranks run the model together, and a "
                                     "rank has no batch with anything to average: give each at least one")
                yield Term(self, batches.move(item[1], self.device), n, item[0] * ranks.world + ranks.rank, total)
        finally:
            ranks.reshard()

    def weight(self, batch: Any) -> float:
        """n_b: how many terms the loss of a batch is a mean of."""
        if self._weight is not None:
            n = float(self._weight(batch))
        else:
            n = batches.terms(batch, self.loss_fn, self._shift)
        if not (math.isfinite(n) and n >= 0):
            raise ValueError(f"the weight of a batch must be finite and not negative, got {n}")
        return 1.0 if self.sums and n > 0 else n

    def _watched(self, stack: ExitStack) -> None:
        """At the start of a session: look on at its first evaluation; ``stack`` ends with the session."""
        self._watch, self._session = Watch(), stack
        if self._composite:
            stack.enter_context(CompositeNorms())

    def _changes(self) -> bool:
        """Whether what was seen makes it necessary to evaluate again, now with composite norms."""
        if self._composite or self._watch is None or not self._watch.needs_composites:
            return False
        self._composite = True
        self._session.enter_context(CompositeNorms())
        return True

    def _outputs(self, batch: Any, index: int) -> Any:
        state = perturbed.RandomState(self.devices)
        _seed(self._model_seed + index, self.devices)
        try:
            with self._around(), self._watch or nullcontext():
                if self._forward is not None:
                    outputs = self._forward(self.model, batch)
                else:
                    outputs = self.model(**batch) if isinstance(batch, Mapping) else self.model(batch[0])
        finally:
            state.set()
        return self._outputs(batch, index) if self._changes() else outputs

    def _loss(self, outputs: Any, batch: Any, index: int = 0) -> Tensor:
        with self._around(), self._watch or nullcontext():
            if self._forward is not None:
                loss = self.loss_fn(outputs, batch)  # type: ignore[misc]
            elif isinstance(batch, Mapping):
                loss = batches.own_loss(outputs) if self.loss_fn is None else self.loss_fn(outputs, batch)
            elif self.loss_fn is None:
                raise ValueError("loss_fn=None is for batches that are mappings; pass loss_fn(outputs, targets)")
            else:
                loss = self.loss_fn(outputs, batch[1])
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise ValueError("the loss of a batch must be one number, its mean over the batch "
                             f"(got {tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__})")
        if self._changes():
            return self._loss(self._outputs(batch, index), batch, index)
        self._reentrant |= self._watch is not None and self._watch.reentrant
        self._watch = None
        if self._reentrant and torch.is_grad_enabled():
            raise ValueError("a part of this model is checkpointed with use_reentrant=True, which gives autograd.grad "
                             "no gradient of that part: checkpoint with use_reentrant=False, or not at all, for "
                             "measurements")
        return loss.reshape(())


def _seed(seed: int, devices: Iterable[torch.device]) -> None:
    """``torch.manual_seed`` for these devices only; it also asks every absent backend, which takes 0.1 ms."""
    torch.default_generator.manual_seed(seed)
    for device in devices:
        if device.type == "cuda":
            torch.cuda.init()
            torch.cuda.default_generators[device.index or 0].manual_seed(seed)
        elif device.type not in ("cpu", "meta"):
            getattr(torch, device.type).manual_seed(seed)
