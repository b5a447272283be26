"""Evaluations of a model on data, batch by batch, that all compute one function of the weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from . import batches, perturbed, vectors
from .composite_norms import CompositeNorms, Watch
from .gradient_sum import GradientSum
from .parallel import Ranks

EMPTY = "the data gave no batch: the list, loader or data set is empty, or can be iterated only once (pass list(data))"
NO_TERMS = "no batch of the data has anything to average: weight= is 0 for all, or every target is ignored"


@dataclass(eq=False)
class WeightedBatch:
    """One batch of an objective: ``outputs()`` runs the model, ``loss(outputs)`` is the mean of ``weight`` terms.

    ``total`` is the weight of the batches that all ranks evaluate in the same pass, this one included. The model and
    the loss see a copy of the batch, the same one until the next ``outputs()``: they may change it in place.
    """

    session: EvaluationSession
    data: Any
    weight: float
    index: int
    total: float = 0.0
    _copy: Any = None

    @property
    def model(self) -> nn.Module:
        return self.session.model

    def outputs(self) -> Any:
        self._copy = batches.copied(self.data)
        outputs = self.session.outputs(self._copy, self.index)
        return self.outputs() if self.session.needs_composites() else outputs

    def loss(self, outputs: Any, *, differentiate: bool = True) -> Tensor:
        """The mean loss; ``differentiate``: its derivatives will be taken."""
        loss = self.session.loss(outputs, self.data if self._copy is None else self._copy)
        if self.session.needs_composites():
            loss = self.session.loss(self.outputs(), self._copy)
        if differentiate:
            self.session.refuse_reentrant()
        return loss

    def outputs_and_loss(self) -> tuple[Any, Tensor]:
        """What the model returns and the loss as a function of it, in one graph."""
        outputs, composite = self.outputs(), self.session.composite
        loss = self.loss(outputs)
        if self.session.composite != composite:      # the loss was taken of other outputs
            outputs = self.outputs()
            loss = self.loss(outputs)
        return outputs, loss

    def logits(self, outputs: Any) -> Tensor:
        """The tensor through which the loss depends on the weights."""
        return batches.logits(outputs)

    def add_gradient(self, loss: Tensor, sums: GradientSum, factor: float) -> None:
        """sums ← sums + factor · ∇loss; under FSDP2 of the mean over the batches of this pass, local shards."""
        ranks, w = self.session.ranks, sums.parameters
        if ranks.in_step:
            for i, g in enumerate(ranks.backward(loss * (self.weight / self.total), w)):
                sums.add(i, g, factor)
        elif loss.requires_grad:
            handles = [p.register_hook(sums.hook(i, factor)) for i, p in enumerate(w)]
            try:
                torch.autograd.grad(loss, w, allow_unused=True)
            finally:
                for handle in handles:
                    handle.remove()

    def with_data(self, data: Any) -> WeightedBatch:
        """Other data evaluated as this batch is, with the same random draws; evaluated by this rank alone."""
        return WeightedBatch(self.session, data, self.session.weight(data), self.index)


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


@dataclass(eq=False, kw_only=True)
class EvaluationSession:
    """What the evaluations inside ``Objective.session()`` share, so that all compute one function of the weights.

    The data's order, the random draws of the model, the buffers that a batch finds and the kernels are the same in
    every evaluation; modes, buffers, hooks and random states are restored at the end of ``open()``.

    Attributes:
        weight: n_b of a batch.
        sums: whether batches are summed instead of averaged.
        composite: whether normalization is computed by ``composite_norms``; set where an evaluation needs it.
        loss_checks: functions of the outputs and the loss of a batch, called for each.
        around: the context in which model and loss run.
        model_seed: of the model's random draws, to which the index of the batch is added.
    """

    model: nn.Module
    loss_fn: Callable[..., Any] | None
    data: Any
    forward: Callable[[nn.Module, Any], Any] | None
    weight: Callable[[Any], float]
    sums: bool
    mode: str
    seed: int
    composite: bool
    loss_checks: tuple[Callable[[Any, Tensor], None], ...]
    around: Callable[[], AbstractContextManager[Any]] = nullcontext

    def __post_init__(self) -> None:
        self.devices = devices_of(self.model)
        self.model_seed = self.seed
        self._reentrant = self._had_loss = False

    @contextmanager
    def open(self) -> Iterator[None]:
        """Modes, hooks and states are set inside, and restored at the end."""
        with ExitStack() as stack:
            if torch.is_inference_mode_enabled():
                stack.enter_context(torch.inference_mode(False))
            stack.enter_context(perturbed.unchanged_random_state(self.devices))
            stack.enter_context(perturbed.unchanged_buffers(self.model))
            if self.mode != "as_is":
                stack.enter_context(perturbed.module_mode(self.model, self.mode == "train"))
            if self.mode == "batch_statistics":
                for module in self.model.modules():
                    if isinstance(module, nn.modules.batchnorm._NormBase):
                        module.training = True
            stack.enter_context(batches.eager(self.model))
            stack.enter_context(without_fast_path())
            stack.enter_context(perturbed.without_hooks(*self.model.parameters()))
            self._generators = stack.enter_context(_unchanged_generators(self.data))
            self._buffers = moving_buffers(self.model)
            self._watch: Watch | None = Watch()     # until the first loss to be differentiated
            self._stack = stack
            if self.composite:
                stack.enter_context(CompositeNorms())
            self.ranks = Ranks(self.model)
            stack.enter_context(self.ranks.evaluating())
            yield

    def alone(self, data: Any, loss_fn: Callable[..., Any] | None,
              around: Callable[[], AbstractContextManager[Any]]) -> EvaluationSession:
        """This session on other data, with another loss and inside ``around()``, evaluated by this rank alone.

        Buffers that evaluations find are those the model has now.
        """
        other = copy.copy(self)
        other.data, other.loss_fn, other.around = data, loss_fn, around
        other.ranks, other._buffers = Ranks(nn.Identity()), moving_buffers(self.model)
        return other

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    @property
    def device(self) -> torch.device:
        """Where batches are moved: the device of the first parameter."""
        return next(iter(self.devices), torch.device("cpu"))

    @property
    def evaluated(self) -> bool:
        """Whether a loss was computed in this session."""
        return self._had_loss

    def batches(self) -> Iterator[Any]:
        """The batches as the data give them, in every pass in the same order."""
        _seed(self.seed, self.devices)
        for generator in self._generators:
            generator.manual_seed(self.seed)
        return iter(self.data)

    def weighted_batches(self) -> Iterator[WeightedBatch]:
        """The batches, moved to the model's device, that hold at least one term."""
        if self.ranks.in_step:
            yield from self._in_step()
            return
        empty = True
        for index, batch, n in self._weighted():
            empty = False
            yield self._batch(index, batch, n, n)
        if empty and not self.ranks:
            raise ValueError(NO_TERMS)

    def _weighted(self) -> Iterator[tuple[int, Any, float]]:
        index = None
        for index, batch in enumerate(self.batches()):
            n = self.weight(batch)
            if n > 0:
                yield index, batch, n
        if index is None and not self.ranks:
            raise ValueError(EMPTY)

    def _batch(self, index: int, data: Any, n: float, total: float) -> WeightedBatch:
        of_all = index * self.ranks.world + self.ranks.rank     # no two batches of a pass draw alike
        return WeightedBatch(self, batches.move(data, self.device), n, of_all, total)

    def _in_step(self) -> Iterator[WeightedBatch]:
        """As many batches on every rank: one that has no more repeats its last one, with weight 0."""
        found = self._weighted()
        item = None
        try:
            while True:
                following = next(found, None)
                item = item if following is None else following
                n = 0.0 if following is None else following[2]
                total, without = self.ranks.total(n, float(item is None))
                if total == 0 and not without:
                    return
                if item is None or without:
                    raise ValueError(NO_TERMS if total == 0 else "under FSDP2 all ranks run the model together, and a "
                                     "rank has no batch with anything to average: give each at least one")
                yield self._batch(item[0], item[1], n, total)
        finally:
            self.ranks.reshard()

    def evaluate(self, *, gradient: bool = False, watch: Callable[[WeightedBatch], None] | None = None) -> Pass:
        """One pass over the data, as ``Objective.evaluate`` describes it."""
        w = self.parameters
        sums = GradientSum(w)
        losses: list[Tensor] = []
        weights: list[float] = []
        samples, first, kinds = 0, 1.0, {p.dtype for p in w}
        with torch.enable_grad():
            for batch in self.weighted_batches():
                if watch is not None:
                    watch(batch)
                first = first if losses else batch.total
                outputs = batch.outputs()
                loss = batch.loss(outputs, differentiate=gradient)
                kinds.update(t.dtype for t in batches.tensors(outputs) if t.is_floating_point())
                del outputs
                if gradient:
                    batch.add_gradient(loss, sums, batch.total / first)
                losses.append(loss.detach())
                weights.append(batch.weight)
                samples += batches.samples_in(batch.data) if batch.weight > 0 else 0
                del loss
            each = tuple(float(t.to("cpu", torch.float64)) for t in losses)
            samples = int(self.ranks.total(samples)[0])
            g = self._mean_gradient(sums, first / normalizer(weights, self.ranks, self.sums)) if gradient else []
            loss = self.mean(zip(losses, weights, strict=True))
        eps = max((torch.finfo(kind).eps for kind in (*kinds, *(t.dtype for t in losses))), default=0.0)
        return Pass(loss, each, tuple(weights), samples, eps, g, self._without(sums) if gradient else ())

    def _mean_gradient(self, sums: GradientSum, share: float) -> list[Tensor]:
        g = sums.totals()
        if share != 1:
            vectors.scale(share, g)
        return g if self.ranks.in_step else [self.ranks.sum_(t) for t in g]

    def _without(self, sums: GradientSum) -> tuple[str, ...]:
        """The names of the parameters that no gradient came for."""
        missing = {id(sums.parameters[i]) for i in sums.missing}
        return tuple(name for name, p in self.model.named_parameters() if id(p) in missing) if missing else ()

    def mean(self, losses: Iterable[tuple[Tensor, float]]) -> Tensor:
        """Σ n_b L_b / Σ n_b over all ranks, for this rank's pairs (L_b, n_b): a 0-d float64 tensor."""
        pairs = [(value.detach().to("cpu", torch.float64) * n, n) for value, n in losses if n > 0]
        total = torch.stack([t for t, _ in pairs]).sum() if pairs else torch.zeros((), dtype=torch.float64)
        if self.ranks:
            total = torch.tensor(self.ranks.total(float(total))[0], dtype=torch.float64)
        return total / normalizer((n for _, n in pairs), self.ranks, self.sums)

    def outputs(self, batch: Any, index: int) -> Any:
        """What the model returns for a batch, with the random draws and the buffers that batch ``index`` always has."""
        state = perturbed.RandomState(self.devices)
        _seed(self.model_seed + index, self.devices)
        self._set_buffers()
        try:
            with self.around(), self._watch or nullcontext():
                if self.forward is not None:
                    return self.forward(self.model, batch)
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

    def loss(self, outputs: Any, batch: Any) -> Tensor:
        """The loss of a batch: a 0-d tensor."""
        with self.around(), self._watch or nullcontext():
            if self.forward is not None:
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
        self._had_loss = True
        loss = loss.reshape(())
        for check in self.loss_checks:
            check(outputs, loss)
        return loss

    def _of_mapping(self, outputs: Any, batch: Mapping[str, Any]) -> Any:
        assert self.loss_fn is not None
        if batches.of_torch(self.loss_fn):
            raise ValueError(f"batches are mappings with {', '.join(map(repr, batch))}, and the loss, one of torch.nn, "
                             "takes two tensors: pass loss_fn(outputs, batch), such as lambda out, batch: "
                             "loss(out.logits, batch['labels']), or None for the model's own loss")
        return self.loss_fn(outputs, batch)

    def needs_composites(self) -> bool:
        """Whether what was seen makes it necessary to evaluate again, from now on with composite norms."""
        if self.composite or self._watch is None or not self._watch.needs_composites:
            return False
        self.composite = True
        self._stack.enter_context(CompositeNorms())
        return True

    def refuse_reentrant(self) -> None:
        """After the first loss to be differentiated: raise where autograd has no gradient of a checkpointed part."""
        self._reentrant |= self._watch is not None and self._watch.reentrant
        self._watch = None
        if self._reentrant:
            raise ValueError("a part of this model is checkpointed with use_reentrant=True, which gives autograd.grad "
                             "no gradient of that part: checkpoint with use_reentrant=False, or not at all, for "
                             "measurements")


def normalizer(weights: Iterable[float], ranks: Ranks, sums: bool) -> float:
    """Σ n_b over all ranks, or 1 where the loss is a sum."""
    total, = ranks.total(1.0 if sums else math.fsum(weights))
    if total <= 0:
        raise ValueError(NO_TERMS)
    return 1.0 if sums else total


def devices_of(model: nn.Module) -> list[torch.device]:
    """The devices of the parameters, each once."""
    return list({p.device: None for p in model.parameters()})


def moving_buffers(model: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
    """The buffers of modules in training mode, which an evaluation may change."""
    return [(m, name, b) for m in model.modules() if m.training for name, b in m.named_buffers(recurse=False)]


@contextmanager
def _unchanged_generators(data: Any) -> Iterator[list[torch.Generator]]:
    """The data's own generators, whose states are restored at the end."""
    generators = batches.generators(data)
    states = [g.get_state() for g in generators]
    try:
        yield generators
    finally:
        for g, state in zip(generators, states, strict=True):
            g.set_state(state)


@contextmanager
def without_fast_path() -> Iterator[None]:
    """``nn.TransformerEncoder`` and ``nn.MultiheadAttention`` compute the same with and without gradients inside."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _seed(seed: int, devices: Iterable[torch.device]) -> None:
    """``torch.manual_seed`` for these devices only; it also asks every absent backend, which takes 0.1 ms."""
    torch.default_generator.manual_seed(seed)
    for device in devices:
        if device.type == "cuda":
            torch.cuda.init()
            torch.cuda.default_generators[device.index or 0].manual_seed(seed)
        elif device.type not in ("cpu", "meta"):
            getattr(torch, device.type).manual_seed(seed)
