"""Where is uphill? Each direction turns the gradient into ε/ρ = d/norm, of length 1 in its own norm.

A direction is a frozen dataclass called with an :class:`~flatmin.ascent.steepest.AscentInfo`; it returns an
:class:`~flatmin.ascent.steepest.Ascent`. It says what it needs: a gradient at w, the optimizer, the number of the step.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from .. import parallel, vectors
from .steepest import Ascent, AscentInfo, DiagonalNorm, Direction, steepest


@final
@dataclass(frozen=True)
class Gradient:
    """ε = ρ g/‖g‖₂, or its p = ∞ and p = 1 forms (arXiv:2010.01412, eq. 2)."""

    p: float = 2
    normalized: bool = True
    needs_gradient = True
    needs_optimizer = False
    counts_steps = False

    def __call__(self, info: AscentInfo) -> Ascent:
        if not self.normalized:  # USAM: ε = ρ g; under a GradScaler g carries the loss scale
            scale = torch.ones((), dtype=torch.float64, device=info.gradient[0].device)
            if info.loss_scale is not None:
                scale = info.loss_scale.to(scale)
            assert info.gradient_norm is not None
            return Ascent(info, info.gradient, scale, info.gradient_norm / scale)
        return steepest(info, None, self.p)


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
    needs_gradient = True
    needs_optimizer = False
    counts_steps = False

    def __post_init__(self) -> None:
        if self.eta < 0:
            raise ValueError(f"eta must not be negative, got {self.eta}")
        if self.kind not in ("element", "filter", "layer"):
            raise ValueError(f'kind must be "element", "filter" or "layer", got {self.kind!r}')

    def __call__(self, info: AscentInfo) -> Ascent:
        if self.kind == "layer":
            norms = info.space.norms(info.w)
            return steepest(info, lambda i, w, d: self._if_scaled(info, i, norms[i].to(w) + self.eta), self.p)
        if self.kind == "filter":
            return steepest(info, lambda i, w, d: self._filterwise(info, i, w), self.p)
        if self.p == 2:
            return self._elementwise(info)
        return steepest(info, lambda i, w, d: self._if_scaled(info, i, w.abs() + self.eta), self.p)

    def _is_scaled(self, info: AscentInfo, i: int) -> bool:
        parameter = info.parameters[i]
        if self.by_group and not parameter.group.get("adaptive"):
            return False
        return self.biases or not parameter.role.endswith("bias")

    def _if_scaled(self, info: AscentInfo, i: int, t: Tensor) -> Tensor | None:
        return t if self._is_scaled(info, i) else None

    def _filterwise(self, info: AscentInfo, i: int, w: Tensor) -> Tensor | None:
        if not self._is_scaled(info, i):
            return None
        if w.dim() < 2:
            return w.abs() + self.eta
        filters = torch.linalg.vector_norm(w.flatten(1), dim=1) + self.eta
        return filters.view(-1, *[1] * (w.dim() - 1))

    def _elementwise(self, info: AscentInfo) -> Ascent:
        """The common case, in two sweeps over blocks that stay in cache: d ← T g with its norm, then d ← T d."""
        where = [i for i in range(len(info.w)) if self._is_scaled(info, i)]
        if not where:
            return steepest(info, None, 2)
        w, d = [info.w[i] for i in where], [info.gradient[i] for i in where]
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
        norm = info.space.norm(info.gradient)
        for ws, ds in vectors.blocks(w, d):
            torch._foreach_mul_(ds, last if last is not None and blocks == 1 else scales(ws))
        own_norm = DiagonalNorm(lambda i, w, d: self._if_scaled(info, i, w.abs() + self.eta))
        return Ascent(info, info.gradient, norm, own_norm=own_norm)


@final
@dataclass(frozen=True)
class Layerwise:
    """ε_j = ρ ‖w_j‖ g_j/‖g_j‖ for each tensor j (Layer-SAM, arXiv:2203.02714, as far as it could be read).

    The radius is relative: max_j ‖ε_j‖/‖w_j‖ = ρ. A tensor of zeros does not move.
    """

    needs_gradient = True
    needs_optimizer = False
    counts_steps = False

    def __call__(self, info: AscentInfo) -> Ascent:
        norms = info.space.norms(info.w)
        scales = vectors.ratio(norms, info.space.norms(info.gradient))
        for d, scale in zip(info.gradient, scales, strict=True):
            d.mul_(scale.to(d.device, d.dtype if d.dtype == torch.float64 else torch.float32))
        own_norm = DiagonalNorm(lambda i, w, d: norms[i].to(w), across=float("inf"))
        return Ascent(info, info.gradient, (scales.amax() > 0).to(scales), own_norm=own_norm)  # norm 0: no step


@final
@dataclass(frozen=True)
class Fisher:
    """ε = ρ F⁻¹g/√(gᵀF⁻¹g) with F = 1 + η g², the squared batch gradient (Fisher SAM, arXiv:2206.04920).

    η = 0 is SAM. Depends on the scale of the gradient; a loss scale is taken out. No official code exists and
    implementations disagree on the norm: this is the dual norm, which belongs to the paper's constraint eᵀF e ≤ ρ².
    """

    eta: float = 1.0
    p: float = 2
    needs_gradient = True
    needs_optimizer = False
    counts_steps = False

    def __post_init__(self) -> None:
        if self.eta < 0:
            raise ValueError(f"eta must not be negative, got {self.eta}")

    def __call__(self, info: AscentInfo) -> Ascent:
        info = info.unscaled()
        roots = [(1 + self.eta * g.square()).rsqrt() for g in info.gradient]
        return steepest(info, lambda i, w, d: roots[i], self.p)


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
    needs_gradient = True
    needs_optimizer = True
    counts_steps = False

    def __post_init__(self) -> None:
        if self.norm not in ("l2", "dual", "raw"):
            raise ValueError(f'norm must be "l2", "dual" or "raw", got {self.norm!r}')
        if self.power not in (0.5, 1, 1.0):
            raise ValueError(f"power must be 0.5 or 1, got {self.power}")
        if not self.floor >= 0:
            raise ValueError(f"floor must not be negative, got {self.floor}")

    def __call__(self, info: AscentInfo) -> Ascent:
        raw = info.gradient_norm if info.gradient_norm is not None else info.space.norm(info.gradient)
        before = [g.clone() for g in info.gradient] if self.norm == "dual" else []
        d = info.gradient
        self._divide(info, d)
        if self.norm == "dual":
            return Ascent(info, d, info.space.dot(before, d).clamp_min(0).sqrt())
        length = info.space.norm(d)
        if self.norm == "l2":
            return Ascent(info, d, length)
        return Ascent(info, d, raw, vectors.ratio(length, raw))

    def _divide(self, info: AscentInfo, d: list[Tensor]) -> None:
        """d ← M⁻¹ d."""
        assert info.optimizer is not None
        groups = {id(p): group for group in info.optimizer.param_groups for p in group["params"]}
        owners = [groups.get(id(p.parameter)) for p in info.parameters]
        floors = self._floors(info, owners)
        for i, (t, floor) in enumerate(zip(d, floors, strict=True)):
            root = self._root(info, i, owners[i])
            floor = floor.to(t.device, t.dtype if root is None else root.dtype)
            t.div_(floor if root is None else root + floor)

    def _floors(self, info: AscentInfo, owners: list[dict[str, Any] | None]) -> Tensor:
        """max(eps, floor · m) of each tensor; 1 as long as there is no second moment anywhere."""
        sums, counts = [], []
        for i, d in enumerate(info.gradient):
            root = self._root(info, i, owners[i])
            wide = torch.float64 if d.dtype == torch.float64 else torch.float32
            sums.append(d.new_zeros((), dtype=wide) if root is None else root.sum(dtype=wide))
            counts.append(d.new_zeros((), dtype=wide) if root is None else torch.count_nonzero(root).to(wide))
        total, count = (info.space.reduce_each(torch.stack([t.to(info.gradient[0].device) for t in each]))
                        for each in (sums, counts))
        mean = torch.where(count > 0, vectors.ratio(total, count), vectors.ratio(total.sum(), count.sum()))
        return torch.where(count.sum() > 0, (self.floor * mean).clamp_min(self.eps), 1.0)

    def _root(self, info: AscentInfo, i: int, owner: dict[str, Any] | None) -> Tensor | None:
        """v̂^power of one tensor; None before its first update."""
        assert info.optimizer is not None
        state = info.optimizer.state.get(info.parameters[i].parameter)
        if not state:
            return None
        if "exp_avg_sq" not in state:
            raise ValueError(f"{type(info.optimizer).__name__} keeps no second moment (exp_avg_sq): the "
                             "preconditioned direction needs Adam, AdamW or an optimizer like them")
        v = parallel.local(state["exp_avg_sq"])
        if self.bias_correction:
            if owner is None or "betas" not in owner or "step" not in state:
                raise ValueError(f"{type(info.optimizer).__name__} keeps no betas in its groups or no step in its "
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

    needs_gradient = False
    needs_optimizer = True
    counts_steps = False

    def __call__(self, info: AscentInfo) -> Ascent:
        d = [self._uphill(info, i) for i in range(len(info.w))]
        return Ascent(info, d, info.space.norm(d))

    def _uphill(self, info: AscentInfo, i: int) -> Tensor:
        assert info.optimizer is not None
        state = info.optimizer.state.get(info.parameters[i].parameter, {})
        v = state.get("momentum_buffer", state.get("exp_avg"))
        if v is not None:
            return parallel.local(v).neg()
        if state or not _keeps_momentum(info.optimizer):
            raise ValueError(f"{type(info.optimizer).__name__} keeps no momentum buffer: the momentum direction "
                             "needs SGD(momentum=...), Adam, AdamW or an optimizer like them")
        return torch.zeros_like(info.w[i])


def _keeps_momentum(optimizer: torch.optim.Optimizer) -> bool:
    return any(group.get("momentum") or "betas" in group for group in optimizer.param_groups)


@final
@dataclass(frozen=True)
class Friendly:
    """ε = ρ d/‖d‖ with d = g − σ m, m ← λ m + (1 − λ) g (F-SAM, arXiv:2403.12350).

    Uses m from before this step; the first step takes d = g and starts m there, as the authors' code does. m moves once
    a step: where each micro-batch has its own ε, to the mean of what each makes of it. A skipped step leaves m as it
    was, and so does a batch that does not reach a parameter. Defaults are those of the authors' runs on CIFAR.
    """

    sigma: float = 1.0
    decay: float = 0.6
    needs_gradient = True
    needs_optimizer = False
    counts_steps = False

    def __call__(self, info: AscentInfo) -> Ascent:
        info = info.unscaled()
        before, after = info.memory.get("average", {}), {}
        for parameter, d in zip(info.parameters, info.gradient, strict=True):
            m = before.get(parameter.name)
            if m is None:
                after[parameter.name] = d.clone()
            else:
                after[parameter.name] = self.decay * m + (1 - self.decay) * d
                d.sub_(m, alpha=self.sigma)
        return Ascent(info, info.gradient, info.space.norm(info.gradient), memory={"average": after})


@final
@dataclass(frozen=True)
class Random:
    """ε = ρ z/‖z‖ with z standard normal: one pass with the plain rule. Drawn from ``seed`` and the step's number."""

    seed: int = 0
    needs_gradient = False
    needs_optimizer = False
    counts_steps = True

    def __call__(self, info: AscentInfo) -> Ascent:
        d = info.space.random(vectors.seeded(_mixed(self.seed, info.step)))
        return Ascent(info, d, info.space.norm(d))


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
    counts_steps = True

    def __post_init__(self) -> None:
        if not 0 < self.beta <= 1:
            raise ValueError(f"beta must lie in (0, 1], got {self.beta}")

    @property
    def needs_gradient(self) -> bool:
        return self.inner.needs_gradient

    @property
    def needs_optimizer(self) -> bool:
        return self.inner.needs_optimizer

    def chosen(self, count: int, step: int) -> list[bool]:
        """Which of ``count`` tensors move at a step; never none of them."""
        if not self.per_tensor or count == 0:
            return [True] * count
        generator = random.Random(_mixed(self.seed, step))
        draws = [generator.random() for _ in range(count)]
        return [u <= max(self.beta, min(draws)) for u in draws]

    def __call__(self, info: AscentInfo) -> Ascent:
        ascent = self.inner(info.only(self.chosen(len(info.parameters), info.step)))
        length = ascent.length
        if not self.per_tensor:
            draws = ascent.info.space.random(vectors.seeded(_mixed(self.seed, info.step)), "uniform")
            for d, u in zip(ascent.d, draws, strict=True):
                d.mul_(u < self.beta)
            length = vectors.ratio(ascent.own_length(), ascent.norm)
        return replace(ascent, norm=ascent.norm * self.beta, length=length / self.beta)


def _mixed(seed: int, step: int) -> int:
    """A generator seed for a step; consecutive steps must not share a stream."""
    return (seed * 1_000_003 + step * 7_919 + 17) % (2**63)


@final
@dataclass(frozen=True)
class WithWeightDecay:
    """The inner direction of g + λ w: the ascent sees an L2 penalty ½λ‖w‖², as in the authors' JAX code of SAM.

    Weight decay on the optimizer's side (SGD's, AdamW's) is otherwise invisible to the ascent.
    """

    weight_decay: float
    inner: Direction = Gradient()
    needs_gradient = True

    def __post_init__(self) -> None:
        if not self.inner.needs_gradient:
            raise ValueError(f"weight decay enters the ascent through the gradient, which {type(self.inner).__name__} "
                             "does not use")

    @property
    def needs_optimizer(self) -> bool:
        return self.inner.needs_optimizer

    @property
    def counts_steps(self) -> bool:
        return self.inner.counts_steps

    def __call__(self, info: AscentInfo) -> Ascent:
        info = info.unscaled()
        vectors.axpy(self.weight_decay, info.w, info.gradient)
        return self.inner(replace(info, gradient_norm=info.space.norm(info.gradient)))
