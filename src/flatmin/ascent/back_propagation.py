"""How a loss is back-propagated: plainly, scaled, or by a framework."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .micro_batches import describe


class BackPropagation:
    """How a loss is back-propagated: plainly, times a ``GradScaler``'s factor, or by a framework's own ``backward``.

    A framework may divide the loss by its number of accumulation steps, and may scale it. Passes see neither: what it
    divides by is ``division`` afterwards, for a caller that accumulates over several calls.
    """

    def __init__(self, scaler: Any, custom: Callable[[Tensor], Any] | None):
        self._scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self._custom = custom
        self._scales: bool | None = None  # whether ``custom`` applies the loss scale itself
        self.division: Tensor | None = None  # what ``custom`` multiplied the last loss by, loss scale apart

    def loss_scale(self, device: torch.device) -> Tensor | None:
        """The scaler's factor as a tensor, without reading it to the host."""
        return None if self._scaler is None else self._scaler.scale(torch.ones((), device=device))

    def __call__(self, value: Tensor, weight: float) -> None:
        """Back-propagate weight · value."""
        check_loss(value)
        value = value if weight == 1.0 else value * weight
        if self._custom is None:
            (value if self._scaler is None else self._scaler.scale(value)).backward()
            return
        calls: list[Any] = []
        if value.requires_grad:
            value = value.view_as(value)
            value.register_hook(lambda g: self._given(g, calls))
        with self._noted(calls):
            self._custom(value)

    def seed(self, value: Tensor, weight: float) -> Tensor:
        """∂(what is back-propagated)/∂value, for a value that is not back-propagated by itself."""
        out, scale = torch.full_like(value, weight), self.loss_scale(value.device)
        return out if scale is None else out * scale.to(value)

    @contextmanager
    def _noted(self, calls: list[Any]) -> Iterator[None]:
        """Until it is known: notes whether the framework calls the scaler, and so scales the loss itself."""
        if self._scaler is None or self._scales is not None:
            yield
            return
        scale = self._scaler.scale

        def noted(outputs: Any) -> Any:
            calls.append(outputs)
            return scale(outputs)

        self._scaler.scale = noted
        try:
            yield
        finally:
            del self._scaler.scale

    def _given(self, g: Tensor, calls: list[Any]) -> Tensor:
        """The gradient that arrives at the loss from the framework, made into the one that goes on."""
        if self._scales is None:
            self._scales = bool(calls)
        scale = self.loss_scale(g.device)
        arrived = g if scale is None or not self._scales else g / scale.to(g)
        if self.division is None and float(arrived) > 1:
            raise ValueError(f"backward= multiplies the loss by {float(arrived):g}, as a framework with a loss scaler "
                             "does: pass its torch.amp.GradScaler as scaler= too, so that the scale is known")
        self.division = arrived
        one = torch.ones_like(g)
        return one if scale is None else one * scale.to(g)


def check_loss(value: Any) -> None:
    """Raise if this cannot be back-propagated as a loss."""
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise ValueError(f"the loss must be a tensor with one element, got {describe(value)}; "
                         "per-sample losses need a mean")
