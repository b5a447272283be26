"""Eigenpairs of random symmetric matrices against ``torch.linalg.eigh``, and the ways to fool a Krylov method."""

import math
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flatmin.curvature import Hessian, Matrix, eigenpairs, eigenvalues, power_iteration
from flatmin.linalg.certificate import DOUBT, _excludes
from flatmin.linalg.eigenpairs import wanted
from nets import classification, symmetric

WHICH = ("largest", "smallest", "both", "magnitude")


@st.composite
def spectra(draw):
    """Eigenvalues with clusters, exact multiplicities, ±λ pairs, zeros, and any scale."""
    n = draw(st.integers(2, 60))
    kind = draw(st.sampled_from(["random", "multiple", "pairs", "low rank", "cluster", "identity", "geometric"]))
    e = torch.rand(n, generator=torch.Generator().manual_seed(draw(st.integers(0, 999)))) * 2 - 1
    if kind == "multiple":
        e = (e * 3).round()
    elif kind == "pairs":
        e[:n // 2] = -e[n - n // 2:]
    elif kind == "low rank":
        e[draw(st.integers(1, 3)):] = 0
    elif kind == "cluster":
        e[:n // 3] = 1 + e[:n // 3] * 1e-7
    elif kind == "identity":
        e[:] = 1
    elif kind == "geometric":
        e = 0.5 ** torch.arange(n)
    return e.sort().values * 10.0 ** draw(st.sampled_from([0, 0, 0, -150, 150]))


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(e=spectra(), k=st.integers(1, 8), which=st.sampled_from(WHICH), block=st.sampled_from([1, 1, 3]))
@pytest.mark.filterwarnings("ignore")
def test_against_the_dense_answer(e, k, which, block):
    a = symmetric(e)
    tol = 1e-8
    found = eigenpairs(Matrix(a), k, which, tol=tol, block=block, find_missing=True)
    k = min(k, len(e))
    truth, scale = e[wanted(e, k, which)], float(e.abs().max()) or 1.0
    values = found.eigenvalues / scale
    assert ((values[:, None] - e / scale).abs().min(1).values <= found.residuals / scale + 1e-13).all()
    if found.complete is not False:     # it is False where eigenvalues lie closer than the tolerance
        sort = (lambda t: t.abs().sort().values) if which == "magnitude" else lambda t: t
        assert torch.allclose(sort(values), sort(truth / scale), atol=1e-6)
    x = found.eigenvectors
    assert torch.allclose(x @ x.T, torch.eye(k), atol=1e-9)
    assert (found.eigenvalues.diff() >= 0).all()
    true_residuals = torch.linalg.vector_norm((x @ (a / scale)) - (found.eigenvalues / scale)[:, None] * x, dim=1)
    assert torch.allclose(found.residuals / scale, true_residuals, atol=1e-13)
    assert found.certified and found.converged.tolist() == (true_residuals <= tol).tolist()


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("which", WHICH)
def test_thick_restarts_on_a_slow_spectrum(which, dtype):
    e = torch.linspace(-1, 1.5, 400)
    a = Matrix(symmetric(e).to(dtype))
    found = eigenpairs(a, 4, which, tol=1e-4, basis=20, max_matvecs=4000)
    assert found.converged.all() and found.matvecs > 40
    assert torch.allclose(found.eigenvalues, e[wanted(e, 4, which)], atol=1e-3)
    gram = (found.eigenvectors @ found.eigenvectors.T).double()
    assert torch.allclose(gram, torch.eye(4), atol=50 * torch.finfo(dtype).eps)


def test_no_ghosts_after_many_steps():
    """A well-known tool, asked for 8 pairs in 120 steps of this spectrum, returns the top one eight times."""
    e = torch.cat([torch.rand(500) * 0.5, torch.arange(1.0, 11.0)])
    for dtype in (torch.float32, torch.float64):
        found = eigenpairs(Matrix(symmetric(e).to(dtype)), 8, tol=1e-5)
        assert found.eigenvalues.tolist() == pytest.approx(list(range(3, 11)), rel=1e-5)
        values = eigenvalues(Matrix(symmetric(e).to(dtype)), 8, tol=1e-5)
        assert values.values.tolist() == pytest.approx(list(range(3, 11)), rel=1e-5)


def test_values_alone_recognise_their_ghosts():
    e = torch.cat([torch.linspace(0, 1, 80), torch.tensor([10.0, 20.0])])
    found = eigenvalues(Matrix(symmetric(e).float()), 6, tol=1e-5, max_matvecs=300)
    assert found.copies[-1] > 1     # the recurrence did find it again and again
    every = eigenvalues(Matrix(symmetric(e).float()), 82, tol=1e-5, max_matvecs=300)
    assert 200 < every.copies.sum() <= every.matvecs == 300     # a Ritz value is at most one copy
    assert found.values.tolist() == pytest.approx(e.sort().values[-6:].tolist(), abs=2e-3)
    assert found.converged.all()


BULK = torch.rand(120, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
TOPS = {
    "threefold": torch.full((3,), 3.0), "threefold and twofold": torch.tensor([3.0, 3, 3, 2, 2]),
    "near 1e-6": 3 + 1e-6 * torch.arange(3).double(), "near 2e-4": 3 + 2e-4 * torch.arange(3).double(),
    "cluster": 3 + 1e-7 * torch.linspace(0, 1, 20).double(), "simple": torch.tensor([20.0, 10.0]),
}


@pytest.mark.parametrize("tol", (1e-3, 1e-5))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("name", TOPS)
def test_values_alone_give_each_eigenvalue_once(name, dtype, tol):
    """A second copy that is still on its way to the first lies within the errors of both."""
    for seed in range(30):
        scale = (1.0, 1e12, 1e-12)[seed % 3]
        a = (symmetric(torch.cat([TOPS[name].double(), BULK])) * scale).to(dtype)
        e = torch.linalg.eigvalsh(a.double())
        found = eigenvalues(Matrix(a), 4, tol=tol, seed=seed)
        nearest = (found.values[:, None] - e).abs().min(1)
        assert found.converged.all() and len(found.values) == 4
        assert (nearest.values <= found.errors).all(), (seed, nearest.values / found.errors)
        # each lies within its error of an eigenvalue, and the errors tell them apart
        assert (found.values.diff() > found.errors[1:] + found.errors[:-1]).all(), (seed, found.values / scale)
        assert float(found.values[-1] - e[-1]) == pytest.approx(0, abs=float(found.errors[-1]) + 20e-7 * 3 * scale)


@pytest.mark.parametrize("which", ("largest", "magnitude"))
@pytest.mark.parametrize("scale", (1e-30, 1e-15, 1e15, 1e30))
def test_the_power_method_at_any_scale(scale, which):
    """In float32 the squares of such numbers are 0 or infinite."""
    e = torch.cat([torch.tensor([3.0, 2.0]), torch.linspace(-1, 1, 60)])
    a = (symmetric(e) * scale).float()
    found = power_iteration(Matrix(a), which, tol=1e-3)
    assert found.converged and found.value == pytest.approx(3 * scale, rel=1e-5)
    assert found.residual == pytest.approx(float((a.double() @ found.vector.double() - found.value
                                                  * found.vector.double()).norm()), rel=0.05)
    with pytest.warns(UserWarning, match="did not converge"):
        rough = power_iteration(Matrix(a), which, tol=1e-5, max_matvecs=3)
    off = (a.double() @ rough.vector.double() - rough.value * rough.vector.double()).norm()
    assert not rough.converged and rough.residual == pytest.approx(float(off), rel=1e-3)    # of the vector returned


def test_the_power_method_stops_as_soon_as_the_largest_stands_out():
    a = Matrix(symmetric(torch.cat([torch.tensor([1000.0]), torch.linspace(-1, 1, 60)])))
    for which in ("largest", "magnitude"):
        found = power_iteration(a, which, tol=1e-3)
        assert found.converged and found.matvecs <= 4 and found.value == pytest.approx(1000)


def test_values_alone_in_float64_are_as_exact_as_they_say():
    e = torch.linspace(0, 1, 60, dtype=torch.float64) ** 3
    found = eigenvalues(Matrix(symmetric(e)), 3, tol=1e-10)
    off = (found.values - e[-3:]).abs()
    assert found.converged.all() and float(off.max()) < 1e-11
    assert bool((off <= found.errors + 1e-14).all())


def test_all_copies_of_a_multiple_eigenvalue():
    e = torch.cat([torch.full((5,), 3.0), torch.full((3,), 2.0), torch.rand(300)])
    found = eigenpairs(Matrix(symmetric(e)), 7, find_missing=True)
    assert found.eigenvalues.tolist() == pytest.approx([2, 2, 3, 3, 3, 3, 3], abs=1e-4)
    assert found.complete is not None
    plain = eigenpairs(Matrix(symmetric(e)), 7)     # nobody looked: copies are missing, and that is not called complete
    assert plain.complete is None and plain.matvecs < found.matvecs and plain.eigenvalues[0] < 1.9
    assert eigenpairs(Matrix(symmetric(e)), 5, block=6, certify=False).eigenvalues.tolist() == pytest.approx([3] * 5)


@pytest.mark.parametrize("gap", (1e-6, 1e-3, 0.1, 3.0))
@pytest.mark.parametrize("n", (20, 10**6))
def test_a_search_excludes_where_the_chebyshev_polynomial_says_so(gap, n):
    """An eigenvector with the share s² of a start would have been seen at degree d: s² γ T_d(1 + 2γ)² > 1; s² is
    smaller than ½π δ²/n with probability δ."""
    low, high = -1.0, 4.0
    gamma = gap / (1.1 * (high - low))      # the other end of the spectrum may lie 10 % further out
    t = [1.0, 1 + 2 * gamma]
    while len(t) < 40:
        t.append(2 * t[1] * t[-1] - t[-2])
    share = 0.5 * math.pi * DOUBT**2 / n
    for steps in range(20 if gap > 1 else 3, 40):   # at a low degree T is more than half of the exponential
        assert _excludes(high + gap, low, high, steps, n) == (share * gamma * t[steps - 1] ** 2 > 1)
    assert not _excludes(high, low, high, 10**6, n) and not _excludes(high - gap, low, high, 10**6, n)
    if gap < 0.01:
        assert _excludes(high + gap, low, high, 10**5, n)


def test_what_did_not_converge_says_so():
    a = Matrix(symmetric(torch.linspace(0, 1, 500)))
    with pytest.warns(UserWarning, match="did not converge.*max_matvecs"):
        found = eigenpairs(a, 5, tol=1e-6, max_matvecs=12)
    assert not found.converged.all() and "not converged" in str(found)
    with pytest.warns(UserWarning, match="did not converge"):
        assert not power_iteration(a, tol=1e-6, max_matvecs=20).converged
    with pytest.warns(UserWarning, match="did not converge"):
        assert not eigenvalues(a, 5, tol=1e-6, max_matvecs=12).converged.all()


def test_the_certificate_is_of_a_fresh_product():
    """Weights that move between the products of one run are caught by it."""
    objective = classification()
    operator = Hessian(objective)
    found = eigenpairs(operator, 3, tol=1e-8)
    dense = operator.dense()
    residuals = torch.linalg.vector_norm(found.eigenvectors @ dense - found.eigenvalues[:, None] * found.eigenvectors,
                                         dim=1)
    assert torch.allclose(found.residuals, residuals, atol=1e-13)

    class Drifting(Matrix):
        def _matvec(self, v):
            self.matrix = self.matrix + 0.003 * torch.eye(self.size)
            return super()._matvec(v)

    with pytest.warns(UserWarning, match="did not converge"):
        assert not eigenpairs(Drifting(torch.diag(torch.arange(1.0, 41.0))), 2, tol=1e-6).converged.any()


def test_a_product_that_is_not_finite():
    with pytest.raises(ValueError, match="not finite"):
        eigenpairs(Matrix(torch.full((4, 4), torch.nan)))


@pytest.mark.parametrize("place", ("host", "disk"))
def test_the_basis_elsewhere(place, tmp_path):
    a = Matrix(symmetric(torch.linspace(-1, 1, 200)))
    here, there = (eigenpairs(a, 3, basis=30, place=p, folder=str(tmp_path)) for p in ("device", place))
    assert torch.equal(here.eigenvalues, there.eigenvalues) and not os.listdir(tmp_path)


def test_memory_is_foretold():
    class Huge(Matrix):
        def __init__(self):
            super().__init__(torch.zeros(1, 1))
            self.size = self.length = 10**13

    with pytest.raises(MemoryError, match=r"needs .* TiB on cpu, and .* are free.*eigenvalues\(\)"):
        eigenpairs(Huge(), 2, certify=False)


def test_the_basis_holds_as_many_vectors_as_documented():
    a = Matrix(torch.diag(torch.cat([torch.rand(1100), torch.tensor([50.0, 100.0])])))
    assert eigenpairs(a, 1, certify=False).settings["basis"] == 43
    assert eigenpairs(a, 2, certify=False).settings["basis"] == 46      # 3k + 40
    assert eigenpairs(a, 1, basis=20, certify=False).settings["basis"] == 20
    assert eigenpairs(Matrix(symmetric(torch.rand(60))), 1).settings["basis"] == 60


def test_resumes_after_a_kill(tmp_path):
    file = str(tmp_path / "run.pt")
    e = torch.linspace(-1, 1, 300)

    class Dying(Matrix):
        products = 0

        def _matvec(self, v):
            Dying.products += 1
            if Dying.products == 60:
                raise KeyboardInterrupt
            return super()._matvec(v)

    with pytest.raises(KeyboardInterrupt):
        eigenpairs(Dying(symmetric(e)), 3, basis=25, checkpoint=file)
    assert os.path.exists(file)
    with pytest.raises(ValueError, match="another computation"):
        eigenpairs(Dying(symmetric(e)), 4, basis=25, checkpoint=file)
    resumed = eigenpairs(Dying(symmetric(e)), 3, basis=25, checkpoint=file)
    straight = eigenpairs(Matrix(symmetric(e)), 3, basis=25)
    assert torch.allclose(resumed.eigenvalues, straight.eigenvalues, atol=1e-12)
    assert Dying.products < straight.matvecs + 10 and not os.path.exists(file)


def test_progress_and_wrong_arguments(capsys):
    a, calls = Matrix(symmetric(torch.linspace(0, 1, 50))), []
    eigenpairs(a, 2, progress=lambda done, text: calls.append((done, text)))
    assert calls and "converged" in calls[-1][1]
    eigenpairs(a, 2, progress=True)
    assert "eigenpairs" in capsys.readouterr().err
    for wrong in ({"k": 0}, {"which": "top"}, {"tol": 0}, {"basis": 2, "k": 2}, {"basis": 7, "k": 2, "block": 3}):
        with pytest.raises(ValueError):
            eigenpairs(a, **wrong)


def test_certificates_of_composed_operators_are_fresh_too():
    calls = []
    objective = classification()
    objective.model.register_forward_hook(lambda *_: calls.append(1))
    eigenpairs(2 * (Hessian(objective) + Hessian(objective)), 1, certify=False)
    assert len(calls) == 2
    with Hessian(objective).session():
        pass        # evaluates too, to check the data and the product, once
    calls.clear()
    eigenpairs(2 * (Hessian(objective) + Hessian(objective)), 1)
    assert len(calls) == 4
