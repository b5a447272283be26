"""The documentation's table is generated from the presets and cannot drift from them."""

import importlib.util
import math
import re
from pathlib import Path

import pytest
import torch

from flatmin import presets
from flatmin.ascent.sharpener import Sharpener

DOCS = Path(__file__).parents[2] / "docs"
_SPEC = importlib.util.spec_from_file_location("make_methods", DOCS / "make_methods.py")
make_methods = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(make_methods)


def test_the_page_is_what_the_presets_say():
    assert (DOCS / "methods.md").read_text() == make_methods.markdown(), "run: make docs"


def test_every_preset_has_a_row_with_a_paper():
    rows = make_methods.rows()
    assert [r[0].strip("`") for r in rows] == list(presets.PRESETS) and len(rows) >= 16
    assert all(re.search(r"arxiv\.org/abs/\d{4}\.\d{5}", r[-1]) for r in rows)


@pytest.mark.parametrize(("name", "cost"), [("sam", 2.0), ("looksam", 1.2), ("momentum_sam", 1.0), ("random_sam", 1.0),
                                            ("gsam", 2.0), ("functional_sam", 2.0)])
def test_costs(name, cost):
    assert float(next(r for r in make_methods.rows() if r[0] == f"`{name}`")[6]) == pytest.approx(cost)


def test_every_preset_returns_a_sharpener_and_takes_its_options():
    for name, preset in presets.PRESETS.items():
        model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2))
        made = preset(model, optimizer=torch.optim.AdamW(model.parameters()), scope="micro_batch", replay=False)
        assert isinstance(made, Sharpener) and made.scope == "micro_batch" and not made.replay, name


@pytest.mark.parametrize("name", sorted(set(presets.PRESETS) - {"looksam", "gsam", "friendly_sam", "unnormalized_sam"}))
def test_parts_made_by_hand_have_the_numbers_of_the_preset(name):
    """Apart from the presets that pass numbers of their own."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2))
    made = presets.PRESETS[name](model, optimizer=torch.optim.AdamW(model.parameters()))
    for part in (made.direction, made.rule, made.cadence):
        assert part == type(part)()
    last = made.last        # and nothing is known before the first step
    assert last.passes == 0 and not last.skipped and math.isnan(last.loss) and math.isnan(last.radius)
