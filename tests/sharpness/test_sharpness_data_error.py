"""The standard error over batches of a sharpness value: against many data sets drawn from one distribution."""

import math

import pytest
import torch
from torch import nn

from flatmin import Objective
from flatmin.sharpness import (
    average_case,
    critical_sharpness,
    m_sharpness,
    one_step,
    worst_case,
)
from flatmin.sharpness import (
    sharpness_warnings as cautions,
)
from problems import Vector

pytestmark = pytest.mark.filterwarnings("ignore::flatmin.sharpness.SharpnessWarning")

WIDTH, TRUE = 3, torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)


def draw(seed, batches=12, sizes=(6, 10, 14)):
    """Linear regression with noise, in batches of unequal size."""
    g = torch.Generator().manual_seed(seed)
    out = []
    for i in range(batches):
        x = torch.randn(sizes[i % len(sizes)], WIDTH, generator=g, dtype=torch.float64) * torch.tensor([2.0, 1.0, 0.5])
        out.append((x, x @ TRUE[:, None] + 0.5 * torch.randn(len(x), 1, generator=g, dtype=torch.float64)))
    return out


def regression(data, loss=None):
    model = nn.Linear(WIDTH, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(TRUE + 1.0)
    return Objective(model, nn.MSELoss() if loss is None else loss, data, check=False)


GIVEN = [torch.tensor([[1.0, 0.5, -0.2]], dtype=torch.float64)]
MEASURES = {
    "one_step": lambda o: one_step(o, 0.3, second_order=False),
    "worst_case": lambda o: worst_case(o, 0.3, iterations=3, restarts=0),
    "average_case": lambda o: average_case(o, 0.3, samples=6),
    "critical_sharpness": lambda o: critical_sharpness(o, GIVEN, lr=0.1, rtol=1e-3),
    "m_sharpness": lambda o: m_sharpness(o, 6, 0.3, measure="one_step"),
}


def by_hand(before, after, n):
    d = [b - a for a, b in zip(before, after, strict=True)]
    mean = sum(x * k for x, k in zip(d, n, strict=True)) / sum(n)
    return math.sqrt(len(d) / (len(d) - 1) * sum((k * (x - mean)) ** 2 for x, k in zip(d, n, strict=True))) / sum(n)


@pytest.mark.parametrize("name", MEASURES)
def test_the_error_covers_what_another_data_set_gives(name):
    """The truth is the value on very many data. Two standard errors over 12 batches cover it in about 93 of 100 cases
    (t with 11 degrees of freedom); of 50, at least 39 (four standard deviations below), and not by a wide margin."""
    truth = MEASURES[name](regression(draw(10**6, 20, (200,)))).value
    found = [MEASURES[name](regression(draw(seed))) for seed in range(50)]
    inside = sum(abs(s.value - truth) < 2 * s.data_stderr for s in found)
    spread = torch.tensor([s.value for s in found]).std()
    stated = torch.tensor([s.data_stderr for s in found]).square().mean().sqrt()
    assert inside >= 39, inside
    assert 0.7 < float(stated / spread) < 1.4, (float(stated), float(spread))


@pytest.mark.parametrize("loss", [None, nn.MSELoss(reduction="sum")])
def test_the_formula(loss):
    o = regression(draw(0, 7), loss)
    s = one_step(o, 0.3, second_order=False)
    g = o.gradient()[0]
    before, after, n = [], [], []
    for x, y in o.data:
        for w, losses in ((o.model.weight, before), (o.model.weight + 0.3 * g / g.norm(), after)):
            losses.append(float((x @ w.T - y).square().mean().detach()))
        n.append(len(x))
    expected = by_hand(before, after, n)
    if loss is not None:
        d = torch.tensor([(b - a) * k for a, b, k in zip(before, after, n, strict=True)])
        expected = float(d.std() * len(d) ** 0.5)
    assert s.data_stderr == pytest.approx(expected, rel=1e-10)


def test_too_few_batches_have_none():
    for name, measure in MEASURES.items():
        if name != "m_sharpness":       # whose chunks are the draws
            assert math.isnan(measure(regression(draw(0, 4))).data_stderr)
            assert measure(regression(draw(0, 5))).data_stderr > 0
    assert math.isnan(m_sharpness(regression(draw(0, 2, (4, 4))), 4, 0.3, measure="one_step").data_stderr)


def test_a_value_that_the_data_do_not_determine_is_warned_of():
    """Curvatures of either sign, as many of one as of the other."""
    signs = [torch.tensor([[a]]) for a in (1.0, -1.0, 1.1, -0.8, 0.7, -1.2)]
    objective = Objective(Vector([1.0]), lambda w, a: 3 + (a * w**2).mean(), signs, forward=lambda m, a: m())
    with pytest.warns(cautions.SmallBatchWarning, match="standard error over batches"):
        s = average_case(objective, 0.1, samples=4)
    assert 2 * s.data_stderr > abs(s.value)


def test_tokens_are_the_unit_of_a_causal_language_model():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=11, n_embd=8, n_layer=1, n_head=2, n_positions=8)
    model = transformers.GPT2LMHeadModel(config)
    ids = torch.randint(11, (2, 4))
    with pytest.warns(cautions.SmallBatchWarning, match="measured on 6 tokens"):
        one_step(Objective(model, None, {"input_ids": ids, "labels": ids}), second_order=False)
