"""Five recipes that share nothing but the protocol: a regression, streaming tokens, a teacher and a student, a scorer
of two inputs, and one with its own evaluation, random augmentation, dropout and BatchNorm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from flatmin.training.protocol import Metric
from flatmin.training.streams import Loaded, Shuffled, step_seed


def _drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def _floats(module):
    return module.to(torch.float32)


@dataclass(frozen=True)
class Regression:
    """Tensors in memory; ragged: the last batch of an epoch is smaller."""

    name: str = "regression"
    epochs: int = 3
    rows: int = 42

    def model(self):
        return _floats(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)))

    def train_batches(self, at):
        x = _drawn(1, self.rows, 4)
        return Shuffled((x, x.sin().sum(1, keepdim=True)), 4, at)

    def forward(self, model, batch):
        return model(batch[0])

    def loss(self, outputs, batch):
        return F.mse_loss(outputs, batch[1])

    def weight(self, batch):
        return batch[1].numel()

    def optimizers(self, model):
        return [torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)]

    def held_out(self, split, at):
        x = _drawn(2, 20, 4)
        rows = slice(at.rank, None, at.world)
        return [(x[rows], x[rows].sin().sum(1, keepdim=True))]

    def evaluate(self, model, batches):
        losses = [(F.mse_loss(model(x), y).item(), len(x)) for x, y in batches]
        n = sum(n for _, n in losses)
        return {"mse": Metric(sum(loss * n for loss, n in losses) / n, weight=n)}


class Windows:
    """An endless stream of windows of tokens of several lengths, a function of (seed, step, rank)."""

    def __init__(self, at):
        self.at, self.step = at, 0

    def __iter__(self):
        while True:
            generator = torch.Generator().manual_seed(step_seed(self.at.seed, self.step, self.at.rank))
            self.step += 1
            length = int(torch.randint(3, 9, (), generator=generator))
            start = torch.randint(0, 50, (3, 1), generator=generator)
            yield {"tokens": (start + torch.arange(length + 1)) ** 2 % 17}

    def state_dict(self):
        return {"step": self.step}

    def load_state_dict(self, state):
        self.step = state["step"]


class _Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(17, 12)
        self.blocks = nn.ModuleList([nn.Linear(12, 12) for _ in range(2)])
        self.norm = nn.LayerNorm(12)

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = x + F.gelu(block(x))
        return self.norm(x) @ self.embedding.weight.T


@dataclass(frozen=True)
class Tokens:
    """A stream without epochs, whose loss is a mean over tokens, of which batches hold different numbers."""

    name: str = "tokens"
    steps: int = 15
    units: str = "tokens"

    def model(self):
        return _floats(_Reader())

    def blocks(self, model):
        return list(model.blocks)

    def train_batches(self, at):
        return Windows(at)

    def forward(self, model, batch):
        return model(batch["tokens"][:, :-1])

    def loss(self, outputs, batch):
        return F.cross_entropy(outputs.flatten(0, 1), batch["tokens"][:, 1:].flatten())

    def weight(self, batch):
        return batch["tokens"][:, 1:].numel()

    def optimizers(self, model):
        return [torch.optim.AdamW(model.parameters(), lr=1e-2)]


@dataclass(frozen=True)
class Student:
    """The teacher's outputs are computed once a step, before both passes; the data come from a shuffling DataLoader."""

    name: str = "student"
    epochs: int = 3

    def model(self):
        return _floats(nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2)))

    def teacher(self):
        state = torch.random.get_rng_state()
        torch.manual_seed(7)
        teacher = _floats(nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 2)))
        torch.random.set_rng_state(state)
        return teacher

    def train_batches(self, at):
        data = torch.utils.data.TensorDataset(_drawn(3, 40, 3))
        if at.world > 1:
            sampler = torch.utils.data.DistributedSampler(data, at.world, at.rank, seed=at.seed)
            return Loaded(torch.utils.data.DataLoader(data, 4, sampler=sampler), at)
        return Loaded(torch.utils.data.DataLoader(data, 4, shuffle=True), at)

    def prepare(self, batch, generator):
        with torch.no_grad():
            return batch[0], self.teacher()(batch[0]).softmax(-1)

    def forward(self, model, batch):
        return model(batch[0])

    def loss(self, outputs, batch):
        return F.kl_div(outputs.log_softmax(-1), batch[1], reduction="batchmean")

    def weight(self, batch):
        return len(batch[0])

    def optimizers(self, model):
        return [torch.optim.SGD(model.parameters(), lr=0.1)]


class _Scorer(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(3, 5), nn.Linear(4, 5)

    def forward(self, left, right):
        return (self.left(left) * self.right(right)).sum(-1)


@dataclass(frozen=True)
class Scorer:
    """Two inputs, two optimizers, and parameters in no list of modules."""

    name: str = "scorer"
    epochs: int = 3

    def model(self):
        return _floats(_Scorer())

    def train_batches(self, at):
        left, right = _drawn(4, 36, 3), _drawn(5, 36, 4)
        return Shuffled((left, right, (left[:, 0] * right[:, 0]).sign()), 3, at)

    def forward(self, model, batch):
        return model(batch[0], batch[1])

    def loss(self, outputs, batch):
        return F.softplus(-outputs * batch[2]).mean()

    def weight(self, batch):
        return len(batch[2])

    def optimizers(self, model):
        names = dict(model.named_parameters())
        left = [p for n, p in names.items() if "left" in n]
        return [torch.optim.SGD(left, lr=0.1, momentum=0.9),
                torch.optim.AdamW([p for n, p in names.items() if "left" not in n], lr=1e-2)]


@dataclass(frozen=True)
class Augmented:
    """Random augmentation, dropout, BatchNorm, and an evaluation of its own with a standard error."""

    name: str = "augmented"
    epochs: int = 3

    def model(self):
        return _floats(nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.3),
                                     nn.Linear(12, 3)))

    def train_batches(self, at):
        x = _drawn(6, 48, 6)
        return Shuffled((x, x[:, :3].argmax(1)), 4, at)

    def prepare(self, batch, generator):
        return batch[0] + 0.2 * torch.randn(batch[0].shape, generator=generator, dtype=batch[0].dtype), batch[1]

    def forward(self, model, batch):
        return model(batch[0])

    def loss(self, outputs, batch):
        return F.cross_entropy(outputs, batch[1])

    def losses(self, outputs, batch):
        return F.cross_entropy(outputs, batch[1], reduction="none")

    def weight(self, batch):
        return len(batch[1])

    def optimizers(self, model):
        return [torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)]

    def held_out(self, split, at):
        x = _drawn(8, 30, 6)[at.rank::at.world]
        return [(x, x[:, :3].argmax(1))]

    def evaluate(self, model, batches) -> dict[str, Any]:
        right = torch.cat([(model(x).argmax(-1) == y).double() for x, y in batches])
        p, n = right.mean().item(), len(right)
        return {"accuracy": Metric(p, (p * (1 - p) / n) ** 0.5, n, higher_is_better=True)}


TOYS = (Regression(), Tokens(), Student(), Scorer(), Augmented())
