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
from .jobs.settings import CompareSettings, MeasureSettings, TrainJobSettings
from .training.folder import RunFolder

_TRAIN = """examples:
  flatmin train language --steps 500                 a small language model on the sources of Python's library
  flatmin train language --method functional_sam --rho 0.1 --data FILE --lr 0.002
  flatmin train my_module:recipe --method sam        your own model and data: see flatmin.recipes.supervised
  flatmin train language --help                      the recipe's own flags as well; each is a field of the recipe
  flatmin train --resume runs/train                  resume after Ctrl-C or a kill, bit for bit
  torchrun --nproc-per-node 2 -m flatmin.cli train language --out runs/two

The run folder holds record.json, log.jsonl, checkpoints/model.safetensors and report.html. What is hopeless about a
radius is said after a hundred steps."""

_COMPARE = """examples:
  flatmin compare                                    digits with 60 % noisy labels: SGD, SAM and ASAM, three seeds
  flatmin compare --rho 0.1,0.25,0.5                 choose the radius of each method from these
  flatmin compare --methods sgd,sam,looksam --seeds 5
  flatmin compare --rho sam=0.1,asam=1               skip the choice of the radius
  flatmin compare fashion-mnist --data FOLDER        the four IDX files of Fashion-MNIST
  flatmin compare my_module:recipe                   your own model and data: a flatmin.recipes.Recipe or Supervised,
                                                     or a function that returns one
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
    """A verb that runs a job: its class, settings, which of them needs no flag, and what is needed to resume it.

    ``needs``: what the setting without a flag is, where it has no default.
    """

    runs: str
    settings: type
    positional: str
    help: str
    examples: str
    parts: Mapping[str, type]
    packages: Callable[[Any], list[str]]
    needs: str = ""


_JOBS = {
    "train": _Job(
        "jobs.train:TrainingRun", TrainJobSettings, "recipe", "train one recipe with one method, on one or many "
        "processes", _TRAIN, dict.fromkeys(("settings", "recipe", "place", "model"), dict),
        lambda s: ["numpy", "matplotlib", "jinja2", "safetensors"], "a recipe: a name, or module:recipe"),
    "compare": _Job(
        "jobs.compare:Comparison", CompareSettings, "recipe",
        "train methods side by side on one recipe, measure them, write a report", _COMPARE,
        {"settings": dict, "data": dict, "selection": dict, "runs": list},
        lambda s: ["numpy", "matplotlib", "jinja2", "safetensors", "scipy", *["sklearn"] * (s.recipe == "digits")]),
    "measure": _Job(
        "jobs.measure:Measurement", MeasureSettings, "objective",
        "sharpness, spectrum and landscape of a model, each number with its error",
        _MEASURE, dict.fromkeys(("settings", "model", "data", "results", "timing", "warnings"), dict),
        lambda s: ["numpy", "matplotlib", "jinja2", *["safetensors"] * (s.eigenvectors or any(
            str(p).endswith(".safetensors") for p in (s.checkpoint, s.against)))],
        "module:objective, or hf:FOLDER with --text FILE"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 1 for a failure, 2 for a wrong call, 130 for Ctrl-C."""
    argv = list(map(_with_dashes, sys.argv[1:] if argv is None else argv))
    try:
        _require("jsonargparse", "docstring_parser")
        argv, fields = _recipe_fields(argv)
        parser = _parser(_help_of_recipe(argv))
        found = parser.parse_args(argv, defaults=False)
        if found.get("verb") is None:
            parser.print_help()
            return 2
        args = found[found.verb]
        return _report(args.folder, args.get("csv")) if found.verb == "report" else _run(found.verb, args, fields)
    except argparse.ArgumentError as error:
        verb = f" {argv[0]}" if argv and argv[0] in (*_JOBS, "report") else ""
        return _fail(f"{_plainly(error)}; see flatmin{verb} --help", 2)
    except (ValueError, FileNotFoundError) as error:
        return _fail(error, 2, agreed=argv[:1] == ["measure"])
    except (RunFolderError, OSError, ArithmeticError) as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)


def _parser(fields: str = "") -> Any:
    """The parser: a flag for each setting, with the type, the default and the docstring of the field.

    ``fields``: the flags of a recipe, for the help of ``train``.
    """
    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    form: dict[str, Any] = {"exit_on_error": False, "formatter_class": _Help, "allow_abbrev": True}
    parser = ArgumentParser(prog="flatmin", description="Train to flat minima, and prove that they are flat.", **form)
    parser.add_argument("--version", action="version", version=f"flatmin {__version__}")
    verbs = parser.add_subcommands(dest="verb", required=False, title="verbs", metavar="VERB", description=None)
    for name, job in _JOBS.items():
        epilog = job.examples + fields * (name == "train")
        verb = ArgumentParser(description=_sentence(job.help), epilog=epilog, **form)
        _add_flags(verb, name, job)
        verbs.add_subcommand(name, verb, help=job.help)
        verb.prog = f"flatmin {name}"
    report = ArgumentParser(description="Write report.html again from the record.json of a run folder.",
                            epilog="example:\n  flatmin report runs/compare", **form)
    report.add_argument("folder", help="run folder of train, compare or measure")
    report.add_argument("--csv", action="store_true", help="write the tables as CSV files too, into FOLDER/tables")
    verbs.add_subcommand("report", report, help="write report.html again from a run folder")
    report.prog = "flatmin report"
    return parser


def _add_flags(parser: Any, name: str, job: _Job) -> None:
    """The settings of a job, and where it reads and writes."""
    from docstring_parser import parse_from_object

    help_of = {p.arg_name: p.description for kind in job.settings.__mro__[:-1] for p in parse_from_object(kind).params}
    hints = typing.get_type_hints(job.settings)
    parser.add_argument(job.positional, nargs="?", help=help_of[job.positional])
    for setting in dataclasses.fields(job.settings):
        flag: dict[str, Any] = {"type": hints[setting.name], "default": setting.default}
        if setting.default is False:
            flag = {"action": "store_true"}
        if setting.name not in (job.positional, "fields"):
            parser.add_argument(_flag(setting.name), help=help_of[setting.name], **flag)
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
    for pattern, words in ((r'Parser key "(\w+)":', lambda m: f"{_flag(m[1])}:"), (r"<class 'int'>", "whole number"),
                           (r"<class 'float'>", "number"), (r"\. Got value:", ", got"), (r"\bExpected\b", "expected"),
                           (r"required: \w+\.", "required: ")):
        message = re.sub(pattern, words, message)
    return " ".join(message.split())


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _with_dashes(token: str) -> str:
    """``--log_every=5`` as ``--log-every=5``."""
    name, equals, value = token.partition("=")
    return f"--{name[2:].replace('_', '-')}{equals}{value}" if name.startswith("--") else token


def _recipe_fields(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The flags of ``train`` that are none of its settings: fields of the recipe, which only the recipe knows."""
    if not argv or argv[0] != "train":
        return list(argv), {}
    own = {_flag(f.name): f.default is not False for f in dataclasses.fields(TrainJobSettings) if f.name != "fields"}
    own |= {"--config": True, "--out": True, "--resume": True, "--quiet": False, "--help": False}
    kept, fields, tokens = [], {}, list(argv)
    while tokens:
        token = tokens.pop(0)
        name, equals, value = token.partition("=")
        follows = bool(tokens) and not tokens[0].startswith("--")
        if not name.startswith("--") or name in own:
            kept.append(token)
            kept += [tokens.pop(0)] if own.get(name) and not equals and follows else []
        else:
            fields[name[2:].replace("-", "_")] = value if equals else tokens.pop(0) if follows else "true"
    return kept, fields


def _help_of_recipe(argv: Sequence[str]) -> str:
    """For ``flatmin train RECIPE --help``: the fields of the recipe."""
    named = argv[1:2] if argv[:1] == ["train"] and {"-h", "--help"} & {*argv} else []
    if not named or named[0].startswith("-"):
        return ""
    recipe = _of("jobs.train:find_trainable")(named[0])
    return f"\n\nfields of recipe {recipe.name}:\n  {_of('jobs.recipe_fields:help_of')(recipe)}"


def _of(name: str) -> Any:
    """``module:attribute`` of this package; most of them import torch."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(f".{module}", __package__), attribute)


def _wrong_call(what: object) -> argparse.ArgumentError:
    return argparse.ArgumentError(None, str(what))


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _fail(message: object, status: int, *, agreed: bool = False) -> int:
    """One line; of other ranks than the first only what that one does not say as well (``agreed``: it does)."""
    rank = _rank()
    if rank == 0 or isinstance(message, ValueError) and not agreed:
        print(f"flatmin: {f'rank {rank}: ' * (rank > 0)}{' '.join(str(message).split())}", file=sys.stderr)
    return status


# running a job

def _run(verb: str, args: Any, fields: Mapping[str, str]) -> int:
    """Start or resume a job; nothing is written before its settings are known to be right."""
    job = _JOBS[verb]
    names = [f.name for f in dataclasses.fields(job.settings) if f.name != "fields"]
    given = _toml(args.get("config"), names, verb) | {n: args[n] for n in names if args.get(n) is not None}
    given |= {f"fields.{name}": value for name, value in fields.items()}
    folder, record = RunFolder(args.get("out") or _fresh(f"runs/{verb}")), None
    if args.get("resume") is not None:
        folder, record = _resumed(verb, args)
        kept = {name: record["settings"][name] for name in names if name in record["settings"]}
        kept |= {f"fields.{name}": value for name, value in record["settings"].get("fields", {}).items()}
        _refuse_other_settings(given, kept)
        given = kept
    if job.needs and job.positional not in given:
        raise _wrong_call(f"{verb} needs {job.needs}")
    own = {name.removeprefix("fields."): given.pop(name) for name in [*given] if name.startswith("fields.")}
    try:
        settings = job.settings(**given, **({"fields": own} if own else {}))
    except ValueError as error:
        raise _wrong_call(error) from error
    _require(*job.packages(settings))
    running = _of(job.runs)(settings, folder, record, bool(args.get("quiet")))
    if args.get("plan"):
        text = running.plan()
        if _rank() == 0:
            print(text)
        return 0
    if record is None and _rank() == 0:
        RunFolder.create(running.folder.path)
    return _finish(verb, running)


def _rank() -> int:
    """Of this process among those that torchrun started; the first alone writes and speaks."""
    return int(os.environ.get("RANK", "0"))


def _finish(verb: str, job: Any) -> int:
    """Run a job; its page is written also where it is interrupted, and its table printed where it is complete."""
    path = job.folder.path
    try:
        job.run()
    except KeyboardInterrupt:
        if _rank() == 0:
            _write_report(path)
        return _fail(f"interrupted; resume with: flatmin {verb} --resume {path}", 130)
    if _rank() == 0:
        print(_write_report(path)(job.record))
        print(f"\nrecord {path / 'record.json'}\nreport {path / 'report.html'}")
    return _fail(job.failure, 1) if job.failure else 0


def _write_report(path: Path) -> Callable[[dict[str, Any]], str]:
    """Write the page of a run; returns what makes the table for the terminal."""
    from .report import table, write

    write(path)
    return table


def _report(path: str, csv: bool | None) -> int:
    _require("numpy", "matplotlib", "jinja2")
    folder, record = RunFolder.open(path)
    _write_report(folder.path)
    print(folder.path / "report.html")
    for file in _of("report:write_tables")(folder.path, record) if csv else ():
        print(file)
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
        shown = name.removeprefix("fields.")
        if name in kept and kept[name] != value:
            raise _wrong_call(f"--resume continues with the run's own settings: {shown} was {kept[name]}, not {value}: "
                              "leave it out, or start a new run with another --out")
        if name not in kept and name != shown:
            raise _wrong_call(f"--resume continues with the run's own settings: {shown} was not given, and is {value} "
                              "now: leave it out, or start a new run with another --out")


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


def _toml(path: str | None, names: Sequence[str], verb: str) -> dict[str, Any]:
    """Settings from a TOML file; for ``train`` all others are fields of the recipe."""
    if path is None:
        return {}
    try:
        found = tomllib.loads(Path(path).read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise _wrong_call(f"cannot read {path}: {error}") from error
    unknown = sorted(set(found) - set(names))
    if verb == "train":
        return {n: v for n, v in found.items() if n in names} | {f"fields.{n}": str(found[n]) for n in unknown}
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
