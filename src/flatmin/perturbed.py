"""Change weights, buffers, random state or mode, and always give them back.

Weights are given back by an in-place copy of what they were, never by subtraction (inexact) and never by rebinding
``p.data`` (which leaves a sharded parameter where it is). The one exception is :class:`Float32Displacement`, whose
originals are never written at all.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from . import parallel, vectors

READABLE = ("cpu",)
"""Devices on which reading a number to the host waits for nothing."""


class Spare:
    """Memory for a copy of many small tensors, kept from step to step: new pages cost more than the copying."""

    def __init__(self) -> None:
        self._kept: list[Tensor] = []
        self._layout: tuple[list[torch.Size], list[torch.dtype]] = [], []

    def take(self, like: Sequence[Tensor]) -> list[Tensor]:
        """Tensors of the same shapes and dtypes, unwritten; nobody else gets them before they are put back."""
        layout = [t.shape for t in like], [t.dtype for t in like]
        out, self._kept = self._kept, []
        if not out or layout != self._layout:
            out, self._layout = [torch.empty_like(t) for t in like], layout
        return out

    def put_back(self, tensors: list[Tensor]) -> None:
        self._kept = tensors


class Displacement:
    """Weights moved by ε = scale · d, and back, bit for bit.

    With ``own=True`` the memory of ``d`` is taken over to hold the copy of w: no allocation beyond one block of
    scratch, and four memory streams (read w and d, write both). Otherwise one copy is allocated; with ``offload``, in
    the host's memory. ``spare`` holds the copy of one block of small tensors instead, and outlives the displacement.
    """

    mode: AbstractContextManager[Any] = nullcontext()  # for passes at w + ε

    def __init__(self, offload: bool = False, spare: Spare | None = None) -> None:
        self._offload, self._spare = offload, spare
        self._lent: list[Tensor] = []  # from ``spare``
        self._copies: list[tuple[list[Tensor], list[Tensor]]] = []
        self.realised: list[Tensor] = []

    def move(self, w: Sequence[Tensor], d: Sequence[Tensor], scale: Tensor, *, own: bool = True,
             finite: bool = False) -> None:
        """w ← w + scale · d. ``finite`` replaces inf and NaN in the step by zero (an overflow to be skipped later)."""
        if self._offload:
            copies = [torch.empty_like(t, device="cpu", pin_memory=t.is_cuda) for t in w]
        elif not own:
            copies = [torch.empty_like(t) for t in w]
        else:
            copies = self._borrowed(w) or d
        scratch = vectors.Scratch()
        for ws, ds, cs in vectors.blocks(w, d, copies):
            half = ws[0].dtype in vectors.HALF
            if len(ws) > 1 and not half and ws[0].device.type in READABLE:
                self._move_small(ws, ds, cs, float(scale))
                continue
            step = scratch.scaled([t.float() for t in ds] if half else ds, scale.to(ws[0].device), finite)
            torch._foreach_copy_(cs, ws)
            self._copies.append((ws, cs))
            torch._foreach_add_(ws, step)
            if half:
                self.realised.append(realised_step(ws, cs, step))

    def _move_small(self, w: list[Tensor], d: list[Tensor], copies: list[Tensor], scale: float) -> None:
        """Many small tensors in few calls; a step of length 0 (an overflow, among others) is not taken."""
        if scale == 0:
            return
        moved = torch._foreach_add(w, d, alpha=scale) if copies[0] is d[0] else None  # before d is overwritten
        torch._foreach_copy_(copies, w)
        self._copies.append((w, copies))
        if moved is None:
            torch._foreach_add_(w, d, alpha=scale)
        else:
            torch._foreach_copy_(w, list(moved))

    def _borrowed(self, w: Sequence[Tensor]) -> list[Tensor]:
        """Spare memory for a copy of one block of small tensors on the CPU; nothing for other weights."""
        if self._spare is None or len(w) < 2 or w[0].device.type not in READABLE or (
                sum(map(Tensor.numel, w)) > vectors.BLOCK):
            return []
        self._lent = self._spare.take(w)
        return self._lent

    @torch.no_grad()
    def restore(self) -> None:
        """Give the weights back, the last move first; may be called again after a Ctrl-C in the middle."""
        for ws, cs in reversed(self._copies):
            torch._foreach_copy_(ws, cs)
        self._copies = []
        if self._spare is not None and self._lent:
            self._spare.put_back(self._lent)
            self._lent = []


def realised_step(w: Sequence[Tensor], old: Sequence[Tensor], step: Sequence[Tensor]) -> Tensor:
    """Squared length of what was asked for, of what was done, and their inner product, as one 3-vector."""
    done = [a.float() - b.float() for a, b in zip(w, old, strict=True)]
    return torch.stack([vectors.dots(step, step).sum(), vectors.dots(done, done).sum(), vectors.dots(step, done).sum()])


class Float32Displacement:
    """As :class:`Displacement`, but half-precision weights are replaced by float32 tensors w + ε; w is never written.

    Between w and w + ε there is often no bfloat16 number at all, so the step cannot be taken in the weights' own
    precision. Inside ``mode``, operations that mix half and single precision run in single precision; what runs inside
    ``backward`` is not reached. Weights of other precisions, and of a second half precision, are moved in place.
    """

    def __init__(self, offload: bool = False, spare: Spare | None = None) -> None:
        self._others = Displacement(offload, spare)
        self._replaced: list[tuple[nn.Parameter, Tensor]] = []

    @property
    def realised(self) -> list[Tensor]:
        return self._others.realised

    @property
    def mode(self) -> AbstractContextManager[Any]:
        """The context for passes at w + ε."""
        return _MixedDtypePromotion(self._replaced[0][1].dtype) if self._replaced else nullcontext()

    def move(self, w: Sequence[Tensor], d: Sequence[Tensor], scale: Tensor, *, own: bool = True,
             finite: bool = False) -> None:
        """w ← w + scale · d, for parameters of one dtype and device."""
        dtype = w[0].dtype
        if dtype not in vectors.HALF or (self._replaced and self._replaced[0][1].dtype != dtype):
            self._others.move(w, d, scale, own=own, finite=finite)
            return
        for p, step in zip(w, d, strict=True):
            assert isinstance(p, nn.Parameter)
            wide = step.float().mul_(scale.to(step.device))
            if finite:
                wide.nan_to_num_(0.0, 0.0, 0.0)
            p.grad = None
            self._replaced.append((p, p.data))
            p.data = wide.add_(p.data)

    def restore(self) -> None:
        """Give the weights back; may be called again after a Ctrl-C in the middle."""
        self._others.restore()
        for p, w in self._replaced:
            if p.data.dtype == w.dtype:
                continue
            gradient, p.grad = p.grad, None
            p.data = w
            if gradient is not None:
                p.grad = gradient.to(w.dtype)
        self._replaced = []


_LIKE_SELF = {"index_add_", "index_copy_", "index_put_", "scatter_", "scatter_add_", "masked_scatter_", "addmm_",
              "addmv_", "baddbmm_", "lerp_"}
"""In-place operations that take no other dtype than that of the tensor they write to."""


class _MixedDtypePromotion(TorchFunctionMode):
    """Run operations on mixed half and single precision tensors in single precision; results go back to half."""

    def __init__(self, half: torch.dtype):
        super().__init__()
        self.half = half

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _LIKE_SELF:
            args, kwargs = tree_map(lambda t: _cast(_cast(t, self.half, args[0].dtype), torch.float32, args[0].dtype),
                                    (args, kwargs))
        if name.endswith("_") or name in ("backward", "to", "type_as", "view_as", "expand_as"):
            return func(*args, **kwargs)
        kinds = {t.dtype for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.is_floating_point()}
        if torch.float32 not in kinds or self.half not in kinds:
            return func(*args, **kwargs)
        wide: list[tuple[Tensor, Tensor]] = []

        def float32_weights(t: Any) -> Any:
            out = _cast(t, self.half, torch.float32)
            if out is not t and not t.requires_grad:
                wide.append((t, out))
            return out

        args, kwargs = tree_map(float32_weights, (args, kwargs))
        result = func(*args, **kwargs)
        if name in ("batch_norm", "instance_norm"):     # running statistics are written in place
            for own, copy in wide:
                own.copy_(copy)
        return tree_map(lambda t: _cast(t, torch.float32, self.half), result)


def _cast(value: Any, source: torch.dtype, target: torch.dtype) -> Any:
    return value.to(target) if isinstance(value, Tensor) and value.dtype == source else value


def buffer_registries(module: nn.Module | None) -> list[dict[str, Any]]:
    """The places where a module and its submodules keep their buffers."""
    return [m._buffers for m in module.modules() if m._buffers] if module is not None else []


_LARGE = 1 << 16


def buffer_versions(registries: list[dict[str, Any]]) -> dict[int, int]:
    """How often each buffer has been written to in place, by identity."""
    return {id(b): -1 if b.is_inference() else b._version
            for registry in registries for b in registry.values() if b is not None}


class Buffers:
    """The buffers of a module as they are (BatchNorm statistics of any kind, counters, ...); ``restore`` goes back.

    ``versions`` are those before an earlier pass of the same step: a buffer of more than 65 536 numbers that it has not
    written to is not copied, since the next pass will leave it alone too. Torch counts no write through ``.data``, so
    such a write to so large a buffer keeps the value of the last pass: write under ``torch.no_grad()`` instead.
    Measurements (no ``versions``) copy every buffer.
    """

    def __init__(self, registries: list[dict[str, Any]], versions: dict[int, int] | None = None):
        self._owned = [(registry, name, b) for registry in registries for name, b in registry.items() if b is not None]
        self._seen = {id(b): b for _, _, b in self._owned}
        now, before = buffer_versions(registries), versions or {}
        self._same = {key: now[key] for key, b in self._seen.items()
                      if b.numel() > _LARGE and now[key] >= 0 and before.get(key) == now[key]}
        self._copies = {key: b.detach().clone() for key, b in self._seen.items() if key not in self._same}

    @torch.no_grad()
    def restore(self) -> None:
        for registry, name, buffer in self._owned:
            registry[name] = buffer
        for key, buffer in self._seen.items():
            if key in self._copies:
                parallel.local(buffer).copy_(parallel.local(self._copies[key]))
            elif buffer._version != self._same[key]:
                warnings.warn("a buffer that the pass at w left alone was written in the pass at w + ε and keeps that "
                              "value", stacklevel=2)


@contextmanager
def undone(undo: Callable[[], None], only_on_error: bool = False) -> Iterator[None]:
    """``undo()`` at the end, whatever happens: once more if a Ctrl-C arrives while it runs, so it must bear that."""
    try:
        yield
        if not only_on_error:
            undo()
    except BaseException:
        undo()
        raise


@contextmanager
def unchanged_buffers(module: nn.Module | None) -> Iterator[None]:
    """Every buffer of a module is bitwise the same afterwards."""
    buffers = Buffers(buffer_registries(module))
    try:
        yield
    finally:
        buffers.restore()


class RandomState:
    """The state of torch's generators on the CPU and on the devices given; ``set`` goes back to it."""

    def __init__(self, devices: Sequence[torch.device] = ()):
        self._cpu = torch.get_rng_state()
        self._devices = [(d, _backend(d).get_rng_state(d)) for d in devices if d.type not in ("cpu", "meta")]

    def set(self) -> None:
        torch.set_rng_state(self._cpu)
        for device, state in self._devices:
            _backend(device).set_rng_state(state, device)


def _backend(device: torch.device) -> Any:
    return getattr(torch, device.type)


@contextmanager
def unchanged_random_state(devices: Sequence[torch.device] = ()) -> Iterator[None]:
    """Draws made inside leave torch's generators as they were."""
    state = RandomState(devices)
    try:
        yield
    finally:
        state.set()


@contextmanager
def without_hooks(*tensors: Tensor) -> Iterator[None]:
    """Inside, hooks on tensors do not run, so that gradients are those of the loss."""
    kept = [(hooks, dict(hooks)) for t in tensors if (hooks := t._backward_hooks)]
    for hooks, _ in kept:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, own in kept:
            hooks.update(own)


@contextmanager
def module_mode(module: nn.Module, training: bool) -> Iterator[None]:
    """``module.train(training)`` inside; afterwards every submodule's own flag is back."""
    flags = [(m, m.training) for m in module.modules()]
    module.train(training)
    try:
        yield
    finally:
        for m, flag in flags:
            m.training = flag


@contextmanager
def displaced(parameters: Sequence[Tensor], direction: Sequence[Tensor],
              scale: float | Tensor = 1.0) -> Iterator[Displacement]:
    """Weights stand at w + scale · direction inside and are given back bit for bit; ``direction`` is not changed."""
    w = [parallel.local(p.detach()) for p in parameters]
    d = [parallel.local(t) for t in direction]
    displacement = Displacement()
    try:
        with torch.no_grad():
            displacement.move(w, d, torch.as_tensor(scale), own=False)
        yield displacement
    finally:
        displacement.restore()
