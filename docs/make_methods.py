"""Write ``docs/methods.md``, the table of presets, from the presets themselves: ``make docs``."""

from __future__ import annotations

import inspect
from pathlib import Path

import torch
from torch import nn

from flatmin import Sharpener
from flatmin.ascent.presets import CATALOGUE, Preset

PAGE = Path(__file__).with_name("methods.md")

HEAD = """# The SAM family

Generated from `flatmin.presets` by `make docs`; every method is a point in the product of a direction (where is
uphill?), a rule (which gradient is kept?) and a cadence (when is it paid for?). Cost is in plain training steps, a
backward counted as two forwards; what is measured stands in the README.

| preset | ε and gradient | direction | rule | cadence | defaults | cost | paper |
| --- | --- | --- | --- | --- | --- | --- | --- |
"""

FOOT = """
Each takes every option of `flatmin.Sharpener` besides its own: `scope`, `optimizer`, `scaler`, `backward`, `groups`,
`rho` (a number or a schedule), `replay`, `offload`, `perturbed_norm`. Parts that no preset names, `LogitOnly`,
`RandomFraction` by entry, `WithWeightDecay`, `WarmStart`, p = 1 and p = ∞ among them, are in `flatmin.ascent`.

SAMPa (arXiv:2410.10683) is not here: it needs two devices to save anything, and its update mixes gradients taken around
an extrapolated SGD step, which is no gradient that another optimizer could be handed.
"""

PLAIN = 3.0  # a forward, and a backward counted as two


def cost(sharpener: Sharpener) -> float:
    """Work of a step in plain steps."""
    rule = sharpener.rule
    passes = [rule.second] if sharpener.takes_one_pass else [rule.first, rule.second, rule.third]
    full = sum(one.cost for one in passes if one is not None)
    paid = sum(map(sharpener.cadence, range(100))) / 100  # the share of steps with a second pass
    return paid * full / PLAIN + 1 - paid


def row(preset: Preset) -> tuple[str, ...]:
    """The cells of one preset."""
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    sharpener = preset.build(model, optimizer=torch.optim.AdamW(model.parameters()))
    parameters = inspect.signature(preset.build).parameters.values()
    own = [p for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in ("optimizer", "seed")]
    link = f"[arXiv:{preset.arxiv}](https://arxiv.org/abs/{preset.arxiv})"
    return (f"`{preset.name}`", preset.formula, type(sharpener.direction).__name__, type(sharpener.rule).__name__,
            type(sharpener.cadence).__name__, ", ".join(f"{p.name}={p.default!r}" for p in own),
            f"{cost(sharpener):.2g}", ", ".join(filter(None, (preset.authors, link, preset.equation))))


def rows() -> list[tuple[str, ...]]:
    """One row a preset, in the order of the table."""
    return [row(preset) for preset in CATALOGUE.values()]


def markdown() -> str:
    """The page."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in rows()]
    return HEAD + "\n".join(lines) + "\n" + FOOT


if __name__ == "__main__":
    PAGE.write_text(markdown(), encoding="utf-8")
