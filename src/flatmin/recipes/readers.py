"""Readers of the standard image files: IDX (MNIST, Fashion-MNIST) and CIFAR-10's binary version.

Both are plain arrays of bytes. CIFAR's Python version is a pickle and is not read: unpickling runs what it says.
"""

from __future__ import annotations

import gzip
from pathlib import Path

import torch
from torch import Tensor


def read_idx(path: Path) -> Tensor:
    """A uint8 tensor from an IDX file, gzipped or not.

    Raises:
        ValueError: not an IDX file of unsigned bytes, or cut short.
    """
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if len(raw) < 4 or raw[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path} is not an IDX file of unsigned bytes")
    dims = raw[3]
    shape = [int.from_bytes(raw[4 + 4 * i: 8 + 4 * i], "big") for i in range(dims)]
    body = bytearray(raw[4 + 4 * dims:])
    size = 1
    for n in shape:
        size *= n
    if len(body) != size:
        raise ValueError(f"{path} should hold {size} bytes for {shape}, it holds {len(body)}")
    return torch.frombuffer(body, dtype=torch.uint8).view(shape).clone()


def read_cifar10(path: Path) -> tuple[Tensor, Tensor]:
    """Images (n, 3, 32, 32) uint8 and labels (n,) from a CIFAR-10 binary batch: records of 1 + 3072 bytes.

    Raises:
        ValueError: the size is no multiple of a record, or a label is not a class.
    """
    raw = bytearray(path.read_bytes())
    if not raw or len(raw) % 3073:
        raise ValueError(f"{path} is not a CIFAR-10 binary batch: {len(raw)} bytes are no multiple of 3073")
    records = torch.frombuffer(raw, dtype=torch.uint8).view(-1, 3073)
    labels = records[:, 0].long()
    if labels.max() > 9:
        raise ValueError(f"{path} is not a CIFAR-10 binary batch: it has the label {int(labels.max())}")
    return records[:, 1:].reshape(-1, 3, 32, 32).clone(), labels
