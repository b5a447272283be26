"""One sum of gradients over batches, which takes each gradient out of the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .parallel import is_sharded, local, matched
from .vectors import HALF


class GradientSum:
    """Σ factor · gradient for each of some parameters, as local tensors; half precisions are summed in float32.

    ``hook`` takes each gradient out of the backward pass as soon as autograd has it, so that one tensor more than the
    sums is held. ``into`` gives the memory of the sums: one tensor of any shape a parameter, whose content is replaced.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], into: Sequence[Tensor] | None = None):
        self.parameters, self._into = list(parameters), into
        self._sums: list[Tensor | None] = [None] * len(self.parameters)

    @torch.no_grad()
    def add(self, i: int, g: Tensor, factor: float) -> None:
        """Add factor · g to the sum of parameter i."""
        total = self._sums[i]
        if total is not None:
            total.add_(g, alpha=factor)
            return
        total = self._sums[i] = self._memory(i)
        if g.dtype == total.dtype:
            torch.mul(g, factor, out=total)
        else:
            total.copy_(g).mul_(factor)

    def hook(self, i: int, factor: float) -> Callable[[Tensor], Tensor | None]:
        """A hook for parameter i that adds its gradient, and leaves a zero that takes no memory in its place."""
        def take(g: Tensor) -> Tensor | None:
            row = local(matched(g, self.parameters[i])).detach()
            self.add(i, row.to_dense() if row.layout is not torch.strided else row, factor)
            plain = g.layout is torch.strided and not is_sharded(g)
            return g.new_zeros(()).expand_as(g) if plain else None

        return take

    @property
    def missing(self) -> list[int]:
        """The parameters to whose sums nothing was added."""
        return [i for i, t in enumerate(self._sums) if t is None]

    def totals(self) -> list[Tensor]:
        """The sums; zeros where nothing was added."""
        return [self._memory(i).zero_() if t is None else t for i, t in enumerate(self._sums)]

    def _memory(self, i: int) -> Tensor:
        like = local(self.parameters[i].detach())
        if self._into is not None:
            return self._into[i].view(like.shape)
        return torch.empty_like(like, dtype=torch.float32 if like.dtype in HALF else like.dtype)
