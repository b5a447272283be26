"""The linear maps of the batches, with their graphs kept from one matvec to the next while memory allows."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..batches import equal
from ..evaluation import WeightedBatch
from ..linalg import memory
from ..objective import Objective
from .linearization import Linearize, LinearMap


class GraphCache:
    """The linear map of each batch; graphs that fit into half of the free memory are made once."""

    def __init__(self, objective: Objective, parameters: list[nn.Parameter], linearize: Linearize):
        self.objective, self.parameters, self.linearize = objective, parameters, linearize
        self.clear()

    def clear(self) -> None:
        """Free all graphs."""
        self.graphs: dict[int, tuple[float, LinearMap, Any]] = {}   # by index of the batch: weight, map, data
        self.weights: list[float] | None = None                     # of all batches, known after one pass
        self._room: float | None = None                             # bytes left for graphs

    @property
    def complete(self) -> bool:
        """Whether the graph of every batch is kept."""
        return self.weights is not None and len(self.graphs) == len(self.weights)

    def maps(self, keep_graphs: bool) -> Iterator[tuple[float, LinearMap, bool]]:
        """Weight and linear map of each batch, and whether its graph is kept."""
        if self.complete:
            yield from ((weight, linear_map, True) for weight, linear_map, _ in self.graphs.values())
            return
        if self._room is None:
            self._room = memory.available(self.objective.device) / 2 if keep_graphs else -1.0
        weights = []
        for batch in self.objective.weighted_batches():
            weights.append(batch.weight)
            if batch.index in self.graphs:
                weight, linear_map, data = self.graphs[batch.index]
                if equal(data, batch.data):
                    yield weight, linear_map, True
                    continue
                self._stop_keeping()
            linear_map = self._linearized(batch)
            if keep := self._room > 0:
                self.graphs[batch.index] = batch.weight, linear_map, batch.data
            yield batch.weight, linear_map, keep
            del linear_map      # its graph is freed before the next one is made
        self.weights = weights if self.weights is None else self.weights

    def _stop_keeping(self) -> None:
        """The batches come in another order than in the last pass, so that no kept graph belongs to the next one."""
        warnings.warn("the data give other batches in each pass, so graphs of batches are not kept between matvecs: "
                      "each matvec evaluates the model anew. Pass list(data), or shuffle=False", stacklevel=2)
        self.graphs, self._room = {}, -1.0

    def _linearized(self, batch: WeightedBatch) -> LinearMap:
        assert self._room is not None
        with torch.enable_grad():
            if self._room <= 0 or self.objective.single:    # one batch: its graph is needed in any case
                return self.linearize(batch, self.parameters)
            with memory.Meter() as meter:
                linear_map = self.linearize(batch, self.parameters)
        self._room -= meter.bytes
        return linear_map
