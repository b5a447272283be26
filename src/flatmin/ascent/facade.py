"""``SAM(params, base_optimizer)``: the drop-in ``torch.optim.Optimizer`` façade over :class:`Sharpener`."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.weak import TensorWeakRef

from ..errors import PerturbedStateError
from ..perturbed import Buffers, RandomState, buffer_registries, unchanged_buffers, unchanged_random_state
from ..vectors import Space, local, matched
from .cadences import Cadence
from .directions import Adaptive, Direction
from .parameters import check_rho, devices_of
from .rules import Rule
from .sharpener import Sharpener


class _NoGradient(Exception):
    """The closure left no gradient: there is nothing to step on."""


class _EarlierGradients:
    """Gradients found before a closure's first call: does the closure clear them, and if not, are they its own?"""

    def __init__(self, found: list[tuple[nn.Parameter, Tensor]]):
        self.found = found
        self._reached: set[nn.Parameter] = set()
        self._kept: list[tuple[nn.Parameter, Tensor]] = []

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Around the first call: what the closure has not cleared is set aside before it would be added to."""
        self.put_back()
        self._reached, self._kept = set(), []
        hooks = [p.register_hook(partial(self._set_aside, p)) for p, _ in self.found if p.requires_grad]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        for p, gradient in self.found:
            if p not in self._reached and p.grad is gradient:  # nothing was added to it through autograd
                self._keep(p)

    def put_back(self) -> None:
        """The gradients as they were found."""
        for p, gradient in self.found:
            p.grad = gradient

    def _set_aside(self, parameter: nn.Parameter, _: Tensor) -> None:
        if parameter not in self._reached:
            self._keep(parameter)
        self._reached.add(parameter)

    def _keep(self, parameter: nn.Parameter) -> None:
        gradient, parameter.grad = parameter.grad, None
        if gradient is not None and bool(local(gradient).any()):
            self._kept.append((parameter, gradient))

    @property
    def unsettled(self) -> bool:
        """Whether gradients were there that the closure has not cleared."""
        return bool(self._kept)

    def check(self) -> None:
        """With the closure's own gradient at w in ``p.grad``: raise if there were others, or else forget them."""
        if self._kept:
            space = Space([p for p, _ in self._kept])
            earlier = [local(g) for _, g in self._kept]
            own = [torch.zeros_like(g) if p.grad is None else local(matched(p.grad, p))
                   for (p, _), g in zip(self._kept, earlier, strict=True)]
            size, off = float(space.norm(own)), float(space.norm([a - b for a, b in zip(earlier, own, strict=True)]))
            rounding = max(torch.finfo(g.dtype).eps for g in earlier) ** (2 / 3)
            if math.isfinite(size) and not off <= rounding * size:  # inf and nan: the step is skipped, nothing is lost
                raise _ForeignGradients(
                    f"step(closure) found gradients (norm {float(space.norm(earlier)):.3g}) that the closure neither "
                    f"clears nor computes itself (norm {size:.3g}, difference {off:.3g}), and would lose them. Let "
                    "the closure call zero_grad, or clear them before; to accumulate micro-batches use "
                    "flatmin.Sharpener, which takes a list of them; to go on from the gradients that are there, call "
                    "first_step, the closure and second_step")
        self.found, self._kept = [], []


class _ForeignGradients(ValueError):
    """Gradients were present that are not the closure's own."""


class _ClosurePasses:
    """Passes made by calling the user's closure; it back-propagates itself."""

    alone = False

    def __init__(self, closure: Callable[[], Any], sharpener: Sharpener, earlier: _EarlierGradients):
        self._closure, self._sharpener, self._earlier = closure, sharpener, earlier
        self.first: Any = None
        self._calls = 0

    def loss(self) -> Tensor:
        self._sharpener.clear_gradients()
        if self._calls == 0:
            with self._earlier.watched():
                self.first = value = self._call()
            if not self._sharpener.standing:  # a gradient at w + ε cannot be compared
                self._earlier.check()
            if not self._sharpener.has_gradients:
                raise _NoGradient
        else:
            value = self._call()
        self._calls += 1
        return value.detach() if isinstance(value, Tensor) else torch.tensor(float("nan") if value is None else value)

    def _call(self) -> Any:
        with torch.enable_grad():
            return self._closure()


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
        if rule is not None and rule.second != "loss":
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
        self._between = False  # first_step was called and second_step was not
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
        self._refuse_standing("assigning param_groups")
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
        if self._between:
            raise PerturbedStateError("first_step was called twice: call second_step first, or restore() to abandon "
                                      "a step whose second pass failed")
        self._follow()
        if not self.sharpener.has_gradients:
            raise ValueError("first_step needs gradients: call loss.backward() before it")
        self._between = True
        if not self.sharpener.pays:  # a plain step of the cadence: the second gradient is taken at w
            if zero_grad:
                self.zero_grad()
            return
        kept = [] if zero_grad else [(p, p.grad.clone()) for p in self._parameters() if p.grad is not None]
        try:
            self.sharpener.perturb()
        except BaseException:
            self.restore()
            raise
        for p, gradient in kept:
            p.grad = gradient

    def second_step(self, zero_grad: bool = False) -> None:
        """With the gradient at w + ε in ``p.grad``: go back to w and take the base optimizer's step."""
        if not self._between:
            raise PerturbedStateError("second_step needs a first_step before it")
        is_perturbed = self.sharpener.standing
        self.restore()
        if self.sharpener.has_gradients:  # the caller ran the passes: their losses are not known here
            outcome = self.sharpener.combined(None, None) if is_perturbed else self.sharpener.plain_record(None)
            self.sharpener.finish(outcome)
        self._opt_called = True  # what an LR scheduler looks for
        self._step_base()
        if zero_grad:
            self.zero_grad()

    def restore(self) -> None:
        """Give back w after a second pass that failed; without effect otherwise."""
        self._between = False
        self.sharpener.restore()

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
        if self._between:
            raise PerturbedStateError("step was called between first_step and second_step")
        self._follow()
        left = {p for p, gradient, version in self._left
                if p.grad is not None and gradient() is p.grad and _version(p.grad) == version}
        earlier = _EarlierGradients([(p, p.grad) for p in self._parameters() if p.grad is not None and p not in left])
        before = self._surroundings() if earlier.found else []
        passes = _ClosurePasses(closure, self.sharpener, earlier)
        try:
            record = self.sharpener.run(passes)
            if earlier.unsettled:
                self._check_at_w(closure, earlier)
        except _NoGradient:
            return passes.first
        except BaseException as error:
            self.sharpener.clear_gradients()
            earlier.put_back()
            if isinstance(error, _ForeignGradients):
                for restore in before:
                    restore()
            raise
        self.sharpener.finish(record)
        self._step_base()
        return passes.first

    def _surroundings(self) -> list[Callable[[], None]]:
        """What a refused closure may have changed beside the gradients: how to give it back."""
        return [Buffers(buffer_registries(self._module)).restore, RandomState(devices_of(self._parameters())).set]

    def _check_at_w(self, closure: Callable[[], Any], earlier: _EarlierGradients) -> None:
        """After a step whose only pass was at w + ε: compare the gradients found with the closure's own at w."""
        result = [(p, p.grad) for p in self._parameters()]
        self.sharpener.clear_gradients()
        with unchanged_buffers(self._module), unchanged_random_state(devices_of(self._parameters())):
            with torch.enable_grad():
                closure()
        earlier.check()
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
        self._refuse_standing("adding a group")
        check_rho(param_group.get("rho", self._settings["rho"]))
        self.base_optimizer.add_param_group(param_group)
        self._follow()

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's ``state_dict``, and a ``sharpener`` entry where a direction or cadence has state."""
        self._refuse_standing("saving")
        self._follow()
        state = self.base_optimizer.state_dict()
        if self._chosen or self.sharpener.has_state or any(callable(group["rho"]) for group in self.param_groups):
            state["sharpener"] = self.sharpener.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` gave, or the state of a plain base optimizer; then the cadence starts anew."""
        self._refuse_standing("loading")
        state_dict = dict(state_dict)
        extra = state_dict.pop("sharpener", None)
        self.base_optimizer.load_state_dict(state_dict)
        self._follow()
        self.sharpener.load_state_dict({"step": 0, "memory": {}} if extra is None else extra)

    def __getstate__(self) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        self._refuse_standing("copying or pickling")
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

    def _refuse_standing(self, what: str) -> None:
        if self._between:
            raise PerturbedStateError(f"{what} between first_step and second_step would take w + ε for the weights: "
                                      "call second_step (or restore) first")


def _version(tensor: Tensor) -> int:
    return tensor._version + local(tensor)._version  # a sharded tensor may be written to through either


def _contents(groups: list[dict[str, Any]]) -> list[tuple[dict[str, Any], list[nn.Parameter]]]:
    return [(group, list(group["params"])) for group in groups]
