"""Steepest ascent in a diagonal metric, and what a direction is given and returns.

Steepest ascent maximises gᵀε subject to ‖T⁻¹ε‖_p ≤ ρ. With u = T g:

    p = 2: ε = ρ T u/‖u‖₂        p = ∞: ε = ρ T sign(u)        p = 1: ε = ρ T sign(u) on argmax|u| alone

T = 1 is SAM, T = |w| + η is ASAM, T = F^(-½) is Fisher SAM, T = M^(-½) the Adam-preconditioned form.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from .. import vectors
from ..vectors import Space
from .parameters import ParameterInfo

Memory = Mapping[str, Mapping[str, Tensor]]  # tensors by kind and by the name of their parameter
Metric = Callable[[int, Tensor, Tensor], Tensor | None]  # metric(i, w, d): T of tensor i, None for 1


@dataclass(frozen=True)
class AscentInfo:
    """What a direction may read at w. Lists run over ``parameters``; tensors are this rank's parts.

    ``gradient`` is empty for a direction with ``needs_gradient = False``. Its memory belongs to the direction, which
    may overwrite it and return it as d.
    """

    parameters: list[ParameterInfo]  # those that may move
    space: Space
    w: list[Tensor]
    gradient: list[Tensor]
    gradient_norm: Tensor | None  # ‖gradient‖₂
    memory: Memory  # what earlier steps returned as ``Ascent.memory``
    step: int
    optimizer: torch.optim.Optimizer | None = None
    loss_scale: Tensor | None = None  # factor of the gradient, under a GradScaler

    def only(self, chosen: Sequence[bool]) -> AscentInfo:
        """The same for some of the parameters."""
        if all(chosen):
            return self
        where = [i for i, c in enumerate(chosen) if c]
        parameters = [self.parameters[i] for i in where]
        space = Space([p.parameter for p in parameters])
        gradient = [self.gradient[i] for i in where] if self.gradient else []
        return replace(self, parameters=parameters, space=space, w=[self.w[i] for i in where], gradient=gradient,
                       gradient_norm=space.norm(gradient) if gradient else None)

    def unscaled(self) -> AscentInfo:
        """The same with the loss scale divided out of the gradient."""
        if self.loss_scale is None:
            return self
        inverse = 1 / self.loss_scale
        vectors.scale(inverse, self.gradient)
        norm = self.gradient_norm
        return replace(self, loss_scale=None, gradient_norm=None if norm is None else norm * inverse.to(norm))


@dataclass(frozen=True)
class DiagonalNorm:
    """‖T⁻¹ε‖_p: the norm in which a step is ρ long. ``across`` combines the tensors' norms, where that is not p."""

    metric: Metric | None = None  # None: T = 1
    p: float = 2
    across: float | None = None

    def __call__(self, space: Space, w: Sequence[Tensor], d: Sequence[Tensor], rhos: Sequence[float] | None = None
                 ) -> Tensor:
        """The norm of d, each tensor first multiplied by its radius."""
        u = list(d)
        if self.metric is not None:
            scales = [self.metric(i, *pair) for i, pair in enumerate(zip(w, d, strict=True))]
            u = [t if s is None else vectors.ratio(t, s) for t, s in zip(d, scales, strict=True)]
        if self.p == 2:
            each = space.norms(u)
        else:
            ends = [(t.abs().sum() if self.p == 1 else t.abs().amax()).to(u[0].device, torch.float64) for t in u]
            each = space.reduce_each(torch.stack(ends), "sum" if self.p == 1 else "max")
        if rhos is not None:
            each = each * torch.tensor(rhos, dtype=each.dtype, device=each.device)
        return torch.linalg.vector_norm(each, self.across or self.p)


@dataclass(frozen=True)
class Ascent:
    """What a direction returns: ε = ρ d/norm on the parameters of ``info``; all others stay where they are."""

    info: AscentInfo
    d: list[Tensor]
    norm: Tensor  # 0-d
    length: Tensor | float = 1.0  # of the step, in units of ρ
    own_norm: DiagonalNorm = DiagonalNorm()
    memory: Memory = field(default_factory=dict)  # to be kept for later steps, unless the step is skipped

    def own_length(self, rhos: Sequence[float] | None = None) -> Tensor:
        """The norm of d that belongs to the direction, each tensor first multiplied by its radius."""
        return self.own_norm(self.info.space, self.info.w, self.d, rhos)


class Direction(Protocol):
    """``direction(info)`` says which parameters move, and where.

    ``needs_gradient``: it reads the gradient at w, for which a step takes a first pass. ``needs_optimizer``: it reads
    the optimizer's state. ``counts_steps``: it reads the number of the step, which then has to be saved.
    """

    @property
    def needs_gradient(self) -> bool: ...
    @property
    def needs_optimizer(self) -> bool: ...
    @property
    def counts_steps(self) -> bool: ...

    def __call__(self, info: AscentInfo) -> Ascent: ...


def steepest(info: AscentInfo, metric: Metric | None, p: float) -> Ascent:
    """Steepest ascent: d = T · dual_p(T g), and the norm of T g that belongs to p."""
    d = info.gradient
    if metric is not None:
        _multiply(info.w, d, metric)
    if p == 2:
        norm = info.space.norm(d) if metric is not None or info.gradient_norm is None else info.gradient_norm
    elif p == float("inf"):
        for t in d:
            t.sign_()
        norm = info.space.norm(d, p)  # 1, or 0 for a zero gradient
    elif p == 1:
        norm = _keep_largest(info.space, d)
    else:
        raise ValueError(f"p must be 1, 2 or infinity, got {p}")
    if metric is not None:
        _multiply(info.w, d, metric)
    return Ascent(info, d, norm, own_norm=DiagonalNorm(metric, p))


def _multiply(w: Sequence[Tensor], d: Sequence[Tensor], metric: Metric) -> None:
    """d ← T d."""
    for i, (x, t) in enumerate(zip(w, d, strict=True)):
        scale = metric(i, x, t)
        if scale is not None:
            t.mul_(scale)


def _keep_largest(space: Space, d: Sequence[Tensor]) -> Tensor:
    """d becomes the sign where |d| is largest, 0 elsewhere; returns the number of such places (ties share)."""
    top = space.norm(d, float("inf"))
    counts = []
    for t in d:
        mask = (t.abs() == top.to(t.device, t.dtype)) & (t != 0)
        counts.append(mask.sum().to(d[0].device, torch.float64))
        t.sign_().mul_(mask)
    return space.reduce(torch.stack(counts))
