"""Objective: a model and a loss bound to data, as the one function of the weights that every measurement consumes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from . import batches, checks, perturbed, vectors
from .evaluation import NO_TERMS, Batchwise, Pass, WeightedBatch
from .parallel import Ranks
from .results import FEWEST_BATCHES

ORDER = "write Objective(model, loss_fn, data)"

Mode = Literal["eval", "train", "batch_statistics", "as_is"]


class Objective(Batchwise):
    """The mean loss of a model over data, L(w) = Σ_b n_b L_b(w) / Σ_b n_b, with n_b the terms that batch b averages.

    Where the model is or contains DDP or FSDP2 modules, every rank passes its own share of the data and calls the same
    methods; sums are over all ranks, and results are equal on them (FSDP2: each rank's shard of them).

    Args:
        model: any module. It is only evaluated: weights, ``.grad``, buffers, mode flags and random state are bitwise
            the same after every call.
        loss_fn: ``loss_fn(model(inputs), targets)``, a mean; with ``forward=``, ``loss_fn(outputs, batch)``. None where
            batches are mappings and ``model(**batch)`` returns a ``loss``. A module with ``reduction="sum"`` is summed
            over batches instead of averaged.
        data: a batch, a list of batches, or something that can be iterated again and again, such as a ``DataLoader``.
            A batch is ``(inputs, targets)``, a list of two tensors, or a mapping (``BatchEncoding`` included).
        forward: ``forward(model, batch) -> outputs``, for any other kind of batch.
        weight: ``weight(batch) -> n_b``. By default: integer targets count those that are not ``ignore_index`` (that of
            the loss, else -100), by their class weights where the loss has them; other targets count their elements;
            a mapping counts its ``labels``, without the first of each sequence where the model is a causal language
            model, which predicts labels[..., 1:]; batches without targets count samples.
        mode: "eval" (the default: running statistics, no dropout), "train" (batch statistics, dropout with one fixed
            mask a batch, and buffers that each batch finds as they are now), "batch_statistics" (eval, but with the
            batch statistics of normalization layers) or "as_is" (the flags of the modules at the moment of the call).
        seed: for whatever the model or the data draw from torch's generators, so that every evaluation draws the same.
        check: whether measurements first make sure that two evaluations agree.

    Raises:
        TypeError: for a model that is no module, or swapped arguments.
        ValueError: for one-shot iterators, data sets without a loader, or batches of an unknown form.

    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> objective = Objective(model, torch.nn.MSELoss(), (torch.eye(2), torch.zeros(2, 1)))
    >>> bool(objective.value() == model.weight.square().mean())
    True
    """

    def __init__(self, model: nn.Module, loss_fn: Callable[..., Tensor] | None, data: Any, *,
                 forward: Callable[[nn.Module, Any], Any] | None = None,
                 weight: Callable[[Any], Any] | None = None, mode: Mode = "eval", seed: int = 0, check: bool = True):
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}: {ORDER}")
        if loss_fn is not None and not callable(loss_fn):
            raise TypeError(f"loss_fn must be a function of outputs and targets, got {type(loss_fn).__name__}: {ORDER}")
        if isinstance(loss_fn, nn.Module) and any(True for _ in loss_fn.parameters()) and \
                not any(True for _ in model.parameters()):
            raise TypeError(f"the model {type(model).__name__} has no parameters and the loss "
                            f"{type(loss_fn).__name__} has some: {ORDER}")
        if mode not in ("eval", "train", "batch_statistics", "as_is"):
            raise ValueError(f'mode must be "eval", "train", "batch_statistics" or "as_is", got {mode!r}')
        if forward is not None and loss_fn is None:
            raise ValueError("forward= needs a loss: loss_fn(outputs, batch)")
        checks.refuse_parameters(model)
        super().__init__(model, loss_fn, batches.as_data(data, any_form=forward is not None), forward, weight, seed)
        self.mode, self._check = mode, check

    def __repr__(self) -> str:
        loss = "the model's own loss" if self.loss_fn is None else getattr(self.loss_fn, "__name__", None) or \
            type(batches.base_function(self.loss_fn)).__name__
        return (f"Objective({type(batches.unwrapped(self.model)).__name__}, {loss}, {batches.described(self.data)}, "
                f"mode={self.mode!r})")

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What operators act on: the parameters that require a gradient, in the order of ``model.parameters()``."""
        if not self._depth:
            self.ranks.reshard()
        return [p for p in self.model.parameters() if p.requires_grad]

    @property
    def single(self) -> bool:
        """Whether the data are one batch, as far as can be told without reading them."""
        return isinstance(self.data, (list, batches.Single)) and len(self.data) == 1

    def value(self) -> Tensor:
        """L(w): a 0-d float64 tensor (batches are summed in float64)."""
        return self.evaluate().loss

    def gradient(self) -> list[Tensor]:
        """∇L(w), in the order of ``model.parameters()``; zeros where a parameter is unused or frozen."""
        w = self.parameters
        found = {id(p): g.to(p.dtype) for p, g in zip(w, self.evaluate(gradient=True).gradient, strict=True)}
        return [vectors.like(found[id(p)], p) if id(p) in found else torch.zeros_like(p)
                for p in self.model.parameters()]

    def evaluate(self, *, gradient: bool = False, watch: Callable[[WeightedBatch], None] | None = None) -> Pass:
        """L(w), each batch's own loss, and with ``gradient`` ∇L(w), in one pass over the data.

        With and without a gradient, autograd records every batch, so that the model computes the same; the graph of a
        batch is freed before the next. The gradient takes the memory of one gradient and one tensor more: each
        parameter's is taken out of the backward pass as soon as it is ready. Half precisions are summed in float32.
        ``.grad`` is not touched. ``watch`` is called with each batch before it is evaluated.
        """
        w = self.parameters
        sums: list[Tensor | None] = [None] * len(w)
        losses: list[Tensor] = []
        weights: list[float] = []
        samples, first, kinds = 0, 1.0, {p.dtype for p in w}
        with self.session(), torch.enable_grad():
            for batch in self.weighted_batches():
                if watch is not None:
                    watch(batch)
                first = first if losses else batch.total
                outputs = batch.outputs()
                loss = batch.loss(outputs, differentiate=gradient)
                kinds.update(t.dtype for t in batches.tensors(outputs) if t.is_floating_point())
                del outputs
                if gradient:
                    self._add_gradient(sums, loss, batch, w, batch.total / first)
                losses.append(loss.detach())
                weights.append(batch.weight)
                samples += batches.samples_in(batch.data) if batch.weight > 0 else 0
                del loss
            each = tuple(float(t.to("cpu", torch.float64)) for t in losses)
            samples = int(self.ranks.total(samples)[0])
            g = self._mean_gradient(sums, w, first / self.normalizer(weights)) if gradient else []
            loss = self._total(zip(losses, weights, strict=True))
        eps = max((torch.finfo(kind).eps for kind in (*kinds, *(t.dtype for t in losses))), default=0.0)
        return Pass(loss, each, tuple(weights), samples, eps, g, self._without(sums, w) if gradient else ())

    def _without(self, sums: list[Tensor | None], w: list[nn.Parameter]) -> tuple[str, ...]:
        """The names of the parameters that no gradient came for."""
        missing = {id(p) for p, t in zip(w, sums, strict=True) if t is None}
        return tuple(name for name, p in self.model.named_parameters() if id(p) in missing) if missing else ()

    def _add_gradient(self, sums: list[Tensor | None], loss: Tensor, batch: WeightedBatch, w: list[nn.Parameter],
                      share: float) -> None:
        """sums ← sums + share · ∇loss; under FSDP2 the mean over the batches of this pass, local shards."""
        if self.ranks.in_step:
            for i, row in enumerate(self.ranks.backward(loss * (batch.weight / batch.total), w)):
                summing(sums, i, w[i], share)(row)
        elif loss.requires_grad:
            handles = [p.register_hook(summing(sums, i, p, share)) for i, p in enumerate(w)]
            try:
                torch.autograd.grad(loss, w, allow_unused=True)
            finally:
                for handle in handles:
                    handle.remove()

    def _mean_gradient(self, sums: list[Tensor | None], w: list[nn.Parameter], share: float) -> list[Tensor]:
        g = [torch.zeros_like(vectors.local(p.detach())) if t is None else t for p, t in zip(w, sums, strict=True)]
        if share != 1:
            vectors.scale(share, g)
        return g if self.ranks.in_step else [self.ranks.sum_(t) for t in g]

    def data_stderr(self, changes: Sequence[float], weights: Sequence[float]) -> float:
        """The standard error, over batches, of a mean over batches; nan where there are fewer than five.

        √(B/(B − 1) Σ n_b² (d_b − d)²) / Σ n_b for d = Σ n_b d_b / Σ n_b, over all ranks: how much d would change with
        other data, if the batches are independent draws.

        Args:
            changes: d_b of this rank's batches, in the order of ``Pass.losses``.
            weights: n_b.
        """
        rows = [(d, n) for d, n in zip(changes, weights, strict=True) if n > 0]
        count, total, weighted = self.ranks.total(len(rows), math.fsum(n for _, n in rows),
                                                  math.fsum(n * d for d, n in rows))
        if count < FEWEST_BATCHES:
            return math.nan
        mean = weighted / total
        spread, = self.ranks.total(math.fsum((n * (d - mean)) ** 2 for d, n in rows))
        error = math.sqrt(count / (count - 1) * spread)
        return error if self.sums else error / total

    def normalizer(self, weights: Iterable[float]) -> float:
        """Σ n_b over all ranks, or 1 where the loss is a sum."""
        total, = self.ranks.total(1.0 if self.sums else math.fsum(weights))
        if total <= 0:
            raise ValueError(NO_TERMS)
        return 1.0 if self.sums else total

    @contextmanager
    def session(self, *, check: bool = False) -> Iterator[None]:
        """Several evaluations that share one setting of modes and give everything back at the end.

        Inside, every evaluation of the model is the same computation: attention takes its plain path, and a loader
        draws the same order in every pass. ``check`` calls ``self.check()`` first.
        """
        if self._depth:
            if check:
                self.check()
            yield
            return
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
            stack.enter_context(self._held_generators())
            self._buffers = self.moving_buffers()
            self._watched(stack)
            self._ranks = Ranks(self.model)
            stack.enter_context(self._ranks.evaluating())
            self._depth = 1
            try:
                if check:
                    self.check()
                yield
            finally:
                self._depth, self._ranks, self._buffers, self._watch = 0, None, [], None

    @contextmanager
    def _held_generators(self) -> Iterator[None]:
        """The data's own generators are at the same state when each pass begins, and where they were at the end."""
        self._generators = batches.generators(self.data)
        states = [g.get_state() for g in self._generators]
        try:
            yield
        finally:
            for g, state in zip(self._generators, states, strict=True):
                g.set_state(state)
            self._generators = []

    def check(self) -> None:
        """Raise a ValueError that names the cause where L is not one function of the weights, or not the mean stated.

        Two evaluations at the same weights must agree and leave the weights as they are; and where two batches can be
        concatenated and the model treats samples independently, the loss of both together must be their mean by
        ``weight``. Runs at most once, and not at all with ``check=False``. In the modes "train" and "as_is" the
        model's own draws are the same in both evaluations; in the others it must not draw anything that matters.
        """
        if not self._check:
            return
        with self.session():
            checks.check(self)
        self._check = False

    def _total(self, losses: Iterable[tuple[Tensor, float]]) -> Tensor:
        rows = [(value.detach().to("cpu", torch.float64) * n, n) for value, n in losses if n > 0]
        total = torch.stack([part for part, _ in rows]).sum() if rows else torch.zeros((), dtype=torch.float64)
        if self.ranks:
            total = torch.tensor(self.ranks.total(float(total))[0], dtype=torch.float64)
        return total / self.normalizer(n for _, n in rows)


def summing(sums: list[Tensor | None], i: int, p: nn.Parameter, share: float) -> Callable[[Tensor], Tensor | None]:
    """A hook for ``p``: sums[i] ← sums[i] + share · gradient, and a zero that takes no memory in its place."""
    @torch.no_grad()
    def hook(g: Tensor) -> Tensor | None:
        row = vectors.local(vectors.matched(g, p))
        row = row.to_dense() if row.layout is not torch.strided else row
        total = sums[i]
        if total is None:
            like = vectors.local(p.detach())
            total = torch.empty_like(like, dtype=torch.float32 if like.dtype in vectors.HALF else like.dtype)
            sums[i] = torch.mul(row, share, out=total) if row.dtype == total.dtype else total.copy_(row).mul_(share)
        else:
            total.add_(row, alpha=share)
        plain = g.layout is torch.strided and not vectors.is_sharded(g)
        return g.new_zeros(()).expand_as(g) if plain else None

    return hook


@contextmanager
def without_fast_path() -> Iterator[None]:
    """``nn.TransformerEncoder`` and ``nn.MultiheadAttention`` compute the same with and without gradients inside."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
