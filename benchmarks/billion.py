"""The largest Hessian eigenvalue of a GPT-shaped model that barely fits: 1.5 billion float32 parameters in 24 GB.

    python benchmarks/billion.py --parameters 1.5B --folder billion

GPT-2's shapes, tied embeddings and initialisation, random tokens, the mean cross-entropy. Matvecs are differences of
gradients, of which each parameter's is freed as soon as it is added; the weights and one result are in memory,
the Lanczos basis and the exact weights in files. Called again with the same arguments after a kill, it resumes.

Prints one line of JSON at the end: the eigenvalue, its residual by a fresh matvec that shares no work with the run,
the error of that matvec (against a second one with twice the step), time, matvecs and peak memory: ``peak_rss`` as
the kernel counts it, which includes pages of the files that it can drop at any time, and ``peak_anonymous`` without.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import resource
import shutil
import sys
import tempfile
import threading
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatmin import Objective
from flatmin.curvature import Hessian, eigenpairs

SHAPES = {"20M": (256, 8, 4), "50M": (512, 8, 8), "124M": (768, 12, 12), "350M": (1024, 24, 16), "774M": (1280, 36, 20),
          "1B": (1536, 32, 24), "1.3B": (1600, 40, 25), "1.5B": (1600, 48, 25)}   # width, layers, heads
VOCABULARY, CONTEXT = 50257, 1024


class Block(nn.Module):
    """Attention and an MLP, each after a layer norm and beside a skip connection."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, width = x.shape
        q, k, v = (z.view(b, t, self.heads, -1).transpose(1, 2) for z in self.qkv(self.before(x)).chunk(3, -1))
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(a.transpose(1, 2).reshape(b, t, width))
        return x + self.down(F.gelu(self.up(self.between(x)), approximate="tanh"))


class GPT(nn.Module):
    """GPT-2 with tied embeddings; classes along dimension 1, as ``cross_entropy`` wants them."""

    def __init__(self, width: int, layers: int, heads: int):
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.places.weight[:tokens.shape[1]]
        return (self.norm(self.blocks(x)) @ self.tokens.weight.T).transpose(1, 2)


@torch.no_grad()
def gpt(name: str, seed: int = 0) -> GPT:
    """A model at GPT-2's initialisation, made without any other copy of the weights."""
    width, layers, heads = SHAPES[name]
    with torch.device("meta"):
        model = GPT(width, layers, heads).float()
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    for key, p in model.named_parameters():
        if p.dim() == 1:
            p.fill_(float("weight" in key))
        else:
            inner = key.endswith(("out.weight", "down.weight"))
            p.normal_(0, 0.02 / (math.sqrt(2 * layers) if inner else 1), generator=generator)
    return model


class Peak(threading.Thread):
    """The largest anonymous memory of this process, looked at ten times a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes = 0

    def run(self) -> None:
        while True:
            with open("/proc/self/status") as f:
                lines = dict(line.split(":", 1) for line in f)
            self.bytes = max(self.bytes, 1024 * int(lines["RssAnon"].split()[0]))
            time.sleep(0.1)


class Line:
    """Progress with the largest remaining time."""

    def __init__(self, most: int):
        self.start, self.first, self.most = time.monotonic(), None, most

    def __call__(self, done: int, text: str) -> None:
        now = time.monotonic()
        self.first = done - 1 if self.first is None else self.first
        pace = (now - self.start) / (done - self.first)
        print(f"{now - self.start:7.0f} s: matvec {done}, {pace:.0f} s each, {text}; at most "
              f"{(self.most - done) * pace / 60:.0f} min left", file=sys.stderr, flush=True)


def largest(name: str, folder: str, *, tol: float, batch: int, length: int, basis: int | None, most: int) -> dict:
    """Measure, as a dictionary of plain numbers."""
    start, peak = time.monotonic(), Peak()
    peak.start()
    model = gpt(name)
    n = sum(p.numel() for p in model.parameters())
    fitting = shutil.disk_usage(folder).free // (4 * n) - 5     # the exact weights, a second result, the answer, slack
    checkpoint = os.path.join(folder, f"billion-{name}.pt")
    if os.path.exists(f"{checkpoint}.basis"):
        fitting += os.stat(f"{checkpoint}.basis").st_blocks * 512 // (4 * n)
    size = basis or max(min(20, fitting), 4)
    print(f"{n / 1e6:.1f} M parameters, {4 * n / 2**30:.2f} GiB a vector, basis of {size} in {folder}", file=sys.stderr)
    tokens = torch.randint(0, VOCABULARY, (batch, length + 1), generator=torch.Generator().manual_seed(1))
    objective = Objective(model, F.cross_entropy, (tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()))
    H = Hessian(objective, product="finite_difference", place="disk", folder=folder)
    made = time.monotonic()
    spectrum = eigenpairs(H, 1, tol=tol, basis=size, place="disk", folder=folder, max_matvecs=most,
                          progress=Line(most), checkpoint=checkpoint)
    residual = float(spectrum.residuals[0])
    return {"parameters": n, "eigenvalue": spectrum.largest, "residual": residual,
            "relative_residual": residual / abs(spectrum.largest), "certified": spectrum.certified,
            "converged": bool(spectrum.converged[0]), "product_error": H.error, "matvecs": spectrum.matvecs,
            "seconds": round(time.monotonic() - made, 1), "seconds_for_the_model": round(made - start, 1),
            "peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
            "peak_anonymous_gib": peak.bytes / 2**30, "weights_gib": 4 * n / 2**30, "basis": size,
            "tokens": batch * length, "threads": torch.get_num_threads(), "torch": torch.__version__,
            "machine": platform.machine()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--parameters", choices=list(SHAPES), default="50M")
    parser.add_argument("--folder", default=os.path.join(tempfile.gettempdir(), "flatmin-billion"))
    parser.add_argument("--tol", type=float, default=0.05, help="residual relative to the eigenvalue")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=16)
    parser.add_argument("--basis", type=int, help="vectors on disk (default: 20, or what the disk holds)")
    parser.add_argument("--most", type=int, default=100, help="matvecs at most")
    parser.add_argument("--threads", type=int, default=2)
    a = parser.parse_args()
    os.makedirs(a.folder, exist_ok=True)
    torch.set_num_threads(a.threads)
    print(json.dumps(largest(a.parameters, a.folder, tol=a.tol, batch=a.batch, length=a.length, basis=a.basis,
                             most=a.most)))


if __name__ == "__main__":
    main()
