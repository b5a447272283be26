"""Pictures: what is drawn is what was measured; the page needs nothing and believes nothing."""

import dataclasses
import json
import re

import matplotlib
import pytest
import torch

from flatmin import Objective
from flatmin.landscape import line, surface
from problems import RolesNet, batch, build, loss_fn

matplotlib.use("Agg")


@pytest.fixture
def found():
    models = [build(RolesNet, seed) for seed in range(3)]
    return surface(Objective(models[0], loss_fn, batch(0)), 5, models=models, trajectory=models)


def test_contours_have_true_axes(found):
    ax = found.plot()
    assert ax.get_xlim() == (pytest.approx(float(found.x[0])), pytest.approx(float(found.x[-1])))
    assert "displacement" in ax.get_xlabel() and "relative" in found.plot(relative=True).get_xlabel()
    constant = dataclasses.replace(found, values=torch.ones(5, 5))
    none = dataclasses.replace(found, values=torch.full((5, 5), float("nan")))
    wide = dataclasses.replace(found, values=found.values * torch.logspace(0, 5, 5)[:, None])
    for s in (constant, none, wide, surface(Objective(build(RolesNet), loss_fn, batch(0)), 1)):
        s.plot()
        assert s.to_html()
    matplotlib.pyplot.close("all")


def test_lines_are_drawn_with_their_band():
    objective = Objective(build(RolesNet), loss_fn, batch(0))
    ax = line(objective, "filter", steps=3, draws=3).plot()
    assert len(ax.lines) == 1 and len(ax.collections) == 1
    matplotlib.pyplot.close("all")


def test_the_page_is_alone_and_escaped(found):
    values = found.values.clone()
    values[1, 2], values[3, 3] = float("nan"), float("inf")
    page = dataclasses.replace(found, values=values).to_html('</script><img src=x onerror="1"> & more')
    assert "<img" not in page and "2 of 25 points" in page
    assert not re.search(r"https?:|src=|@import|fetch\(|XMLHttpRequest|innerHTML", page.replace("src=x", ""))
    inside = json.loads(re.search(r'<script type="application/json">(.*?)</script>', page, re.S)[1])
    assert inside["v"][1][2] is None and inside["v"][3][3] is None
    assert inside["v"][0][0] == pytest.approx(float(found.values[0, 0]), rel=1e-6)
    assert len(inside["models"]) == 3 and len(inside["path"]) == 3
    assert page.count("<script") == page.count("</script>") == 2
