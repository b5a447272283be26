"""Matvecs by automatic differentiation: the mean of the batches' linear maps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import vectors
from ..linalg.operator import CurvatureOperator
from ..objective import Objective
from .graph_cache import GraphCache
from .linearization import Linearize, LinearMap, Parts


class AutogradMatvec:
    """v ↦ Σ_b n_b A_b v / Σ_b n_b over the batches of an objective, each A_b a linear map that autograd makes."""

    def __init__(self, operator: CurvatureOperator, objective: Objective, parameters: list[nn.Parameter],
                 linearize: Linearize):
        self.operator, self.objective = operator, objective
        self.cache = GraphCache(objective, parameters, linearize)
        self.taken = "auto"     # "cached" or "recomputed", known after one matvec

    def matvec(self, v: Tensor, *, keep_graphs: bool, forms: list[tuple[float, Tensor]] | None = None) -> Tensor:
        """Av for a flat v (n,), or a block (b, n) of them; ``forms`` collects n_b and vᵀA_b v of this rank's batches.

        With ``keep_graphs``, graphs stay for the next matvec as far as they fit, until ``cache.clear()``.
        """
        operator = self.operator
        parts = [part.reshape(v.shape[:-1] + t.shape).to(t.dtype)
                 for part, t in zip(v.split(operator.numels, -1), operator.like, strict=True)]
        out, first = None, 1.0
        for weight, linear_map, kept in self.cache.maps(keep_graphs):
            added = [_strided(t) for t in (_one_by_one(linear_map, parts, kept) if v.dim() == 2 else
                                           linear_map.matvec(parts, kept))]
            if forms is not None:
                forms.append((weight, _form(parts, added)))
            if out is None:
                out, first = self._flat(added, v), weight
                continue
            for piece, t in zip(out.split(operator.numels, -1), added, strict=True):
                if t is not None:
                    piece.add_(t.detach().reshape(piece.shape).to(operator.device), alpha=weight / first)
        assert self.cache.weights is not None
        self.taken = "cached" if self.cache.complete else "recomputed"
        out = torch.zeros_like(v) if out is None else out
        share = first / self.objective.normalizer(self.cache.weights)
        return self.objective.ranks.sum_(out.mul_(share) if share != 1 else out)

    def _flat(self, parts: Parts, v: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(like) if t is None else t.detach().reshape(like.shape).to(like)
                          for t, like in zip(parts, v.split(self.operator.numels, -1), strict=True)], -1)


def _one_by_one(linear_map: LinearMap, block: Sequence[Tensor], retain_graph: bool) -> Parts:
    """The linear map of a block of vectors: at once where it can be, else one after the other."""
    if linear_map.matmat is not None:
        return linear_map.matmat(block, retain_graph)
    count = len(block[0])
    each = [linear_map.matvec([t[i] for t in block], retain_graph or i + 1 < count) for i in range(count)]
    return [None if part[0] is None else torch.stack([t.to_dense() for t in part]) for part in zip(*each, strict=True)]


def _strided(t: Tensor | None) -> Tensor | None:
    """The same, dense where it is the sparse gradient of an embedding."""
    return t if t is None or t.layout is torch.strided else t.to_dense()


def _form(v: Sequence[Tensor], av: Parts) -> Tensor:
    """vᵀAv, a 0-d float64 tensor."""
    pairs = [(x, t.detach()) for x, t in zip(v, av, strict=True) if t is not None]
    if not pairs:
        return torch.zeros((), dtype=torch.float64)
    return vectors.dots([x for x, _ in pairs], [t.to(x.dtype) for x, t in pairs]).sum()
