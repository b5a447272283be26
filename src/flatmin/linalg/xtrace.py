"""XTrace: the trace from probes each of which serves the range and the rest in turn."""

from __future__ import annotations

import torch
from torch import Tensor

from ..progress import Report
from .basis import Basis
from .checkpoint import Checkpoint, State
from .confidence import Drawn, add_forms, enough, exact_is_cheaper, moments
from .operator import CurvatureOperator, Forms

LEAST_PROBES = 16


def append_orthonormal(operator: CurvatureOperator, Q: Basis, i: int, y: Tensor, generator: torch.Generator) -> Tensor:
    """Row i of Q ← y made orthonormal to the rows before (or a random vector, where y depends on them).

    Returns the coefficients (i + 1,) of y along the rows, the last one 0 where y was dependent.
    """
    before = operator.norm(y)
    c = Q.remove(y, i)
    c = c + Q.remove(y, i)
    length = operator.norm(y)
    dependent = length <= 100 * torch.finfo(operator.dtype).eps * before
    if dependent:
        y = operator.random(generator)
        for _ in range(3):
            y.div_(operator.norm(y))
            Q.remove(y, i)
    Q.put(i, y, 1 / operator.norm(y))
    return torch.cat([c, torch.tensor([0.0 if dependent else length], dtype=torch.float64)])


def xtrace(operator: CurvatureOperator, rtol: float, confidence: float, generator: torch.Generator, most: int,
           report: Report, saver: Checkpoint) -> Drawn:
    """Grow Q and the probes together, doubling, until the leave-one-out error is small enough."""
    limit = max(2, min(most // 2, operator.size - 1 if operator.size > 1 else 1))
    saved, none = saver.saved, torch.zeros(0, 0, dtype=torch.float64)
    goal, predicted = saved.get("goal", min(LEAST_PROBES, limit)), saved.get("predicted", 0)
    probes: list[Tensor] = [z.to(operator.device) for z in saved.get("probes", [])]
    q: list[Tensor] = list(saved.get("Q", []))
    R, H, square = saved.get("R", none), saved.get("H", none), saved.get("square", none)
    forms: Forms | None = saved.get("forms")

    def state() -> State:
        return {"goal": goal, "predicted": predicted, "probes": list(probes), "Q": Q.rows[:len(probes)], "R": R, "H": H,
                "square": square, "forms": forms, "matvecs": 2 * len(probes)}

    while True:
        Q = Basis(operator, goal)
        for i, row in enumerate(q):
            Q.put(i, row.to(operator.device))
        R, H, square = (torch.nn.functional.pad(t, (0, goal - len(t), 0, goal - len(t))) for t in (R, H, square))
        for i in range(len(probes), goal):
            z = operator.random(generator)
            y, here = operator.matvec_with_forms(z)
            square[i, i] = operator.dot(z, y)
            R[:i + 1, i] = append_orthonormal(operator, Q, i, y, generator)
            az = operator.matvec(Q[i])
            H[:i + 1, i] = H[i, :i + 1] = Q.project(az, i + 1).to("cpu", torch.float64)
            probes.append(z)
            forms = add_forms(forms, here)
            saver.tick(state)
            report(2 * (i + 1), f"of about {2 * goal}", 2 * (goal - i - 1))
        W = torch.stack([Q.project(z, goal).to("cpu", torch.float64) for z in probes], 1)
        q, done = list(Q.rows), goal
        lengths = torch.tensor([operator.norm(z) ** 2 for z in probes], dtype=torch.float64)
        samples = _leave_one_out(R, H, W, square.diagonal(), lengths, operator.size)
        mean, stderr = moments(samples)
        good = enough(mean, stderr, rtol, confidence, done)
        needed = done if good else done * (stderr / max(rtol * abs(mean), 1e-300)) ** 2
        predicted = predicted or int(min(2 * needed, 2**62))
        # where the spectrum decays, errors fall faster than ``needed`` assumes: two doublings at most
        more = 2 * (min(needed, 4 * done, limit) - done)
        prefer_exact = not good and exact_is_cheaper(operator, more, most - 2 * done)
        if good or prefer_exact or done >= limit:
            return Drawn(value=mean, stderr=stderr, samples=done, matvecs=2 * done, predicted=predicted,
                         prefer_exact=prefer_exact, magnitude=float(H.diagonal().abs().sum()),
                         forms=add_forms(None, forms, 1 / done))
        goal = min(2 * goal, limit)


def _leave_one_out(R: Tensor, H: Tensor, W: Tensor, zaz: Tensor, lengths: Tensor, n: int) -> list[float]:
    """The XTrace estimates, one a probe: QᵢQᵢᵀ = Q(I − s sᵀ)Qᵀ is the range without probe i, s ∝ R⁻ᵀ eᵢ.

    With p the coordinates of the projected probe, μ = z − Qp: tr QᵢᵀAQᵢ + (n − N + 1) μᵀAμ / ‖μ‖², the last factor
    because only the direction of a normal probe matters.
    """
    size = len(R)
    scale = R.diagonal().abs().max().clamp(min=torch.finfo(torch.float64).tiny)
    safe = R + torch.diag(torch.where(R.diagonal().abs() < 1e-12 * scale, scale * 1e-12, 0.0))
    S = torch.linalg.solve_triangular(safe.T, torch.eye(size, dtype=torch.float64), upper=False)
    S = S / torch.linalg.vector_norm(S, dim=0)
    P = W - S * (S * W).sum(0)
    rest = zaz - 2 * (P * R).sum(0) + (P * (H @ P)).sum(0)
    mu = (lengths - (P * P).sum(0)).clamp(min=1e-300)
    return (H.trace() - (S * (H @ S)).sum(0) + (n - size + 1) * rest / mu).tolist()
