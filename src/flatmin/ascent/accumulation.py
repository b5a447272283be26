"""Gradients that a step finds in ``p.grad``, to which its own is added as ``loss.backward()`` would."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import parallel
from ..parallel import in_bucket, local


class EarlierGradients:
    """What is in ``p.grad`` before a step: ``put_back`` undoes the step, ``add`` and then ``commit`` complete it.

    The earlier tensors stay in place and are not written before ``commit``, so that a step can be undone until then.
    Those in a bucket into which DDP writes the next gradients are copied.
    """

    def __init__(self, parameters: Sequence[Tensor]):
        self._found = [(p, g, g.clone() if in_bucket(g) else None) for p in parameters if (g := p.grad) is not None]
        self._parameters = parameters
        self._sums: list[tuple[Tensor, Tensor, Tensor]] = []

    def put_back(self) -> None:
        """Leave the earlier gradients, and no others."""
        for p in self._parameters:
            p.grad = None
        for p, gradient, saved in self._found:
            if saved is not None:
                gradient.copy_(saved)
            p.grad = gradient

    @torch.no_grad()
    def add(self) -> None:
        """Add the earlier gradients to those of the step."""
        for p, gradient, saved in self._found:
            if p.grad is None:
                p.grad = gradient
            elif saved is not None:
                p.grad.add_(saved)  # the same memory as the earlier gradient, or DDP's bucket in its place
            else:
                total = local(parallel.matched(p.grad, gradient)).add_(local(gradient))
                self._sums.append((p, gradient, total))

    @torch.no_grad()
    def commit(self) -> None:
        """Write the sums into the tensors that were there before; may be called again after a Ctrl-C in the middle."""
        for p, gradient, total in self._sums:
            local(gradient).copy_(total)
            p.grad = gradient
