"""The library's recipes: digits (embedded), Fashion-MNIST and CIFAR-10 (files the user has)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from .classifier import Classification, Data
from .readers import read_cifar10, read_idx

FASHION_FOLDER = "/usr/share/datasets/fashion-mnist"


def digits_data(folder: str | None = None) -> Data:
    """scikit-learn's 1797 handwritten digits of 8 × 8 pixels: 1000 to train on, 797 to test."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ValueError("the digits come with scikit-learn: pip install 'flatmin[cli]'") from error
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels).long()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:1000], order[1000:]
    mean, std = x[train].mean(), x[train].std()
    x = (x - mean) / std
    return Data(x[train], y[train], x[test], y[test], 10)


def digits_model() -> nn.Module:
    """A multilayer perceptron 64-256-256-10."""
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


def fashion_data(folder: str | None = None) -> Data:
    """Fashion-MNIST from its four IDX files, gzipped or not."""
    root = Path(folder or FASHION_FOLDER)

    def part(name: str) -> Tensor:
        for path in (root / f"{name}.gz", root / name):
            if path.exists():
                return read_idx(path)
        raise ValueError(
            f"no {name}(.gz) in {root}: install Debian's package dataset-fashion-mnist, or put the four IDX files "
            "of Fashion-MNIST into a folder and pass it with --data"
        )

    train = part("train-images-idx3-ubyte"), part("train-labels-idx1-ubyte")
    test = part("t10k-images-idx3-ubyte"), part("t10k-labels-idx1-ubyte")
    return _normalized(train[0].unsqueeze(1), train[1].long(), test[0].unsqueeze(1), test[1].long())


def fashion_model() -> nn.Module:
    """Two convolutions with BatchNorm and a linear layer."""
    return _convolutional(1, 7)


def cifar10_data(folder: str | None = None) -> Data:
    """CIFAR-10 from its binary version (data_batch_1.bin ... test_batch.bin)."""
    root = Path(folder or "cifar-10-batches-bin")
    names = [f"data_batch_{i}.bin" for i in range(1, 6)]
    missing = [n for n in [*names, "test_batch.bin"] if not (root / n).exists()]
    if missing:
        raise ValueError(f"no {missing[0]} in {root}: unpack CIFAR-10's binary version (cifar-10-binary.tar.gz, from "
                         "the data set's home page) and pass its folder with --data")
    parts = [read_cifar10(root / n) for n in names]
    test = read_cifar10(root / "test_batch.bin")
    return _normalized(torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts]), *test)


def cifar10_model() -> nn.Module:
    """Two convolutions with BatchNorm and a linear layer."""
    return _convolutional(3, 8)


def _convolutional(channels: int, side: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32 * side * side, 10),
    )


def _normalized(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor) -> Data:
    """Bytes to floats with the training pixels' mean and deviation by channel."""
    train, test = train_x.float() / 255, test_x.float() / 255
    mean, std = train.mean((0, 2, 3), keepdim=True), train.std((0, 2, 3), keepdim=True)
    return Data((train - mean) / std, train_y, (test - mean) / std, test_y, 10)


digits = Classification("digits", digits_model, digits_data, noise=0.6, folds=5)
fashion_mnist = Classification("fashion-mnist", fashion_model, fashion_data, epochs=5, batch_size=128, lr=0.05,
                               tuning_samples=10_000)
cifar10 = Classification("cifar10", cifar10_model, cifar10_data, epochs=10, batch_size=128, lr=0.05,
                         tuning_samples=10_000)
