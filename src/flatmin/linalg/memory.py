"""How much memory there is, how much a computation takes, and the sentence that predicts it."""

from __future__ import annotations

import os
import shutil
import tempfile
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


def mapped(numel: int, dtype: torch.dtype, folder: str | None = None, file: str | None = None) -> Tensor:
    """A flat tensor in a file, of which only what is looked at is in memory.

    The file has no name: it is gone with the tensor, after a kill too. With ``file`` it stays, and an existing one of
    this size is used as it is.
    """
    needed = numel * torch.empty(0, dtype=dtype).element_size()
    folder = os.path.dirname(os.path.abspath(file)) if file else folder or tempfile.gettempdir()
    if needed == 0:
        return torch.empty(0, dtype=dtype)
    if not (file and os.path.exists(file) and os.path.getsize(file) == needed):
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise MemoryError(f"{size(needed)} are needed in {folder}, where {size(free)} are free")
    if file:
        handle, path = os.open(file, os.O_RDWR | os.O_CREAT, 0o600), file
    else:
        handle, path = tempfile.mkstemp(prefix="flatmin-", dir=folder)
    os.truncate(handle, needed)
    os.close(handle)
    out = torch.from_file(path, shared=True, size=numel, dtype=dtype)
    if not file:
        os.unlink(path)     # the mapping keeps it alive
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
