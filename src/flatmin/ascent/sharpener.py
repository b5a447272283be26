"""``Sharpener``: forward and loss in, sharpness-aware gradient in ``p.grad`` out."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import vectors
from ..errors import PerturbedStateError
from ..perturbed import HALF, Buffers, Displacement, RandomState, Widened, buffer_registries, unchanged_buffers
from ..vectors import Space, local
from .cadence import Cadence, EveryStep
from .directions import Ascent, Direction, Gradient, RandomFraction
from .passes import Forward, Loss, MicroBatch, Passes, micro_batches
from .record import StepRecord
from .rows import Groups, Row, check_rho, devices_of, rho_at, rows_of
from .rules import Plain, Rule, Selected
from .wrappers import Wrappers

Scope = Literal["batch", "micro_batch", "rank"]


@dataclass
class _Standing:
    """Weights stand at w + ε: how to come back, and what was seen at w."""

    displacement: Displacement = field(default_factory=Displacement)
    widened: Widened | None = None
    narrow: list[tuple[list[Tensor], list[Tensor], Tensor]] = field(default_factory=list)  # the same step, not widened
    gradients: dict[int, Tensor] = field(default_factory=dict)  # kept g, by row
    gradient_norm: Tensor | None = None
    radius: Tensor | float = 0.0

    def restore(self) -> None:
        try:
            self.displacement.restore()
        finally:
            if self.widened is not None:
                self.widened.restore()

    def mode(self) -> AbstractContextManager[Any]:
        """The context for passes at w + ε."""
        stack = ExitStack()
        if self.widened is not None:
            stack.enter_context(self.widened.mode)
            # checkpointed forwards are recomputed inside backward, where the mode must hold too
            stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        return stack

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
        scope: whose gradient chooses ε: the whole ``"batch"``, each ``"micro_batch"``, or each ``"rank"``.
        optimizer: the optimizer whose state a direction reads, or whose learning rate a schedule of ρ follows.
        scaler: a ``torch.amp.GradScaler``; both passes are scaled, an overflow of either is left as inf in ``p.grad``.
        backward: how a loss is back-propagated, such as ``accelerator.backward``; default ``loss.backward()``.
        groups: ``[{"params" | "modules": ..., "rho": ...}]``; parameters in no group take ``rho``; ρ = 0 leaves a
            group where it is and out of the norm.
        rho: the radius ρ ≥ 0 in the direction's own norm, or a schedule called as ``rho(step, lr)``.
        replay: draw the same random numbers (dropout masks) in both passes.
        offload: keep the copy of w in the host's memory instead of where the first gradient was; slower, and on an
            accelerator a parameter-sized tensor less.

    Raises:
        ValueError: a negative ρ, an unknown scope, a part that lacks what it needs.

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
    ):
        if model is not None and not isinstance(model, nn.Module):
            raise ValueError(f"model must be a torch.nn.Module, got {type(model).__name__}; several modules go into a "
                             "torch.nn.ModuleList, bare parameters into flatmin.SAM")
        if scope not in ("batch", "micro_batch", "rank"):
            raise ValueError(f'scope must be "batch", "micro_batch" or "rank", got {scope!r}')
        self.model, self.scope, self.replay, self.offload = model, scope, replay, offload
        self.direction: Direction = direction or Gradient()
        self.rule: Rule = rule or Plain()
        self.cadence: Cadence = cadence or EveryStep()
        self.optimizer, self.scaler = optimizer, scaler
        self._custom_backward = backward
        self._groups, self._default = groups, {"rho": check_rho(rho)}
        for group in groups or ():
            check_rho(group.get("rho", 0.0))
        if self.direction.needs_optimizer and optimizer is None:
            raise ValueError(f"{type(self.direction).__name__} reads the optimizer's state: pass optimizer=")
        self.last: StepRecord = StepRecord(0, False)
        self._step = 0
        self._memory: dict[str, Any] = {}
        self._standing: _Standing | None = None
        self._warned = False
        self._last_standing: _Standing | None = None
        self.refresh()
        if scope == "rank" and not self._wrappers.has_ranks:
            raise ValueError('scope="rank" needs a model that is or contains DistributedDataParallel, or a mesh that '
                             'replicates (under FSDP2 one shard has one value for all ranks); use '
                             'scope="micro_batch" with a list of micro-batches')

    @property
    def rho(self) -> Any:
        """The radius ρ, or its schedule, of parameters in no group of their own."""
        return self._default["rho"]

    @rho.setter
    def rho(self, value: Any) -> None:
        self._default["rho"] = check_rho(value)

    def backward(self, forward: Forward | Sequence[Any], loss: Loss | None = None, *,
                 weights: Sequence[float] | None = None) -> Tensor:
        """Leave the sharpness-aware gradient in ``p.grad`` (added to what is there) and return the loss at w, detached.

        Args:
            forward: a callable that returns the loss, or, with ``loss``, the outputs; or a list of micro-batches,
                each such a callable or a ``(forward, loss)`` pair. Both passes loop over all of them.
            loss: the loss of the outputs.
            weights: of the micro-batches; 1/n each by default.

        Raises:
            PerturbedStateError: called from within itself.
            RuntimeError: called inside ``no_sync``.
        """
        batches = micro_batches(forward, loss, weights)
        self._wrappers.refuse_unsynchronised()
        stash = [(row.parameter, row.parameter.grad) for row in self._rows]
        self.clear_gradients()
        try:
            if self.scope == "micro_batch" and self.pays:
                record = self._each_micro_batch(batches)
            else:
                record = self.run(Passes(batches, self._wrappers, self.scaler, self._custom_backward))
        except BaseException:
            for parameter, gradient in stash:
                parameter.grad = gradient
            raise
        self.finish(record, [(p, g) for p, g in stash if g is not None])
        return record["loss"] if record.get("loss") is not None else record["perturbed_loss"]

    def state_dict(self) -> dict[str, Any]:
        """What the direction and the cadence carry from step to step; loads with ``weights_only=True``."""
        if self._standing is not None:
            raise PerturbedStateError("the weights stand at w + ε: finish the step before saving")
        return {"step": self._step, "memory": self._placed(self._memory, vectors.like)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken, bit for bit together with the optimizer's own state."""
        if set(state) != {"step", "memory"}:
            raise ValueError(f"not a sharpener's state: expected the keys step and memory, got {sorted(state)}")
        self._step = int(state["step"])
        self._memory = self._placed(state["memory"], lambda value, p: local(value).to(p.device))

    # one step, given something that can run passes

    def run(self, passes: Any) -> dict[str, Any]:
        """One step with gradients cleared on entry and left in ``p.grad``; for :meth:`finish`."""
        if self._standing is not None:
            raise PerturbedStateError("the weights stand at w + ε already: finish that step first")
        rhos = self._rhos()
        if not self.cadence(self._step) or not any(rhos):
            return self.plain_record(passes.loss())
        if not self.direction.needs_gradient and self.rule.second == "loss" and not self._keeps_gradient:
            return self._one_pass(passes, rhos)
        start = RandomState(self._devices) if self.replay else None
        passes.alone = self.scope == "rank"
        value = self._first_pass(passes, rhos, start)
        passes.alone = False
        after = RandomState(self._devices) if self.replay else None
        self._forget_gathered()
        try:
            with unchanged_buffers(self.model, self._registries):
                perturbed = self._second_pass(passes, rhos, start)
        finally:
            if after is not None:
                after.set()
        return self.combined(value, perturbed)

    def _first_pass(self, passes: Any, rhos: list[float], start: RandomState | None) -> Tensor:
        """The pass at w. Parameters that will not move need no gradient there, if nothing else needs it."""
        second = self.rule.second
        run = passes.recording if second == "frozen" else passes.sampled if second == "selected" else passes.loss
        some_stay = isinstance(self.direction, RandomFraction) or not all(rhos)
        if not (some_stay and self._may_skip and self._had_gradients) or self._keeps_gradient:
            return run()
        moving, buffers = self._moving(rhos), Buffers(self._registries)
        passes.inputs = [r.parameter for r in moving]
        try:
            value = run()
            if all(r.parameter.grad is not None for r in moving if r.index in self._had_gradients):
                return value
        except RuntimeError as error:
            if "checkpoint" not in str(error):
                raise
        finally:
            passes.inputs = None
        # reentrant checkpointing hides parameters from such a choice, or refuses it: all gradients then, from now on
        self._may_skip = False
        self.clear_gradients()
        buffers.restore()
        if start is not None:
            start.set()
        return run()

    def _moving(self, rhos: list[float]) -> list[Row]:
        """Rows that a step may move: trainable, ρ > 0, drawn if the direction draws."""
        rows = [r for r in self._rows if r.parameter.requires_grad and rhos[r.index] > 0]
        if not isinstance(self.direction, RandomFraction):
            return rows
        chosen = self.direction.chosen(len(rows), self._step)
        return [r for r, c in zip(rows, chosen, strict=True) if c]

    def _second_pass(self, passes: Any, rhos: list[float], start: RandomState | None) -> Tensor | None:
        second = self.rule.second
        if second == "frozen":
            return self._at_perturbed(passes.frozen, rhos, start)
        if isinstance(self.rule, Selected):
            gamma = self.rule.gamma
            return self._at_perturbed(lambda: passes.selected(gamma), rhos, start)
        if second == "loss":
            return self._at_perturbed(passes.loss, rhos, start)
        perturbed = self._at_perturbed(passes.outputs_only, rhos, start)
        if start is not None:
            start.set()
        passes.frozen()
        return perturbed

    def _at_perturbed(self, run: Callable[[], Tensor], rhos: list[float], start: RandomState | None) -> Tensor:
        """Run a pass with the weights at w + ε, and come back whatever happens."""
        try:
            mode = self.climb(rhos)
            if start is not None:
                start.set()
            try:
                with mode:
                    value = run()
                self._widening_works = True
                return value
            except Exception:
                if not self._take_step_in_place():
                    raise
            if start is not None:
                start.set()
            return run()
        finally:
            self.come_back()

    def _take_step_in_place(self) -> bool:
        """After a failed pass with widened weights: step in half precision instead, from now on.

        Some models do not run with float32 weights (recomputed activations and extensions that look at dtypes).
        """
        standing = self._standing
        if standing is None or standing.widened is None or self._widening_works:
            return False
        standing.widened.restore()
        standing.widened = None
        self._can_widen = False
        self.clear_gradients()
        with torch.no_grad():
            for w, d, scale in standing.narrow:
                standing.displacement.move(w, d, scale, finite=True)
        return True

    def _one_pass(self, passes: Any, rhos: list[float]) -> dict[str, Any]:
        value = self._at_perturbed(passes.loss, rhos, RandomState(self._devices) if self._can_widen else None)
        return self.combined(None, value) | {"passes": 1}

    def plain_record(self, value: Tensor | None) -> dict[str, Any]:
        """The record of a step without a second pass: ``p.grad`` holds g, plus a re-used sharpness component."""
        component = self._memory.get("component")
        reuse = self.cadence.reuse
        if reuse is not None and component is not None:
            rows = [r for r in self._rows if r.parameter.grad is not None and r.name in component]
            with torch.no_grad():
                reuse.add(self._space(rows), self._gradients(rows), [component[r.name] for r in rows])
        return {"passes": 1, "loss": value, "radius": 0.0} | self._final()

    def climb(self, rhos: list[float] | None = None) -> AbstractContextManager[Any]:
        """With g in ``p.grad`` (or nothing, for directions that need none): choose ε, keep what is needed, move.

        Returns the context in which the second pass is to run.
        """
        rhos = self._rhos() if rhos is None else rhos
        standing = self._standing = _Standing(Displacement(self.offload))
        gradients = self._take_gradients()
        if self._keeps_gradient:
            standing.gradients = {i: g.clone() if self._wrappers.bucket_views else g for i, g in gradients.items()}
        moving = self._moving(rhos)
        if self.direction.needs_gradient:
            moving = [r for r in moving if r.index in gradients]
        with torch.no_grad():
            if moving:
                self._move(standing, moving, rhos, gradients)
            if self.scope == "rank" and standing.gradients:
                self._wrappers.average(list(standing.gradients.values()))
        self._forget_gathered()
        return standing.mode()

    def _take_gradients(self) -> dict[int, Tensor]:
        """The local parts of all gradients by row, taken out of ``p.grad``."""
        out: dict[int, Tensor] = {}
        for row in self._rows:
            p = row.parameter
            gradient = p.grad
            if gradient is not None:
                out[row.index] = self._local(gradient, p)
                p.grad = None
        return out

    def _local(self, gradient: Tensor, parameter: nn.Parameter) -> Tensor:
        return local(vectors.matched(gradient, parameter)) if self._sharded else gradient

    def _move(self, standing: _Standing, moving: list[Row], rhos: list[float],
              gradients: dict[int, Tensor]) -> None:
        w: list[Tensor] = [local(r.parameter) for r in moving] if self._sharded else [r.parameter for r in moving]
        space = self._space(moving)
        d: list[Tensor] = []
        if self.direction.needs_gradient:
            own = not self._keeps_gradient and not self._wrappers.bucket_views
            d = [gradients[r.index] if own else gradients[r.index].clone() for r in moving]
            gradients.clear()
            standing.gradient_norm = space.norm(d)
        scale_of_loss = self._loss_scale()
        ascent = Ascent(space, moving, w, d, standing.gradient_norm, self._memory, self._step, self.optimizer,
                        scale_of_loss)
        norm = self.direction(ascent)
        usable = (norm > 0) & torch.isfinite(norm)
        radii = {rhos[r.index] for r in moving}
        for rho in radii:
            scale = torch.where(usable, rho / norm, 0.0)
            if len(radii) == 1:
                self._displace(standing, moving, w, ascent.d, scale)
            else:
                where = [i for i, r in enumerate(moving) if rhos[r.index] == rho]
                self._displace(standing, [moving[i] for i in where], [w[i] for i in where],
                               [ascent.d[i] for i in where], scale)
        standing.radius = usable * max(radii) * ascent.stretch
        if standing.gradient_norm is not None and scale_of_loss is not None:
            standing.gradient_norm = standing.gradient_norm / scale_of_loss.to(standing.gradient_norm.device)

    def _displace(self, standing: _Standing, rows: list[Row], w: list[Tensor], d: list[Tensor], scale: Tensor
                  ) -> None:
        """Move by scale · d; half-precision weights in float32 where that can be done."""
        dtypes = {t.dtype for t in w}
        for dtype in dtypes:
            if len(dtypes) > 1:
                where = [i for i, t in enumerate(w) if t.dtype == dtype]
                self._displace(standing, [rows[i] for i in where], [w[i] for i in where], [d[i] for i in where], scale)
                continue
            steps = scale.to(torch.float64 if dtype == torch.float64 else torch.float32)
            finite = self.scaler is not None or dtype in HALF
            if dtype in HALF and self._can_widen and standing.widened is None:
                standing.widened = Widened([r.parameter for r in rows])
                standing.widened.move(d, steps, finite=finite)
                if not self._widening_works:
                    standing.narrow = [(w, d, steps)]
            else:
                standing.displacement.move(w, d, steps, finite=finite)

    def come_back(self) -> None:
        """Give the weights back, if they were moved."""
        standing, self._standing = self._standing, None
        if standing is not None:
            standing.restore()
            self._last_standing = standing
            self._forget_gathered()

    def combined(self, value: Tensor | None, perturbed: Tensor | None) -> dict[str, Any]:
        """``p.grad`` holds g_p: apply the rule, keep the sharpness component, tell what happened."""
        standing, self._last_standing = self._last_standing, None
        assert standing is not None
        component = self._apply_rule(standing.gradients) if self._keeps_gradient else None
        if self._may_skip:
            self._had_gradients = {r.index for r in self._rows if r.parameter.grad is not None}
        cosine, radius = standing.taken()
        return {"passes": 2, "loss": value, "perturbed_loss": perturbed, "gradient_norm": standing.gradient_norm,
                "radius": radius, "cosine": cosine, "component": component} | self._final(standing.gradient_norm)

    @torch.no_grad()
    def _apply_rule(self, gradients: dict[int, Tensor]) -> dict[str, Any] | None:
        """g_p in ``p.grad`` becomes the rule's gradient; returns the sharpness component if the cadence re-uses it."""
        rows = [r for r in self._rows if r.index in gradients or r.parameter.grad is not None]
        for r in rows:
            if r.parameter.grad is None:
                r.parameter.grad = torch.zeros_like(r.parameter)
        perturbed = self._gradients(rows)
        first = [gradients[r.index] if r.index in gradients else torch.zeros_like(g)
                 for r, g in zip(rows, perturbed, strict=True)]
        space = self._space(rows)
        self.rule(space, perturbed, first)
        reuse = self.cadence.reuse
        if reuse is None:
            return None
        return {r.name: c for r, c in zip(rows, reuse.component(space, perturbed, first), strict=True)}

    def _gradients(self, rows: list[Row]) -> list[Tensor]:
        """The local parts of ``p.grad``; every row has one."""
        out = [r.parameter.grad for r in rows]
        if self._sharded:
            return [local(vectors.matched(g, r.parameter)) for g, r in zip(out, rows, strict=True) if g is not None]
        return [g for g in out if g is not None]

    def finish(self, record: dict[str, Any], stash: Sequence[tuple[nn.Parameter, Tensor]] = ()) -> None:
        """The one host read of a step, then the gradients that were there before."""
        skipped = bool(record.pop("flag"))
        component = record.pop("component", None)
        if component is not None and not skipped:
            self._memory["component"] = component
        if skipped and self.scaler is None:
            self.clear_gradients()
        else:
            if skipped:
                self._leave_inf()
            with torch.no_grad():
                for parameter, before in stash:
                    if parameter.grad is not None:
                        local(before).add_(local(vectors.matched(parameter.grad, before)))
                    parameter.grad = before
        self._step += 1
        self.last = StepRecord(record.pop("passes"), skipped, self._left_norm(), **record)
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
        return bool(self._memory) or not isinstance(self.cadence, EveryStep) or callable(self.rho)

    @property
    def pays(self) -> bool:
        """Whether the coming step takes the second pass."""
        return self.cadence(self._step) and any(self._rhos())

    @property
    def standing(self) -> bool:
        """Whether the weights are at w + ε."""
        return self._standing is not None

    # one step a micro-batch

    def _each_micro_batch(self, batches: list[MicroBatch]) -> dict[str, Any]:
        totals: dict[int, Tensor] = {}
        records = []
        for batch in batches:
            alone = [MicroBatch(batch.forward, batch.loss, 1.0)]
            record = self.run(Passes(alone, self._wrappers, self.scaler, self._custom_backward))
            records.append((batch.weight, record))
            with torch.no_grad():
                for row in self._rows:
                    gradient, row.parameter.grad = row.parameter.grad, None
                    if gradient is None:
                        continue
                    gradient = gradient * batch.weight
                    if row.index in totals:
                        local(totals[row.index]).add_(local(gradient))
                    else:
                        totals[row.index] = gradient
        for row in self._rows:
            row.parameter.grad = totals.get(row.index)
        return _merged(records)

    # what a step stands on

    def refresh(self, groups: Groups | None = None) -> None:
        """Look at the model again: its parameters, their groups (or new ones), its wrappers."""
        self._groups = self._groups if groups is None else groups
        self._rows = rows_of(self.model, self._groups, self._default)
        if not self._rows:
            raise ValueError("no parameters: pass a model that has some")
        self._devices = devices_of(r.parameter for r in self._rows)
        self._registries = buffer_registries(self.model)
        self._sharded = any(vectors.is_sharded(r.parameter) for r in self._rows)
        self._wrappers = Wrappers(self.model)
        self._group_keys = [id(r.group) for r in self._rows]
        self._distinct = {id(r.group): r.group for r in self._rows}
        self._whole = Space([r.parameter for r in self._rows])
        self._spaces: dict[tuple[int, ...], Space] = {}
        compiled = any(getattr(m, "_compiled_call_impl", None) is not None or hasattr(m, "_orig_mod")
                       for m in (self.model.modules() if self.model is not None else ()))
        alone = not compiled and not self._wrappers.ddp and not self._wrappers.fsdp
        self._can_widen = self.model is not None and alone
        self._widening_works = False
        self._may_skip = self.model is not None and alone and self._custom_backward is None
        self._had_gradients: set[int] = set()  # rows, after the last pass that computed all

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
        """The scaler's factor as a tensor, without reading it to the host."""
        if self.scaler is None or not self.scaler.is_enabled():
            return None
        return self.scaler.scale(torch.ones((), device=self._devices[0]))

    def _forget_gathered(self) -> None:
        """Nothing computed from the old weights may serve the next pass: gathered shards, autocast's casts."""
        self._wrappers.reshard()
        torch.clear_autocast_cache()

    def _final(self, first_norm: Tensor | None = None) -> dict[str, Tensor]:
        """Whether inf or nan was met in either pass, on any rank."""
        rows = self._rows
        if any(r.parameter.grad is None for r in rows):
            rows = [r for r in rows if r.parameter.grad is not None]
        if not rows:
            raise ValueError("no parameter received a gradient: does the loss depend on this model?")
        gradients = self._gradients(rows)
        flag = ~self._space(rows).finite(gradients)
        if first_norm is not None:
            flag = flag | ~torch.isfinite(first_norm)
        return {"flag": self._wrappers.any_rank(flag) if self.scope == "rank" else flag}

    def _left_norm(self) -> Callable[[], float]:
        """‖p.grad‖ as this step leaves it, computed when asked for; nan once the gradients have changed."""
        rows = [r for r in self._rows if r.parameter.grad is not None]
        left = [r.parameter.grad for r in rows]
        version = sum(g._version for g in left if g is not None)
        scale = self._loss_scale()

        def norm() -> float:
            now = [r.parameter.grad for r in rows]
            same = all(a is b for a, b in zip(now, left, strict=True))
            if not rows or not same or sum(g._version for g in left if g is not None) != version:
                return math.nan
            return float(self._space(rows).norm(self._gradients(rows)) / (1.0 if scale is None else float(scale)))

        return norm

    def _leave_inf(self) -> None:
        """A scaler looks for inf in ``p.grad``: leave one on every device."""
        done: set[torch.device] = set()
        for row in self._rows:
            gradient = row.parameter.grad
            if gradient is not None and gradient.device not in done:
                done.add(gradient.device)
                local(gradient).fill_(float("inf"))

    def _warn_if_rounded(self) -> None:
        cosine = self.last._values.get("cosine")
        if cosine is None or isinstance(cosine, float) or self._warned:
            return
        if self.last.cosine < 0.95:
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


def _merged(records: list[tuple[float, dict[str, Any]]]) -> dict[str, Any]:
    """Weighted means of losses, plain means of norms, and any overflow."""
    out: dict[str, Any] = {"passes": max(r["passes"] for _, r in records)}
    for name in ("loss", "perturbed_loss"):
        values = [w * r[name] for w, r in records if r.get(name) is not None]
        out[name] = sum(values[1:], values[0]) if len(values) == len(records) else None
    for name in ("gradient_norm", "radius", "cosine"):
        values = [r[name] for _, r in records if r.get(name) is not None]
        out[name] = sum(values[1:], values[0]) / len(values) if values else None
    flags = [r["flag"] for _, r in records]
    out["flag"] = torch.stack(flags).any()
    return out
