"""Why a loss cannot be measured: two evaluations differ, the mean is not the one stated, or the weights change."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from . import batches, parallel
from .determinism import drawing_differently, find_nondeterminism, same
from .evaluation import EvaluationSession, WeightedBatch


def refuse_parameters(model: nn.Module) -> None:
    """Raise a ValueError that names the first parameter whose loss is not a differentiable real function of it."""
    for name, p in model.named_parameters():
        if nn.parameter.is_lazy(p):
            raise ValueError(f"parameter {name!r} of a lazy module has no shape yet: run the model on one batch first")
        if p.is_complex():
            raise ValueError(f"parameter {name!r} is complex ({p.dtype}), and measurements are of functions of real "
                             "numbers: hold its real and imaginary part (torch.view_as_real) in a real parameter")
        if p.is_meta:
            raise ValueError(f"parameter {name!r} is on the meta device and has no values: "
                             'call model.to_empty(device="cpu") and load the weights first')
    for name, module in model.named_modules():
        if getattr(module, "max_norm", None) is not None and isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            raise ValueError(f"module {name!r} ({type(module).__name__}) has max_norm={module.max_norm}, with which "
                             "every forward pass changes the weights, and no gradient knows of it. Set its max_norm "
                             "to None to measure the weights as they are")
        if getattr(module, "scale_grad_by_freq", False):
            raise ValueError(f"module {name!r} ({type(module).__name__}) has scale_grad_by_freq=True, with which its "
                             "gradient is not that of the loss. Set its scale_grad_by_freq to False to measure")


def check(session: EvaluationSession, *, mean: bool) -> None:
    """Raise a ValueError that names the cause where the loss is not one function of the weights.

    ``mean``: also where it is not the mean over the data that its weights state.
    """
    stated, seen = _MeanCheck(session, mean), []

    def watch(batch: WeightedBatch) -> None:
        stated.see(batch)
        seen.append(batch.index)

    with _unmoved_weights(session):
        found = session.evaluate(watch=watch)
    first = found.loss
    if not math.isfinite(first):
        index = next((i for i, loss in zip(seen, found.losses, strict=True) if not math.isfinite(loss)), None)
        raise ValueError(f"the loss is {float(first):g} at these weights, {_not_finite(session, index)}")
    with drawing_differently(session):
        second = session.evaluate().loss
    if not same(first, second, session.parameters):
        raise ValueError(f"two evaluations at the same weights gave {first:.9g} and {second:.9g}: "
                         f"{find_nondeterminism(session)}")
    stated.check()


@contextmanager
def _unmoved_weights(session: EvaluationSession) -> Iterator[None]:
    """Restore the weights where evaluations inside have changed them, and raise a ValueError that names the first."""
    w = [(name, parallel.local(p.detach())) for name, p in session.model.named_parameters()]
    before, moved = [t.clone() for _, t in w], []
    try:
        yield
    finally:
        for (name, t), old in zip(w, before, strict=True):
            if not bool(((t == old) | (t.isnan() & old.isnan())).all()):
                moved.append(name)
                t.copy_(old)
    if session.ranks.total(float(len(moved)))[0]:
        where = repr(moved[0]) if moved else "on another rank"
        raise ValueError(f"evaluating the model changed its parameter {where}. A measurement needs weights that "
                         "stay: move what changes them (max_norm of an embedding, a clamp, a projection) from the "
                         "forward pass into the training step")


def _not_finite(session: EvaluationSession, index: int | None) -> str:
    """Where a loss is not finite first, as the end of a sentence."""
    data = None
    for batch in session.weighted_batches():      # all of them: other ranks may have to run as many
        data = batch.data if data is None and batch.index == index else data
    if data is None:
        return "first on another rank"
    whole = all(bool(t.isfinite().all()) for t in batches.tensors(data))
    return f"first in batch {index}, " + ("whose data are finite: the weights are not, or the model overflows"
                                          if whole else "whose data are not finite either")


class _MeanCheck:
    """Two batches, of unequal weight where the data have such, and whether their loss together is their mean.

    Where no two can be concatenated (padded to their own longest sequence), two parts of the first.
    """

    def __init__(self, session: EvaluationSession, wanted: bool):
        self.session = session
        self.first: WeightedBatch | None = None
        self.second: WeightedBatch | None = None
        self.several = self.unequal = False
        self.applies = (wanted and not session.ranks.in_step and not any(
            m.training or isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is None
            for m in session.model.modules()))

    def see(self, batch: WeightedBatch) -> None:
        if not self.applies:
            return
        if self.first is None:
            self.first = batch
            return
        self.several, self.unequal = True, self.unequal or batch.weight != self.first.weight
        if (self.second is None or self.first.weight == self.second.weight != batch.weight) and \
                batches.merged(self.first.data, batch.data) is not None:
            self.second = batch

    def check(self) -> None:
        """Raise or warn where the loss of both together is not their mean by weight."""
        found = self._found()
        wrong, unequal = self.session.ranks.total(float(found is not None), float(bool(found and found[1])))
        if not wrong:
            return
        text = found[0] if found is not None else "on another rank"
        what = ("the loss of parts of the data together is not their mean, weighted by the terms that each is "
                f"taken to average: {text}. A reduction, ignore_index or class weights inside a function cannot be "
                "seen, and a loss that compares the samples of a batch is no mean over them")
        if unequal:
            raise ValueError(f"{what}. Pass weight=, a function of a batch that gives its number of terms")
        warnings.warn(f"{what}. With batches of equal size the objective is the mean over batches of the loss of each; "
                      "pass weight= to say so", stacklevel=2)

    def _found(self) -> tuple[str, bool] | None:
        """What was found as a text, and whether the mean over these batches is wrong for certain."""
        if self.first is None or not self.several:
            return None
        for a, b in ((0.6, 0.4), (0.3, 0.7), (-0.5, -0.5)):     # parts: no more is held than for one batch
            pair = _cut(self.first, a) if self.second is None else (_part(self.first, a), _part(self.second, b))
            found = self._apart_and_together(*pair)
            if found is not None:
                return found
        return None

    def _apart_and_together(self, a: WeightedBatch | None, b: WeightedBatch | None) -> tuple[str, bool] | None:
        session = self.session
        if a is None or b is None or not (a.weight > 0 and b.weight > 0):
            return None
        (za, la), (zb, lb) = map(_evaluated, (a, b))
        z, loss = _evaluated(a.with_data(batches.merged(a.data, b.data)))
        kinds = {t.dtype for t in (*session.parameters, *batches.tensors(z)) if t.is_floating_point()}
        tolerance = max((torch.finfo(kind).eps for kind in kinds), default=1e-7) ** 0.5
        if not _rows_agree(za, zb, z, tolerance):
            return None
        mean = (a.weight * la + b.weight * lb) / (1.0 if session.sums else a.weight + b.weight)
        if _near(loss, mean, tolerance, abs(la) + abs(lb)):
            return None
        twice = _evaluated(a.with_data(batches.merged(a.data, a.data)))[1]
        text = (f"{la:.6g} (over {a.weight:g}) and {lb:.6g} (over {b.weight:g}) apart, whose mean is {mean:.6g}, and "
                f"{loss:.6g} together")
        return text, self.unequal or _near(twice, la, tolerance, abs(la))


def _part(batch: WeightedBatch, share: float) -> WeightedBatch | None:
    """The first, or for a negative share the last, samples of a batch; None where it cannot be cut."""
    n = batches.samples_in(batch.data)
    k = max(1, round(n * abs(share)))
    data = batches.samples(batch.data, slice(k) if share > 0 else slice(n - k, n))
    return None if data is None else batch.with_data(data)


def _cut(batch: WeightedBatch, share: float) -> tuple[WeightedBatch | None, WeightedBatch | None]:
    """The first samples of a batch and the others."""
    n = batches.samples_in(batch.data)
    k = max(1, round(n * abs(share)))
    parts = [batches.samples(batch.data, s) if k < n else None for s in (slice(k), slice(k, n))]
    first, rest = (None if part is None else batch.with_data(part) for part in parts)
    return first, rest


def _evaluated(batch: WeightedBatch) -> tuple[Any, float]:
    with torch.enable_grad():
        outputs = batch.outputs()
        return outputs, float(batch.loss(outputs).detach())


def _near(a: float, b: float, tolerance: float, size: float) -> bool:
    return abs(a - b) <= tolerance * size or not math.isfinite(a - b)


def _rows_agree(a: Any, b: Any, both: Any, tolerance: float) -> bool:
    """Whether a model gives for two batches together what it gives for each, sample by sample."""
    columns = [[t.detach() for t in batches.tensors(z) if t.dim()] for z in (a, b, both)]
    if not columns[0] or len({len(column) for column in columns}) > 1:
        return False
    return all(x.shape[1:] == y.shape[1:] and len(x) + len(y) == len(z) and _close(torch.cat([x, y]), z, tolerance)
               for x, y, z in zip(*columns, strict=True))


def _close(x: Tensor, y: Tensor, tolerance: float) -> bool:
    if x.shape != y.shape or x.dtype != y.dtype:
        return False
    if not x.is_floating_point():
        return torch.equal(x, y)
    return bool((x - y).norm() <= tolerance * x.norm())
