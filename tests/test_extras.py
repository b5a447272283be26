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


WHAT_TORCH_IS_NOT_NEEDED_FOR = """
import contextlib, io, sys
from flatmin import cli
for arguments in ({calls}):
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        assert cli.main(arguments) in (1, 2)
    heavy = {{"torch", "numpy", "matplotlib", "sklearn"}} & set(sys.modules)
    assert not heavy, (arguments, heavy)
"""


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
    (["jsonargparse"], ["--help"], "jsonargparse"),
    (["jsonargparse", "docstring_parser"], [], "jsonargparse and docstring_parser"),
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


def test_help_and_wrong_calls_import_nothing_heavy(tmp_path):
    """They took two seconds with torch, and take a fifth of one without."""
    calls = [[], ["--help"], ["--version"], ["compare", "--help"], ["measure", "--help"], ["report", "--help"],
             ["nosuch"], ["compare", "--nosuch"], ["compare", "--seeds", "many"], ["compare", "--seeds", "0"],
             ["compare", "--methods", "nosuch"], ["compare", "--rho", "nosuch=1"], ["compare", "--config", "nowhere"],
             ["compare", "--resume", "nowhere"], ["measure"], ["measure", "m:o", "--k", "0"], ["report"]]
    code = WHAT_TORCH_IS_NOT_NEEDED_FOR.format(calls=", ".join(map(repr, calls)))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("flatmin: ") == len(done.stderr.splitlines()) == len(calls) - 6     # 5 helps, a version
