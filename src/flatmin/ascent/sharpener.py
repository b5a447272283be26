"""``Sharpener``: forward and loss in, sharpness-aware gradient in ``p.grad`` out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import parallel, vectors
from ..errors import PerturbedStateError
from ..parallel import local
from .accumulation import EarlierGradients
from .back_propagation import BackPropagation
from .cadences import Cadence, EveryStep
from .directions import Direction, Gradient
from .micro_batches import Forward, Loss, MicroBatch, micro_batches
from .model_view import ModelView
from .parameters import Groups, check_rho
from .passes import Passes
from .record import Outcome, StepRecord, warn_of_rounding, warn_of_skip
from .rules import Plain, Rule
from .step import Scope, Step

_SCOPES = ("batch", "micro_batch", "rank", "first")


class Sharpener:
    """Computes a sharpness-aware gradient where ``loss.backward()`` stood; your optimizer stays as it is.

    One ``backward`` evaluates at w, steps to w + ε, evaluates again, gives w back bit for bit, and adds the gradient
    to ``p.grad``. Evaluation and checkpoints therefore always see w.

    Args:
        model: the module whose parameters move; it may be, or contain, DDP- or FSDP2-wrapped modules.
        direction: where uphill is (default ``Gradient()``).
        rule: which gradient is kept (default ``Plain()``).
        cadence: when the second pass is paid for (default ``EveryStep()``).
        scope: whose gradient chooses ε: the whole ``"batch"``, each ``"micro_batch"``, each ``"rank"``, or the
            ``"first"`` micro-batch alone, for all: its pass at w is the only one, so that ``backward`` returns the loss
            at w + ε, and BatchNorm sees the other micro-batches there. A rule that combines two gradients (GSAM, WSAM)
            takes each micro-batch's own pair at micro-batch scope, and the averages over ranks at rank scope.
        optimizer: the optimizer whose state a direction reads, or whose learning rate a schedule of ρ follows.
        scaler: a ``torch.amp.GradScaler``; both passes are scaled, an overflow of either is left as inf in ``p.grad``.
        backward: how a loss is back-propagated, such as ``accelerator.backward``; default ``loss.backward()``. If it
            divides by a number of accumulation steps, that stands for one ``backward`` a micro-batch; a list of
            micro-batches has its own weights, and the division is undone.
        groups: ``[{"params" | "modules": ..., "rho": ...}]``; parameters in no group take ``rho``; ρ = 0 leaves a
            group where it is and out of the norm.
        rho: the radius ρ ≥ 0 in the direction's own norm, or a schedule called as ``rho(step, lr)``.
        replay: draw the same random numbers (dropout masks) in both passes. Holds for torch's global generators, on
            the CPU and on the parameters' devices; draws from Python, NumPy or a ``torch.Generator`` are new in each
            pass: draw them before ``backward``.
        offload: keep the copy of w in the host's memory instead of where the first gradient was; slower, and on an
            accelerator a parameter-sized tensor less.
        perturbed_norm: record ``last.perturbed_gradient_norm`` too, for one more reading of the gradients a step; may
            be changed between steps.

    Every trainable tensor that the loss reaches must be a parameter of ``model``: the first step looks (but not under
    FSDP2). Half-precision weights stand at w + ε in float32 where the model is plain: not compiled, not data-parallel,
    without recurrent layers and, in the first step, without a ``torch.autograd.Function`` of its own or a module that
    ``backward`` runs again (activation checkpointing); elsewhere ε is rounded to the weights' precision, and
    ``last.radius`` and ``last.cosine`` say what was left of it. After changing the model call :meth:`refresh`.

    Raises:
        ValueError: a negative ρ, an unknown scope, a part that lacks what it needs; FSDP1; trainable parameters that
            are complex, sparse or without a shape, or outside the data-parallel wrappers.

    Example:
        >>> import torch, flatmin
        >>> model = torch.nn.Linear(3, 1)
        >>> sharpener = flatmin.Sharpener(model, rho=0.05)
        >>> x, y = torch.ones(4, 3), torch.zeros(4, 1)
        >>> loss = sharpener.backward(lambda: torch.nn.functional.mse_loss(model(x), y))
        >>> round(sharpener.last.radius, 6)
        0.05

    Source: Foret et al., arXiv:2010.01412; the second-order term of its eq. 3 is dropped, as there.
    """

    def __init__(
        self,
        model: nn.Module | None,
        *,
        direction: Direction | None = None,
        rule: Rule | None = None,
        cadence: Cadence | None = None,
        scope: Scope = "batch",
        optimizer: torch.optim.Optimizer | None = None,
        scaler: Any = None,
        backward: Any = None,
        groups: Groups | None = None,
        rho: Any = 0.05,
        replay: bool = True,
        offload: bool = False,
        perturbed_norm: bool = False,
    ):
        if model is not None and not isinstance(model, nn.Module):
            raise ValueError(f"model must be a torch.nn.Module, got {type(model).__name__}; several modules go into a "
                             "torch.nn.ModuleList, bare parameters into flatmin.SAM")
        if scope not in _SCOPES:
            raise ValueError(f"scope must be one of {', '.join(_SCOPES)}, got {scope!r}")
        self.model, self.replay, self.offload = model, replay, offload
        self.scope: Scope = scope
        self.perturbed_norm = perturbed_norm
        self.direction: Direction = direction or Gradient()
        self.rule: Rule = rule or Plain()
        self.cadence: Cadence = cadence or EveryStep()
        self.optimizer, self.scaler = optimizer, scaler
        self.back_propagation = BackPropagation(scaler, backward)
        self._groups, self._default = groups, {"rho": check_rho(rho)}
        for group in groups or ():
            check_rho(group.get("rho", 0.0))
        if self.direction.needs_optimizer and optimizer is None:
            raise ValueError(f"{type(self.direction).__name__} reads the optimizer's state: pass optimizer=")
        if scope == "first" and (self.keeps_gradient or self.rule.second.needs_recorded):
            raise ValueError('scope="first" knows the first micro-batch at w and no other, and this rule or cadence '
                             'needs them all: use scope="batch"')
        self.last: StepRecord = StepRecord()
        self._number = 0  # of the coming step
        self._memory: dict[str, dict[str, Tensor]] = {}
        self._step: Step | None = None  # in progress
        self._warned_of_rounding = self._warned_of_skip = False
        self.refresh()
        if scope == "rank" and not self.view.wrappers.has_ranks:
            raise ValueError('scope="rank" needs a model that is or contains DistributedDataParallel, or a mesh that '
                             'replicates (under FSDP2 one shard has one value for all ranks); use '
                             'scope="micro_batch" with a list of micro-batches')

    def __repr__(self) -> str:
        return (f"Sharpener({type(self.model).__name__}, rho={self.rho}, direction={self.direction}, rule={self.rule}, "
                f"cadence={self.cadence}, scope={self.scope!r})")

    @property
    def rho(self) -> Any:
        """The radius ρ, or its schedule, of parameters in no group of their own."""
        return self._default["rho"]

    @rho.setter
    def rho(self, value: Any) -> None:
        self._default["rho"] = check_rho(value)

    def backward(self, forward: Forward | Iterable[Any], loss: Loss | None = None, *,
                 batches: Iterable[Any] | None = None, weights: Sequence[float] | None = None) -> Tensor:
        """Leave the sharpness-aware gradient in ``p.grad`` (added to what is there) and return the loss at w, detached.

        To accumulate over micro-batches hand over all of them in one call, each with its own mean loss, not divided by
        their number. Directions that need no gradient at w (momentum, random) run one pass, at w + ε: its loss is what
        is returned, and BatchNorm's statistics are those at w + ε.

        Args:
            forward: a callable that returns the loss, or, with ``loss``, the outputs; or a list of micro-batches,
                each such a callable or a ``(forward, loss)`` pair. Both passes loop over all of them.
            loss: the loss of the outputs.
            batches: the micro-batches as data, read once and kept for both passes; then ``forward(batch)`` and
                ``loss(outputs, batch)`` take the batch. For ESAM's rule the samples come last: ``forward(batch, s)``,
                ``loss(outputs, batch, s)``.
            weights: factors of the losses; 1/n each by default. For the mean over all samples pass nᵢ/Σn, which sum to
                one.

        Raises:
            ValueError: no or different micro-batches than described; a loss that is no scalar; in the first step, a
                trainable tensor outside the model.
            TypeError: a loss instead of a function.
            PerturbedStateError: called from within itself.
            RuntimeError: called inside ``no_sync``.

        Example:
            >>> import torch, flatmin
            >>> model, loss_fn = torch.nn.Linear(3, 1), torch.nn.functional.mse_loss
            >>> data = [(torch.ones(2, 3), torch.zeros(2, 1)), (torch.zeros(2, 3), torch.ones(2, 1))]
            >>> loss = flatmin.presets.sam(model).backward(lambda b: loss_fn(model(b[0]), b[1]), batches=data)
        """
        batches = micro_batches(forward, loss, batches, weights)
        self.view.wrappers.refuse_unsynchronised()
        if self._step is not None:
            raise PerturbedStateError("backward was called from within a step: finish that step first")
        before = self._number, self._memory
        earlier = EarlierGradients(self.view.whole.parameters)
        try:
            step = self.begin()
            self.view.clear_gradients()
            if self.scope == "micro_batch" and step.pays:
                outcome = step.run_each([(b.weight, self._passes([replace(b, weight=1.0)])) for b in batches])
            else:
                outcome = step.run(self._passes(batches))
            # one micro-batch a call: the caller accumulates, and the framework's division is for that
            self.finish(step, outcome, earlier, self.back_propagation.division if len(batches) == 1 else None)
        except BaseException:
            self.abandon()
            earlier.put_back()
            self._number, self._memory = before
            raise
        try:
            earlier.commit()
        except BaseException:  # a Ctrl-C: the step is complete, its gradients are too
            earlier.commit()
            raise
        value = outcome.loss if outcome.loss is not None else outcome.perturbed_loss
        assert value is not None
        return value

    def state_dict(self) -> dict[str, Any]:
        """What the direction and the cadence carry from step to step; loads with ``weights_only=True``."""
        if self.is_perturbed:
            raise PerturbedStateError("the weights are at w + ε: finish the step before saving")
        return {"step": self._number, "memory": self.view.placed(self._memory, parallel.like)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume where :meth:`state_dict` was taken, bit for bit together with the optimizer's own state."""
        if set(state) != {"step", "memory"}:
            raise ValueError(f"not a sharpener's state: expected the keys step and memory, got {sorted(state)}")
        memory = self.view.placed(state["memory"], lambda value, p: local(value).to(p.device))
        self._number, self._memory = int(state["step"]), memory

    def refresh(self, groups: Groups | None = None) -> None:
        """Look at the model again: its parameters, their groups (or new ones), its wrappers."""
        self._groups = self._groups if groups is None else groups
        self.view = ModelView(self.model, self._groups, self._default, self.scope == "rank")

    @property
    def is_perturbed(self) -> bool:
        """Whether the weights are at w + ε."""
        return self._step is not None and self._step.is_perturbed

    @property
    def has_state(self) -> bool:
        """Whether there is anything to carry from step to step."""
        return (bool(self._memory) or self.cadence.counts_steps or self.direction.counts_steps
                or self.view.follows_schedule)

    @property
    def keeps_gradient(self) -> bool:
        """Whether the gradient at w is kept until the step ends."""
        return self.rule.needs_gradient or self.cadence.reuse is not None

    @property
    def takes_one_pass(self) -> bool:
        """Whether a step needs nothing of w, so that its only pass is at w + ε."""
        rule = self.rule
        return not (self.direction.needs_gradient or self.keeps_gradient or rule.second.needs_recorded or rule.third)

    # for callers that run the passes themselves

    def begin(self) -> Step:
        """The coming step, to be completed by :meth:`finish`."""
        if not self.view.is_current:
            self.refresh()
        self._step = Step(self, self.view, self._number, self._memory)
        return self._step

    def finish(self, step: Step, outcome: Outcome, earlier: EarlierGradients | None = None,
               factor: Tensor | None = None) -> None:
        """Complete the step: read the outcome (the one host read), scale ``p.grad``, add the earlier gradients."""
        view = self.view
        if self.perturbed_norm:
            outcome.perturbed_gradient_norm = view.gradient_norm(self.back_propagation.loss_scale(view.devices[0]))
        kept, memory = dict(outcome.memory), dict(self._memory)
        if outcome.gradients:
            kept["component"] = step.component(outcome.gradients)
            memory.pop("component", None)     # of the last full step alone
        skipped = bool(outcome.overflow)
        if factor is not None:
            vectors.scale(factor, view.gradients(view.with_gradients()))
        if skipped and self.scaler is None:
            view.clear_gradients()
            self._warned_of_skip = self._warned_of_skip or warn_of_skip()
        else:
            if skipped:
                view.write_inf()
            if earlier is not None:
                earlier.add()
        if not skipped:
            memory |= {kind: {**memory.get(kind, {}), **tensors} for kind, tensors in kept.items()}
        self._number, self._memory, self._step = self._number + 1, memory, None
        self.last = StepRecord.of(outcome, skipped)
        if self.last.rounded:
            self._warned_of_rounding = self._warned_of_rounding or warn_of_rounding(self.last)

    def abandon(self) -> None:
        """Give w back and forget the step in progress; without effect otherwise."""
        if self._step is not None:
            self._step.restore()
            self._step = None

    def _passes(self, batches: list[MicroBatch]) -> Passes:
        return Passes(batches, self.view.wrappers, self.back_propagation, self.view.devices if self.replay else None,
                      self.view.whole.parameters)
