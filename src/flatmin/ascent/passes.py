"""One pass over the micro-batches of a step: forward, loss, backward, in the form a rule asks for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from .wrappers import Wrappers

Forward = Callable[..., Any]
Loss = Callable[..., Tensor]


@dataclass(frozen=True)
class MicroBatch:
    """A forward callable, the loss of its outputs (None: forward returns the loss itself) and its weight."""

    forward: Forward
    loss: Loss | None
    weight: float


def micro_batches(steps: Any, loss: Loss | None, weights: Sequence[float] | None) -> list[MicroBatch]:
    """The arguments of ``Sharpener.backward`` as a list."""
    if callable(steps):
        if weights is not None:
            raise ValueError("weights= belongs to a list of micro-batches; scale the loss instead")
        return [MicroBatch(steps, loss, 1.0)]
    if loss is not None:
        raise ValueError("with a list of micro-batches give each its own loss: [(forward, loss), ...]")
    pairs = [s if isinstance(s, tuple) else (s, None) for s in steps]
    if not pairs:
        raise ValueError("no micro-batches: pass a callable or a non-empty list of callables")
    for pair in pairs:
        if len(pair) != 2 or not callable(pair[0]) or not (pair[1] is None or callable(pair[1])):
            raise ValueError(f"a micro-batch is a callable or a (forward, loss) pair of callables, got {pair!r}")
    if weights is None:
        weights = [1.0 / len(pairs)] * len(pairs)
    if len(weights) != len(pairs):
        raise ValueError(f"{len(pairs)} micro-batches need as many weights, got {len(weights)}")
    return [MicroBatch(pair[0], pair[1], float(w)) for pair, w in zip(pairs, weights, strict=True)]


class Passes:
    """Runs passes over micro-batches; gradients land in ``p.grad``, weighted losses are returned detached."""

    def __init__(self, batches: list[MicroBatch], wrappers: Wrappers, scaler: Any, backward: Any, alone: bool = False):
        self.batches = batches
        self.output_gradients: list[Any] = [None] * len(batches)
        self.samples: list[Any] = [None] * len(batches)
        self._wrappers, self._scaler, self._custom = wrappers, scaler, backward
        self.alone = alone  # this rank's gradients stay its own in the next pass
        self.inputs: list[Tensor] | None = None  # the only parameters whose gradient the next pass is to compute

    def loss(self) -> Tensor:
        """Σ weight · loss, back-propagated."""
        return self._run(self._loss)

    def recording(self) -> Tensor:
        """The same, keeping ∂L/∂outputs of every micro-batch."""
        return self._run(self._recording)

    def frozen(self) -> Tensor:
        """Back-propagate the kept output gradients through a new forward; returns the loss there."""
        return self._run(self._frozen)

    def outputs_only(self) -> Tensor:
        """Keep ∂L/∂outputs without touching the parameters' gradients."""
        return self._run(self._outputs_only)

    def sampled(self) -> Tensor:
        """Mean of per-sample losses, back-propagated; the losses are kept."""
        return self._run(self._sampled)

    def selected(self, gamma: float) -> Tensor:
        """Mean over all samples here; only the γ share whose loss rose most is back-propagated."""
        return self._run(lambda i, batch: self._selected(i, batch, gamma))

    def _run(self, one: Callable[[int, MicroBatch], Tensor | None]) -> Tensor:
        total: Tensor | None = None
        for i, batch in enumerate(self.batches):
            last = i == len(self.batches) - 1
            with self._wrappers.unsynchronised(last, self.alone), torch.enable_grad():
                value = one(i, batch)
            if value is not None:
                value = value.detach() if batch.weight == 1.0 else value.detach() * batch.weight
                total = value if total is None else total + value
        return total if total is not None else torch.zeros(())

    def _backward(self, value: Tensor, weight: float, of_outputs: bool = False) -> None:
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise ValueError(f"the loss must be a tensor with one element, got {_describe(value)}; "
                             "per-sample losses need a mean")
        value = value if weight == 1.0 else value * weight
        if self._scaler is not None:
            value = self._scaler.scale(value)
        if self._custom is not None:
            self._custom(value)
        else:
            value.backward(inputs=None if of_outputs else self.inputs)

    def _loss(self, i: int, batch: MicroBatch) -> Tensor:
        outputs = batch.forward()
        value = outputs if batch.loss is None else batch.loss(outputs)
        self._backward(value, batch.weight)
        return value

    def _sampled(self, i: int, batch: MicroBatch) -> Tensor:
        losses = self._sample_losses(batch, slice(None))
        self.samples[i] = losses.detach()
        value = losses.mean()
        self._backward(value, batch.weight)
        return value

    def _selected(self, i: int, batch: MicroBatch, gamma: float) -> Tensor:
        with torch.no_grad():
            losses = self._sample_losses(batch, slice(None))
        keep = max(1, int(gamma * losses.numel()))
        subset = (losses - self.samples[i]).topk(keep).indices.sort().values
        self._backward(self._sample_losses(batch, subset).mean(), batch.weight)
        return losses.mean()

    @staticmethod
    def _sample_losses(batch: MicroBatch, subset: Any) -> Tensor:
        losses = batch.forward(subset) if batch.loss is None else batch.loss(batch.forward(subset), subset)
        if not isinstance(losses, Tensor) or losses.dim() != 1:
            raise ValueError(f"data selection needs one loss a sample (a 1-d tensor), got {_describe(losses)}: use "
                             'reduction="none"')
        return losses

    def _recording(self, i: int, batch: MicroBatch) -> Tensor:
        outputs = batch.forward()
        value, self.output_gradients[i] = self._output_gradient(outputs, batch)
        _backward_from(outputs, self.output_gradients[i], self.inputs)
        return value

    def _frozen(self, i: int, batch: MicroBatch) -> Tensor:
        assert batch.loss is not None
        outputs = batch.forward()
        with torch.no_grad():
            value = batch.loss(outputs)
        _backward_from(outputs, self.output_gradients[i])
        return value

    def _outputs_only(self, i: int, batch: MicroBatch) -> Tensor:
        with torch.no_grad():
            outputs = batch.forward()
        with torch.enable_grad():
            value, self.output_gradients[i] = self._output_gradient(outputs, batch)
        return value

    def _output_gradient(self, outputs: Any, batch: MicroBatch) -> tuple[Tensor, list[Tensor | None]]:
        """The loss and ∂(scaled, weighted loss)/∂outputs, one entry a leaf of the outputs."""
        if batch.loss is None:
            raise ValueError(
                "this rule needs the network's outputs apart from the loss: call "
                "sharpener.backward(lambda: model(x), lambda z: loss_fn(z, y))"
            )
        leaves, spec = tree_flatten(outputs)
        if not any(isinstance(t, Tensor) and t.is_floating_point() for t in leaves):
            raise ValueError(f"forward must return tensors (or tuples, lists, dicts of them), got {_describe(outputs)}")
        cut = [t.detach().requires_grad_(t.is_floating_point()) if isinstance(t, Tensor) else t for t in leaves]
        value = batch.loss(tree_unflatten(cut, spec))
        self._backward(value, batch.weight, of_outputs=True)
        return value, [t.grad if isinstance(t, Tensor) else None for t in cut]


def _backward_from(outputs: Any, gradients: list[Tensor | None], inputs: list[Tensor] | None = None) -> None:
    """Through ``backward`` and not ``autograd.grad``: DDP's reducer and FSDP2's hooks hang on it."""
    leaves = tree_flatten(outputs)[0]
    pairs = [(t, g) for t, g in zip(leaves, gradients, strict=True)
             if g is not None and isinstance(t, Tensor) and t.requires_grad]
    if not pairs:
        raise ValueError("the loss does not depend on the network's outputs")
    torch.autograd.backward([t for t, _ in pairs], [g for _, g in pairs], inputs=inputs)


def _describe(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
