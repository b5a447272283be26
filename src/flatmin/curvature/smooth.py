"""Layers whose second derivative costs a few multiplications, in place of torch's while a graph for products is made.

A product with the Hessian goes back through the graph of the gradient. There torch evaluates the derivatives of GELU,
layer norm and batch norm from scratch for each vector; here what does not depend on the vector is computed once.
Values are the same to rounding. F. Dangel et al. and the authors of ``jax.linearize`` call this partial evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.overrides import TorchFunctionMode

Slope = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
"""x ↦ f(x), f′(x) and the tensor that ``Bend`` wants."""

Bend = Callable[[Tensor, Tensor], Tensor]
"""That tensor and f′(x) ↦ f″(x)."""


def _tanh(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    y = torch.tanh(x)
    return y, 1 - y * y, y


def _sigmoid(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    y = torch.sigmoid(x)
    return y, y * (1 - y), y


def _silu(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    s = torch.sigmoid(x)
    return F.silu(x), s * (1 + x * (1 - s)), x


def _silu_bend(x: Tensor, _: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1 - s) * (2 + x * (1 - 2 * s))


def _density(x: Tensor) -> Tensor:
    return torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def _gelu(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return F.gelu(x), torch.special.ndtr(x) + x * _density(x), x


_ROOT, _CUBIC = math.sqrt(2 / math.pi), 0.044715


def _gelu_tanh(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    t = torch.tanh(_ROOT * (x + _CUBIC * x**3))
    inner = _ROOT * (1 + 3 * _CUBIC * x * x)
    return F.gelu(x, approximate="tanh"), (1 + t + x * (1 - t * t) * inner) / 2, x


def _gelu_tanh_bend(x: Tensor, _: Tensor) -> Tensor:
    t = torch.tanh(_ROOT * (x + _CUBIC * x**3))
    inner, outer = _ROOT * (1 + 3 * _CUBIC * x * x), 1 - t * t
    return outer * (inner + x * (3 * _ROOT * _CUBIC * x - t * inner * inner))


class _Pointwise(Function):
    """f(x), given with f′."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, slope: Tensor, kept: Tensor, bend: Bend) -> Tensor:
        ctx.save_for_backward(x, slope, kept)
        ctx.bend = bend
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:    # type: ignore[override]
        x, slope, kept = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return g * slope, None, None, None, None
        return _Slope.apply(g, x, slope, ctx.bend(kept.detach(), slope)), None, None, None, None


class _Slope(Function):
    """g f′(x)."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, slope: Tensor, bend: Tensor) -> Tensor:
        ctx.save_for_backward(slope, g * bend)
        return g * slope

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, u: Tensor) -> Any:    # type: ignore[override]
        slope, curve = ctx.saved_tensors
        return u * slope, u * curve, None, None


class _Linear(Function):
    """y = x Wᵀ + b, for x of shape (m, i) and W of shape (o, i)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w.T if b is None else torch.addmm(b, x, w.T)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:    # type: ignore[override]
        x, w = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _LinearSlope.apply(g, x, w, *ctx.needs_input_grad)
        return _linear_backward(g, x, w, *ctx.needs_input_grad)


class _LinearSlope(Function):
    """(g W, gᵀ x, Σ g)."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, w: Tensor, *wanted: bool) -> Any:
        ctx.save_for_backward(g, x, w)
        ctx.set_materialize_grads(False)
        return _linear_backward(g, x, w, *wanted)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, u: Tensor | None, a: Tensor | None, c: Tensor | None) -> Any:    # type: ignore[override]
        g, x, w = ctx.saved_tensors
        to_g = None if u is None else u @ w.T
        if a is not None:
            to_g = x @ a.T if to_g is None else to_g.addmm_(x, a.T)
        if c is not None:
            to_g = c.expand_as(g) if to_g is None else to_g.add_(c)
        to_x = g @ a if a is not None and ctx.needs_input_grad[1] else None
        to_w = g.T @ u if u is not None and ctx.needs_input_grad[2] else None
        return to_g, to_x, to_w, None, None, None


def _linear_backward(g: Tensor, x: Tensor, w: Tensor, to_x: bool, to_w: bool, to_b: bool) -> Any:
    return g @ w if to_x else None, g.T @ x if to_w else None, g.sum(0) if to_b else None


class _LayerNorm(Function):
    """y = w x̂ + b, x̂ = (x − mean) r, over the last dimension."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor, eps: float) -> Tensor:
        y, mean, r = torch.native_layer_norm(x, x.shape[-1:], w, b, eps)
        ctx.save_for_backward(x, w, b, mean, r)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:    # type: ignore[override]
        x, w, b, mean, r = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *_LayerNormSlope.apply(g, x, w, b, mean, r), None
        return *torch.ops.aten.native_layer_norm_backward(g, x, x.shape[-1:], mean, r, w, b, [True] * 3), None


class _LayerNormSlope(Function):
    """(r P (w g), Σ g x̂, Σ g), with P the projection P u = u − mean u − x̂ mean(x̂ u)."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, w: Tensor, b: Tensor, mean: Tensor, r: Tensor) -> Any:
        out = torch.ops.aten.native_layer_norm_backward(g, x, x.shape[-1:], mean, r, w, b, [True] * 3)
        hat = (x - mean) * r
        ctx.save_for_backward(g, x, w, mean, r, hat, out[0], (g * w * hat).mean(-1, keepdim=True))
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, u: Tensor, a: Tensor, c: Tensor) -> Any:    # type: ignore[override]
        g, x, w, mean, r, hat, n, m = ctx.saved_tensors
        d = x.shape[-1]

        def projected(z: Tensor) -> Tensor:
            return torch.ops.aten.native_layer_norm_backward(z, x, x.shape[-1:], mean, r, None, None,
                                                             [True, False, False])[0]

        pu = projected(u)
        to_x = hat * ((u * n).sum(-1, keepdim=True) / d) + pu * m + n * ((u * hat).sum(-1, keepdim=True) / d)
        to_x = projected(a * g) - r * to_x
        to_g = torch.addcmul(torch.addcmul(c, hat, a), pu, w)
        return to_g, to_x, (g * pu).reshape(-1, d).sum(0), None, None, None


class _BatchNorm(Function):
    """y = w x̂ + b, x̂ = (x − mean) r a channel, with fixed statistics."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, w, mean, var)
        ctx.eps = eps
        return F.batch_norm(x, mean, var, w, b, eps=eps)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:    # type: ignore[override]
        x, w, mean, var = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *_BatchNormSlope.apply(g, x, w, mean, var, ctx.eps), None, None, None
        return *_batch_norm_backward(g, x, w, mean, var, ctx.eps), None, None, None


class _BatchNormSlope(Function):
    """(r w g, Σ g x̂, Σ g)."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, w: Tensor, mean: Tensor, var: Tensor, eps: float) -> Any:
        ctx.save_for_backward(g, x, w, mean, var)
        ctx.eps = eps
        return _batch_norm_backward(g, x, w, mean, var, eps)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, u: Tensor, a: Tensor, c: Tensor) -> Any:    # type: ignore[override]
        g, x, w, mean, var = ctx.saved_tensors
        r = torch.rsqrt(var + ctx.eps)
        row = (1, -1) + (1,) * (x.dim() - 2)
        to_g = F.batch_norm(x, mean, var, a, c, eps=ctx.eps).addcmul_(u, (w * r).view(row))
        along = _batch_norm_backward(u, g, None, torch.zeros_like(r), torch.ones_like(r), 0.0, [False, True, False])[1]
        return to_g, g * (a * r).view(row), r * along, None, None, None


def _batch_norm_backward(g: Tensor, x: Tensor, w: Tensor | None, mean: Tensor, var: Tensor, eps: float,
                         wanted: list[bool] | None = None) -> Any:
    return torch.ops.aten.native_batch_norm_backward(g, x, w, mean, var, None, None, False, eps, wanted or [True] * 3)


class Smooth(TorchFunctionMode):
    """Inside, layers are taken from this module where they are known here."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        make = _LAYERS.get(func)
        if make is not None and not torch.is_autocast_enabled(_device(args)):
            out = make(*args, **kwargs)
            if out is not None:
                return out
        return func(*args, **kwargs)


def _device(args: Any) -> str:
    return args[0].device.type if args and isinstance(args[0], Tensor) else "cpu"


def _plain(x: Tensor) -> bool:
    """Whether autograd alone looks at x: neither a subclass nor inside a transform of ``torch.func``."""
    return (type(x) in (Tensor, torch.nn.Parameter) and x.is_floating_point() and torch.is_grad_enabled()
            and not torch._C._functorch.is_functorch_wrapped_tensor(x))


def _pointwise(slope: Slope, bend: Bend) -> Callable[..., Tensor | None]:
    def make(x: Tensor, inplace: bool = False) -> Tensor | None:
        if inplace or not _plain(x) or not x.requires_grad:
            return None
        with torch.no_grad(), torch._C.DisableTorchFunction():
            y, first, kept = slope(x)
        out: Tensor = _Pointwise.apply(x, y, first, kept, bend)
        return out

    return make


_SMOOTH_GELU = {"none": _pointwise(_gelu, lambda x, _: _density(x) * (2 - x * x)),
                "tanh": _pointwise(_gelu_tanh, _gelu_tanh_bend)}


def _make_gelu(x: Tensor, approximate: str = "none") -> Tensor | None:
    return _SMOOTH_GELU[approximate](x)


def _make_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    if weight.dim() != 2 or x.dim() < 2 or not all(map(_plain, (x, weight) if bias is None else (x, weight, bias))):
        return None
    out: Tensor = _Linear.apply(x.reshape(-1, x.shape[-1]), weight, bias)
    return out.view(*x.shape[:-1], -1)


def _make_layer_norm(x: Tensor, shape: Any, weight: Tensor | None = None, bias: Tensor | None = None,
                     eps: float = 1e-5) -> Tensor | None:
    if len(shape) != 1 or weight is None or bias is None or x.dim() < 2 or not all(map(_plain, (x, weight, bias))):
        return None
    out: Tensor = _LayerNorm.apply(x, weight, bias, eps)
    return out


def _make_batch_norm(x: Tensor, mean: Tensor | None, var: Tensor | None, weight: Tensor | None = None,
                     bias: Tensor | None = None, training: bool = False, momentum: float = 0.1,
                     eps: float = 1e-5) -> Tensor | None:
    if training or mean is None or var is None or weight is None or bias is None \
            or not all(map(_plain, (x, weight, bias))):
        return None
    out: Tensor = _BatchNorm.apply(x, weight, bias, mean, var, eps)
    return out


_LAYERS: dict[Any, Callable[..., Tensor | None]] = {
    F.linear: _make_linear, F.gelu: _make_gelu, F.layer_norm: _make_layer_norm, F.batch_norm: _make_batch_norm}
for _functions, _slope, _bend in (((torch.tanh, Tensor.tanh, F.tanh), _tanh, lambda y, d: -2 * y * d),
                                  ((torch.sigmoid, Tensor.sigmoid, F.sigmoid), _sigmoid, lambda y, d: d * (1 - 2 * y)),
                                  ((F.silu,), _silu, _silu_bend)):
    for _function in _functions:
        _LAYERS[_function] = _pointwise(_slope, _bend)
