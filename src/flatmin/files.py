"""Files that are replaced as a whole, and a digest of content: the only place that replaces a file.

``replace_file`` and ``move_file`` survive a full disk, a kill and a loss of power: the old content or the new one is
there afterwards, never a part of either.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def replace_file(path: str | os.PathLike[str], write: Callable[[Path], Any]) -> None:
    """Call ``write(temporary)`` and put that file in the place of ``path``; missing folders are made.

    File and folder are flushed to the disk (fsync). Whatever ``write`` or the disk raises is passed on; the old file
    is then untouched and the temporary one removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        write(temporary)
        with open(temporary, "r+b") as file:
            os.fsync(file.fileno())
        move_file(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):      # the first error is the one to report
            temporary.unlink(missing_ok=True)
        raise


def move_file(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Rename a file within its file system; an existing ``target`` is replaced."""
    os.replace(source, target)
    if hasattr(os, "O_DIRECTORY"):      # the new name is safe only once the folder is on the disk; not on Windows
        sync(Path(target).parent)


def sync(path: str | os.PathLike[str]) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_file(path: str | os.PathLike[str]) -> None:
    """Remove a file, if it is there, and what a killed ``replace_file`` left of it."""
    Path(path).unlink(missing_ok=True)
    _temporary(Path(path)).unlink(missing_ok=True)


def digest(*parts: str | Tensor) -> str:
    """SHA-256 of texts and tensors in hexadecimal; it differs where a text, value, shape or dtype does."""
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, str):
            found.update(f"{part}\0".encode())
            continue
        t = part.detach().cpu().contiguous()
        found.update(f"{tuple(t.shape)} {t.dtype}".encode())
        if t.numel():   # the bytes are read in place: .numpy() would need NumPy, which has no bfloat16
            found.update((ctypes.c_char * (t.numel() * t.element_size())).from_address(t.data_ptr()))
    return found.hexdigest()


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")
