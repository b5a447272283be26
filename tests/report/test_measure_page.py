"""The table and the page of a measurement: digits, signs, labels and named axes, from a made-up record."""

import re

import pytest
from matplotlib.figure import Figure

from flatmin import report
from flatmin.report import measure_figures

X = [float(i - 5) for i in range(11)]


def made_up(residuals=(1e-3, 2e-3), stderr=0.31):
    error = {"data_stderr": 0.0456}
    return {"kind": "measure", "status": "complete", "created": "2026-01-02", "settings": {"rho": 0.1}, "timing": {},
            "data": {"name": "mine:objective", "loss": 1.0, "samples": 40, "mode": "eval", "loss_function": "MSELoss"},
            "model": {"name": "Linear", "parameters": 10, "weights": "w.pt"}, "failed": {"m_sharpness": "too few <b>"},
            "warnings": {"worst_case": [{"kind": "W", "text": "odd"}], "one_step": [{"kind": "W", "text": "odd"}]},
            "results": {
                "one_step": {"value": 0.2912345, "first_order": 0.3, "second_order": -0.01, "expansion_holds": True,
                             "loss": 1.0, "perturbed_loss": 1.29, "gradient_norm": 3.0, "radius": 0.1,
                             "settings": {"rho": 0.1}, **error},
                "spectrum": {"eigenvalues": [1.0, 4.0], "residuals": list(residuals), "converged": [True, False],
                             "matvecs": 12},
                "trace": {"value": 6.04321, "stderr": stderr, "converged": True, "matvecs": 9, "confidence": 0.68,
                          "interval": [5.7, 6.3], "settings": {"rtol": 0.05}},
                "density": {"x": X, "density": [0.1] * 11, "density_stderr": [0.01] * 11, "matvecs": 8, "zero": 1e-3,
                            "mass_at_zero": {"value": 0.2, "stderr": 0.0}, "trace": {"value": 6.0, "stderr": 0.5}},
                "line": {"x": X, "values": [x * x for x in X], "stderr": [1.0] * 11, "samples": [[0.0]] * 3},
                "comparison": {"settings": {"names": ["a.pt", "b.pt"]}, "sentence": "a is sharper.", "scale": 1.1,
                               "rows": {"one_step": {"a": 0.3, "b": 0.2, "value": 0.1, "stderr": 0.02, "sign": 1,
                                                     "data_stderr": 0.02, "invariant": False}},
                               "path": {"x": X, "values": X, "models": [0.0, 2.0]}}}}


def test_every_axis_has_a_name(monkeypatch):
    named = []

    def named_axes(paint, title, height=3.7):
        axes = Figure().add_subplot()
        paint(axes)
        named.append((title, axes.get_xlabel(), axes.get_ylabel() or axes.get_yticklabels()[0].get_text()))
        return title

    monkeypatch.setattr(measure_figures, "draw", named_axes)
    report.page(made_up())
    assert len(named) == 5 == len({title for title, *_ in named}) and all(all(row) for row in named), named


@pytest.mark.parametrize(("stderr", "shown"), [(0.31, "6.04"), (3.1, "6.0"), (0.0012, "6.0432")])
def test_a_number_has_the_digits_that_its_error_supports(stderr, shown):
    record = made_up(stderr=stderr)
    line = next(line for line in report.table(record).splitlines() if line.startswith("trace of the Hessian"))
    assert line.split()[4] == shown and f'<p class="big">{shown}</p>' in report.page(record)


def test_signs_are_spelled_and_an_error_of_zero_is_not_a_spread():
    shown, page = report.table(made_up()), report.page(made_up()).replace("\N{NO-BREAK SPACE}", " ")
    assert "= 0.300 slope − 0.0100 curvature" in shown
    for text in (shown, page):
        assert "+0.100 ± 0.020" in text and "± 0 " not in text and not re.search(r"\+ [-−]", text)
    assert "20 % of all eigenvalues are next to zero" in page


def test_people_read_labels_and_each_column_of_errors_says_which():
    page = report.page(made_up())
    assert "Not measured: m-sharpness: too few &lt;b&gt;" in page and page.count("odd (worst case; one-step") == 1
    for identifier in ("worst_case", "m_sharpness", "largest_eigenvalue"):
        assert identifier not in page.split("Read with care")[0] and identifier not in report.table(made_up())
    assert "difference ± standard error</th>" in page and "residual</th>" in page and "error</th>" not in page.replace(
        "± standard error</th>", "")
    assert "✗ not converged" in page and "NOT CONVERGED" in report.table(made_up())


def test_on_a_phone_every_cell_names_its_column():
    tables = re.findall(r"<table.*?</table>", report.page(made_up()), re.S)
    assert len(tables) == 2
    for table in tables:
        heads = re.findall(r'<th scope="col">([^<]*)', table)[1:]
        rows = table.count('<th scope="row">')
        assert re.findall(r'<td data-head="([^"]*)"', table) == rows * heads
