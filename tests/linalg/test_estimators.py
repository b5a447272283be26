"""Random estimators, by convergence to the truth and by how often their stated interval holds it."""

import math

import pytest
import torch
from scipy import stats

from flatmin.curvature import Hessian, Matrix, condition_number, diagonal, frobenius, spectral_density, trace
from flatmin.linalg.confidence import quantile
from nets import classification, only_samples, symmetric

SPECTRA = {
    "outliers": torch.cat([torch.linspace(50, 100, 5), torch.rand(195, generator=torch.Generator().manual_seed(0))]),
    "indefinite": torch.randn(200, generator=torch.Generator().manual_seed(1)) + 0.4,
    "power law": 1 / torch.arange(1, 201) ** 2.0,
}


@pytest.fixture(name="only_samples")
def _only_samples(monkeypatch):
    only_samples(monkeypatch)


@pytest.mark.usefixtures("only_samples")
@pytest.mark.parametrize("method", ("hutchinson", "hutch++", "xtrace"))
@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.filterwarnings("ignore")
def test_the_interval_holds_the_trace(name, method):
    a = Matrix(symmetric(SPECTRA[name]))
    truth = float(SPECTRA[name].double().sum())
    held, errors = 0, []
    for seed in range(60):
        found = trace(a, rtol=0.1, confidence=0.95, method=method, seed=seed)
        held += found.interval[0] <= truth <= found.interval[1]
        errors.append((found.value - truth) / truth)
    # 57 of 60 are expected; 48 would happen once in a thousand times if it were 90 %
    assert held >= (52 if method == "hutchinson" else 48), held
    assert abs(sum(errors) / 60) < 3 * 0.06 / 60**0.5 + 0.01


@pytest.mark.usefixtures("only_samples")
def test_the_interval_holds_the_trace_where_few_products_suffice():
    """Of 68 % intervals; zᵀAz is skewed, so that 65 % are all that as many samples, fixed before, would hold."""
    e = torch.arange(1, 401, dtype=torch.float64) ** -2
    a, truth = Matrix(symmetric(e)), float(e.sum())
    found = [trace(a, rtol=0.2, seed=seed).interval for seed in range(300)]
    assert 0.62 <= sum(low <= truth <= high for low, high in found) / 300 <= 0.75


@pytest.mark.usefixtures("only_samples")
def test_more_probes_less_error():
    a, truth = Matrix(symmetric(SPECTRA["indefinite"])), float(SPECTRA["indefinite"].double().sum())
    for rtol in (0.2, 0.05, 0.02):
        found = trace(a, rtol=rtol)
        assert found.converged and found.stderr <= rtol * abs(found.value)
        assert abs(found.value - truth) < 4 * found.stderr
        assert 0.2 < found.predicted / found.matvecs < 5


def test_the_budget_is_kept_and_a_shortfall_said():
    a = Matrix(symmetric(SPECTRA["indefinite"]))
    for method in ("hutchinson", "hutch++", "xtrace"):
        with pytest.warns(UserWarning, match="would take about"):
            found = trace(a, rtol=1e-4, max_matvecs=40, method=method)
        assert found.matvecs <= 40 < found.predicted and not found.converged


@pytest.mark.usefixtures("only_samples")
def test_clever_methods_need_fewer_products():
    a = Matrix(symmetric(SPECTRA["power law"]))
    plain = trace(a, rtol=0.02).matvecs
    assert trace(a, rtol=0.02, method="hutch++").matvecs < plain / 4
    assert trace(a, rtol=0.02, method="xtrace").matvecs < plain / 4


def test_matrices_smaller_than_the_sketch():
    for n in (1, 2, 5):
        a = symmetric(torch.arange(1.0, n + 1))
        for method in ("hutch++", "xtrace"):
            found = trace(Matrix(a), method=method, rtol=0.5, confidence=0.5)
            assert found.value == pytest.approx(float(a.trace()), rel=1e-6 if method == "hutch++" else 1)


@pytest.mark.usefixtures("only_samples")
@pytest.mark.filterwarnings("ignore")
def test_frobenius_and_diagonal():
    a = symmetric(SPECTRA["indefinite"])
    found = frobenius(Matrix(a), rtol=0.01)
    assert abs(found.value - float(a.norm())) < 4 * found.stderr
    d = diagonal(Matrix(a), rtol=0.2)
    error = d.values[0] - a.diagonal()
    assert d.converged and float(error.norm() / a.diagonal().norm()) < 0.3
    assert float((error / d.stderr[0]).square().mean()) == pytest.approx(1, abs=0.35)


def test_the_stated_errors_of_a_diagonal_are_those_of_its_samples(monkeypatch):
    e = SPECTRA["indefinite"]
    a, signs = Matrix(symmetric(e)), []
    draw = a.random
    monkeypatch.setattr(a, "random", lambda *args: signs.append(draw(*args)) or signs[-1].clone())
    found = diagonal(a, rtol=1e-6, max_matvecs=7)
    rows = torch.stack(signs[:found.matvecs])
    samples = rows * (rows @ symmetric(e))
    assert found.matvecs == 7 and not found.converged
    torch.testing.assert_close(found.values[0], samples.mean(0))
    torch.testing.assert_close(found.stderr[0], samples.std(0, unbiased=True) / 7**0.5)


@pytest.mark.parametrize("confidence", (0.5, 0.68, 0.95, 0.999))
def test_quantiles_converge_to_those_of_student(confidence):
    """The terms go to the third power of 1/degrees, so that the error falls with the fourth."""
    exact = stats.t(df=torch.tensor([1, 2, 60, 120]).numpy()).ppf((1 + confidence) / 2)
    error = [abs(quantile(confidence, n) - t) for n, t in zip((1, 2, 60, 120), exact, strict=True)]
    assert error[0] < 1e-9 * exact[0] and error[1] < 1e-9 * exact[1]
    assert error[3] < error[2] / 13 + 1e-12


@pytest.mark.usefixtures("only_samples")
def test_density_moments_mass_at_zero_and_band():
    e = torch.cat([torch.zeros(120), torch.linspace(1, 4, 80)])
    a = symmetric(e)
    d = spectral_density(Matrix(a), probes=30, steps=40)
    assert all(float(w.sum()) == pytest.approx(1, abs=1e-12) for w in d.weights)
    assert abs(d.mass_at_zero.value - 0.6) < 4 * d.mass_at_zero.stderr
    assert abs(d.trace.value - float(e.sum())) < 4 * d.trace.stderr
    assert d.range[0] > -1e-12 and d.range[1] < 4 + 1e-12
    x, phi, band = d.density()
    assert float(torch.trapezoid(phi, x)) == pytest.approx(1, abs=1e-3) and (band >= 0).all()
    log = d.log_density()
    shares = float(torch.trapezoid(log["positive"], log["exponent"]))
    assert shares == pytest.approx(0.4, abs=4 * d.mass_at_zero.stderr) and log["negative"].max() == 0


@pytest.mark.usefixtures("only_samples")
@pytest.mark.parametrize("decades", (3, 6, 12))
def test_the_share_next_to_zero_of_eigenvalues_of_many_scales(decades):
    """60 steps cannot tell 10⁻⁴ λ_max from its neighbours; the error says so."""
    e = 10 ** -torch.linspace(0, decades, 400, dtype=torch.float64)
    e[::7] *= -1
    found = spectral_density(Matrix(torch.diag(e)), zero=1e-4 / float(e.abs().max())).mass_at_zero
    truth = float((e.abs() <= 1e-4).double().mean())
    low, high = found.settings["bounds"]
    assert abs(found.value - truth) <= 2 * found.stderr and 0 <= low <= high <= 1


def test_the_range_of_a_density_is_that_of_its_outermost_nodes():
    found = spectral_density(Matrix(symmetric(torch.tensor([-2.0, 1.0, 5.0]))))
    assert found.range == pytest.approx((-2, 5))
    found = spectral_density(Matrix(symmetric(SPECTRA["indefinite"])), probes=3, steps=12)
    assert found.range == (min(float(t.min()) for t in found.nodes), max(float(t.max()) for t in found.nodes))


@pytest.mark.usefixtures("only_samples")
def test_a_density_of_low_rank_stops_where_the_space_is_exhausted():
    """A popular tool gives a rank-10 matrix Ritz values far outside its spectrum."""
    e = torch.cat([torch.linspace(1, 2, 10), torch.zeros(300)])
    d = spectral_density(Matrix(symmetric(e)), probes=5, steps=30)
    assert max(len(t) for t in d.nodes) <= 12 and d.range[0] > -1e-10 and d.range[1] < 2 + 1e-10
    zero = spectral_density(Matrix(torch.zeros(20, 20)), probes=2)
    assert zero.mass_at_zero.value == 1 and math.isclose(zero.trace.value, 0)


def test_plots():
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    d = spectral_density(Matrix(symmetric(SPECTRA["indefinite"])), probes=3, steps=20)
    assert d.plot().get_xlabel() == "eigenvalue" and d.plot(log=True).get_xscale() == "log"
    plt.close("all")


def test_exact_where_that_takes_no_more_products():
    """As many products as coordinates give everything; the record says so."""
    a, e = symmetric(SPECTRA["indefinite"]), SPECTRA["indefinite"].double()
    A = Matrix(a)
    runs = {"trace": (trace(A, rtol=0.01), float(e.sum())), "frobenius": (frobenius(A, rtol=1e-3), float(e.norm())),
            "hutch++": (trace(A, rtol=0.01, method="hutch++"), float(e.sum())),
            "xtrace": (trace(A, rtol=0.001, method="xtrace"), float(e.sum()))}
    for name, (found, truth) in runs.items():
        assert found.settings["method"] == "exact" and found.stderr == 0 and found.converged, name
        assert found.value == pytest.approx(truth, rel=1e-13) and found.interval[0] <= truth <= found.interval[1], name
        assert found.matvecs <= 200 + (128 if name == "xtrace" else 40), name
    d = diagonal(A, rtol=0.01)
    assert torch.allclose(d.values[0], a.diagonal()) and not d.stderr[0].any() and d.settings["method"] == "exact"
    density = spectral_density(A)       # 480 products otherwise
    assert density.matvecs == 200 and torch.allclose(density.nodes[0], e.sort().values)
    assert density.trace.stderr == 0 and not density.density()[2].any() and "exact" in density.settings["method"]
    assert condition_number(A).settings["method"] == "exact"


def test_samples_where_they_are_fewer_or_the_budget_is_less():
    A = Matrix(symmetric(SPECTRA["indefinite"]))
    assert trace(A, rtol=0.3).settings["method"] == "hutchinson"
    with pytest.warns(UserWarning, match="would take about"):
        found = trace(A, rtol=1e-4, max_matvecs=199)
    assert found.matvecs <= 199 and found.settings["method"] == "hutchinson"
    assert spectral_density(A, probes=3, steps=20).matvecs == 60


def test_matrices_of_a_few_coordinates_take_a_product_each():
    a = symmetric(torch.tensor([3.0, -1.0, 0.5]))
    for method in ("hutchinson", "hutch++", "xtrace"):
        found = trace(Matrix(a), method=method)
        assert found.matvecs == 3 and found.value == pytest.approx(2.5)
    H = Hessian(classification(split=True))
    assert trace(H, rtol=1e-3).value == pytest.approx(float(H.dense().trace()), rel=1e-12)


@pytest.mark.usefixtures("only_samples")
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("method", ("hutch++", "xtrace"))
@pytest.mark.parametrize("rank", (1, 3, 8))
def test_the_stated_error_of_low_rank_includes_rounding(method, rank, dtype):
    """Samples of a rest that is rounding agree far better with each other than the sum is known."""
    e = torch.zeros(120)
    e[:rank] = torch.linspace(1, -0.5, rank)
    held = 0
    for seed in range(30):
        a = symmetric(e, seed).to(dtype)
        found = trace(Matrix(a), method=method, seed=seed)
        held += found.interval[0] <= float(a.double().trace()) <= found.interval[1]
    assert held >= 20       # 68 % of 30


@pytest.mark.parametrize("samples", (True, False))
@pytest.mark.parametrize("scale", (1e-30, 1e-12, 1e12, 1e30))
def test_float32_at_any_scale(scale, samples, monkeypatch):
    """In float32 the squares of such numbers are 0 or infinite."""
    if samples:
        only_samples(monkeypatch)
    a = symmetric(SPECTRA["outliers"]).float()
    plain, scaled = Matrix(a), Matrix(a * scale)

    def close(x, y):
        assert y / scale == pytest.approx(x, rel=1e-3) and math.isfinite(x)

    for method in ("hutchinson", "hutch++", "xtrace"):
        x, y = (trace(A, method=method, rtol=0.05) for A in (plain, scaled))
        close(x.value, y.value)
        close(x.stderr, y.stderr)
    for x, y in ((frobenius(A, rtol=0.1) for A in (plain, scaled)),
                 (spectral_density(A, probes=4, steps=20).trace for A in (plain, scaled))):
        close(x.value, y.value)
        close(x.stderr, y.stderr)
    x, y = (diagonal(A, rtol=0.5) for A in (plain, scaled))
    assert y.relative_error == pytest.approx(x.relative_error, rel=1e-3)
    assert torch.allclose(y.values[0] / scale, x.values[0], rtol=1e-2, atol=1e-3)
    assert torch.allclose(y.stderr[0] / scale, x.stderr[0], rtol=1e-2)
    definite = a + 5 * torch.eye(len(a))
    x, y = (condition_number(Matrix(definite * s)) for s in (1.0, scale))
    assert x.value == pytest.approx(y.value, rel=1e-3)
