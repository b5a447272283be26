"""Whether products are of the matrix they should be: an exact product beside differences of gradients, in float64.

A residual is computed with the same automatic differentiation as the eigenpair, so it cannot notice a layer whose
second derivative is wrong. Differences of gradients can.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from .. import batches, perturbed
from ..linalg import memory

if TYPE_CHECKING:
    from ..objective import Objective
    from .linearization import OverObjective as ObjectiveOperator

SAMPLES = 4

ALLOWED = 1e-3
"""Relative difference, of one parameter tensor's part, up to which a product and a difference are the same."""

STEPS = 1e-6, 1e-8
"""Relative to the size of each parameter. The smaller one jumps over few kinks of a large network."""

COARSE = 1e-3
"""A step for computations that are in float32 inside; it can only confirm, since it jumps over kinks."""

COPIES = 8
"""Float64 copies of the parameters that are held at once, at most."""


@dataclass(frozen=True, kw_only=True)
class ProductCheck:
    """What became of the comparison of one product with differences of gradients.

    ``error`` is their relative difference, nan where nothing was compared and ``reason`` says why. ``agrees`` is False
    only where two differences agree with each other and not with the product; ``layer`` then says in which module, and
    ``gradient`` whether the gradient agrees with differences of the loss.
    """

    error: float = math.nan
    samples: int = 0
    agrees: bool = True
    layer: str = ""
    gradient: bool = True   # False: the gradient is not that of the loss either
    reason: str = ""
    impossible: str = ""    # what autograd says where only the second derivative fails

    def to_dict(self) -> dict[str, Any]:
        """For the settings of a record."""
        if self.agrees and (self.reason or self.impossible):
            return {"not_checked": self.reason or self.impossible}
        out = {"error": self.error, "samples": self.samples}
        return out if self.agrees else out | {"disagrees": True, "layer": self.layer}

    def __str__(self) -> str:
        wrong, one, other = ("second derivative", "products", "gradients") if self.gradient else \
            ("gradient", "gradients", "the loss")
        return (f"{one} by automatic differentiation differ by {self.error:.2g} of their size from differences of "
                f"{other}, in float64 on {self.samples} samples: the {wrong} of {self.layer} is wrong, or something "
                "there is detached")


def check_product(operator: ObjectiveOperator) -> ProductCheck:
    """Compare a product with central differences at two step sizes, on a few samples in float64.

    The parameters are replaced by float64 copies at a random point close by, where no kink is met exactly, while the
    comparison runs; the model's own are never written.
    """
    objective = operator.objective
    with objective.session():
        objective.evaluate_once()       # outside the check, where an error would count as a reason not to check
        found = _checked(operator)
        wrong, impossible = objective.ranks.total(float(not found.agrees), float(bool(found.impossible)))
    if wrong and found.agrees:
        found = replace(found, agrees=False, layer="a layer, on another rank,")
    if impossible and not found.impossible:
        found = replace(found, impossible="found on another rank")
    return found


def _checked(operator: ObjectiveOperator) -> ProductCheck:
    objective = operator.objective
    numbers = sum(p.numel() for p in objective.model.parameters())
    needed, free = 8 * COPIES * numbers, memory.available(operator.device) / 2
    if needed > free:
        return ProductCheck(reason=f"a float64 copy takes {memory.size(needed)}, half of the free memory is "
                                   f"{memory.size(free)}")
    try:
        batch = next((batch for batch in objective.batches() if objective.weight(batch) > 0), None)
        if batch is None:
            return ProductCheck(reason="this rank has no batch")
        n = batches.samples_in(batch)
        over_batch = any(isinstance(m, nn.modules.batchnorm._BatchNorm) and (m.training or m.running_mean is None)
                         for m in objective.model.modules())
        least = SAMPLES if over_batch else 1 if objective.mode == "eval" else 2
        found = _on(operator, batch, max(least, min(SAMPLES, n // 16)))
        # of one sample a loss that compares samples says nothing
        return _on(operator, batch, SAMPLES) if found.error == 0 and found.samples < min(n, SAMPLES) else found
    except Exception as error:      # whatever stops it is a reason, not a failure
        return ProductCheck(reason=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")


def _on(operator: ObjectiveOperator, batch: Any, k: int) -> ProductCheck:
    objective = operator.objective
    few, samples = _few(batch, k, objective.weight)
    modules = [m for m in (objective.model, objective.loss_fn) if isinstance(m, nn.Module)]
    with in_double(modules):
        return _compared(_twin(operator, few), samples)


def _compared(twin: ObjectiveOperator, samples: int) -> ProductCheck:
    generator = torch.Generator().manual_seed(0)
    w = [p.detach() for p in twin.parameters]
    units = _units(w)
    with torch.no_grad():
        for p, unit in zip(w, units, strict=True):
            p.add_(_random(p, generator), alpha=COARSE * unit)
    v = torch.cat([unit * _random(p, generator).reshape(-1) for p, unit in zip(w, units, strict=True)])
    gradient = _gradient(twin)
    found, losses = _along(twin, v, units, gradient, samples)
    reached = (gradient != 0).double()      # an embedding holds the row at padding_idx fixed
    if not found.agrees and not bool(reached.all()):
        found, _ = _along(twin, v * reached, units, gradient, samples)
    right, error = True, 0.0
    if not losses or not _near(float(gradient @ v), (losses[0] - losses[1]) / (2 * STEPS[0])):
        right, error = _has_right_gradient(twin, v * reached, gradient)
    if right is False:
        return replace(found, agrees=False, gradient=False, error=error, samples=samples, reason="",
                       layer="a layer, or of the loss," if found.agrees else _layer(twin))
    return found if found.agrees else replace(found, layer=_layer(twin), gradient=right is True)


def _along(twin: ObjectiveOperator, v: Tensor, units: Sequence[float], gradient: Tensor,
           samples: int) -> tuple[ProductCheck, tuple[float, ...]]:
    """What became of the comparison along v, and the losses at w ± STEPS[0] v."""
    differences = twin.differences()
    assert differences is not None
    with differences.at(v) as difference:
        first, _, _, losses = difference(STEPS[0])
    try:
        exact = twin.matvec(v).split(twin.numels)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError) as error:    # and the gradient could be computed
        return ProductCheck(impossible=str(error).splitlines()[0]), losses
    if not bool(first.isfinite().all()) or not all(bool(t.isfinite().all()) for t in exact):
        return ProductCheck(reason="a product or a gradient is not finite"), losses
    with differences.at(v) as difference:
        verdict, error = _verdict(exact, lambda h: (first if h == STEPS[0] else difference(h).av).split(twin.numels),
                                  units, gradient.split(twin.numels))
    if verdict is None:
        return ProductCheck(reason="differences of gradients at two step sizes do not agree (kinks, or too few "
                                   "digits)"), losses
    return ProductCheck(error=error, samples=samples, agrees=verdict), losses


def _near(slope: float, difference: float) -> bool:
    """Whether a component of the gradient is a difference of losses."""
    return abs(slope - difference) <= 0.01 * max(abs(slope), abs(difference))


def _has_right_gradient(twin: ObjectiveOperator, v: Tensor, gradient: Tensor) -> tuple[bool | None, float]:
    """Whether the gradient's component along v is a difference of the loss, and their relative difference.

    None where the differences do not agree with each other either (kinks), or have too few digits.
    """
    w = [p.detach().clone() for p in twin.parameters]
    slope, found, size = float(gradient @ v), [], 0.0
    for h in (1e-6, 1e-5, COARSE):
        values = []
        for sign in (1, -1):
            for p, start, step in zip(twin.parameters, w, v.split(twin.numels), strict=True):
                p.detach().copy_(start).add_(step.view_as(start), alpha=sign * h)
            values.append(float(twin.objective.value()))
        size = max(size, *map(abs, values))
        found.append((values[0] - values[1]) / (2 * h))
        if _near(slope, found[-1]):
            break
    for p, start in zip(twin.parameters, w, strict=True):
        p.detach().copy_(start)
    if not (math.isfinite(slope) and math.isfinite(size) and all(map(math.isfinite, found))):
        return None, math.nan
    apart = abs(slope - found[-1])
    error = apart / (max(abs(slope), abs(found[-1])) or 1.0)
    if error <= 0.01:
        return True, error
    digits = apart * COARSE > 10 * torch.finfo(torch.float32).eps * size    # what computes in float32 has these
    return (False if digits and max(found) - min(found) <= apart / 10 else None), error


@torch.enable_grad()
def _gradient(twin: ObjectiveOperator) -> Tensor:
    rows = [torch.autograd.grad(batch.loss(batch.outputs()), twin.parameters, allow_unused=True, materialize_grads=True)
            for batch in twin.objective.weighted_batches()]
    return torch.cat([t.to_dense().reshape(-1) for t in rows[0]])


def _verdict(exact: Sequence[Tensor], difference: Callable[[float], Sequence[Tensor]],
             units: Sequence[float], gradient: Sequence[Tensor]) -> tuple[bool | None, float]:
    """Whether differences agree with the product, None where it cannot be said; by what part they are off."""
    wrong, eps = [], torch.finfo(torch.float64).eps
    for h in (*STEPS, COARSE):
        fine = difference(h)
        error, worst = _distances(exact, fine, units)
        if worst <= ALLOWED:
            return True, error
        if h != COARSE:
            rounded = [t + eps / h * g.reshape(t.shape).abs() for t, g in zip(fine, gradient, strict=True)]
            sure = max(_distances(t, fine, units)[1] for t in (difference(2 * h), rounded)) <= worst / 10
            wrong.append((error, sure))
    return (False if all(sure for _, sure in wrong) else None), wrong[0][0]


def _distances(a: Sequence[Tensor], b: Sequence[Tensor], units: Sequence[float]) -> tuple[float, float]:
    """The relative distance of two lists of tensors, and the largest of one tensor; inf where a number is not finite.

    A tensor is measured by at least ``ALLOWED`` of the length of the whole.
    """
    apart = [unit * float(torch.linalg.vector_norm(s - t)) for s, t, unit in zip(a, b, units, strict=True)]
    sizes = [unit * max(map(float, map(torch.linalg.vector_norm, (s, t))))
             for s, t, unit in zip(a, b, units, strict=True)]
    whole = math.hypot(*sizes)
    if not math.isfinite(whole) or not all(map(math.isfinite, apart)):
        return math.inf, math.inf
    if whole == 0:
        return 0.0, 0.0
    return math.hypot(*apart) / whole, max(d / max(size, ALLOWED * whole) for d, size in zip(apart, sizes, strict=True))


def _units(tensors: Sequence[Tensor]) -> list[float]:
    """The size of the entries of each tensor; where that is almost zero, a part of that of all."""
    rms = [float(t.square().mean().sqrt()) if t.numel() else 0.0 for t in tensors]
    least = 0.01 * max(rms, default=0.0) or 1.0
    return [max(r, least) for r in rms]


def _random(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=torch.float32).to(like.device, torch.float64)


def _few(batch: Any, k: int, weight: Callable[[Any], float]) -> tuple[Any, int]:
    """k samples of a batch that hold something to average, and how many they are."""
    n = batches.samples_in(batch)
    for start in range(0, n - k + 1, k):
        part = batches.each_tensor(batch, lambda t, start=start: t[start:start + k] if t.dim() and len(t) == n else t)
        if weight(part) > 0:
            return part, k
    return batch, n


def _double(t: Tensor) -> Tensor:
    return t.detach().to(torch.float64, copy=True) if t.is_floating_point() else t


def _twin(operator: ObjectiveOperator, batch: Any) -> ObjectiveOperator:
    """The same operator on one batch and on the parameters that the model has now."""
    objective = operator.objective
    data, loss_fn = [batches.each_tensor(batch, lambda t: _double(t).to(objective.device))], objective.loss_fn
    if isinstance(loss_fn, functools.partial):
        loss_fn = functools.partial(loss_fn.func, *batches.each_tensor(loss_fn.args, _double),
                                    **batches.each_tensor(loss_fn.keywords, _double))
    twin = copy.copy(operator)
    twin.objective = objective.alone(data, loss_fn, _InDouble)
    twin = twin.restrict(operator.names)
    twin.product = "forward" if operator.product == "forward" else "recomputed"
    return twin


class _InDouble(TorchFunctionMode):
    """Inside, what asks for float32 or less gets float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _CASTS:
            return Tensor.double(args[0]) if args[0].is_floating_point() else func(*args, **kwargs)
        if any(isinstance(a, torch.dtype) for a in args):
            args = tuple(torch.float64 if isinstance(a, torch.dtype) and a in _NARROW else a for a in args)
        if kwargs.get("dtype") in _NARROW:
            kwargs = kwargs | {"dtype": torch.float64}
        return func(*args, **kwargs)


_CASTS = {Tensor.float, Tensor.half, Tensor.bfloat16}
_NARROW = {torch.float32, torch.float16, torch.bfloat16}


@contextmanager
def in_double(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, parameters and buffers of modules are float64 copies; afterwards the modules hold their own again."""
    every = list(dict.fromkeys(m for module in modules for m in module.modules()))
    own = [(m, dict(m._parameters), dict(m._buffers), {k: t for k, t in vars(m).items() if isinstance(t, Tensor)})
           for m in every]
    copies: dict[int, nn.Parameter] = {}

    def back() -> None:
        for m, parameters, buffers, tensors in own:
            for name, p in parameters.items():
                setattr(m, name, p)
            m._buffers.update(buffers)
            vars(m).update(tensors)

    try:
        for m, parameters, buffers, tensors in own:
            for name, p in parameters.items():
                if p is not None and p.is_floating_point():
                    if id(p) not in copies:
                        copies[id(p)] = nn.Parameter(_double(p), p.requires_grad)
                    setattr(m, name, copies[id(p)])
            m._buffers.update({name: b if b is None else _double(b) for name, b in buffers.items()})
            vars(m).update({name: _double(t) for name, t in tensors.items()})
        yield
    finally:
        try:
            back()
        except KeyboardInterrupt:   # in the middle: once more
            back()
            raise


def _layer(twin: ObjectiveOperator) -> str:
    """Which module's second derivative is wrong, deepest first."""
    objective, calls = twin.objective, {}
    names = {m: name for name, m in objective.model.named_modules()}

    def seen(module: nn.Module, args: Any, kwargs: Any) -> None:
        calls.setdefault(module, (args, kwargs))

    hooks = [m.register_forward_pre_hook(seen, with_kwargs=True) for m in names]
    try:
        with torch.enable_grad():
            for batch in objective.weighted_batches():
                batch.loss(batch.outputs())
    finally:
        for hook in hooks:
            hook.remove()
    for module in sorted(calls, key=lambda m: -names[m].count(".") if names[m] else 1):
        try:
            wrong = _is_wrong(module, calls[module][0], calls[module][1], objective)
        except Exception:       # a module that cannot be called by itself
            continue
        if wrong:
            return f"module {names[module]!r} ({type(module).__name__})" if names[module] else "the model itself"
    return "the loss, or of code between the modules,"


def _is_wrong(module: nn.Module, args: Any, kwargs: Any, objective: Objective) -> bool:
    """Whether the Hessian of ⟨u, module(x)⟩ in x and the parameters differs from differences, for a random u."""
    flat, form = tree_flatten((args, kwargs))
    flat = [t.detach().clone().requires_grad_(t.is_floating_point()) if isinstance(t, Tensor) else t for t in flat]
    args, kwargs = tree_unflatten(flat, form)
    leaves = [t for t in flat if isinstance(t, Tensor) and t.requires_grad]
    leaves += [p for p in module.parameters() if p.requires_grad]
    w, units = [t.detach().clone() for t in leaves], _units([t.detach() for t in leaves])
    v = [unit * _random(t, torch.Generator().manual_seed(i)) for i, (t, unit) in
         enumerate(zip(w, units, strict=True))]
    state = perturbed.RandomState(objective.devices)

    @torch.enable_grad()
    def gradient(h: float, record: bool = False) -> list[Tensor]:
        with torch.no_grad():
            for t, start, step in zip(leaves, w, v, strict=True):
                t.copy_(start).add_(step, alpha=h)
        state.set()
        out = module(*[a.clone() if isinstance(a, Tensor) else a for a in args], **kwargs)
        z = [t for t in tree_leaves(dict(out) if isinstance(out, Mapping) else out)
             if isinstance(t, Tensor) and t.requires_grad]
        total = torch.stack([(_random(t, torch.Generator().manual_seed(i)) * t).sum() for i, t in enumerate(z)]).sum()
        return list(torch.autograd.grad(total, leaves, create_graph=record, allow_unused=True, materialize_grads=True))

    def difference(h: float) -> list[Tensor]:
        return [(a - b) / (2 * h) for a, b in zip(gradient(h), gradient(-h), strict=True)]

    try:
        g = gradient(0.0, True)
        used = [(t, s) for t, s in zip(g, v, strict=True) if t.requires_grad]
        exact = torch.autograd.grad([t for t, _ in used], leaves, [s for _, s in used], allow_unused=True,
                                    materialize_grads=True) if used else [torch.zeros_like(t) for t in w]
        return _verdict(exact, difference, units, [t.detach() for t in g])[0] is False
    finally:
        with torch.no_grad():
            for t, start in zip(leaves, w, strict=True):
                t.copy_(start)
