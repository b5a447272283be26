"""Without an optional package a verb says so in one line, before it does any work."""

import subprocess
import sys

import pytest

BLOCKED = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError("blocked: " + name)
sys.meta_path.insert(0, Blocker())
from flatmin import cli
sys.exit(cli.main({arguments!r}))
"""
MINE = """
import torch
import flatmin
def objective():
    data = torch.randn(4, 3), torch.arange(4) % 2
    return flatmin.Objective(torch.nn.Linear(3, 2), torch.nn.CrossEntropyLoss(), data)
"""
COMPARE = ["compare", "--epochs", "1", "--seeds", "1", "--methods", "sgd", "--out", "run", "--quiet"]
MEASURE = ["measure", "mine:objective", "--metrics", "one_step", "--out", "run", "--quiet"]


def without(blocked, arguments, folder):
    (folder / "mine.py").write_text(MINE)
    code = BLOCKED.format(blocked=blocked, arguments=arguments)
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(("blocked", "arguments", "named"), [
    (["matplotlib"], MEASURE, "matplotlib"),
    (["numpy", "matplotlib"], MEASURE, "numpy and matplotlib"),
    (["safetensors"], [*MEASURE, "--checkpoint", "w.safetensors"], "safetensors"),
    (["matplotlib", "safetensors"], COMPARE, "matplotlib and safetensors"),
    (["sklearn"], COMPARE, "scikit-learn"),
    (["matplotlib"], ["report", "run"], "matplotlib"),
])
def test_what_is_missing_is_named_first(blocked, arguments, named, tmp_path):
    done = without(blocked, arguments, tmp_path)
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]         # torch itself warns of a missing NumPy
    assert last == f"flatmin: this needs {named}, which cannot be imported: pip install 'flatmin[cli]'"
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_verb_asks_for_no_more_than_it_needs(tmp_path):
    done = without(["safetensors", "sklearn", "tqdm"], MEASURE, tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "report.html").exists()
