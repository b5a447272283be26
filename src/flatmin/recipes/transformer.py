"""A decoder-only transformer: pre-norm, without biases, with tied embeddings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Shape:
    """Width, depth and heads, and how many tokens there are."""

    width: int
    depth: int
    heads: int
    vocabulary: int


SIZES = {
    "2M": Shape(112, 6, 4, 8192),
    "24M": Shape(384, 6, 6, 32768),
    "118M": Shape(768, 13, 12, 32768),
    "1208M": Shape(2048, 22, 16, 50304),
}
"""Named after their parameters, embeddings included; 2M to 1208M as the paper of Functional-SAM has them
(arXiv:2502.02407), whose exact shapes are not published."""


class Attention(nn.Module):
    """Causal self-attention by ``scaled_dot_product_attention``; queries and keys are rotated by their position."""

    def __init__(self, width: int, heads: int, rotary: bool):
        super().__init__()
        if width % heads:
            raise ValueError(f"the width must be a multiple of the heads, got {width} and {heads}")
        self.heads, self.rotary = heads, rotary
        self.inward = nn.Linear(width, 3 * width, bias=False)
        self.outward = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = (t.view(batch, length, self.heads, -1).transpose(1, 2) for t in self.inward(x).chunk(3, -1))
        if self.rotary:
            q, k = rotated(q), rotated(k)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.outward(y.transpose(1, 2).reshape(batch, length, width))


def rotated(x: Tensor) -> Tensor:
    """Pairs (x_i, x_{i + d/2}) of (..., length, d) turned by the angle position · 10000^(−2i/d) (arXiv:2104.09864)."""
    length, d = x.shape[-2:]
    rate = 10000.0 ** (-torch.arange(0, d, 2, device=x.device, dtype=torch.float32) / d)
    angle = torch.arange(length, device=x.device, dtype=torch.float32)[:, None] * rate
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), with GELU between width and 4 · width."""

    def __init__(self, width: int, heads: int, rotary: bool):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.attention = Attention(width, heads, rotary)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width, bias=False), nn.GELU(),
                                 nn.Linear(4 * width, width, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """Tokens (batch, length) → logits (batch, length, vocabulary); the embedding is the output layer too.

    Weights are normal with standard deviation 0.02, those that write into the residual stream 0.02/√(2 · depth), as
    GPT-2's.
    """

    def __init__(self, shape: Shape, context: int, positions: Literal["rotary", "learned"] = "rotary"):
        super().__init__()
        self.context = context
        self.embedding = nn.Embedding(shape.vocabulary, shape.width)
        self.positions = nn.Embedding(context, shape.width) if positions == "learned" else None
        self.blocks = nn.ModuleList([Block(shape.width, shape.heads, positions == "rotary")
                                     for _ in range(shape.depth)])
        self.norm = nn.LayerNorm(shape.width, bias=False)
        for name, p in self.named_parameters():
            if p.dim() > 1:
                into_stream = name.endswith(("outward.weight", "mlp.2.weight"))
                nn.init.normal_(p, std=0.02 / (2 * shape.depth) ** 0.5 if into_stream else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        if tokens.shape[-1] > self.context:
            raise ValueError(f"the context is {self.context} tokens, got {tokens.shape[-1]}")
        x = self.embedding(tokens)
        if self.positions is not None:
            x = x + self.positions.weight[:tokens.shape[-1]]
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.embedding.weight)
