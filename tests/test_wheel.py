"""The wheel, built and installed into environments that hold nothing else than what it declares.

Nothing is downloaded but the build backend, and that only where it is not installed: an environment is a new one with
links to the running one's copies of exactly the packages that the declared names bring along.
"""

import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def run(*command, cwd=None):
    """A command that does not see where the tests themselves find the package."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run([str(c) for c in command], cwd=cwd, env=clean, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    isolation = ["--no-build-isolation"] * (importlib.util.find_spec("hatchling") is not None)
    done = run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", *isolation, "-w", folder, ROOT)
    assert done.returncode == 0, done.stderr
    (file,) = folder.iterdir()
    return file


def all_needed(names):
    """Requirements and what they require in turn, as far as they apply to this platform."""
    found, left = {}, [Requirement(name) for name in names]
    while left:
        one = left.pop()
        key = canonicalize_name(one.name), frozenset(one.extras)
        if key in found or one.marker and not any(one.marker.evaluate({"extra": e}) for e in (one.extras or {""})):
            continue
        found[key] = one.name
        extras = one.extras or {""}
        left += [r for r in map(Requirement, metadata.requires(one.name) or [])
                 if r.marker is None or any(r.marker.evaluate({"extra": e}) for e in extras | {""})]
    return set(found.values())


def environment(folder, wheel, names):
    """A new environment with the wheel and links to the packages that ``names`` need; returns its bin folder."""
    assert run(sys.executable, "-m", "venv", "--without-pip", folder).returncode == 0
    (site,) = folder.glob("lib/python*/site-packages")
    for name in all_needed(names):
        distribution = metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or () if file.parts[0] != ".."}:
            link = site / top
            if not link.exists() and top != "__pycache__":
                link.symlink_to(Path(str(distribution.locate_file(top))))
    done = run(sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install", "--quiet", "--no-deps",
               "--no-index", wheel)
    assert done.returncode == 0, done.stderr
    return folder / "bin"


CORE = """
import sys, torch, flatmin
assert flatmin.__file__.startswith(sys.prefix), flatmin.__file__
model, x, y = torch.nn.Linear(4, 3), torch.randn(8, 4), torch.arange(8) % 3
optimizer = flatmin.SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1)
before = model.weight.detach().clone()
def closure():
    loss = torch.nn.functional.cross_entropy(model(x), y)
    loss.backward()
    return loss
optimizer.step(closure)
assert not torch.equal(before, model.weight)
assert not {"numpy", "matplotlib", "jsonargparse"} & set(sys.modules)
"""


@pytest.mark.slow
def test_the_core_alone_needs_torch_alone(wheel, tmp_path):
    bin = environment(tmp_path / "env", wheel, PROJECT["dependencies"])
    done = run(bin / "python", "-c", CORE, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for call in (["--help"], ["compare"]):
        done = run(bin / "flatmin", *call, cwd=tmp_path)
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr == ("flatmin: this needs jsonargparse and docstring_parser, which cannot be imported: "
                               "pip install 'flatmin[cli]'\n")


@pytest.mark.slow
def test_with_the_extra_a_few_steps_of_compare(wheel, tmp_path):
    bin = environment(tmp_path / "env", wheel, [*PROJECT["dependencies"], *EXTRAS["cli"]])
    assert run(bin / "flatmin", "--help", cwd=tmp_path).stdout.startswith("usage: flatmin")
    (tmp_path / "mine.py").write_text(
        "import torch\nfrom flatmin.recipes import Data, Recipe\n"
        "def data(folder=None):\n"
        "    x = torch.randn(96, 4); y = (x[:, 0] > 0).long()\n"
        "    return Data(x[:64], y[:64], x[64:], y[64:], classes=2)\n"
        "recipe = Recipe('mine', lambda: torch.nn.Linear(4, 2), data, epochs=1)\n")
    done = run(bin / "flatmin", "compare", "mine:recipe", "--methods", "sgd,sam", "--seeds", "1", "--rho", "0.1",
               "--out", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "report.html").exists() and "SAM" in done.stdout
    assert "training steps, about" in done.stderr


@pytest.mark.parametrize("extra", [None, *EXTRAS])
def test_what_an_extra_declares_is_pinned_for_the_tests(extra):
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines()
                if re.match(r"\w[\w.-]*==", line))
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    names = PROJECT["dependencies"] if extra is None else EXTRAS[extra]
    found = [Requirement(name) for name in names if not name.startswith("flatmin[")]
    assert found
    for one in found:
        assert canonicalize_name(one.name) in pins, f"{one.name} is not in constraints.txt"
        assert one.specifier.contains(pins[canonicalize_name(one.name)], prereleases=True), one
