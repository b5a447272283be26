"""Objects from the user's own code, named ``module:attribute``."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

import torch
from torch import nn


def load_object(name: str, seed: int = 0) -> Any:
    """``module:attribute`` from the user's own code; a function is called, without arguments.

    Torch is seeded before the import and before the call, so that a resumed run finds the same weights.

    Raises:
        ValueError: no such module or attribute, or the user's code raised.
    """
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise ValueError(f"your own code is named module:attribute, got {name!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    torch.manual_seed(seed)
    try:
        value: Any = importlib.import_module(module_name)
    except Exception as error:  # the user's own code may raise anything
        raise ValueError(f"cannot import {module_name!r} for {name!r}: {said(error)}") from error
    for part in attribute.split("."):
        if not hasattr(value, part):
            raise ValueError(f"{module_name!r} has no {attribute!r}")
        value = getattr(value, part)
    if callable(value) and not isinstance(value, nn.Module):
        torch.manual_seed(seed)
        try:
            value = value()
        except Exception as error:
            raise ValueError(f"{name}() raised {said(error)}") from error
    return value


def said(error: BaseException) -> str:
    """An exception in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())
