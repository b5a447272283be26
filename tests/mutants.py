"""Do the tests notice a wrong program? ``make mutants``, or ``python tests/mutants.py --count 200 --seed 0``.

One operator, comparison, condition or constant of the core is changed at a time, in a scratch copy, and the tests that
execute the changed line are run until one of them fails. A mutant that no test fails on is printed. Which tests execute
a line is found once, by running the suite under coverage (``--map``; a quarter of an hour), and kept in ``.mutants``.

Files whose lines run only in other processes (ranks) are tried with the tests named in ``RANKS``.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".mutants"
CORE = ("vectors.py", "perturbed.py", "objective.py", "evaluation.py", "batches.py", "results.py", "parallel.py",
        "composite_norms.py", "ascent", "curvature", "linalg")
RANKS = ("tests/laws/test_parallel.py", "tests/curvature/test_curvature_ranks.py")
TESTS, SECONDS = 400, 400
"""At most so many tests and seconds a mutant."""

COMPARISONS = {ast.Lt: ast.GtE, ast.LtE: ast.Lt, ast.Gt: ast.LtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
               ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In}
OPERATORS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult,
             ast.FloorDiv: ast.Mult, ast.And: ast.Or, ast.Or: ast.And}


@dataclass(frozen=True)
class Mutant:
    """``change`` edits one node of the tree of ``file`` in place."""

    file: str
    line: int
    what: str
    index: int


def sites(tree: ast.Module) -> Iterator[tuple[int, str, Callable[[], None]]]:
    """Every change that can be made to a tree: its line, its description, and what carries it out."""
    for node in _executable(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in COMPARISONS:
            new = COMPARISONS[type(node.ops[0])]()
            yield line, f"{_text(node)}: {type(new).__name__}", lambda node=node, new=new: node.ops.__setitem__(0, new)
        elif isinstance(node, (ast.BinOp, ast.BoolOp, ast.AugAssign)) and type(node.op) in OPERATORS:
            new = OPERATORS[type(node.op)]()
            yield line, f"{_text(node)}: {type(new).__name__}", lambda node=node, new=new: setattr(node, "op", new)
        elif isinstance(node, (ast.If, ast.IfExp, ast.While)):
            test = node.test
            yield line, f"if {_text(test)}: negated", lambda node=node, test=test: setattr(
                node, "test", ast.UnaryOp(ast.Not(), test))
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.Not)):
            plus = ast.UAdd() if isinstance(node.op, ast.USub) else None
            yield line, f"{_text(node)}: sign or not removed", lambda node=node, plus=plus: (
                setattr(node, "op", plus) if plus else setattr(node, "operand", ast.UnaryOp(ast.Not(), node.operand)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float)):
            value = node.value
            new = not value if isinstance(value, bool) else value + 1 if isinstance(value, int) else 2 * value or 1.0
            yield line, f"{value!r} becomes {new!r}", lambda node=node, new=new: setattr(node, "value", new)


def _executable(tree: ast.AST) -> Iterator[ast.AST]:
    """Nodes apart from annotations, decorators, messages and exports."""
    for name, value in ast.iter_fields(tree):
        if name in ("annotation", "returns", "decorator_list", "type_comment"):
            continue
        for node in value if isinstance(value, list) else [value]:
            if not isinstance(node, ast.AST) or isinstance(node, (ast.Raise, ast.JoinedStr)) or _is_message(node):
                continue
            if isinstance(node, ast.Assign) and any(_text(t) in ("__all__", "__slots__") for t in node.targets):
                continue
            yield node
            yield from _executable(node)


def _is_message(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and "warn" in _text(node.value.func)


def _text(node: ast.AST) -> str:
    return ast.unparse(node)[:70]


def mutants() -> list[Mutant]:
    """All of them, over the core."""
    source, out = ROOT / "src" / "flatmin", []
    for part in CORE:
        path = source / part
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path] if path.exists() else []:
            tree = ast.parse(file.read_text())
            out += [Mutant(str(file.relative_to(ROOT)), line, what, i) for i, (line, what, _) in enumerate(sites(tree))]
    return out


def mutated(mutant: Mutant) -> str:
    """The source of a mutant's file with its change."""
    tree = ast.parse((ROOT / mutant.file).read_text())
    list(sites(tree))[mutant.index][2]()
    return ast.unparse(ast.fix_missing_locations(tree))


def make_map() -> dict[str, dict[str, list[str]]]:
    """file -> line -> the tests that execute it, from a run of the suite under coverage."""
    FOLDER.mkdir(exist_ok=True)
    data = FOLDER / "coverage"
    plugin = FOLDER / "contexts.py"
    plugin.write_text("import coverage, pytest\n\n\n@pytest.hookimpl(tryfirst=True)\n"
                      "def pytest_runtest_setup(item):\n"
                      "    coverage.Coverage.current().switch_context(item.nodeid)\n")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(FOLDER)]), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "coverage", "run", f"--data-file={data}", f"--source={ROOT / 'src'}", "-m",
                    "pytest", "-q", "-p", "contexts", "-p", "no:cacheprovider"], cwd=ROOT, env=environment)
    import coverage

    found = coverage.CoverageData(str(data))
    found.read()
    out = {str(Path(file).relative_to(ROOT)): {str(line): sorted(t for t in tests if "::" in t)
                                               for line, tests in found.contexts_by_lineno(file).items()}
           for file in found.measured_files()}
    (FOLDER / "map.json").write_text(json.dumps(out))
    return out


def executing(mutant: Mutant, lines: dict[str, list[str]]) -> list[str]:
    """The tests that execute a mutant's line; where it is part of a longer statement, that statement's first line."""
    for line in range(mutant.line, mutant.line - 6, -1):
        if str(line) in lines:  # a line that only an import executes concerns every test of the file
            return lines[str(line)] or sorted({test for tests in lines.values() for test in tests})
    return list(RANKS)


def choose(tests: list[str], rng: random.Random) -> list[str]:
    """Some of the tests: a row of every test function before the second row of any."""
    tests = rng.sample(tests, len(tests))
    seen: dict[str, int] = {}
    order = []
    for test in tests:
        function = test.split("[")[0]
        seen[function] = seen.get(function, 0) + 1
        order.append((seen[function], test))
    return [test for _, test in sorted(order, key=lambda pair: pair[0])][:TESTS]


def noticed(mutant: Mutant, tests: list[str], scratch: Path) -> str | None:
    """The last lines of the failure of the first test that fails, "timeout", or None."""
    target = scratch / mutant.file
    original = target.read_text()
    target.write_text(mutated(mutant))
    environment = os.environ | {"PYTHONPATH": str(scratch / "src"), "OMP_NUM_THREADS": "1",
                                "PYTHONDONTWRITEBYTECODE": "1"}
    arguments = scratch / "tests.txt"
    arguments.write_text("\n".join(tests))
    try:
        done = subprocess.run([sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--tb=no",
                               f"@{arguments}"], cwd=scratch, env=environment, timeout=SECONDS, capture_output=True,
                              text=True)
    except subprocess.TimeoutExpired:
        return "timeout"
    finally:
        target.write_text(original)
    return None if done.returncode == 0 else done.stdout.strip().splitlines()[-2 if done.stdout.count("\n") > 1 else -1]


def run(count: int, seed: int, workers: int, only: str) -> int:
    """Try ``count`` random mutants; the share that was noticed is printed, and every one that was not."""
    path = FOLDER / "map.json"
    lines = json.loads(path.read_text()) if path.exists() else make_map()
    rng = random.Random(seed)
    everything = [m for m in mutants() if only in m.file]
    picked = rng.sample(everything, min(count, len(everything)))
    plans = [(m, choose(executing(m, lines.get(m.file, {})), rng)) for m in picked]
    scratches = [FOLDER / f"scratch{i}" for i in range(workers)]
    for scratch in scratches:
        shutil.rmtree(scratch, ignore_errors=True)
        for name in ("src", "tests", "examples", "docs"):
            shutil.copytree(ROOT / name, scratch / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "README.md"):
            shutil.copy(ROOT / name, scratch / name)
    survivors, log = [], (FOLDER / "log.jsonl").open("a")
    start, done = time.monotonic(), 0
    free = list(scratches)

    def one(plan: tuple[Mutant, list[str]]) -> None:
        nonlocal done
        mutant, tests = plan
        scratch = free.pop()
        try:
            how = noticed(mutant, tests, scratch)
        finally:
            free.append(scratch)
        done += 1
        log.write(json.dumps(vars(mutant) | {"seed": seed, "tests": len(tests), "noticed": how}) + "\n")
        log.flush()
        if how is None:
            survivors.append(mutant)
        print(f"{done}/{len(plans)} {'noticed' if how else 'UNNOTICED'} {mutant.file}:{mutant.line} {mutant.what}",
              flush=True)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(one, plans))
    print(f"\n{len(plans) - len(survivors)} of {len(plans)} mutants noticed in {time.monotonic() - start:.0f} s")
    for mutant in sorted(survivors, key=lambda m: (m.file, m.line)):
        print(f"  {mutant.file}:{mutant.line} {mutant.what}")
    return len(survivors)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200, help="how many mutants (default 200)")
    parser.add_argument("--seed", type=int, default=0, help="which ones")
    parser.add_argument("--workers", type=int, default=2, help="processes at once")
    parser.add_argument("--only", default="", help="only files whose path contains this")
    parser.add_argument("--map", action="store_true", help="find again which tests execute a line")
    options = parser.parse_args()
    if options.map:
        make_map()
    run(options.count, options.seed, options.workers, options.only)
