"""Claim: with bfloat16 weights the step has the radius and direction it says.

For growing bfloat16 networks: length and cosine of the step the weights really take at ρ = 0.05, for
pytorch-optimizer's SAM and for flatmin, and how far the gradient they leave is from the one float32 gives.

    python benchmarks/low_precision.py [--largest 50]     (millions of parameters)
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

import pytorch_optimizer
import torch
from torch import Tensor, nn

from flatmin import presets

RHO = 0.05


def network(millions: float) -> nn.Module:
    """Three square layers with weights of standard deviation 0.02, as language models have."""
    torch.manual_seed(0)
    width = int((millions * 1e6 / 3) ** 0.5)
    net = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))
    for p in net.parameters():
        nn.init.normal_(p, std=0.02)
    return net


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.detach().float().reshape(-1) for t in tensors])


def observe(model: nn.Module, step: Callable[[Callable[[], Tensor]], None], x: Tensor, y: Tensor
            ) -> tuple[Tensor, Tensor, Tensor]:
    """w and w + ε as the passes see them, and the gradient left by the second."""
    seen: list[Tensor] = []

    def loss() -> Tensor:
        seen.append(flat(list(model.parameters())))
        return (model(x).float() - y.float()).square().mean()

    step(loss)
    return seen[0], seen[1], flat([p.grad for p in model.parameters() if p.grad is not None])


def peer(model: nn.Module) -> Callable[[Callable[[], Tensor]], None]:
    optimizer = pytorch_optimizer.SAM(model.parameters(), base_optimizer=torch.optim.SGD, rho=RHO, lr=0.0)

    def step(loss: Callable[[], Tensor]) -> None:
        loss().backward()
        optimizer.first_step(zero_grad=True)
        loss().backward()

    return step


def ours(model: nn.Module) -> Callable[[Callable[[], Tensor]], None]:
    sharpener = presets.sam(model, rho=RHO)
    return lambda loss: sharpener.backward(loss) and None


def gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    model.zero_grad()
    (model(x).float() - y.float()).square().mean().backward()
    return flat([p.grad for p in model.parameters() if p.grad is not None])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--largest", type=float, default=50.0)
    args = parser.parse_args()
    print(f"torch {torch.__version__}, rho = {RHO}, bfloat16 weights")
    print("parameters   who                 radius   cosine   relative error of the gradient")
    for millions in [m for m in (0.01, 1.0, 10.0, 50.0) if m <= args.largest]:
        model = network(millions).bfloat16()
        x = torch.randn(16, model[0].in_features).bfloat16()
        y = torch.randn(16, model[-1].out_features).bfloat16()
        wide = copy.deepcopy(model).float()
        _, _, perturbed = observe(wide, ours(wide), x.float(), y.float())
        base = gradient(model, x, y)
        for name, make in (("pytorch-optimizer", peer), ("flatmin", ours)):
            twin = copy.deepcopy(model)
            twin.zero_grad()
            w, moved, left = observe(twin, make(twin), x, y)
            eps = moved - w
            cosine = torch.nn.functional.cosine_similarity(eps.double(), base.double(), 0)
            error = (left - perturbed).norm() / perturbed.norm()
            print(f"{sum(p.numel() for p in model.parameters()) / 1e6:8.2f} M   {name:18s} {eps.double().norm():7.4f}  "
                  f"{cosine:7.4f}   {error:7.3f}")


if __name__ == "__main__":
    main()
