"""Data-parallel wrappers inside a model: when they synchronise, and over which ranks.

Knows ``DistributedDataParallel`` and FSDP2's ``fully_shard`` by their public methods; imports neither unless the
process has.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..vectors import is_sharded

_INSIDE = {"DistributedDataParallel": "module", "DataParallel": "module", "OptimizedModule": "_orig_mod",
           "ActivationWrapper": "_checkpoint_wrapped_module", "_FabricModule": "_forward_module"}


def wrapped_name(module: nn.Module) -> str | None:
    """The attribute under which a wrapper of torch or Lightning Fabric holds its module; None for other modules."""
    kinds = (kind for kind in type(module).__mro__ if kind.__module__.startswith(("torch.", "lightning")))
    return next((_INSIDE[kind.__name__] for kind in kinds if kind.__name__ in _INSIDE), None)


def in_bucket(gradient: Tensor) -> bool:
    """Whether a gradient is a view of a DDP bucket, into which the next backward pass writes.

    By the gradient itself: with ``gradient_as_bucket_view=True`` a wrapper may stand around a model, or parameters,
    that were handed over without it.
    """
    return gradient._is_view() and not is_sharded(gradient)


class Wrappers:
    """The data-parallel wrappers a model is or contains."""

    def __init__(self, model: nn.Module | None):
        modules = list(model.modules()) if model is not None else []
        sharding = sys.modules.get("torch.distributed.fsdp")
        for m in modules:
            if isinstance(m, getattr(sharding, "FullyShardedDataParallel", ())):
                raise ValueError("FullyShardedDataParallel (FSDP1) gives every rank a flat shard of its own, whose "
                                 "norm is not the gradient's: use torch.distributed.fsdp.fully_shard (FSDP2) instead")
        self.ddp: list[Any] = [m for m in modules if isinstance(m, nn.parallel.DistributedDataParallel)]
        self.fsdp: list[Any] = [m for m in modules if isinstance(m, getattr(sharding, "FSDPModule", ()))]
        self._sharded_groups = [g for m in self.fsdp for g in _parameter_groups(m)]
        self._replicated = [g for g in self._sharded_groups if getattr(g, "_is_hsdp", False)]

    @property
    def has_ranks(self) -> bool:
        """Whether ranks hold copies of the weights that could each have an ε of their own."""
        return bool(self.ddp) or bool(self._replicated)

    def refuse_left_out(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        """Raise if a trainable parameter has a gradient that no wrapper averages over the ranks."""
        import torch.distributed as dist

        if not self.ddp and not self.fsdp or dist.get_world_size() == 1:
            return
        averaged = {id(p) for m in self.ddp for n, p in m.module.named_parameters() if n not in m.parameters_to_ignore}
        for name, p in parameters:
            if p.requires_grad and id(p) not in averaged and not is_sharded(p):
                raise ValueError(
                    f"{name} is trainable but outside the data-parallel wrappers, so that its gradient, the norm and ε "
                    'would differ from rank to rank: wrap the whole model, freeze the parameter, or use scope="rank"')

    def refuse_unsynchronised(self) -> None:
        """Raise if the caller has switched gradient synchronisation off around us."""
        if any(not m.require_backward_grad_sync for m in self.ddp) or any(
                not g.reduce_grads for g in self._sharded_groups):
            raise RuntimeError(
                "sharpener.backward was called with gradient synchronisation off (inside no_sync, or after "
                "set_requires_gradient_sync(False)): every rank would choose its own ε in silence. Call it outside "
                "and hand over all micro-batches at once, sharpener.backward([first, second, ...]); for one ε per "
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
        for m in self.fsdp:
            m.reshard()

    def any_rank(self, flag: Tensor) -> Tensor:
        """Whether a 0-d flag is set on any rank."""
        import torch.distributed as dist

        flag = flag.to(torch.float32)
        for group in self._groups():
            dist.all_reduce(flag, dist.ReduceOp.MAX, group=group)
        return flag > 0

    def average(self, tensors: list[Tensor]) -> None:
        """Mean over the data-parallel ranks, in place."""
        import torch.distributed as dist

        for group in self._groups():
            for t in tensors:
                dist.all_reduce(t, group=group)
                t.div_(dist.get_world_size(group))

    def _groups(self) -> list[Any]:
        groups = [m.process_group for m in self.ddp] + [g.mesh_info.replicate_process_group for g in self._replicated]
        return list({id(g): g for g in groups}.values())


def _parameter_groups(module: Any) -> list[Any]:
    """FSDP2's parameter groups of one wrapped module; torch has no public name for them."""
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    groups = [getattr(state, "_fsdp_param_group", None)] if groups is None else groups
    return [g for g in groups if g is not None]


def _shards_only(mesh: Any) -> Any:
    """A replicate × shard mesh seen as a shard mesh: gradients are then not averaged over the replicas."""
    kind = next(c for c in type(mesh).__mro__ if c.__name__ == "FSDPMeshInfo")
    view = object.__new__(kind)
    view.__dict__.update(mesh.__dict__)
    return view
