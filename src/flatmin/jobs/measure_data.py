"""Which data an objective is measured on: a share of them, and the share of each of several processes."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from .. import batches
from ..files import digest
from ..objective import Objective
from ..parallel import DataParallelModules, Group


def changed(objective: Objective, **parts: Any) -> Objective:
    """The same objective with another ``model``, ``data`` or ``mode``."""
    other = copy.copy(objective)
    other.product_checks = {}
    for name, value in parts.items():
        setattr(other, name, value)
    return other


def moved(objective: Objective, device: torch.device) -> Objective:
    """The objective with its model, and a loss that is a module, on a device."""
    objective.model.to(device)
    if isinstance(objective.loss_fn, nn.Module):
        objective.loss_fn.to(device)
    return objective


def share_of(objective: Objective, share: float, seed: int) -> tuple[Objective, dict[str, Any]]:
    """The objective on a random share of its batches, or of the samples of a single one; and what is recorded of it.

    Raises:
        ValueError: a single batch whose samples cannot be told apart.
    """
    if share == 1:
        return objective, {}
    generator = torch.Generator().manual_seed(seed)
    count = sum(1 for _ in objective.data)
    if count > 1:
        kept = _drawn(count, share, generator)
        wanted = set(kept)
        torch.manual_seed(seed)     # of a loader that shuffles
        data = [batch for i, batch in enumerate(objective.data) if i in wanted]
        return changed(objective, data=data), {"share": f"{len(kept)} of {count} batches, drawn with seed {seed}"}
    batch = next(iter(objective.data))
    n = batches.samples_in(batch)
    if n < 2 or batches.samples(batch, slice(None)) is None:
        raise ValueError("--share of one batch needs its samples, one row of every tensor each: give several batches")
    rows = torch.tensor(_drawn(n, share, generator))
    part = batches.each_tensor(batch, lambda t: t[rows.to(t.device)])
    return changed(objective, data=batches.Single(part)), {
        "share": f"{len(rows)} of {n} samples, drawn with seed {seed}"}


def _drawn(count: int, share: float, generator: torch.Generator) -> list[int]:
    return sorted(torch.randperm(count, generator=generator)[:max(1, round(share * count))].tolist())


def over_processes(objective: Objective, group: Group) -> tuple[Objective, dict[str, Any]]:
    """The objective of all processes together, by DDP; and what is recorded of it.

    Where the user's code gives every process the same batches, each takes its share of them; else what it gives a
    process is its share.

    Raises:
        ValueError: an FSDP2 model, weights that differ between processes, or fewer batches than processes.
    """
    if group.size == 1:
        return objective, {}
    modules = DataParallelModules(objective.model)
    if modules.fsdp:
        raise ValueError("flatmin measure takes plain models and DDP under torchrun, and this one is sharded by "
                         "fully_shard (FSDP2): return it whole, or call flatmin.curvature and flatmin.sharpness on it "
                         "from your own script")
    weights = [t for t in objective.model.state_dict().values() if isinstance(t, Tensor)]
    group.refuse_different(digest(*weights), "the processes hold different weights: seed the model alike on all of "
                                             "them, or load --checkpoint")
    data = list(objective.data)
    found = group.gather(digest(*(t for batch in data for t in batches.tensors(batch))))
    how = "by your own code"
    if len(set(found)) == 1:
        if len(data) < group.size:
            raise ValueError(f"the data are {len(data)} batches for {group.size} processes: give at least one batch to "
                             "each, or start fewer")
        data, how = data[group.rank::group.size], "every process takes its share of the batches"
    model = objective.model if modules.ddp else nn.parallel.DistributedDataParallel(objective.model)
    return changed(objective, model=model, data=data), {"processes": group.size, "shared": how}
