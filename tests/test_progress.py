"""What is said while a long computation runs."""

import re

import torch

from flatmin.curvature import Matrix, eigenpairs, eigenvalues, power_iteration, spectral_density, trace
from flatmin.progress import left, reporter
from nets import symmetric

A = Matrix(symmetric(torch.linspace(0, 1, 200) ** 4))


def test_the_rest_of_a_geometric_error_is_foretold_exactly():
    for rate in (0.5, 0.9):
        history = [(n, rate**n, rate**20.5) for n in range(1, 11)]
        assert left(history) == 11
    assert left([(1, 1.0, 0.1)]) == left([(1, 1.0, 0.1), (2, 2.0, 0.1)]) == left([(1, 1.0, 0.1), (2, 0.05, 0.1)]) == 0
    assert left([]) == 0


def test_every_algorithm_says_how_many_products_are_left():
    runs = {"eigenpairs": lambda p: eigenpairs(A, 5, progress=p), "trace": lambda p: trace(A, progress=p),
            "values": lambda p: eigenvalues(A, 2, progress=p), "power": lambda p: power_iteration(A, progress=p),
            "density": lambda p: spectral_density(A, probes=2, steps=20, progress=p),
            "xtrace": lambda p: trace(A, method="xtrace", progress=p)}
    for name, run in runs.items():
        said = []
        run(lambda done, text, said=said: said.append((done, text)))
        assert [done for done, _ in said] == sorted(done for done, _ in said), name
        assert any(re.search(r"about \d+ products left", text) for _, text in said), (name, said)


def test_the_line_has_pace_and_time(capsys, monkeypatch):
    clock = iter((0.0, 30.0, 60.0, 61.0))
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    with reporter(True, "eigenpairs") as report:
        report(11, "1 of 2 converged", 20)      # resumed after 10
        report(12, "2 of 2 converged", 2)
    said = capsys.readouterr().err
    assert "11 products, 1 of 2 converged, 30 s a product, about 10 min left" in said
    assert "12 products, 2 of 2 converged, 30 s a product, about 60 s left" in said


def test_at_most_five_lines_a_second_and_none_by_default(capsys, monkeypatch):
    for run in (eigenpairs, eigenvalues):
        run(A, 2)
    for run in (trace, power_iteration, spectral_density):
        run(A)
    assert capsys.readouterr().err == ""
    clock = iter((0.0, 0.3, 0.35, 0.45, 0.6, 0.7))
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    with reporter(True, "eigenpairs") as report:
        for done in range(1, 5):
            report(done, "of 4")
    said = capsys.readouterr().err
    assert "1 products" in said and "4 products" in said and "2 products" not in said and "3 products" not in said
