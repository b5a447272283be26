"""Other models of the same architecture, read as points in weight space."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import parallel
from ..objective import Objective
from .directions import wide

Model = nn.Module | Mapping[str, Any] | Sequence[Tensor]


@dataclass(frozen=True)
class State:
    """The weights of one model, in the order of ``objective.parameters``, and its running statistics by name."""

    weights: list[Tensor]
    statistics: dict[str, Tensor]


def read(objective: Objective, model: Model) -> State:
    """A module, a state_dict (``{"model" | "state_dict": ...}`` is looked into) or a list of tensors, as a state.

    Raises:
        ValueError: for names or shapes that do not fit, or frozen weights that differ from the objective's model.
    """
    here = parallel.unwrapped(objective.model)
    names = [(name, p) for name, p in here.named_parameters()]
    if isinstance(model, nn.Module):
        model = parallel.unwrapped(model).state_dict()
    if isinstance(model, Mapping):
        found = fitting(model, here.state_dict())
        missing = [name for name, p in names if p.requires_grad and name not in found]
        if missing:
            raise ValueError(f"the state_dict has no {missing[0]!r}" + f" and {len(missing) - 1} more" *
                             (len(missing) > 1) + f"; it has {', '.join(map(repr, list(found)[:4]))}, ...")
    else:
        tensors = list(model)
        trainable = [(name, p) for name, p in names if p.requires_grad]
        matching = names if len(tensors) == len(names) else trainable
        if len(tensors) != len(matching):
            raise ValueError(f"a list of parameters needs {len(trainable)} tensors (those that require a gradient) or "
                             f"{len(names)} (all), got {len(tensors)}")
        found = {name: t for (name, _), t in zip(matching, tensors, strict=True)}
    _same_frozen(found, names)
    return State([_fit(found[name], p, name) for name, p in names if p.requires_grad],
                 {name: found[name].detach().clone() for name in statistics(here) if name in found})


def statistics(model: nn.Module) -> dict[str, Tensor]:
    """The running means and variances of normalization layers, by their names in the state_dict."""
    return {f"{name}.{kind}" if name else kind: b for name, m in model.named_modules()
            if isinstance(m, nn.modules.batchnorm._NormBase)
            for kind, b in (("running_mean", m.running_mean), ("running_var", m.running_var)) if b is not None}


def _inner(state: Mapping[str, Any]) -> Mapping[str, Any]:
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(state.get(key), Mapping):
            return state[key]
    return state


def fitting(state: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """A state_dict with names as in ``own``: without the dotted prefix that all share, where they fit only without it.

    ``{"model" | "state_dict" | "model_state_dict": ...}`` is looked into. Data-parallel and compiled wrappers add a
    prefix (``module.``, ``_orig_mod.``), and so does a trainer that holds the model as an attribute (Lightning's
    ``model.``).
    """
    state = _inner(state)
    out = {str(key): value for key, value in state.items()}
    names = list(out)
    shared = os.path.commonprefix(names)
    while names and shared and not any(name in own for name in out):
        head, dot, _ = next(iter(out)).partition(".")
        if not dot or not shared.startswith(head + dot):
            break
        out = {name[len(head + dot):]: value for name, value in out.items()}
        shared = shared[len(head + dot):]
    return out if any(name in own for name in out) else {str(key): value for key, value in state.items()}


def _fit(t: Tensor, p: nn.Parameter, name: str) -> Tensor:
    if t.shape != p.shape:
        raise ValueError(f"{name!r} has shape {tuple(t.shape)} instead of {tuple(p.shape)}")
    return wide(parallel.part(t.detach(), p)).to(parallel.local(p).device, wide(p).dtype, copy=True)


def _same_frozen(found: Mapping[str, Tensor], names: Sequence[tuple[str, nn.Parameter]]) -> None:
    for name, p in names:
        if not p.requires_grad and name in found and not torch.equal(
                parallel.part(found[name], p).to(p.device, p.dtype), parallel.local(p.detach())):
            raise ValueError(f"{name!r} is frozen in the objective's model and has another value in a model given: "
                             "call requires_grad_() on what differs between the models")
