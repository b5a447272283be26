"""m-sharpness: a measure of chunks of m samples, averaged."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..batches import samples_in
from ..objective import Objective
from ..results import FEWEST_BATCHES, Scalar, weighted_mean
from .average_case import average_case
from .cautions import SmallBatchWarning
from .one_step import one_step
from .worst_case import worst_case

Measure = Callable[..., Scalar]
CHUNK_MEASURES: dict[str, Measure] = {"one_step": one_step, "worst_case": worst_case, "average_case": average_case}


@dataclass(frozen=True, kw_only=True)
class MSharpness(Scalar):
    """``value`` = the mean over chunks of m samples, ``stderr`` its standard error over chunks."""

    chunks: tuple[float, ...]
    weights: tuple[float, ...]      # terms of the loss in each chunk
    data_stderr: float = math.nan   # the same standard error; nan where there are fewer than five chunks


def m_sharpness(objective: Objective, m: int, rho: float = 0.05, *, measure: str | Measure = "worst_case",
                **options: Any) -> MSharpness:
    """m-sharpness: each chunk of m samples has its own perturbation, and the rises are averaged.

    Σ_S n_S max_{‖δ‖ ≤ ρ} [L_S(w + δ) − L_S(w)] / Σ_S n_S over disjoint chunks S of m samples, n_S the terms that the
    loss of a chunk is a mean of. With m the number of all samples it is the measure itself; it never falls, for an
    exact maximum, when m does (the maximum of a mean is at most the mean of the maxima).

    Args:
        objective: L; batches are tensors (or pairs, or mappings of them) whose first dimension counts samples.
        m: samples in a chunk, any number; chunks run across batches, and the last may be smaller. Under DDP or FSDP2 a
            chunk takes m / ranks samples from each rank, which must hold equally many.
        rho: the radius.
        measure: "worst_case", "one_step", "average_case", or a function ``(objective, rho, **options) -> Scalar``.
        options: of the measure. ``one_step`` is taken without its second-order part unless told otherwise.

    Raises:
        ValueError: m < 1, an unknown measure, batches that cannot be cut, or ranks that cannot share a chunk.

    >>> import torch
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> data = torch.tensor([[1.0], [2.0]]).repeat(4, 1), torch.zeros(8, 1)
    >>> s = m_sharpness(Objective(model, torch.nn.MSELoss(), data), 2, 0.1, measure="one_step")
    >>> len(s.chunks)
    4

    P. Foret et al., arXiv 2010.01412, section 4.1.
    """
    if m < 1:
        raise ValueError(f"m must be at least 1, got {m}")
    if isinstance(measure, str) and measure not in CHUNK_MEASURES:
        raise ValueError(f"unknown measure {measure!r}: choose from {', '.join(CHUNK_MEASURES)}, or pass a function")
    function = CHUNK_MEASURES[measure] if isinstance(measure, str) else measure
    if function is one_step:
        options = {"second_order": False} | options
    world = _world(objective)
    if m % world:
        raise ValueError(f"m = {m} samples cannot be shared evenly by {world} ranks: make it a multiple of {world}")
    values, weights = [], []
    with objective.session(check=True), warnings.catch_warnings():
        warnings.simplefilter("ignore", SmallBatchWarning)      # m is asked for
        for chunk in _in_step(objective, chunks(objective, m // world)):
            part = objective.on_data(chunk)
            values.append(float(function(part, rho, **options)))
            weights.append(objective.ranks.total(math.fsum(objective.weight(b) for b in chunk))[0])
    mean, error = weighted_mean(values, weights)
    name = measure if isinstance(measure, str) else getattr(measure, "__name__", str(measure))
    return MSharpness(value=mean, stderr=error, data_stderr=error if len(values) >= FEWEST_BATCHES else math.nan,
                      chunks=tuple(values), weights=tuple(weights),
                      settings={"m": m, "rho": rho, "measure": name, **options})


def _world(objective: Objective) -> int:
    """How many ranks share the data: along all dimensions of their mesh."""
    return int(objective.ranks.total(1.0)[0])


def _in_step(objective: Objective, found: Iterator[list[Any]]) -> Iterator[list[Any]]:
    """The same chunks, which all ranks must have equally many of, with equally many samples in each."""
    world = _world(objective)
    while True:
        chunk = next(found, None)
        n = 0 if chunk is None else sum(map(samples_in, chunk))
        total, least = objective.ranks.total(n)[0], objective.ranks.least(n)
        if total != least * world:
            raise ValueError("the ranks hold different numbers of samples, so that they cannot share chunks of m: give "
                             "each as many")
        if chunk is None:
            return
        yield chunk


def chunks(objective: Objective, m: int) -> Iterator[list[Any]]:
    """Lists of pieces of batches that hold m samples together; the last may hold fewer."""
    held: list[Any] = []
    count = 0
    for batch in objective.batches():
        n, start = samples_in(batch), 0
        while start < n:
            take = min(m - count, n - start)
            held.append(_piece(batch, start, start + take, n))
            count, start = count + take, start + take
            if count == m:
                yield held
                held, count = [], 0
    if held:
        yield held


def _piece(batch: Any, start: int, stop: int, n: int) -> Any:
    """Samples start to stop − 1 of a batch of n."""
    if isinstance(batch, Tensor):
        if batch.dim() and batch.shape[0] == n:
            return batch[start:stop]
        raise ValueError(f"cannot cut a batch into samples: a tensor of shape {tuple(batch.shape)} beside one of {n} "
                         "samples; pass data with one sample a batch")
    if isinstance(batch, Mapping):
        return {key: _piece(value, start, stop, n) if isinstance(value, Tensor) and value.dim() else value
                for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return tuple(_piece(part, start, stop, n) for part in batch)
    raise ValueError(f"cannot cut a batch of type {type(batch).__name__} into samples")
