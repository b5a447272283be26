"""Calibration against slow twins, torchmetrics, closed forms and its own coverage.

The twins catch a wrong bin or weight, torchmetrics a shared misreading of the definition (it differs at confidence 1,
where it is known to be wrong), labels drawn from softmax(z / T*) a temperature that minimises something else, and the
simulations an interval that is only as wide as the noise it forgets.
"""

import math

import pytest
import torch
from torch.nn import functional as F

from flatmin.generalization import calibration as c
from flatmin.generalization import intervals, predictions
from flatmin.training.metrics import classification

ERRORS = [c.expected_calibration_error, c.adaptive_calibration_error, c.maximum_calibration_error,
          c.smooth_calibration_error]


def drawn(n=400, classes=4, temperature=1.7, seed=0, scale=2.0):
    """Logits, and labels drawn from softmax(z / T)."""
    g = torch.Generator().manual_seed(seed)
    z = scale * torch.randn(n, classes, generator=g)
    return z, torch.multinomial((z / temperature).softmax(-1), 1, generator=g)[:, 0]


def slow_gaps(confidence, correct, edges):
    """(count, |accuracy − confidence|) of each bin (lo, hi], by looking at every sample."""
    out = []
    for i, (lo, hi) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
        inside = [(p, a) for p, a in zip(confidence.tolist(), correct.tolist(), strict=True)
                  if lo < p <= hi or i == 0 and p == lo]
        if inside:
            out.append((len(inside), abs(sum(a for _, a in inside) - sum(p for p, _ in inside)) / len(inside)))
    return out


@pytest.mark.parametrize("bins", [1, 7, 15, 100])
def test_binned_errors_equal_the_slow_twin(bins):
    z, y = drawn()
    top = c.top_label(z, y)
    gaps = slow_gaps(top.confidence, top.correct, [i / bins for i in range(bins + 1)])
    expected = sum(n * gap for n, gap in gaps) / len(y)
    assert float(c.expected_calibration_error(top.confidence, top.correct, bins)) == pytest.approx(expected, abs=1e-14)
    largest = c.maximum_calibration_error(top.confidence, top.correct, bins)
    assert float(largest) == pytest.approx(max(gap for _, gap in gaps), abs=1e-14)


def test_bins_are_open_below_and_closed_above():
    """A confidence of 0.07 in 100 bins belongs to (0.06, 0.07], which 0.07 · 100 = 7.000000000000001 would miss."""
    p = torch.arange(0, 101, dtype=torch.float64) / 100
    which = c._equal_bins(p, 100)
    assert which.tolist() == [0, *range(100)]


def test_same_value_as_the_recipes_metric():
    z, y = drawn(1000)
    top = c.top_label(z, y)
    assert float(c.expected_calibration_error(top.confidence, top.correct, resamples=0)) == \
        pytest.approx(classification(z, y)["ece"], abs=1e-14)


def test_torchmetrics_agrees_except_at_one():
    tm = pytest.importorskip("torchmetrics.functional.classification")
    g = torch.Generator().manual_seed(0)
    p = torch.rand(500, generator=g) * 0.98 + 0.01
    y = torch.rand(500, generator=g) < p
    theirs = tm.binary_calibration_error(p, y.long(), n_bins=15, norm="l1", validate_args=False)
    # torchmetrics' binary error is of p itself against y, which is our (confidence, correct)
    assert float(c.expected_calibration_error(p, y, resamples=0)) == pytest.approx(float(theirs), abs=1e-6)
    theirs = tm.binary_calibration_error(p, y.long(), n_bins=15, norm="max", validate_args=False)
    assert float(c.maximum_calibration_error(p, y, resamples=0)) == pytest.approx(float(theirs), abs=1e-6)

    sure, y = torch.tensor([1.0, 1.0, 0.95, 0.95]), torch.tensor([0, 0, 1, 1])
    assert float(c.expected_calibration_error(sure, y, resamples=0)) == pytest.approx(abs(2 - 3.9) / 4)
    theirs = float(tm.binary_calibration_error(sure, y, n_bins=15))
    assert theirs == pytest.approx((2 * 1 + 2 * 0.05) / 4)          # 1.0 in a bin of its own: known to be wrong


def test_adaptive_bins_hold_equally_many_and_keep_ties_together():
    z, y = drawn(300)
    top = c.top_label(z, y)
    order = top.confidence.argsort()
    expected = sum(abs(float((top.correct.double() - top.confidence)[part].sum())) for part in order.split(20)) / 300
    assert float(c.adaptive_calibration_error(top.confidence, top.correct, 15)) == pytest.approx(expected, abs=1e-14)

    p, right = torch.tensor([0.5] * 6 + [0.9] * 2), torch.tensor([1, 1, 1, 0, 0, 0, 1, 1])
    again = torch.randperm(8)
    a, b = (float(c.adaptive_calibration_error(p[i], right[i], 4)) for i in (torch.arange(8), again))
    assert a == b == pytest.approx(2 * 0.1 / 8)


def test_classwise_error_equals_the_slow_twin():
    z, y = drawn(200, 3)
    p, expected = z.softmax(-1), 0.0
    for k in range(3):
        expected += sum(n * gap for n, gap in slow_gaps(p[:, k], (y == k).double(), [i / 10 for i in range(11)])) / 200
    found = c.classwise_calibration_error(z, y, 10)
    assert float(found) == pytest.approx(expected / 3, abs=1e-14)
    assert found.interval[0] <= found.value <= found.interval[1]


def test_smooth_error_equals_direct_kernel_sums():
    """Reflected Gaussian kernels summed one by one, where the library uses a cosine series on a grid.

    Gaps of both signs: with one sign the integral is the mean gap, whatever the kernel.
    """
    g = torch.Generator().manual_seed(0)
    confidence, correct = torch.rand(150, generator=g), torch.rand(150, generator=g) < 0.5
    found = c.smooth_calibration_error(confidence, correct, resamples=0)
    sigma = found.settings["sigma"]
    t = torch.linspace(0, 1, 4001)
    r = torch.zeros_like(t)
    for p, a in zip(confidence.tolist(), correct.tolist(), strict=True):
        for image in [s * p + 2 * k for k in range(-3, 4) for s in (1, -1)]:
            r += (a - p) * torch.exp(-0.5 * ((t - image) / sigma) ** 2) / sigma / math.sqrt(2 * math.pi) / 150
    assert float(found) == pytest.approx(float(torch.trapezoid(r.abs(), t)), rel=1e-4)
    assert float(found) == pytest.approx(sigma, rel=1e-3)      # the fixed point
    assert float(found) > 1.5 * abs(float((correct.double() - confidence).mean()))


def test_smooth_error_is_continuous_where_the_binned_one_jumps():
    right = torch.tensor([1, 0] * 50)
    below, above = (torch.full((100,), 0.6 + d) + torch.tensor([1e-9, -1e-9] * 50) * s for d, s in ((0, 0), (0, 1)))
    jump = [abs(float(f(below, right, resamples=0)) - float(f(above, right, resamples=0)))
            for f in (c.expected_calibration_error, c.smooth_calibration_error)]
    assert jump[0] > 0.3 and jump[1] < 1e-6


def test_brier_score_and_its_parts():
    z, y = drawn(300, 3)
    p = z.softmax(-1)
    found = c.brier(z, y)
    assert float(found) == pytest.approx(float((p - F.one_hot(y, 3)).square().sum(-1).mean()), abs=1e-12)
    assert found.reliability - found.resolution + found.uncertainty + found.within_bins == pytest.approx(found.value)
    share = torch.bincount(y, minlength=3) / 300
    assert found.uncertainty == pytest.approx(float((share * (1 - share)).sum()))


def test_brier_parts_are_exact_where_a_bin_holds_one_forecast():
    """Murphy's decomposition without a remainder: two forecasts, worked out by hand."""
    p = torch.tensor([[0.75, 0.25]] * 4 + [[0.5, 0.5]] * 4)
    y = torch.tensor([0, 0, 1, 1, 0, 0, 0, 1])
    found = c.brier(p.log(), y)
    assert found.within_bins == pytest.approx(0, abs=1e-14)
    assert found.reliability == pytest.approx(2 * 0.0625)                   # (0.5 − 0.75)², (0.75 − 0.5)²
    assert found.resolution == pytest.approx(2 * 0.125**2)
    assert found.uncertainty == pytest.approx(2 * 0.625 * 0.375)


def test_nll_and_standard_error():
    z, y = drawn(250)
    losses = F.cross_entropy(z, y, reduction="none")
    found = c.nll(z, y)
    assert float(found) == pytest.approx(float(losses.mean()))
    assert found.stderr == pytest.approx(float(losses.std()) / math.sqrt(250))


def test_area_under_the_risk_coverage_curve():
    p, right = torch.tensor([0.9, 0.8, 0.7, 0.6]), torch.tensor([1, 0, 1, 0])
    found = c.risk_coverage(p, right)
    assert found.risk.tolist() == pytest.approx([0, 1 / 2, 1 / 3, 1 / 2])
    assert float(found) == pytest.approx((0 + 1 / 2 + 1 / 3 + 1 / 2) / 4)
    assert found.optimal == pytest.approx((0 + 0 + 1 / 3 + 1 / 2) / 4)
    assert found.error == 0.5


def test_equal_confidences_count_in_random_order():
    p, right = torch.tensor([0.9, 0.5, 0.5, 0.5, 0.2]), torch.tensor([1, 1, 0, 0, 1])
    areas = []
    for order in torch.tensor([[0, 1, 2, 3, 4], [0, 2, 1, 3, 4], [0, 2, 3, 1, 4]]):
        wrong = 1 - right[order].double()
        areas.append(float((wrong.cumsum(0) / torch.arange(1, 6)).mean()))
    assert float(c.risk_coverage(p, right)) == pytest.approx(sum(areas) / 3)
    assert float(c.risk_coverage(torch.full((5,), 0.5), right)) == pytest.approx(0.4)


# --- temperature ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("truth", [0.3, 1.0, 3.0])
def test_labels_drawn_at_a_temperature_recover_it(truth):
    z, y = drawn(20_000, 5, truth)
    found = c.fit_temperature(z, y)
    assert abs(found.value - truth) < 4 * found.stderr and found.stderr < 0.05 * truth
    assert found.nll <= found.nll_before


def test_temperature_is_the_minimum_that_a_search_finds():
    z, y = drawn(200, 3, 2.5, seed=3)
    found = c.fit_temperature(z, y)
    scan = torch.linspace(0.9, 1.1, 2001) * found.value
    losses = torch.stack([F.cross_entropy(z / t, y) for t in scan])
    assert found.value == pytest.approx(float(scan[losses.argmin()]), rel=1e-4)
    assert found.nll == pytest.approx(float(losses.min()), abs=1e-9)
    gradient = torch.func.grad(lambda b: F.cross_entropy(z * b, y))(torch.tensor(1 / found.value))
    assert abs(float(gradient)) < 1e-12


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_newton_is_safe_far_from_one(scale):
    z, y = drawn(500, 4, 1.0)
    assert c.fit_temperature(z * scale, y).value == pytest.approx(scale * c.fit_temperature(z, y).value, rel=1e-6)


def test_standard_error_of_the_temperature_is_that_over_data_sets():
    found = [c.fit_temperature(*drawn(300, 4, 1.5, seed=s)) for s in range(150)]
    values = torch.tensor([float(f) for f in found])
    assert sum(f.stderr for f in found) / 150 == pytest.approx(float(values.std()), rel=0.2)
    covered = sum(f.interval[0] <= 1.5 <= f.interval[1] for f in found) / 150
    assert 0.89 <= covered <= 0.995


def test_temperature_without_a_minimum_is_refused():
    z = torch.randn(50, 3)
    with pytest.raises(ValueError, match="every target has the largest logit"):
        c.fit_temperature(z, z.argmax(-1))
    with pytest.raises(ValueError, match="not above the average"):
        c.fit_temperature(z, z.argmin(-1))


def test_temperature_with_impossible_classes():
    z, y = drawn(300, 3)
    wide = torch.cat([z, torch.full((300, 1), -math.inf)], -1)
    assert float(c.fit_temperature(wide, y)) == pytest.approx(float(c.fit_temperature(z, y)))


# --- tokens -----------------------------------------------------------------------------------------------------------

def tokens(sequences=30, length=20, seed=0):
    z, y = drawn(sequences * length, 5, seed=seed)
    z, y = z.view(sequences, length, 5), y.view(sequences, length)
    y[:, :2] = -100
    y[3] = -100
    return z, y


def test_ignored_positions_are_left_out():
    z, y = tokens()
    kept = y != -100
    for f in (c.nll, c.brier, c.classwise_calibration_error, c.fit_temperature):
        assert float(f(z, y)) == pytest.approx(float(f(z[kept], y[kept])), abs=1e-12)
    top = c.top_label(z, y)
    assert len(top.confidence) == int(kept.sum()) and len(top.groups.unique()) == 29
    assert c.nll(z, y).samples == int(kept.sum()) and c.nll(z, y).groups == 29


def test_tokens_of_a_sequence_are_resampled_together():
    """Every token nine times over changes no standard error, where tokens on their own would shrink it by 3."""
    z, y = drawn(60, 4)
    p = c.top_label(z, y)
    again = c.top_label(z[:, None].expand(-1, 9, -1), y[:, None].expand(-1, 9))
    for f in (*ERRORS, c.risk_coverage):
        one = f(p.confidence, p.correct)
        nine = f(again.confidence, again.correct, groups=again.groups)
        loose = f(again.confidence, again.correct)
        # the area sees nine equal confidences in a row where there was one
        assert nine.stderr == pytest.approx(one.stderr, rel=0.02 if f is c.risk_coverage else 1e-6)
        assert nine.stderr > 1.7 * loose.stderr
    assert c.nll(z[:, None].expand(-1, 9, -1), y[:, None].expand(-1, 9)).stderr == pytest.approx(c.nll(z, y).stderr)


# --- intervals --------------------------------------------------------------------------------------------------------

def population(truth, bins=15):
    """Σ|gap| for confidences uniform on (0.4, 1) that are right with probability truth(p)."""
    p = torch.linspace(0.4, 1, 60_001)[:-1] + 0.5e-5
    gap = torch.zeros(bins).index_add_(0, c._equal_bins(p, bins), truth(p) - p) / len(p)
    return float(gap.abs().sum())


@pytest.mark.parametrize("truth", [lambda p: p, lambda p: p - 0.1, lambda p: p + 0.1 * torch.sin(12 * p)],
                         ids=["calibrated", "overconfident", "mixed"])
def test_intervals_of_the_expected_error_hold_the_truth(truth):
    """At least as often as they say; the plain percentile bootstrap holds 0 in none of the calibrated cases."""
    g, target, covered = torch.Generator().manual_seed(1), population(truth), 0
    for i in range(80):
        p = 0.4 + 0.6 * torch.rand(400, generator=g)
        found = c.expected_calibration_error(p, torch.rand(400, generator=g) < truth(p), seed=i, resamples=150)
        covered += found.interval[0] <= target <= found.interval[1]
        assert found.value > 0
    assert covered >= 72


def test_chance_is_what_a_calibrated_model_shows():
    g = torch.Generator().manual_seed(1)
    found = []
    for i in range(40):
        p = 0.4 + 0.6 * torch.rand(500, generator=g)
        found.append(c.expected_calibration_error(p, torch.rand(500, generator=g) < p, seed=i, resamples=100))
    mean = sum(map(float, found)) / 40
    assert mean > 0.03
    assert sum(f.chance for f in found) / 40 == pytest.approx(mean, rel=0.1)


def test_interval_shrinks_as_one_over_root_n():
    width = []
    for n in (1000, 16_000):
        g = torch.Generator().manual_seed(0)
        p = 0.5 + 0.4 * torch.rand(n, generator=g)
        found = c.expected_calibration_error(p, torch.rand(n, generator=g) < p - 0.2)
        width.append(found.interval[1] - found.interval[0])
    assert width[0] / width[1] == pytest.approx(4, rel=0.3)


def test_reliability_table():
    g = torch.Generator().manual_seed(0)
    p = torch.rand(2000, generator=g)
    table = c.reliability(p, torch.rand(2000, generator=g) < p, 10)
    assert table.count.sum() == 2000 and "(0.1000, 0.2000]" in str(table)
    held = (table.low <= table.confidence) & (table.confidence <= table.high)
    assert int(held.sum()) >= 8
    few = c.reliability(torch.tensor([0.95, 0.96, 0.15]), torch.tensor([1, 1, 0]), 10)
    assert few.high[9] == 1 and few.low[9] == pytest.approx(0.025 ** 0.5)         # exact binomial, two right of two
    assert few.low[1] == 0 and few.accuracy[4].isnan()


def test_summary_holds_every_number():
    z, y = drawn(200)
    found = c.summary(z, y, resamples=20)
    assert float(found.accuracy) == pytest.approx(float((z.argmax(-1) == y).double().mean()))
    assert "smooth error" in str(found) and "nan" not in str(found)


def test_same_seed_same_interval():
    z, y = drawn(100)
    p = c.top_label(z, y)
    for f in ERRORS:
        assert f(p.confidence, p.correct, seed=4).interval == f(p.confidence, p.correct, seed=4).interval
        assert f(p.confidence, p.correct, seed=4).interval != f(p.confidence, p.correct, seed=5).interval


@pytest.mark.parametrize("call, message", [
    (lambda: c.expected_calibration_error(torch.tensor([]), torch.tensor([])), "at least one sample"),
    (lambda: c.expected_calibration_error(torch.tensor([1.2]), torch.tensor([1])), "not logits"),
    (lambda: c.expected_calibration_error(torch.tensor([math.nan]), torch.tensor([1])), "probabilities in"),
    (lambda: c.expected_calibration_error(torch.tensor([0.5]), torch.tensor([2])), "True and False"),
    (lambda: c.expected_calibration_error(torch.tensor([0.5]), torch.tensor([1, 0])), "one outcome a sample"),
    (lambda: c.expected_calibration_error(torch.tensor([0.5]), torch.tensor([1]), 0), "bins"),
    (lambda: c.expected_calibration_error(torch.tensor([0.5]), torch.tensor([1]), level=1.0), "level"),
    (lambda: c.expected_calibration_error(torch.tensor([0.5]), torch.tensor([1]), resamples=1), "resamples"),
    (lambda: c.adaptive_calibration_error(torch.tensor([0.5]), torch.tensor([1]), 2), "as many samples"),
    (lambda: c.nll(torch.randn(3, 4), torch.tensor([0, 1, 4])), "classes 0 to 3"),
    (lambda: c.nll(torch.randn(3, 4), torch.full((3,), -100)), "every target is ignore_index"),
    (lambda: c.nll(torch.randn(2, 4, 3), torch.zeros(2, 3).long()), "classes come last"),
])
def test_errors_say_what_is_needed(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_large_vocabulary_is_read_in_pieces(monkeypatch):
    z, y = tokens()
    whole = [float(f(z, y)) for f in (c.nll, c.brier, c.classwise_calibration_error, c.fit_temperature)]
    for module in (predictions, intervals):
        monkeypatch.setattr(module, "CHUNK", 64)
    assert [float(f(z, y)) for f in (c.nll, c.brier, c.classwise_calibration_error, c.fit_temperature)] == \
        pytest.approx(whole, abs=1e-12)


def test_figures():
    pytest.importorskip("matplotlib").use("agg")
    z, y = drawn(100)
    p = c.top_label(z, y)
    assert c.reliability(p.confidence, p.correct).plot().lines
    assert c.risk_coverage(p.confidence, p.correct, resamples=0).plot().lines
