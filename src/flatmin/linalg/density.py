"""The density of a whole spectrum, by stochastic Lanczos quadrature."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import vectors
from ..progress import Progress, Report, reporter
from ..results import Scalar
from .basis import Basis, Place
from .checkpoint import Checkpoint, State
from .confidence import Measured, add_forms, data_stderr, exact_is_cheaper, moments, over_coordinates
from .lanczos import BandLanczos
from .operator import CurvatureOperator, Forms, require_operator

SMALL = 2000
"""Coordinates of which the matrix itself is held at most."""


@dataclass(frozen=True, kw_only=True)
class SpectralDensity:
    """A spectrum as weighted nodes, one row a probe; ``density``, ``log_density`` and ``plot`` smooth them.

    ``mass_at_zero`` is the share of eigenvalues with |λ| at most ``zero``: the middle between the best bounds that the
    matvecs allow (``settings["bounds"]``, the mean over probes); its error is that over probes and half of their half
    width, so that two of it reach both. ``trace`` is n times the mean of the spectrum, with its error by the data as of
    an ``Estimate``. Where ``settings["method"]`` is "exact" there is one row with all eigenvalues, and no error.
    """

    nodes: list[Tensor] = field(repr=False)     # a (m,) float64 tensor a probe, ascending
    weights: list[Tensor] = field(repr=False)   # the same shapes; each sums to 1
    size: int
    zero: float
    mass_at_zero: Scalar
    trace: Measured
    matvecs: int
    settings: dict[str, Any]

    def __str__(self) -> str:
        low, high = self.range
        return (f"spectrum from {low:.4g} to {high:.4g}, {self.mass_at_zero} of it next to zero, trace {self.trace} "
                f"({self.matvecs} matvecs)")

    @property
    def range(self) -> tuple[float, float]:
        """The outermost nodes, which lie inside the spectrum."""
        return min(float(t[0]) for t in self.nodes), max(float(t[-1]) for t in self.nodes)

    def density(self, x: Tensor | None = None, *, width: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Points x, the density there (integrating to 1) and its standard error over probes.

        Each node is a normal curve of standard deviation ``width``: by default the range over the number of nodes.
        """
        low, high = self.range
        width = width or max(high - low, abs(high), 1e-300) / max(len(t) for t in self.nodes)
        x = torch.linspace(low - 4 * width, high + 4 * width, 1000, dtype=torch.float64) if x is None else x.double()
        rows = [_smooth(x, t, w, width) for t, w in zip(self.nodes, self.weights, strict=True)]
        return x, *self._band(rows)

    def _band(self, rows: list[Tensor]) -> tuple[Tensor, Tensor]:
        t = torch.stack(rows)
        if self.settings["method"] == "exact":
            return t[0], torch.zeros_like(t[0])
        return t.mean(0), t.std(0) / math.sqrt(len(rows)) if len(rows) > 1 else torch.full_like(t[0], math.nan)

    def log_density(self, *, decades: float = 8, width: float = 0.1) -> dict[str, Tensor]:
        """Shares of eigenvalues per decade of |λ|, apart for each sign, with their standard errors over probes.

        Keys: "exponent" (log₁₀ |λ|), "positive", "positive_error", "negative", "negative_error"; what is smaller than
        ``decades`` below the largest |λ| counts as zero.
        """
        top = math.log10(max(map(abs, self.range)) or 1.0)
        x = torch.linspace(top - decades, top + 4 * width, 800, dtype=torch.float64)
        out = {"exponent": x}
        for name, sign in (("positive", 1), ("negative", -1)):
            rows = []
            for t, w in zip(self.nodes, self.weights, strict=True):
                here = sign * t > 10 ** (top - decades)
                rows.append(_smooth(x, (sign * t[here]).log10(), w[here], width))
            out[name], out[f"{name}_error"] = self._band(rows)
        return out

    def plot(self, ax: Any = None, *, log: bool = False, **style: Any) -> Any:
        """The density with a band of two standard errors; with ``log``, per decade of |λ| and apart for each sign."""
        if ax is None:
            import matplotlib.pyplot as plt

            ax = plt.subplots()[1]
        if log:
            d = self.log_density()
            for name in ("positive", "negative"):
                _draw(ax, 10 ** d["exponent"], d[name], d[f"{name}_error"], label=f"{name} λ", **style)
            ax.set_xscale("log")
            ax.set(xlabel="|eigenvalue|", ylabel="share per decade")
            ax.legend()
        else:
            x, y, error = self.density()
            _draw(ax, x, y, error, **style)
            ax.set_yscale("log")
            # one eigenvalue is a peak of 1/(n width √(2π)), and x spans about as many widths as there are nodes
            ax.set_ylim(1 / (self.size * float(x[-1] - x[0])), 3 * float(y.max()))
            ax.set(xlabel="eigenvalue", ylabel="density")
        return ax


def spectral_density(operator: CurvatureOperator, *, probes: int = 8, steps: int = 60, zero: float = 1e-4,
                     seed: int | torch.Generator = 0, place: Place = "device", folder: str | None = None,
                     progress: Progress = False, checkpoint: str | None = None) -> SpectralDensity:
    """The spectral density φ(t) = (1/n) Σ_i δ(t − λ_i), by stochastic Lanczos quadrature.

    From each random unit vector v, ``steps`` of Lanczos with full re-orthogonalisation give nodes θ_j and weights
    (s_j)₁² whose sums Σ_j w_j θ_jᵖ equal vᵀAᵖv up to p = 2 · steps − 1; the mean over v is the spectrum's. Up to 2000
    coordinates, where ``probes`` · ``steps`` matvecs are no fewer than coordinates, one matvec a coordinate gives all
    eigenvalues instead.

    Args:
        operator: any ``CurvatureOperator``.
        probes: random vectors; the band is over them.
        steps: matvecs a probe, and vectors held at once.
        zero: |λ| up to ``zero`` times the largest |λ| counts as zero for ``mass_at_zero``.
        seed: of the probes.
        place, folder: where the vectors are, as for ``eigenpairs``.
        checkpoint: a file for the state, written each minute and on Ctrl-C, from which the same call resumes to the
            same result; removed with it.

    >>> from flatmin.curvature import Matrix
    >>> d = spectral_density(Matrix(torch.diag(torch.tensor([2.0, 0.0, 0.0, 0.0]))))
    >>> d.mass_at_zero.value, d.settings["method"]
    (0.75, 'exact')

    S. Ubaru, J. Chen, Y. Saad, SIAM J. Matrix Anal. Appl. 38 (2017) 1075-1099; B. Ghorbani et al., ICML 2019. Bounds:
    G. Golub, G. Meurant, Matrices, Moments and Quadrature with Applications, Princeton 2010, sections 2 and 6
    (Chebyshev-Markov-Stieltjes).
    """
    require_operator(operator)
    if probes < 1 or steps < 1:
        raise ValueError(f"probes and steps must be positive, got {probes} and {steps}")
    generator = vectors.seeded(seed)
    exact = operator.size <= SMALL and exact_is_cheaper(operator, probes * steps, probes * steps)
    with operator.session(), reporter(progress, "spectral density") as report, \
            Checkpoint(checkpoint, operator, on_disk=place == "disk" and not exact, generator=generator,
                       method="density", probes=probes, steps=steps, seed=seed) as saver:
        if exact:
            rows, forms = over_coordinates(operator, lambda w, i: w.to("cpu", torch.float64), saver, report, spent=0)
            A = torch.stack(rows)
            nodes, used = [torch.linalg.eigvalsh((A + A.T) / 2)], len(rows)
            weights, ends = [torch.full_like(nodes[0], 1 / len(rows))], []
        else:
            nodes, weights, ends, forms, used = _quadrature(operator, probes, min(steps, operator.size), generator,
                                                            place, folder, saver, report)
    top = max(float(t.abs().max()) for t in nodes)
    n = operator.size
    settings = operator.describe() | {"probes": probes, "steps": steps, "method": "exact" if exact else "lanczos"}

    def over_probes(samples: list[float]) -> dict[str, Any]:
        value, stderr = moments(samples)
        return {"value": value, "stderr": 0.0 if exact else stderr if len(samples) > 1 else math.nan,
                "settings": settings}

    if exact:
        share = float((nodes[0].abs() <= zero * top).double().mean())
        at_zero = Scalar(value=share, stderr=0.0, settings=settings)
    else:
        at_zero = _mass_at_zero([_mass_bounds(t, first, last, zero * top)
                                 for t, (first, last) in zip(nodes, ends, strict=True)], settings)
    traces = [n * float((w * t).sum()) for t, w in zip(nodes, weights, strict=True)]
    return SpectralDensity(nodes=nodes, weights=weights, size=n, zero=zero * top, matvecs=used, settings=settings,
                           mass_at_zero=at_zero,
                           trace=Measured(**over_probes(traces), data_stderr=data_stderr(forms),
                                          batches=None if forms is None else len(forms[0])))


def _quadrature(operator: CurvatureOperator, probes: int, steps: int, generator: torch.Generator, place: Place,
                folder: str | None, saver: Checkpoint, report: Report
                ) -> tuple[list[Tensor], list[Tensor], list[tuple[Tensor, Tensor]], Forms | None, int]:
    """By Lanczos from random vectors: nodes, weights, the first and last row of T's eigenvectors, the trace batch by
    batch, and the matvecs taken. The last row is zero where the measure is known completely."""
    V, saved = Basis(operator, steps + 1, place, folder, saver.basis), saver.take() or {}
    nodes, weights, used = saved.get("nodes", []), saved.get("weights", []), saved.get("used", 0)
    ends: list[tuple[Tensor, Tensor]] = saved.get("ends", [])
    forms: Forms | None = saved.get("forms")

    def state(run: BandLanczos | None = None) -> State:
        part = {} if run is None else {"run": run.state(with_basis=saver.basis is None)}
        return part | {"nodes": list(nodes), "weights": list(weights), "ends": list(ends), "used": used, "forms": forms,
                       "matvecs": used + (run.matvecs if run else 0)}

    saved_run: State | None = saved.get("run")
    while len(nodes) < probes:
        if saved_run is None:
            saver.rewritten(state)
        run = BandLanczos(operator, V, generator, start=saved_run is None)
        if saved_run is not None:
            run.resume(saved_run)
            saved_run = None
        while run.count < run.capacity and not run.breakdowns:
            run.step()
            saver.tick(partial(state, run))
            report(used + run.matvecs, f"of {probes * steps}", probes * steps - used - run.matvecs)
        theta, s, _ = run.ritz()
        used += run.matvecs
        nodes.append(theta / run.unit)
        weights.append(s[0] ** 2)
        ends.append((s[0], torch.zeros_like(s[-1]) if run.breakdowns or run.complete else s[-1]))
        forms = add_forms(forms, run.forms, operator.size / probes)
    return nodes, weights, ends, forms, used


def _mass_bounds(nodes: Tensor, first: Tensor, last: Tensor, z: float) -> tuple[float, float]:
    """The least and the largest share that a measure with this quadrature can have in [−z, z]."""
    if not bool(last.any()):
        inside = float((first**2)[nodes.abs() <= z].sum())
        return inside, inside
    (low, high), (left_low, left_high) = _mass_below(nodes, first, last, z), _mass_below(nodes, first, last, -z)
    return max(0.0, low - left_high), min(1.0, high - left_low)


def _mass_below(nodes: Tensor, first: Tensor, last: Tensor, t: float) -> tuple[float, float]:
    """Σ_{λ < t} w ≤ μ((−∞, t)) ≤ μ((−∞, t]) ≤ Σ_{λ ≤ t} w for the quadrature one of whose nodes λ is t.

    Its T has another last diagonal entry than that of Lanczos: T + τ e eᵀ, here in the eigenvectors of T.
    """
    tau = -1 / float((last**2 / (nodes - t)).sum())
    found, x = torch.linalg.eigh(torch.diag(nodes) + tau * torch.outer(last, last))
    w, i = (first @ x) ** 2, int((found - t).abs().argmin())
    return float(w[:i].sum()), float(w[:i + 1].sum())


def _mass_at_zero(bounds: list[tuple[float, float]], settings: dict[str, Any]) -> Scalar:
    """The middle of bounds that each probe gives."""
    value, stderr = moments([(low + high) / 2 for low, high in bounds])
    low, high = (math.fsum(ends) / len(bounds) for ends in zip(*bounds, strict=True))
    error = math.hypot(stderr, (high - low) / 4) if len(bounds) > 1 else math.nan
    return Scalar(value=value, stderr=error, settings=settings | {"bounds": [low, high]})


def _smooth(x: Tensor, nodes: Tensor, weights: Tensor, width: float) -> Tensor:
    z = (x[:, None] - nodes) / width
    return (weights * torch.exp(-0.5 * z**2)).sum(1) / (width * math.sqrt(2 * math.pi))


def _draw(ax: Any, x: Tensor, y: Tensor, error: Tensor, **style: Any) -> None:
    curve, = ax.plot(x.numpy(), y.numpy(), **style)
    if not bool(error.isnan().any()):
        ax.fill_between(x.numpy(), (y - 2 * error).clamp(min=0).numpy(), (y + 2 * error).numpy(), alpha=0.25,
                        color=curve.get_color(), linewidth=0)
