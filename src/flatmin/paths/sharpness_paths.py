"""How much of the gradient of SAM's penalty goes through the logits, and how much through the function."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from .. import vectors
from ..ascent.directions import Preconditioned
from ..ascent.parameters import list_parameters
from ..curvature import FunctionalPart, GaussNewton
from ..objective import Objective
from ..results import Scalar, uncertain
from ..sharpness.cautions import warn_of
from .direction import along, inverse_metric
from .loss_of_outputs import checked
from .split import Split
from .spread import NAMES, influences, numbers

LEAST_BATCHES = 8
"""Fewer batches say little about the spread between batches, and get no standard error."""


@dataclass(frozen=True, kw_only=True)
class LayerPaths:
    """One layer's part of δ_logit and δ_func. The shares are of the whole ‖H ε*‖²: over all layers they add up to
    the shares of the record; ``ratio`` and ``cosine`` are within the layer."""

    tau_logit: float
    tau_func: float
    tau_cross: float
    ratio: float
    cosine: float


@dataclass(frozen=True, kw_only=True)
class SharpnessPaths(Scalar):
    """``value`` = τ_logit; shares, norms and curvatures of δ_logit = H_G ε* and δ_func = H_F ε*.

    ``errors`` holds the standard errors over batches by the name of the field. It is empty where there are fewer than
    eight batches, where ``product`` was chosen or is a difference, and with ``error=False``. Where ``gradient_noise``
    is near 1, ε* is that of these batches and not of the population, and no error of first order says by how much
    that matters. Where the paths nearly cancel (``cosine`` near −1, as it can be with tied embeddings at
    initialization) the shares leave [0, 1]: read ``ratio`` and ``cosine`` there.
    """

    tau_func: float
    tau_cross: float
    ratio: float            # ‖δ_logit‖ / ‖δ_func‖
    cosine: float           # between δ_logit and δ_func
    logit_norm: float
    func_norm: float
    norm: float             # ‖H ε*‖
    logit_curvature: float  # ε*ᵀ H_G ε*
    func_curvature: float   # ε*ᵀ H_F ε*
    gradient_norm: float
    loss: float
    batches: int
    gradient_noise: float = math.nan        # share of ‖g‖² that differences between batches alone explain
    errors: Mapping[str, float] = field(default_factory=dict)
    layers: Mapping[str, LayerPaths] = field(default_factory=dict)
    product_error: float | None = None      # relative, where matvecs are finite differences
    warnings: tuple[str, ...] = ()
    direction: list[Tensor] | None = field(default=None, repr=False, compare=False)
    delta_logit: list[Tensor] | None = field(default=None, repr=False, compare=False)
    delta_func: list[Tensor] | None = field(default=None, repr=False, compare=False)

    @property
    def tau_logit(self) -> float:
        """‖δ_logit‖² / ‖δ_logit + δ_func‖²."""
        return self.value

    @property
    def curvature(self) -> float:
        """ε*ᵀ H ε*."""
        return self.logit_curvature + self.func_curvature

    def __str__(self) -> str:
        def shown(name: str) -> str:
            return uncertain(getattr(self, name), self.errors.get(name, math.nan))

        lines = [f"sharpness paths along {self.settings['direction']}, {self.batches} batches"
                 + (" (± standard error over batches)" if self.errors else ""),
                 f"  tau      logit {shown('tau_logit')}, functional {shown('tau_func')}, cross {shown('tau_cross')}",
                 f"  norms    logit {shown('logit_norm')}, functional {shown('func_norm')}, sum {shown('norm')}",
                 f"  ratio    {shown('ratio')}, cosine {shown('cosine')}",
                 f"  curvature along it: logit {self.logit_curvature:.5g}, functional {self.func_curvature:.5g}"]
        if self.gradient_noise > 0.5:
            share = min(self.gradient_noise, 1)
            lines.append(f"  about {share:.0%} of the squared gradient is noise of these batches, "
                         "so the direction is theirs, and the errors leave out what that biases")
        if self.tau_cross < -0.5:
            lines.append("  the paths partly cancel, so shares may exceed 1: compare ratio and cosine instead")
        if self.product_error is not None:
            lines.append(f"  matvecs are finite differences, relative error about {self.product_error:.1g}")
        width = max(map(len, self.layers), default=0)
        lines += [f"  {name:<{width}}  logit {row.tau_logit:8.4f}  functional {row.tau_func:8.4f}  cross "
                  f"{row.tau_cross:8.4f}  ratio {row.ratio:.4g}  cosine {row.cosine:.3f}"
                  for name, row in self.layers.items()]
        return "\n".join(lines)


def sharpness_paths(objective: Objective,
                    direction: Literal["gradient", "preconditioned"] | Tensor | Sequence[Tensor] = "gradient", *,
                    optimizer: torch.optim.Optimizer | None = None, preconditioner: Preconditioned | None = None,
                    per_layer: bool | Literal["parameter", "module"] = False, product: Any = "auto",
                    error: bool = True, keep_vectors: bool = False) -> SharpnessPaths:
    """The logit path and the functional path of sharpness along SAM's direction ε*.

    To first order SAM adds H ε* to the gradient. With outputs z(w), J = ∂z/∂w and H = H_G + H_F, where
    H_G = Jᵀ (∂²L/∂z²) J is the Gauss-Newton matrix and H_F = Σ_c (∂L/∂z_c) ∇²z_c the rest,

        δ_logit = H_G ε*,  δ_func = H_F ε*,
        τ_logit = ‖δ_logit‖² / ‖H ε*‖²,  τ_func = ‖δ_func‖² / ‖H ε*‖²,  τ_cross = 2 δ_logitᵀδ_func / ‖H ε*‖²,

    which sum to one. Both parts are computed as such: a difference of H ε* and one of them would lose the digits of the
    smaller part. Nothing of the size outputs × parameters is held.

    Args:
        objective: L; its loss must depend on the weights through the outputs (``logits``) alone.
        direction: "gradient", ε* = g/‖g‖; "preconditioned", ε* = M⁻¹g/‖M⁻¹g‖ with M from the ``optimizer``'s second
            moment as it is now; or tensors in the order of the parameters that require a gradient (or one flat tensor),
            which are normalized.
        optimizer: Adam, AdamW or one like them, for "preconditioned".
        preconditioner: what M is, ``Preconditioned(power=, eps=, bias_correction=)``; its default by default.
        per_layer: also for each parameter ("parameter" or True) or for each module that owns parameters ("module").
        product: "auto" takes both parts from one graph; where parameters are sharded (FSDP2), finite differences, whose
            relative error is ``.product_error``. Else what ``GaussNewton`` and ``FunctionalPart`` take, such as
            "finite_difference" for a model without a second derivative.
        error: also the standard errors over batches, where there are at least eight. They see that ε* comes from the
            same batches, and leave out the bias of order 1/batches. About 7.3 more forward-backwards.
        keep_vectors: keep ``direction``, ``delta_logit`` and ``delta_func`` in the record, lists of tensors.

    Returns:
        ``.tau_logit .tau_func .tau_cross .ratio .cosine .logit_norm .func_norm .norm .logit_curvature .func_curvature
        .errors .batches .layers``; nan where g = 0. About 4.7 forward-backwards: one for g and 3.7 for
        both matvecs.

    Raises:
        ValueError: a loss that reaches weights beside the outputs (auxiliary losses, weight penalties), outputs without
            one tensor of logits, an unknown direction, or an optimizer without a second moment.

    >>> torch.manual_seed(0)                                                # doctest: +ELLIPSIS
    <torch._C.Generator object at ...>
    >>> data = torch.randn(32, 4), torch.randint(3, (32,))
    >>> paths = sharpness_paths(Objective(torch.nn.Linear(4, 3), torch.nn.CrossEntropyLoss(), data))
    >>> paths.tau_logit, paths.tau_func, paths.ratio        # linear in its weights
    (1.0, 0.0, inf)

    S. P. Singh et al., arXiv 2502.02407; the definition of the τ is this library's, the paper's text was not available.
    """
    if per_layer not in (False, True, "parameter", "module"):
        raise ValueError(f'per_layer must be False, True, "parameter" or "module", got {per_layer!r}')
    named = isinstance(direction, str)
    if named and direction not in ("gradient", "preconditioned"):
        raise ValueError(f'direction must be "gradient", "preconditioned" or tensors, got {direction!r}')
    G, F = GaussNewton(objective, product=product), FunctionalPart(objective, product=product)
    metric = G.join(inverse_metric(objective, optimizer, preconditioner)) if direction == "preconditioned" else None
    with objective.session(check=True):
        at = checked(objective).evaluate(gradient=True)
        g, count = G.join(at.gradient), int(objective.ranks.total(sum(n > 0 for n in at.weights))[0])
        length, unit = G.norm(g), along(G, g, direction, metric)
        split = Split(objective) if product == "auto" and G.exact else None
        logit, func = split.matvec(unit.vector) if split else (G.matvec(unit.vector), F.matvec(unit.vector))
        squares = _squares(vectors.Space(G.parameters), G.numels, logit, func)
        total = squares.sum(1)
        errors, noise = dict[str, float](), math.nan
        if error and split and count >= LEAST_BATCHES and unit.length > 0:
            spread = influences(split, unit, g, logit, func, total)
            errors, noise = spread.errors(total, objective.ranks), spread.noise(length, objective.ranks)
    found = warn_of(objective, at, data_stderr=0.0 if errors else math.nan)
    values = dict(zip(NAMES, numbers(total).tolist(), strict=True))
    kinds = [e for e in (G.error, F.error) if e is not None]
    return SharpnessPaths(
        value=values.pop("tau_logit"), stderr=errors.get("tau_logit", math.nan), **values,
        logit_curvature=G.dot(unit.vector, logit), func_curvature=G.dot(unit.vector, func), gradient_norm=length,
        loss=float(at.loss), batches=count, errors=errors, gradient_noise=noise,
        layers=_layers(objective, squares, total, per_layer), product_error=max(kinds, default=None),
        warnings=tuple(found), direction=G.split(unit.vector) if keep_vectors else None,
        delta_logit=G.split(logit) if keep_vectors else None, delta_func=G.split(func) if keep_vectors else None,
        settings={"direction": direction if named else "a given direction", "product": G.product, "size": G.size,
                  "dtype": str(G.dtype).removeprefix("torch."), "mode": objective.mode, "samples": at.samples}
        | ({"preconditioner": preconditioner or Preconditioned()} if metric is not None else {}))


def _squares(space: vectors.Space, numels: list[int], logit: Tensor, func: Tensor) -> Tensor:
    """(3, parameters): ‖δ_logit‖², ‖δ_func‖² and δ_logitᵀδ_func of each parameter's rows."""
    a, b = logit.split(numels), func.split(numels)
    return torch.stack([space.reduce_each(vectors.dots(x, y)).double().cpu() for x, y in ((a, a), (b, b), (a, b))])


def _layers(objective: Objective, squares: Tensor, total: Tensor, per_layer: bool | str) -> dict[str, LayerPaths]:
    if not per_layer:
        return {}
    infos = list_parameters(objective.model, None, {})
    names = {id(p.parameter): p.name for p in infos}     # without what wrappers add
    rows: dict[str, Tensor] = {}
    for p, column in zip(objective.parameters, squares.unbind(1), strict=True):
        name = names[id(p)]
        key = (name.rpartition(".")[0] or name) if per_layer == "module" else name
        rows[key] = rows[key] + column if key in rows else column
    whole = float(total[0] + total[1] + 2 * total[2])
    out = {}
    for key, row in rows.items():
        own = dict(zip(NAMES, numbers(row).tolist(), strict=True))
        shares = [float(x) / whole if whole > 0 else math.nan for x in (row[0], row[1], 2 * row[2])]
        out[key] = LayerPaths(tau_logit=shares[0], tau_func=shares[1], tau_cross=shares[2], ratio=own["ratio"],
                              cosine=own["cosine"])
    return out
