"""The slow twins: one function an update rule, each obviously its formula.

Everything is one flat float64 vector. A rule receives a ``Point`` (the loss as a function of that vector, what the base
optimizer remembers, and a place for its own memory) and returns the gradient to be handed to the base optimizer, which
is torch's own. Nothing here imports flatmin. Sections are those of ALGORITHMS.md.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.func import functional_call

from problems import loss_fn

NORM_LAYERS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


@dataclass
class Point:
    """One step seen by a rule: the batches with their weights, the weights w, and what is remembered."""

    model: nn.Module
    batches: Sequence[tuple[Tensor, Tensor, float]]
    optimizer: torch.optim.Optimizer | None = None
    memory: dict = field(default_factory=dict)

    def __post_init__(self):
        self.named = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.w = torch.cat([p.detach().reshape(-1) for p in self.named.values()])
        self.slices, start = {}, 0
        for name, p in self.named.items():
            self.slices[name] = slice(start, start + p.numel())
            start += p.numel()

    def outputs(self, w: Tensor, x: Tensor) -> Tensor:
        parts = {n: w[s].view(self.named[n].shape) for n, s in self.slices.items()}
        return functional_call(self.model, parts, (x,))

    def loss(self, w: Tensor) -> Tensor:
        return sum(weight * loss_fn(self.outputs(w, x), y) for x, y, weight in self.batches)

    def gradient(self, w: Tensor) -> Tensor:
        w = w.detach().clone().requires_grad_()
        return torch.autograd.grad(self.loss(w), w)[0]

    def remembered(self, key: str) -> Tensor | None:
        """One entry of the base optimizer's state as a flat vector; None before its first step."""
        states = [self.optimizer.state.get(p, {}) for p in self.named.values()]
        if not all(isinstance(s.get(key), Tensor) for s in states):
            return None
        return torch.cat([s[key].reshape(-1) for s in states])

    def mask(self, chosen: Callable[[nn.Module, str, Tensor], bool]) -> Tensor:
        """1 on the coordinates of tensors chosen by (owning module, attribute name, tensor), else 0."""
        out = torch.zeros_like(self.w)
        for path, module in self.model.named_modules():
            for name, p in module.named_parameters(recurse=False, remove_duplicate=False):
                full = f"{path}.{name}" if path else name
                if full in self.slices and chosen(module, name, p):
                    out[self.slices[full]] = 1
        return out

    def weight_mask(self) -> Tensor:
        """Weights: tensors of two or more dimensions, and the scales of normalization layers. The rest are biases."""
        return self.mask(lambda module, name, p: p.dim() >= 2 or (isinstance(module, NORM_LAYERS) and name == "weight"))

    def norm_layer_mask(self) -> Tensor:
        return self.mask(lambda module, name, p: isinstance(module, NORM_LAYERS))

    def parts(self) -> list[tuple[float, Point]]:
        """Each micro-batch by itself, with its weight."""
        return [(weight, Point(self.model, [(x, y, 1.0)], self.optimizer, self.memory))
                for x, y, weight in self.batches]


# --- where is uphill: w, g -> eps ------------------------------------------------------------------------------------

def ball(g: Tensor, rho: float, p: float = 2) -> Tensor:
    """2.1: the maximiser of gᵀe over ‖e‖_p <= rho."""
    if p == 2:
        return rho * g / g.norm() if g.norm() > 0 else torch.zeros_like(g)
    if p == float("inf"):
        return rho * g.sign()
    top = torch.zeros_like(g)
    top[g.abs().argmax()] = 1
    return rho * top * g.sign()


def adaptive(w: Tensor, g: Tensor, weights: Tensor, rho: float, eta: float) -> Tensor:
    """2.2: e = rho T² g / ‖T g‖ with T = |w| + eta on weights and 1 on biases."""
    T = torch.where(weights > 0, w.abs() + eta, torch.ones_like(w))
    return rho * T**2 * g / (T * g).norm()


# --- the rules -------------------------------------------------------------------------------------------------------

def base(at: Point) -> Tensor:
    return at.gradient(at.w)


def sam(at: Point, rho: float, p: float = 2) -> Tensor:
    return at.gradient(at.w + ball(at.gradient(at.w), rho, p))


def asam(at: Point, rho: float, eta: float) -> Tensor:
    return at.gradient(at.w + adaptive(at.w, at.gradient(at.w), at.weight_mask(), rho, eta))


def facade_adaptive(at: Point, rho: float) -> Tensor:
    """The |w| of the most used SAM class: on every tensor, without eta."""
    return at.gradient(at.w + adaptive(at.w, at.gradient(at.w), torch.ones_like(at.w), rho, 0.0))


def grouped_sam(at: Point, rhos: dict[str, float], rho: float) -> Tensor:
    """Groups with their own rho, by parameter name; rho 0 leaves a group out of the norm."""
    radius = torch.full_like(at.w, rho)
    for name, value in rhos.items():
        radius[at.slices[name]] = value
    g = at.gradient(at.w)
    inside = radius != 0
    return at.gradient(at.w + radius * g * inside / g[inside].norm())


def micro_batch(rule: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Scope: each micro-batch chooses its own eps."""
    return lambda at, **kw: sum(weight * rule(part, **kw) for weight, part in at.parts())


def asam_inf(at: Point, rho: float, eta: float) -> Tensor:
    """2.2, p = inf: e = rho T sign(g)."""
    T = torch.where(at.weight_mask() > 0, at.w.abs() + eta, torch.ones_like(at.w))
    return at.gradient(at.w + rho * T * at.gradient(at.w).sign())


def asam_biases(at: Point, rho: float, eta: float) -> Tensor:
    """T = |w| + eta on every tensor."""
    return at.gradient(at.w + adaptive(at.w, at.gradient(at.w), torch.ones_like(at.w), rho, eta))


def asam_by_norms(at: Point, rho: float, eta: float, kind: str) -> Tensor:
    """T = ‖w_j‖ + eta for each filter (slice along dimension 0; elements of vectors) or each layer; 1 on biases."""
    size = at.w.abs()
    for name, s in at.slices.items():
        rows = at.w[s].view(at.named[name].shape) if kind == "filter" else at.w[s][None]
        if rows.dim() >= 2:
            size[s] = torch.cat([row.reshape(-1).norm().expand(row.numel()) for row in rows])
    T = torch.where(at.weight_mask() > 0, size + eta, torch.ones_like(size))
    g = at.gradient(at.w)
    return at.gradient(at.w + rho * T**2 * g / (T * g).norm())


def decayed_sam(at: Point, rho: float, decay: float = 0.5) -> Tensor:
    """Weight decay in the ascent: uphill on L + ½ decay ‖w‖²."""
    return at.gradient(at.w + ball(at.gradient(at.w) + decay * at.w, rho))


def layer_sam(at: Point, rho: float) -> Tensor:
    """2.4: e_j = rho ‖w_j‖ g_j / ‖g_j‖ for each tensor."""
    g, eps = at.gradient(at.w), torch.zeros_like(at.w)
    for s in at.slices.values():
        eps[s] = rho * at.w[s].norm() * g[s] / g[s].norm()
    return at.gradient(at.w + eps)


def looksam(at: Point, rho: float, k: int, alpha: float) -> Tensor:
    """2.4: on steps 0, k, ... SAM, keeping the part of its gradient orthogonal to g; else g plus that part rescaled."""
    t = at.memory.get("t", 0)
    at.memory["t"] = t + 1
    g = at.gradient(at.w)
    if t % k == 0:
        g_s = at.gradient(at.w + ball(g, rho))
        at.memory["g_v"] = g_s - (g @ g_s) / (g @ g) * g
        return g_s
    g_v = at.memory["g_v"]
    return g + alpha * g.norm() / g_v.norm() * g_v


def looksam_by_tensor(at: Point, rho: float, k: int, alpha: float) -> Tensor:
    """LookSAM with the projection and both norms taken in each tensor by itself."""
    t = at.memory.get("t", 0)
    at.memory["t"] = t + 1
    g = at.gradient(at.w)
    if t % k == 0:
        g_s = at.gradient(at.w + ball(g, rho))
        at.memory["g_v"] = {n: g_s[s] - (g[s] @ g_s[s]) / (g[s] @ g[s]) * g[s] for n, s in at.slices.items()}
        return g_s
    out = g.clone()
    for name, s in at.slices.items():
        g_v = at.memory["g_v"][name]
        out[s] += alpha * g[s].norm() / g_v.norm() * g_v
    return out


def looksam_micro(at: Point, rho: float, k: int, alpha: float) -> Tensor:
    """LookSAM whose full steps choose ε by micro-batch: g_s is their weighted sum, g the gradient of the whole step."""
    t = at.memory.get("t", 0)
    at.memory["t"] = t + 1
    g = at.gradient(at.w)
    if t % k == 0:
        g_s = micro_batch(sam)(at, rho=rho)
        at.memory["g_v"] = g_s - (g @ g_s) / (g @ g) * g
        return g_s
    g_v = at.memory["g_v"]
    return g + alpha * g.norm() / g_v.norm() * g_v


def momentum_sam(at: Point, rho: float) -> Tensor:
    """2.5: e = -rho v / ‖v‖ with the optimizer's own momentum; plain before there is one."""
    v = at.remembered("momentum_buffer")
    v = at.remembered("exp_avg") if v is None else v
    return at.gradient(at.w if v is None else at.w - rho * v / v.norm())


def fisher_sam(at: Point, rho: float, eta: float) -> Tensor:
    """2.6: e = rho F⁻¹g / sqrt(gᵀF⁻¹g) with F = 1 + eta g²."""
    g = at.gradient(at.w)
    f = g / (1 + eta * g**2)
    return at.gradient(at.w + rho * f / (g @ f).sqrt())


def preconditioned(at: Point, g: Tensor, rho: float, norm: str = "l2", power: float = 0.5) -> Tensor:
    """2.7 and 11.3: e = rho M⁻¹g / ‖M⁻¹g‖ with M = v̂^power + max(1e-8, m), v̂ AdamW's bias-corrected second moment
    before this step and m, a number a tensor, the mean of v̂^power where v̂ > 0.

    Over sqrt(gᵀM⁻¹g) with norm "dual", over ‖g‖ with "raw".
    """
    v = at.remembered("exp_avg_sq")
    if v is None:
        return ball(g, rho)
    group = at.optimizer.param_groups[0]
    step = float(at.optimizer.state[group["params"][0]]["step"])
    M = (v / (1 - group["betas"][1] ** step)) ** power
    for part in at.slices.values():
        seen = M[part] > 0
        others = M[part][seen] if seen.any() else M[M > 0]
        M[part] += max(1e-8, others.sum().item() / len(others))
    length = {"l2": (g / M).norm(), "dual": (g @ (g / M)).sqrt(), "raw": g.norm()}[norm]
    return rho * (g / M) / length


def preconditioned_sam(at: Point, rho: float, norm: str = "l2", power: float = 0.5) -> Tensor:
    return at.gradient(at.w + preconditioned(at, at.gradient(at.w), rho, norm, power))


def functional_gradient(at: Point, w: Tensor, displaced: Tensor) -> Tensor:
    """2.7: J(displaced)ᵀ ∂L/∂F(w): the loss linearised in the outputs, differentiated at the displaced weights."""
    u = displaced.detach().clone().requires_grad_()
    total = torch.zeros(())
    for x, y, weight in at.batches:
        z = at.outputs(w, x).detach().requires_grad_()
        (dz,) = torch.autograd.grad(weight * loss_fn(z, y), z)
        total = total + (dz * at.outputs(u, x)).sum()
    return torch.autograd.grad(total, u)[0]


def functional_sam(at: Point, rho: float) -> Tensor:
    return functional_gradient(at, at.w, at.w + ball(at.gradient(at.w), rho))


def logit_only(at: Point, rho: float) -> Tensor:
    """2.7, the mirror: J(w)ᵀ ∂L/∂F(w + e)."""
    return functional_gradient(at, at.w + ball(at.gradient(at.w), rho), at.w)


def preconditioned_functional_sam(at: Point, rho: float) -> Tensor:
    return functional_gradient(at, at.w, at.w + preconditioned(at, at.gradient(at.w), rho))


def surrogate_gap(g: Tensor, g_p: Tensor, alpha: float) -> Tensor:
    """2.8: g_p − alpha g_perp, g_perp the part of g orthogonal to g_p."""
    return g_p - alpha * (g - (g @ g_p) / (g_p @ g_p) * g_p)


def gsam(at: Point, rho: float, alpha: float) -> Tensor:
    g = at.gradient(at.w)
    return surrogate_gap(g, at.gradient(at.w + ball(g, rho)), alpha)


def preconditioned_gap(at: Point, rho: float, alpha: float) -> Tensor:
    g = at.gradient(at.w)
    return surrogate_gap(g, at.gradient(at.w + preconditioned(at, g, rho)), alpha)


def momentum_gap(at: Point, rho: float, alpha: float) -> Tensor:
    return surrogate_gap(at.gradient(at.w), momentum_sam(at, rho), alpha)


def adaptive_weighted(at: Point, rho: float, eta: float, gamma: float) -> Tensor:
    a = gamma / (1 - gamma)
    return (1 - a) * at.gradient(at.w) + a * asam(at, rho, eta)


def fisher_functional(at: Point, rho: float, eta: float) -> Tensor:
    g = at.gradient(at.w)
    f = g / (1 + eta * g**2)
    return functional_gradient(at, at.w, at.w + rho * f / (g @ f).sqrt())


def friendly_sam(at: Point, rho: float, sigma: float, decay: float) -> Tensor:
    """2.9: e along g − sigma m with the old m; on the first step along g, which also starts m."""
    g = at.gradient(at.w)
    m = at.memory.get("m")
    at.memory["m"] = g if m is None else decay * m + (1 - decay) * g
    return at.gradient(at.w + ball(g if m is None else g - sigma * m, rho))


def friendly_micro(at: Point, rho: float, sigma: float, decay: float) -> Tensor:
    """Each micro-batch along its own g − sigma m; m moves once a step, by the gradient of the whole step."""
    g, m, out = at.gradient(at.w), at.memory.get("m"), torch.zeros_like(at.w)
    at.memory["m"] = g if m is None else decay * m + (1 - decay) * g
    for weight, part in at.parts():
        g_i = part.gradient(at.w)
        out += weight * part.gradient(at.w + ball(g_i if m is None else g_i - sigma * m, rho))
    return out


def penalised(at: Point, w: Tensor, decay: float) -> Tensor:
    """The gradient of a penalty ½ decay ‖w‖² written into the loss."""
    return decay * w


def functional_penalised(at: Point, rho: float, decay: float) -> Tensor:
    """3.7: what the loss depends on beside the outputs is an ordinary gradient at w + e."""
    eps = ball(at.gradient(at.w) + penalised(at, at.w, decay), rho)
    return functional_gradient(at, at.w, at.w + eps) + penalised(at, at.w + eps, decay)


def logit_penalised(at: Point, rho: float, decay: float) -> Tensor:
    """The mirror: at w."""
    eps = ball(at.gradient(at.w) + penalised(at, at.w, decay), rho)
    return functional_gradient(at, at.w + eps, at.w) + penalised(at, at.w, decay)


def wsam(at: Point, rho: float, gamma: float) -> Tensor:
    """2.10, coupled: (1 − a) g + a g_p with a = gamma / (1 − gamma)."""
    g, a = at.gradient(at.w), gamma / (1 - gamma)
    return (1 - a) * g + a * at.gradient(at.w + ball(g, rho))


def sam_on(at: Point, rho: float) -> Tensor:
    """2.11: only normalization layers move; the norm is theirs."""
    return at.gradient(at.w + ball(at.gradient(at.w) * at.norm_layer_mask(), rho))


def unnormalized_sam(at: Point, rho: float) -> Tensor:
    """2.13: e = rho g."""
    return at.gradient(at.w + rho * at.gradient(at.w))


def every(k: int, rule: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Cadence: the rule on steps 0, k, 2k, ..., the plain gradient between."""
    def stepped(at: Point, **kw) -> Tensor:
        t = at.memory.get("every", 0)
        at.memory["every"] = t + 1
        return rule(at, **kw) if t % k == 0 else base(at)
    return stepped


def warm_start(n: int, rule: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Cadence: the plain gradient on the first n steps, then the rule."""
    def stepped(at: Point, **kw) -> Tensor:
        t = at.memory.get("warm", 0)
        at.memory["warm"] = t + 1
        return base(at) if t < n else rule(at, **kw)
    return stepped


# --- training with a rule --------------------------------------------------------------------------------------------

def assign(model: nn.Module, gradient: Tensor) -> None:
    start = 0
    for p in model.parameters():
        if p.requires_grad:
            p.grad = gradient[start:start + p.numel()].view(p.shape).clone()
            start += p.numel()


def train(model: nn.Module, make_optimizer, rule, steps: Sequence[Sequence[tuple[Tensor, Tensor, float]]],
          clip: float | None = None, **settings) -> tuple[list[Tensor], list[Tensor]]:
    """Train a copy of ``model`` with a rule and torch's own optimizer: weights after each step, and losses at w."""
    model = copy.deepcopy(model)
    optimizer, memory = make_optimizer([p for p in model.parameters() if p.requires_grad]), {}
    weights, losses = [], []
    for batches in steps:
        at = Point(model, batches, optimizer, memory)
        losses.append(at.loss(at.w).detach())
        assign(model, rule(at, **settings))
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        weights.append(torch.cat([p.detach().reshape(-1) for p in model.parameters() if p.requires_grad]))
    return weights, losses
