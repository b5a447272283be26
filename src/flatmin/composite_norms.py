"""Normalization made of elementary operations, where torch's own has wrong higher derivatives.

What torch's fused kernels save (a mean, a variance, a norm) has no history of its own. So their derivatives of some
order are wrong, without an error:

* ``weight_norm``: the second derivative;
* layer norm, and batch and instance norm over the batch: the third (pytorch/pytorch#175754, #186256), and the
  derivatives of a forward-mode derivative (``torch.func.jvp``).

The third derivative is needed by losses that differentiate inside: gradient penalties, score matching, forces.
"""

from __future__ import annotations

import functools
import inspect
import sys
from types import CodeType
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor
from torch.overrides import TorchFunctionMode


class CompositeNorms(TorchFunctionMode):
    """Inside, normalization can be differentiated any number of times."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _COMPOSITE.get(func, func)(*args, **(kwargs or {}))


class Watch(TorchFunctionMode):
    """Notes whether the code run inside needs ``CompositeNorms``, and whether it uses a reentrant checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.weight_norm = self.norms = self.differentiates = self.recomputed = self.reentrant = False

    @property
    def needs_composites(self) -> bool:
        """Whether code run inside must run again with composite norms.

        Not where a layer is recomputed in the backward pass, where function modes are off: it must stay as it was.
        """
        return (self.weight_norm or self.norms and self.differentiates) and not self.recomputed

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _COMPOSITE:
            self.norms = True
            self.weight_norm |= func is torch._weight_norm
            self.recomputed |= _called_by(_CHECKPOINT)
        elif func in _DIFFERENTIATES:
            self.differentiates = True
        # where no input requires a gradient, a reentrant checkpoint leaves no node in the graph
        self.reentrant |= not torch.is_grad_enabled() and _called_by(_REENTRANT)
        return func(*args, **(kwargs or {}))


_DIFFERENTIATES = {torch.autograd.grad, Tensor.backward, torch.autograd.backward, torch._make_dual}
_CHECKPOINT = inspect.unwrap(torch.utils.checkpoint.checkpoint).__code__
_REENTRANT = torch.utils.checkpoint.CheckpointFunction.forward.__code__


def _called_by(code: CodeType) -> bool:
    frame = sys._getframe(2)
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame is not None


def _wide(x: Tensor, *others: Tensor | None) -> Tensor:
    """x in float32, or the widest of the input and the parameters, as the kernels compute."""
    kind = functools.reduce(torch.promote_types, [t.dtype for t in (x, *others) if t is not None], torch.float32)
    return x.to(kind)


def _normalized(x: Tensor, dims: list[int], eps: float) -> Tensor:
    centered = x - x.mean(dims, keepdim=True)
    return centered * torch.rsqrt(centered.square().mean(dims, keepdim=True) + eps)


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def _layer_norm(input: Tensor, normalized_shape: Any, weight: Tensor | None = None, bias: Tensor | None = None,
                eps: float = 1e-5, cudnn_enable: bool = True) -> Tensor:
    x = _wide(input, weight, bias)
    return _affine(_normalized(x, list(range(-len(normalized_shape), 0)), eps), weight, bias).to(input.dtype)


def _batch_norm(input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = None,
                bias: Tensor | None = None, training: bool = False, momentum: float = 0.1, eps: float = 1e-5) -> Tensor:
    x = _wide(input, weight, bias, running_mean, running_var)
    if training or running_mean is None or running_var is None:
        dims = [d for d in range(input.dim()) if d != 1]
        out = _normalized(x, dims, eps)
        if running_mean is not None and running_var is not None:
            _update_running(running_mean, x.mean(dims), momentum)
            _update_running(running_var, x.var(dims), momentum)
    else:
        mean, var = _per_channel(x, running_mean, running_var)
        out = (x - mean) * torch.rsqrt(var.to(x.dtype) + eps)
    return _affine(out, *_per_channel(x, weight, bias)).to(input.dtype)


def _instance_norm(input: Tensor, running_mean: Tensor | None = None, running_var: Tensor | None = None,
                   weight: Tensor | None = None, bias: Tensor | None = None, use_input_stats: bool = True,
                   momentum: float = 0.1, eps: float = 1e-5) -> Tensor:
    if not use_input_stats:
        return _batch_norm(input, running_mean, running_var, weight, bias, eps=eps)
    x, dims = _wide(input, weight, bias), list(range(2, input.dim()))
    if running_mean is not None and running_var is not None:
        _update_running(running_mean, x.mean(dims).mean(0), momentum)
        _update_running(running_var, x.var(dims).mean(0), momentum)
    return _affine(_normalized(x, dims, eps), *_per_channel(x, weight, bias)).to(input.dtype)


@torch.no_grad()
def _update_running(running: Tensor, statistic: Tensor, momentum: float) -> None:
    """running ← (1 − momentum) · running + momentum · statistic, in place."""
    running.mul_(1 - momentum).add_(statistic.detach().to(running), alpha=momentum)


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """w = g v / ‖v‖, a norm for each slice along ``dim``, or one of all (-1)."""
    dims, x = [d for d in range(v.dim()) if d != dim], _wide(v, g)
    return (x * (g / torch.linalg.vector_norm(x, dim=dims, keepdim=True) if dims else g / x.abs())).to(v.dtype)


def _per_channel(x: Tensor, *vectors: Tensor | None) -> Any:
    """Vectors of one number a channel, shaped to broadcast along dimension 1 of x."""
    return [None if v is None else v.view(-1, *(1,) * (x.dim() - 2)) for v in vectors]


_COMPOSITE: dict[Any, Any] = {
    F.layer_norm: _layer_norm, F.batch_norm: _batch_norm, F.instance_norm: _instance_norm,
    torch.layer_norm: _layer_norm, torch._weight_norm: _weight_norm}
