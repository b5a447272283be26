"""What is said while a long computation runs."""

import io
import re
import sys

import pytest
import torch

from flatmin.curvature import Matrix, eigenpairs, eigenvalues, power_iteration, spectral_density, trace
from flatmin.progress import Display, left, reporter
from nets import symmetric

A = Matrix(symmetric(torch.linspace(0, 1, 200) ** 4))


def test_the_rest_of_a_geometric_error_is_predicted_exactly():
    for rate in (0.5, 0.9):
        history = [(n, rate**n, rate**20.5) for n in range(1, 11)]
        assert left(history) == 11
    assert left([(1, 1.0, 0.1)]) == left([(1, 1.0, 0.1), (2, 2.0, 0.1)]) == left([(1, 1.0, 0.1), (2, 0.05, 0.1)]) == 0
    assert left([]) == 0


def test_every_algorithm_says_how_many_matvecs_are_left():
    runs = {"eigenpairs": lambda p: eigenpairs(A, 5, progress=p), "trace": lambda p: trace(A, progress=p),
            "values": lambda p: eigenvalues(A, 2, progress=p), "power": lambda p: power_iteration(A, progress=p),
            "density": lambda p: spectral_density(A, probes=2, steps=20, progress=p),
            "xtrace": lambda p: trace(A, method="xtrace", progress=p)}
    for name, run in runs.items():
        said = []
        run(lambda done, text, said=said: said.append((done, text)))
        assert [done for done, _ in said] == sorted(done for done, _ in said), name
        assert any(re.search(r"about \d+ matvecs left", text) for _, text in said), (name, said)


def test_the_line_has_pace_and_time(capsys, monkeypatch):
    clock = iter((0.0, 30.0, 60.0, 61.0))
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    with reporter(True, "eigenpairs") as report:
        report(11, "1 of 2 converged", 20)      # resumed after 10
        report(12, "2 of 2 converged", 2)
    assert capsys.readouterr().err.splitlines() == [
        "eigenpairs: 11 matvecs, 1 of 2 converged, 30 s a matvec, about 10:00 left",
        "eigenpairs: 12 matvecs, 2 of 2 converged, 30 s a matvec, about 1:00 left", "eigenpairs: done in 1:01"]


def test_steps_of_a_known_total_say_what_is_left(capsys, monkeypatch):
    clock = iter(float(10 * i) for i in range(100))
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    display = Display("sam", unit="step", total=10)
    for _ in range(3):
        display.step()
    display.say("asam")
    display.step()
    display.line("halfway")
    display.end()
    assert capsys.readouterr().err.splitlines() == [
        "sam: 3 steps, 10 s a step, about 1:10 left", "halfway"], "one line in 20 seconds"


@pytest.mark.parametrize("progress", [False, Display("t", quiet=True)])
def test_quiet_is_quiet(progress, capsys, monkeypatch):
    monkeypatch.setattr("time.monotonic", iter(float(100 * i) for i in range(100)).__next__)
    with reporter(progress, "trace") as report:
        report(1, "some", 3)
    Display("t", quiet=True).line("text")
    Display("t", quiet=True).end("text")
    assert capsys.readouterr() == ("", "")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_at_a_terminal_it_is_a_bar_of_tqdm(monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    display = Display("eigenpairs", seconds=0.0)
    display(41, "1 of 2 converged", 59)         # resumed after 40
    bar = display._bar
    assert (bar.n, bar.initial, bar.total) == (41, 40, 100)
    display(50, "2 of 2 converged")
    assert (bar.n, bar.total) == (50, None)
    display.line("a line of its own")
    display.end("done")
    shown = terminal.getvalue()
    assert "\r" in shown and "eigenpairs" in shown and shown.endswith("eigenpairs: done\n")
    assert "a line of its own\n" in shown


def test_without_tqdm_a_terminal_gets_lines(monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setattr("time.monotonic", iter(float(100 * i) for i in range(100)).__next__)
    with reporter(True, "trace") as report:
        report(1, "10 % error", 3)
    assert terminal.getvalue() == ("trace: 1 matvecs, 10 % error, 1e+02 s a matvec, about 5:00 left\n"
                                   "trace: done in 3:20\n")


def test_a_display_of_the_callers_shows_the_time_that_is_left(capsys, monkeypatch):
    monkeypatch.setattr("time.monotonic", iter(float(100 * i) for i in range(100)).__next__)
    with reporter(Display("2/4 trace"), "trace") as report:
        report(1, "10 % error", 3)
    assert capsys.readouterr().err == "2/4 trace: 1 matvecs, 10 % error, 1e+02 s a matvec, about 5:00 left\n"


def test_nothing_is_shown_by_default(capsys):
    for run in (eigenpairs, eigenvalues):
        run(A, 2)
    for run in (trace, power_iteration, spectral_density):
        run(A)
    assert capsys.readouterr().err == ""
