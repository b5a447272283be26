"""What ``import flatmin`` offers: every name, each imported when it is first used."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import flatmin


def in_a_new_process(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("code", [
    "import flatmin; flatmin.SAM, flatmin.Sharpener, flatmin.Objective, flatmin.presets.sam, flatmin.curvature.Hessian",
    "from flatmin import Sharpener, SAM, Objective, presets; presets.sam",
    "from flatmin.presets import sam; from flatmin import *; SAM, Objective, presets.asam, curvature.Hessian",
    "from flatmin import presets as a; import flatmin, flatmin.presets as b; assert a is b is flatmin.presets",
])
def test_every_way_to_import_works(code):
    in_a_new_process(code)


def test_import_alone_brings_no_torch():
    code = "import flatmin, sys; flatmin.__version__; dir(flatmin); print('torch' in sys.modules)"
    assert in_a_new_process(code) == ["False"]


def test_all_dir_and_the_editors_see_the_same_names():
    assert set(flatmin.__all__) <= set(dir(flatmin)) and len(set(flatmin.__all__)) == len(flatmin.__all__)
    for name in flatmin.__all__:
        assert getattr(flatmin, name) is not None and name in flatmin.__doc__
    assert not hasattr(flatmin, "nosuch")
    with pytest.raises(AttributeError, match="module 'flatmin' has no attribute 'Sam'"):
        getattr(flatmin, "Sam".title())
    tree = ast.parse(Path(flatmin.__file__).read_text())
    typed = next(node for node in tree.body if isinstance(node, ast.If))
    assert {alias.name for part in typed.body for alias in part.names} == set(flatmin.__all__)
