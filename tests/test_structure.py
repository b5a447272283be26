"""How the package is built, in numbers: ``python tests/test_structure.py`` prints them, the tests hold their limits.

Counted by reading the source. A limit is lowered when the code gets better; it is raised only with a reason beside it.
"""

from __future__ import annotations

import ast
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "flatmin"
FILES = sorted(SOURCE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text()) for path in FILES}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)

LIMITS = {
    "circles between files": 0,
    "own imports inside functions": 3,
    "private names used across files": 15,
    "isinstance on a direction, rule or cadence": 0,
    "longest file": 450,
    "median function": 5,
    "90th percentile function": 17,
}


def module_of(path: Path) -> str:
    parts = ["flatmin", *path.relative_to(SOURCE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


def own_imports(path: Path) -> Iterator[tuple[ast.ImportFrom, str, str]]:
    """Every import of our own: the statement, the module it reads, and the name taken from it ("" for a module)."""
    package = module_of(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(TREES[path]):
        if not isinstance(node, ast.ImportFrom):
            continue
        base = package[:len(package) - node.level + 1] if node.level else []
        module = ".".join([*base, *([node.module] if node.module else [])])
        if module != "flatmin" and not module.startswith("flatmin."):
            continue
        for alias in node.names:
            inner = f"{module}.{alias.name}"
            yield (node, inner, "") if inner in MODULES else (node, module, alias.name)


def defined_in(module: str, name: str, seen: tuple[str, ...] = ()) -> str:
    """The module that a name exported by a package comes from, so that ``__init__`` files make no circles."""
    path = MODULES.get(module)
    if path is None or path.name != "__init__.py" or not name or module in seen:
        return module
    for _, source, taken in own_imports(path):
        if taken == name:
            return defined_in(source, name, (*seen, module))
        if not taken and source.rsplit(".", 1)[-1] == name:
            return source
    return module


def circles() -> list[list[str]]:
    """Groups of files that import each other, by whatever way, imports inside functions and for typing included."""
    edges = {module: {defined_in(source, name) for _, source, name in own_imports(path)} - {module}
             for module, path in MODULES.items()}
    for module, path in MODULES.items():
        if path.name == "__init__.py":      # a table of contents: whoever needs a name in it needs the file it is from
            edges[module] = set()
    reached: dict[str, set[str]] = {}
    for module in edges:
        found, todo = set(), [module]
        while todo:
            for following in edges.get(todo.pop(), ()):
                if following not in found:
                    found.add(following)
                    todo.append(following)
        reached[module] = found
    groups = {tuple(sorted({m for m in reached[module] if module in reached[m]} | {module}))
              for module in edges if module in reached[module]}
    return [list(group) for group in sorted(groups)]


def imports_inside_functions() -> list[str]:
    out = []
    for path in FILES:
        inside = {id(inner) for node in ast.walk(TREES[path]) if isinstance(node, FUNCTIONS)
                  for inner in ast.walk(node)}
        out += sorted({f"{path.relative_to(SOURCE)}:{node.lineno} {source}" for node, source, _ in own_imports(path)
                       if id(node) in inside})
    return out


def private_across_files() -> list[str]:
    """``from .x import _y``, and ``thing._y`` where this file defines no ``_y`` and another one does."""
    def defined(tree: ast.Module) -> set[str]:
        names = set()
        for node in ast.walk(tree):
            if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
                names.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                names.add(node.attr)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
        return {name for name in names if name.startswith("_") and not name.startswith("__")}

    here = {path: defined(tree) for path, tree in TREES.items()}
    everywhere = set().union(*here.values())
    out = set()
    for path, tree in TREES.items():
        for _, source, name in own_imports(path):
            if name.startswith("_") and not name.startswith("__"):
                out.add(f"{path.relative_to(SOURCE)} {source}.{name}")
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr in everywhere - here[path]:
                base = node.value
                if not (isinstance(base, ast.Name) and base.id in {"self", "cls", "torch"}):
                    out.add(f"{path.relative_to(SOURCE)} .{node.attr}")
    return sorted(out)


def part_names() -> set[str]:
    """The classes of the axes: directions, rules, cadences."""
    return {node.name for path in FILES if path.parent.name == "ascent" and path.stem in {
        "directions", "composed_directions", "metrics", "rules", "cadences"} for node in TREES[path].body
        if isinstance(node, ast.ClassDef)}


def isinstance_on_parts() -> list[str]:
    parts = part_names()
    assert {"Gradient", "Plain", "EveryStep"} <= parts
    out = []
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance" and len(node.args) == 2:
                asked = {n.id for n in ast.walk(node.args[1]) if isinstance(n, ast.Name)}
                attribute = {n.attr for n in ast.walk(node.args[1]) if isinstance(n, ast.Attribute)}
                if (asked | attribute) & parts:
                    out.append(f"{path.relative_to(SOURCE)}:{node.lineno} {ast.unparse(node)}")
    return out


def function_lengths() -> list[int]:
    """Lines of every function without its docstring."""
    out = []
    for tree in TREES.values():
        for node in ast.walk(tree):
            if isinstance(node, FUNCTIONS):
                first = node.body[0]
                said = (first.end_lineno - first.lineno + 1 if ast.get_docstring(node) is not None else 0)
                out.append(node.end_lineno - node.lineno + 1 - said)
    return out


def figures() -> dict[str, tuple[float, list[str]]]:
    """Every figure with what makes it up."""
    lengths = sorted(function_lengths())
    longest = sorted(((len(path.read_text().splitlines()), str(path.relative_to(SOURCE))) for path in FILES),
                     reverse=True)
    lists = {
        "circles between files": [" <-> ".join(group) for group in circles()],
        "own imports inside functions": imports_inside_functions(),
        "private names used across files": private_across_files(),
        "isinstance on a direction, rule or cadence": isinstance_on_parts(),
    }
    return {name: (len(found), found) for name, found in lists.items()} | {
        "longest file": (longest[0][0], [f"{name}: {lines}" for lines, name in longest[:6]]),
        "median function": (statistics.median(lengths), []),
        "90th percentile function": (lengths[int(0.9 * len(lengths))], []),
    }


def test_there_is_something_to_count():
    assert len(FILES) > 50 and len(function_lengths()) > 500
    assert any(name for path in FILES for _, _, name in own_imports(path))


@pytest.mark.parametrize("name", LIMITS)
def test_a_limit_is_kept(name):
    value, found = figures()[name]
    assert value <= LIMITS[name], "\n".join(found)


if __name__ == "__main__":
    for name, (value, found) in figures().items():
        print(f"{name}: {value:g} (at most {LIMITS[name]})")
        for line in found:
            print(f"    {line}")
    print(f"files: {len(FILES)}, lines: {sum(len(p.read_text().splitlines()) for p in FILES)}")
