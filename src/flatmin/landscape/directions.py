"""Directions in weight space: random and filter-normalised, the gradient, eigenvectors, updates, principal components.

A direction is a list of local tensors in the order of ``objective.parameters``; half precisions are held in float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .. import parallel, vectors

Kind = Literal["filter", "layer", "random", "gradient", "eigenvectors", "update", "pca"]
KINDS = ("filter", "layer", "random", "gradient", "eigenvectors", "update", "pca")


def wide(t: Tensor) -> Tensor:
    """A local tensor in which directions can be added: half precisions become float32."""
    t = parallel.local(t.detach())
    return t.float() if t.dtype in vectors.HALF else t


def random_direction(parameters: Sequence[Tensor], seed: int | torch.Generator = 0, *,
                     normalize: Literal["filter", "layer"] | None = "filter",
                     orthogonal_to: Sequence[Sequence[Tensor]] = ()) -> list[Tensor]:
    """A normal vector d, each filter of it as long as the same filter of the weights: d_f ← d_f · ‖w_f‖ / ‖d_f‖.

    A filter is a slice along the first dimension of a tensor with two or more: the weights into one neuron or channel.
    Tensors of one dimension (biases, normalization scales) get zero. The plot of a ReLU network along such a direction
    does not change when a layer is scaled by a and the next by 1/a.

    Args:
        parameters: w.
        seed: of the draw.
        normalize: "filter"; "layer" for one norm a tensor; None for a plain normal vector in all tensors.
        orthogonal_to: directions d' to be orthogonal to. With ``normalize``, this is done filter by filter
            (⟨d_f, d'_f⟩ = 0 for every f) before the norms are set, so that both hold at once. A filter of no more
            numbers than there are directions to avoid has no room left and gets zero.

    Returns:
        One tensor a parameter. It is not of unit length.

    Raises:
        ValueError: if every number of the direction would be zero, or a filter is spread over ranks.

    Source: arXiv 1712.09913, equation 1; there, two directions are only roughly orthogonal.

    >>> w = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    >>> torch.linalg.norm(random_direction([w])[0], dim=1).tolist()
    [5.0, 2.0]
    """
    if normalize not in ("filter", "layer", None):
        raise ValueError(f'normalize must be "filter", "layer" or None, got {normalize!r}')
    space = vectors.Space(parameters)
    d = [wide(t) for t in space.random(vectors.seeded(seed))]
    if normalize is None:
        return _against(space, d, orthogonal_to)
    for i, p in enumerate(parameters):
        if parallel.is_sharded(p) and (normalize == "layer" or parallel.local(p).shape[1:] != p.shape[1:]):
            way_out = 'use "filter" or' if normalize == "layer" else "shard along dimension 0, or use"
            raise ValueError(f'a {normalize} is spread over ranks: {way_out} "random" directions')
        others = [other[i] for other in orthogonal_to]
        d[i] = _normalized(d[i], wide(p), others, normalize == "filter") if p.dim() > 1 else torch.zeros_like(d[i])
    if float(space.norm(d)) == 0:
        raise ValueError(f"no direction is left: a {normalize}-normalised one is zero in tensors of one dimension and "
                         'where the weights are zero. Use directions="random"')
    return d


def _normalized(d: Tensor, w: Tensor, others: Sequence[Tensor], by_filter: bool) -> Tensor:
    rows, target = (t.reshape(t.shape[0] if by_filter else 1, -1) for t in (d, w))
    basis: list[Tensor] = []
    for other in others:
        basis += _orthonormal_rows([other.reshape(rows.shape)], basis)
    for _ in range(2):
        for b in basis:
            rows = rows - (rows * b).sum(1, keepdim=True) * b
    lengths = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    full = rows.shape[1] <= sum(bool(b.any()) for b in basis)
    scale = vectors.ratio(torch.linalg.vector_norm(target, dim=1, keepdim=True), lengths)
    return (rows * (0 if full else scale)).reshape(d.shape)


def _orthonormal_rows(new: Sequence[Tensor], basis: Sequence[Tensor]) -> list[Tensor]:
    out = []
    for rows in new:
        for b in basis:
            rows = rows - (rows * b).sum(1, keepdim=True) * b
        out.append(vectors.ratio(rows, torch.linalg.vector_norm(rows, dim=1, keepdim=True)))
    return out


def _against(space: vectors.Space, d: list[Tensor], others: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """d without its parts along the orthogonal directions given, taken off twice; in place."""
    for _ in range(2):
        for other in others:
            vectors.axpy(-float(space.share(d, other)), other, d)
    return d


def orthonormal(space: vectors.Space, directions: Sequence[Sequence[Tensor]],
                names: Sequence[str] = ()) -> tuple[list[list[Tensor]], list[float]]:
    """Unit vectors with the same span, each orthogonal to those before it, and the lengths before scaling.

    Gram-Schmidt, twice; then the cosines are measured again.

    Raises:
        ValueError: for a direction that is zero, not finite, or within those before it.

    >>> w = [torch.zeros(2)]
    >>> unit, lengths = orthonormal(vectors.Space(w), [[torch.tensor([2.0, 0.0])], [torch.tensor([1.0, 3.0])]])
    >>> [u[0].tolist() for u in unit], lengths
    ([[1.0, 0.0], [0.0, 1.0]], [2.0, 3.0])
    """
    out: list[list[Tensor]] = []
    lengths = []
    for k, direction in enumerate(directions):
        name = names[k] if k < len(names) else f"direction {k + 1}"
        d = [wide(t).clone() for t in direction]
        before = float(space.norm(d))
        if not math.isfinite(before) or before == 0:
            raise ValueError(f"{name} has length {before}")
        length = float(space.norm(_against(space, d, out)))
        if length < 1e-4 * before:
            raise ValueError(f"{name} lies within the directions before it (what is left of it is "
                             f"{length / before:.1e} of its length)")
        vectors.scale(1 / length, d)
        out.append(d)
        lengths.append(length)
    for i, a in enumerate(out):
        for b in out[:i]:
            cosine = float(space.dot(a, b))
            if not abs(cosine) < 1e-5:
                raise ValueError(f"the directions are not orthogonal: their cosine is {cosine:.1e}")
    return out, lengths


def given(space: vectors.Space, direction: Sequence[Any]) -> list[Tensor]:
    """A user's own direction, checked against the shapes of the parameters and copied."""
    d = list(direction)
    if [getattr(t, "shape", None) for t in d] != [p.shape for p in space.parameters]:
        raise ValueError(f"the direction needs one tensor for each of the {len(space.parameters)} parameters that "
                         f"require a gradient, of their shapes; got {len(d)} tensors")
    return [wide(parallel.part(t, p)).to(parallel.local(p).device, wide(p).dtype, copy=True)
            for t, p in zip(d, space.parameters, strict=True)]
