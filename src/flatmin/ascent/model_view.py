"""The parameters, gradients, groups, buffers and wrappers of a model that a step uses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import parallel, vectors
from ..parallel import Wrappers, local, wrapped_name
from ..perturbed import Displacement, Float32Displacement, TensorPool, buffer_registries
from ..vectors import Space, devices_of
from .graph_inspection import Inspection
from .parameters import Groups, ParameterInfo, check_rho, list_parameters, refuse_sparse, refuse_unsupported


class ModelView:
    """A model as it is now; rebuilt when its parameters, groups or wrappers change.

    ``model`` None: the parameters are those of the groups. ``default`` is the group of parameters in no other.
    ``one_rank``: each rank's gradient is its own, so that parameters outside the wrappers are allowed.
    """

    def __init__(self, model: nn.Module | None, groups: Groups | None, default: dict[str, Any], one_rank: bool):
        self.parameters = list_parameters(model, groups, default)
        if not self.parameters:
            raise ValueError("no parameters: pass a model that has some")
        refuse_unsupported(model, self.parameters)
        tensors = [p.parameter for p in self.parameters]
        self.whole = Space(tensors)
        self.devices = devices_of(tensors)
        self.sharded = any(map(parallel.is_sharded, tensors))
        self.registries = buffer_registries(model)
        self.wrappers = Wrappers(model)
        if not one_rank:
            self.wrappers.refuse_left_out((p.name, p.parameter) for p in self.parameters)
        self.inspection = Inspection(tensors, leaves=not self.wrappers.fsdp)
        self.groups = {id(p.group): p.group for p in self.parameters}
        self._group_keys = [id(p.group) for p in self.parameters]
        self._default = default
        self._dtypes = {t.dtype for t in tensors}
        self._uniform = len(self._dtypes) == 1 and len(self.devices) == 1
        self._spaces: dict[tuple[int, ...], Space] = {}
        self._takes_float32 = any(t.dtype in vectors.HALF for t in tensors) and self._is_plain(model)
        self._pool = TensorPool()
        self.choose_displacement()

    def _is_plain(self, model: nn.Module | None) -> bool:
        """Whether every module takes whatever dtype its weights have."""
        modules = list(model.modules()) if model is not None else []
        return bool(modules) and not any(
            wrapped_name(m) is not None or isinstance(m, nn.RNNBase) or m in self.wrappers.fsdp
            or getattr(m, "_compiled_call_impl", None) is not None for m in modules)

    def choose_displacement(self) -> None:
        """Set how weights are moved: in place, or in float32 where they are of half precision and the model allows it.

        Called again after a pass was inspected, since only its graph shows functions that depend on the dtype.
        """
        in_float32 = self._takes_float32 and self.inspection.allows_float32
        self._displacement_type: type[Displacement | Float32Displacement] = (
            Float32Displacement if in_float32 else Displacement)

    def displacement(self, offload: bool) -> Displacement | Float32Displacement:
        """A new displacement, which moves the weights of one step and restores them."""
        return self._displacement_type(offload, self._pool)

    @property
    def is_current(self) -> bool:
        """Whether the parameters have the devices and dtypes they had."""
        tensors = self.whole.parameters
        return devices_of(tensors) == self.devices and {t.dtype for t in tensors} == self._dtypes

    # gradients

    def with_gradients(self) -> list[ParameterInfo]:
        """The parameters whose ``p.grad`` is not None."""
        return [p for p in self.parameters if p.parameter.grad is not None]

    def all_gradients(self) -> dict[int, Tensor]:
        """``p.grad`` by index of the parameter, where it is not None."""
        return {p.index: p.parameter.grad for p in self.parameters if p.parameter.grad is not None}

    @property
    def has_gradients(self) -> bool:
        """Whether any parameter has a gradient."""
        return any(p.parameter.grad is not None for p in self.parameters)

    def clear_gradients(self) -> None:
        """``p.grad = None`` for every parameter."""
        for p in self.parameters:
            p.parameter.grad = None

    def gradients(self, parameters: Sequence[ParameterInfo]) -> list[Tensor]:
        """The local parts of ``p.grad``; each of the parameters has one."""
        out: list[Any] = [p.parameter.grad for p in parameters]
        if self.sharded:
            return [local(parallel.matched(g, p.parameter)) for g, p in zip(out, parameters, strict=True)]
        return out

    def take_gradients(self) -> dict[int, Tensor]:
        """The local parts of all gradients by parameter, taken out of ``p.grad``."""
        out: dict[int, Tensor] = {}
        for info in self.parameters:
            p = info.parameter
            gradient = p.grad
            if gradient is not None:
                if gradient.layout is not torch.strided:
                    refuse_sparse(info.name)
                out[info.index] = local(parallel.matched(gradient, p)) if self.sharded else gradient
                p.grad = None
        return out

    def paired_gradients(self, saved: Mapping[int, Tensor]) -> tuple[list[ParameterInfo], list[Tensor], list[Tensor]]:
        """The parameters with a gradient, in ``p.grad`` or saved, and both gradients; 0 where one is missing."""
        parameters = [p for p in self.parameters if p.index in saved or p.parameter.grad is not None]
        for p in parameters:
            if p.parameter.grad is None:
                p.parameter.grad = torch.zeros_like(p.parameter)
        present = self.gradients(parameters)
        return parameters, present, [saved[p.index] if p.index in saved else torch.zeros_like(g)
                                     for p, g in zip(parameters, present, strict=True)]

    def gradient_norm(self, loss_scale: Tensor | None) -> Tensor:
        """‖·‖₂ of ``p.grad`` over all parameters, the loss scale divided out."""
        parameters = self.with_gradients()
        norm = self.space(parameters).norm(self.gradients(parameters))
        return norm if loss_scale is None else norm / loss_scale.to(norm)

    def write_inf(self) -> None:
        """Put an inf into every ``p.grad``: a scaler looks into those of each optimizer apart."""
        for p in self.parameters:
            if p.parameter.grad is not None:
                local(p.parameter.grad).fill_(float("inf"))

    # weights

    def weights(self, parameters: Sequence[ParameterInfo]) -> list[Tensor]:
        """The local parts of the weights."""
        return [local(p.parameter) for p in parameters] if self.sharded else [p.parameter for p in parameters]

    def space(self, parameters: Sequence[ParameterInfo]) -> Space:
        """The space of some parameters; the last one is cached."""
        if len(parameters) == len(self.parameters):
            return self.whole
        key = tuple(p.index for p in parameters)
        if key not in self._spaces:
            self._spaces = {key: Space([p.parameter for p in parameters])}
        return self._spaces[key]

    def positions_with_rho(self, parameters: Sequence[ParameterInfo], rhos: Sequence[float],
                           rho: float) -> list[Sequence[int]]:
        """Positions of the parameters with this radius, grouped by dtype and device."""
        if self._uniform and len(self.groups) == 1:
            return [range(len(parameters))]
        out: dict[tuple[torch.dtype, torch.device], list[int]] = {}
        for i, info in enumerate(parameters):
            if rhos[info.index] == rho:
                out.setdefault((info.parameter.dtype, info.parameter.device), []).append(i)
        return list(out.values())

    def rhos(self, step: int, lr: float | None) -> list[float]:
        """ρ of every parameter at a step."""
        values = {}
        for key, group in self.groups.items():
            rho = group.get("rho", self._default["rho"])
            values[key] = check_rho(rho(step, lr) if callable(rho) else rho)
        return [values[key] for key in self._group_keys]

    @property
    def follows_schedule(self) -> bool:
        """Whether the ρ of a group depends on the step."""
        return any(callable(group.get("rho", self._default["rho"])) for group in self.groups.values())

    def clear_weight_caches(self) -> None:
        """Drop caches computed from the old weights: gathered shards, autocast's casts."""
        self.wrappers.reshard()
        torch.clear_autocast_cache()

    def placed(self, state: Mapping[str, Any], convert: Callable[[Tensor, Tensor], Tensor]) -> dict[str, Any]:
        """A copy of tensors by parameter name, each converted by ``convert(tensor, parameter)``."""
        by_name = {p.name: p.parameter for p in self.parameters}
        out: dict[str, Any] = {}
        for kind, tensors in state.items():
            unknown = [n for n, t in tensors.items() if n not in by_name or local(t).shape != local(by_name[n]).shape]
            if unknown:
                raise ValueError(f"the saved state ({kind}) does not fit this model: it has a tensor for "
                                 f"{unknown[0]!r}, which is not a parameter of this shape")
            out[kind] = {n: convert(t.clone(), by_name[n]) for n, t in tensors.items()}
        return out
