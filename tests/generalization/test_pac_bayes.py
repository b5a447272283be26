"""Bounds against closed forms, SciPy, the published numbers, and the rate at which they may fail.

A wrong divergence passes every test of the shape of a bound, so the direction is held by numbers and by sampling; a
wrong constant shows in simulated data sets with a known risk; a wrong inverse in SciPy's root and in limits.
"""

import inspect
import math

import pytest
import torch

from flatmin.generalization import pac_bayes as pb


def kl_of(q, p):
    return sum(a * math.log(a / b) for a, b in ((q, p), (1 - q, 1 - p)) if a > 0)


def test_gaussian_kl_equals_torch_distributions():
    w, s, v, p = torch.randn(7), torch.rand(7) + 0.1, torch.randn(7), torch.rand(7) + 0.2
    normal = torch.distributions.Normal
    truth = torch.distributions.kl_divergence(normal(w, s.sqrt()), normal(v, p.sqrt())).sum()
    found = pb.gaussian_kl(w, s, v, p)
    assert float(found) == pytest.approx(float(truth), abs=1e-12)
    assert found.spread + found.shift == pytest.approx(found.value) and found.bits == pytest.approx(
        found.value / math.log(2))
    assert float(pb.gaussian_kl(v, p, w, s)) != pytest.approx(float(truth), rel=0.01)       # not symmetric


def test_gaussian_kl_is_the_expectation_under_the_posterior():
    """E_Q ln(Q/P) by sampling: KL(P‖Q), which the bounds do not hold for, is another number."""
    w, s, v, p = torch.tensor([0.3]), torch.tensor([0.04]), torch.tensor([0.0]), torch.tensor([1.0])
    normal = torch.distributions.Normal
    x = w + s.sqrt() * torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    ratio = normal(w, s.sqrt()).log_prob(x) - normal(v, p.sqrt()).log_prob(x)
    assert abs(float(pb.gaussian_kl(w, s, v, p)) - float(ratio.mean())) < 4 * float(ratio.std()) / 200_000**0.5


def test_gaussian_kl_takes_numbers_tensors_and_lists():
    w = [torch.randn(2, 3), torch.randn(4)]
    whole = torch.cat([t.flatten() for t in w])
    truth = float(pb.gaussian_kl(whole, torch.full((10,), 0.1), torch.zeros(10), torch.full((10,), 2.0)))
    assert float(pb.gaussian_kl(w, 0.1, 0.0, 2.0)) == pytest.approx(truth)
    assert float(pb.gaussian_kl(w, [torch.tensor(0.1), torch.full((4,), 0.1)], 0.0, [2.0, 2.0])) == pytest.approx(truth)
    assert float(pb.gaussian_kl(0.0, torch.full((1000,), 10.0), 0.0, 1.0)) == pytest.approx(3348.7, abs=0.1)
    assert float(pb.gaussian_kl(w, [t.square() + 1 for t in w], w, [t.square() + 1 for t in w])) == pytest.approx(0)
    for wrong in (lambda: pb.gaussian_kl(w, [torch.ones(2, 3)] * 3, 0.0, 1.0),
                  lambda: pb.gaussian_kl(torch.zeros(3, 1), torch.ones(3), 0.0, 1.0)):
        with pytest.raises(ValueError, match="mean, variance, prior_mean and prior_variance have"):
            wrong()
    for variance in (0.0, -1.0, math.inf, torch.tensor([1.0, 0.0])):
        with pytest.raises(ValueError, match="must be positive and finite"):
            pb.gaussian_kl(torch.zeros(2), variance, 0.0, 1.0)


@pytest.mark.parametrize("q", [1e-12, 1e-4, 0.03, 0.3, 0.5, 0.9, 1 - 1e-9])
@pytest.mark.parametrize("c", [1e-12, 1e-6, 1e-3, 0.1, 1.0, 20.0])
def test_kl_inverse_equals_the_root_of_scipy(q, c):
    optimize = pytest.importorskip("scipy.optimize")
    mp = pytest.importorskip("mpmath").mp
    with mp.workdps(60):
        def kl(p):
            p = mp.mpf(p)
            return mp.mpf(q) * mp.log(mp.mpf(q) / p) + (1 - mp.mpf(q)) * mp.log((1 - mp.mpf(q)) / (1 - p)) - c

        found = pb.kl_inverse(q, c).value
        top = 1 - mp.mpf(10) ** -50
        low, high = mp.mpf(q), top
        for _ in range(250):
            middle = (low + high) / 2
            low, high = (middle, high) if kl(middle) <= 0 else (low, middle)
        assert abs(found - low) <= 4e-16 * (1 + 0 * found) + 1e-12 * float(low - q)
    if 1e-4 <= q <= 0.9 and 1e-3 <= c <= 1:
        assert found == pytest.approx(optimize.brentq(lambda p: kl_of(q, p) - c, q, 1 - 1e-15, xtol=1e-15), abs=1e-10)


def test_kl_inverse_at_the_ends():
    assert pb.kl_inverse(0.0, 0.0).value == 0 and pb.kl_inverse(1.0, 0.3).value == 1
    assert pb.kl_inverse(0.2, 0.0).value == 0.2 and pb.kl_inverse(0.2, math.inf).value == 1
    assert pb.kl_inverse(0.0, 1e-300).value == pytest.approx(1e-300)
    assert pb.kl_inverse(0.0, 3.0).value == pytest.approx(1 - math.exp(-3))
    tiny = 1e-20        # q + √(2 q (1 − q) c), where kl by logarithms of p is nothing but rounding
    assert pb.kl_inverse(1e-6, tiny).value - 1e-6 == pytest.approx(math.sqrt(2e-6 * tiny), rel=1e-3)
    values = [pb.kl_inverse(0.1, c).value for c in (0, 1e-9, 1e-4, 0.1, 1, 5, 40)]
    assert values == sorted(values) and values[-1] <= 1


@pytest.mark.parametrize("q, c, message", [(-0.1, 0.1, "must lie in"), (1.1, 0.1, "must lie in"),
                                           (math.nan, 0.1, "must lie in"), (0.1, -1e-9, "must not be negative")])
def test_kl_inverse_refuses(q, c, message):
    with pytest.raises(ValueError, match=message):
        pb.kl_inverse(q, c)


def test_bounds_by_hand():
    rest = math.log(2 * math.sqrt(1000) / 0.05)
    assert float(pb.mcallester(0.1, 50.0, 1000, 0.05)) == pytest.approx(0.1 + math.sqrt((50 + rest) / 2000))
    found = pb.seeger(0.1, 50.0, 1000, 0.05)
    assert kl_of(0.1, found.value) == pytest.approx((50 + rest) / 1000, rel=1e-12)
    assert float(pb.seeger(0.1, pb.gaussian_kl(torch.ones(3), 1.0, 0.0, 1.0), 1000)) == pytest.approx(
        float(pb.seeger(0.1, 1.5, 1000)))


def test_tensors_are_numbers_and_equal_distributions_have_no_divergence():
    found = pb.mcallester(torch.tensor(0.1), torch.tensor(50.0), 1000, 0.05)
    assert type(found.value) is float and found == pb.mcallester(float(torch.tensor(0.1)), 50.0, 1000, 0.05)
    s = torch.rand(1000) + 0.01
    assert 0 <= pb.gaussian_kl(s, s * (1 + 1e-16), s, s).value < 1e-12


def test_seeger_is_never_above_mcallester_and_both_grow_with_the_divergence():
    for q in (0.0, 0.01, 0.3, 0.9):
        rows = [(pb.seeger(q, kl, 500), pb.mcallester(q, kl, 500)) for kl in (0.0, 10.0, 100.0, 1e4)]
        assert all(float(a) <= float(b) + 1e-12 and float(a) <= 1 for a, b in rows)
        assert all(float(a[i]) <= float(b[i]) for a, b in zip(rows[:-1], rows[1:], strict=True) for i in (0, 1))


@pytest.mark.parametrize("k, value", [(100, 0.16), (1000, 0.47), (10_000, 1.46), (36_500_000, 88)])
def test_theorem_of_the_sam_paper(k, value):
    found = pb.sam_theorem(0.0, 10.0, 0.05, k, 50_000, 0.05)
    assert float(found) == pytest.approx(value, rel=0.03)
    assert found.vacuous == (value > 1) and ("vacuous" in str(found)) == found.vacuous


def test_call_of_the_seed():
    """The call as its users wrote it, with the divergence in the direction of the theorem."""
    assert list(inspect.signature(pb.compute_pac_bayes_bound).parameters)[:6] == [
        "train_loss", "hessian_trace", "n_samples", "n_params", "prior_variance", "delta"]
    found = pb.compute_pac_bayes_bound(0.1, 100.0, 50_000, 1000)
    assert found.kl == pytest.approx(1.81e3, rel=2e-3) and float(found) == pytest.approx(0.235, abs=5e-4)
    assert pb.compute_pac_bayes_bound(0.1, 0.1, 50_000, 1000).kl == pytest.approx(3349, abs=1)
    assert pb.compute_pac_bayes_bound(0.1, 1e4, 50_000, 1000).value < 1        # 7.2 with the reversed divergence
    s = 1 / (50_000 * 100.0 / 1000 + 1)
    laplace = pb.compute_pac_bayes_bound(0.1, 100.0, 50_000, 1000, posterior="laplace", distance=2.0)
    assert laplace.kl == pytest.approx(float(pb.gaussian_kl(
        torch.full((1000,), 2 / math.sqrt(1000)), s, 0.0, 1.0)))
    with pytest.raises(ValueError, match="not negative"):
        pb.compute_pac_bayes_bound(0.1, -1.0, 100, 10)
    with pytest.raises(ValueError, match="loss in"):
        pb.compute_pac_bayes_bound(1.7, 1.0, 100, 10)


@pytest.mark.parametrize("bound", [pb.mcallester, pb.seeger])
@pytest.mark.parametrize("arguments, message", [
    ((1.2, 1.0, 100, 0.05), r"loss in \[0, 1\]"), ((-0.1, 1.0, 100, 0.05), r"loss in \[0, 1\]"),
    ((math.nan, 1.0, 100, 0.05), r"loss in \[0, 1\]"), ((0.1, -1.0, 100, 0.05), "never negative"),
    ((0.1, 1.0, 0, 0.05), "at least 1"), ((0.1, 1.0, 100, 0.0), r"in \(0, 1\)"), ((0.1, 1.0, 100, 1.0), r"in \(0, 1\)"),
])
def test_bounds_say_what_the_theorem_needs(bound, arguments, message):
    with pytest.raises(ValueError, match=message):
        bound(*arguments)


def test_vacuous_is_marked_and_printed():
    assert pb.mcallester(0.5, 1e6, 100).vacuous and "vacuous" in str(pb.mcallester(0.5, 1e6, 100))
    assert not pb.seeger(0.1, 1.0, 1000).vacuous and "vacuous" not in str(pb.seeger(0.1, 1.0, 1000))
    assert pb.seeger(1.0, 1.0, 100).vacuous


# --- bounds hold at their stated rate ---------------------------------------------------------------------------------

DATA_SETS = 1500


def finite_class(n, seed, risks, data_sets=DATA_SETS):
    """Empirical risks (data sets, hypotheses) of independent hypotheses with known risks."""
    g = torch.Generator().manual_seed(seed)
    return torch.binomial(torch.full((data_sets, len(risks)), float(n)), risks.expand(data_sets, -1), generator=g) / n


@pytest.mark.parametrize("n, temperature", [(10, 3.0), (50, 10.0), (200, 1e6)])
def test_bounds_hold_on_a_finite_class(n, temperature):
    """Q is chosen from the data (Gibbs, up to the empirical minimum); KL against a uniform prior is a finite sum."""
    risks = torch.linspace(0.3, 0.6, 40)
    seen = finite_class(n, 0, risks)
    Q = torch.softmax(-temperature * seen, -1)
    kl = (Q * (Q.clamp(min=1e-300) * len(risks)).log()).sum(-1)
    empirical, truth = (Q * seen).sum(-1), (Q * risks).sum(-1)
    delta, failed = 0.1, {"mcallester": 0, "seeger": 0}
    for e, k, t in zip(empirical.tolist(), kl.tolist(), truth.tolist(), strict=True):
        failed["mcallester"] += pb.mcallester(e, max(k, 0.0), n, delta).value < t
        failed["seeger"] += pb.seeger(e, max(k, 0.0), n, delta).value < t
    assert all(count / DATA_SETS <= delta for count in failed.values())


def test_the_divergence_is_what_makes_it_a_bound():
    """4000 hypotheses of risk ½, of which the best looking is taken: without its ln 4000 the bound mostly fails."""
    n = 200
    best = finite_class(n, 0, torch.full((4000,), 0.5), 200).amin(1).tolist()
    for bound in (pb.seeger, pb.mcallester):
        assert sum(float(bound(e, math.log(4000), n, 0.1)) < 0.5 for e in best) <= 20
        assert sum(float(bound(e, 0.0, n, 0.1)) < 0.5 for e in best) > 120


def test_constant_is_not_larger_than_needed():
    """With one hypothesis (KL = 0) Seeger's bound fails rarely, and one with 2√n left out too often to be a bound."""
    n, delta = 50, 0.2
    seen = finite_class(n, 1, torch.tensor([0.3]))[:, 0].tolist()
    failed = sum(pb.seeger(e, 0.0, n, delta).value < 0.3 for e in seen) / DATA_SETS
    assert failed <= delta
    chernoff = sum(pb.kl_inverse(e, math.log(1 / delta) / n).value < 0.3 for e in seen) / DATA_SETS
    assert failed < chernoff <= delta
    assert sum(pb.kl_inverse(e, 0.2 * math.log(1 / delta) / n).value < 0.3 for e in seen) / DATA_SETS > delta
