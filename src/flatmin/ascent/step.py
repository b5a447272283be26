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
from .direction import AscentInfo, State
from .directions import Direction
from .model_view import ModelView
from .parameters import ParameterInfo
from .passes import PassRunner
from .record import Outcome, StateMean, accumulate, merged
from .rules import Rule

Scope = Literal["batch", "micro_batch", "rank", "first"]


class StepConfig(Protocol):
    """The attributes of a ``Sharpener`` that a step reads."""

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
    """The ε that was chosen, and what is saved of the pass at w."""

    gradients: dict[int, Tensor]  # g by parameter, where the rule or the cadence needs it
    gradient_norm: Tensor | None = None
    radius: Tensor | float = 0.0
    state: State = field(default_factory=dict)


@dataclass(frozen=True)
class AtWeights:
    """The weights are w; ``perturb`` leads to :class:`Perturbed`."""


@dataclass(frozen=True)
class Perturbed:
    """The weights are w + ε, or partly moved; ``restore`` leads to :class:`Restored`."""

    displacement: Displacement | Float32Displacement
    perturbation: Perturbation


@dataclass(frozen=True)
class Restored:
    """The weights are w again and ``p.grad`` is that of w + ε; ``combine`` leads to :class:`AtWeights`."""

    perturbation: Perturbation
    realised: list[Tensor]  # ε after rounding to half precision, where it applies


class Step:
    """One step of a sharpener; with micro-batch scope, one step for each micro-batch from the same state.

    ``run`` runs the whole step with a :class:`PassRunner`. A caller that runs the passes itself calls ``perturb``,
    ``restore`` and ``combine`` in turn, or ``plain`` where ``takes_second_pass`` is false.
    """

    def __init__(self, config: StepConfig, view: ModelView, number: int, earlier_state: State):
        self.view, self.stage = view, AtWeights()
        self.stage: AtWeights | Perturbed | Restored
        self._config, self._number, self._earlier_state = config, number, earlier_state
        lr = config.optimizer.param_groups[0].get("lr") if config.optimizer is not None else None
        self._rhos = view.rhos(number, lr)
        self.takes_second_pass = config.cadence(number) and any(self._rhos)  # evaluates at w + ε

    @property
    def is_perturbed(self) -> bool:
        """Whether the weights are at w + ε."""
        return isinstance(self.stage, Perturbed)

    def run(self, run_pass: PassRunner) -> Outcome:
        """The step, with gradients cleared on entry and left in ``p.grad``."""
        rule, inspection = self._config.rule, self.view.inspection
        if not self.takes_second_pass:
            return self.plain(run_pass(rule.first))
        if inspection.done:
            return self._run(run_pass)
        inspection.begin()
        run_pass.inspection = inspection
        outcome = self._run(run_pass)
        inspection.finish()
        self.view.choose_displacement()
        return outcome

    def run_each(self, runners: Sequence[tuple[float, PassRunner]]) -> Outcome:
        """A step for every micro-batch from the same state: weighted sums of gradients, means of the new states."""
        totals: dict[int, Tensor] = {}
        gradients: dict[int, Tensor] = {}
        states, outcomes = StateMean(self._earlier_state), []
        whole = sum(weight for weight, _ in runners) or 1.0
        for weight, run_pass in runners:
            outcome = self.run(run_pass)
            with torch.no_grad():
                accumulate(totals, self.view.all_gradients(), weight)
                self.view.clear_gradients()
                accumulate(gradients, outcome.gradients, weight)
                states.add(outcome.state, weight / whole)
            outcomes.append((weight, replace(outcome, gradients={}, state={})))
        for p in self.view.parameters:
            p.parameter.grad = totals.get(p.index)
        with torch.no_grad():
            return replace(merged(outcomes), gradients=gradients, state=states.result())

    def _run(self, run_pass: PassRunner) -> Outcome:
        config, rule, view = self._config, self._config.rule, self.view
        if config.takes_one_pass:
            return replace(self.combine(None, self._at_perturbed(run_pass, None)), passes=1)
        only_first = config.scope == "first"
        start = RandomState(view.devices) if config.replay else None
        versions = buffer_versions(view.registries)
        loss = run_pass(rule.first, on_this_rank=config.scope == "rank", only_first=only_first)
        after = RandomState(view.devices) if config.replay else None
        view.clear_weight_caches()
        if run_pass.inspection is not None:
            run_pass.inspection.begin_second()
            view.choose_displacement()
        buffers = Buffers(view.registries, versions)
        # with only_first the other micro-batches are evaluated only at w + ε: there they move buffers and generators
        after_first = buffers.restore if only_first else None
        with undone(buffers.restore, only_first), undone(_nothing if after is None else after.set, only_first):
            perturbed_loss = self._at_perturbed(run_pass, start, after_first)
            if rule.third is not None:
                if start is not None:
                    start.set()
                run_pass(rule.third, after_first=after_first)
        return self.combine(None if only_first else loss, perturbed_loss)

    def _at_perturbed(self, run_pass: PassRunner, start: RandomState | None,
                      after_first: Callable[[], None] | None = None) -> Tensor:
        """The second pass, with the weights at w + ε; they are restored whatever happens."""
        with undone(self.restore), self.perturb():
            if start is not None:
                start.set()
            return run_pass(self._config.rule.second, after_first=after_first)

    def plain(self, loss: Tensor | None) -> Outcome:
        """The outcome of a step without a second pass: ``p.grad`` holds g, plus a re-used sharpness component."""
        view, reuse, component = self.view, self._config.cadence.reuse, self._earlier_state.get("component")
        if reuse is not None and component is not None:
            parameters = view.with_gradients()
            g = view.gradients(parameters)
            with torch.no_grad():   # 0 where the last full step had no gradient
                reuse.add(view.space(parameters), g, [component[p.name] if p.name in component else torch.zeros_like(t)
                                                      for p, t in zip(parameters, g, strict=True)])
        return Outcome(self._overflow(), loss=loss)

    def perturb(self) -> AbstractContextManager[Any]:
        """With g in ``p.grad`` (or nothing, for directions that need none): compute ε and move the weights.

        Returns the context in which the second pass is to run.
        """
        config, view = self._config, self.view
        gradients = view.take_gradients()
        kept = {i: g.clone() if in_bucket(g) else g for i, g in gradients.items()} if config.keeps_gradient else {}
        stage = self.stage = Perturbed(view.displacement(config.offload), Perturbation(kept))
        moving = [p for p in view.parameters if p.parameter.requires_grad and self._rhos[p.index] > 0
                  and (p.index in gradients or not config.direction.needs_gradient)]
        with torch.no_grad():
            if moving:
                self._move(stage, moving, gradients)
            if config.scope == "rank":
                view.wrappers.average(list(kept.values()))
                view.wrappers.average([t for kind in stage.perturbation.state.values() for t in kind.values()])
        view.clear_weight_caches()
        return stage.displacement.mode

    def _move(self, stage: Perturbed, moving: list[ParameterInfo], gradients: dict[int, Tensor]) -> None:
        """Compute ε by the direction and move the weights."""
        config, view, rhos, chosen = self._config, self.view, self._rhos, stage.perturbation
        loss_scale = config.back_propagation.loss_scale(view.devices[0])
        ascent = config.direction(self._info(chosen, moving, gradients, loss_scale))
        moving, w, d, chosen.state = ascent.info.parameters, ascent.info.w, ascent.d, ascent.state
        usable = (ascent.norm > 0) & (ascent.norm < math.inf)
        radii = {max(rhos)} if len(view.groups) == 1 else {rhos[p.index] for p in moving}
        length = max(radii) * ascent.length if len(radii) == 1 else (
            ascent.own_length([rhos[p.index] for p in moving]) / ascent.norm)
        chosen.radius = torch.where(usable, length, 0.0)
        for rho in radii:
            scale = torch.where(usable, rho / ascent.norm, 0.0)
            for where in view.positions_with_rho(moving, rhos, rho):
                some = [w[i] for i in where]
                step = scale.to(torch.float64 if some[0].dtype == torch.float64 else torch.float32)
                stage.displacement.move(some, [d[i] for i in where], step, finite=True)
        if chosen.gradient_norm is not None and loss_scale is not None:
            chosen.gradient_norm = chosen.gradient_norm / loss_scale.to(chosen.gradient_norm.device)

    def _info(self, chosen: Perturbation, moving: list[ParameterInfo], gradients: dict[int, Tensor],
              loss_scale: Tensor | None) -> AscentInfo:
        """What the direction may read; it may overwrite the gradient."""
        config, view = self._config, self.view
        space, g = view.space(moving), []
        if config.direction.needs_gradient:
            keep = config.keeps_gradient
            g = [t.clone() if keep or in_bucket(t) else t for t in (gradients[p.index] for p in moving)]
            chosen.gradient_norm = space.norm(g)
        gradients.clear()
        return AscentInfo(moving, space, view.weights(moving), g, chosen.gradient_norm, self._earlier_state,
                          self._number, config.optimizer, loss_scale)

    def restore(self) -> None:
        """Restore the weights, if they were moved."""
        stage = self.stage
        if isinstance(stage, Perturbed):
            stage.displacement.restore()
            self.stage = Restored(stage.perturbation, stage.displacement.realised)
            self.view.clear_weight_caches()

    def combine(self, loss: Tensor | None, perturbed_loss: Tensor | None) -> Outcome:
        """``p.grad`` holds g_p: apply the rule."""
        stage, config, view = self.stage, self._config, self.view
        assert isinstance(stage, Restored)
        chosen = stage.perturbation
        if config.keeps_gradient:
            parameters, perturbed, gradient = view.paired_gradients(chosen.gradients)
            with torch.no_grad():
                config.rule(view.space(parameters), perturbed, gradient)
        cosine: Tensor | float = 1.0
        if stage.realised:
            asked, done, inner = torch.stack(stage.realised).sum(0)
            cosine, chosen.radius = inner / (asked * done).sqrt(), chosen.radius * (done / asked).sqrt()
        self.stage = AtWeights()
        return Outcome(self._overflow(chosen.gradient_norm), 2, loss, perturbed_loss, chosen.gradient_norm, None,
                       chosen.radius, cosine, {} if config.cadence.reuse is None else chosen.gradients, chosen.state)

    def component(self, gradients: dict[int, Tensor]) -> dict[str, Tensor]:
        """The sharpness component of the gradient in ``p.grad``, given g, for the steps that re-use it."""
        reuse, view = self._config.cadence.reuse, self.view
        assert reuse is not None
        parameters, perturbed, gradient = view.paired_gradients(gradients)
        with torch.no_grad():
            component = reuse.component(view.space(parameters), perturbed, gradient)
        return {p.name: c for p, c in zip(parameters, component, strict=True)}

    def _overflow(self, gradient_norm: Tensor | None = None) -> Tensor:
        """Whether inf or nan occurred in either pass, on any rank."""
        view, parameters = self.view, self.view.with_gradients()
        if not parameters:
            raise ValueError("no parameter received a gradient: does the loss depend on this model?")
        flag = ~view.space(parameters).finite(view.gradients(parameters))
        if gradient_norm is not None:
            flag = flag | ~(gradient_norm < math.inf)      # nan is not
        return view.wrappers.any_rank(flag) if self._config.scope == "rank" else flag


def _nothing() -> None:
    pass
