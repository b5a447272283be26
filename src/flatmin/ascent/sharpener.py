"""``Sharpener``: forward and loss in, sharpness-aware gradient in ``p.grad`` out."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import parallel, vectors
from ..errors import PerturbedStateError
from ..parallel import Wrappers, in_bucket, local, wrapped_name
from ..perturbed import (
    Buffers,
    Displacement,
    Float32Weights,
    RandomState,
    Spare,
    buffer_registries,
    buffer_versions,
    undone,
)
from ..vectors import Space
from .cadences import Cadence, EveryStep
from .directions import Ascent, Direction, Gradient
from .inspection import Inspection
from .parameters import Groups, Row, check_rho, devices_of, refuse_sparse, refuse_unsupported, rho_at, rows_of
from .passes import BackPropagation, Forward, Loss, MicroBatch, Passes, micro_batches
from .record import Outcome, StepRecord, accumulate, merged
from .rules import Plain, Rule

Scope = Literal["batch", "micro_batch", "rank", "first"]
_SCOPES = ("batch", "micro_batch", "rank", "first")


@dataclass
class _Standing:
    """Weights stand at w + ε: how to come back, and what was seen at w."""

    displacement: Displacement = field(default_factory=Displacement)
    float32_weights: Float32Weights | None = None
    gradients: dict[int, Tensor] = field(default_factory=dict)  # kept g, by row
    gradient_norm: Tensor | None = None
    radius: Tensor | float = 0.0
    memory: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # what the direction keeps of this step

    def restore(self) -> None:
        self.displacement.restore()
        if self.float32_weights is not None:
            self.float32_weights.restore()

    def mode(self) -> AbstractContextManager[Any]:
        """The context for passes at w + ε."""
        return nullcontext() if self.float32_weights is None else self.float32_weights.mode

    def taken(self) -> tuple[Tensor | float, Tensor | float]:
        """Cosine of the step taken with the one asked for, and its radius; half-precision weights may round it."""
        seen = self.displacement.realised
        if not seen:
            return 1.0, self.radius
        asked, done, inner = torch.stack(seen).sum(0)
        return inner / (asked * done).sqrt(), self.radius * (done / asked).sqrt()


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
            at w + ε, and BatchNorm sees the other micro-batches there.
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
        self.model, self.scope, self.replay, self.offload = model, scope, replay, offload
        self.perturbed_norm = perturbed_norm
        self.direction: Direction = direction or Gradient()
        self.rule: Rule = rule or Plain()
        self.cadence: Cadence = cadence or EveryStep()
        self.optimizer, self.scaler = optimizer, scaler
        self._propagate = BackPropagation(scaler, backward)
        self._groups, self._default = groups, {"rho": check_rho(rho)}
        for group in groups or ():
            check_rho(group.get("rho", 0.0))
        if self.direction.needs_optimizer and optimizer is None:
            raise ValueError(f"{type(self.direction).__name__} reads the optimizer's state: pass optimizer=")
        if scope == "first" and (self._keeps_gradient or self.rule.second in ("frozen", "selected")):
            raise ValueError('scope="first" knows the first micro-batch at w and no other, and this rule or cadence '
                             'needs them all: use scope="batch"')
        self.last: StepRecord = StepRecord()
        self._step = 0
        self._spare = Spare()
        self._memory: dict[str, dict[str, Tensor]] = {}
        self._standing: _Standing | None = None
        self._warned = self._warned_of_skip = False
        self._last_standing: _Standing | None = None
        self.refresh()
        if scope == "rank" and not self._wrappers.has_ranks:
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
        steps = micro_batches(forward, loss, batches, weights)
        self._wrappers.refuse_unsynchronised()
        if self._standing is not None:
            raise PerturbedStateError("the weights stand at w + ε already: finish that step first")
        stash = self._stash()
        try:
            self.clear_gradients()
            if self.scope == "micro_batch" and self.pays:
                outcome = self._each_micro_batch(steps)
            else:
                outcome = self.run(self._passes(steps))
            # one micro-batch a call: the caller accumulates, and the framework's division is for that
            self.finish(outcome, stash, self._propagate.division if len(steps) == 1 else None)
        except BaseException:
            self.restore()
            self._last_standing = None
            for parameter, gradient, saved in stash:
                if saved is not None and gradient is not None:
                    gradient.copy_(saved)
                parameter.grad = gradient
            raise
        value = outcome.loss if outcome.loss is not None else outcome.perturbed_loss
        assert value is not None
        return value

    def state_dict(self) -> dict[str, Any]:
        """What the direction and the cadence carry from step to step; loads with ``weights_only=True``."""
        if self._standing is not None:
            raise PerturbedStateError("the weights stand at w + ε: finish the step before saving")
        return {"step": self._step, "memory": self._placed(self._memory, parallel.like)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken, bit for bit together with the optimizer's own state."""
        if set(state) != {"step", "memory"}:
            raise ValueError(f"not a sharpener's state: expected the keys step and memory, got {sorted(state)}")
        self._step = int(state["step"])
        self._memory = self._placed(state["memory"], lambda value, p: local(value).to(p.device))

    def _stash(self) -> list[tuple[nn.Parameter, Tensor | None, Tensor | None]]:
        """The gradients there are, and a copy of those that lie in the buckets into which DDP writes the next ones."""
        return [(r.parameter, g, g.clone() if g is not None and in_bucket(g) else None)
                for r in self._rows for g in (r.parameter.grad,)]

    def _passes(self, steps: list[MicroBatch]) -> Passes:
        return Passes(steps, self._wrappers, self._propagate, self._devices if self.replay else None)

    # one step, given something that can run passes

    def run(self, passes: Any) -> Outcome:
        """One step with gradients cleared on entry and left in ``p.grad``; for :meth:`finish`."""
        if self._standing is not None:
            raise PerturbedStateError("the weights stand at w + ε already: finish that step first")
        self._follow_devices()
        rhos = self._rhos()
        if not self.cadence(self._step) or not any(rhos):
            return self.plain_record(passes.loss())
        if not self._inspection.done:
            self._inspection.begin()
            passes.look = self._inspection
        if not self.direction.needs_gradient and self.rule.second == "loss" and not self._keeps_gradient:
            outcome = replace(self.combined(None, self._at_perturbed(passes.loss, rhos, None)), passes=1)
            self._inspection.finish()
            return outcome
        start = RandomState(self._devices) if self.replay else None
        versions = buffer_versions(self._registries)
        value = self._first_pass(passes)
        after = RandomState(self._devices) if self.replay else None
        self._forget_gathered()
        self._inspection.begin_second()
        buffers = Buffers(self._registries, versions)
        first = self.scope == "first"  # the micro-batches after the first are met at w + ε only
        if first:
            passes.after_first, value = buffers.restore, None
        with undone(buffers.restore, first), undone(_nothing if after is None else after.set, first):
            perturbed = self._second_pass(passes, rhos, start)
        self._inspection.finish()
        return self.combined(value, perturbed)

    def _first_pass(self, passes: Any) -> Tensor | None:
        """The pass at w."""
        passes.alone = self.scope == "rank"
        if self.scope == "first":
            value = passes.first()
        elif self.rule.second == "frozen":
            value = passes.recording()
            passes.keep_apart(r.parameter.grad for r in self._rows if r.parameter.grad is not None)
        else:
            value = passes.sampled() if self.rule.second == "selected" else passes.loss()
        passes.alone = False
        return value

    def _second_pass(self, passes: Any, rhos: list[float], start: RandomState | None) -> Tensor:
        second = self.rule.second
        if second == "logit":
            perturbed = self._at_perturbed(passes.outputs_only, rhos, start)
            if start is not None:
                start.set()
            passes.frozen()
            return perturbed
        if second == "selected":
            share = getattr(self.rule, "gamma", 1.0)
            return self._at_perturbed(lambda: passes.selected(share), rhos, start)
        return self._at_perturbed(passes.frozen if second == "frozen" else passes.loss, rhos, start)

    def _at_perturbed(self, run: Callable[[], Tensor], rhos: list[float], start: RandomState | None) -> Tensor:
        """Run a pass with the weights at w + ε, and come back whatever happens."""
        with undone(self.restore), self.perturb(rhos):
            if start is not None:
                start.set()
            return run()

    def plain_record(self, value: Tensor | None) -> Outcome:
        """The outcome of a step without a second pass: ``p.grad`` holds g, plus a re-used sharpness component."""
        component = self._memory.get("component")
        reuse = self.cadence.reuse
        if reuse is not None and component is not None:
            rows = [r for r in self._rows if r.parameter.grad is not None]
            g = self._gradients(rows)
            with torch.no_grad():   # 0 where the last full step had no gradient
                reuse.add(self._space(rows), g, [component[r.name] if r.name in component else torch.zeros_like(t)
                                                 for r, t in zip(rows, g, strict=True)])
        return Outcome(self._overflow(), loss=value)

    def perturb(self, rhos: list[float] | None = None) -> AbstractContextManager[Any]:
        """With g in ``p.grad`` (or nothing, for directions that need none): choose ε, keep what is needed, move.

        Returns the context in which the second pass is to run.
        """
        rhos = self._rhos() if rhos is None else rhos
        standing = self._standing = _Standing(Displacement(self.offload, self._spare))
        gradients = self._take_gradients()
        if self._keeps_gradient:
            standing.gradients = {i: g.clone() if in_bucket(g) else g for i, g in gradients.items()}
        moving = [r for r in self._rows if r.parameter.requires_grad and rhos[r.index] > 0]
        if self.direction.needs_gradient:
            moving = [r for r in moving if r.index in gradients]
        with torch.no_grad():
            if moving:
                self._move(standing, moving, rhos, gradients)
            if self.scope == "rank" and standing.gradients:
                self._wrappers.average(list(standing.gradients.values()))
            if self.scope == "rank":
                self._wrappers.average([t for kept in standing.memory.values() for t in kept.values()])
        self._forget_gathered()
        return standing.mode()

    def _take_gradients(self) -> dict[int, Tensor]:
        """The local parts of all gradients by row, taken out of ``p.grad``."""
        out: dict[int, Tensor] = {}
        for row in self._rows:
            p = row.parameter
            gradient = p.grad
            if gradient is not None:
                if gradient.layout is not torch.strided:
                    refuse_sparse(row.name)
                out[row.index] = local(parallel.matched(gradient, p)) if self._sharded else gradient
                p.grad = None
        return out

    def _local(self, gradient: Tensor, parameter: nn.Parameter) -> Tensor:
        return local(parallel.matched(gradient, parameter)) if self._sharded else gradient

    def _move(self, standing: _Standing, moving: list[Row], rhos: list[float],
              gradients: dict[int, Tensor]) -> None:
        w: list[Tensor] = [local(r.parameter) for r in moving] if self._sharded else [r.parameter for r in moving]
        space = self._space(moving)
        d: list[Tensor] = []
        if self.direction.needs_gradient:
            keep = self._keeps_gradient
            d = [g.clone() if keep or in_bucket(g) else g for g in (gradients[r.index] for r in moving)]
            gradients.clear()
            standing.gradient_norm = space.norm(d)
        scale_of_loss = self._loss_scale()
        ascent = Ascent(space, moving, w, d, standing.gradient_norm, self._memory, self._step, self.optimizer,
                        scale_of_loss)
        norm = self.direction(ascent)
        moving, w, d, standing.memory = ascent.rows, ascent.w, ascent.d, ascent.keep
        usable = (norm > 0) & (norm < math.inf)
        radii = {max(rhos)} if len(self._distinct) == 1 else {rhos[r.index] for r in moving}
        if len(radii) == 1:
            standing.radius = torch.where(usable, max(radii) * ascent.stretch, 0.0)
        else:
            standing.radius = torch.where(usable, ascent.length([rhos[r.index] for r in moving]) / norm, 0.0)
        for rho in radii:
            scale = torch.where(usable, rho / norm, 0.0)
            for some in self._alike(moving, w, d, rhos, rho):
                self._displace(standing, *some, scale)
        if standing.gradient_norm is not None and scale_of_loss is not None:
            standing.gradient_norm = standing.gradient_norm / scale_of_loss.to(standing.gradient_norm.device)

    def _displace(self, standing: _Standing, rows: list[Row], w: list[Tensor], d: list[Tensor], scale: Tensor
                  ) -> None:
        """Move by scale · d, tensors of one dtype and device; half precision in float32 where that can be done."""
        dtype = w[0].dtype
        steps = scale.to(torch.float64 if dtype == torch.float64 else torch.float32)
        if dtype in vectors.HALF and self._may_use_float32 and standing.float32_weights is None:
            standing.float32_weights = Float32Weights([r.parameter for r in rows])
            standing.float32_weights.move(d, steps, finite=True)
        else:
            standing.displacement.move(w, d, steps, finite=True)

    def _alike(self, rows: list[Row], w: list[Tensor], d: list[Tensor], rhos: list[float], rho: float
               ) -> list[tuple[list[Row], list[Tensor], list[Tensor]]]:
        """What has this radius, apart by dtype and device."""
        if self._uniform and len(self._distinct) == 1:
            return [(rows, w, d)]
        out: dict[tuple[torch.dtype, torch.device], list[int]] = {}
        for i, (row, t) in enumerate(zip(rows, w, strict=True)):
            if rhos[row.index] == rho:
                out.setdefault((t.dtype, t.device), []).append(i)
        return [([rows[i] for i in some], [w[i] for i in some], [d[i] for i in some]) for some in out.values()]

    @property
    def _may_use_float32(self) -> bool:
        return self._plain_model and self._inspection.looked and not self._inspection.inflexible

    def restore(self) -> None:
        """Give the weights back, if they were moved."""
        standing = self._standing
        if standing is not None:
            standing.restore()
            self._last_standing = standing
            self._standing = None
            self._forget_gathered()

    def combined(self, value: Tensor | None, perturbed: Tensor | None) -> Outcome:
        """``p.grad`` holds g_p: apply the rule, tell what happened."""
        standing, self._last_standing = self._last_standing, None
        assert standing is not None
        if self._keeps_gradient:
            rows, perturbed_gradient, gradient = self._both(standing.gradients)
            with torch.no_grad():
                self.rule(self._space(rows), perturbed_gradient, gradient)
        cosine, radius = standing.taken()
        return Outcome(self._overflow(standing.gradient_norm), 2, value, perturbed, standing.gradient_norm, None,
                       radius, cosine, {} if self.cadence.reuse is None else standing.gradients, standing.memory)

    def _both(self, gradients: dict[int, Tensor]) -> tuple[list[Row], list[Tensor], list[Tensor]]:
        """The rows with a gradient in either pass, ``p.grad`` there and the kept gradient."""
        rows = [r for r in self._rows if r.index in gradients or r.parameter.grad is not None]
        for r in rows:
            if r.parameter.grad is None:
                r.parameter.grad = torch.zeros_like(r.parameter)
        perturbed = self._gradients(rows)
        return rows, perturbed, [gradients[r.index] if r.index in gradients else torch.zeros_like(g)
                                 for r, g in zip(rows, perturbed, strict=True)]

    def _gradients(self, rows: list[Row]) -> list[Tensor]:
        """The local parts of ``p.grad``; every row has one."""
        out: list[Any] = [r.parameter.grad for r in rows]
        if self._sharded:
            return [local(parallel.matched(g, r.parameter)) for g, r in zip(out, rows, strict=True)]
        return out

    def finish(self, outcome: Outcome, stash: Sequence[tuple[nn.Parameter, Tensor | None, Tensor | None]] = (),
               factor: Tensor | None = None) -> None:
        """The one host read of a step, then ``factor`` times the gradient is added to those that were there before."""
        if self.perturbed_norm:
            rows = [r for r in self._rows if r.parameter.grad is not None]
            norm, scale = self._space(rows).norm(self._gradients(rows)), self._loss_scale()
            outcome.perturbed_gradient_norm = norm if scale is None else norm / scale.to(norm)
        if outcome.gradients and self.cadence.reuse is not None:
            rows, perturbed, first = self._both(outcome.gradients)
            with torch.no_grad():
                component = self.cadence.reuse.component(self._space(rows), perturbed, first)
            self._memory.pop("component", None)     # of the last full step alone
            outcome.memory["component"] = {r.name: c for r, c in zip(rows, component, strict=True)}
        skipped = bool(outcome.overflow)
        if skipped and self.scaler is None and not self._warned_of_skip:
            self._warned_of_skip = True
            warnings.warn("a loss or gradient of this step is inf or NaN: every p.grad is None now and optimizers skip "
                          "the step; last.skipped says so from here on. Look at the batch, the learning rate or the "
                          "radius", stacklevel=3)
        if factor is not None:
            vectors.scale(factor, [local(r.parameter.grad) for r in self._rows if r.parameter.grad is not None])
        if not skipped:
            for kind, tensors in outcome.memory.items():
                self._memory[kind] = self._memory.get(kind, {}) | tensors
        if skipped and self.scaler is None:
            self.clear_gradients()
        else:
            if skipped:
                self._leave_inf()
            with torch.no_grad():
                for parameter, before, saved in stash:
                    if before is None:
                        continue
                    if parameter.grad is not None and saved is not None:
                        parameter.grad.add_(saved)  # the same memory as ``before``, or DDP's bucket in its place
                        continue
                    if parameter.grad is not None:
                        local(before).add_(local(parallel.matched(parameter.grad, before)))
                    parameter.grad = before
        self._step += 1
        self.last = StepRecord.of(outcome, skipped)
        self._warn_if_rounded()

    def clear_gradients(self) -> None:
        """``p.grad = None`` for every parameter."""
        for row in self._rows:
            row.parameter.grad = None

    @property
    def has_gradients(self) -> bool:
        """Whether any parameter has a gradient."""
        return any(row.parameter.grad is not None for row in self._rows)

    @property
    def has_state(self) -> bool:
        """Whether there is anything to carry from step to step."""
        counts = self.cadence.counts_steps or getattr(self.direction, "counts_steps", False)
        return bool(self._memory) or counts or any(callable(g.get("rho", self.rho)) for g in self._distinct.values())

    @property
    def pays(self) -> bool:
        """Whether the coming step takes the second pass."""
        return self.cadence(self._step) and any(self._rhos())

    @property
    def standing(self) -> bool:
        """Whether the weights are at w + ε."""
        return self._standing is not None

    # one step a micro-batch

    def _each_micro_batch(self, batches: list[MicroBatch]) -> Outcome:
        """A step of its own for every micro-batch from the same memory; sums of gradients, means of what is kept."""
        totals: dict[int, Tensor] = {}
        gradients: dict[int, Tensor] = {}
        memory: dict[str, dict[str, Tensor]] = {}
        outcomes = []
        weight = sum(batch.weight for batch in batches) or 1.0
        for batch in batches:
            outcome = self.run(self._passes([replace(batch, weight=1.0)]))
            with torch.no_grad():
                found = {r.index: r.parameter.grad for r in self._rows if r.parameter.grad is not None}
                self.clear_gradients()
                accumulate(totals, found, batch.weight)
                accumulate(gradients, outcome.gradients, batch.weight)
                for kind, tensors in outcome.memory.items():
                    accumulate(memory.setdefault(kind, {}), tensors, batch.weight / weight)
            outcomes.append((batch.weight, replace(outcome, gradients={}, memory={})))
        for row in self._rows:
            row.parameter.grad = totals.get(row.index)
        return replace(merged(outcomes), gradients=gradients, memory=memory)

    # what a step stands on

    def refresh(self, groups: Groups | None = None) -> None:
        """Look at the model again: its parameters, their groups (or new ones), its wrappers."""
        self._groups = self._groups if groups is None else groups
        self._rows = rows_of(self.model, self._groups, self._default)
        if not self._rows:
            raise ValueError("no parameters: pass a model that has some")
        refuse_unsupported(self.model, self._rows)
        self._devices = devices_of(r.parameter for r in self._rows)
        self._uniform = len({(r.parameter.dtype, r.parameter.device) for r in self._rows}) == 1
        self._registries = buffer_registries(self.model)
        self._sharded = any(parallel.is_sharded(r.parameter) for r in self._rows)
        self._wrappers = Wrappers(self.model)
        if self.scope != "rank":
            self._wrappers.refuse_left_out((r.name, r.parameter) for r in self._rows)
        self._group_keys = [id(r.group) for r in self._rows]
        self._distinct = {id(r.group): r.group for r in self._rows}
        self._whole = Space([r.parameter for r in self._rows])
        self._spaces: dict[tuple[int, ...], Space] = {}
        modules = list(self.model.modules()) if self.model is not None else []
        self._plain_model = bool(modules) and not any(
            wrapped_name(m) is not None or isinstance(m, nn.RNNBase) or m in self._wrappers.fsdp
            or getattr(m, "_compiled_call_impl", None) is not None for m in modules)
        self._inspection = Inspection((r.parameter for r in self._rows), leaves=not self._wrappers.fsdp)

    def _follow_devices(self) -> None:
        """The model may have been moved."""
        if devices_of(self._whole.parameters) != self._devices:
            self.refresh()

    def _space(self, rows: list[Row]) -> Space:
        if len(rows) == len(self._rows):
            return self._whole
        key = tuple(r.index for r in rows)
        if key not in self._spaces:
            self._spaces = {key: Space([r.parameter for r in rows])}
        return self._spaces[key]

    def _rhos(self) -> list[float]:
        """ρ of every row at this step."""
        lr = self.optimizer.param_groups[0].get("lr") if self.optimizer is not None else None
        values = {key: rho_at(group.get("rho", self.rho), self._step, lr) for key, group in self._distinct.items()}
        return [values[key] for key in self._group_keys]

    @property
    def _keeps_gradient(self) -> bool:
        return self.rule.needs_gradient or self.cadence.reuse is not None

    def _loss_scale(self) -> Tensor | None:
        return self._propagate.loss_scale(self._devices[0])

    def _forget_gathered(self) -> None:
        """Nothing computed from the old weights may serve the next pass: gathered shards, autocast's casts."""
        self._wrappers.reshard()
        torch.clear_autocast_cache()

    def _overflow(self, first_norm: Tensor | None = None) -> Tensor:
        """Whether inf or nan was met in either pass, on any rank."""
        rows = [r for r in self._rows if r.parameter.grad is not None]
        if not rows:
            raise ValueError("no parameter received a gradient: does the loss depend on this model?")
        flag = ~self._space(rows).finite(self._gradients(rows))
        if first_norm is not None:
            flag = flag | ~(first_norm < math.inf)  # nan is not
        return self._wrappers.any_rank(flag) if self.scope == "rank" else flag

    def _leave_inf(self) -> None:
        """A scaler looks for inf in ``p.grad``: leave one on every device."""
        done: set[torch.device] = set()
        for row in self._rows:
            gradient = row.parameter.grad
            if gradient is not None and gradient.device not in done:
                done.add(gradient.device)
                local(gradient).fill_(float("inf"))

    def _warn_if_rounded(self) -> None:
        if not self._warned and self.last.rounded and self.last.cosine < 0.95:
            self._warned = True
            warnings.warn(
                f"half-precision weights rounded the step away: radius {self.last.radius:.3g}, cosine "
                f"{self.last.cosine:.2f} with the step asked for. Keep float32 weights and compute in half precision "
                "(torch.autocast, or FSDP2's MixedPrecisionPolicy(param_dtype=...)).", stacklevel=4)

    def _placed(self, memory: dict[str, Any], place: Callable[[Tensor, Tensor], Tensor]) -> dict[str, Any]:
        """A copy of tensors kept by parameter name, each put where its parameter belongs."""
        by_name = {r.name: r.parameter for r in self._rows}
        out: dict[str, Any] = {}
        for kind, tensors in memory.items():
            unknown = [n for n, t in tensors.items() if n not in by_name or local(t).shape != local(by_name[n]).shape]
            if unknown:
                raise ValueError(f"the saved state ({kind}) does not fit this model: it has a tensor for "
                                 f"{unknown[0]!r}, which is not a parameter of this shape")
            out[kind] = {n: place(t.clone(), by_name[n]) for n, t in tensors.items()}
        return out


def _nothing() -> None:
    pass
