"""Passes made by a closure, in the convention of ``torch.optim.Optimizer.step``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..parallel import local, matched
from ..vectors import Space
from .inspection import Inspection
from .passes import Pass
from .step import Step


class NoGradient(Exception):
    """The closure left no gradient: there is nothing to step on."""


class GradientsBeforeClosure:
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
                raise ForeignGradients(
                    f"step(closure) found gradients (norm {float(space.norm(earlier)):.3g}) that the closure neither "
                    f"clears nor computes itself (norm {size:.3g}, difference {off:.3g}), and would lose them. Let "
                    "the closure call zero_grad, or clear them before; to accumulate micro-batches use "
                    "flatmin.Sharpener, which takes a list of them; to go on from the gradients that are there, call "
                    "first_step, the closure and second_step")
        self.found, self._kept = [], []


class ForeignGradients(ValueError):
    """Gradients were present that are not the closure's own."""


class ClosurePasses:
    """Passes made by calling the user's closure; it back-propagates itself."""

    def __init__(self, closure: Callable[[], Any], step: Step, before: GradientsBeforeClosure):
        self.inspection: Inspection | None = None  # sees no graph: the closure has freed it
        self._closure, self._step, self._before = closure, step, before
        self.first: Any = None
        self._calls = 0

    def __call__(self, one: Pass, *, alone: bool = False, only_first: bool = False,
                 after_first: Callable[[], None] | None = None) -> Tensor:
        view = self._step.view
        view.clear_gradients()
        if self._calls == 0:
            with self._before.watched():
                self.first = value = self._call()
            if not self._step.is_perturbed:  # a gradient at w + ε cannot be compared
                self._before.check()
            if not view.has_gradients:
                raise NoGradient
        else:
            value = self._call()
        self._calls += 1
        return value.detach() if isinstance(value, Tensor) else torch.tensor(float("nan") if value is None else value)

    def _call(self) -> Any:
        with torch.enable_grad():
            return self._closure()
