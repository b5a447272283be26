"""The command line: few verbs, each with examples in its ``--help``."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import sys
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import __version__
from .errors import RunFolderError

_COMPARE = """examples:
  flatmin compare                                    digits with 60 % noisy labels: SGD, SAM and ASAM, three seeds
  flatmin compare --methods sgd,sam,looksam --seeds 5
  flatmin compare --rho sam=0.1,asam=1               skip the choice of the radius
  flatmin compare fashion-mnist --data FOLDER        the four IDX files of Fashion-MNIST
  flatmin compare my_module:recipe                   your own model and data: a flatmin.recipes.Recipe, or a function
                                                     that returns one
  flatmin compare --resume runs/compare              go on after Ctrl-C, bit for bit

the radius of each method is chosen on held-out training data; the test data is looked at once, at the end."""

_MEASURE = """examples:
  flatmin measure my_module:objective                         one-step sharpness, spectrum, trace, density
  flatmin measure my_module:objective --checkpoint model.safetensors --k 10
  flatmin measure my_module:objective --metrics one_step,worst_case,surface --rho 0.1
  flatmin measure my_module:objective --checkpoint a.safetensors --against b.safetensors       which of two is sharper
  flatmin measure --resume runs/measure                       go on after Ctrl-C; what is done is not repeated

my_module:objective is a flatmin.Objective, a flatmin.recipes.Recipe, or a function that returns one of them, (model,
data) or (model, data, loss_fn). Batches are (inputs, targets), or mappings as in the transformers library:

  # my_module.py                                              # or, with a language model
  def objective():                                            def objective():
      return flatmin.Objective(net, loss_fn, loader)              return model, [{"input_ids": ids}]

metrics: one_step, spectrum, trace, density (the default), worst_case, adaptive_worst_case, average_case,
largest_random, m_sharpness, normalized_flatness, critical_sharpness, agreement, line, surface, or all.

A checkpoint is a .safetensors file, or a torch file of tensors."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 1 for a failure, 2 for a wrong call, 130 for Ctrl-C."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.verb is None:
        parser.print_help()
        return 2
    try:
        return args.run(args)
    except (ValueError, FileNotFoundError) as error:
        return _fail(error, 2)
    except (RunFolderError, OSError, ArithmeticError) as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)


def _fail(message: object, status: int) -> int:
    print(f"flatmin: {' '.join(str(message).split())}", file=sys.stderr)
    return status


_PARTS = {"settings": dict, "data": dict, "selection": dict, "runs": list}  # of a record that can be continued


class _Parser(argparse.ArgumentParser):
    """Wrong calls in one line."""

    def error(self, message: str) -> Any:
        self.exit(2, f"flatmin: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="flatmin", description="Train to flat minima, and prove that they are flat.")
    parser.add_argument("--version", action="version", version=f"flatmin {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", parser_class=_Parser)
    raw = argparse.RawDescriptionHelpFormatter

    compare = verbs.add_parser("compare", help="train methods side by side, measure them, write a report",
                               description="Train methods side by side on one recipe, measure them, write a report.",
                               epilog=_COMPARE, formatter_class=raw)
    compare.add_argument("recipe", nargs="?", help="digits (default), fashion-mnist, cifar10, or module:attribute")
    compare.add_argument("--methods", help="comma-separated, or all (default sgd,sam,asam)")
    compare.add_argument("--seeds", type=int, help="runs a method (default 3)")
    compare.add_argument("--noise", type=float, help="share of training labels re-drawn (default: the recipe's)")
    compare.add_argument("--epochs", type=int, help="passes over the training data (default: the recipe's)")
    compare.add_argument("--rho", help="a radius for all, or method=radius,...; otherwise chosen from a small grid")
    compare.add_argument("--data", metavar="FOLDER", help="where the recipe's files are")
    compare.add_argument("--threads", type=int, help="threads of one process (default 1: fastest for small models)")
    compare.add_argument("--config", metavar="FILE", help="a TOML file of these settings; flags win over it")
    compare.add_argument("--out", metavar="FOLDER", help="run folder to make (default runs/compare, or -2, -3, ...)")
    compare.add_argument("--resume", nargs="?", const="", metavar="FOLDER",
                         help="continue an interrupted run (FOLDER, or --out's) with its own settings")
    compare.add_argument("--quiet", action="store_true", help="no progress")
    compare.set_defaults(run=_compare)

    measure = verbs.add_parser("measure", help="sharpness, spectrum and landscape of your own model",
                               description="Measure one model at one checkpoint: sharpness, spectrum, trace, density, "
                                           "landscape, each with its error.",
                               epilog=_MEASURE, formatter_class=raw)
    measure.add_argument("objective", nargs="?", metavar="module:objective", help="what to measure, see below")
    measure.add_argument("--checkpoint", metavar="FILE", help="weights for its model (default: as the module made it)")
    measure.add_argument("--against", metavar="FILE", help="other weights to compare with, by every measure")
    measure.add_argument("--metrics", help="comma-separated, or all (default one_step,spectrum,trace,density)")
    measure.add_argument("--k", type=int, help="how many of the largest eigenvalues (default 5)")
    measure.add_argument("--rho", type=float, help="radius of the sharpness measures (default 0.05)")
    measure.add_argument("--tol", type=float, help="residual of the eigenvalues, relative (default 1e-3)")
    measure.add_argument("--seed", type=int, help="of all that is random (default 0)")
    measure.add_argument("--out", metavar="FOLDER", help="run folder to make (default runs/measure, or -2, -3, ...)")
    measure.add_argument("--resume", nargs="?", const="", metavar="FOLDER",
                         help="continue an interrupted run (FOLDER, or --out's) with its own settings")
    measure.add_argument("--quiet", action="store_true", help="no progress")
    measure.set_defaults(run=_measure)

    report = verbs.add_parser("report", help="write report.html again from a run folder",
                              description="Write report.html again from the record.json of a run folder.",
                              epilog="example:\n  flatmin report runs/compare", formatter_class=raw)
    report.add_argument("folder")
    report.set_defaults(run=_report)
    return parser


def _resumed(args: argparse.Namespace, parts: dict[str, type]) -> tuple[Any, dict[str, Any]]:
    """The folder and record of the run to go on with: --resume FOLDER, or --resume beside --out FOLDER."""
    from .training.folder import RunFolder

    if args.resume and args.out and Path(args.resume) != Path(args.out):
        raise ValueError(f"--resume {args.resume} and --out {args.out} name two folders: give one of them")
    folder, record = RunFolder.open(args.resume or args.out or f"runs/{args.verb}")
    if record["kind"] != args.verb:
        raise RunFolderError(f"{folder.path} holds a run of flatmin {record['kind']}, not of {args.verb}")
    if not all(isinstance(record.get(k), kind) for k, kind in parts.items()):
        raise RunFolderError(f"{folder.path / 'record.json'} lacks what a run needs to go on ({', '.join(parts)}); "
                             "start a new run with another --out")
    return folder, record


def _refuse_other_settings(given: dict[str, Any], kept: dict[str, Any]) -> None:
    """A run goes on with its own settings; saying them again is fine, other ones are not."""
    for name, value in given.items():
        if name in kept and kept[name] != value:
            raise ValueError(f"--resume continues with the run's own settings: {name} was {kept[name]}, not {value}; "
                             "leave it out, or start a new run with another --out")


def _finish(job: Any, folder: Any, shown: Callable[[dict[str, Any]], str]) -> int:
    """Run a job; its page is written either way, and its table printed where it got to the end."""
    from .report import write

    try:
        job.run()
    except KeyboardInterrupt:
        write(folder.path)
        return _fail(f"interrupted; go on with: flatmin {job.record['kind']} --resume {folder.path}", 130)
    write(folder.path)
    print(shown(job.record))
    print(f"\nrecord {folder.path / 'record.json'}\nreport {folder.path / 'report.html'}")
    return 0


def _require(*names: str) -> None:
    """The optional packages that a verb cannot do without, before any work is done.

    Raises:
        ValueError: one or more are not installed.
    """
    missing = []
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError:
            missing.append({"sklearn": "scikit-learn"}.get(name, name))
    if missing:
        raise ValueError(f"this needs {' and '.join(missing)}, which cannot be imported: pip install 'flatmin[cli]'")


def _compare(args: argparse.Namespace) -> int:
    _require("numpy", "matplotlib", "safetensors")
    from .jobs import CompareSettings, Comparison
    from .training.folder import RunFolder

    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(CompareSettings)
             if getattr(args, f.name) is not None}
    if args.resume is not None:
        folder, record = _resumed(args, _PARTS)
        _refuse_other_settings(_toml(args.config, CompareSettings) | given, record["settings"])
        kept = {f.name: record["settings"][f.name] for f in dataclasses.fields(CompareSettings)
                if f.name in record["settings"]}
        _require(*["sklearn"] * (kept.get("recipe") == "digits"))
        job = Comparison(CompareSettings(**kept), folder, record, args.quiet)
    else:
        settings = CompareSettings(**(_toml(args.config, CompareSettings) | given))
        _require(*["sklearn"] * (settings.recipe == "digits"))
        path = args.out or _fresh("runs/compare")
        folder = RunFolder(path)
        job = Comparison(settings, folder, quiet=args.quiet)  # before anything is written: wrong settings cost nothing
        RunFolder.create(path)
    from .report import table

    status = _finish(job, folder, table)
    if status or any("diverged" not in run for run in job.record["runs"]):
        return status
    return _fail("every run diverged: " + job.record["runs"][0]["diverged"], 1)


def _measure(args: argparse.Namespace) -> int:
    _require("numpy", "matplotlib")
    from .jobs.measure import Measurement, MeasureSettings
    from .training.folder import RunFolder

    names = [f.name for f in dataclasses.fields(MeasureSettings)]
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.resume is not None:
        parts = ("settings", "model", "data", "results", "timing", "warnings")
        folder, record = _resumed(args, dict.fromkeys(parts, dict))
        if "objective" not in record["settings"]:
            raise RunFolderError(f"{folder.path / 'record.json'} does not say what was measured")
        _refuse_other_settings(given, record["settings"])
        settings = MeasureSettings(**{k: v for k, v in record["settings"].items() if k in names})
        _require(*_readers(settings))
        job = Measurement(settings, folder, record, args.quiet)
    else:
        if args.objective is None:
            raise ValueError("measure needs module:objective, see flatmin measure --help")
        settings = MeasureSettings(**given)
        _require(*_readers(settings))
        path = args.out or _fresh("runs/measure")
        folder = RunFolder(path)
        job = Measurement(settings, folder, quiet=args.quiet)  # before anything is written
        RunFolder.create(path)
    from .report import table

    status = _finish(job, folder, table)
    failed = job.record["failed"]
    return _fail(f"not measured: {', '.join(failed)}", 1) if failed and not status else status


def _readers(settings: Any) -> list[str]:
    """What reads the files of weights."""
    return ["safetensors"] * any(str(p).endswith(".safetensors") for p in (settings.checkpoint, settings.against))


def _report(args: argparse.Namespace) -> int:
    _require("numpy", "matplotlib")
    from .report import write
    from .training.folder import RunFolder

    folder, _ = RunFolder.open(args.folder)
    write(folder.path)
    print(folder.path / "report.html")
    return 0


def _toml(path: str | None, kind: type) -> dict[str, Any]:
    """Settings from a TOML file, checked against the fields of a settings class."""
    if path is None:
        return {}
    try:
        found = tomllib.loads(Path(path).read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    names = [f.name for f in dataclasses.fields(kind)]
    unknown = sorted(set(found) - set(names))
    if unknown:
        raise ValueError(f"{path} has unknown settings {', '.join(unknown)}: choose from {', '.join(names)}")
    return found


def _fresh(base: str) -> str:
    """The first of base, base-2, base-3, ... that is not there."""
    path, n = base, 1
    while Path(path).exists():
        n += 1
        path = f"{base}-{n}"
    return path


if __name__ == "__main__":
    sys.exit(main())
