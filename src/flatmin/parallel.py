"""Everything about several processes: sharded tensors, DDP, FSDP2, process groups, and torch's private names for them.

First single tensors (``DTensor``), then models. A measurement (``Ranks``) and a training step (``Wrappers``) treat the
same modules differently: the first evaluates past DDP's reducer, the second runs through it.

Under DDP each rank holds all weights, so a measurement evaluates the model inside the wrapper and reduces sums itself.
Under FSDP2 the hooks of ``fully_shard`` gather the weights and reduce the gradients: all ranks run equally many passes.
The distributed package is imported by functions that run only where the process has set it up.
"""

from __future__ import annotations

import datetime
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, cast

import torch
from torch import Tensor, nn


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a ``DTensor`` (asked without importing the distributed package)."""
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "placements")


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that lives on this rank, sharing its memory; plain tensors are returned as they are."""
    return cast(Any, tensor)._local_tensor if is_sharded(tensor) else tensor


def like(value: Tensor, tensor: Tensor) -> Tensor:
    """A local part ``value`` with the sharding of ``tensor``."""
    if not is_sharded(tensor):
        return value
    from torch.distributed.tensor import DTensor

    spec = cast(Any, tensor)
    return DTensor.from_local(value, spec.device_mesh, spec.placements, run_check=False, shape=tensor.shape,
                              stride=tensor.stride())


def matched(gradient: Tensor, parameter: Tensor) -> Tensor:
    """A gradient with the placements of its parameter: pending sums are carried out."""
    if is_sharded(gradient) and tuple(cast(Any, gradient).placements) != tuple(cast(Any, parameter).placements):
        return cast(Any, gradient).redistribute(placements=cast(Any, parameter).placements)
    return gradient


def full(tensor: Tensor) -> Tensor:
    """The whole tensor, gathered from all ranks if it is sharded."""
    return cast(Any, tensor).full_tensor() if is_sharded(tensor) else tensor


def shard_of(whole: Tensor, parameter: Tensor) -> Tensor:
    """What this rank holds of a whole tensor that is sharded like ``parameter``, sharing its memory."""
    if not is_sharded(parameter) or is_sharded(whole):
        return local(whole)
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    spec = cast(Any, parameter)
    size, offset = compute_local_shape_and_global_offset(parameter.shape, spec.device_mesh, spec.placements)
    for dim, (start, length) in enumerate(zip(offset, size, strict=True)):
        whole = whole.narrow(dim, min(start, whole.shape[dim]), length)
    return whole


def shard_groups(parameter: Tensor) -> tuple[Any, ...]:
    """The process groups over which a parameter's coordinates are spread; none where it is whole."""
    if not is_sharded(parameter):
        return ()
    spec = cast(Any, parameter)
    mesh = spec.device_mesh
    return tuple(mesh.get_group(dim) for dim, placement in enumerate(spec.placements)
                 if placement.is_shard() and mesh.size(dim) > 1)


def all_reduce(t: Tensor, groups: Iterable[Any], op: str = "sum") -> Tensor:
    """t ← Σ t ("sum"), the largest ("max") or the smallest ("min") over process groups, in place; returns t."""
    for group in groups:
        dist = torch.distributed
        kind = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}[op]
        dist.all_reduce(t, kind, group=group)
    return t


def in_bucket(gradient: Tensor) -> bool:
    """Whether a gradient is a view of a DDP bucket, into which the next backward pass writes.

    Asked of the gradient itself: with ``gradient_as_bucket_view=True`` a wrapper may wrap a model, or
    parameters, that were passed without it.
    """
    return gradient._is_view() and not is_sharded(gradient)


_INSIDE = {"DistributedDataParallel": "module", "DataParallel": "module", "OptimizedModule": "_orig_mod",
           "ActivationWrapper": "_checkpoint_wrapped_module", "_FabricModule": "_forward_module"}


def wrapped_name(module: nn.Module) -> str | None:
    """The attribute under which a wrapper of torch or Lightning Fabric holds its module; None for other modules."""
    kinds = (kind for kind in type(module).__mro__ if kind.__module__.startswith(("torch.", "lightning")))
    return next((_INSIDE[kind.__name__] for kind in kinds if kind.__name__ in _INSIDE), None)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside compiled and data-parallel wrappers."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and type(model).__name__ in ("DistributedDataParallel", "DataParallel"):
            inner = getattr(model, "module", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


class DataParallelModules:
    """The data-parallel modules that a model is or contains: ``ddp``, ``fsdp`` (FSDP2), and FSDP2's parameter groups.

    Raises:
        ValueError: for FSDP1.
    """

    def __init__(self, model: nn.Module | None):
        modules = list(model.modules()) if model is not None else []
        sharding = sys.modules.get("torch.distributed.fsdp")
        if any(isinstance(m, getattr(sharding, "FullyShardedDataParallel", ())) for m in modules):
            raise ValueError("this model is wrapped by FullyShardedDataParallel (FSDP1), which gives every rank a flat "
                             "shard whose norm is not the gradient's: use torch.distributed.fsdp.fully_shard (FSDP2)")
        self.ddp: list[Any] = [m for m in modules if isinstance(m, nn.parallel.DistributedDataParallel)]
        self.fsdp: list[Any] = [m for m in modules if isinstance(m, getattr(sharding, "FSDPModule", ()))]
        self.parameter_groups = [group for m in self.fsdp for group in _parameter_groups(m)]

    def reshard(self) -> None:
        """Drop gathered copies of the weights, so that parameters are shards and the next pass reads them anew."""
        for module in self.fsdp:
            module.reshard()


def _parameter_groups(module: Any) -> list[Any]:
    """FSDP2's parameter groups of one wrapped module; torch has no public name for them."""
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    groups = [getattr(state, "_fsdp_param_group", None)] if groups is None else groups
    return [g for g in groups if g is not None]


class Ranks:
    """The processes that share the data of a model: those of its DDP or FSDP2 wrappers, or none."""

    def __init__(self, model: nn.Module):
        dist = sys.modules.get("torch.distributed")
        running = dist is not None and dist.is_available() and dist.is_initialized()
        self.model = model
        self._modules = DataParallelModules(model if running else None)
        self._groups = self._distinct(dist)
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if self._groups and dist else (0, 1)
        sizes = {_size(g.mesh_info) for g in self._modules.parameter_groups}
        if len(sizes) > 1 or (self._modules.ddp and self._modules.fsdp):
            raise ValueError("parts of this model are spread over different sets of ranks (DDP beside FSDP2, or meshes "
                             "of unequal size): measure the parts, or gather the model first")
        self._size = next(iter(sizes), 1)

    def __bool__(self) -> bool:
        return bool(self._groups)

    def _distinct(self, dist: Any) -> list[Any]:
        groups = [m.process_group for m in self._modules.ddp]
        for g in self._modules.parameter_groups:
            groups += [getattr(g.mesh_info, f"{kind}_process_group", None) for kind in ("shard", "replicate")]
        return list({tuple(dist.get_process_group_ranks(g)): g for g in groups if g is not None}.values())

    @property
    def in_step(self) -> bool:
        """Whether all ranks must run the model equally often: under FSDP2."""
        return bool(self._modules.fsdp)

    def sum_(self, t: Tensor) -> Tensor:
        """t ← Σ t over the ranks, in place; equal on all of them."""
        return all_reduce(t, self._groups)

    def total(self, *numbers: float) -> list[float]:
        """Sums over the ranks."""
        return self.sum_(torch.tensor(numbers, dtype=torch.float64, device=self._device())).tolist() \
            if self._groups else list(numbers)

    def min_over_ranks(self, number: int) -> int:
        """The smallest ``number`` over the ranks."""
        return int(all_reduce(torch.tensor(number, device=self._device()), self._groups, "min"))

    def _device(self) -> torch.device:
        return next((local(p.detach()).device for p in self.model.parameters()), torch.device("cpu"))

    def reshard(self) -> None:
        """Drop gathered copies of the weights, so that parameters are shards and the next pass reads them anew."""
        self._modules.reshard()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Inside, calls of DDP modules go to the module inside, with rank 0's buffers where DDP synchronises them."""
        with ExitStack() as stack:
            for module in self._modules.ddp:
                if module.broadcast_buffers and module.will_sync_module_buffers():
                    _broadcast(list(module.module.buffers()), module.process_group)
                stack.enter_context(_without_reducer(module))
            stack.callback(self.reshard)
            self.reshard()
            yield

    @torch.enable_grad()
    def backward(self, loss: Tensor, w: Sequence[nn.Parameter]) -> list[Tensor]:
        """Local shards of ∂(Σ over ranks of loss)/∂w through the hooks of FSDP2; every ``p.grad`` stays as it was."""
        with ExitStack() as stack:
            stack.enter_context(self._averaging())
            for p in w:
                stack.enter_context(_own_gradient(p))
            if loss.requires_grad:
                (loss * self._size).backward()
            self.reshard()
            out = []
            for p in w:
                g, p.grad = p.grad, None
                shard = local(p.detach())
                found = torch.zeros_like(shard) if g is None else local(matched(g, p)).detach()
                if not is_sharded(p) and self._size > 1:
                    found = self.sum_(found.clone()).div_(self._size)     # fully_shard was told to ignore it
                out.append(found.to(shard.dtype))
        return out

    @contextmanager
    def _averaging(self) -> Iterator[None]:
        """FSDP2 averages gradients over all ranks inside, whatever the user has set."""
        names = ("reduce_grads", "all_reduce_grads", "gradient_divide_factor")
        groups = self._modules.parameter_groups
        before = [[getattr(g, name, None) for name in names] for g in groups]
        try:
            for g in groups:
                g.reduce_grads, g.all_reduce_grads, g.gradient_divide_factor = True, True, None
            yield
        finally:
            for g, values in zip(groups, before, strict=True):
                for name, value in zip(names, values, strict=True):
                    setattr(g, name, value)


@contextmanager
def _without_reducer(module: Any) -> Iterator[None]:
    """Inside, calls of a DDP module go straight to the module it wraps."""
    own = module.__dict__.get("forward")
    module.forward = lambda *args, **kwargs: module.module(*args, **kwargs)
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


@contextmanager
def _own_gradient(p: nn.Parameter) -> Iterator[None]:
    """Inside, ``p.grad`` is None and the user's hooks on it do not run (one may be an optimizer)."""
    before, hooks = p.grad, p._post_accumulate_grad_hooks  # type: ignore[attr-defined]
    kept = dict(hooks) if hooks else {}
    p.grad = None
    if hooks:
        hooks.clear()
    try:
        yield
    finally:
        p.grad = before
        if hooks is not None:
            hooks.update(kept)


def _broadcast(buffers: list[Tensor], group: Any) -> None:
    """Buffers ← those of the first rank of a group."""
    source = torch.distributed.get_global_rank(group, 0)
    for buffer in buffers:
        plain = buffer.to(torch.uint8) if buffer.dtype == torch.bool else buffer    # gloo has no booleans
        torch.distributed.broadcast(plain, source, group=group)
        if plain is not buffer:
            buffer.copy_(plain)


def _size(mesh: Any) -> int:
    """How many ranks FSDP2 averages a gradient over."""
    return (getattr(mesh, "shard_mesh_size", None) or 1) * (getattr(mesh, "replicate_mesh_size", None) or 1)


class Wrappers:
    """The data-parallel modules of a model in training: when they synchronise gradients, and over which ranks."""

    def __init__(self, model: nn.Module | None):
        self._modules = DataParallelModules(model)
        self.ddp, self.fsdp = self._modules.ddp, self._modules.fsdp
        self._replicated = [g for g in self._modules.parameter_groups if getattr(g, "_is_hsdp", False)]

    @property
    def has_ranks(self) -> bool:
        """Whether ranks hold copies of the weights that could each have an ε of their own."""
        return bool(self.ddp) or bool(self._replicated)

    def refuse_left_out(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        """Raise if a trainable parameter has a gradient that no wrapper averages over the ranks."""
        if not self.ddp and not self.fsdp or torch.distributed.get_world_size() == 1:
            return
        averaged = {id(p) for m in self.ddp for n, p in m.module.named_parameters() if n not in m.parameters_to_ignore}
        for name, p in parameters:
            if p.requires_grad and id(p) not in averaged and not is_sharded(p):
                raise ValueError(
                    f"{name} is trainable but outside the data-parallel wrappers, so that its gradient, the norm and ε "
                    'would differ from rank to rank: wrap the whole model, freeze the parameter, or use scope="rank"')

    def refuse_unsynchronised(self) -> None:
        """Raise if the caller has switched gradient synchronisation off around the call."""
        if any(not m.require_backward_grad_sync for m in self.ddp) or any(
                not g.reduce_grads for g in self._modules.parameter_groups):
            raise RuntimeError(
                "sharpener.backward was called with gradient synchronisation off (inside no_sync, or after "
                "set_requires_gradient_sync(False)), where every rank would choose its own ε without notice. Call it "
                "outside and pass all micro-batches at once, sharpener.backward([first, second, ...]); for one ε per "
                'rank under DistributedDataParallel use scope="rank".'
            )

    @contextmanager
    def unsynchronised(self, last: bool, alone: bool) -> Iterator[None]:
        """Around the forward and backward of a micro-batch (both must be inside, or DDP reduces anyway).

        DDP reduces at the last micro-batch, or with ``alone`` not at all; a mesh then reduces over its shards only.
        """
        meshes = [(g, g.mesh_info) for g in self._replicated] if alone else []
        with ExitStack() as stack:
            if alone or not last:
                for m in self.ddp:
                    stack.enter_context(m.no_sync())
            for group, mesh in meshes:
                group.mesh_info = _shards_only(mesh)
            try:
                yield
            finally:
                for group, mesh in meshes:
                    group.mesh_info = mesh

    def reshard(self) -> None:
        """Drop gathered copies of the weights, so that the next pass reads the sharded ones as they are now."""
        self._modules.reshard()

    def any_rank(self, flag: Tensor) -> Tensor:
        """Whether a 0-d flag is set on any rank."""
        return all_reduce(flag.to(torch.float32), self._groups(), "max") > 0

    def average(self, tensors: list[Tensor]) -> None:
        """Mean over the data-parallel ranks, in place."""
        for group in self._groups():
            for t in tensors:
                all_reduce(t, [group]).div_(torch.distributed.get_world_size(group))

    def _groups(self) -> list[Any]:
        groups = [m.process_group for m in self.ddp] + [g.mesh_info.replicate_process_group for g in self._replicated]
        return list({id(g): g for g in groups}.values())


def _shards_only(mesh: Any) -> Any:
    """A replicate × shard mesh seen as a shard mesh: gradients are then not averaged over the replicas."""
    kind = next(c for c in type(mesh).__mro__ if c.__name__ == "FSDPMeshInfo")
    view = object.__new__(kind)
    view.__dict__.update(mesh.__dict__)
    return view


class Group:
    """The processes of a group, or the one process there is (None): all of them raise where one fails or differs."""

    def __init__(self, group: Any, device: torch.device | None = None):
        self.group, self.rank, self.size, self.device = group, 0, 1, device
        if group is not None:
            self.rank, self.size = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)

    def gather(self, value: Any) -> list[Any]:
        """The value of every rank, in order; waits for all of them."""
        if self.size == 1:
            return [value]
        out = [None] * self.size
        torch.distributed.all_gather_object(out, value, group=self.group)
        return out

    def raise_everywhere(self, error: Exception | None) -> None:
        """Raise on every rank where one of them has an error."""
        others = self.gather(error and repr(error))
        if error is not None:
            raise error
        for rank, other in enumerate(others):
            if other:
                raise RuntimeError(f"rank {rank} failed: {other}")

    def total(self, *numbers: float) -> list[float]:
        """Sums over the ranks, in float64."""
        if self.size == 1:
            return list(numbers)
        t = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(t, group=self.group)
        return t.tolist()

    def largest(self, number: float) -> float:
        """The largest over the ranks."""
        if self.size == 1:
            return number
        t = torch.tensor(number, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(t, torch.distributed.ReduceOp.MAX, group=self.group)
        return float(t)

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Tensors ← those of the first rank, in place."""
        if self.size > 1:
            _broadcast(list(tensors), self.group)

    def wait(self) -> None:
        """Until every rank is here."""
        if self.size > 1:
            torch.distributed.barrier(group=self.group)

    def refuse_different(self, key: str, message: str) -> None:
        """Raise a ValueError on every rank unless all have the same key."""
        if len(set(self.gather(key))) > 1:
            raise ValueError(message)


@contextmanager
def all_processes(device: torch.device) -> Iterator[Group]:
    """The processes that ``torchrun`` started, joined if they are not yet; or this one alone.

    Beside an accelerator's own backend they join gloo, so that small numbers are agreed on without waiting for it.
    """
    distributed, backend = torch.distributed, "gloo"
    started = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not distributed.is_initialized()
    if started:
        if device.type != "cpu":
            backend = f"cpu:gloo,{device.type}:{distributed.get_default_backend_for_device(device)}"
        distributed.init_process_group(backend)
        device = torch.device("cpu")
    try:
        yield Group(distributed.group.WORLD if distributed.is_initialized() else None, device)
    finally:
        if started:
            if backend == "gloo":       # a rank that ends while another reads from it breaks that one's connection
                with suppress(RuntimeError):    # a rank that failed alone does not come
                    distributed.monitored_barrier(timeout=datetime.timedelta(seconds=5))
            distributed.destroy_process_group()
