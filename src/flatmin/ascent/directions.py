"""Where is uphill? Each direction turns the gradient into ε/ρ = d/‖d‖ in its own norm.

Steepest ascent in a diagonal metric T maximises gᵀε subject to ‖T⁻¹ε‖_p ≤ ρ. With u = T g:

    p = 2: ε = ρ T u/‖u‖₂        p = ∞: ε = ρ T sign(u)        p = 1: ε = ρ T sign(u) on argmax|u| alone

T = 1 is SAM, T = |w| + η is ASAM, T = F^(-½) is Fisher SAM, T = M^(-½) the Adam-preconditioned form.

A direction is a frozen dataclass whose call overwrites ``ascent.d`` (on entry the gradient) and returns the norm that
divides it. It says what it needs: ``needs_gradient`` (a first pass at w) and ``needs_optimizer``.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, final

import torch
from torch import Tensor

from .. import parallel, vectors
from ..vectors import Space
from .parameters import Row


@dataclass
class Ascent:
    """What a direction may look at. ``w`` and ``d`` are the local parts of the parameters that will move."""

    space: Space
    rows: list[Row]  # the parameters that will move: .parameter, .name, .role and .group of each
    w: list[Tensor]
    d: list[Tensor]
    gradient_norm: Tensor | None
    memory: dict[str, dict[str, Tensor]]  # what was kept at the step before, by kind and parameter; not to be written
    step: int
    optimizer: torch.optim.Optimizer | None = None
    loss_scale: Tensor | None = None
    keep: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # what to keep: forgotten if the step is skipped
    stretch: Tensor | float = 1.0  # set by a direction whose step is not ρ long: its length in units of ρ
    metric: Metric | None = None  # T of the norm ‖T⁻¹ε‖_p in which the step is ρ long; None: 1
    p: float = 2
    across: float | None = None  # combines the tensors' lengths, where that is not p

    def narrow(self, chosen: Sequence[bool]) -> None:
        """Leave tensors out: they will not move."""
        if all(chosen):
            return
        where = [i for i, c in enumerate(chosen) if c]
        self.rows, self.w = [self.rows[i] for i in where], [self.w[i] for i in where]
        self.d = [self.d[i] for i in where] if self.d else []
        self.space = Space([r.parameter for r in self.rows])
        self.gradient_norm = self.space.norm(self.d) if self.d else None

    def length(self, rhos: Sequence[float] | None = None) -> Tensor:
        """The length of d in the direction's own norm, each tensor first multiplied by its radius."""
        u = self.d
        if self.metric is not None:
            scales = [self.metric(i, w, d) for i, (w, d) in enumerate(zip(self.w, self.d, strict=True))]
            u = [d if t is None else vectors.ratio(d, t) for d, t in zip(u, scales, strict=True)]
        if self.p == 2:
            each = self.space.norms(u)
        else:
            ends = [(t.abs().sum() if self.p == 1 else t.abs().amax()).to(u[0].device, torch.float64) for t in u]
            each = self.space.reduce_each(torch.stack(ends), "sum" if self.p == 1 else "max")
        if rhos is not None:
            each = each * torch.tensor(rhos, dtype=each.dtype, device=each.device)
        return torch.linalg.vector_norm(each, self.across or self.p)


class Direction(Protocol):
    """``direction(ascent)`` overwrites ``ascent.d`` and returns the norm (0-d) by which it is to be divided.

    A direction that draws by the number of the step says so by ``counts_steps = True``, so that it is saved.
    """

    needs_gradient: ClassVar[bool]
    needs_optimizer: ClassVar[bool]

    def __call__(self, ascent: Ascent) -> Tensor: ...


Metric = Callable[[int, Tensor, Tensor], Tensor | None]  # metric(i, w, d): T of tensor i, None for 1


def steepest(ascent: Ascent, metric: Metric | None, p: float) -> Tensor:
    """Overwrite d by T · dual_p(T g) and return the norm of T g that belongs to p. ``metric(i, w, d)`` gives T."""
    ascent.metric, ascent.p = metric, p
    if metric is not None:
        _apply(ascent, metric)
    if p == 2:
        norm = ascent.space.norm(ascent.d) if metric is not None or ascent.gradient_norm is None else (
            ascent.gradient_norm)
    elif p == float("inf"):
        for d in ascent.d:
            d.sign_()
        norm = ascent.space.norm(ascent.d, p)  # 1, or 0 for a zero gradient
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
            scale = torch.ones((), dtype=torch.float64, device=ascent.d[0].device)
            if ascent.loss_scale is not None:
                scale = ascent.loss_scale.to(scale)
            assert ascent.gradient_norm is not None
            ascent.stretch = ascent.gradient_norm / scale
            return scale
        return steepest(ascent, None, self.p)


@final
@dataclass(frozen=True)
class Adaptive:
    """ε = ρ T²g/‖T g‖₂ with T = |w| + η on weights and 1 on biases (arXiv:2102.11600).

    ``kind`` "element" takes |wᵢ|, "filter" the norm of each slice along dimension 0 of tensors with two or more
    dimensions (elements elsewhere), "layer" the norm of each tensor. Which tensors are biases is decided by their
    shape and the type of the module that owns them, never by their name; ``biases=True`` scales them too.
    ``by_group=True`` leaves T = 1 on tensors whose parameter group does not say ``"adaptive": True``.
    """

    eta: float = 0.01
    p: float = 2
    kind: str = "element"
    biases: bool = False
    by_group: bool = False
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
        row = ascent.rows[i]
        if self.by_group and not row.group.get("adaptive"):
            return False
        return self.biases or not row.role.endswith("bias")

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
        ascent.metric = lambda i, w, d: self._if_scaled(ascent, i, w.abs() + self.eta)
        where = [i for i in range(len(ascent.w)) if self._scaled(ascent, i)]
        if not where:
            return steepest(ascent, None, 2)
        w, d = [ascent.w[i] for i in where], [ascent.d[i] for i in where]

        scratch = vectors.Scratch()

        def scales(ws: list[Tensor]) -> list[Tensor]:
            t = scratch.magnitudes(ws)
            if self.eta:
                torch._foreach_add_(t, self.eta)
            return t

        blocks, last = 0, None
        for ws, ds in vectors.blocks(w, d):
            blocks, last = blocks + 1, scales(ws)
            torch._foreach_mul_(ds, last)
        norm = ascent.space.norm(ascent.d)
        for ws, ds in vectors.blocks(w, d):
            torch._foreach_mul_(ds, last if last is not None and blocks == 1 else scales(ws))
        return norm


@final
@dataclass(frozen=True)
class Layerwise:
    """ε_j = ρ ‖w_j‖ g_j/‖g_j‖ for each tensor j (Layer-SAM, arXiv:2203.02714, as far as it could be read).

    The radius is relative: max_j ‖ε_j‖/‖w_j‖ = ρ. A tensor of zeros does not move.
    """

    needs_gradient: ClassVar[bool] = True
    needs_optimizer: ClassVar[bool] = False

    def __call__(self, ascent: Ascent) -> Tensor:
        norms = ascent.space.norms(ascent.w)
        ascent.metric, ascent.across = lambda i, w, d: norms[i].to(w), float("inf")
        scales = vectors.ratio(norms, ascent.space.norms(ascent.d))
        for d, scale in zip(ascent.d, scales, strict=True):
            d.mul_(scale.to(d.device, d.dtype if d.dtype == torch.float64 else torch.float32))
        return (scales.amax() > 0).to(scales)  # 0: nowhere to go


@final
@dataclass(frozen=True)
class Fisher:
    """ε = ρ F⁻¹g/√(gᵀF⁻¹g) with F = 1 + η g², the squared batch gradient (Fisher SAM, arXiv:2206.04920).

    η = 0 is SAM. Depends on the scale of the gradient; a loss scale is taken out. No official code exists and
    implementations disagree on the norm: this is the dual norm, which belongs to the paper's constraint eᵀF e ≤ ρ².
    """

    eta: float = 1.0
    p: float = 2
    needs_gradient: ClassVar[bool] = True
    needs_optimizer: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.eta < 0:
            raise ValueError(f"eta must not be negative, got {self.eta}")

    def __call__(self, ascent: Ascent) -> Tensor:
        _unscale(ascent)
        roots = [(1 + self.eta * d.square()).rsqrt() for d in ascent.d]
        return steepest(ascent, lambda i, w, d: roots[i], self.p)


@final
@dataclass(frozen=True)
class Preconditioned:
    """ε along M⁻¹g with M = v̂^power + max(eps, floor · m), v̂ the optimizer's second moment (arXiv:2502.02407).

    m is the mean of v̂^power over the entries of the tensor with v̂ > 0 (of all tensors where it has none). It keeps
    entries without a gradient so far, or for long, from taking the whole step. ``floor=0`` is Adam's own M, under
    which embedding rows in the batch for the first time take 1.00 of ‖ε‖² in a small language model. With floor 1
    they take 0.07 (at most 0.20), and rows last seen more than 40 steps ago 0.14 (``benchmarks/unseen_rows.py``).

    ``norm`` "l2": ε = ρ M⁻¹g/‖M⁻¹g‖; "dual": ρ M⁻¹g/√(gᵀM⁻¹g), the maximiser over eᵀM e ≤ ρ²; "raw": ρ M⁻¹g/‖g‖.
    v̂ is the one before this step's update; before the optimizer's first step M = 1. Power, bias correction and norm
    are not stated in any text that was available; the defaults are this library's.
    """

    power: float = 0.5
    eps: float = 1e-8
    bias_correction: bool = True
    norm: str = "l2"
    floor: float = 1.0
    needs_gradient: ClassVar[bool] = True
    needs_optimizer: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.norm not in ("l2", "dual", "raw"):
            raise ValueError(f'norm must be "l2", "dual" or "raw", got {self.norm!r}')
        if self.power not in (0.5, 1, 1.0):
            raise ValueError(f"power must be 0.5 or 1, got {self.power}")
        if not self.floor >= 0:
            raise ValueError(f"floor must not be negative, got {self.floor}")

    def __call__(self, ascent: Ascent) -> Tensor:
        raw = ascent.gradient_norm if ascent.gradient_norm is not None else ascent.space.norm(ascent.d)
        before = [d.clone() for d in ascent.d] if self.norm == "dual" else []
        self._divide(ascent)
        if self.norm == "dual":
            return ascent.space.dot(before, ascent.d).clamp_min(0).sqrt()
        length = ascent.space.norm(ascent.d)
        if self.norm == "l2":
            return length
        ascent.stretch = vectors.ratio(length, raw)
        return raw

    def _divide(self, ascent: Ascent) -> None:
        """d ← M⁻¹ d."""
        assert ascent.optimizer is not None
        groups = {id(p): group for group in ascent.optimizer.param_groups for p in group["params"]}
        owners = [groups.get(id(row.parameter)) for row in ascent.rows]
        floors = self._floors(ascent, owners)
        for i, (d, floor) in enumerate(zip(ascent.d, floors, strict=True)):
            root = self._root(ascent, i, owners[i])
            floor = floor.to(d.device, d.dtype if root is None else root.dtype)
            d.div_(floor if root is None else root + floor)

    def _floors(self, ascent: Ascent, owners: list[dict[str, Any] | None]) -> Tensor:
        """max(eps, floor · m) of each tensor; 1 as long as there is no second moment anywhere."""
        sums, counts = [], []
        for i, d in enumerate(ascent.d):
            root = self._root(ascent, i, owners[i])
            wide = torch.float64 if d.dtype == torch.float64 else torch.float32
            sums.append(d.new_zeros((), dtype=wide) if root is None else root.sum(dtype=wide))
            counts.append(d.new_zeros((), dtype=wide) if root is None else torch.count_nonzero(root).to(wide))
        total, count = (ascent.space.reduce_each(torch.stack([t.to(ascent.d[0].device) for t in each]))
                        for each in (sums, counts))
        mean = torch.where(count > 0, vectors.ratio(total, count), vectors.ratio(total.sum(), count.sum()))
        return torch.where(count.sum() > 0, (self.floor * mean).clamp_min(self.eps), 1.0)

    def _root(self, ascent: Ascent, i: int, owner: dict[str, Any] | None) -> Tensor | None:
        """v̂^power of one tensor; None before its first update."""
        assert ascent.optimizer is not None
        state = ascent.optimizer.state.get(ascent.rows[i].parameter)
        if not state:
            return None
        if "exp_avg_sq" not in state:
            raise ValueError(f"{type(ascent.optimizer).__name__} keeps no second moment (exp_avg_sq): the "
                             "preconditioned direction needs Adam, AdamW or an optimizer like them")
        v = parallel.local(state["exp_avg_sq"])
        if self.bias_correction:
            if owner is None or "betas" not in owner or "step" not in state:
                raise ValueError(f"{type(ascent.optimizer).__name__} keeps no betas in its groups or no step in its "
                                 "state, which the bias correction needs: Preconditioned(bias_correction=False)")
            beta2, step = float(owner["betas"][1]), state["step"]
            v = v / (1 - beta2 ** (step.double() if isinstance(step, Tensor) else step))  # nothing is read to the host
        return v.sqrt() if self.power == 0.5 else v


@final
@dataclass(frozen=True)
class Momentum:
    """ε = −ρ v/‖v‖, v the optimizer's momentum buffer or first moment (Momentum-SAM, arXiv:2401.12033).

    With the plain rule a step needs one pass, at w + ε; ``backward`` then returns the loss there. The sign is minus:
    the gradient of a new batch opposes the buffer, so −v is uphill. Before the optimizer's first step ε = 0.
    """

    needs_gradient: ClassVar[bool] = False
    needs_optimizer: ClassVar[bool] = True

    def __call__(self, ascent: Ascent) -> Tensor:
        assert ascent.optimizer is not None
        ascent.d = [self._uphill(ascent, i) for i in range(len(ascent.w))]
        return ascent.space.norm(ascent.d)

    def _uphill(self, ascent: Ascent, i: int) -> Tensor:
        state = ascent.optimizer.state.get(ascent.rows[i].parameter, {}) if ascent.optimizer is not None else {}
        v = state.get("momentum_buffer", state.get("exp_avg"))
        if v is not None:
            return parallel.local(v).neg()
        if state or (ascent.optimizer is not None and not _keeps_momentum(ascent.optimizer)):
            raise ValueError(f"{type(ascent.optimizer).__name__} keeps no momentum buffer: the momentum direction "
                             "needs SGD(momentum=...), Adam, AdamW or an optimizer like them")
        return torch.zeros_like(ascent.w[i])


def _keeps_momentum(optimizer: torch.optim.Optimizer) -> bool:
    return any(group.get("momentum") or "betas" in group for group in optimizer.param_groups)


@final
@dataclass(frozen=True)
class Friendly:
    """ε = ρ d/‖d‖ with d = g − σ m, m ← λ m + (1 − λ) g (F-SAM, arXiv:2403.12350).

    Uses m from before this step; the first step takes d = g and starts m there, as the authors' code does. m moves once
    a step: where each micro-batch has its own ε, by the mean of their gradients. A skipped step leaves m as it was.
    """

    sigma: float = 1.0
    decay: float = 0.9
    needs_gradient: ClassVar[bool] = True
    needs_optimizer: ClassVar[bool] = False

    def __call__(self, ascent: Ascent) -> Tensor:
        _unscale(ascent)
        average = ascent.memory.get("average", {})
        kept = ascent.keep["average"] = {}
        for row, d in zip(ascent.rows, ascent.d, strict=True):
            m = average.get(row.name)
            if m is None:
                kept[row.name] = d.clone()
            else:
                kept[row.name] = self.decay * m + (1 - self.decay) * d
                d.sub_(m, alpha=self.sigma)
        return ascent.space.norm(ascent.d)


@final
@dataclass(frozen=True)
class Random:
    """ε = ρ z/‖z‖ with z standard normal: one pass with the plain rule. Drawn from ``seed`` and the step's number."""

    seed: int = 0
    needs_gradient: ClassVar[bool] = False
    needs_optimizer: ClassVar[bool] = False
    counts_steps: ClassVar[bool] = True

    def __call__(self, ascent: Ascent) -> Tensor:
        ascent.d = ascent.space.random(vectors.seeded(_mixed(self.seed, ascent.step)))
        return ascent.space.norm(ascent.d)


@final
@dataclass(frozen=True)
class RandomFraction:
    """A direction on a random fraction β of the tensors (or entries), scaled by 1/β (ESAM's SWP, arXiv:2110.03141).

    ``per_tensor`` draws whole tensors, as the authors' code does, and the norm is taken over the drawn ones:
    ‖ε‖ = ρ/β. Otherwise single entries are drawn, after the norm over all of them: E[ε] is the inner direction's ε and
    ‖ε‖ about ρ/√β. The first pass takes the gradient of all tensors either way.
    """

    inner: Direction = Gradient()
    beta: float = 0.5
    seed: int = 0
    per_tensor: bool = True
    needs_gradient: ClassVar[bool] = True
    needs_optimizer: ClassVar[bool] = False
    counts_steps: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.beta <= 1:
            raise ValueError(f"beta must lie in (0, 1], got {self.beta}")
        _needs_of(self.inner, self)

    def chosen(self, count: int, step: int) -> list[bool]:
        """Which of ``count`` tensors move at a step; never none of them."""
        if not self.per_tensor or count == 0:
            return [True] * count
        generator = random.Random(_mixed(self.seed, step))
        draws = [generator.random() for _ in range(count)]
        return [u <= max(self.beta, min(draws)) for u in draws]

    def __call__(self, ascent: Ascent) -> Tensor:
        ascent.narrow(self.chosen(len(ascent.rows), ascent.step))
        norm = self.inner(ascent)
        if not self.per_tensor:
            draws = ascent.space.random(vectors.seeded(_mixed(self.seed, ascent.step)), "uniform")
            for d, u in zip(ascent.d, draws, strict=True):
                d.mul_(u < self.beta)
            ascent.stretch = vectors.ratio(ascent.length(), norm)
        ascent.stretch = ascent.stretch / self.beta
        return norm * self.beta


def _needs_of(inner: Direction, outer: Direction) -> None:
    """A direction around another one needs what that one needs."""
    for need in ("needs_gradient", "needs_optimizer", "counts_steps"):
        own = need == "counts_steps" and getattr(outer, need)
        object.__setattr__(outer, need, own or getattr(inner, need, False))


def _mixed(seed: int, step: int) -> int:
    """A generator seed for a step; consecutive steps must not share a stream."""
    return (seed * 1_000_003 + step * 7_919 + 17) % (2**63)


def _unscale(ascent: Ascent) -> None:
    """Take a loss scale out of d, for directions that depend on the gradient's scale."""
    if ascent.loss_scale is not None:
        inverse = 1 / ascent.loss_scale
        vectors.scale(inverse, ascent.d)
        ascent.loss_scale = None
        if ascent.gradient_norm is not None:
            ascent.gradient_norm = ascent.gradient_norm * inverse.to(ascent.gradient_norm)


@final
@dataclass(frozen=True)
class WithWeightDecay:
    """The inner direction of g + λ w: the ascent sees an L2 penalty ½λ‖w‖², as in the authors' JAX code of SAM.

    Weight decay on the optimizer's side (SGD's, AdamW's) is otherwise invisible to the ascent.
    """

    weight_decay: float
    inner: Direction = Gradient()
    needs_gradient: ClassVar[bool] = True
    needs_optimizer: ClassVar[bool] = False
    counts_steps: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.inner.needs_gradient:
            raise ValueError(f"weight decay enters the ascent through the gradient, which {type(self.inner).__name__} "
                             "does not use")
        _needs_of(self.inner, self)

    def __call__(self, ascent: Ascent) -> Tensor:
        _unscale(ascent)
        vectors.axpy(self.weight_decay, ascent.w, ascent.d)
        ascent.gradient_norm = ascent.space.norm(ascent.d)
        return self.inner(ascent)
