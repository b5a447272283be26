"""Over which processes an objective's data and weights are spread, and what they tell each other.

Each rank holds its share of the data. Under DDP it holds all weights too, so its model is evaluated as if it were
alone, past the wrapper, and sums are reduced by hand: ``autograd.grad`` never meets DDP's reducer. Under FSDP2 the
hooks of ``fully_shard`` gather the weights and reduce the gradients, which ties the ranks together pass by pass.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from . import vectors


class Ranks:
    """The processes that share the data of a model: those of its DDP or FSDP2 wrappers, or none."""

    def __init__(self, model: nn.Module):
        dist = sys.modules.get("torch.distributed")
        running = dist is not None and dist.is_available() and dist.is_initialized()
        modules = list(model.modules()) if running else []
        sharding = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
        self.model = model
        self.ddp: list[Any] = [m for m in modules if isinstance(m, nn.parallel.DistributedDataParallel)]
        self.fsdp: list[Any] = [m for m in modules if sharding is not None and isinstance(m, sharding)]
        self._sharded = [g for m in self.fsdp for g in _parameter_groups(m)]
        self._groups = self._distinct(dist)
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if self._groups and dist else (0, 1)
        sizes = {_size(g.mesh_info) for g in self._sharded}
        if len(sizes) > 1 or (self.ddp and self.fsdp):
            raise ValueError("parts of this model are spread over different sets of ranks (DDP beside FSDP2, or meshes "
                             "of unequal size): measure the parts, or gather the model first")
        self._size = next(iter(sizes), 1)

    def __bool__(self) -> bool:
        return bool(self._groups)

    def _distinct(self, dist: Any) -> list[Any]:
        groups = [m.process_group for m in self.ddp]
        for g in self._sharded:
            groups += [getattr(g.mesh_info, f"{kind}_process_group", None) for kind in ("shard", "replicate")]
        return list({tuple(dist.get_process_group_ranks(g)): g for g in groups if g is not None}.values())

    @property
    def in_step(self) -> bool:
        """Whether all ranks must run the model equally often: under FSDP2."""
        return bool(self.fsdp)

    def sum_(self, t: Tensor) -> Tensor:
        """t ← Σ t over the ranks, in place; equal on all of them."""
        for group in self._groups:
            torch.distributed.all_reduce(t, group=group)
        return t

    def total(self, *numbers: float) -> list[float]:
        """Sums over the ranks."""
        return self.sum_(torch.tensor(numbers, dtype=torch.float64, device=self._device())).tolist() \
            if self._groups else list(numbers)

    def least(self, number: int) -> int:
        """The smallest over the ranks: what all of them can agree on."""
        t = torch.tensor(number, device=self._device())
        for group in self._groups:
            torch.distributed.all_reduce(t, torch.distributed.ReduceOp.MIN, group=group)
        return int(t)

    def _device(self) -> torch.device:
        return next((vectors.local(p.detach()).device for p in self.model.parameters()), torch.device("cpu"))

    def reshard(self) -> None:
        """Drop gathered copies of the weights, so that parameters are shards and the next pass reads them anew."""
        for module in self.fsdp:
            module.reshard()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Inside, the model is only evaluated: DDP wrappers are passed by, with rank 0's buffers where they sync."""
        with ExitStack() as stack:
            for module in self.ddp:
                if module.broadcast_buffers and module.will_sync_module_buffers():
                    _broadcast(list(module.module.buffers()), module.process_group)
                stack.enter_context(_passed_by(module))
            stack.callback(self.reshard)
            self.reshard()
            yield

    @torch.enable_grad()
    def backward(self, loss: Tensor, w: Sequence[nn.Parameter]) -> list[Tensor]:
        """Local shards of ∂(Σ over ranks of loss)/∂w through the hooks of FSDP2; every ``p.grad`` stays as it was."""
        with ExitStack() as stack:
            stack.enter_context(self._reducing())
            for p in w:
                stack.enter_context(_own_gradient(p))
            if loss.requires_grad:
                (loss * self._size).backward()
            self.reshard()
            out = []
            for p in w:
                g, p.grad = p.grad, None
                like = vectors.local(p.detach())
                row = torch.zeros_like(like) if g is None else vectors.local(vectors.matched(g, p)).detach()
                if not vectors.is_sharded(p) and self._size > 1:
                    row = self.sum_(row.clone()).div_(self._size)     # fully_shard was told to ignore it
                out.append(row.to(like.dtype))
        return out

    @contextmanager
    def _reducing(self) -> Iterator[None]:
        """FSDP2 averages gradients over all ranks inside, whatever the user has set."""
        names = ("reduce_grads", "all_reduce_grads", "gradient_divide_factor")
        before = [[getattr(g, name, None) for name in names] for g in self._sharded]
        try:
            for g in self._sharded:
                g.reduce_grads, g.all_reduce_grads, g.gradient_divide_factor = True, True, None
            yield
        finally:
            for g, values in zip(self._sharded, before, strict=True):
                for name, value in zip(names, values, strict=True):
                    setattr(g, name, value)


@contextmanager
def _passed_by(module: Any) -> Iterator[None]:
    """Calls of a DDP module go straight to the module inside."""
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
    source = torch.distributed.get_global_rank(group, 0)
    for buffer in buffers:
        plain = buffer.to(torch.uint8) if buffer.dtype == torch.bool else buffer
        torch.distributed.broadcast(plain, source, group=group)
        if plain is not buffer:
            buffer.copy_(plain)


def _parameter_groups(module: Any) -> list[Any]:
    """FSDP2's parameter groups of one wrapped module; torch has no public name for them."""
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    groups = [getattr(state, "_fsdp_param_group", None)] if groups is None else groups
    return [g for g in groups if g is not None]


def _size(mesh: Any) -> int:
    """How many ranks FSDP2 averages a gradient over."""
    return (getattr(mesh, "shard_mesh_size", None) or 1) * (getattr(mesh, "replicate_mesh_size", None) or 1)
