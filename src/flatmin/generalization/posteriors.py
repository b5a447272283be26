"""Gaussian distributions over the weights of a model as it is, and what PAC-Bayes certifies of them.

``from_curvature`` (Hessian or Fisher diagonal, or a trace) and ``optimized`` (Dziugaite and Roy) make Q = N(w, diag s)
beside P = N(v, λI); ``certify`` bounds the risk of a classifier whose weights are drawn from Q. The model is evaluated
with drawn weights in place and given back bit for bit; it is not converted.

**The prior must not depend on the samples of the bound.** v is the initialization, or weights learnt on a split that
the objective's data leave out. λ may be chosen by looking at the samples if it comes from the grid c · exp(−j/b),
j = 1, 2, ..., whose union bound costs ``price`` = ln(π²/6) + 2 ln j nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import batches, parallel, perturbed, vectors
from ..linalg.confidence import moments
from ..linalg.trace import Diagonal
from ..objective import Objective
from ..results import Scalar
from . import pac_bayes
from .pac_bayes import Bound, Divergence, gaussian_kl

GRID = (0.1, 100.0)     # c and b of the prior variances c · exp(−j/b), as Dziugaite and Roy
Errors = Callable[[Any, Any], Tensor]


@dataclass(frozen=True, kw_only=True)
class Gaussian:
    """Q = N(mean, diag variance) and P = N(prior_mean, prior_variance · I) over ``objective.parameters``."""

    mean: list[Tensor] = field(repr=False)
    variance: list[Tensor] = field(repr=False)
    prior_mean: list[Tensor] = field(repr=False)
    prior_variance: float
    price: float = 0.0      # nats, for a prior variance chosen from the grid
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def kl(self) -> Divergence:
        """KL(Q‖P)."""
        return gaussian_kl(self.mean, self.variance, self.prior_mean, self.prior_variance)


@dataclass(frozen=True, kw_only=True)
class Risk(Scalar):
    """``value`` = the mean error rate over ``draws`` of the weights, ``stderr`` its standard error over them.

    The expected empirical risk is at most ``upper`` with probability 1 − ``delta`` over the draws.
    """

    upper: float
    delta: float
    draws: int
    samples: int


@dataclass(frozen=True, kw_only=True)
class Certificate(Bound):
    """``value`` bounds the risk of the random classifier with probability 1 − ``delta``, draws of weights included."""

    risk: Risk
    price: float


def from_curvature(objective: Objective, curvature: Diagonal | Sequence[Tensor] | float | Scalar, n: int, *,
                   prior_mean: Sequence[Tensor] | float = 0.0, prior_variance: float | None = None, beta: float = 1.0
                   ) -> Gaussian:
    """Q around the present weights with s_i = 1 / (β n h_i + 1/λ): flat directions are left wide, steep ones narrow.

    With β = 1 it is the Laplace approximation of the posterior. s minimises the linearised bound
    E_Q L + KL(Q‖P) / (βn) of a quadratic loss. β may be chosen freely: Q is not restricted, only P is.

    Args:
        objective: whose ``parameters`` are the mean.
        curvature: h, the diagonal of the mean loss' Hessian, Gauss-Newton or Fisher matrix
            (``curvature.diagonal(...)``; entries below 0 count as 0), or a trace, which is spread evenly.
        n: samples of the bound.
        prior_mean: v, chosen without the samples of the bound: initial weights, or those of another split.
        prior_variance: λ, chosen without them; None takes the best from the grid and pays ``price``.

    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> q = from_curvature(Objective(model, torch.nn.MSELoss(), (torch.eye(2), torch.zeros(2, 1))), 20.0, 100,
    ...                    prior_variance=1.0)
    >>> round(q.variance[0][0, 0].item(), 6)             # 1 / (100 · 10 + 1)
    0.000999
    """
    w = [parallel.full(p.detach()).clone() for p in objective.parameters]
    v = _prior(prior_mean, w)
    d = sum(t.numel() for t in w)
    if isinstance(curvature, (int, float, Scalar)):
        h = [torch.full_like(t, float(curvature) / d) for t in w]
    else:
        h = list(curvature.values if isinstance(curvature, Diagonal) else curvature)
    if [t.shape for t in h] != [t.shape for t in w]:
        raise ValueError("curvature must hold one tensor for each parameter that requires a gradient, of its shape")
    h = [t.detach().double().clamp(min=0) * (beta * n) for t in h]
    price = 0.0
    if prior_variance is None:
        distance = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(w, v, strict=True))

        def cost(j: int) -> float:
            at = _on_grid(j)
            ratios = [h_i * at for h_i in h]
            spread = sum(float((r.log1p() - r / (1 + r)).sum()) for r in ratios)
            return 0.5 * (spread + distance / at) + _price(j)

        j = _least(cost)
        prior_variance, price = _on_grid(j), _price(j)
    elif not prior_variance > 0:
        raise ValueError(f"prior_variance must be positive, got {prior_variance}")
    s = [(1 / (h_i + 1 / prior_variance)).to(t) for h_i, t in zip(h, w, strict=True)]
    return Gaussian(mean=w, variance=s, prior_mean=v, prior_variance=prior_variance, price=price,
                    settings={"beta": beta, "n": n})


def optimized(objective: Objective, n: int, *, prior_mean: Sequence[Tensor] | float, start: Gaussian | None = None,
              delta: float = 0.05, steps: int = 2000, lr: float = 1e-3, scale: float = 1 / math.log(2),
              seed: int | torch.Generator = 0) -> Gaussian:
    """Q and λ by gradient descent on the Seeger bound of a differentiable loss, from the present weights.

    Minimises p(q, c) = sup {p: kl(q‖p) ≤ c} at q = E_Q loss · scale and c = (KL + price + ln(2√n/δ)) / n, over w, ln s
    and ln λ, with one draw of weights and one batch a step, by Adam; then rounds λ to the grid. Differs from the paper
    in descending on the inverted bound in place of McAllester's.

    Args:
        objective: of the samples of the bound, with a loss that is above 1 / scale wherever the class is wrong.
        n: how many samples they are.
        prior_mean: v, chosen without these samples.
        start: where to begin; by default the weights with a tenth of each tensor's root mean square as deviation.
        delta: δ of the bound.
        steps: batches; ``objective.data`` is read again and again.
        lr: of the means; ln s and ln λ move ten times as fast.
        scale: turns the loss into an upper bound of the 0-1 loss: 1 / ln 2 for cross-entropy.
        seed: of the draws.

    G. K. Dziugaite and D. Roy, arXiv 1703.11008; D. Reeb et al., arXiv 1810.12263 (the gradient of the inverse).
    """
    pac_bayes.check_delta(delta)
    if objective.ranks:
        raise ValueError("optimized() runs in one process: gather the model from DDP or FSDP2 first")
    parameters, generator = objective.parameters, vectors.seeded(seed)
    w = [p.detach().clone() for p in parameters] if start is None else [t.clone() for t in start.mean]
    v = _prior(prior_mean, w)
    if start is None:
        logs = [torch.full_like(t, math.log(max(1e-4, 0.01 * float(t.square().mean())))) for t in w]
        distance = sum(float((a - b).square().sum()) for a, b in zip(w, v, strict=True))
        first = (distance + sum(float(z.exp().sum()) for z in logs)) / sum(t.numel() for t in w)
    else:
        logs, first = [t.log() for t in start.variance], start.prior_variance
    c, b = GRID
    log_prior = torch.tensor(math.log(min(first, c * math.exp(-1 / b))), dtype=torch.float64)
    optimizer = torch.optim.Adam([{"params": w, "lr": lr}, {"params": [*logs, log_prior], "lr": 10 * lr}],
                                 betas=(0.9, 0.99))
    space, d = vectors.Space(parameters), sum(t.numel() for t in w)
    q = math.nan
    with objective.session(), perturbed.displaced(parameters, [torch.zeros_like(t) for t in w]), torch.enable_grad():
        for batch in _endless(objective, steps):
            at = float(log_prior.exp())
            noise = space.random(generator)
            deviations = [(z / 2).exp() for z in logs]
            with torch.no_grad():
                for p, w_i, xi, deviation in zip(parameters, w, noise, deviations, strict=True):
                    p.copy_(w_i + xi * deviation)
            loss = batch.loss(batch.outputs())
            g = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
            now = float(loss.detach()) * scale
            q = now if math.isnan(q) else 0.95 * q + 0.05 * now
            shift = sum(float((a - o).square().sum()) for a, o in zip(w, v, strict=True))
            mass = sum(float(z.exp().sum()) for z in logs)
            kl = 0.5 * ((mass + shift) / at - d - sum(float(z.sum()) for z in logs) + d * math.log(at))
            j = max(b * math.log(c / at), 1.0)
            of_loss, of_kl = _slopes(min(max(q, 1e-3), 0.9), (kl + _price(j) + math.log(2 * math.sqrt(n) / delta)) / n)
            for w_i, z, v_i, g_i, xi, deviation in zip(w, logs, v, g, noise, deviations, strict=True):
                w_i.grad = of_loss * scale * g_i + of_kl / n / at * (w_i - v_i)
                z.grad = of_loss * scale * 0.5 * g_i * xi * deviation + of_kl / n * 0.5 * (deviation.square() / at - 1)
            slope = 0.5 * (d - (mass + shift) / at) - 2 / max(math.log(c / at), 1 / b)
            log_prior.grad = torch.tensor(of_kl / n * slope, dtype=torch.float64)
            optimizer.step()
            log_prior.clamp_(max=math.log(c) - 1 / b)
    for t in (*w, *logs):
        t.grad = None
    s = [z.exp() for z in logs]
    below = max(1, int(b * math.log(c / math.exp(float(log_prior)))))
    found = [Gaussian(mean=w, variance=s, prior_mean=v, prior_variance=_on_grid(j), price=_price(j),
                      settings={"steps": steps, "lr": lr, "delta": delta, "n": n}) for j in (below, below + 1)]
    return min(found, key=lambda posterior: posterior.kl.value + posterior.price)


def zero_one(outputs: Any, batch: Any) -> Tensor:
    """Whether each sample's class is wrong, (N,): of logits (N, K), of one logit (N,) or (N, 1) with targets 0 and 1,
    or as a share of valid positions of sequences (N, T, K).
    """
    z = batches.logits(outputs)
    if isinstance(batch, Mapping) or not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise ValueError("the 0-1 loss is known for batches (inputs, targets): pass error=, a function (outputs, "
                         "batch) -> losses in [0, 1], one for each independent sample")
    y = batch[1]
    if z.dim() == 1 or z.shape[-1] == 1:
        return ((z.reshape(-1) > 0) != (y.reshape(-1) > 0.5)).double()
    if z.shape[:-1] != y.shape:
        raise ValueError(f"outputs {tuple(z.shape)} and targets {tuple(y.shape)} are not classes last: pass error=")
    wrong, valid = (z.argmax(-1) != y).double().flatten(1) if y.dim() > 1 else (z.argmax(-1) != y).double()[:, None], \
        (y != -100).double().reshape(len(y), -1)
    return (wrong * valid).sum(1) / valid.sum(1).clamp(min=1)


def risk(objective: Objective, posterior: Gaussian, *, draws: int = 200, delta: float = 0.01,
         error: Errors = zero_one, seed: int | torch.Generator = 0) -> Risk:
    """E_Q of the error rate over the objective's data by Monte Carlo, with an upper end for what draws leave open.

    For m independent draws kl(mean‖E_Q) ≤ ln(2/δ) / m with probability 1 − δ.

    Args:
        objective: the model and the samples; its loss is not used.
        draws: m; each is one pass over the data.
        delta: δ.
        error: ``error(outputs, batch)`` -> losses in [0, 1], one a sample.

    J. Langford and R. Caruana, NeurIPS 2001.
    """
    pac_bayes.check_delta(delta)
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}")
    parameters, generator = objective.parameters, vectors.seeded(seed)
    if [t.shape for t in posterior.mean] != [p.shape for p in parameters]:
        raise ValueError("the posterior is over other parameters than those of this objective that require a gradient")
    space = vectors.Space(parameters)
    rates, n = [], 0
    with objective.session(), torch.no_grad():
        for _ in range(draws):
            noise = space.random(generator)
            shift = [parallel.part(m, p) - parallel.local(p.detach()) + xi * parallel.part(s, p).sqrt()
                     for m, p, xi, s in zip(posterior.mean, parameters, noise, posterior.variance, strict=True)]
            with perturbed.displaced(parameters, shift):
                wrong, n = _error_rate(objective, error)
            rates.append(wrong)
    mean, stderr = moments(rates)
    upper = pac_bayes.kl_inverse(mean, math.log(2 / delta) / draws).value
    return Risk(value=mean, stderr=stderr if draws > 1 else math.nan, upper=upper, delta=delta, draws=draws, samples=n,
                settings={} if isinstance(seed, torch.Generator) else {"seed": seed})


def certify(objective: Objective, posterior: Gaussian, *, delta: float = 0.05, draws: int = 1000,
            monte_carlo_delta: float = 0.01, error: Errors = zero_one, seed: int | torch.Generator = 0) -> Certificate:
    """The Seeger bound on the risk of weights drawn from Q, which holds with probability 1 − δ, everything included.

    kl(r‖risk) ≤ (KL(Q‖P) + price + ln(2√n / (δ − δ'))) / n, with r the upper end of E_Q of the empirical risk at
    δ' = ``monte_carlo_delta`` and n the samples of the objective. Fresh draws for one posterior: who certifies several
    and keeps the best must divide δ' among them.

    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> x = torch.cat([torch.full((200, 1), 1.0), torch.full((200, 1), -1.0)])
    >>> objective = Objective(model, torch.nn.BCEWithLogitsLoss(), (x, (x > 0).to(x)))
    >>> q = Gaussian(mean=[torch.full((1, 1), 1.0)], variance=[torch.full((1, 1), 0.1)],
    ...              prior_mean=[torch.zeros(1, 1)], prior_variance=1.0)
    >>> print(certify(objective, q, draws=500))
    risk of Q ≤ 0.04562 with probability 0.95 (Seeger and Maurer)
    """
    pac_bayes.check_delta(delta)
    if not 0 < monte_carlo_delta < delta:
        raise ValueError(f"monte_carlo_delta is a part of delta={delta} and must be between 0 and it, got "
                         f"{monte_carlo_delta}")
    found = risk(objective, posterior, draws=draws, delta=monte_carlo_delta, error=error, seed=seed)
    kl = posterior.kl.value
    bound = pac_bayes.seeger(found.upper, kl + posterior.price, found.samples, delta - monte_carlo_delta)
    return Certificate(value=bound.value, theorem=bound.theorem, empirical=found.upper, kl=kl, n=found.samples,
                       delta=delta, vacuous=bound.vacuous, risk=found, price=posterior.price,
                       settings=dict(posterior.settings) | {"prior_variance": posterior.prior_variance})


def _error_rate(objective: Objective, error: Errors) -> tuple[float, int]:
    """The mean of the losses of all samples on all ranks, and how many they are."""
    total = count = 0.0
    for batch in objective.weighted_batches():
        losses = error(batch.outputs(), batch.data)
        if losses.dim() != 1 or not bool(((losses >= 0) & (losses <= 1)).all()):
            raise ValueError("error(outputs, batch) must return one loss in [0, 1] a sample, (N,), as the theorem "
                             f"needs; got shape {tuple(losses.shape)}, {float(losses.min()):.4g} to "
                             f"{float(losses.max()):.4g}")
        if batch.weight > 0:
            total, count = total + float(losses.double().sum()), count + len(losses)
    total, count = objective.ranks.total(total, count)
    return total / count, int(count)


def _prior(prior_mean: Sequence[Tensor] | float, w: Sequence[Tensor]) -> list[Tensor]:
    if isinstance(prior_mean, (int, float)):
        return [torch.full_like(t, float(prior_mean)) for t in w]
    v = [t.detach().to(like).clone() for t, like in zip(prior_mean, w, strict=False)]
    if len(prior_mean) != len(w) or [t.shape for t in v] != [t.shape for t in w]:
        raise ValueError("prior_mean must hold one tensor for each parameter that requires a gradient, of its shape")
    return v


def _on_grid(j: float) -> float:
    return GRID[0] * math.exp(-j / GRID[1])


def _price(j: float) -> float:
    return math.log(math.pi**2 / 6) + 2 * math.log(j)


def _least(cost: Callable[[int], float]) -> int:
    """The j of the smallest cost, looked for ever more closely around the best so far."""
    best, width = 1001, 1000
    while width:
        step = max(1, width // 20)
        best = min(range(max(1, best - width), best + width + 1, step), key=cost)
        width = 0 if step == 1 else step
    return best


def _slopes(q: float, c: float) -> tuple[float, float]:
    """∂p/∂q and ∂p/∂c of the inverse p(q, c)."""
    p = min(max(pac_bayes.kl_inverse(q, c).value, q + 1e-9), 1 - 1e-9)
    of_p = (1 - q) / (1 - p) - q / p
    return (math.log((1 - q) / (1 - p)) - math.log(q / p)) / of_p, 1 / of_p


def _endless(objective: Objective, steps: int) -> Iterator[Any]:
    """``steps`` batches, from the data again and again."""
    done = 0
    while done < steps:
        for batch in objective.weighted_batches():
            if done == steps:
                return
            done += 1
            yield batch
