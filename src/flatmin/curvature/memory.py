"""How much memory there is, how much a computation takes, and the sentence that foretells it."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def available(device: torch.device) -> int:
    """Free bytes on a device; on the CPU what Linux says can be had without swapping, within the container's limit."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        with open("/proc/meminfo") as f:
            rows = dict(line.split(":", 1) for line in f)
        free = int(rows["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2)
    return min(free, _container_room())


def _container_room() -> int:
    try:
        with open("/sys/fs/cgroup/memory.max") as a, open("/sys/fs/cgroup/memory.current") as b, \
                open("/sys/fs/cgroup/memory.stat") as c:
            stat = dict(line.split() for line in c)
            return int(a.read()) - int(b.read()) + int(stat.get("inactive_file", 0))
    except (OSError, ValueError):
        return 1 << 62


class Meter(TorchDispatchMode):
    """Counts the bytes that operations inside produce: an upper bound of what a graph made there keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.bytes += sum(t.numel() * t.element_size() for t in tree_leaves(out) if isinstance(t, Tensor))
        return out


def size(count: float) -> str:
    """Bytes for people.

    >>> size(3 * 2**30)
    '3.0 GiB'
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def require(needed: int, device: torch.device, what: str, remedy: str) -> None:
    """Raise a MemoryError that says how much is needed, before anything is allocated."""
    free = available(device)
    if needed > free:
        raise MemoryError(f"{what} needs {size(needed)} on {device}, and {size(free)} are free: {remedy}")
