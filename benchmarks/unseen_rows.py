"""How much of the preconditioned step goes to embedding rows that are new, or were last seen long ago.

    python benchmarks/unseen_rows.py

A small transformer trained by AdamW on tokens with Zipf frequencies. Every 50th step the share of ‖ε‖² on the rows of
the embedding that this batch holds for the first time, and on those last seen more than 40 steps ago, is taken for
several floors (0: Adam's own M). Prints, over all such steps and seeds, the mean share with its maximum.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

from flatmin import Sharpener
from flatmin.ascent import Preconditioned

VOCABULARY, WIDTH, CONTEXT, BATCH, STEPS = 4000, 32, 16, 16, 600


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.layer = nn.TransformerEncoderLayer(WIDTH, 2, 64, 0.0, batch_first=True, norm_first=True)
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        return self.head(self.norm(self.layer(self.embedding(tokens), src_mask=mask, is_causal=True)))


def batch(generator: torch.Generator) -> Tensor:
    """Half the tokens follow from the one before, half are drawn with frequency 1/rank."""
    x = torch.multinomial(1 / torch.arange(1.0, VOCABULARY + 1), BATCH * (CONTEXT + 1), True, generator=generator)
    x = x.view(BATCH, CONTEXT + 1)
    follows = torch.rand(x.shape, generator=generator) < 0.5
    for t in range(1, CONTEXT + 1):
        x[:, t] = torch.where(follows[:, t], (x[:, t - 1] * 7 + 3) % VOCABULARY, x[:, t])
    return x


def run(seed: int, beta2: float, power: float, floors: list[float]) -> dict[float, list[tuple[float, float]]]:
    torch.manual_seed(seed)
    generator, model = torch.Generator().manual_seed(seed), Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, beta2))
    last = torch.full((VOCABULARY,), -1)
    shares: dict[float, list[tuple[float, float]]] = {floor: [] for floor in floors}
    for t in range(STEPS):
        x = batch(generator)

        def loss(x: Tensor = x) -> Tensor:
            return nn.functional.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())

        here = torch.zeros(VOCABULARY, dtype=torch.bool).index_fill_(0, x[:, :-1].flatten(), True)
        new, old = here & (last < 0), here & (last >= 0) & (last < t - 40)
        if t >= 50 and t % 50 == 0 and new.any() and old.any():
            before = [p.detach().clone() for p in model.parameters()]
            for floor in floors:
                moved: list[Tensor] = []

                def watched(moved: list[Tensor] = moved, before: list[Tensor] = before) -> Tensor:
                    moved[:] = [(p.detach() - w).double() for p, w in zip(model.parameters(), before, strict=True)]
                    return loss()

                direction = Preconditioned(power, floor=floor)
                Sharpener(model, direction=direction, optimizer=optimizer, rho=1.0).backward(watched)
                optimizer.zero_grad()
                total = sum(float(e.square().sum()) for e in moved)
                shares[floor].append((float(moved[0][new].square().sum()) / total,
                                      float(moved[0][old].square().sum()) / total))
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()
        last[x[:, :-1].flatten()] = t
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    seeds = parser.parse_args().seeds
    floors = [0.0, 0.1, 1.0]
    print("beta2  power  floor   new rows: mean (max)   old rows: mean (max)")
    for beta2 in (0.999, 0.95):
        for power in (0.5, 1.0):
            runs = [run(seed, beta2, power, floors) for seed in range(seeds)]
            for floor in floors:
                new, old = zip(*(pair for each in runs for pair in each[floor]), strict=True)
                print(f"{beta2:<6} {power:<6} {floor:<6}  {sum(new) / len(new):8.3f} ({max(new):.3f})"
                      f"       {sum(old) / len(old):8.3f} ({max(old):.3f})", flush=True)


if __name__ == "__main__":
    main()
