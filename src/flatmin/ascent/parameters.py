"""The parameters of a model: each with its name, its role and the group whose ρ it takes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..parallel import wrapped_name

Groups = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class ParameterInfo:
    """A parameter, its place in the model and its group. A ``group`` is shared and may change between steps."""

    index: int
    name: str
    parameter: nn.Parameter
    role: str
    group: dict[str, Any]


NORMALIZATION: tuple[type[nn.Module], ...] = (
    nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm,
    *([nn.RMSNorm] if hasattr(nn, "RMSNorm") else []),
)


def is_normalization(module: nn.Module) -> bool:
    """A normalization layer by type: torch's own, or a class like those model libraries write (``*RMSNorm``, ...)
    that owns nothing but a one-dimensional weight and perhaps a bias."""
    if isinstance(module, NORMALIZATION):
        return True
    own = dict(module.named_parameters(recurse=False))
    return (type(module).__name__.endswith("Norm") and not any(True for _ in module.children())
            and "weight" in own and all(p.dim() <= 1 for p in own.values()))


def role(module: nn.Module | None, name: str, parameter: Tensor) -> str:
    """ "weight", "bias", "norm_weight" or "norm_bias" of a parameter, from the module that owns it and its shape."""
    if module is not None and is_normalization(module):
        return "norm_bias" if name == "bias" else "norm_weight"
    return "weight" if parameter.dim() >= 2 else "bias"


def list_parameters(model: nn.Module | None, groups: Groups | None, default: dict[str, Any]
                    ) -> list[ParameterInfo]:
    """Every parameter of a model, or without one of the groups; tied weights once."""
    group_of: dict[int, dict[str, Any]] = {}
    listed: list[nn.Parameter] = []
    for group in groups or ():
        for p in _members(group):
            if id(p) in group_of:
                raise ValueError("a parameter appears in more than one group")
            group_of[id(p)] = group
            listed.append(p)
    if model is None:
        named = [(str(i), p, role(None, "", p)) for i, p in enumerate(listed)]
    else:
        named = _named(model)
        known = {id(p) for _, p, _ in named}
        if any(id(p) not in known for p in listed):
            raise ValueError("a group lists a parameter that the model does not have")
    return [ParameterInfo(i, n, p, r, group_of.get(id(p), default)) for i, (n, p, r) in enumerate(named)]


def _named(model: nn.Module) -> list[tuple[str, nn.Parameter, str]]:
    """Every parameter once, named without what wrappers add: a saved state fits the model wrapped or not."""
    seen: set[int] = set()
    names = {"": ""}  # of modules: as the model has it -> without wrappers
    out = []
    for path, module in model.named_modules():
        name = names[path]
        inside = wrapped_name(module)
        for child in module._modules:
            seen_as = name if child == inside else f"{name}.{child}" if name else child
            names[f"{path}.{child}" if path else child] = seen_as
        for own, p in module._parameters.items():
            if p is not None and id(p) not in seen:
                seen.add(id(p))
                if isinstance(p, nn.parameter.UninitializedParameter):
                    raise ValueError(f"{path}.{own} has no shape yet: run the model forward once before this")
                out.append((f"{name}.{own}" if name else own, p, role(module, own, p)))
    return out


def refuse_unsupported(model: nn.Module | None, parameters: Iterable[ParameterInfo]) -> None:
    """Raise for trainable parameters with which a step would fail later, or go wrong."""
    for info in parameters:
        p = info.parameter
        if p.requires_grad and not p.is_floating_point():
            raise ValueError(f"{info.name} is {p.dtype}: only real floating-point parameters can be perturbed; keep "
                             "the real and imaginary parts as two parameters, or freeze it")
    for path, module in model.named_modules() if model is not None else ():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse and module.weight.requires_grad:
            refuse_sparse(f"{path}.weight" if path else "weight")


def refuse_sparse(name: str) -> None:
    raise ValueError(f"{name} has sparse gradients, along which no step can be taken: build its embedding with "
                     "sparse=False, or freeze it")


def _members(group: dict[str, Any]) -> list[nn.Parameter]:
    if ("params" in group) == ("modules" in group):
        raise ValueError('a group needs exactly one of "params" and "modules", and a "rho"')
    if "params" in group:
        members: Any = group["params"]
        return [members] if isinstance(members, nn.Parameter) else list(members)
    modules: Any = group["modules"]
    modules = [modules] if isinstance(modules, nn.Module) else list(modules)
    return list({id(p): p for m in modules for p in m.parameters()}.values())


def by_depth(model: nn.Module, first: float, last: float) -> list[dict[str, Any]]:
    """Groups whose ρ goes linearly from ``first``, for the earliest module with parameters, to ``last``.

    Depth is the order of ``model.modules()``; tied parameters count where they come first.

    >>> [g["rho"] for g in by_depth(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), 0.01, 0.05)]
    [0.01, 0.05]
    """
    seen: set[int] = set()
    levels = []
    for module in model.modules():
        own = [p for p in module._parameters.values() if p is not None and id(p) not in seen]
        seen.update(id(p) for p in own)
        if own:
            levels.append(own)
    share = [i / max(1, len(levels) - 1) for i in range(len(levels))]
    return [{"params": own, "rho": first + (last - first) * s} for own, s in zip(levels, share, strict=True)]


def check_rho(rho: Any) -> Any:
    """ρ as a finite number that is not negative, or a schedule."""
    if callable(rho):
        return rho
    if isinstance(rho, bool) or not isinstance(rho, (int, float)) or not math.isfinite(rho) or rho < 0:
        raise ValueError(f"rho must be a finite number that is not negative, got {rho!r}")
    return float(rho)


def devices_of(parameters: Iterable[Tensor]) -> list[torch.device]:
    """The distinct devices of some parameters."""
    return list({p.device: None for p in parameters})
