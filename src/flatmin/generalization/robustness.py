"""The rise of the loss when weights are changed as in deployment: noise, rounding, pruning, low rank.

Each function returns the rise L(w + δ) − L(w) and restores the weights bit for bit. Beside the measured rise is
the one predicted from curvature: gᵀδ + ½ δᵀHδ for the δ that was made, ½ tr(HΣ) for noise of covariance Σ.

``quantized``, ``pruned`` and ``truncated`` act on all weights with two dimensions or more, frozen ones included, except
those of embeddings (and what is tied to one): as tools for deployment do, biases, normalization and embeddings stay.
``parameters`` chooses others. Sharded weights (FSDP2) are gathered one at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .. import batches, parallel, perturbed, vectors
from ..curvature import Hessian, trace
from ..objective import Objective
from ..results import Scalar, uncertain, weighted_mean
from ..sharpness.cautions import warn_of_rounded_step
from .corruptions import corrupt

__all__ = ["Curve", "Rise", "accuracy", "corrupt", "curve", "pruned", "quantized", "truncated", "weight_noise"]

_KEPT = (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)

Metric = Callable[[Any, Any], Tensor]
Parameters = str | Sequence[str] | None


@dataclass(frozen=True, kw_only=True)
class Rise(Scalar):
    """``value`` = L(w + δ) − L(w), ``predicted`` what curvature says it is.

    ``stderr`` is over draws for noise, and over batches otherwise: how far other data could have changed it (nan for
    one batch). ``rises`` are those of each draw or batch, which count with ``weights``. ``changed`` is how many of the
    model's numbers may change. ``metric`` and ``metric_before`` are of the ``metric=`` asked for.
    """

    predicted: float
    predicted_stderr: float
    loss: float
    rises: tuple[float, ...] = field(repr=False)
    weights: tuple[float, ...] = field(repr=False)
    changed: int
    size: int
    metric: float = math.nan
    metric_before: float = math.nan

    def __str__(self) -> str:
        text = f"rise of the loss {uncertain(self.value, self.stderr)}"
        if not math.isnan(self.predicted):
            text += f", predicted {uncertain(self.predicted, self.predicted_stderr)}"
        return f"{text} (loss {self.loss:.5g}, {self.changed} of {self.size} numbers)"


@dataclass(frozen=True, kw_only=True)
class Curve(Scalar):
    """Rises over one setting; ``value`` is the area under the curve over its range: the mean rise.

    ``points`` are the records in the order of ``x``, ``metric_area`` the same mean of the metric.
    """

    name: str
    axis: str
    x: tuple[float, ...]
    points: tuple[Rise, ...] = field(repr=False)
    metric_area: float = math.nan

    def plot(self, ax: Any = None, **style: Any) -> Any:
        """Measured rises with two standard errors, and predicted ones dashed, on a matplotlib axes."""
        if ax is None:
            import matplotlib.pyplot as plt

            ax = plt.subplots()[1]
        errors = [0.0 if math.isnan(p.stderr) else 2 * p.stderr for p in self.points]
        bars = ax.errorbar(self.x, [p.value for p in self.points], yerr=errors, **{"marker": "o", "capsize": 2,
                                                                                  "label": self.name, **style})
        ax.plot(self.x, [p.predicted for p in self.points], linestyle="--", color=bars[0].get_color(),
                label=f"{self.name}, predicted")
        ax.set_xlabel(self.axis)
        ax.set_ylabel("rise of the loss")
        ax.legend()
        return ax


def accuracy(outputs: Any, batch: Any) -> Tensor:
    """The share of right classes among targets that are not −100, for batches (inputs, targets): a ``metric=``."""
    z, y = batches.logits(outputs), batch[1]
    valid = y != -100
    return ((z.argmax(-1) == y) & valid).double().sum() / valid.double().sum()


def weight_noise(objective: Objective, sigma: float, *, draws: int = 10, relative: bool = False,
                 antithetic: bool = True, predict: bool = True, rtol: float = 0.1, max_matvecs: int = 100,
                 metric: Metric | None = None, seed: int = 0) -> Rise:
    """E L(w + δ) − L(w) for δ ~ N(0, σ²) in every number of ``objective.parameters``.

    Args:
        sigma: σ, absolute; with ``relative``, in units of the root mean square of each tensor.
        draws: independent draws; each is a pair δ, −δ (two passes over the data) unless ``antithetic`` is off, so that
            the first-order term cancels.
        predict: whether to compute ½ tr(HΣ), by random probes to a relative error of ``rtol``, with at
            most ``max_matvecs`` matvecs.
        metric: ``metric(outputs, batch)``, a mean over the batch like the loss, such as ``accuracy``.
        seed: of the draws.

    Raises:
        ValueError: sigma not positive, or no draws.

    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> objective = Objective(model, torch.nn.MSELoss(), (torch.eye(2), torch.ones(2, 1)))
    >>> rise = weight_noise(objective, 0.1, draws=100)
    >>> abs(rise.value - 0.01) < 4 * rise.stderr, round(rise.predicted, 6)        # ½ σ² tr H, tr H = 2
    (True, 0.01)
    """
    if not (sigma > 0 and math.isfinite(sigma)) or draws < 1:
        raise ValueError(f"sigma must be positive and draws at least 1, got sigma={sigma}, draws={draws}")
    parameters, generator = objective.parameters, vectors.seeded(seed)
    space = vectors.Space(parameters)
    norms = space.norms([parallel.local(p.detach()) for p in parameters]).tolist()
    scale = [sigma * norm / math.sqrt(p.numel()) if relative else sigma
             for p, norm in zip(parameters, norms, strict=True)]
    with objective.session(check=True):
        before = _evaluate(objective, metric)
        rises, metrics, realised = [], [], []
        for _ in range(draws):
            delta = [xi.mul_(s) for xi, s in zip(space.random(generator), scale, strict=True)]
            found = []
            for sign in (1.0, -1.0) if antithetic else (1.0,):
                with perturbed.displaced(parameters, delta, sign) as displacement:
                    found.append(_evaluate(objective, metric))
                realised += displacement.realised
            rises.append(math.fsum(f.loss - before.loss for f in found) / len(found))
            metrics.append(math.fsum(f.metric for f in found) / len(found))
    warn_of_rounded_step(objective, realised)
    predicted, error = math.nan, math.nan
    if predict:
        H = Hessian(objective)
        variance = torch.cat([torch.full((parallel.local(p).numel(),), s**2, dtype=H.dtype, device=H.device)
                              for p, s in zip(parameters, scale, strict=True)])
        if bool((variance > 0).any()):
            found = trace(H.preconditioned(variance), rtol=rtol, max_matvecs=max_matvecs, seed=seed)
            predicted, error = found.value / 2, found.stderr / 2
    size = _size(objective.model)
    return _record(before, rises, [1.0] * draws, predicted, error, sum(p.numel() for p in parameters), size,
                   math.fsum(metrics) / draws, sigma=sigma, draws=draws, relative=relative, antithetic=antithetic,
                   seed=seed)


def quantized(objective: Objective, bits: int = 4, *, group: int | None = None, parameters: Parameters = None,
              predict: bool = True, metric: Metric | None = None) -> Rise:
    """The rise of the loss when weights are rounded to the nearest of 2^bits − 1 levels, symmetric around zero.

    w → s · round(w / s) with s = max |w| / (2^(bits−1) − 1) over an output channel, or over ``group`` successive
    inputs of one. The calculation stays in the dtype of the weights ("fake" quantization of weights alone).

    Args:
        bits: 2 to 16.
        group: None for a scale an output channel; 128 is usual below 8 bits.
        parameters: names of parameters or modules; by default all matrices but embeddings.
        predict: whether to compute gᵀδ + ½ δᵀHδ, one gradient and one Hessian-vector product.
        metric: ``metric(outputs, batch)``, a mean over the batch like the loss, such as ``accuracy``.

    Raises:
        ValueError: bits outside 2 to 16, or no weight to round.
    """
    if not 2 <= bits <= 16 or bits != int(bits):
        raise ValueError(f"bits must be an integer from 2 to 16, got {bits}: one bit leaves no symmetric level")
    if group is not None and group < 1:
        raise ValueError(f"group must be at least 1, got {group}")
    levels = 2 ** (int(bits) - 1) - 1

    def rounded(rows: Tensor) -> Tensor:
        pieces = [rows] if group is None else rows.split(group, dim=1)
        return torch.cat([_rounded(piece, levels) for piece in pieces], dim=1)

    return _replaced(objective, lambda w: [_by_rows(t, rounded) for t in w], parameters, predict, metric,
                     {"bits": bits, "group": group})


def pruned(objective: Objective, share: float = 0.5, *, scope: str = "global", parameters: Parameters = None,
           predict: bool = True, metric: Metric | None = None) -> Rise:
    """The rise of the loss when the ``share`` of weights that are smallest in magnitude is set to zero.

    Args:
        share: in [0, 1].
        scope: "global", smallest of all weights together, or "tensor", of each tensor.

    Other arguments as for ``quantized``.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share is the part of the weights set to zero, in [0, 1], got {share}")
    if scope not in ("global", "tensor"):
        raise ValueError(f'scope must be "global" or "tensor", got {scope!r}')

    def zeroed(flat: Tensor) -> Tensor:
        smallest = flat.abs().topk(round(share * flat.numel()), largest=False, sorted=False).indices
        return flat.index_fill(0, smallest, 0.0)

    def change(w: Iterator[_Weight]) -> list[Tensor]:
        if scope == "tensor":
            return [parallel.part(zeroed(t.whole.flatten()).view(t.whole.shape), t.parameter) for t in w]
        rows = list(w)
        flat = zeroed(torch.cat([t.whole.flatten() for t in rows]))
        return [parallel.part(part.view(t.whole.shape), t.parameter) for part, t in
                zip(flat.split([t.whole.numel() for t in rows]), rows, strict=True)]

    return _replaced(objective, change, parameters, predict, metric, {"share": share, "scope": scope})


def truncated(objective: Objective, keep: float = 0.5, *, parameters: Parameters = None, predict: bool = True,
              metric: Metric | None = None) -> Rise:
    """The rise of the loss when each matrix keeps the ``keep`` share of its singular values, the largest, at least one.

    Kernels of convolutions count as matrices (outputs, inputs · positions). Other arguments as for ``quantized``.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep is the share of singular values that stay, in (0, 1], got {keep}")

    def low_rank(rows: Tensor) -> Tensor:
        U, s, Vh = torch.linalg.svd(_wide(rows), full_matrices=False)
        r = max(1, math.ceil(keep * len(s)))
        return rows if r == len(s) else ((U[:, :r] * s[:r]) @ Vh[:r]).to(rows.dtype)

    return _replaced(objective, lambda w: [_by_rows(t, low_rank) for t in w], parameters, predict, metric,
                     {"keep": keep})


def curve(measure: Callable[..., Rise], objective: Objective, **settings: Any) -> Curve:
    """``measure`` along the one setting that is a list: ``curve(quantized, objective, bits=[8, 6, 4, 3])``.

    The area has the standard error of the mean rise over draws or batches, the same ones at every point.

    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> objective = Objective(model, torch.nn.MSELoss(), (torch.eye(2), torch.ones(2, 1)))
    >>> c = curve(weight_noise, objective, sigma=[0.1, 0.2, 0.4], draws=20)
    >>> c.axis, [round(p.predicted, 4) for p in c.points]
    ('sigma', [0.01, 0.04, 0.16])
    """
    axes = [name for name, value in settings.items() if isinstance(value, (list, tuple, range))
            and name != "parameters"]
    if len(axes) != 1 or len(settings[axes[0]]) < 2:
        raise ValueError("curve() needs exactly one setting that is a list of at least two values, such as "
                         f"bits=[8, 4, 3]; got {', '.join(axes) or 'none'}")
    axis, = axes
    points = [measure(objective, **{**settings, axis: value}) for value in settings[axis]]
    order = sorted(range(len(points)), key=lambda i: settings[axis][i])
    x = [float(settings[axis][i]) for i in order]
    if len(set(x)) < len(x):
        raise ValueError(f"the values of {axis} must differ, got {list(settings[axis])}")

    def area(y: Sequence[float]) -> float:
        return math.fsum((b - a) * (y[i] + y[i + 1]) / 2 for i, (a, b) in enumerate(
            zip(x[:-1], x[1:], strict=True))) / (x[-1] - x[0])

    ordered = [points[i] for i in order]
    areas = [area(row) for row in zip(*(p.rises for p in ordered), strict=True)]
    return Curve(value=area([p.value for p in ordered]), stderr=weighted_mean(areas, ordered[0].weights)[1],
                 name=measure.__name__.replace("_", " "), axis=axis, x=tuple(map(float, settings[axis])),
                 points=tuple(points), metric_area=area([p.metric for p in ordered]),
                 settings={k: v for k, v in settings.items() if k not in (axis, "metric")})


@dataclass(frozen=True)
class _Weight:
    """One weight to be changed: the parameter, all of it as a plain tensor, and which dimension counts outputs."""

    parameter: nn.Parameter
    whole: Tensor
    outputs: int


@dataclass(frozen=True)
class _Evaluation:
    """The loss, what each batch of every rank adds to it, and the metric."""

    loss: float
    parts: tuple[float, ...]
    weights: tuple[float, ...]
    sums: bool
    metric: float


def _wide(t: Tensor) -> Tensor:
    """In float32 at least."""
    return t.float() if t.dtype in vectors.HALF else t


def _rounded(rows: Tensor, levels: int) -> Tensor:
    """Each row to the nearest multiple of max |row| / levels, calculated in float32 at least."""
    wide = _wide(rows)
    step = wide.abs().amax(1, keepdim=True) / levels
    return (torch.round(wide / step.where(step > 0, torch.ones_like(step))) * step).to(rows.dtype)


def _by_rows(w: _Weight, change: Callable[[Tensor], Tensor]) -> Tensor:
    """A function of the matrix (outputs, everything else), as this rank's part of the weight."""
    turned = w.whole.movedim(w.outputs, 0)
    new = change(turned.flatten(1)).view(turned.shape).movedim(0, w.outputs)
    return parallel.part(new.contiguous(), w.parameter)


def _replaced(objective: Objective, change: Callable[[Iterator[_Weight]], list[Tensor]], parameters: Parameters,
              predict: bool, metric: Metric | None, settings: Mapping[str, Any]) -> Rise:
    """The rise when chosen weights are replaced, and gᵀδ + ½ δᵀHδ for that δ."""
    chosen = _chosen(objective, parameters)
    names = [name for name, _, _ in chosen]
    with _trainable([p for _, p, _ in chosen]):
        with torch.no_grad():
            new = change(_Weight(p, parallel.full(p.detach()), outputs) for _, p, outputs in chosen)
            delta = [_wide(t) - _wide(parallel.local(p.detach())) for t, (_, p, _) in zip(new, chosen, strict=True)]
        moved = [p for _, p, _ in chosen]
        with objective.session(check=True):
            before = _evaluate(objective, metric)
            with perturbed.displaced(moved, delta):
                after = _evaluate(objective, metric)
        predicted = _second_order(objective, moved, delta) if predict else math.nan
    rises = [b - a for a, b in zip(before.parts, after.parts, strict=True)]
    return _record(before, rises, before.weights, predicted, math.nan, sum(p.numel() for p in moved),
                   _size(objective.model), after.metric, value=after.loss - before.loss, **settings,
                   parameters=names)


def _second_order(objective: Objective, moved: Sequence[nn.Parameter], delta: Sequence[Tensor]) -> float:
    """gᵀδ + ½ δᵀHδ."""
    found = {id(p): t for p, t in zip(moved, delta, strict=True)}
    along = [found[id(p)] if id(p) in found else torch.zeros_like(parallel.local(p.detach()))
             for p in objective.parameters]
    g = objective.evaluate(gradient=True).gradient
    H = Hessian(objective)
    v = torch.cat([t.reshape(-1).to(H.device, H.dtype) for t in along])
    first = H.dot(torch.cat([t.reshape(-1).to(H.device, H.dtype) for t in g]), v)
    with H.session():
        return first + 0.5 * H.dot(v, H.matvec(v))


def _evaluate(objective: Objective, metric: Metric | None) -> _Evaluation:
    """One pass over the data, as ``objective.value()`` evaluates. Inside ``objective.session()``."""
    rows = []
    with torch.enable_grad():
        for batch in objective.weighted_batches():
            outputs = batch.outputs()
            loss = float(batch.loss(outputs, differentiate=False).detach())
            rows.append((loss, float(metric(outputs, batch.data)) if metric else math.nan, batch.weight))
            del outputs
    rows = [row for row in _of_all_ranks(objective, rows) if row[2] > 0]
    losses, metrics, n = zip(*rows, strict=True)
    total = math.fsum(n)
    loss = math.fsum(a * b for a, b in zip(losses, n, strict=True)) / (1 if objective.sums else total)
    return _Evaluation(loss, losses, n, objective.sums,
                       math.fsum(a * b for a, b in zip(metrics, n, strict=True)) / total)


def _of_all_ranks(objective: Objective, rows: list[tuple[float, float, float]]) -> list[tuple[float, ...]]:
    """The rows of all ranks, in the order of ranks, by sums over tables that each fills in part."""
    ranks = objective.ranks
    if not ranks:
        return list(rows)
    counts = [int(c) for c in ranks.total(*(float(len(rows)) * (r == ranks.rank) for r in range(ranks.world)))]
    start, flat = sum(counts[:ranks.rank]), [0.0] * (3 * sum(counts))
    flat[3 * start:3 * (start + len(rows))] = [x for row in rows for x in row]
    table = ranks.total(*flat)
    return [tuple(table[3 * i:3 * i + 3]) for i in range(sum(counts))]


def _record(before: _Evaluation, rises: Sequence[float], weights: Sequence[float], predicted: float, error: float,
            changed: int, size: int, metric: float, value: float | None = None, **settings: Any) -> Rise:
    mean, stderr = weighted_mean(rises, weights)
    if before.sums and value is not None:       # batches are summed, so the rise is their number times the mean
        stderr *= len(rises)
    return Rise(value=mean if value is None else value, stderr=stderr, predicted=predicted, predicted_stderr=error,
                loss=before.loss, rises=tuple(rises), weights=tuple(weights), changed=changed, size=size, metric=metric,
                metric_before=before.metric, settings=settings)


def _chosen(objective: Objective, parameters: Parameters) -> list[tuple[str, nn.Parameter, int]]:
    """Names, parameters and output dimensions of the weights to change, each tensor once."""
    objective.ranks.reshard()
    model = objective.model
    kept = {id(p) for m in model.modules() if isinstance(m, _KEPT) for p in m.parameters(recurse=False)}
    outputs = {id(m.weight): 1 for m in model.modules() if isinstance(m, nn.modules.conv._ConvTransposeNd)}
    named = [(name, p) for name, p in model.named_parameters() if p.is_floating_point()]
    if parameters is None:
        found = [(name, p) for name, p in named if p.dim() >= 2 and id(p) not in kept]
    else:
        wanted = [parameters] if isinstance(parameters, str) else list(parameters)
        missing = [w for w in wanted if not any(_below(name, w) for name, _ in named)]
        if missing:
            raise ValueError(f"no parameter is called or lies below {missing[0]!r}; there are "
                             f"{', '.join(name for name, _ in named[:8])}{', ...' if len(named) > 8 else ''}")
        found = [(name, p) for name, p in named if any(_below(name, w) for w in wanted)]
        if flat := [name for name, p in found if p.dim() < 2]:
            found = [(name, p) for name, p in found if p.dim() >= 2]
            if not found:
                raise ValueError(f"{flat[0]} has fewer than two dimensions: rounding, pruning and low rank are for "
                                 "matrices and kernels")
    if not found:
        raise ValueError("this model has no matrix outside of embeddings to change: name some by parameters=")
    return [(name, p, outputs.get(id(p), 0)) for name, p in found]


def _below(name: str, wanted: str) -> bool:
    return name == wanted or name.startswith(wanted.rstrip(".") + ".")


@contextmanager
def _trainable(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Frozen parameters require a gradient inside, so that curvature sees them."""
    frozen = [p for p in parameters if not p.requires_grad]
    for p in frozen:
        p.requires_grad_(True)
    try:
        yield
    finally:
        for p in frozen:
            p.requires_grad_(False)


def _size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
