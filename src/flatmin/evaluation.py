"""Batch by batch: what a model gives for one, what its loss is, and how much it weighs in the mean."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from . import batches, perturbed
from .composite_norms import CompositeNorms, Watch
from .parallel import Ranks

EMPTY = "the data gave no batch: the list, loader or data set is empty, or can be iterated only once (pass list(data))"
NO_TERMS = "no batch of the data has anything to average: weight= is 0 for all, or every target is ignored"


@dataclass(eq=False)
class WeightedBatch:
    """One batch of an objective: ``outputs()`` runs the model, ``loss(outputs)`` is the mean of ``weight`` terms.

    ``total`` is the weight of the batches that other ranks evaluate in the same pass, this one included. The model and
    the loss see a copy of the batch, the same one until the next ``outputs()``: they may change it in place.
    """

    objective: Batchwise
    data: Any
    weight: float
    index: int
    total: float = 0.0
    _copy: Any = None

    def outputs(self) -> Any:
        self._copy = batches.copied(self.data)
        outputs = self.objective._outputs(self._copy, self.index)
        return self.outputs() if self.objective.needs_composites() else outputs

    def loss(self, outputs: Any, *, differentiate: bool = True) -> Tensor:
        """The mean loss; ``differentiate``: its derivatives will be taken."""
        loss = self.objective._loss(outputs, self.data if self._copy is None else self._copy)
        if self.objective.needs_composites():
            loss = self.objective._loss(self.outputs(), self._copy)
        if differentiate:
            self.objective.refuse_reentrant()
        return loss

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


@dataclass(frozen=True)
class Pass:
    """One pass over the data: L(w), L_b(w) and n_b of this rank's batches, and the number of samples on all ranks.

    ``eps`` is that of the least precise numbers among the weights, the outputs and the losses. Where it was asked for,
    also ∇L(w) as local tensors in the order of ``Objective.parameters``, and the names of the parameters that no
    batch's loss depends on.
    """

    loss: Tensor
    losses: tuple[float, ...]
    weights: tuple[float, ...]
    samples: int
    eps: float
    gradient: list[Tensor] = field(default_factory=list)
    missing: tuple[str, ...] = ()


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
        self._generators: list[torch.Generator] = []
        self._buffers: list[tuple[nn.Module, str, Tensor]] = []
        self._composite = False             # whether normalization is taken from composite_norms
        self._watch: Watch | None = None    # from the start of a session until its first loss
        self._reentrant = False
        self.evaluated = False              # whether this session has had a loss
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

    def weighted_batches(self) -> Iterator[WeightedBatch]:
        """The batches, moved to the model's device, that hold at least one term. Use inside ``session()``."""
        assert self._depth, "weighted_batches() outside session()"
        ranks = self.ranks
        if ranks.in_step:
            yield from self._in_step(ranks)
            return
        empty = True
        for index, batch, n in self._weighted():
            empty = False
            yield WeightedBatch(self, batches.move(batch, self.device), n, index * ranks.world + ranks.rank, n)
        if empty and not ranks:
            raise ValueError(NO_TERMS)

    def _weighted(self) -> Iterator[tuple[int, Any, float]]:
        index = None
        for index, batch in enumerate(self.batches()):
            n = self.weight(batch)
            if n > 0:
                yield index, batch, n
        if index is None and not self.ranks:
            raise ValueError(EMPTY)

    def batches(self) -> Iterator[Any]:
        """The batches as the data give them, in every pass of a session in the same order. Use inside ``session()``."""
        assert self._depth, "batches() outside session()"
        _seed(self.seed, self.devices)
        for generator in self._generators:
            generator.manual_seed(self.seed)
        return iter(self.data)

    def _in_step(self, ranks: Ranks) -> Iterator[WeightedBatch]:
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
                    raise ValueError(NO_TERMS if total == 0 else "under FSDP2 all ranks run the model together, and a "
                                     "rank has no batch with anything to average: give each at least one")
                index = item[0] * ranks.world + ranks.rank
                yield WeightedBatch(self, batches.move(item[1], self.device), n, index, total)
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
        self._watch, self._session, self.evaluated = Watch(), stack, False
        if self._composite:
            stack.enter_context(CompositeNorms())

    def needs_composites(self) -> bool:
        """Whether what was seen makes it necessary to evaluate again, from now on with composite norms."""
        if self._composite or self._watch is None or not self._watch.needs_composites:
            return False
        self._composite = True
        self._session.enter_context(CompositeNorms())
        return True

    def refuse_reentrant(self) -> None:
        """After a loss of a session: raise where autograd has no gradient of a checkpointed part."""
        self._reentrant |= self._watch is not None and self._watch.reentrant
        self._watch = None
        if self._reentrant:
            raise ValueError("a part of this model is checkpointed with use_reentrant=True, which gives autograd.grad "
                             "no gradient of that part: checkpoint with use_reentrant=False, or not at all, for "
                             "measurements")

    def moving_buffers(self) -> list[tuple[nn.Module, str, Tensor]]:
        """The buffers of modules in training mode, which an evaluation may change."""
        return [(m, name, b) for m in self.model.modules() if m.training for name, b in m.named_buffers(recurse=False)]

    def _outputs(self, batch: Any, index: int) -> Any:
        state = perturbed.RandomState(self.devices)
        _seed(self._model_seed + index, self.devices)
        self._set_buffers()
        try:
            with self._around(), self._watch or nullcontext():
                if self._forward is not None:
                    return self._forward(self.model, batch)
                return self.model(**batch) if isinstance(batch, Mapping) else self.model(batch[0])
        finally:
            state.set()

    def _set_buffers(self) -> None:
        """Modules in training mode find their buffers as they were, whatever was evaluated before: L is one function.

        By new tensors in their place: a graph that is kept may need the values of those there.
        """
        copies = {id(b): b.clone() for _, _, b in self._buffers}
        for module, name, b in self._buffers:
            setattr(module, name, copies[id(b)])

    def _loss(self, outputs: Any, batch: Any) -> Tensor:
        with self._around(), self._watch or nullcontext():
            if self._forward is not None:
                loss = self.loss_fn(outputs, batch)  # type: ignore[misc]
            elif isinstance(batch, Mapping):
                loss = batches.own_loss(outputs, batch) if self.loss_fn is None else self._of_mapping(outputs, batch)
            elif self.loss_fn is None:
                raise ValueError("loss_fn=None is for batches that are mappings; pass loss_fn(outputs, targets)")
            else:
                loss = self.loss_fn(batches.logits(outputs) if batches.of_torch(self.loss_fn) else outputs, batch[1])
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise ValueError("the loss of a batch must be one number, its mean over the batch "
                             f"(got {tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__})")
        self.evaluated = True
        return loss.reshape(())

    def _of_mapping(self, outputs: Any, batch: Mapping[str, Any]) -> Any:
        assert self.loss_fn is not None
        if batches.of_torch(self.loss_fn):
            raise ValueError(f"batches are mappings with {', '.join(map(repr, batch))}, and the loss, one of torch.nn, "
                             "takes two tensors: pass loss_fn(outputs, batch), such as lambda out, batch: "
                             "loss(out.logits, batch['labels']), or None for the model's own loss")
        return self.loss_fn(outputs, batch)


def _seed(seed: int, devices: Iterable[torch.device]) -> None:
    """``torch.manual_seed`` for these devices only; it also asks every absent backend, which takes 0.1 ms."""
    torch.default_generator.manual_seed(seed)
    for device in devices:
        if device.type == "cuda":
            torch.cuda.init()
            torch.cuda.default_generators[device.index or 0].manual_seed(seed)
        elif device.type not in ("cpu", "meta"):
            getattr(torch, device.type).manual_seed(seed)
