"""Imports point down only, and nothing lies deeper than ``src/flatmin/<folder>/<file>``.

The order is DESIGN section 3. Within one line of it (``objective`` and ``perturbed``, say) imports may go sideways as
long as they never form a circle. Heavy packages stay out of the core, which depends on torch alone.
"""

import ast
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "flatmin"
ORDER = [
    {"vectors", "results", "errors", "progress", "measures"},
    {"linalg"},
    {"objective", "evaluation", "batches", "checks", "perturbed", "parallel", "composite_norms"},  # how data are read
    {"ascent", "curvature", "presets"},
    {"sharpness", "landscape", "paths", "generalization"},
    {"training"},
    {"relevance", "recipes", "report"},
    {"jobs", "integrations", "tensorscope", "compat"},
    {"cli"},
]
LEVEL = {unit: level for level, units in enumerate(ORDER) for unit in units}
FILES = sorted(p for p in SOURCE.rglob("*.py") if p != SOURCE / "__init__.py")


def unit_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported(path: Path) -> list[tuple[str, int, bool]]:
    """Every import that is ever carried out: (absolute module, line, at import time)."""
    package = ["flatmin", *path.relative_to(SOURCE).parent.parts]
    tree = ast.parse(path.read_text())
    lazy = {id(inner) for node in ast.walk(tree)
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) for inner in ast.walk(node)}
    only_typing = {id(inner) for node in ast.walk(tree)
                   if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
                   for inner in ast.walk(node)}
    out = []
    for node in ast.walk(tree):
        if id(node) in only_typing:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[:len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{stem}.{alias.name}" if stem == "flatmin" else stem for alias in node.names]
        else:
            continue
        out += [(name, node.lineno, id(node) not in lazy) for name in names]
    return out


EDGES = [(path, unit_of(path), name.split(".")[1], line)
         for path in FILES for name, line, _ in imported(path) if name.startswith("flatmin.")]


def test_there_is_something_to_check():
    assert len(FILES) >= 5
    assert any(source == "ascent" and target == "vectors" for _, source, target, _ in EDGES)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_every_file_has_a_place_in_the_order(path):
    assert unit_of(path) in LEVEL, f"{path}: add it to the design first"
    assert len(path.relative_to(SOURCE).parts) <= 2, "nothing lies deeper than src/flatmin/<folder>/<file>"


def test_imports_point_down():
    up = [f"{path.relative_to(SOURCE)}:{line} imports {target}" for path, source, target, line in EDGES
          if target in LEVEL and source in LEVEL and LEVEL[target] > LEVEL[source]]
    assert not up, up


def test_nobody_imports_from_the_package_itself():
    """``from flatmin import Sharpener`` inside the library hides which way an import points."""
    assert not [f"{path.relative_to(SOURCE)}:{line} imports flatmin.{target}" for path, source, target, line in EDGES
                if target not in LEVEL and not target.startswith("_")]


def test_sideways_imports_form_no_circle():
    sideways = {}
    for _, source, target, _ in EDGES:
        if source != target:
            sideways.setdefault(source, set()).add(target)

    def walk(unit, seen):
        assert unit not in seen, f"circle: {' -> '.join([*seen, unit])}"
        for target in sideways.get(unit, ()):
            walk(target, [*seen, unit])

    for unit in list(sideways):
        walk(unit, [])


def test_the_core_needs_torch_alone():
    """At import time, outside of the outer layers: the standard library and torch."""
    core = set().union(*ORDER[:4])
    foreign = [f"{path.relative_to(SOURCE)}:{line} imports {name}" for path in FILES if unit_of(path) in core
               for name, line, eager in imported(path)
               if eager and name.split(".")[0] not in {"torch", "flatmin", "__future__", *sys.stdlib_module_names}]
    assert not foreign, foreign


def test_importing_flatmin_imports_nothing_heavy():
    import subprocess

    heavy = "{'numpy.random', 'matplotlib', 'scipy', 'sklearn', 'lightning', 'transformers', 'tqdm', 'pandas'}"
    code = ("import torch, sys; before = set(sys.modules); import flatmin; "
            f"print(sorted({heavy} & (set(sys.modules) - before)))")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]", out.stdout
