"""Where training settles: at 2/η for gradient descent, far below it for SAM.

Full-batch training of a small tanh network on scikit-learn's digits. Gradient descent raises the largest Hessian
eigenvalue until it meets the edge of stability 2/η (Cohen et al., arXiv:2103.00065) and stays there. SAM has an edge of
its own, which falls with the gradient (Agarwala & Dauphin, arXiv:2309.12488):

    λ = ‖g‖/(2ρ) · (√(1 + 8ρ/(η‖g‖)) − 1)

    python examples/edge_of_stability.py [--steps 2000] [--out edge_of_stability.svg]
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, field

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from flatmin import Objective, presets
from flatmin.curvature import Hessian, eigenpairs

LR = 0.3


@dataclass
class Run:
    """What was seen along one training."""

    rho: float
    steps: list[int] = field(default_factory=list)
    sharpness: list[float] = field(default_factory=list)
    edge: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)


def half_squares(z: Tensor, y: Tensor) -> Tensor:
    """½ Σ_k (z − y)², mean over examples: the factor matters when comparing with 2/η."""
    return 0.5 * (z - y).square().sum(1).mean()


def sam_edge(gradient_norm: float, rho: float, lr: float = LR) -> float:
    """The largest stable eigenvalue; 2/η for ρ = 0."""
    if rho == 0:
        return 2 / lr
    return gradient_norm / (2 * rho) * (math.sqrt(1 + 8 * rho / (lr * gradient_norm)) - 1)


def train(rho: float, steps: int, every: int) -> Run:
    """Full-batch (S)AM with plain gradient descent; λ₁ every so many steps."""
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images[:1000], dtype=torch.float32) / 16
    y = nn.functional.one_hot(torch.tensor(labels[:1000]).long(), 10).float()
    x = x - x.mean(0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 50), nn.Tanh(), nn.Linear(50, 50), nn.Tanh(), nn.Linear(50, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    sharpener = presets.sam(model, rho=rho)
    objective = Objective(model, half_squares, [(x, y)])
    run = Run(rho)
    for step in range(steps):
        loss = sharpener.backward(lambda: half_squares(model(x), y))
        if step % every == 0:
            norm = sharpener.last.gradient_norm
            run.steps.append(step)
            run.loss.append(float(loss))
            run.sharpness.append(eigenpairs(Hessian(objective), k=1, tol=1e-2).largest)
            run.edge.append(sam_edge(norm, rho) if rho else 2 / LR)
        optimizer.step()
        optimizer.zero_grad()
    return run


def plot(runs: list[Run], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, len(runs), figsize=(4.2 * len(runs), 3.4), sharey=True, layout="constrained")
    for ax, run in zip(axes, runs, strict=True):
        ax.plot(run.steps, run.sharpness, label="λ₁")
        ax.plot(run.steps, run.edge, "--", color="0.4", label="2/η" if run.rho == 0 else "SAM-edge")
        ax.set_title("gradient descent" if run.rho == 0 else f"SAM, ρ = {run.rho:g}")
        ax.set_xlabel("step")
        ax.set_yscale("log")
        ax.legend(frameon=False)
    axes[0].set_ylabel("largest Hessian eigenvalue")
    fig.savefig(path)


def main(argv: list[str] | None = None) -> list[Run]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--rhos", default="0,0.05,0.2")
    parser.add_argument("--out", default="edge_of_stability.svg")
    args = parser.parse_args(argv)
    runs = [train(float(rho), args.steps, args.every) for rho in args.rhos.split(",")]
    for run in runs:
        late = run.sharpness[-max(1, len(run.sharpness) // 4):]
        edge = run.edge[-len(late):]
        print(f"rho {run.rho:4g}: loss {run.loss[-1]:.4f}, largest eigenvalue {sum(late) / len(late):6.2f} over the "
              f"last quarter (edge {sum(edge) / len(edge):6.2f}, 2/lr {2 / LR:.2f})")
    plot(runs, args.out)
    return runs


if __name__ == "__main__":
    main()
