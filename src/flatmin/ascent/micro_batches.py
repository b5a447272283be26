"""The arguments of ``Sharpener.backward`` as a list of micro-batches."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

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
        raise ValueError(f"batches must be a list of batches, got {describe(batches)}; for one batch batches=[batch]")
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


def describe(value: Any) -> str:
    """What an argument is, for an error message."""
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
