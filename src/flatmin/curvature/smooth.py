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
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd import Function
from torch.overrides import TorchFunctionMode

from . import layers

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
            and not is_functorch_wrapped_tensor(x))


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
    out: Tensor = layers.Linear.apply(x.reshape(-1, x.shape[-1]), weight, bias)
    return out.view(*x.shape[:-1], -1)


def _make_layer_norm(x: Tensor, shape: Any, weight: Tensor | None = None, bias: Tensor | None = None,
                     eps: float = 1e-5) -> Tensor | None:
    if len(shape) != 1 or weight is None or bias is None or x.dim() < 2 or not all(map(_plain, (x, weight, bias))):
        return None
    out: Tensor = layers.LayerNorm.apply(x, weight, bias, eps)
    return out


def _make_batch_norm(x: Tensor, mean: Tensor | None, var: Tensor | None, weight: Tensor | None = None,
                     bias: Tensor | None = None, training: bool = False, momentum: float = 0.1,
                     eps: float = 1e-5) -> Tensor | None:
    if training or mean is None or var is None or weight is None or bias is None \
            or not all(map(_plain, (x, weight, bias))):
        return None
    out: Tensor = layers.BatchNorm.apply(x, weight, bias, mean, var, eps)
    return out


_LAYERS: dict[Any, Callable[..., Tensor | None]] = {
    F.linear: _make_linear, F.gelu: _make_gelu, F.layer_norm: _make_layer_norm, F.batch_norm: _make_batch_norm}
for _functions, _slope, _bend in (((torch.tanh, Tensor.tanh, F.tanh), _tanh, lambda y, d: -2 * y * d),
                                  ((torch.sigmoid, Tensor.sigmoid, F.sigmoid), _sigmoid, lambda y, d: d * (1 - 2 * y)),
                                  ((F.silu,), _silu, _silu_bend)):
    for _function in _functions:
        _LAYERS[_function] = _pointwise(_slope, _bend)
