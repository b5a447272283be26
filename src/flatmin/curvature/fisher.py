"""Fisher matrices of the distribution that a loss is the negative log-likelihood of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import batches
from ..evaluation import WeightedBatch
from ..objective import Objective
from .finite_differences import Differences
from .gauss_newton import loss_curvature, sandwich
from .linearization import Linearization, LinearMap
from .objective_operator import ObjectiveOperator, Parameters, Product, require_objective
from .output_differences import OutputDifference, OutputHessian, TangentDifference, outputs_and_loss

Kind = Literal["exact", "monte_carlo", "empirical"]
Likelihood = Literal["softmax", "gaussian", "bernoulli"]


def Fisher(objective: Objective, *, kind: Kind = "exact", likelihood: Likelihood | None = None, seed: int = 0,
           parameters: Parameters = None, product: Product = "auto") -> ObjectiveOperator:
    """F = (1/N) Σ_n J_nᵀ E[r rᵀ] J_n with r = ∂ℓ_n/∂z_n, over the N terms whose mean the loss is.

    ``kind`` says what the expectation is over:

    * "exact": over targets drawn from the model's own distribution, in closed form; equal to ``GaussNewton`` for the
      likelihoods here, whose outputs are natural parameters;
    * "monte_carlo": one drawn target a term, fixed by ``seed``; its expectation is the exact one;
    * "empirical": the targets of the data, r rᵀ as it is. Not an estimate of the other two, and small where the fit is
      good.

    A term is a sample or, for sequences, a valid token: rows along the class dimension of the outputs (dimension 1 for
    ``cross_entropy``, the last for language models and for the other losses, of which a row is one term).

    Args:
        objective: L, without weights on classes.
        likelihood: "softmax", "gaussian" (squared error) or "bernoulli" (logits); found from the loss where it is
            torch's own or the model's.
        seed: of the drawn targets.
        parameters, product: as for ``GaussNewton`` (without "forward").

    Raises:
        ValueError: where the likelihood cannot be found from the loss.

    J. Martens, JMLR 21(146), 2020; F. Kunstner et al., NeurIPS 2019 (on the empirical one).
    """
    if kind not in ("exact", "monte_carlo", "empirical"):
        raise ValueError(f'kind must be "exact", "monte_carlo" or "empirical", got {kind!r}')
    require_objective(objective)
    expected = _ExpectedSquare(kind, likelihood or _likelihood(objective), seed)
    if isinstance(batches.option(objective.loss_fn, "weight"), Tensor):
        raise ValueError("Fisher has no meaning for a loss with weights on classes; take GaussNewton")
    linearization = Linearization(
        name="Fisher", reverse=expected.linearize, settings={"kind": kind, "likelihood": expected.likelihood},
        differences=lambda operator, objective: Differences(operator, objective, OutputDifference(
            operator, objective, TangentDifference(expected.of))))
    return ObjectiveOperator(objective, linearization, parameters=parameters, product=product)


@dataclass(frozen=True)
class _ExpectedSquare:
    """E[r rᵀ] in the space of one batch's outputs."""

    kind: Kind
    likelihood: Likelihood
    seed: int

    def linearize(self, batch: WeightedBatch, w: list[nn.Parameter]) -> LinearMap:
        z, loss = outputs_and_loss(batch)
        return sandwich(z, w, lambda: self.of(batch, z, loss))

    def of(self, batch: WeightedBatch, z: Tensor, loss: Tensor) -> OutputHessian:
        """u ↦ E[r rᵀ] u, times the number of terms."""
        exact, objective = loss_curvature(z, loss), batch.session
        if self.kind == "exact":
            return exact
        c, = torch.autograd.grad(loss, z, retain_graph=True)
        rows = _Rows(z, _classes_second(z, objective.loss_fn))
        n = batch.weight / (1 if self.likelihood == "softmax" or objective.sums else rows.of(z).shape[-1])
        if self.kind == "empirical":
            r = rows.of(c) * n
        else:       # ignored terms are those without a gradient
            r = self._drawn(rows.of(z.detach()), rows.of(exact(torch.ones_like(z))), n, batch.index)
            r = r * (rows.of(c) != 0).any(-1, keepdim=True)
        return lambda u: rows.back(r * (r * rows.of(u)).sum(-1, keepdim=True) / n)

    def _drawn(self, z: Tensor, curvature: Tensor, n: float, index: int) -> Tensor:
        """∂ℓ/∂z for targets drawn from the model; ``curvature`` is ∂²L/∂z² · 1, which fixes the scale of the loss."""
        generator = torch.Generator(z.device).manual_seed(self.seed * 1_000_003 + index)
        if self.likelihood == "gaussian":
            return torch.randn(z.shape, generator=generator, device=z.device, dtype=z.dtype) * (n * curvature).sqrt()
        if self.likelihood == "bernoulli":
            p = z.sigmoid()
            y = (torch.rand(z.shape, generator=generator, device=z.device, dtype=z.dtype) < p).to(z.dtype)
            return (p - y) * (n * curvature.sum() / (p * (1 - p)).sum()).sqrt()
        p = z.softmax(-1)
        y = torch.multinomial(p.reshape(-1, p.shape[-1]), 1, generator=generator).view(p.shape[:-1])
        return p - F.one_hot(y, p.shape[-1]).to(z.dtype)


class _Rows:
    """Outputs as rows, one a term, and back."""

    def __init__(self, z: Tensor, classes_second: bool):
        self.flat, self.dim = z.dim() < 2, 1 if classes_second else -1

    def of(self, t: Tensor) -> Tensor:
        return t.reshape(-1, 1) if self.flat else t.movedim(self.dim, -1)

    def back(self, t: Tensor) -> Tensor:
        return t.reshape(-1) if self.flat else t.movedim(-1, self.dim)


def _classes_second(z: Tensor, loss_fn: object) -> bool:
    loss = batches.base_function(loss_fn)
    return z.dim() > 2 and (isinstance(loss, nn.CrossEntropyLoss) or loss is F.cross_entropy)


def _likelihood(objective: Objective) -> Likelihood:
    loss = batches.base_function(objective.loss_fn)
    if loss is None or isinstance(loss, nn.CrossEntropyLoss) or loss is F.cross_entropy:
        return "softmax"
    if isinstance(loss, nn.MSELoss) or loss is F.mse_loss:
        return "gaussian"
    if isinstance(loss, nn.BCEWithLogitsLoss) or loss is F.binary_cross_entropy_with_logits:
        return "bernoulli"
    raise ValueError("cannot tell which distribution this loss is the negative log-likelihood of: pass likelihood="
                     '"softmax", "gaussian" or "bernoulli"')
