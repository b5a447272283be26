"""The gradient of an objective in the memory of one gradient, and a step along it that needs no more."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import perturbed, vectors
from ..objective import Objective
from .cautions import samples_in


@dataclass(frozen=True)
class Pass:
    """One pass over the data: L(w), ∇L(w) as local tensors, how many samples, and parameters without a gradient."""

    loss: Tensor
    gradient: list[Tensor]
    samples: int
    missing: list[str]


def gradient(objective: Objective) -> Pass:
    """L(w) and ∇L(w), holding one gradient and one tensor more at any time; half precisions are summed in float32.

    Each parameter's gradient is taken out of the backward pass as soon as it is ready, added to the sum, and replaced
    by a zero that takes no memory. ``.grad`` is not touched.
    """
    w = objective.parameters
    sums: list[Tensor | None] = [None] * len(w)
    losses, weights, samples = [], [], 0
    with objective.session(), torch.enable_grad():
        for term in objective.terms():
            loss = term.loss(term.outputs())
            if objective.ranks.in_step:
                for i, row in enumerate(objective.ranks.backward(loss * (term.weight / term.total), w)):
                    _catcher(sums, i, w[i], term.total)(row)
            elif loss.requires_grad:
                _accumulate(loss, w, sums, term.weight)
            losses.append(loss.detach())
            weights.append(term.weight)
            samples += samples_in(term.batch) if term.weight > 0 else 0
            del loss
        samples = int(objective.ranks.total(samples)[0])
    names = {id(p): name for name, p in objective.model.named_parameters()}
    missing = [names[id(p)] for p, g in zip(w, sums, strict=True) if g is None]
    g = [torch.zeros_like(vectors.local(p.detach())) if t is None else t for p, t in zip(w, sums, strict=True)]
    normalizer = objective.normalizer(weights)
    if normalizer != 1:
        vectors.scale(1 / normalizer, g)
    if not objective.ranks.in_step:
        g = [objective.ranks.sum_(t) for t in g]
    return Pass(objective._total(zip(losses, weights, strict=True)), g, samples, missing)


def _accumulate(loss: Tensor, w: Sequence[nn.Parameter], sums: list[Tensor | None], weight: float) -> None:
    """sums ← sums + weight · ∂loss/∂w."""
    handles = [p.register_hook(_catcher(sums, i, p, weight)) for i, p in enumerate(w)]
    try:
        torch.autograd.grad(loss, w, allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()


def _catcher(sums: list[Tensor | None], i: int, p: nn.Parameter, weight: float) -> Callable[[Tensor], Tensor | None]:
    @torch.no_grad()
    def catch(g: Tensor) -> Tensor | None:
        row = vectors.local(vectors.matched(g, p))
        row = row.to_dense() if row.layout is not torch.strided else row
        total = sums[i]
        if total is None:
            like = vectors.local(p.detach())
            total = torch.empty_like(like, dtype=torch.float32 if like.dtype in perturbed.HALF else like.dtype)
            sums[i] = torch.mul(row, weight, out=total) if row.dtype == total.dtype else total.copy_(row).mul_(weight)
        else:
            total.add_(row, alpha=weight)
        plain = g.layout is torch.strided and not vectors.is_sharded(g)
        return g.new_zeros(()).expand_as(g) if plain else None

    return catch


@contextmanager
def stepped(w: Sequence[Tensor], direction: list[Tensor], scale: Tensor) -> Iterator[perturbed.Displacement]:
    """Weights stand at w + scale · direction inside, and are given back bit for bit.

    The memory of ``direction`` is taken over to hold w meanwhile, so that nothing is allocated; its values are lost.
    """
    displacement = perturbed.Displacement()
    try:
        with torch.no_grad():
            displacement.move([vectors.local(p.detach()) for p in w], direction, scale, own=True)
        yield displacement
    finally:
        displacement.restore()
