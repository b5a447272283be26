"""One-step sharpness holds the weights and one gradient, and gives the weights back bit for bit.

    python benchmarks/one_step_memory.py                        # 300 million parameters, 3 GB, about 20 seconds
    python benchmarks/one_step_memory.py --parameters 1.5e9     # GPT-2 XL's size, 12.4 GB and a few minutes

Prints the peak of resident memory above the process's own (torch imported, nothing built), over weights + gradients
(8 bytes a parameter in float32); the claim is at most 1.15 for 1.5 billion parameters. What is over is mostly fixed
(libraries at their first backward pass, the embedding's gradient, activations): 1.10 there, 1.21 at 100 million. The
model is GPT-2's stack of blocks: embedding, attention with four square maps, a fourfold MLP, tied head.
"""

from __future__ import annotations

import argparse
import hashlib
import resource
import sys
import time

import torch
from torch import Tensor, nn

from flatmin import Objective
from flatmin.sharpness import one_step


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.mix(self.first(x)).chunk(3, -1)
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))
        return x + self.down(nn.functional.gelu(self.up(self.second(x))))


class Language(nn.Module):
    def __init__(self, width: int, depth: int, words: int):
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        return (self.norm(self.blocks(self.embedding(tokens))) @ self.embedding.weight.T).transpose(1, 2)


def sizes(parameters: float) -> tuple[int, int, int]:
    """Width, depth and vocabulary of about so many parameters; GPT-2 XL is (1600, 48, 50257)."""
    width = max(64, round(1600 * (parameters / 1.56e9) ** (1 / 3) / 64) * 64)
    words = 50257 if parameters > 5e8 else 8192
    return width, max(1, round((parameters - words * width) / (12 * width**2))), words


def peak() -> int:
    """Largest resident size so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def fingerprint(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for p in model.parameters():
        for part in p.detach().view(-1).split(1 << 22):
            digest.update(memoryview(part.numpy()))
    return digest.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, default=3e8)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=8)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.randn(8, 8) @ torch.randn(8, 8)       # what the libraries allocate at the first product is the process's own
    own = peak()
    width, depth, words = sizes(options.parameters)
    model = Language(width, depth, words)
    count = sum(p.numel() for p in model.parameters())
    tokens = torch.randint(words, (options.batch, options.length + 1))
    objective = Objective(model, nn.CrossEntropyLoss(), (tokens[:, :-1], tokens[:, 1:]))
    before, built, start = fingerprint(model), peak(), time.perf_counter()
    result = one_step(objective, rho=0.05, second_order=False)
    seconds, total = time.perf_counter() - start, peak() - own
    assert fingerprint(model) == before, "the weights were not restored bit for bit"
    print(f"{count / 1e6:.0f} million parameters, width {width}, depth {depth}; batch {options.batch} x "
          f"{options.length}; torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"peak {total / 1e9:.2f} GB above the process's own ({(built - own) / 1e9:.2f} GB of it the weights) = "
          f"{total / (8 * count):.3f} x (weights + gradients)")
    print(f"one_step {result.value:.6g} (first order {result.first_order:.6g}) in {seconds:.1f} s; weights restored "
          "bit for bit")


if __name__ == "__main__":
    main()
