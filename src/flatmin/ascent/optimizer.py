"""``SAM(params, base_optimizer)``: the drop-in ``torch.optim.Optimizer`` façade over :class:`Sharpener`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import PerturbedStateError
from .cadence import Cadence, Every, Reuse
from .directions import Adaptive, Classic, Direction, Momentum, RandomFraction
from .rows import check_rho
from .rules import Rule
from .sharpener import Sharpener


class _NoGradient(Exception):
    """The closure left no gradient: there is nothing to step on."""


class _ClosurePasses:
    """Passes made by calling the user's closure; it back-propagates itself."""

    alone = False

    def __init__(self, closure: Callable[[], Any], sharpener: Sharpener):
        self._closure, self._sharpener = closure, sharpener
        self.first: Any = None
        self._calls = 0

    def loss(self) -> Tensor:
        self._sharpener.clear_gradients()
        with torch.enable_grad():
            value = self._closure()
        if self._calls == 0:
            self.first = value
            if not self._sharpener.has_gradients:
                raise _NoGradient
        self._calls += 1
        return value.detach() if isinstance(value, Tensor) else torch.tensor(float("nan") if value is None else value)


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
    and trainers see a plain optimizer. Gradient scaling and accumulation need both passes under control: use
    ``flatmin.Sharpener``.

    Raises:
        ValueError: a negative ρ; ``step`` without a closure.
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
        self._settings = {"rho": check_rho(rho), "adaptive": bool(adaptive)}
        self._module = params if isinstance(params, nn.Module) else None
        groups = params.parameters() if isinstance(params, nn.Module) else params
        self.base_optimizer = base_optimizer(groups, **options)
        self._parts: dict[str, Any] = {"direction": direction or Classic(), "rule": rule, "cadence": cadence,
                                       "offload": offload}
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
        self._complete_groups()
        self._between = False  # first_step was called and second_step was not
        self.sharpener = Sharpener(self._module, groups=base.param_groups, optimizer=base, rho=self._settings["rho"],
                                   **self._parts)

    def _complete_groups(self) -> None:
        for group in self.base_optimizer.param_groups:
            for key, value in self._settings.items():
                group.setdefault(key, value)
            check_rho(group["rho"])

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The base optimizer's groups themselves."""
        return self.base_optimizer.param_groups

    @property
    def state(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The base optimizer's state itself."""
        return self.base_optimizer.state

    def first_step(self, zero_grad: bool = False) -> None:
        """With the gradient at w in ``p.grad``: move to w + ε."""
        if self._between:
            raise PerturbedStateError("first_step was called twice: call second_step first, or restore() to abandon "
                                      "a step whose second pass failed")
        if not self.sharpener.has_gradients:
            raise ValueError("first_step needs gradients: call loss.backward() before it")
        self._between = True
        if not self.sharpener.pays:  # a plain step of the cadence: the second gradient is taken at w
            if zero_grad:
                self.zero_grad()
            return
        kept = [] if zero_grad else [(p, p.grad.clone()) for p in self._parameters() if p.grad is not None]
        try:
            self.sharpener.climb()
        except BaseException:
            self.restore()
            raise
        for p, gradient in kept:
            p.grad = gradient

    def second_step(self, zero_grad: bool = False) -> None:
        """With the gradient at w + ε in ``p.grad``: go back to w and take the base optimizer's step."""
        if not self._between:
            raise PerturbedStateError("second_step needs a first_step before it")
        climbed = self.sharpener.standing
        self.restore()
        if self.sharpener.has_gradients:  # the caller ran the passes: their losses are not known here
            self.sharpener.finish(self.sharpener.combined(None, None) if climbed else self.sharpener.plain_record(None))
        self._opt_called = True  # what an LR scheduler looks for
        self.base_optimizer.step()
        if zero_grad:
            self.zero_grad()

    def restore(self) -> None:
        """Give back w after a second pass that failed; without effect otherwise."""
        self._between = False
        self.sharpener.come_back()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore
        """Both passes and the base optimizer's step, in torch's closure convention.

        ``closure`` evaluates the model, back-propagates and returns the loss; it is called twice, with gradients
        cleared before each call. Returns the loss at w.
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
        passes = _ClosurePasses(closure, self.sharpener)
        try:
            self.sharpener.finish(self.sharpener.run(passes))
        except _NoGradient:
            return passes.first
        self.base_optimizer.step()
        return passes.first

    # torch wraps an optimizer's step to run its hooks; the base optimizer's step runs them already
    step.hooked = True  # pyright: ignore[reportFunctionMemberAccess]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients; weights are not touched."""
        self.base_optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, which may have its own ``rho`` and ``adaptive``."""
        self._refuse_standing("adding a group")
        self.base_optimizer.add_param_group(param_group)
        self._complete_groups()
        self.sharpener.refresh(self.base_optimizer.param_groups)

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's ``state_dict``, and a ``sharpener`` entry where a direction or cadence has state."""
        self._refuse_standing("saving")
        state = self.base_optimizer.state_dict()
        if self.sharpener.has_state:
            state["sharpener"] = self.sharpener.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` gave, or the state of a plain base optimizer."""
        self._refuse_standing("loading")
        state_dict = dict(state_dict)
        extra = state_dict.pop("sharpener", None)
        self.base_optimizer.load_state_dict(state_dict)
        self._complete_groups()
        self.sharpener.refresh(self.base_optimizer.param_groups)
        if extra is not None:
            self.sharpener.load_state_dict(extra)

    def __getstate__(self) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        self._refuse_standing("copying or pickling")
        return {"base_optimizer": self.base_optimizer, "_settings": self._settings, "_module": self._module,
                "_parts": self._parts, "sharpener_state": self.sharpener.state_dict()}

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


def ASAM(params: Any, base_optimizer: Callable[..., Optimizer], rho: Any = 0.5, eta: float = 0.01,
         biases: bool = False, **options: Any) -> SAM:
    """:class:`SAM` with the paper's adaptive direction, T = |w| + η on weights (arXiv:2102.11600).

    With bare parameters, tensors of one dimension count as biases; pass the module to tell normalization weights
    apart. ``biases=True`` scales those too, for which the radius is usually larger (2.0).
    """
    return SAM(params, base_optimizer, rho, direction=Adaptive(eta, biases=biases), **options)


def LookSAM(params: Any, base_optimizer: Callable[..., Optimizer], rho: Any = 0.05, k: int = 5, alpha: float = 0.7,
            **options: Any) -> SAM:
    """:class:`SAM` every k steps, re-using its sharpness component between (arXiv:2203.02714).

    ``step(closure)`` evaluates once on the steps between; ``first_step``/``second_step`` cannot save the pass.
    """
    return SAM(params, base_optimizer, rho, cadence=Every(k, Reuse(alpha)), **options)


def EfficientSAM(params: Any, base_optimizer: Callable[..., Optimizer], rho: Any = 0.05,
                 perturbation_ratio: float = 0.5, **options: Any) -> SAM:
    """:class:`SAM` moving a random fraction of the tensors, scaled by its inverse (ESAM's SWP, arXiv:2110.03141).

    Its data selection needs per-sample losses: ``flatmin.presets.esam``.
    """
    return SAM(params, base_optimizer, rho, direction=RandomFraction(beta=perturbation_ratio), **options)


def MomentumSAM(params: Any, base_optimizer: Callable[..., Optimizer], rho: Any = 3.0, **options: Any) -> SAM:
    """:class:`SAM` along minus the base optimizer's momentum: ``step(closure)`` evaluates once (arXiv:2401.12033)."""
    return SAM(params, base_optimizer, rho, direction=Momentum(), **options)


def MemoryEfficientSAM(params: Any, base_optimizer: Callable[..., Optimizer], rho: Any = 0.05, **options: Any) -> SAM:
    """:class:`SAM` that keeps its copy of w in the host's memory: an accelerator holds weights and one gradient.

    Works with activation checkpointing in the model, which is what saves the rest.
    """
    return SAM(params, base_optimizer, rho, offload=True, **options)
