"""The command line: few verbs, each with examples in its ``--help``; their flags are the fields of settings classes.

Torch is imported when a job starts, so that a help text or a wrong call takes no time.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import os
import re
import sys
import tomllib
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import __version__
from .errors import RunFolderError
from .jobs.settings import CompareSettings, MeasureSettings
from .training.folder import RunFolder

_COMPARE = """examples:
  flatmin compare                                    digits with 60 % noisy labels: SGD, SAM and ASAM, three seeds
  flatmin compare --methods sgd,sam,looksam --seeds 5
  flatmin compare --rho sam=0.1,asam=1               skip the choice of the radius
  flatmin compare fashion-mnist --data FOLDER        the four IDX files of Fashion-MNIST
  flatmin compare my_module:recipe                   your own model and data: a flatmin.recipes.Recipe, or a function
                                                     that returns one
  flatmin compare --resume runs/compare              resume after Ctrl-C, bit for bit

The radius of each method is chosen on held-out training data. The test data is used once, at the end."""

_MEASURE = """examples:
  flatmin measure my_module:objective                         one-step sharpness, spectrum, trace, density
  flatmin measure my_module:objective --checkpoint model.safetensors --k 10
  flatmin measure my_module:objective --metrics one_step,worst_case,surface --rho 0.1
  flatmin measure my_module:objective --checkpoint a.safetensors --against b.safetensors       which of two is sharper
  flatmin measure hf:FOLDER --text book.txt --context 128     a causal or masked language model of transformers, in a
                                                              folder or by its name, with the tokenizer beside it
  flatmin measure hf:FOLDER --text book.txt --plan            time and memory of each measure; nothing is written
  torchrun --nproc-per-node 2 -m flatmin.cli measure my_module:objective      every process takes a share of the batches
  flatmin measure --resume runs/measure                       resume after Ctrl-C; finished measures are not repeated

my_module:objective is a flatmin.Objective, a flatmin.recipes.Recipe, or a function that returns one of them, (model,
data) or (model, data, loss_fn). Batches are (inputs, targets), or mappings as in the transformers library:

  # my_module.py                                              # or, with a language model
  def objective():                                            def objective():
      return flatmin.Objective(net, loss_fn, loader)              return model, [{"input_ids": ids}]

measures: one_step, spectrum, trace, density (the default), worst_case, adaptive_worst_case, average_case,
largest_random, m_sharpness, normalized_flatness, critical_sharpness, agreement, line, surface, or all.

A checkpoint is a .safetensors file, or a torch file of tensors."""


@dataclass(frozen=True)
class _Job:
    """A verb that runs a job: its settings, which of them needs no flag, and what a record needs to be resumed."""

    settings: type
    positional: str
    help: str
    examples: str
    parts: Mapping[str, type]
    packages: Callable[[Any], list[str]]


_JOBS = {
    "compare": _Job(
        CompareSettings, "recipe", "train methods side by side on one recipe, measure them, write a report", _COMPARE,
        {"settings": dict, "data": dict, "selection": dict, "runs": list},
        lambda s: ["numpy", "matplotlib", "safetensors", *["sklearn"] * (s.recipe == "digits")]),
    "measure": _Job(
        MeasureSettings, "objective", "sharpness, spectrum and landscape of a model, each number with its error",
        _MEASURE, dict.fromkeys(("settings", "model", "data", "results", "timing", "warnings"), dict),
        lambda s: ["numpy", "matplotlib", *["safetensors"] * (s.eigenvectors or any(
            str(p).endswith(".safetensors") for p in (s.checkpoint, s.against)))]),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 1 for a failure, 2 for a wrong call, 130 for Ctrl-C."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        _require("jsonargparse", "docstring_parser")
        parser = _parser()
        found = parser.parse_args(argv, defaults=False)
        if found.get("verb") is None:
            parser.print_help()
            return 2
        args = found[found.verb]
        return _report(args.folder) if found.verb == "report" else _run(found.verb, args)
    except argparse.ArgumentError as error:
        verb = f" {argv[0]}" if argv and argv[0] in (*_JOBS, "report") else ""
        return _fail(f"{_plainly(error)}; see flatmin{verb} --help", 2)
    except (ValueError, FileNotFoundError) as error:
        return _fail(error, 2)
    except (RunFolderError, OSError, ArithmeticError) as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)


def _parser() -> Any:
    """The parser: a flag for each setting, with the type, the default and the docstring of the field."""
    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    form: dict[str, Any] = {"exit_on_error": False, "formatter_class": _Help, "allow_abbrev": True}
    parser = ArgumentParser(prog="flatmin", description="Train to flat minima, and prove that they are flat.", **form)
    parser.add_argument("--version", action="version", version=f"flatmin {__version__}")
    verbs = parser.add_subcommands(dest="verb", required=False, title="verbs", metavar="VERB", description=None)
    for name, job in _JOBS.items():
        verb = ArgumentParser(description=_sentence(job.help), epilog=job.examples, **form)
        _add_flags(verb, name, job)
        verbs.add_subcommand(name, verb, help=job.help)
        verb.prog = f"flatmin {name}"
    report = ArgumentParser(description="Write report.html again from the record.json of a run folder.",
                            epilog="example:\n  flatmin report runs/compare", **form)
    report.add_argument("folder", help="run folder of compare or measure")
    verbs.add_subcommand("report", report, help="write report.html again from a run folder")
    report.prog = "flatmin report"
    return parser


def _add_flags(parser: Any, name: str, job: _Job) -> None:
    """The settings of a job, and where it reads and writes."""
    from docstring_parser import parse_from_object

    help_of = {p.arg_name: p.description for p in parse_from_object(job.settings).params}
    parser.add_argument(job.positional, nargs="?", help=help_of[job.positional])
    hints = typing.get_type_hints(job.settings)
    for field in dataclasses.fields(job.settings):
        if field.name != job.positional:
            how = {"action": "store_true"} if hints[field.name] is bool else {
                "type": hints[field.name], "default": field.default}
            parser.add_argument(f"--{field.name.replace('_', '-')}", help=help_of[field.name], **how)
    if job.settings is MeasureSettings:
        parser.add_argument("--plan", action="store_true",
                            help="print the predicted time and memory of each measure and stop; nothing is written")
    parser.add_argument("--config", metavar="FILE", help="TOML file of these settings; flags win over it")
    parser.add_argument("--out", metavar="FOLDER", help=f"run folder to make (default: runs/{name}, or -2, -3, ...)")
    parser.add_argument("--resume", nargs="?", const="", metavar="FOLDER",
                        help="resume an interrupted run (FOLDER, or that of --out) with its own settings")
    parser.add_argument("--quiet", action="store_true", help="show no progress")


class _Help(argparse.RawDescriptionHelpFormatter):
    """Defaults beside each flag that has one, and examples as they stand."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        has = action.option_strings and not (action.default is None or action.default in (argparse.SUPPRESS, ""))
        has = has and action.nargs != 0
        return f"{action.help} (default: %(default)s)" if has else action.help


def _plainly(error: argparse.ArgumentError) -> str:
    """An error of the parser in one line of plain words."""
    head, _, details = str(error).partition("\n")
    cause: BaseException = error
    while details and cause.__cause__ is not None:
        cause = cause.__cause__         # the first of them is short: a list of all types that were tried comes after it
    message = f"{head} {cause}" if details else head
    for pattern, words in ((r'Parser key "(\w+)":', r"--\1:"), (r"<class 'int'>", "whole number"),
                           (r"<class 'float'>", "number"), (r"\. Got value:", ", got"), (r"\bExpected\b", "expected"),
                           (r"required: \w+\.", "required: ")):
        message = re.sub(pattern, words, message)
    return " ".join(message.split())


def _wrong_call(what: object) -> argparse.ArgumentError:
    return argparse.ArgumentError(None, str(what))


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _fail(message: object, status: int) -> int:
    if _is_first() or status == 1:      # a wrong call is the same in every process
        print(f"flatmin: {' '.join(str(message).split())}", file=sys.stderr)
    return status


# running a job

def _run(verb: str, args: Any) -> int:
    """Start or resume a job; nothing is written before its settings are known to be right."""
    job = _JOBS[verb]
    names = [f.name for f in dataclasses.fields(job.settings)]
    given = _toml(args.get("config"), names) | {n: args[n] for n in names if args.get(n) is not None}
    folder, record = RunFolder(args.get("out") or _fresh(f"runs/{verb}")), None
    if args.get("resume") is not None:
        folder, record = _resumed(verb, args)
        _refuse_other_settings(given, record["settings"])
        given = {name: record["settings"][name] for name in names if name in record["settings"]}
    if job.positional not in given and job.settings is MeasureSettings:
        raise _wrong_call("measure needs module:objective, or hf:FOLDER with --text FILE")
    try:
        settings = job.settings(**given)
    except ValueError as error:
        raise _wrong_call(error) from error
    _require(*job.packages(settings))
    running = _job_class(verb)(settings, folder, record, bool(args.get("quiet")))
    if args.get("plan"):
        return _show_plan(running)
    if record is None and _is_first():
        RunFolder.create(folder.path)
    return _finish(verb, running, folder)


def _show_plan(job: Any) -> int:
    text = job.plan()
    if _is_first():
        print(text)
    return 0


def _is_first() -> bool:
    """Whether this process writes and speaks for all that ``torchrun`` started."""
    return os.environ.get("RANK", "0") == "0"


def _job_class(verb: str) -> type:
    """The class of a job, which imports torch."""
    if verb == "compare":
        from .jobs.compare import Comparison

        return Comparison
    from .jobs.measure import Measurement

    return Measurement


def _finish(verb: str, job: Any, folder: RunFolder) -> int:
    """Run a job; its page is written also where it is interrupted, and its table printed where it is complete."""
    try:
        job.run()
    except KeyboardInterrupt:
        if _is_first():
            _write_report(folder.path)
        return _fail(f"interrupted; resume with: flatmin {verb} --resume {folder.path}", 130)
    if not _is_first():
        return _fail(job.failure, 1) if job.failure else 0
    print(_write_report(folder.path)(job.record))
    print(f"\nrecord {folder.path / 'record.json'}\nreport {folder.path / 'report.html'}")
    return _fail(job.failure, 1) if job.failure else 0


def _write_report(path: Path) -> Callable[[dict[str, Any]], str]:
    """Write the page of a run; returns what makes the table for the terminal."""
    from .report import table, write

    write(path)
    return table


def _report(path: str) -> int:
    _require("numpy", "matplotlib")
    folder, _ = RunFolder.open(path)
    _write_report(folder.path)
    print(folder.path / "report.html")
    return 0


def _resumed(verb: str, args: Any) -> tuple[RunFolder, dict[str, Any]]:
    """The folder and record of the run to resume: --resume FOLDER, or --resume beside --out FOLDER."""
    if args.resume and args.get("out") and Path(args.resume) != Path(args.out):
        raise _wrong_call(f"--resume {args.resume} and --out {args.out} name two folders: give one of them")
    folder, record = RunFolder.open(args.resume or args.get("out") or f"runs/{verb}")
    parts = _JOBS[verb].parts
    if record["kind"] != verb:
        raise RunFolderError(f"{folder.path} holds a run of flatmin {record['kind']}, not of {verb}")
    if not all(isinstance(record.get(k), kind) for k, kind in parts.items()):
        raise RunFolderError(f"{folder.path / 'record.json'} lacks what a run needs to be resumed "
                             f"({', '.join(parts)}); start a new run with another --out")
    return folder, record


def _refuse_other_settings(given: dict[str, Any], kept: dict[str, Any]) -> None:
    """A run is resumed with its own settings; the same ones may be given again, other ones not."""
    for name, value in given.items():
        if name in kept and kept[name] != value:
            raise _wrong_call(f"--resume continues with the run's own settings: {name} was {kept[name]}, not {value}: "
                              "leave it out, or start a new run with another --out")


def _require(*names: str) -> None:
    """Raise a ``ValueError`` that says what to install, where optional packages are missing."""
    missing = []
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError:
            missing.append({"sklearn": "scikit-learn"}.get(name, name))
    if missing:
        raise ValueError(f"this needs {' and '.join(missing)}, which cannot be imported: pip install 'flatmin[cli]'")


def _toml(path: str | None, names: Sequence[str]) -> dict[str, Any]:
    """Settings from a TOML file."""
    if path is None:
        return {}
    try:
        found = tomllib.loads(Path(path).read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise _wrong_call(f"cannot read {path}: {error}") from error
    unknown = sorted(set(found) - set(names))
    if unknown:
        raise _wrong_call(f"{path} has unknown settings {', '.join(unknown)}: choose from {', '.join(names)}")
    return found


def _fresh(base: str) -> str:
    """The first of base, base-2, base-3, ... that does not exist."""
    path, n = base, 1
    while Path(path).exists():
        n += 1
        path = f"{base}-{n}"
    return path


if __name__ == "__main__":
    sys.exit(main())
