"""Split: the matvecs H_G v and H_F v, both from one graph a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from ..curvature import FunctionalPart
from ..curvature.double_backward import differentiable_gradient
from ..curvature.gauss_newton import loss_curvature
from ..curvature.output_differences import outputs_and_loss
from ..evaluation import WeightedBatch
from ..objective import Objective

SplitMatvec = Callable[[Tensor], tuple[Tensor, Tensor]]
"""v ↦ (H_G v, H_F v) of one batch."""


class Split:
    """The Gauss-Newton part and the functional part of the Hessian of an objective, multiplied by the same vector.

    With outputs z, J = ∂z/∂w and c = ∂L/∂z, the gradient of ⟨v, Jᵀu⟩ at u = c is Jv along u and H_F v along w: one
    second pass gives both, and Jᵀ(∂²L/∂z²)Jv = H_G v is one more. Both take 3.7 forward-backwards, where two
    operators take 5.3 or more. Exact; the same numbers as ``GaussNewton`` and ``FunctionalPart``.

    Flat vectors are laid out as for those operators. Not for sharded parameters, where they take differences.
    """

    def __init__(self, objective: Objective):
        self.objective = objective
        self.operator = FunctionalPart(objective)

    def matvec(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """H_G v and H_F v as new flat tensors."""
        logit, func = torch.zeros_like(v), torch.zeros_like(v)
        weights = []
        for batch, matvec in self.batches():
            weights.append(batch.weight)
            for total, part in zip((logit, func), matvec(v), strict=True):
                total.add_(part, alpha=batch.weight)
        return self.mean(logit, weights), self.mean(func, weights)

    def mean(self, total: Tensor, weights: Sequence[float]) -> Tensor:
        """A sum over this rank's batches as the mean over all ranks', in place."""
        return self.objective.ranks.sum_(total.div_(self.objective.normalizer(weights)))

    def batches(self) -> Iterator[tuple[WeightedBatch, SplitMatvec]]:
        """Each batch, and its own v ↦ (H_G v, H_F v); a graph lives until the next batch."""
        with self.operator.session(check=False):    # kernels that can be differentiated twice
            for batch in self.objective.weighted_batches():
                matvec = self._linearized(batch)
                yield batch, matvec
                del matvec

    @torch.enable_grad()
    def _linearized(self, batch: WeightedBatch) -> SplitMatvec:
        w: list[nn.Parameter] = self.operator.parameters
        z, loss = outputs_and_loss(batch)
        if not (z.requires_grad and loss.requires_grad):
            return lambda v: (torch.zeros_like(v), torch.zeros_like(v))
        output_hessian = loss_curvature(z, loss)
        u, = torch.autograd.grad(loss, z, retain_graph=True)
        u.requires_grad_()
        roots, used = differentiable_gradient(z, w, u)

        def matvec(v: Tensor) -> tuple[Tensor, Tensor]:
            tangents = [part.view(p.shape).to(p.dtype)
                        for part, p in zip(v.split(self.operator.numels), w, strict=True)]
            jv, *func = torch.autograd.grad(roots, [u, *w], [tangents[i] for i in used], retain_graph=True,
                                            allow_unused=True)
            logit = torch.autograd.grad(z, w, output_hessian(jv), retain_graph=True, allow_unused=True)
            return self.flat(logit, v), self.flat(func, v)

        return matvec

    def flat(self, parts: Sequence[Tensor | None], like: Tensor) -> Tensor:
        """One tensor or None (zero) a parameter as one flat tensor of the dtype of another."""
        return torch.cat([like.new_zeros(n) if t is None else t.detach().to_dense().reshape(-1).to(like)
                          for t, n in zip(parts, self.operator.numels, strict=True)])
