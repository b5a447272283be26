"""The same forward passes in less time: a grid is thousands of them, alike but for the weights.

A pass through a small network spends as long on fresh memory for its activations (a megabyte each, given back to the
system and zeroed anew for every point) as on arithmetic. Inside ``faster`` the layers of an ``nn.Sequential`` that
takes (samples, features) work on two buffers that stay, bit for bit as before; in float32 on a CPU with AVX-512 they
run through oneDNN, a few hundred samples at a time, which differs by rounding (1e-7) and depends on nothing but the
shapes. Where that is the whole model and the data are in memory, ``values`` also leaves out what an evaluation does
about random numbers and loaders, and takes the first layer's output, which is affine in the coordinates of a plane,
from one product a direction (equal to rounding, and a function of the point alone).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from .. import batches, perturbed
from ..objective import Objective

KNOWN = (nn.Linear, nn.ReLU, nn.Tanh, nn.Sigmoid, nn.GELU, nn.SiLU, nn.ELU, nn.Softplus, nn.Identity, nn.Flatten,
         nn.Dropout, nn.LayerNorm, nn.BatchNorm1d)
"""Modules that keep nothing of what they are given."""

PIECE = 1 << 19
"""Bytes of an activation that stay in cache, and that the C library does not give back to the system."""

HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise") and \
    torch.backends.cpu.get_cpu_capability().startswith("AVX512")
_linear: Any = torch.ops.mkldnn._linear_pointwise if HAS_ONEDNN else None


@contextmanager
def faster(model: nn.Module) -> Iterator[None]:
    """Sequences of known layers reuse the memory of their activations inside; modules are as before afterwards."""
    buffers = _Buffers()
    with ExitStack() as stack:
        for m in model.modules():
            if _eligible(m):
                stack.enter_context(_forward(m, _chain(list(m.children()), buffers)))
        yield


def values(objective: Objective, origin: Sequence[Tensor], directions: Sequence[Sequence[Tensor]]
           ) -> Callable[[Sequence[float]], Tensor]:
    """Coordinates c ↦ ``objective.value()`` with the weights at origin + Σ_k c_k d_k, or an equal that asks less.

    Inside a session and ``faster``, without gradients, and with the weights put there already.
    """
    if not _chain_on_data(objective):
        return lambda coordinates: objective.value()
    terms = list(objective.terms())
    inputs = [t.batch[0] for t in terms]
    firsts = _first_layers(objective, inputs, origin, directions)

    def value(coordinates: Sequence[float]) -> Tensor:
        torch.default_generator.manual_seed(objective.seed)
        outputs = (first(coordinates) for first in firsts) if firsts else map(objective.model, inputs)
        return objective._total((t.loss(z), t.weight) for t, z in zip(terms, outputs, strict=True))

    return value


ROOM = 1 << 28
"""Bytes that first layers may keep."""


def _first_layers(objective: Objective, inputs: Sequence[Tensor], origin: Sequence[Tensor],
                  directions: Sequence[Sequence[Tensor]]) -> list[_First]:
    """One a batch, or none where the model does not begin with a linear layer that moves, or they take too much."""
    layers = list(objective.model.children())
    while layers and type(layers[0]) in (nn.Flatten, nn.Identity):
        inputs, layers = [layers[0](x) for x in inputs], layers[1:]
    where = {id(p): i for i, p in enumerate(objective.parameters)}
    first = layers[0] if layers else None
    if type(first) is not nn.Linear or id(first.weight) not in where or not directions or \
            first.weight.dtype in perturbed.HALF or \
            not all(_plain(x, first) for x in inputs) or \
            (4 + len(directions)) * first.out_features * sum(map(len, inputs)) * first.weight.element_size() > ROOM:
        return []

    def at(w: Sequence[Tensor], moved: bool) -> tuple[Tensor, Tensor | None]:
        bias = first.bias if first.bias is None else w[where[id(first.bias)]] if id(first.bias) in where else \
            None if moved else first.bias.detach()
        return w[where[id(first.weight)]], bias

    rest = _chain(layers[1:], _Buffers(), owned=True)
    return [_First(x, at(origin, False), [at(d, True) for d in directions], rest) for x in inputs]


class _First:
    """A chain from its first layer on, whose output is affine in the coordinates: X Wᵀ + b + Σ_k c_k (X D_kᵀ + b_k)."""

    def __init__(self, x: Tensor, origin: tuple[Tensor, Tensor | None],
                 directions: Sequence[tuple[Tensor, Tensor | None]], rest: Callable[[Any], Any]):
        self.origin = nn.functional.linear(x, *origin)
        self.steps = [nn.functional.linear(x, *d) for d in directions]
        self.rest, self.row = rest, (0.0,) * (len(directions) - 1)
        self.start, self.out = self.origin.clone(), torch.empty_like(self.origin)

    def __call__(self, coordinates: Sequence[float]) -> Any:
        before = tuple(coordinates[:-1])
        if before != self.row:      # the points of a row of the grid share it
            self.start.copy_(self.origin)
            for c, step in zip(before, self.steps, strict=False):
                self.start.add_(step, alpha=c)
            self.row = before
        torch.add(self.start, self.steps[-1], alpha=coordinates[-1], out=self.out)
        return self.rest(self.out)


def _chain_on_data(objective: Objective) -> bool:
    """Whether the model is one sequence of known layers, none of which draws, and its batches lie where it does."""
    model, data = objective.model, objective.data
    return isinstance(model, nn.Sequential) and "forward" in vars(model) and objective.device.type == "cpu" and \
        objective._forward is None and isinstance(data, (list, batches.Single)) and \
        all(isinstance(b, (tuple, list)) and all(isinstance(t, Tensor) for t in b) for b in data) and \
        not any(isinstance(m, nn.Dropout) and m.training for m in model)


class _Buffers:
    """Two pieces of memory a dtype and device, as large as the largest activation seen."""

    def __init__(self) -> None:
        self._memory: dict[tuple[torch.dtype, torch.device, int], Tensor] = {}

    def take(self, shape: tuple[int, int], like: Tensor, which: int) -> Tensor:
        key, n = (like.dtype, like.device, which), shape[0] * shape[1]
        memory = self._memory.get(key)
        if memory is None or memory.numel() < n:
            memory = self._memory[key] = torch.empty(n, dtype=like.dtype, device=like.device)
        return memory[:n].view(shape)

    def holds(self, h: Tensor, which: int) -> bool:
        """Whether h is a view of a buffer."""
        memory = self._memory.get((h.dtype, h.device, which))
        return memory is not None and h.untyped_storage().data_ptr() == memory.untyped_storage().data_ptr()


def _chain(layers: Sequence[nn.Module], buffers: _Buffers, owned: bool = False) -> Callable[[Any], Any]:
    """The layers one after the other; ``owned``: the first may overwrite what it is given."""
    def forward(h: Any) -> Any:
        held, i = -1, 0   # which of the two buffers h lies in; -1: neither
        while i < len(layers):
            layer, last = layers[i], i == len(layers) - 1
            if type(layer) is nn.Linear and _plain(h, layer) and _onednn(h):
                fused = not last and type(layers[i + 1]) is nn.ReLU
                h, held = _linear(h, layer.weight, layer.bias, "relu" if fused else "none", [], ""), -1
                i += fused
            elif type(layer) is nn.Linear and not last and _plain(h, layer):
                held = 1 if held == 0 else 0
                out = buffers.take((h.shape[0], layer.out_features), h, held)
                h = torch.mm(h, layer.weight.t(), out=out) if layer.bias is None else \
                    torch.addmm(layer.bias, h, layer.weight.t(), out=out)
            elif type(layer) is nn.ReLU and (held >= 0 or owned and i == 0):
                h = h.relu_()
            else:
                h = layer(h)
                held = held if held >= 0 and buffers.holds(h, held) else -1
            i += 1
        return h.clone() if held >= 0 else h

    widest = max((m.out_features for m in layers if type(m) is nn.Linear), default=0)
    by_row = widest > 0 and not any(type(m) in (nn.BatchNorm1d, nn.Dropout) for m in layers)

    def in_pieces(h: Any) -> Any:
        rows = max(64, PIECE // (4 * widest)) if by_row else 0
        if not rows or type(h) is not Tensor or h.dim() != 2 or len(h) <= rows or not _onednn(h):
            return forward(h)
        return torch.cat([forward(piece) for piece in h.split(rows)])

    return in_pieces


def _plain(h: Any, layer: nn.Linear) -> bool:
    """Whether a layer is one matrix product of ordinary tensors."""
    return type(h) is Tensor and h.dim() == 2 and h.dtype == layer.weight.dtype and h.device == layer.weight.device \
        and type(layer.weight) is nn.Parameter and not torch.is_grad_enabled() \
        and not torch.is_autocast_enabled(h.device.type)


def _onednn(h: Tensor) -> bool:
    """Whether to let oneDNN multiply: in float32 as exact as MKL, and with AMD's AVX-512, which MKL leaves unused, more
    than twice as fast. Without AVX-512, MKL on the buffers is faster by a tenth."""
    return h.dtype == torch.float32 and h.device.type == "cpu" and h.shape[0] > 0 and HAS_ONEDNN


def _eligible(m: nn.Module) -> bool:
    return type(m) is nn.Sequential and len(m) > 1 and not _hooked(m) and "forward" not in vars(m) and \
        all(type(c) in KNOWN and not _hooked(c) and "forward" not in vars(c) for c in m.children())


def _hooked(m: nn.Module) -> bool:
    return bool(m._forward_hooks or m._forward_pre_hooks or torch_module._global_forward_hooks
                or torch_module._global_forward_pre_hooks)


@contextmanager
def _forward(m: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    vars(m)["forward"] = forward
    try:
        yield
    finally:
        vars(m).pop("forward", None)
