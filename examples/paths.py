"""Which path does SAM flatten: the statistics of the logits, or the function?

The gradient of SAM's penalty is H ε* = H_G ε* + H_F ε*: a path through the curvature of the loss in the logits, and one
through the curvature of the network (Singh et al., arXiv:2502.02407, who find that the logit path dominates in language
models and name large vocabularies as the cause). This follows both along SAM's direction g and along Adam's M⁻¹g, while
a small causal transformer with tied embeddings learns words of Python's own standard library at several sizes of
vocabulary, and while a small network learns scikit-learn's digits. Means and standard deviations are over seeds.

    python examples/paths.py [--steps 100] [--seeds 3] [--vocabularies 64,512,4096] [--spectra]
"""

from __future__ import annotations

import argparse
import collections
import re
import statistics
import sysconfig
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from flatmin import Objective
from flatmin.paths import PreconditionedSpectrum, SharpnessPaths, preconditioned_spectrum, sharpness_paths
from flatmin.sharpness import SharpnessWarning

LENGTH, BATCH = 32, 8
DIRECTIONS = ("gradient", "preconditioned")


class Block(nn.Module):
    """Attention and a two-layer network, each behind a layer norm."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norms[0](x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class Language(nn.Module):
    """A causal transformer with learned positions and tied embeddings."""

    def __init__(self, vocabulary: int, width: int = 32, layers: int = 2):
        super().__init__()
        self.embed, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(LENGTH, width)
        self.blocks = nn.Sequential(*(Block(width, 2) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        for table in (self.embed, self.positions):
            nn.init.normal_(table.weight, std=width**-0.5)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embed(ids) + self.positions.weight[:ids.shape[1]]
        return self.norm(self.blocks(h)) @ self.embed.weight.T


def words(vocabulary: int, files: int = 60) -> Tensor:
    """The standard library as numbers: the most frequent words by rank, all others as the last number."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    text = "\n".join(p.read_text(errors="ignore") for p in sorted(folder.glob("*.py"))[:files])
    found = re.findall(r"\w+|[^\w\s]|\n", text)
    rank = {word: i for i, (word, _) in enumerate(collections.Counter(found).most_common(vocabulary - 1))}
    return torch.tensor([rank.get(word, vocabulary - 1) for word in found])


def tokens_loss(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z.flatten(0, -2), y.flatten())


def language(vocabulary: int, seed: int) -> tuple[nn.Module, Callable[[], tuple[Tensor, Tensor]]]:
    """A model, and a function that draws a batch."""
    stream, g = words(vocabulary), torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)

    def batch() -> tuple[Tensor, Tensor]:
        starts = torch.randint(len(stream) - LENGTH - 1, (BATCH,), generator=g)
        rows = torch.stack([stream[i:i + LENGTH + 1] for i in starts.tolist()])
        return rows[:, :-1], rows[:, 1:]

    return Language(vocabulary), batch


def digits(_: int, seed: int) -> tuple[nn.Module, Callable[[], tuple[Tensor, Tensor]]]:
    """The same for images in ten classes."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels).long()
    g = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)

    def batch() -> tuple[Tensor, Tensor]:
        chosen = torch.randint(len(x), (BATCH * LENGTH,), generator=g)
        return x[chosen], y[chosen]

    return nn.Sequential(nn.Linear(64, 48), nn.GELU(), nn.Linear(48, 48), nn.GELU(), nn.Linear(48, 10)), batch


@dataclass
class Run:
    """What was seen along one training: records by (step, direction)."""

    paths: dict[tuple[int, str], SharpnessPaths]
    spectrum: PreconditionedSpectrum | None


def train(make: Callable[[int, int], tuple[nn.Module, Callable[[], tuple[Tensor, Tensor]]]], outputs: int, seed: int,
          steps: list[int], spectra: bool) -> Run:
    """AdamW, with both paths on two fixed batches, which training does not see, at some steps."""
    model, batch = make(outputs, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.99), weight_decay=0.1)
    objective = Objective(model, tokens_loss, [batch(), batch()])
    seen = {}
    for step in range(steps[-1] + 1):
        for direction in DIRECTIONS if step in steps else ():
            if step or direction == "gradient":     # before its first step Adam has no second moment
                seen[step, direction] = sharpness_paths(objective, direction, optimizer=optimizer)
        x, y = batch()
        tokens_loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return Run(seen, preconditioned_spectrum(objective, optimizer, k=10, tol=1e-2, certify=False) if spectra else None)


def over_seeds(values: list[float], digits: int = 2) -> str:
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def table(name: str, runs: list[Run]) -> list[str]:
    rows = []
    for step, direction in runs[0].paths:
        records = [run.paths[step, direction] for run in runs]
        cells = [over_seeds([getattr(r, field) for r in records]) for field in
                 ("loss", "tau_logit", "tau_func", "tau_cross", "ratio", "cosine")]
        rows.append(" | ".join([f"| {name}", str(step), direction, *cells]) + " |")
    return rows


def spectrum_row(name: str, runs: list[Run]) -> str:
    found = [run.spectrum for run in runs if run.spectrum is not None]
    cells = [[s.spread[0] for s in found], [s.spread[1] for s in found], [s.gradient_share for s in found],
             [s.direction_share for s in found], [s.metric_share for s in found]]
    return " | ".join([f"| {name}", *map(over_seeds, cells), f"{found[0].chance:.1e}"]) + " |"


def main(argv: list[str] | None = None) -> dict[str, list[Run]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--vocabularies", default="64,512,4096")
    parser.add_argument("--spectra", action="store_true", help="also eigenvalues before and after preconditioning")
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore", SharpnessWarning)
    steps = sorted({0, args.steps // 10, args.steps // 3, args.steps})
    jobs = [("digits, 10 classes", digits, 10)] + [(f"words, {int(v)}", language, int(v))
                                                   for v in args.vocabularies.split(",")]
    found = {}
    print(f"mean ± standard deviation over {args.seeds} seeds")
    print("| data, outputs | step | direction | loss | τ logit | τ func | τ cross | ratio | cosine |")
    print("|---|--:|---|--:|--:|--:|--:|--:|--:|")
    for name, make, outputs in jobs:
        found[name] = [train(make, outputs, seed, steps, args.spectra) for seed in range(args.seeds)]
        print("\n".join(table(name, found[name])), flush=True)
    if args.spectra:
        print("\n| data, outputs | λ₁/λ₁₀ | after M^-½ | share of g | of M⁻¹g | of M^-½ g, after | by chance |")
        print("|---|--:|--:|--:|--:|--:|--:|")
        print("\n".join(spectrum_row(name, runs) for name, runs in found.items()))
    return found


if __name__ == "__main__":
    main()
