"""Vectors like the weights of an objective: named as they are, and sharded over ranks as they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import parallel, vectors
from ..linalg.operator import CurvatureOperator
from ..objective import Objective


class OverParameters(CurvatureOperator):
    """An operator on the parameters of an objective that require a gradient, or on some of them.

    Flat vectors are this rank's shards; dot products are over all of them.
    """

    def __init__(self, objective: Objective, parameters: str | nn.Module | Sequence[str | nn.Module] | None):
        require_objective(objective)
        objective.ranks.reshard()
        chosen = [(n, p) for n, p in objective.model.named_parameters() if p.requires_grad]
        self._over(objective, chosen)
        if parameters is not None:
            self._over(objective, [chosen[i] for i in self.select(parameters)])
        self.objective = objective
        self._groups = self._shard()
        self.rank = objective.ranks.rank

    def _over(self, objective: Objective, chosen: Sequence[tuple[str, nn.Parameter]]) -> None:
        self.parameters = [p for _, p in chosen]
        dtypes = [p.dtype for p in self.parameters]
        super().__init__([p.shape for p in self.parameters], _widest(dtypes), objective.device,
                         [n for n, _ in chosen], dtypes)

    def _shard(self) -> Sequence[Any]:
        """Vectors sharded as the parameters are; the process groups that hold the other shards."""
        local = [parallel.local(p.detach()) for p in self.parameters]
        self.numels, self.length = [t.numel() for t in local], sum(t.numel() for t in local)
        groups = {parallel.shard_groups(p) for p in self.parameters}
        if len(groups) > 1:
            raise ValueError("some parameters are sharded over other ranks than others, or not at all: pass "
                             "parameters= with those of one kind")
        return groups.pop()

    def reduce(self, t: Tensor, op: str = "sum") -> Tensor:
        return parallel.all_reduce(t, self._groups, op)

    def agree(self, number: int) -> int:
        return self.objective.ranks.least(number)

    def _draw(self, i: int, generator: torch.Generator, kind: str) -> Tensor:
        if not parallel.is_sharded(self.parameters[i]):
            return super()._draw(i, generator, kind)
        return vectors.Space([self.parameters[i]]).random(generator, kind)[0].reshape(-1)

    def join(self, vs: Sequence[Tensor]) -> Tensor:
        if not any(map(parallel.is_sharded, self.parameters)):
            return super().join(vs)
        pairs = list(zip(vs, self.parameters, strict=True))
        if any(v.shape not in (p.shape, parallel.local(p).shape) for v, p in pairs):
            raise ValueError("expected one tensor for each parameter that requires a gradient, sharded as it is")
        return torch.cat([parallel.local(v.detach()).reshape(-1).to(self.device, self.dtype) for v, _ in pairs])

    def split(self, flat: Tensor) -> list[Tensor]:
        return [parallel.like(part.view(parallel.local(p).shape).to(dtype), p) for part, p, dtype in
                zip(flat.split(self.numels), self.parameters, self._dtypes, strict=True)]

    def select(self, parameters: str | nn.Module | Sequence[str | nn.Module]) -> list[int]:
        wanted = [parameters] if isinstance(parameters, (str, nn.Module)) else list(parameters)
        inside: set[int] = set()
        names = [name for name in wanted if isinstance(name, str)]
        for module in wanted:
            if isinstance(module, nn.Module):
                ids = {id(p) for p in module.parameters()}
                inside |= {i for i, p in enumerate(self.parameters) if id(p) in ids}
        if len(names) < len(wanted) and not inside:
            raise ValueError("none of the modules holds a parameter of this operator")
        return sorted(inside.union(super().select(names) if names else []))


def require_objective(objective: Any) -> None:
    """Raise a TypeError that says what to write where something else is given to an operator."""
    if not isinstance(objective, Objective):
        raise TypeError(f"expected an Objective, got {type(objective).__name__}: write Objective(model, loss_fn, data)")


def _widest(dtypes: list[torch.dtype]) -> torch.dtype:
    out = dtypes[0] if dtypes else torch.float32
    for dtype in dtypes[1:]:
        out = torch.promote_types(out, dtype)
    return out
