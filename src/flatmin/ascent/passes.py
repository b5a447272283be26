"""One pass over the micro-batches of a step: forward, loss, backward, in the form a rule asks for."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..parallel import Wrappers, local
from ..perturbed import RandomState
from .inspection import Inspection

Forward = Callable[..., Any]
Loss = Callable[..., Tensor]


@dataclass(frozen=True)
class MicroBatch:
    """A forward callable, the loss of its outputs (None: forward returns the loss itself) and its weight."""

    forward: Forward
    loss: Loss | None
    weight: float


def micro_batches(forward: Any, loss: Loss | None, batches: Iterable[Any] | None,
                  weights: Sequence[float] | None) -> list[MicroBatch]:
    """The arguments of ``Sharpener.backward`` as a list."""
    if isinstance(forward, Tensor):
        raise TypeError("sharpener.backward evaluates the model twice and needs a function, not a loss that is "
                        "computed already: sharpener.backward(lambda: loss_fn(model(x), y))")
    if batches is not None:
        return _of_data(forward, loss, batches, weights)
    if callable(forward):
        if weights is not None:
            raise ValueError("weights= belongs to a list of micro-batches; scale the loss instead")
        return [MicroBatch(forward, loss, 1.0)]
    if loss is not None:
        raise ValueError("with a list of micro-batches give each its own loss, [(forward, loss), ...], or pass their "
                         "data as batches=")
    pairs = [s if isinstance(s, tuple) else (s, None) for s in forward]
    if not pairs:
        raise ValueError("no micro-batches: pass a callable or a non-empty list of callables")
    for pair in pairs:
        if len(pair) != 2 or not callable(pair[0]) or not (pair[1] is None or callable(pair[1])):
            raise ValueError(f"a micro-batch is a callable or a (forward, loss) pair of callables, got {pair!r}")
    if len({id(f) for f, _ in pairs}) > len({_variables(f) for f, _ in pairs}):
        raise ValueError("several micro-batches are one function of the same variables, as in [lambda: f(x, y) for "
                         "x, y in data], where every lambda sees the last x and y: use backward(lambda batch: "
                         "f(*batch), batches=data)")
    return [MicroBatch(pair[0], pair[1], w) for pair, w in zip(pairs, _weights(weights, len(pairs)), strict=True)]


def _of_data(forward: Any, loss: Loss | None, batches: Iterable[Any], weights: Sequence[float] | None
             ) -> list[MicroBatch]:
    if not callable(forward) or not (loss is None or callable(loss)):
        raise ValueError("with batches= pass one forward(batch), and one loss(outputs, batch) if the rule needs it")
    if isinstance(batches, (Tensor, dict, str)):
        raise ValueError(f"batches must be a list of batches, got {_describe(batches)}; for one batch batches=[batch]")
    data = list(batches)  # both passes go over it
    if not data:
        raise ValueError("batches is empty")
    return [MicroBatch(_with(forward, 0, b), None if loss is None else _with(loss, 1, b), w)
            for b, w in zip(data, _weights(weights, len(data)), strict=True)]


def _with(function: Callable[..., Any], place: int, batch: Any) -> Callable[..., Any]:
    """``function`` with the batch put in at a place among its arguments."""
    return lambda *args: function(*args[:place], batch, *args[place:])


def _weights(weights: Sequence[float] | None, n: int) -> list[float]:
    weights = [1.0 / n] * n if weights is None else [float(w) for w in weights]
    if len(weights) != n:
        raise ValueError(f"{n} micro-batches need as many weights, got {len(weights)}")
    if n > 1 and min(weights) > 1:
        warnings.warn(f"weights= are factors of the losses and sum to {sum(weights):g} here, as numbers of samples do: "
                      "for the mean over all samples divide them by their sum", stacklevel=4)
    return weights


def _variables(function: Any) -> Any:
    """What a plain function computes with; other callables are told apart by identity."""
    code = getattr(function, "__code__", None)
    if code is None or hasattr(function, "__self__"):
        return id(function)
    cells = tuple(id(cell) for cell in function.__closure__ or ())
    return id(code), cells, *map(id, function.__defaults__ or ()), *map(id, (function.__kwdefaults__ or {}).values())


class BackPropagation:
    """How a loss is back-propagated: plainly, times a ``GradScaler``'s factor, or by a framework's own ``backward``.

    A framework may divide the loss by its number of accumulation steps, and may scale it. Passes see neither: what it
    divides by is ``division`` afterwards, for a caller that accumulates over several calls.
    """

    def __init__(self, scaler: Any, custom: Callable[[Tensor], Any] | None):
        self._scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self._custom = custom
        self._scales: bool | None = None  # whether ``custom`` applies the loss scale itself
        self.division: Tensor | None = None  # what ``custom`` multiplied the last loss by, loss scale apart

    def loss_scale(self, device: torch.device) -> Tensor | None:
        """The scaler's factor as a tensor, without reading it to the host."""
        return None if self._scaler is None else self._scaler.scale(torch.ones((), device=device))

    def __call__(self, value: Tensor, weight: float) -> None:
        """Back-propagate weight · value."""
        check_loss(value)
        value = value if weight == 1.0 else value * weight
        if self._custom is None:
            (value if self._scaler is None else self._scaler.scale(value)).backward()
            return
        calls: list[Any] = []
        if value.requires_grad:
            value = value.view_as(value)
            value.register_hook(lambda g: self._given(g, calls))
        with self._noted(calls):
            self._custom(value)

    def seed(self, value: Tensor, weight: float) -> Tensor:
        """∂(what is back-propagated)/∂value, for a value that is not back-propagated by itself."""
        out, scale = torch.full_like(value, weight), self.loss_scale(value.device)
        return out if scale is None else out * scale.to(value)

    @contextmanager
    def _noted(self, calls: list[Any]) -> Iterator[None]:
        """Until it is known: notes whether the framework calls the scaler, and so scales the loss itself."""
        if self._scaler is None or self._scales is not None:
            yield
            return
        scale = self._scaler.scale

        def noted(outputs: Any) -> Any:
            calls.append(outputs)
            return scale(outputs)

        self._scaler.scale = noted
        try:
            yield
        finally:
            del self._scaler.scale

    def _given(self, g: Tensor, calls: list[Any]) -> Tensor:
        """The gradient that arrives at the loss from the framework, made into the one that goes on."""
        if self._scales is None:
            self._scales = bool(calls)
        scale = self.loss_scale(g.device)
        arrived = g if scale is None or not self._scales else g / scale.to(g)
        if self.division is None and float(arrived) > 1:
            raise ValueError(f"backward= multiplies the loss by {float(arrived):g}, as a framework with a loss scaler "
                             "does: pass its torch.amp.GradScaler as scaler= too, so that the scale is known")
        self.division = arrived
        one = torch.ones_like(g)
        return one if scale is None else one * scale.to(g)


class Passes:
    """Runs passes over micro-batches; gradients land in ``p.grad``, weighted losses are returned detached.

    ``devices``: whose random state is replayed for every execution of a micro-batch where a rule needs several in one
    pass; None: no replay.
    """

    def __init__(self, batches: list[MicroBatch], wrappers: Wrappers, propagate: BackPropagation,
                 devices: Sequence[torch.device] | None = None):
        self.batches = batches
        self.output_gradients: list[list[Tensor | None]] = [[] for _ in batches]
        self.samples: list[Any] = [None] * len(batches)
        self._states: list[RandomState | None] = [None] * len(batches)
        self._wrappers, self._propagate, self._devices = wrappers, propagate, devices
        self.alone = False  # this rank's gradients stay its own in the next pass
        self.look: Inspection | None = None  # of what is back-propagated
        self.after_first: Callable[[], None] | None = None  # called after the first micro-batch of a pass

    def loss(self) -> Tensor:
        """Σ weight · loss, back-propagated."""
        return self._run(self._loss)

    def first(self) -> Tensor:
        """The loss of the first micro-batch alone, back-propagated without its weight."""
        return self._run(self._loss, [replace(self.batches[0], weight=1.0)])

    def recording(self) -> Tensor:
        """As ``loss``, keeping ∂L/∂outputs of every micro-batch."""
        return self._run(self._recording)

    def frozen(self) -> Tensor:
        """Back-propagate the kept output gradients through a new forward, and the loss where it depends on the weights
        beside the outputs; returns the loss."""
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

    def keep_apart(self, gradients: Iterable[Tensor]) -> None:
        """Copy those kept output gradients whose memory autograd gave to a parameter's gradient as well."""
        taken = {local(g).untyped_storage().data_ptr() for g in gradients}
        for kept in self.output_gradients:
            for k, g in enumerate(kept):
                if g is not None and local(g).untyped_storage().data_ptr() in taken:
                    kept[k] = g.clone()

    def _run(self, one: Callable[[int, MicroBatch], Tensor], batches: list[MicroBatch] | None = None) -> Tensor:
        total: Tensor | None = None
        batches = self.batches if batches is None else batches
        for i, batch in enumerate(batches):
            last = i == len(batches) - 1
            with self._wrappers.unsynchronised(last, self.alone), torch.enable_grad():
                value = one(i, batch)
            value = value.detach() * batch.weight
            total = value if total is None else total + value
            if i == 0 and self.after_first is not None:
                self.after_first()
        assert total is not None
        return total

    def _backward(self, value: Tensor, weight: float) -> None:
        check_loss(value)
        if self.look is None:
            self._propagate(value, weight)
            return
        self.look([value])
        with self.look.watching():
            self._propagate(value, weight)

    def _loss(self, i: int, batch: MicroBatch) -> Tensor:
        outputs = batch.forward()
        value = outputs if batch.loss is None else batch.loss(outputs)
        self._backward(value, batch.weight)
        return value

    def _sampled(self, i: int, batch: MicroBatch) -> Tensor:
        if self._devices is not None:
            self._states[i] = RandomState(self._devices)
        losses = self._sample_losses(batch, slice(None))
        self.samples[i] = losses.detach()
        value = losses.mean()
        self._backward(value, batch.weight)
        return value

    def _selected(self, i: int, batch: MicroBatch, gamma: float) -> Tensor:
        self._replay(i)
        with torch.no_grad():
            losses = self._sample_losses(batch, slice(None))
        keep = max(1, math.floor(gamma * losses.numel() + 1e-9))     # 0.29 · 100 is 28.999... in binary
        subset = (losses - self.samples[i]).topk(keep).indices.sort().values
        self._replay(i)
        self._backward(self._sample_losses(batch, subset).mean(), batch.weight)
        return losses.mean()

    def _replay(self, i: int) -> None:
        """Back to the random state in which this micro-batch began."""
        state = self._states[i]
        if state is not None:
            state.set()

    @staticmethod
    def _sample_losses(batch: MicroBatch, subset: Any) -> Tensor:
        losses = batch.forward(subset) if batch.loss is None else batch.loss(batch.forward(subset), subset)
        if not isinstance(losses, Tensor) or losses.dim() != 1:
            raise ValueError(f"data selection needs one loss a sample (a 1-d tensor), got {_describe(losses)}: use "
                             'reduction="none"')
        return losses

    def _recording(self, i: int, batch: MicroBatch) -> Tensor:
        loss = _needed(batch)
        leaves, spec = _outputs(batch.forward())
        kept: list[Tensor | None] = [None] * len(leaves)
        aliases = [_alias(t, lambda g, k=k: kept.__setitem__(k, g)) for k, t in enumerate(leaves)]
        value = _loss_of(loss, leaves, aliases, spec)
        self._backward(value, batch.weight)
        self.output_gradients[i] = kept
        return value

    def _frozen(self, i: int, batch: MicroBatch) -> Tensor:
        """An ordinary pass in which the kept gradient replaces the one that arrives at the outputs."""
        loss = _needed(batch)
        leaves, spec = _outputs(batch.forward())
        kept = self.output_gradients[i]
        if all(g is None for g in kept):
            raise ValueError("the loss does not depend on the network's outputs")
        aliases = [_alias(t, lambda g, k=k: _instead(kept[k], g)) for k, t in enumerate(leaves)]
        value = _loss_of(loss, leaves, aliases, spec)
        self._backward(value, batch.weight)
        return value

    def _outputs_only(self, i: int, batch: MicroBatch) -> Tensor:
        loss = _needed(batch)
        with torch.no_grad():
            leaves, spec = _outputs(batch.forward())
        cut = [t.detach().requires_grad_(t.is_floating_point()) if isinstance(t, Tensor) else t for t in leaves]
        aliases = [t.view_as(t) if isinstance(t, Tensor) and t.requires_grad else t for t in cut]
        value = _loss_of(loss, cut, aliases, spec)
        check_loss(value)
        wanted = [k for k, t in enumerate(cut) if isinstance(t, Tensor) and t.requires_grad]
        found = torch.autograd.grad(value, [cut[k] for k in wanted],
                                    self._propagate.seed(value, batch.weight), allow_unused=True)
        kept: list[Tensor | None] = [None] * len(cut)
        for k, g in zip(wanted, found, strict=True):
            kept[k] = g
        self.output_gradients[i] = kept
        return value


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
        raise ValueError(f"forward must return tensors (or tuples, lists, dicts of them), got {_describe(outputs)}")
    return leaves, spec


def check_loss(value: Any) -> None:
    """Raise if this cannot be back-propagated as a loss."""
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise ValueError(f"the loss must be a tensor with one element, got {_describe(value)}; "
                         "per-sample losses need a mean")


def _describe(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
