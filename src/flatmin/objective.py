"""Objective: a model and a loss bound to data, as the one function of the weights that every measurement consumes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from . import batches, perturbed, vectors
from .evaluation import EMPTY, Batchwise, Term
from .ranks import Ranks

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
        mode: "eval" (the default: running statistics, no dropout), "train" (batch statistics, and dropout with one
            fixed mask a batch), "batch_statistics" (eval, but with the batch statistics of normalization layers) or
            "as_is" (the flags of the modules at the moment of the call).
        seed: for whatever the model or the data draw from torch's generators, so that every evaluation draws the same.
        check: whether measurements first make sure that two evaluations agree.

    Raises:
        ValueError: for one-shot iterators, data sets without a loader, or batches of an unknown form.

    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> objective = Objective(model, torch.nn.MSELoss(), (torch.eye(2), torch.zeros(2, 1)))
    >>> bool(objective.value() == model.weight.square().mean())
    True
    """

    def __init__(self, model: nn.Module, loss_fn: Callable[..., Tensor] | None, data: Any, *,
                 forward: Callable[[nn.Module, Any], Any] | None = None,
                 weight: Callable[[Any], Any] | None = None, mode: Mode = "eval", seed: int = 0, check: bool = True):
        if mode not in ("eval", "train", "batch_statistics", "as_is"):
            raise ValueError(f'mode must be "eval", "train", "batch_statistics" or "as_is", got {mode!r}')
        if forward is not None and loss_fn is None:
            raise ValueError("forward= needs a loss: loss_fn(outputs, batch)")
        super().__init__(model, loss_fn, batches.as_data(data, any_form=forward is not None), forward, weight, seed)
        self.mode, self._check = mode, check

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What operators act on: the parameters that require a gradient, in the order of ``model.parameters()``."""
        if not self._depth:
            self.ranks.reshard()
        return [p for p in self.model.parameters() if p.requires_grad]

    @property
    def single(self) -> bool:
        """Whether the data are one batch, as far as can be told without reading them."""
        return hasattr(self.data, "__len__") and len(self.data) == 1

    def value(self) -> Tensor:
        """L(w): a 0-d float64 tensor (batches are summed in float64)."""
        with self.session():
            try:
                with torch.no_grad():
                    return self._total((t.loss(t.outputs()), t.weight) for t in self.terms())
            except RuntimeError as error:
                if "does not require grad" not in str(error):
                    raise
            with torch.enable_grad():   # a gradient penalty differentiates inside
                return self._total((t.loss(t.outputs()).detach(), t.weight) for t in self.terms())

    def gradient(self) -> list[Tensor]:
        """∇L(w), in the order of ``model.parameters()``; zeros where a parameter is unused or frozen."""
        found = dict(zip(map(id, self.parameters), self.trainable_gradient()[1], strict=True))
        return [vectors.like(found[id(p)], p) if id(p) in found else torch.zeros_like(p)
                for p in self.model.parameters()]

    def trainable_gradient(self) -> tuple[Tensor, list[Tensor]]:
        """L(w) and ∇L(w) over ``parameters`` (this rank's shards of it), in one pass over the data."""
        w = self.parameters
        total: list[Tensor] | None = None
        losses: list[tuple[Tensor, float]] = []
        first = 1.0
        with self.session(), torch.enable_grad():
            for term in self.terms():
                loss = term.loss(term.outputs())
                first = first if losses else term.total
                total = accumulate(total, self._term_gradient(loss, term, w), term.total / first)
                losses.append((loss.detach(), term.weight))
            if total is None:
                total = [torch.zeros_like(vectors.local(p.detach())) for p in w]
            g = average(total, first / self.normalizer(n for _, n in losses), w)
            if self.ranks and not self.ranks.in_step:
                g = [self.ranks.sum_(t) for t in g]
            return self._total(losses), g

    def _term_gradient(self, loss: Tensor, term: Term, w: list[nn.Parameter]) -> Sequence[Tensor]:
        """∇ of one batch's loss; under FSDP2 the mean over the batches of this pass, local shards."""
        if self.ranks.in_step:
            return self.ranks.backward(loss * (term.weight / term.total), w)
        if not loss.requires_grad:
            return [torch.zeros_like(p) for p in w]
        return torch.autograd.grad(loss, w, allow_unused=True, materialize_grads=True)

    def normalizer(self, weights: Iterable[float]) -> float:
        """Σ n_b over all ranks, or 1 where the loss is a sum."""
        total, = self.ranks.total(1.0 if self.sums else math.fsum(weights))
        if total <= 0:
            raise ValueError(EMPTY)
        return 1.0 if self.sums else total

    @contextmanager
    def session(self) -> Iterator[None]:
        """Several evaluations that share one setting of modes and give everything back at the end."""
        if self._depth:
            yield
            return
        with ExitStack() as stack:
            stack.enter_context(perturbed.unchanged_random_state(self.devices))
            stack.enter_context(perturbed.unchanged_buffers(self.model))
            if self.mode != "as_is":
                stack.enter_context(perturbed.module_mode(self.model, self.mode == "train"))
            if self.mode == "batch_statistics":
                for module in self.model.modules():
                    if isinstance(module, nn.modules.batchnorm._NormBase):
                        module.training = True
            stack.enter_context(batches.eager(self.model))
            self._watched(stack)
            self._ranks = Ranks(self.model)
            stack.enter_context(self._ranks.evaluating())
            self._depth = 1
            try:
                yield
            finally:
                self._depth, self._ranks, self._watch = 0, None, None

    def check(self) -> None:
        """Raise a ValueError that names the cause if two evaluations at the same weights differ.

        Runs at most once, and not at all with ``check=False``. In the modes "train" and "as_is" the model's own draws
        are the same in both evaluations; in the others it must not draw anything that matters.
        """
        if not self._check:
            return
        with self.session():
            first = self.value()
            try:
                self._model_seed += 1 if self.mode in ("eval", "batch_statistics") else 0
                second = self.value()
                if not same(first, second, self.parameters):
                    from .batches import culprit

                    raise ValueError(f"two evaluations at the same weights gave {first:.9g} and {second:.9g}: "
                                     f"{culprit(self)}")
            finally:
                self._model_seed = self.seed
        self._check = False

    def _total(self, losses: Iterable[tuple[Tensor, float]]) -> Tensor:
        rows = [(value.detach().to("cpu", torch.float64) * n, n) for value, n in losses if n > 0]
        total = torch.stack([part for part, _ in rows]).sum() if rows else torch.zeros((), dtype=torch.float64)
        if self.ranks:
            total = torch.tensor(self.ranks.total(float(total))[0], dtype=torch.float64)
        return total / self.normalizer(n for _, n in rows)


def accumulate(total: list[Tensor] | None, g: Iterable[Tensor], weight: float) -> list[Tensor]:
    """total + weight · g, as new tensors; half precisions are summed in float32."""
    g = [t.to_dense() if t.is_sparse else t for t in g]
    rows = [t.detach().float() if t.dtype in perturbed.HALF else t.detach() for t in g]
    return rows if total is None else list(torch._foreach_add(total, rows, alpha=weight))


def average(total: list[Tensor], share: float, like: Iterable[Tensor]) -> list[Tensor]:
    """share · total, in the dtype of the parameters; tensors that share no memory."""
    out = list(torch._foreach_mul(total, share)) if share != 1 else [t.clone() for t in total]
    return [t.to(p.dtype) for t, p in zip(out, like, strict=True)]


def same(first: Tensor, second: Tensor, parameters: Iterable[Tensor]) -> bool:
    """Equal up to the order in which a loader or a device adds."""
    tolerance = max((torch.finfo(p.dtype).eps for p in parameters), default=1e-7) * 50
    return bool((first - second).abs() <= tolerance * first.abs().clamp(min=torch.finfo(torch.float64).tiny)) \
        or bool(first.isnan() & second.isnan())
