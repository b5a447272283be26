"""One step, w → w + ε → w, as a state machine: :class:`AtWeights`, :class:`Perturbed`, :class:`Restored`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from ..parallel import in_bucket
from ..perturbed import Buffers, Displacement, Float32Displacement, RandomState, buffer_versions, undone
from .back_propagation import BackPropagation
from .cadences import Cadence
from .directions import Direction
from .model_view import ModelView
from .parameters import ParameterInfo
from .passes import Runner
from .record import MemoryMean, Outcome, accumulate, merged
from .rules import Rule
from .steepest import AscentInfo, Memory

Scope = Literal["batch", "micro_batch", "rank", "first"]


class Parts(Protocol):
    """What a step is made of, as a ``Sharpener`` has it."""

    direction: Direction
    rule: Rule
    cadence: Cadence
    scope: Scope
    optimizer: torch.optim.Optimizer | None
    back_propagation: BackPropagation
    replay: bool
    offload: bool

    @property
    def keeps_gradient(self) -> bool: ...
    @property
    def takes_one_pass(self) -> bool: ...


@dataclass
class Perturbation:
    """The ε that was chosen, and what is kept of the pass at w."""

    gradients: dict[int, Tensor]  # g by parameter, where the rule or the cadence needs it
    gradient_norm: Tensor | None = None
    radius: Tensor | float = 0.0
    memory: Memory = field(default_factory=dict)


@dataclass(frozen=True)
class AtWeights:
    """The weights are w; ``perturb`` leads to :class:`Perturbed`."""


@dataclass(frozen=True)
class Perturbed:
    """The weights are w + ε, or on their way; ``restore`` leads to :class:`Restored`."""

    displacement: Displacement | Float32Displacement
    perturbation: Perturbation


@dataclass(frozen=True)
class Restored:
    """The weights are w again and ``p.grad`` is that of w + ε; ``combine`` leads to :class:`AtWeights`."""

    perturbation: Perturbation
    realised: list[Tensor]  # what half-precision weights made of ε, where they may have rounded it


class Step:
    """One step of a sharpener; with micro-batch scope, one after another from the same ``memory``.

    ``run`` makes the whole step with what can run passes. A caller that runs the passes itself calls ``perturb``,
    ``restore`` and ``combine`` in turn, or ``plain`` where ``pays`` is false.
    """

    def __init__(self, parts: Parts, view: ModelView, number: int, memory: Memory):
        self.view, self.state = view, AtWeights()
        self.state: AtWeights | Perturbed | Restored
        self._parts, self._number, self._memory = parts, number, memory
        lr = parts.optimizer.param_groups[0].get("lr") if parts.optimizer is not None else None
        self._rhos = view.rhos(number, lr)
        self.pays = parts.cadence(number) and any(self._rhos)  # whether the second pass is taken

    @property
    def is_perturbed(self) -> bool:
        """Whether the weights are at w + ε."""
        return isinstance(self.state, Perturbed)

    def run(self, passes: Runner) -> Outcome:
        """The step, with gradients cleared on entry and left in ``p.grad``."""
        rule, inspection = self._parts.rule, self.view.inspection
        if not self.pays:
            return self.plain(passes(rule.first))
        if inspection.done:
            return self._run(passes)
        inspection.begin()
        passes.inspection = inspection
        outcome = self._run(passes)
        inspection.finish()
        self.view.choose_mover()
        return outcome

    def run_each(self, passes: Sequence[tuple[float, Runner]]) -> Outcome:
        """A step for every micro-batch from the same memory: weighted sums of gradients, means of what is kept."""
        totals: dict[int, Tensor] = {}
        gradients: dict[int, Tensor] = {}
        memory, outcomes = MemoryMean(self._memory), []
        whole = sum(weight for weight, _ in passes) or 1.0
        for weight, one in passes:
            outcome = self.run(one)
            with torch.no_grad():
                accumulate(totals, self.view.all_gradients(), weight)
                self.view.clear_gradients()
                accumulate(gradients, outcome.gradients, weight)
                memory.add(outcome.memory, weight / whole)
            outcomes.append((weight, replace(outcome, gradients={}, memory={})))
        for p in self.view.parameters:
            p.parameter.grad = totals.get(p.index)
        with torch.no_grad():
            return replace(merged(outcomes), gradients=gradients, memory=memory.result())

    def _run(self, passes: Runner) -> Outcome:
        parts, rule, view = self._parts, self._parts.rule, self.view
        if parts.takes_one_pass:
            return replace(self.combine(None, self._at_perturbed(passes, None)), passes=1)
        only_first = parts.scope == "first"
        start = RandomState(view.devices) if parts.replay else None
        versions = buffer_versions(view.registries)
        loss = passes(rule.first, alone=parts.scope == "rank", only_first=only_first)
        after = RandomState(view.devices) if parts.replay else None
        view.forget_gathered()
        if passes.inspection is not None:
            passes.inspection.begin_second()
            view.choose_mover()
        buffers = Buffers(view.registries, versions)
        # with only_first, the other micro-batches move buffers and generators at w + ε, since they are met there alone
        after_first = buffers.restore if only_first else None
        with undone(buffers.restore, only_first), undone(_nothing if after is None else after.set, only_first):
            perturbed_loss = self._at_perturbed(passes, start, after_first)
            if rule.third is not None:
                if start is not None:
                    start.set()
                passes(rule.third, after_first=after_first)
        return self.combine(None if only_first else loss, perturbed_loss)

    def _at_perturbed(self, passes: Runner, start: RandomState | None,
                      after_first: Callable[[], None] | None = None) -> Tensor:
        """The second pass, with the weights at w + ε; they are restored whatever happens."""
        with undone(self.restore), self.perturb():
            if start is not None:
                start.set()
            return passes(self._parts.rule.second, after_first=after_first)

    def plain(self, loss: Tensor | None) -> Outcome:
        """The outcome of a step without a second pass: ``p.grad`` holds g, plus a re-used sharpness component."""
        view, reuse, component = self.view, self._parts.cadence.reuse, self._memory.get("component")
        if reuse is not None and component is not None:
            parameters = view.with_gradients()
            g = view.gradients(parameters)
            with torch.no_grad():   # 0 where the last full step had no gradient
                reuse.add(view.space(parameters), g, [component[p.name] if p.name in component else torch.zeros_like(t)
                                                      for p, t in zip(parameters, g, strict=True)])
        return Outcome(self._overflow(), loss=loss)

    def perturb(self) -> AbstractContextManager[Any]:
        """With g in ``p.grad`` (or nothing, for directions that need none): choose ε, keep what is needed, move.

        Returns the context in which the second pass is to run.
        """
        parts, view = self._parts, self.view
        gradients = view.take_gradients()
        kept = {i: g.clone() if in_bucket(g) else g for i, g in gradients.items()} if parts.keeps_gradient else {}
        state = self.state = Perturbed(view.displacement(parts.offload), Perturbation(kept))
        moving = [p for p in view.parameters if p.parameter.requires_grad and self._rhos[p.index] > 0
                  and (p.index in gradients or not parts.direction.needs_gradient)]
        with torch.no_grad():
            if moving:
                self._move(state, moving, gradients)
            if parts.scope == "rank":
                view.wrappers.average(list(kept.values()))
                view.wrappers.average([t for kind in state.perturbation.memory.values() for t in kind.values()])
        view.forget_gathered()
        return state.displacement.mode

    def _move(self, state: Perturbed, moving: list[ParameterInfo], gradients: dict[int, Tensor]) -> None:
        """Ask the direction and move by its answer."""
        parts, view, rhos, chosen = self._parts, self.view, self._rhos, state.perturbation
        loss_scale = parts.back_propagation.loss_scale(view.devices[0])
        ascent = parts.direction(self._info(chosen, moving, gradients, loss_scale))
        moving, w, d, chosen.memory = ascent.info.parameters, ascent.info.w, ascent.d, ascent.memory
        usable = (ascent.norm > 0) & (ascent.norm < math.inf)
        radii = {max(rhos)} if len(view.groups) == 1 else {rhos[p.index] for p in moving}
        length = max(radii) * ascent.length if len(radii) == 1 else (
            ascent.own_length([rhos[p.index] for p in moving]) / ascent.norm)
        chosen.radius = torch.where(usable, length, 0.0)
        for rho in radii:
            scale = torch.where(usable, rho / ascent.norm, 0.0)
            for where in view.alike(moving, rhos, rho):
                some = [w[i] for i in where]
                step = scale.to(torch.float64 if some[0].dtype == torch.float64 else torch.float32)
                state.displacement.move(some, [d[i] for i in where], step, finite=True)
        if chosen.gradient_norm is not None and loss_scale is not None:
            chosen.gradient_norm = chosen.gradient_norm / loss_scale.to(chosen.gradient_norm.device)

    def _info(self, chosen: Perturbation, moving: list[ParameterInfo], gradients: dict[int, Tensor],
              loss_scale: Tensor | None) -> AscentInfo:
        """What the direction may read; the gradient's memory becomes the direction's."""
        parts, view = self._parts, self.view
        space, g = view.space(moving), []
        if parts.direction.needs_gradient:
            keep = parts.keeps_gradient
            g = [t.clone() if keep or in_bucket(t) else t for t in (gradients[p.index] for p in moving)]
            chosen.gradient_norm = space.norm(g)
        gradients.clear()
        return AscentInfo(moving, space, view.weights(moving), g, chosen.gradient_norm, self._memory, self._number,
                          parts.optimizer, loss_scale)

    def restore(self) -> None:
        """Give the weights back, if they were moved."""
        state = self.state
        if isinstance(state, Perturbed):
            state.displacement.restore()
            self.state = Restored(state.perturbation, state.displacement.realised)
            self.view.forget_gathered()

    def combine(self, loss: Tensor | None, perturbed_loss: Tensor | None) -> Outcome:
        """``p.grad`` holds g_p: apply the rule."""
        state, parts, view = self.state, self._parts, self.view
        assert isinstance(state, Restored)
        chosen = state.perturbation
        if parts.keeps_gradient:
            parameters, perturbed, gradient = view.both(chosen.gradients)
            with torch.no_grad():
                parts.rule(view.space(parameters), perturbed, gradient)
        cosine: Tensor | float = 1.0
        if state.realised:
            asked, done, inner = torch.stack(state.realised).sum(0)
            cosine, chosen.radius = inner / (asked * done).sqrt(), chosen.radius * (done / asked).sqrt()
        self.state = AtWeights()
        return Outcome(self._overflow(chosen.gradient_norm), 2, loss, perturbed_loss, chosen.gradient_norm, None,
                       chosen.radius, cosine, {} if parts.cadence.reuse is None else chosen.gradients, chosen.memory)

    def component(self, gradients: dict[int, Tensor]) -> dict[str, Tensor]:
        """The sharpness component of the gradient in ``p.grad``, given g, for the steps that re-use it."""
        reuse, view = self._parts.cadence.reuse, self.view
        assert reuse is not None
        parameters, perturbed, gradient = view.both(gradients)
        with torch.no_grad():
            component = reuse.component(view.space(parameters), perturbed, gradient)
        return {p.name: c for p, c in zip(parameters, component, strict=True)}

    def _overflow(self, gradient_norm: Tensor | None = None) -> Tensor:
        """Whether inf or nan was met in either pass, on any rank."""
        view, parameters = self.view, self.view.with_gradients()
        if not parameters:
            raise ValueError("no parameter received a gradient: does the loss depend on this model?")
        flag = ~view.space(parameters).finite(view.gradients(parameters))
        if gradient_norm is not None:
            flag = flag | ~(gradient_norm < math.inf)      # nan is not
        return view.wrappers.any_rank(flag) if self._parts.scope == "rank" else flag


def _nothing() -> None:
    pass
