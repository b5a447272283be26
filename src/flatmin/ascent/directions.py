"""Where is uphill? Each direction turns the gradient into ε/ρ = d/‖d‖ in its own norm.

Steepest ascent in a diagonal metric T maximises gᵀε subject to ‖T⁻¹ε‖_p ≤ ρ. With u = T g:

    p = 2: ε = ρ T u/‖u‖₂        p = ∞: ε = ρ T sign(u)        p = 1: ε = ρ T sign(u) on argmax|u| alone

T = 1 is SAM, T = |w| + η is ASAM, T = F^(-½) is Fisher SAM, T = M^(-½) the Adam-preconditioned form.

A direction is a frozen dataclass whose call overwrites ``ascent.d`` (on entry the gradient) and returns the norm that
divides it. It says what it needs: ``needs_gradient`` (a first pass at w) and ``needs_optimizer``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, final

import torch
from torch import Tensor, nn

from .. import vectors
from ..vectors import Space


@dataclass
class Ascent:
    """What a direction may look at. ``w`` and ``d`` are the local parts of the parameters that will move."""

    space: Space
    parameters: list[nn.Parameter]
    names: list[str]
    roles: list[str]  # "weight", "bias", "norm_weight" or "norm_bias", from the owning module's type
    options: list[dict[str, Any]]  # the parameter's group
    w: list[Tensor]
    d: list[Tensor]
    gradient_norm: Tensor | None
    memory: dict[str, Any]  # kept between steps, saved in the state_dict
    step: int
    optimizer: torch.optim.Optimizer | None = None
    loss_scale: Tensor | None = None


class Direction(Protocol):
    """``direction(ascent)`` overwrites ``ascent.d`` and returns the norm (0-d) by which it is to be divided."""

    needs_gradient: ClassVar[bool]
    needs_optimizer: ClassVar[bool]

    def __call__(self, ascent: Ascent) -> Tensor: ...


Metric = Callable[[int, Tensor, Tensor], Tensor | None]


def steepest(ascent: Ascent, metric: Metric | None, p: float) -> Tensor:
    """Overwrite d by T · dual_p(T g) and return the norm of T g that belongs to p. ``metric(i, w, d)`` gives T."""
    if metric is not None:
        _apply(ascent, metric)
    if p == 2:
        norm = ascent.space.norm(ascent.d) if metric is not None or ascent.gradient_norm is None else (
            ascent.gradient_norm)
    elif p == float("inf"):
        for d in ascent.d:
            d.sign_()
        norm = torch.ones((), dtype=torch.float64, device=ascent.d[0].device)
    elif p == 1:
        norm = _keep_largest(ascent)
    else:
        raise ValueError(f"p must be 1, 2 or infinity, got {p}")
    if metric is not None:
        _apply(ascent, metric)
    return norm


def _apply(ascent: Ascent, metric: Metric) -> None:
    for i, (w, d) in enumerate(zip(ascent.w, ascent.d, strict=True)):
        t = metric(i, w, d)
        if t is not None:
            d.mul_(t)


def _keep_largest(ascent: Ascent) -> Tensor:
    """d becomes the sign where |d| is largest, 0 elsewhere; returns the number of such places (ties share)."""
    top = ascent.space.norm(ascent.d, float("inf"))
    counts = []
    for d in ascent.d:
        mask = (d.abs() == top.to(d.device, d.dtype)) & (d != 0)
        counts.append(mask.sum().to(ascent.d[0].device, torch.float64))
        d.sign_().mul_(mask)
    return ascent.space.reduce(torch.stack(counts))


@final
@dataclass(frozen=True)
class Gradient:
    """ε = ρ g/‖g‖₂, or its p = ∞ and p = 1 forms (arXiv:2010.01412, eq. 2)."""

    p: float = 2
    normalized: bool = True
    needs_gradient: ClassVar[bool] = True
    needs_optimizer: ClassVar[bool] = False

    def __call__(self, ascent: Ascent) -> Tensor:
        if not self.normalized:  # USAM: ε = ρ g; under a GradScaler g carries the loss scale
            one = torch.ones((), dtype=torch.float64, device=ascent.d[0].device)
            return one if ascent.loss_scale is None else ascent.loss_scale.to(one)
        return steepest(ascent, None, self.p)


@final
@dataclass(frozen=True)
class Adaptive:
    """ε = ρ T²g/‖T g‖₂ with T = |w| + η on weights and 1 on biases (arXiv:2102.11600).

    ``kind`` "element" takes |wᵢ|, "filter" the norm of each slice along dimension 0 of tensors with two or more
    dimensions (elements elsewhere), "layer" the norm of each tensor. Which tensors are biases is decided by their
    shape and the type of the module that owns them, never by their name; ``biases=True`` scales them too.
    """

    eta: float = 0.01
    p: float = 2
    kind: str = "element"
    biases: bool = False
    needs_gradient: ClassVar[bool] = True
    needs_optimizer: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.eta < 0:
            raise ValueError(f"eta must not be negative, got {self.eta}")
        if self.kind not in ("element", "filter", "layer"):
            raise ValueError(f'kind must be "element", "filter" or "layer", got {self.kind!r}')

    def __call__(self, ascent: Ascent) -> Tensor:
        if self.kind == "layer":
            norms = ascent.space.norms(ascent.w)
            return steepest(ascent, lambda i, w, d: self._if_scaled(ascent, i, norms[i].to(w) + self.eta), self.p)
        if self.kind == "filter":
            return steepest(ascent, lambda i, w, d: self._filterwise(ascent, i, w), self.p)
        if self.p == 2:
            return self._elementwise(ascent)
        return steepest(ascent, lambda i, w, d: self._if_scaled(ascent, i, w.abs() + self.eta), self.p)

    def _scaled(self, ascent: Ascent, i: int) -> bool:
        return self.biases or not ascent.roles[i].endswith("bias")

    def _if_scaled(self, ascent: Ascent, i: int, t: Tensor) -> Tensor | None:
        return t if self._scaled(ascent, i) else None

    def _filterwise(self, ascent: Ascent, i: int, w: Tensor) -> Tensor | None:
        if not self._scaled(ascent, i):
            return None
        if w.dim() < 2:
            return w.abs() + self.eta
        rows = torch.linalg.vector_norm(w.flatten(1), dim=1) + self.eta
        return rows.view(-1, *[1] * (w.dim() - 1))

    def _elementwise(self, ascent: Ascent) -> Tensor:
        """The common case, in two sweeps over blocks that stay in cache: d ← T g with its norm, then d ← T d."""
        where = [i for i in range(len(ascent.w)) if self._scaled(ascent, i)]
        w, d = [ascent.w[i] for i in where], [ascent.d[i] for i in where]

        def sweep() -> None:
            for ws, ds in vectors.blocks(w, d):
                t = torch._foreach_abs(ws)
                if self.eta:
                    torch._foreach_add_(t, self.eta)
                torch._foreach_mul_(ds, t)

        sweep()
        norm = ascent.space.norm(ascent.d)
        sweep()
        return norm


@final
@dataclass(frozen=True)
class Classic:
    """The most used SAM class's rule: T = |w| on every tensor of a group with ``adaptive=True``, T = 1 elsewhere."""

    needs_gradient: ClassVar[bool] = True
    needs_optimizer: ClassVar[bool] = False

    def __call__(self, ascent: Ascent) -> Tensor:
        if not any(o.get("adaptive") for o in ascent.options):
            return steepest(ascent, None, 2)
        return steepest(ascent, lambda i, w, d: w.abs() if ascent.options[i].get("adaptive") else None, 2)


NORMALIZATION: tuple[type[nn.Module], ...] = (
    nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm,
    *([nn.RMSNorm] if hasattr(nn, "RMSNorm") else []),
)


def is_normalization(module: nn.Module) -> bool:
    """A normalization layer by type: torch's own, or a class like those model libraries write (``*RMSNorm``, ...)
    that owns nothing but a one-dimensional weight and perhaps a bias."""
    if isinstance(module, NORMALIZATION):
        return True
    own = dict(module.named_parameters(recurse=False))
    return (type(module).__name__.endswith("Norm") and not any(True for _ in module.children())
            and "weight" in own and all(p.dim() <= 1 for p in own.values()))


def role(module: nn.Module | None, name: str, parameter: Tensor) -> str:
    """ "weight", "bias", "norm_weight" or "norm_bias" of a parameter, from the module that owns it and its shape."""
    if module is not None and is_normalization(module):
        return "norm_bias" if name == "bias" else "norm_weight"
    return "weight" if parameter.dim() >= 2 else "bias"

