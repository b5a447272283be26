"""Linear maps, layer norm and batch norm with fixed statistics, with second derivatives of few passes over the data.

Each ``Function`` has a ``...Slope``, its backward pass as a function of its own, whose backward pass is written out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function


def last(backward: Callable[..., Any]) -> Callable[..., Any]:
    """The second backward pass of a layer, after which there is no third: asked for one it raises.

    (torch's ``once_differentiable`` looks at the incoming gradient only, and returns constants where that is one.)
    """
    @functools.wraps(backward)
    def guarded(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError("a third derivative was asked of a layer of flatmin.curvature.layers, which has two")
        return backward(ctx, *grads)

    return guarded


class Linear(Function):
    """y = x Wᵀ + b, for x of shape (m, i) and W of shape (o, i)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w.T if b is None else torch.addmm(b, x, w.T)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:    # type: ignore[override]
        x, w = ctx.saved_tensors
        if torch.is_grad_enabled():
            return LinearSlope.apply(g, x, w, *ctx.needs_input_grad)
        return _linear_backward(g, x, w, *ctx.needs_input_grad)


class LinearSlope(Function):
    """(g W, gᵀ x, Σ g)."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, w: Tensor, *wanted: bool) -> Any:
        ctx.save_for_backward(g, x, w)
        ctx.set_materialize_grads(False)
        return _linear_backward(g, x, w, *wanted)

    @staticmethod
    @last
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


class LayerNorm(Function):
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
            return *LayerNormSlope.apply(g, x, w, b, mean, r), None
        return *torch.ops.aten.native_layer_norm_backward(g, x, x.shape[-1:], mean, r, w, b, [True] * 3), None


class LayerNormSlope(Function):
    """(r P (w g), Σ g x̂, Σ g), with P the projection P u = u − mean u − x̂ mean(x̂ u)."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, w: Tensor, b: Tensor, mean: Tensor, r: Tensor) -> Any:
        out = torch.ops.aten.native_layer_norm_backward(g, x, x.shape[-1:], mean, r, w, b, [True] * 3)
        hat = (x - mean) * r
        ctx.save_for_backward(g, x, w, mean, r, hat, out[0], (g * w * hat).mean(-1, keepdim=True))
        return out

    @staticmethod
    @last
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


class BatchNorm(Function):
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
            return *BatchNormSlope.apply(g, x, w, mean, var, ctx.eps), None, None, None
        return *_batch_norm_backward(g, x, w, mean, var, ctx.eps), None, None, None


class BatchNormSlope(Function):
    """(r w g, Σ g x̂, Σ g)."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, w: Tensor, mean: Tensor, var: Tensor, eps: float) -> Any:
        ctx.save_for_backward(g, x, w, mean, var)
        ctx.eps = eps
        return _batch_norm_backward(g, x, w, mean, var, eps)

    @staticmethod
    @last
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
