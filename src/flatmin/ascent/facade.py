"""``SAM(params, base_optimizer)``: the drop-in ``torch.optim.Optimizer`` façade over :class:`Sharpener`."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.weak import TensorWeakRef

from ..errors import PerturbedStateError
from ..parallel import local
from ..perturbed import Buffers, RandomState, buffer_registries, unchanged_buffers, unchanged_random_state
from .cadences import Cadence
from .closures import ClosurePasses, ForeignGradients, GradientsBeforeClosure, NoGradient
from .directions import Adaptive, Direction
from .parameters import check_rho, devices_of
from .rules import Rule
from .sharpener import Sharpener
from .step import Step


class SAM(Optimizer):
    """Sharpness-aware minimization with the call of the most used SAM class; everything else is the base optimizer's.

    ε = ρ g/‖g‖, or with ``adaptive=True`` ε = ρ w²g/‖|w|g‖ on every tensor (that class's form: no η, biases too; the
    paper's ASAM is ``flatmin.presets.asam``).

    Args:
        params: parameters or parameter groups; a group may have its own ``rho`` and ``adaptive``. A
            ``torch.nn.Module`` may stand for its parameters; then ``step(closure)`` moves BatchNorm statistics once a
            step and replays dropout.
        base_optimizer: an optimizer class, built here with ``**options`` and kept as ``.base_optimizer``.
        rho: radius ρ ≥ 0.
        direction, rule, cadence, offload: as for ``flatmin.Sharpener``; rules that need the outputs have no place here.

    ``param_groups``, ``state``, ``state_dict`` and hooks are the base optimizer's own, so that schedulers, checkpoints
    and trainers see a plain optimizer. They may be assigned, or changed through ``base_optimizer``: the next step
    follows, and a group that names no ``rho`` keeps the one its parameters had. Gradient scaling and accumulation
    need both passes under control: use ``flatmin.Sharpener``.

    Raises:
        ValueError: a negative ρ; ``adaptive=True`` together with a direction; ``step`` without a closure, or with
            gradients present that it would lose.
        PerturbedStateError: saving, or a second ``first_step``, while the weights stand at w + ε.

    Example:
        >>> import torch, flatmin
        >>> model = torch.nn.Linear(2, 1)
        >>> opt = flatmin.SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1)
        >>> loss_fn = lambda: model(torch.ones(1, 2)).square().mean()
        >>> loss_fn().backward(); opt.first_step(zero_grad=True)
        >>> loss_fn().backward(); opt.second_step(zero_grad=True)
    """

    def __init__(self, params: Iterable[Any] | nn.Module, base_optimizer: Callable[..., Optimizer], rho: Any = 0.05,
                 adaptive: bool = False, *, direction: Direction | None = None, rule: Rule | None = None,
                 cadence: Cadence | None = None, offload: bool = False, **options: Any):
        if isinstance(base_optimizer, Optimizer):
            raise ValueError("pass the optimizer's class, not an instance: SAM(params, torch.optim.SGD, rho=0.05, "
                             "lr=0.1); around an optimizer you already have use flatmin.Sharpener")
        if rule is not None and (rule.second.needs_outputs or rule.second.needs_samples):
            raise ValueError(f"{type(rule).__name__} needs the network's outputs, which a closure does not show: use "
                             "flatmin.Sharpener")
        if base_optimizer is torch.optim.LBFGS:
            raise ValueError("LBFGS calls its closure itself and cannot be the base of SAM; use flatmin.Sharpener "
                             "inside its closure")
        if adaptive and direction is not None:
            raise ValueError(f"adaptive=True chooses a direction, and {type(direction).__name__} was given as another: "
                             "pass one of them")
        self._settings = {"rho": check_rho(rho), "adaptive": bool(adaptive)}
        self._module = params if isinstance(params, nn.Module) else None
        groups = params.parameters() if isinstance(params, nn.Module) else params
        self.base_optimizer = base_optimizer(groups, **options)
        self._chosen = direction is not None  # it may draw random numbers by the number of the step
        self._parts: dict[str, Any] = {"direction": direction or Adaptive(0.0, biases=True, by_group=True),
                                       "rule": rule, "cadence": cadence, "offload": offload}
        self._connect()

    def _connect(self) -> None:
        """Share the base optimizer's groups and hooks; put a sharpener over its parameters."""
        base = self.base_optimizer
        self.defaults = {**base.defaults, **self._settings}
        for kind in ("step_pre", "step_post", "state_dict_pre", "state_dict_post", "load_state_dict_pre",
                     "load_state_dict_post"):
            setattr(self, f"_optimizer_{kind}_hooks", getattr(base, f"_optimizer_{kind}_hooks"))
        self._patch_step_function()
        self._warned_capturable_if_run_uncaptured = True
        self._step: Step | None = None  # between first_step and second_step
        self._left: list[tuple[nn.Parameter, TensorWeakRef, int]] = []  # the last step's gradients, their versions
        self._seen: list[tuple[dict[str, Any], list[nn.Parameter]]] = []
        self._complete(base.param_groups)
        self._seen = _contents(base.param_groups)
        self.sharpener = Sharpener(self._module, groups=base.param_groups, optimizer=base, rho=self._settings["rho"],
                                   **self._parts)

    def _complete(self, groups: list[dict[str, Any]]) -> None:
        """Give groups without ``rho`` or ``adaptive`` those of their first known parameter, or else the defaults."""
        earlier = {id(p): group for group, params in self._seen for p in params}
        for group in groups:
            had = next((earlier[id(p)] for p in group["params"] if id(p) in earlier), self._settings)
            for key in self._settings:
                group.setdefault(key, had[key])
            check_rho(group["rho"])

    def _follow(self) -> None:
        """Take up what has become of the base optimizer's groups: assigned, loaded, extended, other parameters."""
        groups, seen = self.base_optimizer.param_groups, self._seen
        if len(groups) == len(seen) and all(
                group is old and len(group["params"]) == len(params) and all(map(operator.is_, group["params"], params))
                for group, (old, params) in zip(groups, seen, strict=True)):
            return
        self._complete(groups)
        state = self.sharpener.state_dict()
        if self._module is None:  # bare parameters are named by their position
            place = {id(p): str(i) for i, p in enumerate(self._parameters())}
            before = [p for _, params in seen for p in params]
            state["memory"] = {kind: {place[id(before[int(name)])]: t for name, t in tensors.items()
                                      if id(before[int(name)]) in place}
                               for kind, tensors in state["memory"].items()}
        self.sharpener.refresh(groups)
        self.sharpener.load_state_dict(state)
        self._seen = _contents(groups)

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The base optimizer's groups themselves."""
        return self.base_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self._refuse_between_steps("assigning param_groups")
        self._complete(groups)
        before, self.base_optimizer.param_groups = self.base_optimizer.param_groups, groups
        try:
            self._follow()
        except ValueError:
            self.base_optimizer.param_groups = before
            raise

    @property
    def state(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The base optimizer's state itself."""
        return self.base_optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.base_optimizer.state = state

    def first_step(self, zero_grad: bool = False) -> None:
        """With the gradient at w in ``p.grad``: move to w + ε."""
        if self._step is not None:
            raise PerturbedStateError("first_step was called twice: call second_step first, or restore() to abandon "
                                      "a step whose second pass failed")
        self._follow()
        if not self.sharpener.view.has_gradients:
            raise ValueError("first_step needs gradients: call loss.backward() before it")
        self._step = self.sharpener.begin()
        if not self._step.pays:  # a plain step of the cadence: the second gradient is taken at w
            if zero_grad:
                self.zero_grad()
            return
        kept = [] if zero_grad else [(p, p.grad.clone()) for p in self._parameters() if p.grad is not None]
        try:
            self._step.perturb()
        except BaseException:
            self.restore()
            raise
        for p, gradient in kept:
            p.grad = gradient

    def second_step(self, zero_grad: bool = False) -> None:
        """With the gradient at w + ε in ``p.grad``: go back to w and take the base optimizer's step."""
        step = self._step
        if step is None:
            raise PerturbedStateError("second_step needs a first_step before it")
        is_perturbed = step.is_perturbed
        self.restore()
        if step.view.has_gradients:  # the caller ran the passes: their losses are not known here
            self.sharpener.finish(step, step.combine(None, None) if is_perturbed else step.plain(None))
        self._opt_called = True  # what an LR scheduler looks for
        self._step_base()
        if zero_grad:
            self.zero_grad()

    def restore(self) -> None:
        """Give back w after a second pass that failed; without effect otherwise."""
        self.sharpener.abandon()
        self._step = None

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore
        """Both passes and the base optimizer's step, in torch's closure convention.

        ``closure`` evaluates the model, back-propagates and returns the loss; it is called twice, with gradients
        cleared before each call. Returns the loss at w.

        Gradients that are there already, other than those this optimizer's last step left, are the closure's to
        clear. If it does not, they must be zero or the gradient that it computes itself, as in ``loss.backward();
        optimizer.step(closure)``, which is known only after its call at w: without that pass, call ``first_step``,
        the closure and ``second_step``. Anything else, such as the gradients of other micro-batches, is refused.
        """
        if closure is None:
            raise ValueError(
                "SAM.step needs a closure that evaluates the model, calls backward and returns the loss: "
                "optimizer.step(closure). Without one, call first_step(zero_grad=True), evaluate and backward again, "
                "then second_step(zero_grad=True); or leave your optimizer as it is and use flatmin.Sharpener, which "
                "stands where loss.backward() stood"
            )
        if self._step is not None or self.sharpener.is_perturbed:
            raise PerturbedStateError("step was called between first_step and second_step, or from within itself")
        self._follow()
        left = {p for p, gradient, version in self._left
                if p.grad is not None and gradient() is p.grad and _version(p.grad) == version}
        found = GradientsBeforeClosure([(p, p.grad) for p in self._parameters()
                                        if p.grad is not None and p not in left])
        undo = self._surroundings() if found.found else []
        step = self.sharpener.begin()
        passes = ClosurePasses(closure, step, found)
        try:
            outcome = step.run(passes)
            if found.unsettled:
                self._check_at_w(closure, found)
        except NoGradient:
            self.sharpener.abandon()
            return passes.first
        except BaseException as error:
            self.sharpener.abandon()
            self.sharpener.view.clear_gradients()
            found.put_back()
            if isinstance(error, ForeignGradients):
                for restore in undo:
                    restore()
            raise
        self.sharpener.finish(step, outcome)
        self._step_base()
        return passes.first

    def _surroundings(self) -> list[Callable[[], None]]:
        """What a refused closure may have changed beside the gradients: how to give it back."""
        return [Buffers(buffer_registries(self._module)).restore, RandomState(devices_of(self._parameters())).set]

    def _check_at_w(self, closure: Callable[[], Any], found: GradientsBeforeClosure) -> None:
        """After a step whose only pass was at w + ε: compare the gradients found with the closure's own at w."""
        result = [(p, p.grad) for p in self._parameters()]
        self.sharpener.view.clear_gradients()
        with unchanged_buffers(self._module), unchanged_random_state(devices_of(self._parameters())):
            with torch.enable_grad():
                closure()
        found.check()
        for p, gradient in result:
            p.grad = gradient

    def _step_base(self) -> None:
        """The base optimizer's step; the gradients it leaves are known again at the next ``step(closure)``."""
        self.base_optimizer.step()
        self._left = [(p, TensorWeakRef(p.grad), _version(p.grad)) for p in self._parameters() if p.grad is not None]

    # torch wraps an optimizer's step to run its hooks; the base optimizer's step runs them already
    step.hooked = True  # pyright: ignore[reportFunctionMemberAccess]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients; weights are not touched."""
        self.base_optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, which may have its own ``rho`` and ``adaptive``."""
        self._refuse_between_steps("adding a group")
        check_rho(param_group.get("rho", self._settings["rho"]))
        self.base_optimizer.add_param_group(param_group)
        self._follow()

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's ``state_dict``, and a ``sharpener`` entry where a direction or cadence has state."""
        self._refuse_between_steps("saving")
        self._follow()
        state = self.base_optimizer.state_dict()
        if self._chosen or self.sharpener.has_state or any(callable(group["rho"]) for group in self.param_groups):
            state["sharpener"] = self.sharpener.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` gave, or the state of a plain base optimizer; then the cadence starts anew."""
        self._refuse_between_steps("loading")
        state_dict = dict(state_dict)
        extra = state_dict.pop("sharpener", None)
        self.base_optimizer.load_state_dict(state_dict)
        self._follow()
        self.sharpener.load_state_dict({"step": 0, "memory": {}} if extra is None else extra)

    def __getstate__(self) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        self._refuse_between_steps("copying or pickling")
        self._follow()
        return {"base_optimizer": self.base_optimizer, "_settings": self._settings, "_module": self._module,
                "_parts": self._parts, "_chosen": self._chosen, "sharpener_state": self.sharpener.state_dict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        extra = state.pop("sharpener_state")
        self.__dict__.update(state)
        self._connect()
        self.sharpener.load_state_dict(extra)

    def _parameters(self) -> list[nn.Parameter]:
        return [p for group in self.param_groups for p in group["params"]]

    def _refuse_between_steps(self, what: str) -> None:
        if self._step is not None:
            raise PerturbedStateError(f"{what} between first_step and second_step would take w + ε for the weights: "
                                      "call second_step (or restore) first")


def _version(tensor: Tensor) -> int:
    return tensor._version + local(tensor)._version  # a sharded tensor may be written to through either


def _contents(groups: list[dict[str, Any]]) -> list[tuple[dict[str, Any], list[nn.Parameter]]]:
    return [(group, list(group["params"])) for group in groups]
