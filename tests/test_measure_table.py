"""The one table of measures: its costs, invariance and randomness hold, and whoever offers measures reads it."""

import importlib.util
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

from flatmin import Objective, measures, tensorscope
from flatmin.jobs import measure as job
from flatmin.jobs.measures import MEASURES
from flatmin.measures import ALL, METRICS, Options
from flatmin.sharpness import compare, monitor

ROOT = Path(__file__).parents[1]
NUMBERS = [m.name for m in ALL if m.room != "landscape" and m.name not in ("spectrum", "density", "agreement")]
pytestmark = pytest.mark.filterwarnings("ignore::flatmin.sharpness.SharpnessWarning")


def network(rescaled=False):
    """A ReLU network; ``rescaled``, the same function with each unit's weights multiplied and divided."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    if rescaled:
        factor = torch.linspace(0.3, 3, 6)
        with torch.no_grad():
            model[0].weight.mul_(factor[:, None])
            model[0].bias.mul_(factor)
            model[2].weight.div_(factor)
    return model


def objective(model, n=64):
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(n, 4, generator=generator), torch.randint(3, (n,), generator=generator)
    return Objective(model, nn.CrossEntropyLoss(), data)


def options(model, **kw):
    return Options(rho=0.05, optimizer=torch.optim.SGD(model.parameters(), 0.1), **kw)


def value(name, model, **kw):
    return float(MEASURES[name](objective(model), options(model, **kw)))


def test_the_page_is_what_the_table_says():
    spec = importlib.util.spec_from_file_location("make_measures", ROOT / "docs" / "make_measures.py")
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    assert made.PAGE.read_text(encoding="utf-8") == made.page(), "run: python docs/make_measures.py"
    assert made.page().count("\n| `") == len(ALL) >= 20


def test_the_table_needs_no_torch():
    code = ("import importlib.util, sys; spec = importlib.util.spec_from_file_location('table', sys.argv[1]); "
            "table = importlib.util.module_from_spec(spec); sys.modules['table'] = table; "
            "spec.loader.exec_module(table); print(len(table.METRICS), 'torch' in sys.modules)")
    path = str(ROOT / "src" / "flatmin" / "measures.py")
    out = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True).stdout
    assert out.split() == [str(len(METRICS)), "False"]


def test_every_row_has_a_function_and_a_label_and_who_offers_it_reads_the_table():
    assert list(MEASURES.keys() ^ {m.name for m in ALL}) == [] and len({m.label for m in ALL}) == len(ALL)
    assert all(MEASURES[m.name].function is not None for m in ALL)
    assert list(job.METRICS) == list(METRICS) == list(measures.offered("measure"))
    assert measures.find_metrics(measures.DEFAULT_METRICS) == measures.DEFAULT_METRICS.split(",")
    assert tuple(monitor.COSTS) == measures.offered("monitor")
    assert tuple(compare(*[objective(network())] * 2).rows) == measures.offered("compare")
    own = set(tensorscope.UNDER_OTHER_NAMES)
    assert own < set(METRICS)
    assert set(METRICS) - own == set(tensorscope.SHARPNESS_METHODS) - {"hessian", "sam", "adaptive"}
    with pytest.raises(AssertionError, match="worst_case"):
        measures.bind("sharpness", {"one_step": lambda o, a: None})
    with pytest.raises(AssertionError, match="its package"):
        METRICS["trace"](objective(network()))


@pytest.mark.parametrize("name", NUMBERS)
def test_what_is_called_invariant_is_and_the_rest_is_not(name):
    a, b = (value(name, network(rescaled)) for rescaled in (False, True))
    same = math.isclose(a, b, rel_tol=1e-6)
    assert same == MEASURES[name].invariant, f"{name}: {a} and {b}"


@pytest.mark.parametrize("name", [name for name in NUMBERS if name != "trace"])
def test_what_is_called_random_depends_on_the_seed_and_the_rest_does_not(name):
    """At several radii: an ascent from a random start is not the best everywhere. Eigenvalues to their tolerance.

    The network is too wide for one product a coordinate, which would be exact.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 24), nn.Tanh(), nn.Linear(24, 3))
    o, quick = objective(model), name == "normalized_flatness"
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    found = [[float(MEASURES[name](o, Options(rho=rho, seed=seed, quick=quick, optimizer=optimizer)))
              for seed in (0, 1)] for rho in (0.05, 1.0, 3.0, 10.0)]
    if MEASURES[name].random:
        assert any(a != b for a, b in found), found
    else:
        assert all(math.isclose(a, b, rel_tol=1e-3) for a, b in found), found


def passes(name, model, **kw):
    """F, B and H of a measurement of an objective that has been checked, as the table writes them."""
    o, seen = objective(model), Counter()
    o.value()
    with o.session(check=True):
        pass
    evaluate = Objective.evaluate

    def counted(self, *args, gradient=False, **settings):
        share = sum(len(b[0]) for b in self.data) / 64      # a measure of a quarter of the data is a quarter of a pass
        seen["F"] += share
        seen["B"] += share * gradient
        return evaluate(self, *args, gradient=gradient, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Objective, "evaluate", counted)
        MEASURES[name](o, options(model, **kw))
    return seen


@pytest.mark.parametrize("name,quick,forward,backward", [
    ("one_step", True, 2, 1), ("first_order", False, 1, 1), ("worst_case", False, 63, 63), ("worst_case", True, 11, 11),
    ("adaptive_worst_case", True, 11, 11), ("average_case", False, 101, 0), ("average_case", True, 21, 0),
    ("largest_random", False, 21, 0), ("m_sharpness", False, 11, 11), ("surface", False, 2603, 0),
    ("line", False, 159, 0), ("agreement", False, 46, 43)])
def test_costs_are_what_is_paid(name, quick, forward, backward):
    model = network()
    MEASURES[name](objective(model), options(model, quick=quick))       # whatever happens at the first call of all
    said = MEASURES[name].cost_for("monitor" if quick else "measure")
    terms = [t for t in ("46F + 43B", "2F + B", "F + B", f"{forward} (F + B)", f"{forward} F") if t in said]
    assert terms, said
    found = passes(name, model, quick=quick)
    # the check of the Hessian, on a few samples, is a small part of a pass
    assert found["F"] == pytest.approx(forward, abs=0.2) and found["B"] == pytest.approx(backward, abs=0.2)
