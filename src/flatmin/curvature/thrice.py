"""Normalization from primitives, for losses that differentiate inside, such as gradient penalties.

Their Hessian needs third derivatives of the layers, and of these torch's own layer norm, and batch and instance norm
over the batch's statistics, return wrong ones in silence (pytorch/pytorch#175754, #186256): what they save of the mean
and the variance knows nothing of the input.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class Thrice(TorchFunctionMode):
    """Inside, normalization can be differentiated any number of times."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _LAYERS.get(func, func)(*args, **(kwargs or {}))


def _normalized(x: Tensor, dims: list[int], eps: float) -> Tensor:
    centered = x - x.mean(dims, keepdim=True)
    return centered * torch.rsqrt(centered.square().mean(dims, keepdim=True) + eps)


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def _layer_norm(input: Tensor, normalized_shape: Any, weight: Tensor | None = None, bias: Tensor | None = None,
                eps: float = 1e-5, cudnn_enable: bool = True) -> Tensor:
    return _affine(_normalized(input, list(range(-len(normalized_shape), 0)), eps), weight, bias)


def _batch_norm(input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = None,
                bias: Tensor | None = None, training: bool = False, momentum: float = 0.1, eps: float = 1e-5) -> Tensor:
    """Running statistics stay as they are: an evaluation gives them back in any case."""
    if training or running_mean is None or running_var is None:
        x = _normalized(input, [d for d in range(input.dim()) if d != 1], eps)
    else:
        mean, var = _rows(input, running_mean, running_var)
        x = (input - mean) * torch.rsqrt(var + eps)
    return _affine(x, *_rows(input, weight, bias))


def _instance_norm(input: Tensor, running_mean: Tensor | None = None, running_var: Tensor | None = None,
                   weight: Tensor | None = None, bias: Tensor | None = None, use_input_stats: bool = True,
                   momentum: float = 0.1, eps: float = 1e-5) -> Tensor:
    if not use_input_stats:
        return _batch_norm(input, running_mean, running_var, weight, bias, eps=eps)
    return _affine(_normalized(input, list(range(2, input.dim())), eps), *_rows(input, weight, bias))


def _rows(x: Tensor, *vectors: Tensor | None) -> Any:
    """One number a channel, along dimension 1."""
    return [None if v is None else v.view(-1, *(1,) * (x.dim() - 2)) for v in vectors]


_LAYERS: dict[Any, Any] = {
    F.layer_norm: _layer_norm, F.batch_norm: _batch_norm, F.instance_norm: _instance_norm,
    torch.layer_norm: _layer_norm}
