"""Objective: a model and a loss bound to data, as the one function of the weights that every measurement consumes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from . import batches, checks, parallel
from .evaluation import EvaluationSession, Pass, WeightedBatch, devices_of, normalizer
from .parallel import Ranks
from .results import FEWEST_BATCHES, weighted_mean

ORDER = "write Objective(model, loss_fn, data)"

Mode = Literal["eval", "train", "batch_statistics", "as_is"]


@final
class Objective:
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
        self.model, self.loss_fn, self.data = model, loss_fn, batches.as_data(data, any_form=forward is not None)
        self.mode, self.seed = mode, seed
        self.sums = weight is None and batches.option(loss_fn, "reduction") == "sum"
        self._forward, self._weight, self._check = forward, weight, check
        self._shift = batches.predicts_next_label(model)
        self._session: EvaluationSession | None = None
        self._composite = False             # whether normalization is computed by composite_norms
        self._loss_checks: tuple[Callable[[Any, Tensor], None], ...] = ()
        self.product_checks: dict[Any, Any] = {}    # what flatmin.curvature has found out about its products

    def __repr__(self) -> str:
        loss = "the model's own loss" if self.loss_fn is None else getattr(self.loss_fn, "__name__", None) or \
            type(batches.base_function(self.loss_fn)).__name__
        return (f"Objective({type(parallel.unwrapped(self.model)).__name__}, {loss}, {batches.described(self.data)}, "
                f"mode={self.mode!r})")

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What operators act on: the parameters that require a gradient, in the order of ``model.parameters()``."""
        if self._session is None:
            self.ranks.reshard()
        return [p for p in self.model.parameters() if p.requires_grad]

    @property
    def single(self) -> bool:
        """Whether the data are one batch, as far as can be told without reading them."""
        return isinstance(self.data, (list, batches.Single)) and len(self.data) == 1

    @property
    def counts_tokens(self) -> bool:
        """Whether n_b counts the tokens that a causal language model predicts."""
        return self._shift and self._weight is None and not self.sums

    @property
    def weighs_itself(self) -> bool:
        """Whether n_b is counted by the rule stated for ``weight``, rather than by the caller's function."""
        return self._weight is None

    @property
    def ranks(self) -> Ranks:
        """The processes that share the data."""
        return Ranks(self.model) if self._session is None else self._session.ranks

    @property
    def devices(self) -> list[torch.device]:
        return devices_of(self.model) if self._session is None else self._session.devices

    @property
    def device(self) -> torch.device:
        """Where batches are moved: the device of the first parameter."""
        return next(iter(self.devices), torch.device("cpu"))

    def value(self) -> Tensor:
        """L(w): a 0-d float64 tensor (batches are summed in float64)."""
        return self.evaluate().loss

    def gradient(self) -> list[Tensor]:
        """∇L(w), in the order of ``model.parameters()``; zeros where a parameter is unused or frozen."""
        w = self.parameters
        found = {id(p): g.to(p.dtype) for p, g in zip(w, self.evaluate(gradient=True).gradient, strict=True)}
        return [parallel.like(found[id(p)], p) if id(p) in found else torch.zeros_like(p)
                for p in self.model.parameters()]

    def evaluate(self, *, gradient: bool = False, watch: Callable[[WeightedBatch], None] | None = None) -> Pass:
        """L(w), each batch's own loss, and with ``gradient`` ∇L(w), in one pass over the data.

        With and without a gradient, autograd records every batch, so that the model computes the same; the graph of a
        batch is freed before the next. The gradient takes the memory of one gradient and one tensor more: each
        parameter's is taken out of the backward pass as soon as it is ready. Half precisions are summed in float32.
        ``.grad`` is not touched. ``watch`` is called with each batch before it is evaluated.
        """
        with self.session():
            return self._inside.evaluate(gradient=gradient, watch=watch)

    def data_stderr(self, changes: Sequence[float], weights: Sequence[float]) -> float:
        """The standard error, over batches, of a mean over batches; nan where there are fewer than five.

        √(B/(B − 1) Σ n_b² (d_b − d)²) / Σ n_b for d = Σ n_b d_b / Σ n_b, over all ranks: how much d would change with
        other data, if the batches are independent draws. Where the loss is a sum, the error of Σ d_b.

        Args:
            changes: d_b of this rank's batches, in the order of ``Pass.losses``.
            weights: n_b.
        """
        pairs = [(d, n) for d, n in zip(changes, weights, strict=True) if n > 0]
        changes, weights = [d for d, _ in pairs], [n for _, n in pairs]
        ranks = self.ranks
        error = weighted_mean(changes, weights, fewest=FEWEST_BATCHES, total=ranks.total if ranks else None)[1]
        return error * ranks.total(math.fsum(weights))[0] if self.sums else error

    def weight(self, batch: Any) -> float:
        """n_b: how many terms the loss of a batch is a mean of."""
        if self._weight is not None:
            n = float(self._weight(batch))
        else:
            n = batches.terms(batch, self.loss_fn, self._shift)
        if not (math.isfinite(n) and n >= 0):
            raise ValueError(f"the weight of a batch must be finite and not negative, got {n}")
        return 1.0 if self.sums and n > 0 else n

    def normalizer(self, weights: Iterable[float]) -> float:
        """Σ n_b over all ranks, or 1 where the loss is a sum."""
        return normalizer(weights, self.ranks, self.sums)

    def mean(self, losses: Iterable[tuple[Tensor, float]]) -> Tensor:
        """Σ n_b L_b / Σ n_b over all ranks, for this rank's pairs (L_b, n_b), inside ``session()``: 0-d float64."""
        return self._inside.mean(losses)

    def batches(self) -> Iterator[Any]:
        """The batches as the data give them, in every pass of a session in the same order. Use inside ``session()``."""
        return self._inside.batches()

    def weighted_batches(self) -> Iterator[WeightedBatch]:
        """The batches, moved to the model's device, that hold at least one term. Use inside ``session()``."""
        return self._inside.weighted_batches()

    @property
    def _inside(self) -> EvaluationSession:
        assert self._session is not None, "used outside session()"
        return self._session

    @contextmanager
    def session(self, *, check: bool = False) -> Iterator[None]:
        """Several evaluations that share one setting of modes and restore everything at the end.

        Inside, every evaluation of the model is the same computation: attention takes its plain path, and a loader
        draws the same order in every pass. ``check`` calls ``self.check()`` first.
        """
        if self._session is not None:
            if check:
                self.check()
            yield
            return
        session = EvaluationSession(
            model=self.model, loss_fn=self.loss_fn, data=self.data, forward=self._forward, weight=self.weight,
            sums=self.sums, mode=self.mode, seed=self.seed, composite=self._composite, loss_checks=self._loss_checks)
        with session.open():
            self._session = session
            try:
                if check:
                    self.check()
                yield
            finally:
                self._session, self._composite = None, session.composite

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
            checks.check(self._inside, mean=self.weighs_itself)
        self._check = False

    def evaluate_once(self) -> None:
        """Evaluate one batch where this session has evaluated none: an error of the user's code is raised here."""
        if self._inside.evaluated:
            self._inside.refuse_reentrant()
        else:
            with torch.enable_grad():
                for batch in self.weighted_batches():
                    batch.loss(batch.outputs())
                    break

    def on_data(self, data: Any) -> Objective:
        """The same objective on other batches, with sessions of its own."""
        other = copy.copy(self)
        other.data, other._session = data, None
        return other

    def with_loss_check(self, check: Callable[[Any, Tensor], None]) -> Objective:
        """The same objective, which calls ``check(outputs, loss)`` for the loss of every batch."""
        other = copy.copy(self)
        other._loss_checks = (*self._loss_checks, check)
        if self._session is not None:
            other._session = copy.copy(self._session)
            other._session.loss_checks = other._loss_checks
        return other

    def alone(self, data: Any, loss_fn: Callable[..., Tensor] | None,
              around: Callable[[], AbstractContextManager[Any]]) -> Objective:
        """Inside a session: the objective on other data and with another loss, run by this rank alone."""
        other = copy.copy(self)
        other.data, other.loss_fn, other._session = data, loss_fn, self._inside.alone(data, loss_fn, around)
        return other
