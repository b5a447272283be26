"""The largest rise of the loss found in a ball around the weights."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from .. import parallel, perturbed, vectors
from ..curvature import Hessian
from ..objective import Objective
from ..results import PerBatch, Scalar
from .cautions import warn_of, warn_of_rounded_step, warn_of_rounding
from .scaling import Adaptive, check_p, project, scaled, scales, steepest
from .trust_region import trust_region

Start = Literal["gradient", "random"]
MOMENTUM, KEEP = 0.75, 0.75


@dataclass(frozen=True, kw_only=True)
class WorstCase(Scalar):
    """``value`` = the largest L(w + δ) − L(w) seen, a lower bound of the maximum, and how it was reached."""

    data_stderr: float = math.nan       # over batches, at the best point; nan where there are fewer than five
    loss: float
    perturbed_loss: float
    norm: float                         # ‖u‖_p of the best point, δ = c ∘ u; ρ on the boundary
    displacement: float                 # ‖δ‖₂ of the best point
    start: str                          # "gradient" or "random": where the best run began
    iteration: int                      # in which iteration of it
    runs: tuple[float, ...]             # the best value of every run
    quadratic: float = math.nan         # exact maximum of the quadratic model, where asked for
    evaluations: int                    # passes over the data
    direction: list[Tensor] = field(repr=False)     # δ of the best point
    warnings: tuple[str, ...] = ()
    rises: tuple[float, ...] = field(default=(), repr=False)        # of this rank's batches, at the best point
    weights: tuple[float, ...] = field(default=(), repr=False)      # how many terms each is a mean of

    @property
    def per_batch(self) -> PerBatch:
        """The rise on each of this rank's batches, at the best point."""
        return PerBatch(values=self.rises, weights=self.weights)


def worst_case(objective: Objective, rho: float = 0.05, *, p: float = 2, adaptive: Adaptive | bool = "none",
               iterations: int = 20, restarts: int = 2, seed: int | torch.Generator = 0,
               quadratic: bool = False) -> WorstCase:
    """Worst-case sharpness, max L(w + δ) − L(w) over δ = c ∘ u with ‖u‖_p ≤ ρ, by projected ascent with restarts.

    Ascent in u: u ← ¾ P(u + s v) + ¼ (the last u) + ..., v the unit vector of steepest ascent (c∘g/‖c∘g‖ or sign c∘g)
    and P the projection on the ball. s begins at 2ρ and is halved, going back to the best point, where fewer than
    three of four steps since the last look were ascents or nothing better was found (Auto-PGD). The first run begins
    at w, the others at random points of the ball; all values are true losses, so the result is a lower bound.

    Args:
        objective: L.
        rho: the radius. A plain ρ of 0.25 to 2 (p = 2) is usual for a ResNet-18; adaptive and p = ∞ want far smaller
            ones.
        p: 2 or ``math.inf``.
        adaptive: "none" (c = 1), "element" (c = |w|), "filter" or "layer" (the root mean square of the slice or
            tensor). With "element" the value does not change when a ReLU network is rescaled. Where w is zero, c is
            zero, and the weight stays.
        iterations: of one run; each takes one forward and one backward pass.
        restarts: runs from random points, besides the one from w.
        quadratic: also the exact maximum of the quadratic model (``trust_region``), from a dense Hessian: for p = 2
            and at most 2000 parameters.

    Returns:
        ``.value .data_stderr .norm .start .iteration .runs .quadratic .direction .evaluations``; never below 0, since
        δ = 0 counts. ``data_stderr`` is the standard error over batches of the rise at this δ (no other is searched
        for), where the data are five batches or more.

    Raises:
        ValueError: a radius that is not positive, an unknown p or adaptive, or a quadratic model that cannot be had.

    >>> import torch
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> torch.nn.init.zeros_(model.weight).requires_grad
    True
    >>> x = torch.tensor([[2.0, 0.0], [0.0, 1.0]]).repeat(4, 1)
    >>> s = worst_case(Objective(model, torch.nn.MSELoss(), (x, torch.zeros(8, 1))), rho=0.5)   # ½ρ²λ₁, λ₁ = 4
    >>> round(float(s), 3), s.start
    (0.5, 'random')

    M. Andriushchenko et al., arXiv 2302.07011; F. Croce, M. Hein, arXiv 2003.01690 (Auto-PGD).
    """
    if not rho > 0 or iterations < 1 or restarts < 0:
        raise ValueError(f"rho and iterations must be positive, got rho={rho}, iterations={iterations}")
    p = check_p(p)
    w = objective.parameters
    generator = vectors.seeded(seed)
    with objective.session(check=True):
        at = objective.evaluate(gradient=True)
        base = float(at.loss)
        ball = _Ball(objective, vectors.Space(w), scales(w, adaptive), rho, p, base)
        model = _quadratic(objective, at.gradient, ball) if quadratic else math.nan
        best = _Best(ball.zeros(), at.losses)
        runs = [_run(ball, best, "gradient", ball.zeros(), at.gradient, iterations)]
        for _ in range(restarts if runs[0] is not None else max(restarts, 1)):
            runs.append(_run(ball, best, "random", ball.random(generator), None, iterations))
        norm = float(ball.space.norm(best.u, p))
        direction = scaled(ball.c, best.u)
        length = float(ball.space.norm(direction))
        rises = [b - a for a, b in zip(at.losses, best.losses, strict=True)]
        error = objective.data_stderr(rises, at.weights)
    found = warn_of(objective, at, value=best.value, data_stderr=error)
    rounded = warn_of_rounded_step(objective, ball.realised)[1]     # of the last step
    found += rounded or warn_of_rounding(at, best.value)
    kind = adaptive if isinstance(adaptive, str) else "element" if adaptive else "none"
    return WorstCase(value=best.value, data_stderr=error, loss=base, perturbed_loss=base + best.value, norm=norm,
                     displacement=length, start=best.start, iteration=best.iteration,
                     runs=tuple(r for r in runs if r is not None),
                     quadratic=model, evaluations=1 + ball.evaluations, direction=direction, warnings=tuple(found),
                     rises=tuple(rises), weights=at.weights,
                     settings={"rho": rho, "p": p, "adaptive": kind, "iterations": iterations, "restarts": restarts,
                               "mode": objective.mode, "samples": at.samples})


class _Ball:
    """The ball and the loss on it: ``perturb(u)`` is L(w + c∘u) − L(w) and the gradient at that point."""

    def __init__(self, objective: Objective, space: vectors.Space, c: list[Tensor] | None, rho: float, p: float,
                 base: float):
        self.objective, self.space, self.c, self.rho, self.p, self.base = objective, space, c, rho, p, base
        self.evaluations, self.realised, self.losses = 0, [], ()

    def zeros(self) -> list[Tensor]:
        return [torch.zeros_like(parallel.local(t.detach())) for t in self.space.parameters]

    def random(self, generator: torch.Generator) -> list[Tensor]:
        """A random point of the boundary (p = 2), or of the cube (p = ∞)."""
        u = self.space.random(generator, "normal" if self.p == 2 else "uniform")
        if self.p == 2:
            vectors.scale(self.rho / self.space.norm(u), u)
        else:
            for t in u:
                t.mul_(2 * self.rho).sub_(self.rho)
        return u

    def perturb(self, u: list[Tensor]) -> tuple[float, list[Tensor]]:
        self.evaluations += 1
        with perturbed.displaced(self.space.parameters, scaled(self.c, u)) as displacement:
            at = self.objective.evaluate(gradient=True)
        self.realised, self.losses = displacement.realised, at.losses
        return float(at.loss) - self.base, [g.to(t.dtype) for g, t in zip(at.gradient, u, strict=True)]


class _Best:
    """The best point seen in all runs; at first δ = 0 with a rise of 0."""

    def __init__(self, u: list[Tensor], losses: tuple[float, ...]):
        self.u, self.losses, self.value, self.start, self.iteration = u, losses, 0.0, "gradient", 0

    def offer(self, value: float, losses: tuple[float, ...], u: list[Tensor], start: Start, iteration: int) -> None:
        if value > self.value or math.isnan(value) and not math.isnan(self.value):
            self.value, self.losses, self.start, self.iteration = value, losses, start, iteration
            vectors.copy(u, self.u)


def _run(ball: _Ball, best: _Best, start: Start, u: list[Tensor], g: list[Tensor] | None,
         iterations: int) -> float | None:
    """One run of Auto-PGD; its best value, or None where the start has no direction of ascent."""
    value = 0.0
    if g is None:
        value, g = ball.perturb(u)
        best.offer(value, ball.losses, u, start, 0)
    top, top_u, top_g = value, [t.clone() for t in u], g
    last, step, ascents, since = [t.clone() for t in u], 2 * ball.rho, 0, (0, value)
    looks = _looks(iterations)
    for i in range(1, iterations + 1):
        v = steepest(ball.space, ball.c, g, ball.p)
        if v is None:
            return None if i == 1 and start == "gradient" else top
        last, u = u, _advance(ball, u, last, v, step, first=i == 1)
        before, (value, g) = value, ball.perturb(u)
        best.offer(value, ball.losses, u, start, i)
        ascents += value > before
        if value > top:
            top, top_u, top_g = value, [t.clone() for t in u], g
        if i in looks:
            begun, at_begin = since
            if ascents < KEEP * (i - begun) or top == at_begin:
                step /= 2
                u, g, value = [t.clone() for t in top_u], top_g, top
                last = [t.clone() for t in u]
            ascents, since = 0, (i, top)
    return top


def _advance(ball: _Ball, u: list[Tensor], last: list[Tensor], v: list[Tensor], step: float,
             first: bool) -> list[Tensor]:
    """P(u + ¾(P(u + s v) − u) + ¼(u − last)); without the last term in the first iteration."""
    z = [a + step * b for a, b in zip(u, v, strict=True)]
    project(ball.space, z, ball.rho, ball.p)
    if not first:
        z = [a + MOMENTUM * (b - a) + (1 - MOMENTUM) * (a - c) for a, b, c in zip(u, z, last, strict=True)]
        project(ball.space, z, ball.rho, ball.p)
    return z


def _looks(iterations: int) -> set[int]:
    """After which iterations the step is reconsidered: fractions 0.22, then gaps shrinking by 0.03 down to 0.06."""
    marks, previous, now = set(), 0.0, 0.22
    while now <= 1:
        marks.add(math.ceil(now * iterations))
        previous, now = now, now + max(now - previous - 0.03, 0.06)
    return marks


def _quadratic(objective: Objective, g: list[Tensor], ball: _Ball) -> float:
    """The maximum of the quadratic model in u: gradient c∘g, Hessian CHC."""
    size = sum(t.numel() for t in g)
    if ball.p != 2 or size > 2000:
        raise ValueError(f"the quadratic model is solved for p = 2 and at most 2000 parameters, got p={ball.p:g} and "
                         f"{size}")

    def flat(tensors: list[Tensor]) -> Tensor:
        return torch.cat([t.reshape(-1).double() for t in tensors])

    c = flat(scaled(ball.c, [torch.ones_like(t) for t in g]))
    hessian = Hessian(objective).dense().double()
    return trust_region(c * flat(g), c[:, None] * hessian * c, ball.rho).value
