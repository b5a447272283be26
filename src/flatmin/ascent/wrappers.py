"""Data-parallel wrappers inside a model: when they synchronise, and over which ranks.

Knows ``DistributedDataParallel`` and FSDP2's ``fully_shard`` by their public methods; imports neither unless the
process has.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Wrappers:
    """The data-parallel wrappers a model is or contains."""

    def __init__(self, model: nn.Module | None):
        modules = list(model.modules()) if model is not None else []
        self.ddp: list[Any] = [m for m in modules if isinstance(m, nn.parallel.DistributedDataParallel)]
        kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
        self.fsdp: list[Any] = [m for m in modules if kind is not None and isinstance(m, kind)]
        self.bucket_views = any(m.gradient_as_bucket_view for m in self.ddp)

    def refuse_unsynchronised(self) -> None:
        """Raise if the caller has switched gradient synchronisation off around us."""
        off = any(not m.require_backward_grad_sync for m in self.ddp)
        for m in self.fsdp:
            group = getattr(m._get_fsdp_state(), "_fsdp_param_group", None)
            off = off or (group is not None and not group.reduce_grads)
        if off:
            raise RuntimeError(
                "sharpener.backward was called with gradient synchronisation off (inside no_sync, or after "
                "set_requires_gradient_sync(False)): every rank would choose its own ε in silence. Call it outside "
                "and hand over all micro-batches at once, sharpener.backward([first, second, ...]); for one ε per "
                'rank under DistributedDataParallel use scope="rank".'
            )

    @contextmanager
    def unsynchronised(self, active: bool) -> Iterator[None]:
        """Inside, forward and backward leave gradients to this rank (both must be inside, or DDP reduces anyway)."""
        with ExitStack() as stack:
            if active:
                for m in self.ddp:
                    stack.enter_context(m.no_sync())
            yield

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
        return list({id(m.process_group): m.process_group for m in self.ddp}.values())
