"""Claim: certified eigenpairs and traces cost less than uncertified ones elsewhere.

    OMP_NUM_THREADS=1 python benchmarks/spectrum.py [--rounds 5] [--k 1 10 50] [--models mlp transformer conv]

On trained nets, in one process, on one thread: the top k eigenpairs of the Hessian to a residual of 1e-3 of the largest
eigenvalue, recomputed here for everybody, and the trace to a standard error of 5 %. hessian-eigenthings is given the
number of iterations it needs (found beforehand, with re-orthogonalisation on), ``eigsh`` the loosest tolerance of
1e-1 ... 1e-5 that reaches the residual, PyHessian likewise. Each round runs everybody in turn; ratios are of CPU times
within a round, so that a busy machine disturbs all alike; the table shows the median and the range over rounds.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from flatmin.curvature import CurvatureOperator, Hessian, eigenpairs, trace
from flatmin.objective import Objective

TARGET = 1e-3


class Attention(nn.Module):
    """One layer of causal self-attention and an MLP, with residual connections."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, c = x.shape
        q, k, v = self.qkv(self.norms[0](x)).view(b, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        a = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(a.transpose(1, 2).reshape(b, t, c))
        return x + self.mlp(self.norms[1](x))


class Transformer(nn.Module):
    def __init__(self, vocabulary: int = 32, width: int = 64, layers: int = 2):
        super().__init__()
        self.embed, self.place = nn.Embedding(vocabulary, width), nn.Parameter(torch.randn(32, width) * 0.02)
        self.layers = nn.Sequential(*[Attention(width, 4) for _ in range(layers)])
        self.head = nn.Linear(width, vocabulary)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(self.embed(x) + self.place[:x.shape[1]])).transpose(1, 2)


def problem(name: str) -> tuple[nn.Module, nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    """A net trained for a while, its loss and one batch."""
    torch.manual_seed(0)
    if name == "mlp":
        model: nn.Module = nn.Sequential(nn.Linear(128, 256), nn.Tanh(), nn.Linear(256, 256), nn.Tanh(),
                                         nn.Linear(256, 10))
        x = torch.randn(256, 128)
        y = (x[:, :10] + 0.5 * torch.randn(256, 10)).argmax(1)
    elif name == "conv":
        model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
                              nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
                              nn.Flatten(), nn.Linear(32 * 16, 10))
        x = torch.randn(128, 3, 16, 16)
        y = (x.mean((2, 3)) @ torch.randn(3, 10)).argmax(1)
    else:
        model = Transformer()
        x = torch.randint(0, 32, (16, 32))
        y = (x + x.roll(1, 1)) % 32
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    loss = nn.CrossEntropyLoss()
    for _ in range(60):
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()
    return model.eval(), loss, (x, y)


Run = Callable[[], tuple[torch.Tensor, torch.Tensor]]
"""→ eigenvalues (k,) and eigenvectors (k, n)."""


def residual(H: CurvatureOperator, values: torch.Tensor, x: torch.Tensor) -> float:
    """The largest ‖Hv − λv‖ / ‖v‖ over |λ₁|."""
    with H.session():
        rows = [float((H @ v - value * v).norm() / v.norm())
                for value, v in zip(values.tolist(), x.float(), strict=True)]
    return max(rows) / float(values.abs().max())


def eigenthings(model: nn.Module, loss: nn.Module, batch: Any, H: CurvatureOperator, k: int,
                start: int) -> tuple[str, Run]:
    import hessian_eigenthings as he

    def run(steps: int) -> tuple[torch.Tensor, torch.Tensor]:
        operator = he.HessianOperator(model, [batch], he.supervised_loss(loss))
        found = he.lanczos(operator, k=k, max_iter=steps, which="LA", seed=0, reorthogonalize=True)
        return found.eigenvalues, found.eigenvectors

    steps = max(k + 1, start * 3 // 4)
    while residual(H, *run(steps)) > TARGET:
        steps += max(1, steps // 40)
    return f"hessian-eigenthings ({steps} steps)", lambda: run(steps)


def curvlinops(model: nn.Module, loss: nn.Module, batch: Any, H: CurvatureOperator, k: int) -> tuple[str, Run]:
    from curvlinops import HessianLinearOperator
    from scipy.sparse.linalg import eigsh

    def run(tol: float) -> tuple[torch.Tensor, torch.Tensor]:
        operator = HessianLinearOperator(model, loss, [p for p in model.parameters() if p.requires_grad], [batch],
                                         check_deterministic=False)
        values, x = eigsh(operator.to_scipy(), k=k, which="LA", tol=tol)
        return torch.as_tensor(values), torch.as_tensor(x.T.copy())

    tol = 1e-1
    while residual(H, *run(tol)) > TARGET:
        tol /= 10
    return f"curvlinops + eigsh (tol {tol:g})", lambda: run(tol)


def pyhessian(model: nn.Module, loss: nn.Module, batch: Any, H: CurvatureOperator, k: int) -> tuple[str, Run]:
    from pyhessian import hessian

    def run(tol: float) -> tuple[torch.Tensor, torch.Tensor]:
        found = hessian(model, loss, data=batch, cuda=False)
        values, x = found.eigenvalues(maxIter=1000, tol=tol, top_n=k)
        return torch.tensor(values), torch.stack([torch.cat([t.reshape(-1) for t in v]) for v in x]).detach()

    tol = 1e-2
    while residual(H, *run(tol)) > TARGET:
        tol /= 10
        if tol < 1e-8:
            raise ArithmeticError("never reaches the residual")
    return f"PyHessian (tol {tol:g})", lambda: run(tol)


def clock(run: Callable[[], Any]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def show(title: str, runs: dict[str, Callable[[], Any]], rounds: int, ours: str) -> None:
    """Time everybody in turn and print a table of seconds and of ratios to the fastest peer."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(clock(run))
    peers = [name for name in runs if not name.startswith("flatmin")]
    best = min(peers, key=lambda name: statistics.median(times[name])) if peers else ours
    print(f"\n{title}\n{'':44}{'seconds':>9}{'ratio to the best peer':>26}")
    for name, rows in times.items():
        ratios = [a / b for a, b in zip(rows, times[best], strict=True)]
        print(f"{name:44}{statistics.median(rows):9.3f}{statistics.median(ratios):12.2f}  "
              f"({min(ratios):.2f} to {max(ratios):.2f})")


def spectra(name: str, ks: list[int], rounds: int, slow: bool) -> None:
    model, loss, batch = problem(name)
    H = Hessian(Objective(model, loss, batch))
    for k in ks:
        ours = eigenpairs(H, k, tol=TARGET, certify=False)
        assert residual(H, ours.eigenvalues, ours.eigenvectors) <= TARGET
        runs: dict[str, Callable[[], Any]] = {
            f"flatmin ({ours.matvecs} products)": lambda k=k: eigenpairs(H, k, tol=TARGET, certify=False),
            # a new objective each time: what was checked once would not be checked again
            "flatmin, certified": lambda k=k: eigenpairs(Hessian(Objective(model, loss, batch)), k, tol=TARGET)}
        makers: list[Callable[[], tuple[str, Run]]] = [
            lambda k=k, m=ours.matvecs: eigenthings(model, loss, batch, H, k, m),
            lambda k=k: curvlinops(model, loss, batch, H, k)]
        if k == 1 or slow:
            makers.append(lambda k=k: pyhessian(model, loss, batch, H, k))
        for make in makers:
            try:
                label, run = make()
                runs[label] = run
            except Exception as error:  # a peer that cannot do it is reported, not fatal
                print(f"  [{getattr(error, '__class__', type(error)).__name__}: {str(error).splitlines()[0][:90]}]")
        show(f"{name}: top {k} of {H.size} parameters", runs, rounds, next(iter(runs)))


def traces(name: str, rounds: int) -> None:
    """The trace to a 5 % standard error; peers get the number of probes that ours found to be needed."""
    import hessian_eigenthings as he
    from curvlinops import HessianLinearOperator, hutchinson_trace, hutchpp_trace

    model, loss, batch = problem(name)
    H = Hessian(Objective(model, loss, batch))
    plain = trace(H, rtol=0.05)
    clever = trace(H, rtol=0.05, method="hutch++")
    params = [p for p in model.parameters() if p.requires_grad]
    other = HessianLinearOperator(model, loss, params, [batch], check_deterministic=False)
    peer = he.HessianOperator(model, [batch], he.supervised_loss(loss))
    probes, pp = plain.matvecs, 3 * -(-clever.matvecs // 3)
    show(f"{name}: trace {plain} / {clever}", {
        f"flatmin, Hutchinson ({probes} products)": lambda: trace(H, rtol=0.05),
        f"flatmin, Hutch++ ({clever.matvecs} products)": lambda: trace(H, rtol=0.05, method="hutch++"),
        f"hessian-eigenthings, Hutchinson ({probes})": lambda: he.hutchinson(peer, num_samples=probes, seed=0),
        f"curvlinops, Hutchinson ({probes})": lambda: hutchinson_trace(other, num_matvecs=probes),
        f"curvlinops, Hutch++ ({pp})": lambda: hutchpp_trace(other, num_matvecs=pp)}, rounds, "flatmin")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--k", type=int, nargs="+", default=[1, 10, 50])
    parser.add_argument("--models", nargs="+", default=["mlp", "transformer", "conv"])
    parser.add_argument("--pyhessian", action="store_true", help="also for k > 1, where it takes minutes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}, 1 thread, "
          f"{options.rounds} rounds, {platform.platform()}")
    for name in options.models:
        if name == "transformer":       # peers need attention that can be differentiated twice, for everybody alike
            from torch.nn.attention import SDPBackend, sdpa_kernel

            with sdpa_kernel(SDPBackend.MATH):
                spectra(name, options.k, options.rounds, options.pyhessian)
                traces(name, options.rounds)
        else:
            spectra(name, options.k, options.rounds, options.pyhessian)
            traces(name, options.rounds)


if __name__ == "__main__":
    main()
