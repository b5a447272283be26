"""A function of one batch as a pure function of the parameters, as ``torch.func`` wants it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..objective import WeightedBatch


class _Call(nn.Module):
    """A function of one batch as the forward of a module, so that ``functional_call`` can exchange its parameters."""

    def __init__(self, model: nn.Module, function: Callable[[WeightedBatch], Any]):
        super().__init__()
        self.model, self.function = model, function

    def forward(self, batch: WeightedBatch) -> Any:
        return self.function(batch)


def of_parameters(batch: WeightedBatch, w: list[nn.Parameter],
                  function: Callable[[WeightedBatch], Any]) -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
    """A function of one batch as a pure function of a tuple of parameters, and the parameters as they are."""
    names = {id(p): name for name, p in batch.model.named_parameters()}
    keys = [f"model.{names[id(p)]}" for p in w]
    module = _Call(batch.model, function)
    module.training = batch.model.training

    def pure(values: tuple[Tensor, ...]) -> Any:
        buffers = {name: b.clone() for name, b in module.named_buffers()}     # running statistics change in place
        return torch.func.functional_call(module, buffers | dict(zip(keys, values, strict=True)), (batch,))

    return pure, tuple(p.detach() for p in w)
