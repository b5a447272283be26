"""Layers whose second derivative costs a few multiplications, in place of torch's while a graph for products is made.

A product with the Hessian goes back through the graph of the gradient. There torch evaluates the derivatives of GELU,
layer norm and batch norm from scratch for each vector; here what does not depend on the vector is computed once.
Values are the same to rounding. It is what ``jax.linearize`` does for a whole program, by hand for a few layers.
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


def _gelu_bend(x: Tensor, _: Tensor) -> Tensor:
    x = x.clamp(-40, 40)        # beyond, f″ is 0 in every precision, and x² may overflow
    return _density(x) * (2 - x * x)


def _gelu_tanh(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    z = x.clamp(-12, 12)        # beyond, tanh is ±1 in every precision
    t = torch.tanh(_ROOT * (z + _CUBIC * z**3))
    inner = _ROOT * (1 + 3 * _CUBIC * z * z)
    return F.gelu(x, approximate="tanh"), (1 + t + z * (1 - t * t) * inner) / 2, x


def _gelu_tanh_bend(x: Tensor, _: Tensor) -> Tensor:
    x = x.clamp(-12, 12)
    t = torch.tanh(_ROOT * (x + _CUBIC * x**3))
    inner, outer = _ROOT * (1 + 3 * _CUBIC * x * x), 1 - t * t
    return outer * (inner + x * (3 * _ROOT * _CUBIC * x - t * inner * inner))


class _Pointwise(Function):
    """f(x)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: Slope, bend: Bend) -> Tensor:
        y, first, kept = slope(x)
        ctx.save_for_backward(x, first, kept)
        ctx.bend = bend
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:    # type: ignore[override]
        x, first, kept = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return g * first, None, None
        return _Slope.apply(g, x, first, ctx.bend(kept.detach(), first)), None, None


class _Slope(Function):
    """g f′(x)."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, slope: Tensor, bend: Tensor) -> Tensor:
        ctx.save_for_backward(slope, g * bend)
        return g * slope

    @staticmethod
    @layers.last
    def backward(ctx: Any, u: Tensor) -> Any:    # type: ignore[override]
        slope, curve = ctx.saved_tensors
        return u * slope, u * curve, None, None


class Smooth(TorchFunctionMode):
    """Inside, layers are taken from this module where they are known here."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        make = None if "out" in kwargs else _LAYERS.get(func)
        if make is not None and not any(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")):
            out = make(*args, **kwargs)
            if out is not None:
                return out
        return func(*args, **kwargs)


def _plain(*tensors: Tensor) -> bool:
    """Whether autograd alone looks at these, neither a subclass nor a transform of ``torch.func``, in one precision."""
    return (torch.is_grad_enabled() and tensors[0].is_floating_point() and tensors[0].numel() > 0
            and len({t.dtype for t in tensors}) == 1
            and all(type(t) in (Tensor, torch.nn.Parameter) and not is_functorch_wrapped_tensor(t) for t in tensors))


def _pointwise(slope: Slope, bend: Bend) -> Callable[..., Tensor | None]:
    def make(input: Tensor, inplace: bool = False) -> Tensor | None:
        if inplace or not _plain(input) or not input.requires_grad:
            return None
        out: Tensor = _Pointwise.apply(input, slope, bend)
        return out

    return make


_SMOOTH_GELU = {"none": _pointwise(_gelu, _gelu_bend),
                "tanh": _pointwise(_gelu_tanh, _gelu_tanh_bend)}


def _make_gelu(input: Tensor, approximate: str = "none") -> Tensor | None:
    return _SMOOTH_GELU[approximate](input)


def _make_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    given = (input, weight) if bias is None else (input, weight, bias)
    if weight.dim() != 2 or input.dim() < 2 or not _plain(*given):
        return None
    out: Tensor = layers.Linear.apply(input.reshape(-1, input.shape[-1]), weight, bias)
    return out.view(*input.shape[:-1], len(weight))


def _make_layer_norm(input: Tensor, normalized_shape: Any, weight: Tensor | None = None, bias: Tensor | None = None,
                     eps: float = 1e-5) -> Tensor | None:
    if weight is None or bias is None or len(normalized_shape) != 1 or input.dim() < 2 or \
            not _plain(input, weight, bias):
        return None
    out: Tensor = layers.LayerNorm.apply(input, weight, bias, eps)
    return out


def _make_batch_norm(input: Tensor, running_mean: Tensor | None, running_var: Tensor | None,
                     weight: Tensor | None = None, bias: Tensor | None = None, training: bool = False,
                     momentum: float = 0.1, eps: float = 1e-5) -> Tensor | None:
    if training or running_mean is None or running_var is None or weight is None or bias is None or \
            not _plain(input, weight, bias):
        return None
    out: Tensor = layers.BatchNorm.apply(input, weight, bias, running_mean, running_var, eps)
    return out


_LAYERS: dict[Any, Callable[..., Tensor | None]] = {
    F.linear: _make_linear, F.gelu: _make_gelu, F.layer_norm: _make_layer_norm, F.batch_norm: _make_batch_norm}
for _functions, _slope, _bend in (((torch.tanh, Tensor.tanh, F.tanh), _tanh, lambda y, d: -2 * y * d),
                                  ((torch.sigmoid, Tensor.sigmoid, F.sigmoid), _sigmoid, lambda y, d: d * (1 - 2 * y)),
                                  ((F.silu,), _silu, _silu_bend)):
    for _function in _functions:
        _LAYERS[_function] = _pointwise(_slope, _bend)
