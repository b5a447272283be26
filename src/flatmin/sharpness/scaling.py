"""The ball that a perturbation is taken from: {c ∘ u : ‖u‖_p ≤ ρ}, with c = 1 or the size of the weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from .. import parallel, vectors

Adaptive = Literal["none", "element", "filter", "layer"]
ADAPTIVE = ("none", "element", "filter", "layer")


def scales(w: Sequence[Tensor], adaptive: Adaptive | bool) -> list[Tensor] | None:
    """c, as tensors that broadcast over the weights; None where c = 1.

    "element": |wᵢ|. "filter": the norm of wᵢ's slice along the first dimension (the weights into one neuron or
    channel), over the root of its length; of a tensor with one dimension, |wᵢ|. "layer": the same for the whole tensor.
    Dividing by the root of the length makes the mean square of c over a tensor that of w in all three, so that one ρ
    means the same. Weights of size zero have c = 0: they do not move.
    """
    kind = ("element" if adaptive else "none") if isinstance(adaptive, bool) else adaptive
    if kind not in ADAPTIVE:
        raise ValueError(f"adaptive must be one of {', '.join(map(repr, ADAPTIVE))}, got {adaptive!r}")
    if kind == "none":
        return None
    w = [p.detach() for p in w]
    if any(map(parallel.is_sharded, w)) and kind != "element":
        raise ValueError('filters and layers of sharded parameters are spread over ranks: use adaptive="element"')
    return [_scale(parallel.local(p), kind) for p in w]


def _scale(w: Tensor, kind: str) -> Tensor:
    if kind == "layer":
        return w.norm() / math.sqrt(max(w.numel(), 1))
    if kind == "element" or w.dim() < 2:
        return w.abs()
    rows = w.reshape(w.shape[0], -1)
    size = torch.linalg.vector_norm(rows, dim=1) / math.sqrt(max(rows.shape[1], 1))
    return size.view(-1, *[1] * (w.dim() - 1))


def scaled(c: Sequence[Tensor] | None, u: Sequence[Tensor]) -> list[Tensor]:
    """c ∘ u, as new tensors."""
    return [t.clone() for t in u] if c is None else [a * t for a, t in zip(c, u, strict=True)]


def steepest(space: vectors.Space, c: Sequence[Tensor] | None, g: Sequence[Tensor], p: float) -> list[Tensor] | None:
    """The unit vector u of ‖·‖_p with the largest gᵀ(c ∘ u): c∘g / ‖c∘g‖ or sign(c∘g); None where c∘g = 0."""
    ascent = scaled(c, g)
    if p == math.inf:
        ascent = [t.sign_() for t in ascent]
        return ascent if float(space.norm(ascent, p)) > 0 else None
    length = space.norm(ascent)
    if not math.isfinite(length) or length == 0:
        return None
    vectors.scale(1 / length, ascent)
    return ascent


def project(space: vectors.Space, u: list[Tensor], rho: float, p: float) -> None:
    """u ← the nearest point with ‖u‖_p ≤ ρ, in place."""
    if p == math.inf:
        for t in u:
            t.clamp_(-rho, rho)
        return
    length = float(space.norm(u))
    if length > rho:
        vectors.scale(rho / length, u)


def check_p(p: float) -> float:
    if p not in (2, math.inf):
        raise ValueError(f"p must be 2 or infinity, got {p}")
    return float(p)
