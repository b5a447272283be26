"""Weights from a file of the user's into a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..landscape import models


def load_checkpoint(model: nn.Module, path: str | Path) -> None:
    """Weights and buffers from a ``.safetensors`` file or a torch file of tensors; all of them fit, or none is set.

    ``{"model": ...}`` and ``{"state_dict": ...}`` are unpacked. A prefix that all names share (a wrapper's, or
    Lightning's ``model.``) is removed where the names fit only without it. Weights tied to one that is there may be
    missing. Nothing but tensors and plain values is unpickled.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it cannot be read, or names or shapes do not fit; the first of them are listed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    state = _read(path)
    state = models.fitting(state, model.state_dict()) if isinstance(state, Mapping) else state
    if not isinstance(state, dict) or not any(isinstance(v, torch.Tensor) for v in state.values()):
        raise ValueError(f"the checkpoint {path} holds no state_dict, it holds {_held(state)}")
    own = {name: t for name, t in model.state_dict().items() if isinstance(t, torch.Tensor)}
    wrong = _misfits(state, own)
    if wrong:
        raise ValueError(f"the checkpoint {path} does not fit the model {type(model).__name__}: {'; '.join(wrong)}")
    broken = [name for name, t in own.items() if name in state and t.is_floating_point()
              and bool(state[name].isnan().any())]
    if broken:
        raise ValueError(f"the checkpoint {path} holds NaN in {_first(broken)}")
    model.load_state_dict(state, strict=False)


def _read(path: Path) -> Any:
    """Whatever the file holds; nothing but tensors and plain values is unpickled."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of pickle, zip files, safetensors
        raise ValueError(f"cannot read the checkpoint {path} ({type(error).__name__}): it must hold a state_dict of "
                         "tensors, as .safetensors or by torch.save(model.state_dict(), ...), not a whole model"
                         ) from error


def _misfits(state: dict[str, Any], own: dict[str, torch.Tensor]) -> list[str]:
    """What is missing, unexpected or of another shape; weights tied to one that is there are not missing."""
    there = {t.data_ptr() for name, t in own.items() if name in state and t.numel()}
    missing = [name for name, t in own.items() if name not in state and t.data_ptr() not in there]
    unexpected = [name for name in state if name not in own and not str(name).endswith("_extra_state")]
    shapes = [f"{name} {tuple(state[name].shape)} instead of {tuple(t.shape)}" for name, t in own.items()
              if name in state and isinstance(state[name], torch.Tensor) and state[name].shape != t.shape]
    return [f"{what} {_first(names)}" for what, names in
            (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes)) if names]


def _first(names: list[str], most: int = 3) -> str:
    rest = len(names) - most
    return ", ".join(map(str, names[:most])) + (f" and {rest} more" if rest > 0 else "")


def _held(state: Any) -> str:
    return f"{_first(list(state), 5) or 'nothing'}" if isinstance(state, Mapping) else f"a {type(state).__name__}"
