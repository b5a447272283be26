"""Killed runs go on: to the same bits, with no product twice, at every point at which a kill can come.

The tests of the algorithms see only runs that end; none would notice a state that is torn, lost or another run's.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from flatmin.curvature import (
    Hessian,
    Matrix,
    diagonal,
    eigenpairs,
    eigenvalues,
    frobenius,
    power_iteration,
    spectral_density,
    trace,
)
from flatmin.curvature.objective_operator import ObjectiveOperator
from flatmin.linalg import basis, checkpoint
from nets import classification, symmetric

E = torch.linspace(-1, 1, 300)


class Dying(Matrix):
    """Raises at the product number ``at``, counted over all calls."""

    def __init__(self, at: int, error: type[BaseException] = KeyboardInterrupt, e: torch.Tensor = E):
        super().__init__(symmetric(e))
        self.at, self.error, self.products = at, error, 0

    def _matvec(self, v):
        self.products += 1
        if self.products == self.at:
            raise self.error
        return super()._matvec(v)


@pytest.fixture
def hasty(monkeypatch):
    """Every look at the clock is ten minutes after the one before, so that each state is written."""
    clock = iter(range(0, 10**9, 600))
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: next(clock))


def same(a, b):
    assert torch.equal(a.eigenvalues, b.eigenvalues) and torch.equal(a.residuals, b.residuals)
    assert torch.equal(a.eigenvectors, b.eigenvectors) and a.complete == b.complete and a.matvecs == b.matvecs


@pytest.mark.parametrize("place", ("device", "disk"))
@pytest.mark.parametrize("at", (2, 17, 40, "search", "residuals"))
def test_eigenpairs_interrupted_anywhere(at, place, tmp_path):
    """25 products fill the basis, so that 40 is after a restart; the last ones search and certify."""
    options = {"k": 3, "basis": 25, "place": place, "folder": str(tmp_path)}
    lanczos = eigenpairs(Matrix(symmetric(E)), certify=False, **options).matvecs
    options["find_missing"] = True
    whole = eigenpairs(Matrix(symmetric(E)), **options)
    assert 40 < lanczos < whole.matvecs - 3
    operator = Dying({"search": lanczos + 4, "residuals": whole.matvecs}.get(at, at))
    with pytest.raises(KeyboardInterrupt):
        eigenpairs(operator, checkpoint=str(tmp_path / "run.pt"), **options)
    same(eigenpairs(operator, checkpoint=str(tmp_path / "run.pt"), **options), whole)
    done = operator.at - 2      # one recognises the matrix, one was interrupted
    assert operator.products == operator.at + 1 + whole.matvecs - min(done, lanczos)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("block", range(4))
def test_a_restart_on_disk_torn_in_the_middle(block, tmp_path, monkeypatch):
    options = {"k": 3, "basis": 25, "place": "disk", "folder": str(tmp_path)}
    monkeypatch.setattr(basis, "_COLUMNS", 77)
    whole, operator = eigenpairs(Matrix(symmetric(E)), **options), Dying(0)
    enter = checkpoint.Journal.enter

    def torn(self, i, rows):
        out = enter(self, i, rows)
        if i == block:
            rows.fill_(torch.nan)       # half written
            raise SystemExit
        return out

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(checkpoint.Journal, "enter", torn)
        eigenpairs(operator, checkpoint=str(tmp_path / "run.pt"), **options)
    same(eigenpairs(operator, checkpoint=str(tmp_path / "run.pt"), **options), whole)
    assert operator.products == whole.matvecs + 2 and not os.listdir(tmp_path)


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("place", ("device", "disk"))
@pytest.mark.parametrize("at", (26, 27, 28, 60))
def test_an_error_that_is_no_interrupt_leaves_the_last_state(at, place, tmp_path):
    options = {"k": 3, "basis": 25, "place": place, "folder": str(tmp_path)}
    operator = Dying(at, MemoryError)
    with pytest.raises(MemoryError):
        eigenpairs(operator, checkpoint=str(tmp_path / "run.pt"), **options)
    whole = eigenpairs(Matrix(symmetric(E)), **options)
    same(eigenpairs(operator, checkpoint=str(tmp_path / "run.pt"), **options), whole)
    assert operator.products == whole.matvecs + 3


@pytest.mark.parametrize("change", ({"k": 4}, {"seed": 1}, {"which": "smallest"}, {"place": "disk"}))
def test_a_checkpoint_of_something_else_is_refused(change, tmp_path):
    file, options = str(tmp_path / "run.pt"), {"k": 3, "basis": 25, "folder": str(tmp_path)}
    with pytest.raises(KeyboardInterrupt):
        eigenpairs(Dying(20), checkpoint=file, **options)
    with pytest.raises(ValueError, match="another computation"):
        eigenpairs(Dying(0), checkpoint=file, **options | change)
    with pytest.raises(ValueError, match="another computation"):
        eigenpairs(Matrix(symmetric(E + 0.01)), checkpoint=file, **options)
    with pytest.raises(ValueError, match="another computation"):
        eigenpairs(-Matrix(symmetric(E)), checkpoint=file, **options)
    assert os.listdir(tmp_path) == ["run.pt"]


@pytest.mark.parametrize("content", (b"text", b"", {"weight": torch.zeros(2)}, torch.zeros(2)))
def test_a_file_that_is_no_checkpoint_is_left_alone(content, tmp_path):
    file = tmp_path / "model.pt"
    file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
    before = file.read_bytes()
    with pytest.raises(ValueError, match="name another file"):
        eigenpairs(Dying(0), checkpoint=str(file))
    assert file.read_bytes() == before


KILLED = """
import sys, time, torch
from flatmin.curvature import Matrix, eigenpairs
from flatmin.linalg import certificate
from nets import symmetric

torch.set_num_threads(1)

class Slow(Matrix):
    products = 0
    def _matvec(self, v):
        self.products += 1
        return super()._matvec(v)

def residuals(operator, values, x):
    print("certifying", flush=True)
    time.sleep(60)

file, kill = sys.argv[1:]
if kill == "yes":
    certificate.residuals = residuals
operator = Slow(symmetric(torch.linspace(-1, 1, 200, dtype=torch.float64) ** 3))
found = eigenpairs(operator, 1, basis=20, checkpoint=file)
print(operator.products, found.matvecs, *found.eigenvalues.tolist())
"""


def test_killed_while_certifying(tmp_path):
    """SIGKILL, which no handler sees: the recurrence is not run again."""
    command = [sys.executable, "-c", KILLED, str(tmp_path / "run.pt")]
    paths = [str(Path(__file__).parents[1]), *sys.path]
    options = {"env": os.environ | {"PYTHONPATH": os.pathsep.join(paths)}, "text": True}
    with subprocess.Popen([*command, "yes"], stdout=subprocess.PIPE, **options) as first:
        assert first.stdout.readline() == "certifying\n"
        first.send_signal(signal.SIGKILL)
    assert first.returncode == -signal.SIGKILL and os.listdir(tmp_path) == ["run.pt"]
    start = time.monotonic()
    second = subprocess.run([*command, "no"], capture_output=True, check=True, **options)
    products, matvecs, value = second.stdout.split()
    whole = eigenpairs(Matrix(symmetric(torch.linspace(-1, 1, 200) ** 3)), 1, basis=20)
    assert (int(products), int(matvecs), float(value)) == (2, whole.matvecs, float(whole.eigenvalues[0]))
    assert not os.listdir(tmp_path) and time.monotonic() - start < 50


P = torch.linspace(-0.1, 1, 300) ** 5
RUNS = {
    "hutchinson": (trace, {"rtol": 0.015}),
    "hutch++": (trace, {"rtol": 0.01, "method": "hutch++"}),
    "xtrace": (trace, {"rtol": 0.01, "method": "xtrace"}),
    "exact trace": (trace, {"rtol": 0.005}),
    "exact after hutch++": (trace, {"rtol": 1e-5, "method": "hutch++"}),
    "exact after xtrace": (trace, {"rtol": 1e-9, "method": "xtrace"}),
    "frobenius": (frobenius, {"rtol": 0.01}),
    "exact frobenius": (frobenius, {"rtol": 0.001}),
    "diagonal": (diagonal, {"rtol": 0.2}),
    "exact diagonal": (diagonal, {"rtol": 0.01}),
    "power": (power_iteration, {"tol": 0.02}),
    "magnitude": (power_iteration, {"tol": 0.005, "which": "magnitude"}),
    "density": (spectral_density, {"probes": 3, "steps": 20}),
    "exact density": (spectral_density, {"probes": 20, "steps": 20}),
    "eigenvalues": (eigenvalues, {"k": 3, "tol": 1e-4}),
}
"""Each takes 40 products or more."""


def fields(record):
    """A record as numbers that can be compared bit for bit."""
    def plain(value):
        if isinstance(value, torch.Tensor):
            return value.tolist()
        return [plain(v) for v in value] if isinstance(value, list) else value

    return {f.name: plain(getattr(record, f.name)) for f in dataclasses.fields(record)}


@pytest.mark.parametrize("seed", (0, "generator"))
@pytest.mark.parametrize("at", (2, 5, 13, 27, 40, "near the end"))
@pytest.mark.parametrize("name", RUNS)
def test_every_long_run_goes_on_to_the_same_bits(name, at, seed, tmp_path):
    run, options = RUNS[name]

    def seeded():
        return {"seed": torch.Generator().manual_seed(3) if seed else 0}

    whole = run(Dying(0, e=P), **options, **seeded())
    assert whole.matvecs >= 40 and (whole.settings.get("method") == "exact") == name.startswith("exact")
    at = whole.matvecs - 3 if at == "near the end" else at
    operator = Dying(at, e=P)
    file = str(tmp_path / "run.pt")
    with pytest.raises(KeyboardInterrupt):
        run(operator, checkpoint=file, **options, **seeded())
    assert os.path.exists(file) == (at > 2 or name == "density")
    found = run(operator, checkpoint=file, **options, **seeded())
    assert fields(found) == fields(whole)
    unfinished = "xtrace" in name and at % 2 == 1 and at < 260      # two products a probe, of which 128 at most
    assert operator.products == whole.matvecs + 3 + unfinished and not os.listdir(tmp_path)


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("name", RUNS)
def test_every_long_run_survives_an_error_at_every_product(name, tmp_path):
    """A product that fails each third time, as on a machine that is often killed."""
    run, options = RUNS[name]
    whole, operator = run(Dying(0, e=P), **options), Dying(0, MemoryError, P)
    for _ in range(whole.matvecs):
        operator.at = operator.products + 5
        try:
            found = run(operator, checkpoint=str(tmp_path / "run.pt"), **options)
            break
        except MemoryError:
            pass
    assert fields(found) == fields(whole) and not os.listdir(tmp_path)


@pytest.mark.parametrize("at", (5, 21, 22, 23, 40))
def test_a_density_on_disk_goes_on(at, tmp_path):
    """A probe takes 20 products: the next one writes over its basis."""
    options = {"probes": 3, "steps": 20, "place": "disk", "folder": str(tmp_path)}
    whole, operator = spectral_density(Dying(0, e=P), **options), Dying(at, MemoryError, P)
    with pytest.raises(MemoryError):
        spectral_density(operator, checkpoint=str(tmp_path / "run.pt"), **options)
    found = spectral_density(operator, checkpoint=str(tmp_path / "run.pt"), **options)
    assert fields(found) == fields(whole) and not os.listdir(tmp_path)


@pytest.mark.parametrize("name", RUNS)
def test_no_run_takes_up_that_of_another(name, tmp_path):
    run, options = RUNS[name]
    file = str(tmp_path / "run.pt")
    with pytest.raises(KeyboardInterrupt):
        run(Dying(20, e=P), checkpoint=file, **options)
    others = [(run, options | {"seed": 1}), *(row for key, row in RUNS.items() if key != name)]
    for other, wrong in others:
        with pytest.raises(ValueError, match="another computation"):
            other(Dying(0, e=P), checkpoint=file, **wrong)
    assert os.path.exists(file)


def test_products_of_a_model_go_on_to_the_same_bits(tmp_path, monkeypatch):
    """The graphs that a session kept are made anew."""
    whole = trace(Hessian(classification(split=True)), rtol=0.1)
    operator, multiply = Hessian(classification(split=True)), ObjectiveOperator._matvec
    calls = iter(range(100))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ObjectiveOperator, "_matvec",
                      lambda self, *v: multiply(self, *v) if next(calls) != 7 else _interrupt())
        trace(operator, rtol=0.1, checkpoint=str(tmp_path / "run.pt"))
    assert trace(operator, rtol=0.1, checkpoint=str(tmp_path / "run.pt")) == whole


def _interrupt():
    raise KeyboardInterrupt
