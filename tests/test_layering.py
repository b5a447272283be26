"""Imports point down only, and nothing lies deeper than ``src/flatmin/<folder>/<file>``.

The order is DESIGN section 3. Within one line of it (``objective`` and ``perturbed``, say) and within a folder imports
may go sideways, but files never form a circle; imports inside functions and for type checkers count too. Heavy
packages stay out of the core, which depends on torch alone.
"""

import ast
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "flatmin"
ORDER = [
    {"vectors", "results", "errors", "files", "progress", "parallel", "measures"},
    {"linalg"},
    {"batches", "perturbed", "composite_norms", "gradient_sum", "evaluation", "determinism", "checks", "objective"},
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


def inside(tree: ast.AST, *kinds: type) -> set[int]:
    """The nodes within statements of some kinds."""
    return {id(inner) for node in ast.walk(tree) if isinstance(node, kinds) for inner in ast.walk(node)}


def imported(path: Path, root: Path = SOURCE) -> list[tuple[str, str, int, bool]]:
    """Every import: (absolute module, name taken from it or "", line, whether it runs when the file is imported)."""
    package = ["flatmin", *path.relative_to(root).parent.parts]
    tree = ast.parse(path.read_text())
    typing = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
    late = inside(tree, ast.FunctionDef, ast.AsyncFunctionDef).union(*(inside(node, ast.stmt) for node in typing))
    out = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            out += [(alias.name, "", node.lineno, id(node) not in late) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[:len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            out += [(stem, alias.name, node.lineno, id(node) not in late) for alias in node.names]
    return out


def files_imported(root: Path) -> dict[str, set[str]]:
    """For every file, by its module, the files it imports; a folder's ``__init__`` counts as a file."""
    paths = {".".join(["flatmin", *p.relative_to(root).with_suffix("").parts]).removesuffix(".__init__"): p
             for p in root.rglob("*.py")}
    return {module: {found for stem, name, _, _ in imported(path, root)
                     for found in [f"{stem}.{name}" if f"{stem}.{name}" in paths else stem]
                     if found in paths and found not in (module, "flatmin")}
            for module, path in paths.items() if module != "flatmin"}


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """The groups of files of which each can be reached from each by imports."""
    def reached(start: str) -> set[str]:
        found, waiting = set(), [start]
        while waiting:
            new = edges[waiting.pop()] - found
            found |= new
            waiting += new
        return found

    reach = {module: reached(module) for module in edges}
    return sorted(map(list, {tuple(sorted(m for m in reach[module] if module in reach[m]))
                             for module in edges if module in reach[module]}))


EDGES = [(path, unit_of(path), f"{stem}.{name}".split(".")[1], line)
         for path in FILES for stem, name, line, _ in imported(path) if stem.split(".")[0] == "flatmin"]


def test_there_is_something_to_check():
    assert len(FILES) >= 50
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


def test_files_form_no_circle():
    edges = files_imported(SOURCE)
    assert len(edges) > 50 and sum(map(len, edges.values())) > 2 * len(edges)
    assert "flatmin.vectors" in edges["flatmin.objective"] | edges["flatmin.evaluation"]
    assert "flatmin.linalg.operator" in edges["flatmin.linalg.lanczos"]
    assert not circles(edges), "\n".join(" <-> ".join(group) for group in circles(edges))


@pytest.mark.parametrize("a, b", (
    ("from . import b", "from .a import x"),
    ("from . import b", "def f():\n    from . import a"),
    ("from .b import y", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .a import x"),
    ("from flatmin.folder.b import y", "import flatmin.folder.a"),
    ("from . import b", "from ..folder import x"),                      # by the folder's __init__
    ("from .b import y", "import torch\nfrom ..outside import z"),      # by a file elsewhere
))
def test_circles_are_found(a, b, tmp_path):
    (tmp_path / "folder").mkdir()
    for name, text in (("a", a), ("b", b), ("__init__", "from .a import x")):
        (tmp_path / "folder" / f"{name}.py").write_text(text)
    (tmp_path / "outside.py").write_text("from .folder import a")
    (tmp_path / "__init__.py").write_text("from .outside import z")
    group, = circles(files_imported(tmp_path))
    assert {"flatmin.folder.a", "flatmin.folder.b"} <= set(group)
    (tmp_path / "folder" / "b.py").write_text("import torch")
    assert not circles(files_imported(tmp_path))


def test_the_core_needs_torch_alone():
    """At import time, outside of the outer layers: the standard library and torch."""
    core = set().union(*ORDER[:4])
    foreign = [f"{path.relative_to(SOURCE)}:{line} imports {name}" for path in FILES if unit_of(path) in core
               for name, _, line, eager in imported(path)
               if eager and name.split(".")[0] not in {"torch", "flatmin", "__future__", *sys.stdlib_module_names}]
    assert not foreign, foreign


def test_importing_flatmin_imports_nothing_heavy():
    import subprocess

    heavy = "{'numpy.random', 'matplotlib', 'scipy', 'sklearn', 'lightning', 'transformers', 'tqdm', 'pandas'}"
    code = ("import torch, sys; before = set(sys.modules); import flatmin; "
            f"print(sorted({heavy} & (set(sys.modules) - before)))")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]", out.stdout
