"""Random estimators, by convergence to the truth and by how often their stated interval holds it."""

import math

import pytest
import torch
from nets import symmetric

from flatmin.curvature import Matrix, diagonal, frobenius, spectral_density, trace

SPECTRA = {
    "outliers": torch.cat([torch.linspace(50, 100, 5), torch.rand(195, generator=torch.Generator().manual_seed(0))]),
    "indefinite": torch.randn(200, generator=torch.Generator().manual_seed(1)) + 0.4,
    "power law": 1 / torch.arange(1, 201) ** 2.0,
}


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


def test_more_probes_less_error():
    a, truth = Matrix(symmetric(SPECTRA["indefinite"])), float(SPECTRA["indefinite"].double().sum())
    for rtol in (0.2, 0.05, 0.02):
        found = trace(a, rtol=rtol)
        assert found.converged and found.stderr <= rtol * abs(found.value)
        assert abs(found.value - truth) < 4 * found.stderr
        assert 0.2 < found.foretold / found.matvecs < 5


def test_the_budget_is_kept_and_a_shortfall_said():
    a = Matrix(symmetric(SPECTRA["indefinite"]))
    for method in ("hutchinson", "hutch++", "xtrace"):
        with pytest.warns(UserWarning, match="would take about"):
            found = trace(a, rtol=1e-4, max_matvecs=40, method=method)
        assert found.matvecs <= 40 < found.foretold and not found.converged


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


@pytest.mark.filterwarnings("ignore")
def test_frobenius_and_diagonal():
    a = symmetric(SPECTRA["indefinite"])
    found = frobenius(Matrix(a), rtol=0.01)
    assert abs(found.value - float(a.norm())) < 4 * found.stderr
    d = diagonal(Matrix(a), rtol=0.2)
    error = d.values[0] - a.diagonal()
    assert d.converged and float(error.norm() / a.diagonal().norm()) < 0.3
    assert float((error / d.stderr[0]).square().mean()) == pytest.approx(1, abs=0.35)


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
