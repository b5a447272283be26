"""A pass over the micro-batches of a step: forward, loss, backward, in the form that a rule asks for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, final

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..parallel import Wrappers, local
from ..perturbed import RandomState
from .back_propagation import BackPropagation, check_loss
from .inspection import Inspection
from .micro_batches import Loss, MicroBatch, describe


@dataclass
class Recorded:
    """What the passes of a step record of one micro-batch for those after them."""

    output_gradients: list[Tensor | None] = field(default_factory=list)  # ∂L/∂outputs, None where there is none
    losses: Tensor | None = None  # of the samples
    random_state: RandomState | None = None  # in which the micro-batch began


class Pass(Protocol):
    """``one(batch, recorded, passes)`` runs one micro-batch and returns its loss; gradients land in ``p.grad``.

    ``needs_outputs``: it takes the outputs and their loss as two functions. ``needs_samples``: it takes one loss a
    sample. ``needs_recorded``: it reads what an earlier pass recorded of each micro-batch. ``cost``: in forward
    evaluations, a backward counted as two.
    """

    @property
    def needs_outputs(self) -> bool: ...
    @property
    def needs_samples(self) -> bool: ...
    @property
    def needs_recorded(self) -> bool: ...
    @property
    def cost(self) -> float: ...

    def __call__(self, batch: MicroBatch, recorded: Recorded, passes: Passes) -> Tensor: ...


class Runner(Protocol):
    """What runs the passes of a step: :class:`Passes`, or a closure that back-propagates itself."""

    inspection: Inspection | None

    def __call__(self, one: Pass, *, alone: bool = False, only_first: bool = False,
                 after_first: Callable[[], None] | None = None) -> Tensor: ...


class Passes:
    """Runs passes over micro-batches; gradients land in ``p.grad``, weighted losses are returned detached.

    ``devices``: whose random state is replayed for every execution of a micro-batch where a pass needs several; None:
    no replay.
    """

    def __init__(self, batches: list[MicroBatch], wrappers: Wrappers, back_propagation: BackPropagation,
                 devices: Sequence[torch.device] | None, parameters: Sequence[Tensor]):
        self.devices, self.parameters = devices, parameters
        self.inspection: Inspection | None = None  # looks at what is back-propagated
        self.back_propagation = back_propagation
        self._batches, self._wrappers = batches, wrappers
        self._recorded = [Recorded() for _ in batches]

    def __call__(self, one: Pass, *, alone: bool = False, only_first: bool = False,
                 after_first: Callable[[], None] | None = None) -> Tensor:
        """Σ weight · loss of a pass.

        ``alone``: gradients are not averaged over ranks. ``only_first``: the first micro-batch, without its weight.
        ``after_first`` is called after the first micro-batch.
        """
        batches = [replace(self._batches[0], weight=1.0)] if only_first else self._batches
        total: Tensor | None = None
        for i, (batch, recorded) in enumerate(zip(batches, self._recorded, strict=False)):
            last = i == len(batches) - 1
            with self._wrappers.unsynchronised(last, alone), torch.enable_grad():
                value = one(batch, recorded, self)
            value = value.detach() * batch.weight
            total = value if total is None else total + value
            if i == 0 and after_first is not None:
                after_first()
        assert total is not None
        return total

    def backward(self, value: Tensor, weight: float) -> None:
        """Back-propagate weight · value."""
        check_loss(value)
        if self.inspection is None:
            self.back_propagation(value, weight)
            return
        self.inspection([value])
        with self.inspection.watching():
            self.back_propagation(value, weight)


@final
@dataclass(frozen=True)
class LossGradient:
    """∇L."""

    needs_outputs = False
    needs_samples = False
    needs_recorded = False
    cost = 3.0

    def __call__(self, batch: MicroBatch, recorded: Recorded, passes: Passes) -> Tensor:
        outputs = batch.forward()
        value = outputs if batch.loss is None else batch.loss(outputs)
        passes.backward(value, batch.weight)
        return value


@final
@dataclass(frozen=True)
class RecordOutputGradients:
    """∇L, recording ∂L/∂outputs."""

    needs_outputs = True
    needs_samples = False
    needs_recorded = False
    cost = 3.0

    def __call__(self, batch: MicroBatch, recorded: Recorded, passes: Passes) -> Tensor:
        loss = _needed(batch)
        leaves, spec = _outputs(batch.forward())
        kept: list[Tensor | None] = [None] * len(leaves)
        aliases = [_alias(t, lambda g, k=k: kept.__setitem__(k, g)) for k, t in enumerate(leaves)]
        value = _loss_of(loss, leaves, aliases, spec)
        passes.backward(value, batch.weight)
        recorded.output_gradients = _apart(kept, passes.parameters)
        return value


@final
@dataclass(frozen=True)
class FixedOutputGradients:
    """Jᵀ of the recorded ∂L/∂outputs, and ∇ of what the loss depends on beside the outputs."""

    needs_outputs = True
    needs_samples = False
    needs_recorded = True
    cost = 3.0

    def __call__(self, batch: MicroBatch, recorded: Recorded, passes: Passes) -> Tensor:
        loss = _needed(batch)
        leaves, spec = _outputs(batch.forward())
        kept = recorded.output_gradients
        if all(g is None for g in kept):
            raise ValueError("the loss does not depend on the network's outputs")
        # an ordinary pass in which the recorded gradient replaces the one that arrives at the outputs: calling
        # autograd.grad on the outputs instead would bypass DDP's reducer
        aliases = [_alias(t, lambda g, k=k: _instead(kept[k], g)) for k, t in enumerate(leaves)]
        value = _loss_of(loss, leaves, aliases, spec)
        passes.backward(value, batch.weight)
        return value


@final
@dataclass(frozen=True)
class OutputGradients:
    """Record ∂L/∂outputs; the parameters' gradients stay as they are."""

    needs_outputs = True
    needs_samples = False
    needs_recorded = False
    cost = 1.0

    def __call__(self, batch: MicroBatch, recorded: Recorded, passes: Passes) -> Tensor:
        loss = _needed(batch)
        with torch.no_grad():
            leaves, spec = _outputs(batch.forward())
        cut = [t.detach().requires_grad_(t.is_floating_point()) if isinstance(t, Tensor) else t for t in leaves]
        aliases = [t.view_as(t) if isinstance(t, Tensor) and t.requires_grad else t for t in cut]
        value = _loss_of(loss, cut, aliases, spec)
        check_loss(value)
        wanted = [k for k, t in enumerate(cut) if isinstance(t, Tensor) and t.requires_grad]
        found = torch.autograd.grad(value, [cut[k] for k in wanted],
                                    passes.back_propagation.seed(value, batch.weight), allow_unused=True)
        kept: list[Tensor | None] = [None] * len(cut)
        for k, g in zip(wanted, found, strict=True):
            kept[k] = g
        recorded.output_gradients = kept
        return value


@final
@dataclass(frozen=True)
class SampleLosses:
    """∇ of the mean of the samples' losses, recording them."""

    needs_outputs = False
    needs_samples = True
    needs_recorded = False
    cost = 3.0

    def __call__(self, batch: MicroBatch, recorded: Recorded, passes: Passes) -> Tensor:
        if passes.devices is not None:
            recorded.random_state = RandomState(passes.devices)
        losses = _sample_losses(batch, slice(None))
        recorded.losses = losses.detach()
        value = losses.mean()
        passes.backward(value, batch.weight)
        return value


@final
@dataclass(frozen=True)
class LargestRises:
    """∇ of the mean loss over the share of the samples whose loss rose most; returns the mean over all of them."""

    share: float
    needs_outputs = False
    needs_samples = True
    needs_recorded = True

    @property
    def cost(self) -> float:
        return 1 + 3 * self.share  # a forward without gradients finds the samples

    def __call__(self, batch: MicroBatch, recorded: Recorded, passes: Passes) -> Tensor:
        assert recorded.losses is not None
        _replay(recorded)
        with torch.no_grad():
            losses = _sample_losses(batch, slice(None))
        count = max(1, math.floor(self.share * losses.numel() + 1e-9))     # 0.29 · 100 is 28.999... in binary
        subset = (losses - recorded.losses).topk(count).indices.sort().values
        _replay(recorded)
        passes.backward(_sample_losses(batch, subset).mean(), batch.weight)
        return losses.mean()


def _replay(recorded: Recorded) -> None:
    """Back to the random state in which this micro-batch began."""
    if recorded.random_state is not None:
        recorded.random_state.set()


def _sample_losses(batch: MicroBatch, subset: Any) -> Tensor:
    losses = batch.forward(subset) if batch.loss is None else batch.loss(batch.forward(subset), subset)
    if not isinstance(losses, Tensor) or losses.dim() != 1:
        raise ValueError(f"data selection needs one loss a sample (a 1-d tensor), got {describe(losses)}: use "
                         'reduction="none"')
    return losses


def _apart(recorded: list[Tensor | None], parameters: Sequence[Tensor]) -> list[Tensor | None]:
    """The recorded output gradients; copied where autograd gave their memory to a parameter's gradient as well."""
    taken = {local(p.grad).untyped_storage().data_ptr() for p in parameters if p.grad is not None}
    return [g.clone() if g is not None and local(g).untyped_storage().data_ptr() in taken else g for g in recorded]


def _alias(output: Any, hook: Callable[[Tensor], Tensor | None]) -> Any:
    """The same output for the loss alone, so that what arrives at the hook is the loss's own dependence on it."""
    if not isinstance(output, Tensor) or not output.requires_grad:
        return output
    alias = output.view_as(output)
    alias.register_hook(hook)
    return alias


def _instead(kept: Tensor | None, g: Tensor) -> Tensor:
    """The kept gradient in the place of g, in its dtype: outputs of float32 weights have another than those before."""
    return torch.zeros_like(g) if kept is None else kept.to(g.dtype)


def _loss_of(loss: Loss, leaves: list[Any], aliases: list[Any], spec: Any) -> Tensor:
    """The loss of the outputs, which it must leave as they are: the gradient that arrives at them is exchanged."""
    before = [t._version for t in leaves if isinstance(t, Tensor)]
    with torch.enable_grad():
        value = loss(tree_unflatten(aliases, spec))
    if before != [t._version for t in leaves if isinstance(t, Tensor)]:
        raise ValueError("the loss writes into the network's outputs in place (z.mul_, z[...] = ..., z /= ...), and "
                         "this rule exchanges the gradient that arrives at them: let the loss work on new tensors "
                         "(z.mul, torch.where, z / ...)")
    return value


def _needed(batch: MicroBatch) -> Loss:
    if batch.loss is None:
        raise ValueError("this rule needs the network's outputs apart from the loss: call "
                         "sharpener.backward(lambda: model(x), lambda z: loss_fn(z, y))")
    return batch.loss


def _outputs(outputs: Any) -> tuple[list[Any], Any]:
    leaves, spec = tree_flatten(outputs)
    if not any(isinstance(t, Tensor) and t.is_floating_point() for t in leaves):
        raise ValueError(f"forward must return tensors (or tuples, lists, dicts of them), got {describe(outputs)}")
    return leaves, spec
