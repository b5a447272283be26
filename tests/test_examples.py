"""Every example runs, and shows what it says it shows."""

import importlib.util
from pathlib import Path

import pytest
import torch

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


def load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def test_there_are_examples_and_each_has_a_test_here():
    tested = {"edge_of_stability", "paths", "train_recipe"}
    assert {p.stem for p in EXAMPLES} == tested


@pytest.mark.slow
def test_edge_of_stability(tmp_path):
    """λ₁ reaches 2/η under gradient descent; under SAM it stays well below, near its own edge."""
    kept = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        module = load(next(p for p in EXAMPLES if p.stem == "edge_of_stability"))
        plain, sam = module.main(["--steps", "700", "--every", "50", "--rhos", "0,0.2", "--out",
                                  str(tmp_path / "e.svg")])
    finally:
        torch.set_default_dtype(kept)
    assert max(plain.sharpness[-4:]) == pytest.approx(2 / 0.3, rel=0.15)
    assert max(sam.sharpness[-4:]) < 0.7 * 2 / 0.3
    assert sam.sharpness[-1] == pytest.approx(sam.edge[-1], rel=0.5)
    assert (tmp_path / "e.svg").stat().st_size > 5000


@pytest.mark.slow
def test_paths(capsys):
    """After a few steps the logit path leads in a language model, and less so along M⁻¹g."""
    kept = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        module = load(next(p for p in EXAMPLES if p.stem == "paths"))
        found = module.main(["--steps", "20", "--seeds", "2", "--vocabularies", "32", "--spectra"])
    finally:
        torch.set_default_dtype(kept)
    for runs in found.values():
        for run in runs:
            assert {step for step, _ in run.paths} == {0, 2, 6, 20} and len(run.spectrum.before.eigenvalues) == 10
            for record in run.paths.values():
                assert record.tau_logit + record.tau_func + record.tau_cross == pytest.approx(1, abs=1e-4)
    for run in found["words, 32"]:
        plain, preconditioned = run.paths[20, "gradient"], run.paths[20, "preconditioned"]
        assert plain.tau_logit > 5 * plain.tau_func
        assert preconditioned.ratio < plain.ratio
    assert capsys.readouterr().out.count("| words, 32 |") == 8


def test_train_recipe(tmp_path):
    """The student agrees with its teacher better than before; a second call finds the run complete."""
    kept = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        module = load(next(p for p in EXAMPLES if p.stem == "train_recipe"))
        arguments = ["--steps", "40", "--device", "cpu", "--out", str(tmp_path)]
        first, again = module.main(arguments), module.main(arguments)
    finally:
        torch.set_default_dtype(kept)
    agreement = [row["tune"]["agreement"] for row in first.evaluations]
    assert agreement[-1] > 0.7 > agreement[0]
    assert again.evaluations == first.evaluations
