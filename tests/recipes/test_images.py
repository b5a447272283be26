"""The library's recipes and the readers of their files."""

import gzip
import struct

import pytest
import torch

from flatmin.recipes import find_recipe
from flatmin.recipes.readers import read_cifar10, read_idx


@pytest.fixture(autouse=True)
def _float32():
    kept = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(kept)


def test_noise_redraws_the_stated_share_of_training_labels_only():
    clean = find_recipe("digits").data(None)
    noisy = clean.with_noise(0.6)
    changed = (clean.train_targets != noisy.train_targets).double().mean().item()
    assert changed == pytest.approx(0.6 * 0.9, abs=0.04), "one redrawn label in ten hits its own class"
    assert torch.equal(clean.test_targets, noisy.test_targets)
    assert torch.equal(clean.with_noise(0.6).train_targets, noisy.train_targets)


def test_idx_files_gzipped_or_not(tmp_path):
    values = torch.arange(2 * 3 * 4, dtype=torch.uint8)
    raw = b"\x00\x00\x08\x03" + struct.pack(">3I", 2, 3, 4) + values.numpy().tobytes()
    (tmp_path / "a").write_bytes(raw)
    (tmp_path / "b.gz").write_bytes(gzip.compress(raw))
    for name in ("a", "b.gz"):
        assert torch.equal(read_idx(tmp_path / name), values.view(2, 3, 4))
    (tmp_path / "short").write_bytes(raw[:-1])
    with pytest.raises(ValueError, match="should hold 24 bytes"):
        read_idx(tmp_path / "short")
    (tmp_path / "text").write_bytes(b"hello")
    with pytest.raises(ValueError, match="not an IDX file"):
        read_idx(tmp_path / "text")


def cifar_batch(n: int, seed: int) -> bytes:
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (n, 1), generator=g, dtype=torch.uint8)
    return torch.cat([labels, torch.randint(256, (n, 3072), generator=g, dtype=torch.uint8)], 1).numpy().tobytes()


def test_cifar10_from_its_binary_batches(tmp_path):
    for i, name in enumerate([*(f"data_batch_{k}.bin" for k in range(1, 6)), "test_batch.bin"]):
        (tmp_path / name).write_bytes(cifar_batch(12, i))
    data = find_recipe("cifar10").data(str(tmp_path))
    assert data.train_inputs.shape == (60, 3, 32, 32) and len(data.test_targets) == 12
    assert data.train_inputs.mean().abs() < 1e-4 and find_recipe("cifar10").model()(data.test_inputs).shape == (12, 10)
    images, labels = read_cifar10(tmp_path / "test_batch.bin")
    raw = (tmp_path / "test_batch.bin").read_bytes()
    assert labels[1] == raw[3073] and images[1, 2, 31, 31] == raw[2 * 3073 - 1]
    (tmp_path / "bad.bin").write_bytes(b"x" * 3074)
    with pytest.raises(ValueError, match="no multiple of 3073"):
        read_cifar10(tmp_path / "bad.bin")
