"""Do the tests notice a wrong program? ``make mutants``, or ``python tests/mutants.py --count 200 --seed 0``.

One operator, comparison, condition or constant of the core is changed at a time, in a scratch copy, and the tests that
execute the changed line are run, the fastest first, until one of them fails. A mutant that no test fails on is printed.
Which tests execute a line is found once, by running the suite under coverage (``--map``; a quarter of an hour) and kept
in ``.mutants``, as are the results: a run that was stopped goes on where it was. After writing a test for a survivor,
``--map tests/test_it.py`` adds it and ``--again`` tries the survivors again.

Lines that run only in other processes (ranks) are tried with the tests named in ``RANKS``. What is known to survive,
and why, is in ``docs/testing.md``.
"""

from __future__ import annotations

import argparse
import ast
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".mutants"
CORE = ("vectors.py", "perturbed.py", "objective.py", "evaluation.py", "batches.py", "results.py", "parallel.py",
        "composite_norms.py", "ascent", "curvature", "linalg")
RANKS = ("tests/laws/test_parallel.py", "tests/curvature/test_curvature_ranks.py")
SECONDS = (12.0, 60.0)
"""Of tests on every mutant, and then on every survivor."""
MAP, LOG = FOLDER / "map.json", FOLDER / "log.jsonl"
CONTEXT = multiprocessing.get_context("forkserver")
PLUGIN = """
import json, collections, coverage, pathlib, pytest, random
seconds, failed = {}, set()

def pytest_collection_modifyitems(items):
    rows = collections.Counter()
    for item in random.Random(0).sample(items, len(items)):
        rows[item.nodeid.split("[")[0]] += 1
        if rows[item.nodeid.split("[")[0]] > 30:
            items.remove(item)

@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    coverage.Coverage.current().switch_context(item.nodeid)

def pytest_runtest_logreport(report):
    seconds[report.nodeid] = seconds.get(report.nodeid, 0.0) + report.duration
    if not report.passed:
        failed.add(report.nodeid)

def pytest_sessionfinish():
    passed = {test: time for test, time in seconds.items() if test not in failed}
    pathlib.Path(__file__).with_name("times.json").write_text(json.dumps(passed))
"""

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


def make_map(only: list[str]) -> dict[str, Any]:
    """Which tests that pass execute a line, and how long each takes, from a run of ``only`` (all) under coverage."""
    FOLDER.mkdir(exist_ok=True)
    data, times = FOLDER / "coverage", FOLDER / "times.json"
    (FOLDER / "contexts.py").write_text(PLUGIN)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(FOLDER)]), "OMP_NUM_THREADS": "1"}
    core = ",".join(f"{ROOT}/src/flatmin/{part}" + ("" if part.endswith(".py") else "/*") for part in CORE)
    # test_interrupts replaces the tracer
    subprocess.run([sys.executable, "-m", "coverage", "run", f"--data-file={data}", f"--include={core}", "-m", "pytest",
                    "-q", "-p", "contexts", "-p", "no:cacheprovider", "-m", "not slow",
                    "--deselect=tests/laws/test_interrupts.py", *only], cwd=ROOT,
                   env=environment)
    import coverage

    found = coverage.CoverageData(str(data))
    found.read()
    seconds = json.loads(times.read_text())
    known = json.loads(MAP.read_text()) if only and MAP.exists() else {"seconds": {}, "tests": {}}
    known["seconds"] |= seconds
    for file in found.measured_files():
        of_file = known["tests"].setdefault(str(Path(file).relative_to(ROOT)), {})
        for line, tests in found.contexts_by_lineno(file).items():
            of_file[str(line)] = sorted({*of_file.get(str(line), ()), *seconds.keys() & set(tests)})
    MAP.write_text(json.dumps(known))
    return known


def executing(mutant: Mutant, known: dict[str, Any]) -> list[str]:
    """The tests that execute a mutant's line, or the first line of its statement: the first row of every test function
    before the second row of any, and the fastest first."""
    lines = known["tests"].get(mutant.file, {})
    line = next((n for n in range(mutant.line, mutant.line - 6, -1) if str(n) in lines), None)
    # a line that only an import executes concerns every test of the file
    tests = lines.get(str(line)) or {test for tests in lines.values() for test in tests}
    rows: dict[str, int] = {}
    order = []
    for test in sorted(tests, key=known["seconds"].__getitem__):
        function = test.split("[")[0]
        rows[function] = rows.get(function, 0) + 1
        order.append((rows[function], known["seconds"][test], test))
    return [test for *_, test in sorted(order)]


def stages(mutant: Mutant, known: dict[str, Any]) -> list[tuple[list[str], float]]:
    """What is run one after the other until something fails, and the seconds that it takes unchanged."""
    tests, out = executing(mutant, known), []
    for budget in SECONDS:
        spent, some = 0.0, []
        while tests and spent < budget:
            some.append(tests.pop(0))
            spent += known["seconds"][some[-1]] + 0.02
        out.append((some, spent))
    if str(mutant.line) not in known["tests"].get(mutant.file, {}):
        out[-1] = (list(RANKS), 120.0)
    return out


def _pytest(scratch: Path, arguments: list[str], write_bytecode: bool = False) -> None:
    os.setsid()
    os.chdir(scratch)
    sys.path[:] = [str(scratch / "src"), str(scratch), *(p for p in sys.path if not p.startswith(str(ROOT / "tests")))]
    os.environ |= {"PYTHONPATH": str(scratch / "src"), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    sys.dont_write_bytecode = not write_bytecode
    out = os.open(scratch / "out.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    import pytest

    code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--tb=no", *arguments])
    sys.stdout.flush()
    os._exit(int(code))


def fails(tests: list[str], seconds: float, scratch: Path) -> str | None:
    """The first failure in a fork of a process that has imported torch and pytest, "timeout", or None."""
    (scratch / "tests.txt").write_text("\n".join(tests))
    process = CONTEXT.Process(target=_pytest, args=(scratch, [f"@{scratch / 'tests.txt'}"]))
    process.start()
    process.join(40 + 3 * seconds)
    if process.exitcode is None and process.pid is not None:
        os.killpg(process.pid, signal.SIGKILL)
        return "timeout"
    if process.exitcode == 0:
        return None
    lines = (scratch / "out.txt").read_text().splitlines()
    return next((line for line in lines if line.startswith(("FAILED", "ERROR"))), f"exit code {process.exitcode}")


def noticed(mutant: Mutant, tests: list[str], seconds: float, scratch: Path) -> str | None:
    """What fails first in a scratch copy with the change, or None."""
    target = scratch / mutant.file
    target.write_text(mutated(mutant))
    try:
        return fails(tests, seconds, scratch) if tests else None
    finally:
        shutil.copy2(ROOT / mutant.file, target)


def prepared(scratch: Path) -> Path:
    """A scratch copy whose files are compiled."""
    for name in ("src", "tests", "examples", "docs"):
        shutil.copytree(ROOT / name, scratch / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "CHANGELOG.md"):
        shutil.copy2(ROOT / name, scratch / name)
    process = CONTEXT.Process(target=_pytest, args=(scratch, ["--collect-only"], True))
    process.start()
    process.join()
    return scratch


def run(count: int, seed: int, workers: int, only: str, again: bool) -> None:
    """Try ``count`` random mutants; the share that was noticed is printed, and every one that was not."""
    known = json.loads(MAP.read_text()) if MAP.exists() else make_map([])
    everything = mutants()
    picked = [m for m in random.Random(seed).sample(everything, min(count, len(everything))) if re.search(only, m.file)]
    known_results = [json.loads(line) for line in LOG.read_text().splitlines()] if LOG.exists() else []
    results = {Mutant(*(r[f.name] for f in fields(Mutant))): (r["stage"], r["noticed"]) for r in known_results}
    if again:
        results = {m: result for m, result in results.items() if result[1]}
    free = [prepared(Path(tempfile.mkdtemp(prefix="mutants"))) for _ in range(workers)]

    def one(mutant: Mutant, stage: int) -> None:
        scratch, start = free.pop(), time.monotonic()
        how = noticed(mutant, *stages(mutant, known)[stage], scratch)
        results[mutant] = stage, how
        free.append(scratch)
        with LOG.open("a") as log:
            entry = vars(mutant) | {"stage": stage, "noticed": how, "seconds": round(time.monotonic() - start, 1)}
            log.write(json.dumps(entry) + "\n")
        print(f"{'noticed' if how else 'UNNOTICED'} {mutant.file}:{mutant.line} {mutant.what}", flush=True)

    for stage in range(len(SECONDS)):
        left = [m for m in picked if (r := results.get(m, (-1, None)))[1] is None and r[0] < stage]
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(one, left, [stage] * len(left)))
    for scratch in free:
        shutil.rmtree(scratch)
    survivors = sorted((m for m in picked if results[m][1] is None), key=lambda m: (m.file, m.line))
    print(f"\n{len(picked) - len(survivors)} of {len(picked)} mutants noticed")
    for mutant in survivors:
        print(f"  {mutant.file}:{mutant.line} {mutant.what}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200, help="how many mutants (default 200)")
    parser.add_argument("--seed", type=int, default=0, help="which ones")
    parser.add_argument("--workers", type=int, default=2, help="processes at once")
    parser.add_argument("--only", default="", help="of these, those in files whose path matches this")
    parser.add_argument("--again", action="store_true", help="try again what no test noticed in an earlier run")
    parser.add_argument("--map", nargs="*", metavar="TEST", help="find again which lines these tests (all) execute")
    options = parser.parse_args()
    CONTEXT.set_forkserver_preload(["torch", "torch.distributed", "torch.func", "pytest"])
    if options.map is not None:
        make_map(options.map)
    else:
        run(options.count, options.seed, options.workers, options.only, options.again)
