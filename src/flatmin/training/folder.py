"""Run folders: ``record.json``, checkpoints and a report; every file is replaced as a whole.

Torch is imported where tensors are read or written: a wrong --resume is refused without it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RunFolderError
from ..files import move_file, replace_file
from ..results import plain

if TYPE_CHECKING:
    from torch import Tensor, nn


class RunFolder:
    """The folder of one run: written by a job, and read to resume it."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    @classmethod
    def create(cls, path: str | Path) -> RunFolder:
        """A new folder; one that holds anything is refused, so that no earlier result is lost."""
        folder = cls(path)
        if folder.path.exists() and (not folder.path.is_dir() or any(folder.path.iterdir())):
            raise RunFolderError(f"{path} exists and is not empty: choose another --out, or continue it with "
                                 f"--resume {path}")
        try:
            (folder.path / "checkpoints").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunFolderError(f"cannot write to {path}: {error.strerror or error}; choose another --out") from error
        return folder

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
        return folder, record

    def save_record(self, record: dict[str, Any]) -> None:
        text = json.dumps(plain(record), indent=1, ensure_ascii=False)
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

    def save_state(self, state: dict[str, Any] | None) -> None:
        """The state of a training run, for ``--resume``; None removes it."""
        import torch

        if state is None:
            (self.path / "checkpoints" / "training.pt").unlink(missing_ok=True)
        else:
            self._replace("checkpoints/training.pt", lambda tmp: torch.save(state, tmp))

    def keep_state(self, name: str) -> None:
        """The state of a finished run, optimizer and all, as ``checkpoints/<name>.state.pt``."""
        state = self.path / "checkpoints" / "training.pt"
        if state.exists():
            try:
                move_file(state, state.with_name(f"{name}.state.pt"))
            except OSError as error:
                raise RunFolderError(f"cannot write {state.with_name(name)}.state.pt: {error}") from error

    def load_state(self) -> dict[str, Any] | None:
        """The state that was saved last, read without unpickling anything but tensors and plain values."""
        import torch

        file = self.path / "checkpoints" / "training.pt"
        if not file.exists():
            return None
        try:
            return torch.load(file, weights_only=True)
        except Exception as error:
            raise RunFolderError(f"{file} cannot be read ({type(error).__name__}): delete it to repeat the run that "
                                 "was interrupted") from error

    def _replace(self, name: str, write: Callable[[Path], Any]) -> None:
        target = self.path / name
        try:
            replace_file(target, write)
        except Exception as error:      # safetensors and torch wrap a full disk in errors of their own
            raise RunFolderError(f"cannot write {target}: {error}; what was saved before is unchanged, and "
                                 f"--resume {self.path} continues from there") from error
