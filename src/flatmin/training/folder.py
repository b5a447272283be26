"""Run folders: ``record.json``, checkpoints and a report; every file is replaced as a whole.

Torch is imported where tensors are read or written: a wrong --resume is refused without it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RunFolderError
from ..files import replace_file
from ..results import plain
from .log import read_log

if TYPE_CHECKING:
    from torch import Tensor, nn


SCHEMA = 1
"""Version of the layout of every ``record.json``; one that an older flatmin could not read gets the next number."""


class RunFolder:
    """The folder of one run: written by a job, and read to resume it."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    @classmethod
    def create(cls, path: str | Path) -> RunFolder:
        """A new folder; one that holds anything is refused, so that no earlier result is lost."""
        folder = cls(path)
        folder.refuse_used()
        try:
            (folder.path / "checkpoints").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunFolderError(f"cannot write to {path}: {error.strerror or error}; choose another --out") from error
        return folder

    def refuse_used(self) -> None:
        """Raise where the folder of a new run holds anything."""
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise RunFolderError(f"{self.path} exists and is not empty: choose another --out, or continue it with "
                                 f"--resume {self.path}")

    @classmethod
    def open(cls, path: str | Path) -> tuple[RunFolder, dict[str, Any]]:
        """An existing run and its record."""
        folder = cls(path)
        file = folder.path / "record.json"
        if not file.is_file():
            raise RunFolderError(f"{path} is not a run folder: it has no record.json")
        try:
            record = json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise RunFolderError(f"{file} cannot be read: {error}") from error
        if not isinstance(record, dict) or "kind" not in record:
            raise RunFolderError(f"{file} is not a record of flatmin")
        schema = record.get("schema", SCHEMA)       # the first records had no number
        if schema != SCHEMA:
            raise RunFolderError(f"{file} has the schema {schema}, and this flatmin reads {SCHEMA}: use the version of "
                                 "flatmin that wrote it, or a newer one")
        return folder, record

    def save_record(self, record: dict[str, Any]) -> None:
        text = json.dumps(plain({"schema": SCHEMA, **record}), indent=1, ensure_ascii=False)
        self._replace("record.json", lambda tmp: tmp.write_text(text))

    def save_weights(self, name: str, model: nn.Module) -> None:
        """The model's ``state_dict`` as ``checkpoints/<name>.safetensors``."""
        self.save_tensors(f"checkpoints/{name}.safetensors", model.state_dict())

    def save_tensors(self, name: str, tensors: Mapping[str, Tensor], about: dict[str, str] | None = None) -> None:
        """Tensors as a ``.safetensors`` file of the folder; ``about`` goes into its header."""
        from safetensors.torch import save_file

        whole = {k: v.detach().contiguous().clone() for k, v in tensors.items()}
        self._replace(name, lambda tmp: save_file(whole, tmp, metadata=about))

    def load_weights(self, name: str) -> dict[str, Tensor]:
        """What :meth:`save_weights` wrote."""
        from safetensors.torch import load_file

        file = self.path / "checkpoints" / f"{name}.safetensors"
        try:
            return load_file(file)
        except Exception as error:
            raise RunFolderError(f"{file} cannot be read ({type(error).__name__})") from error

    def _replace(self, name: str, write: Callable[[Path], Any]) -> None:
        target = self.path / name
        try:
            replace_file(target, write)
        except Exception as error:      # safetensors and torch wrap a full disk in errors of their own
            raise RunFolderError(f"cannot write {target}: {error}; what was saved before is unchanged, and "
                                 f"--resume {self.path} continues from there") from error


@dataclass(frozen=True)
class Run:
    """A run of ``flatmin train``, ``compare`` or ``measure``, as its folder holds it; weights and log are read when
    asked for.

    ``record`` is ``record.json``; numbers in it that are not finite are the texts "nan", "inf" and "-inf", which
    ``float`` reads.
    """

    path: Path
    record: dict[str, Any]

    @property
    def kind(self) -> str:
        """ "train", "compare" or "measure"."""
        return str(self.record["kind"])

    @property
    def status(self) -> str:
        """ "complete", "running" (also where it was killed), "interrupted" or "failed"."""
        return str(self.record.get("status"))

    @property
    def settings(self) -> dict[str, Any]:
        return dict(self.record.get("settings", {}))

    @property
    def weight_names(self) -> list[str]:
        """What :meth:`weights` can read."""
        return sorted(file.stem for file in (self.path / "checkpoints").glob("*.safetensors"))

    def weights(self, name: str = "model") -> dict[str, Tensor]:
        """A ``state_dict`` of the run: ``model`` of a training run, or one of :attr:`weight_names`."""
        if name not in self.weight_names:
            there = ", ".join(self.weight_names) or "none"
            raise RunFolderError(f"{self.path} holds no weights {name!r}; it holds: {there}")
        return RunFolder(self.path).load_weights(name)

    def log(self) -> list[dict[str, Any]]:
        """The rows of ``log.jsonl``, oldest first; none where the run keeps no log."""
        return read_log(self.path)


def load(folder: str | Path) -> Run:
    """The run that a folder holds.

    Raises:
        RunFolderError: no record there, or one that cannot be read.

    Example:
        >>> run = load("runs/train")                        # doctest: +SKIP
        >>> run.status, run.settings["method"]              # doctest: +SKIP
        >>> model.load_state_dict(run.weights())            # doctest: +SKIP
        >>> losses = [row["loss"] for row in run.log() if "loss" in row]        # doctest: +SKIP
    """
    found, record = RunFolder.open(folder)
    return Run(found.path, record)
