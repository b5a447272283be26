"""The table of presets, read off the presets themselves: ``python -m flatmin.ascent.catalogue > docs/methods.md``."""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
from torch import nn

from .presets import PRESETS
from .sharpener import Sharpener

_HEAD = """# The SAM family

Generated from `flatmin.presets` by `python -m flatmin.ascent.catalogue`; every method is a point in the product of a
direction (where is uphill?), a rule (which gradient is kept?) and a cadence (when is it paid for?). Cost is in plain
training steps, a backward counted as two forwards; what is measured stands in the README.

| preset | ε and gradient | direction | rule | cadence | defaults | cost | paper |
| --- | --- | --- | --- | --- | --- | --- | --- |
"""

_FOOT = """
Each takes every option of `flatmin.Sharpener` besides its own: `scope`, `optimizer`, `scaler`, `backward`, `groups`,
`rho` (a number or a schedule), `replay`, `offload`, `perturbed_norm`. Parts that no preset names, `LogitOnly`,
`RandomFraction` by entry, `WithWeightDecay`, `WarmStart`, p = 1 and p = ∞ among them, are in `flatmin.ascent`.

SAMPa (arXiv:2410.10683) is not here: it needs two devices to save anything, and its update mixes gradients taken around
an extrapolated SGD step, which is no gradient that another optimizer could be handed.
"""


def cost(sharpener: Sharpener) -> float:
    """Work of a step in plain steps, F + B = 3 F."""
    if not sharpener.direction.needs_gradient and sharpener.rule.second == "loss":
        full = 3.0
    elif sharpener.rule.second == "selected":
        full = 3 + 1 + 3 * getattr(sharpener.rule, "gamma", 1.0)  # a forward without gradients finds the samples
    else:
        full = 6.0 if sharpener.rule.second != "logit" else 7.0
    k = getattr(sharpener.cadence, "k", 1)
    return (full + 3.0 * (k - 1)) / (3.0 * k)


def rows() -> list[tuple[str, ...]]:
    """One row a preset, in the order of the table."""
    out = []
    for name, preset in PRESETS.items():
        model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
        sharpener = preset(model, optimizer=torch.optim.AdamW(model.parameters()))
        text = " ".join((inspect.getdoc(preset) or "").split())
        formula, paper = re.match(r"[^:]+: (.*?) \(([^()]*arXiv[^()]*)\)", text).groups()  # pyright: ignore
        parameters = inspect.signature(preset).parameters.values()
        own = [p for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in ("optimizer", "seed")]
        defaults = ", ".join(f"{p.name}={p.default!r}" for p in own)
        out.append((f"`{name}`", formula, _short(sharpener.direction), _short(sharpener.rule),
                    _short(sharpener.cadence), defaults, f"{cost(sharpener):.2g}", _link(paper)))
    return out


def markdown() -> str:
    """The page."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows()]
    return _HEAD + "\n".join(lines) + "\n" + _FOOT


def _short(part: Any) -> str:
    return type(part).__name__


def _link(paper: str) -> str:
    return re.sub(r"arXiv:(\d+\.\d+)", r"[arXiv:\1](https://arxiv.org/abs/\1)", paper)


if __name__ == "__main__":
    print(markdown(), end="")
