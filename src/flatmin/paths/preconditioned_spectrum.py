"""Does Adam's second moment flatten the Gauss-Newton matrix, and where does the gradient lie in it?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import vectors
from ..ascent.directions import Preconditioned
from ..curvature import CurvatureOperator, GaussNewton, Spectrum, eigenpairs
from ..objective import Objective
from .direction import inverse_metric


@dataclass(frozen=True, kw_only=True)
class PreconditionedSpectrum:
    """The k largest eigenvalues of G and of M^-½ G M^-½, and shares of vectors in the span of their eigenvectors.

    If M were proportional to G, all eigenvalues after preconditioning would be equal: compare ``spread``, λ₁/λ_k, which
    no factor of M changes. A random vector has the share k/n (``chance``) in expectation.
    """

    before: Spectrum            # of G
    after: Spectrum             # of M^-½ G M^-½
    gradient_share: float       # of g in the top eigenspace of G
    direction_share: float      # of M⁻¹g in the same
    metric_share: float         # of M^-½ g in the top eigenspace of M^-½ G M^-½
    chance: float
    settings: dict[str, Any]

    @property
    def spread(self) -> tuple[float, float]:
        """λ₁/λ_k before and after."""
        return _spread(self.before), _spread(self.after)

    def __str__(self) -> str:
        def values(spectrum: Spectrum) -> str:
            return " ".join(f"{float(x):.3g}" for x in spectrum.eigenvalues.flip(0))

        return "\n".join([
            f"Gauss-Newton matrix, {len(self.before.eigenvalues)} largest eigenvalues",
            f"  before  {values(self.before)}   (first/last {self.spread[0]:.3g})",
            f"  after   {values(self.after)}   (first/last {self.spread[1]:.3g})",
            f"  share in the top eigenspace: gradient {self.gradient_share:.3f}, M^-1 g {self.direction_share:.3f}, "
            f"after preconditioning {self.metric_share:.3f}; by chance {self.chance:.2g}"])


def preconditioned_spectrum(objective: Objective, optimizer: torch.optim.Optimizer, k: int = 10, *,
                            preconditioner: Preconditioned | None = None, product: Any = "auto",
                            **options: Any) -> PreconditionedSpectrum:
    """The k largest eigenvalues of the Gauss-Newton matrix G before and after preconditioning, M^-½ G M^-½.

    M comes from the optimizer's second moment. If M⁻¹ approximates G⁻¹, as is said of Adam, the second spectrum is
    flat, and the share of ε ∝ M⁻¹g in the top eigenspace of G is below that of g.

    Args:
        objective: L.
        optimizer: Adam, AdamW or one like them, after at least one step.
        k: how many eigenpairs; ``eigenpairs`` holds 3k + 40 vectors.
        preconditioner: what M is, ``Preconditioned(power=, eps=, bias_correction=)``.
        product: of the ``GaussNewton`` operator.
        options: of ``eigenpairs`` (tol, seed, certify, max_matvecs, ...).

    Raises:
        ValueError: an optimizer without a second moment of this model's parameters.
    """
    G = GaussNewton(objective, product=product)
    inverse = G.join(inverse_metric(objective, optimizer, preconditioner))
    scaled = G.preconditioned(inverse)
    with G.session(check=options.get("certify", True)):
        g = G.join(objective.evaluate(gradient=True).gradient)
        before, after = eigenpairs(G, k, **options), eigenpairs(scaled, k, **options)
    return PreconditionedSpectrum(
        before=before, after=after, gradient_share=eigenspace_share(G, before, g),
        direction_share=eigenspace_share(G, before, g * inverse),
        metric_share=eigenspace_share(G, after, g * inverse.sqrt()), chance=len(before.eigenvalues) / G.size,
        settings={"k": k, "preconditioner": preconditioner or Preconditioned(), "size": G.size,
                  "mode": objective.mode} | options)


def eigenspace_share(operator: CurvatureOperator, spectrum: Spectrum, vector: Tensor | list[Tensor]) -> float:
    """‖Vv‖²/‖v‖²: the share of a vector in the span of eigenvectors, rows of V; nan for a zero vector.

    ``operator`` is the one whose eigenvectors they are; its inner products sum over the ranks.

    >>> from flatmin.curvature import Matrix
    >>> A = Matrix(torch.diag(torch.tensor([3.0, 2.0, 1.0])))
    >>> round(eigenspace_share(A, eigenpairs(A, 2), torch.tensor([1.0, 2.0, 2.0])), 4)
    0.5556
    """
    v = vector if isinstance(vector, Tensor) else operator.join(vector)
    rows = spectrum.eigenvectors
    inner = operator.reduce(vectors.dots(list(rows), [v.to(rows)] * len(rows)))
    square = operator.norm(v) ** 2
    return float(inner.square().sum()) / square if square > 0 else float("nan")


def _spread(spectrum: Spectrum) -> float:
    return float(spectrum.eigenvalues[-1] / spectrum.eigenvalues[0])
