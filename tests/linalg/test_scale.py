"""What only shows at scale, tried at a size that a test can afford: 20 million parameters, vectors in files.

The other files hold everything in memory; none would see a vector that is copied once too often, a sum of millions of
float32 numbers that loses digits, a step of a difference that is too long for a sharp direction, or a run on disk that
cannot be taken up again.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from flatmin import Objective
from flatmin.curvature import Hessian, Matrix, eigenpairs
from flatmin.linalg.basis import Basis
from nets import classification, symmetric

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "billion.py"


@pytest.fixture(scope="module")
def billion():
    spec = importlib.util.spec_from_file_location("billion", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The script's result at 20M: killed in the middle once, then called again."""
    folder = tmp_path_factory.mktemp("billion")
    command = [sys.executable, str(SCRIPT), "--parameters", "20M", "--folder", str(folder), "--batch", "2", "--length",
               "16", "--threads", "1"]
    log = tmp_path_factory.mktemp("log") / "stderr"
    with open(log, "w") as stderr:
        first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True)
        deadline = time.monotonic() + 120
        while not ((folder / "billion-20M.pt").exists() and "matvec 3," in log.read_text()) and \
                first.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        first.send_signal(signal.SIGKILL)
        first.communicate()
    assert first.returncode == -signal.SIGKILL, log.read_text()
    left = sorted(os.listdir(folder))
    second = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert second.returncode == 0, second.stderr
    return json.loads(second.stdout), second.stderr, left, os.listdir(folder)


@pytest.mark.slow
def test_the_largest_eigenvalue_of_a_language_model_from_files(finished, billion):
    found, *_ = finished
    assert found["converged"] and found["certified"] and found["relative_residual"] <= 0.05
    assert found["product_error"] < 0.05
    tokens = torch.randint(0, billion.VOCABULARY, (2, 17), generator=torch.Generator().manual_seed(1))
    data = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    exact = eigenpairs(Hessian(Objective(billion.gpt("20M"), F.cross_entropy, data)), tol=0.02)
    slack = found["relative_residual"] + found["product_error"] + 0.02
    assert abs(found["eigenvalue"] / exact.largest - 1) < slack
    weights = found["weights_gib"] * 2**30
    assert found["peak_anonymous_gib"] * 2**30 < weights + 900e6    # torch itself, activations: no second copy of w


@pytest.mark.slow
def test_it_goes_on_after_a_kill(finished):
    _, log, left, after = finished
    assert left == ["billion-20M.pt", "billion-20M.pt.basis"] and after == []
    first = next(line for line in log.splitlines() if ": matvec " in line)
    assert int(first.split("matvec ")[1].split(",")[0]) > 1, log      # the first run began with matvec 1


def test_files_and_memory_give_the_same_spectrum(tmp_path):
    objective = classification()
    before = [p.clone() for p in objective.parameters]
    plain = Hessian(objective, product="finite_difference")
    filed = Hessian(objective, product="finite_difference", place="disk", folder=str(tmp_path))
    a, b = eigenpairs(plain, 2), eigenpairs(filed, 2, place="disk", folder=str(tmp_path))
    assert torch.equal(a.eigenvalues, b.eigenvalues) and torch.equal(a.eigenvectors, b.eigenvectors)
    assert all(torch.equal(p, q) for p, q in zip(before, objective.parameters, strict=True))
    assert not os.listdir(tmp_path)
    with pytest.raises(ValueError, match='for product="finite_difference"'):
        Hessian(objective, place="disk")


def test_coefficients_of_long_vectors_keep_their_digits(tmp_path):
    """A float32 sum over all numbers at once would be off by 1e-4 and more."""
    class Long(Matrix):
        def __init__(self, n):
            super().__init__(torch.zeros(1, 1))
            self.size = self.length = n
            self.numels = [n]

    operator = Long(5_000_000)
    generator = torch.Generator().manual_seed(0)
    for place in ("device", "disk"):
        V = Basis(operator, 2, place, str(tmp_path))
        w = torch.rand(operator.size, generator=generator)
        for i in range(2):
            V.put(i, torch.rand(operator.size, generator=generator), 1e-3)
        exact = V.rows.double() @ w.double()
        assert torch.allclose(V.project(w, 2).double(), exact, rtol=2e-6)
        rest = w.double() - V.rows.double().T @ exact
        V.remove(w, 2)
        assert torch.allclose(w.double(), rest, atol=1e-6 * float(rest.abs().max()))


def test_a_step_too_long_for_a_sharp_direction_is_made_shorter():
    """L = cos(50 w₀) + ½‖w‖²: ε^⅓ (1 + ‖w‖) spans whole periods of it, which the losses alone give away."""
    class Sharp(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.full((1000,), 3.0))

        def forward(self, x):
            return torch.cos(50 * (self.w[0] - 3)) * -1 + 0.5 * self.w.square().sum() + 0 * x.sum()

    objective = Objective(Sharp(), lambda out, _: out, torch.zeros(1), forward=lambda m, x: m(x))
    H = Hessian(objective, product="finite_difference")
    v = torch.zeros(1000)
    v[0] = 1
    product = H @ v
    assert abs(float(product[0]) / 2501 - 1) < 0.02 and H.error < 0.05


def test_a_basis_on_disk_is_taken_up_where_it_was(tmp_path, monkeypatch):
    file = str(tmp_path / "run.pt")

    class Dying(Matrix):
        products = 0

        def _matvec(self, v):
            Dying.products += 1
            if Dying.products == 30:
                raise RuntimeError("killed")
            return super()._matvec(v)

    matrix = symmetric(torch.linspace(-1, 1, 300))
    A, options = Dying(matrix), {"k": 2, "tol": 1e-6, "basis": 20, "place": "disk", "folder": str(tmp_path)}
    clock = itertools.count(0, 10)      # seconds: time to write the state at each look
    monkeypatch.setattr("flatmin.linalg.checkpoint.time.monotonic", lambda: next(clock))
    with pytest.raises(RuntimeError, match="killed"):
        eigenpairs(A, checkpoint=file, **options)
    assert sorted(os.listdir(tmp_path)) == ["run.pt", "run.pt.basis"]
    resumed = eigenpairs(A, checkpoint=file, **options)
    monkeypatch.undo()
    whole = eigenpairs(Matrix(matrix), **options | {"place": "device"})
    assert torch.allclose(resumed.eigenvalues, whole.eigenvalues, atol=1e-12) and bool(resumed.converged.all())
    assert not os.listdir(tmp_path)
