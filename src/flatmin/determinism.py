"""Whether two evaluations of a model agree, and why they do not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from . import batches
from .evaluation import EvaluationSession, WeightedBatch


def same(first: Tensor, second: Tensor, parameters: Iterable[Tensor]) -> bool:
    """Whether two losses are equal up to the order in which a loader or a device adds."""
    tolerance = max((torch.finfo(p.dtype).eps for p in parameters), default=1e-7) * 50
    return bool((first - second).abs() <= tolerance * first.abs().clamp(min=torch.finfo(torch.float64).tiny)) \
        or bool(first.isnan() & second.isnan())


@contextmanager
def drawing_differently(session: EvaluationSession) -> Iterator[None]:
    """Inside, a model in evaluation mode draws other random numbers; in modes that fix the draws, the same."""
    session.model_seed += 1 if session.mode in ("eval", "batch_statistics") else 0
    try:
        yield
    finally:
        session.model_seed = session.seed


def find_nondeterminism(session: EvaluationSession) -> str:
    """Why two evaluations of a session differ, as the end of a sentence."""
    batch = next(iter(session.weighted_batches()), None)
    runs: list[Any] = []
    if batch is not None:
        runs.append(_trace(session, batch))
        with drawing_differently(session):
            runs.append(_trace(session, batch))
    for (name, kind, a), (_, _, b) in zip(*runs, strict=False) if runs else ():
        if not batches.equal(a, b):
            where = f"module {name!r}" if name else "the model"
            return (f"{where} ({kind}) is random although it is evaluated in mode {session.mode!r}. Make it "
                    'respect .eval(), or pass mode="train" to hold its draws fixed')
    first, second = ([t.data for t in session.weighted_batches()] for _ in range(2))
    if len(first) != len(second) or not all(map(batches.equal, first, second)):
        return "the data differ from pass to pass. Switch random augmentation off, or pass a list of batches"
    return "the loss function itself, or code between the modules, is random"


def _trace(session: EvaluationSession, batch: WeightedBatch) -> Sequence[tuple[str, str, Any]]:
    """The name, the type and the outputs of each module, in the order of their calls."""
    seen: list[tuple[str, str, Any]] = []
    hooks = [m.register_forward_hook(lambda m, _, out, name=name: seen.append((name, type(m).__name__, out)))
             for name, m in session.model.named_modules()]
    try:
        with torch.enable_grad():
            batch.loss(batch.outputs())
    finally:
        for hook in hooks:
            hook.remove()
    return seen
