"""What a measurement says, in plain sentences made from its numbers."""

from __future__ import annotations

import math

from ..results import uncertain
from .fields import items, number, numbers, section
from .formatting import error_of, signed, significant
from .measure_record import MeasureRecord


def headline(m: MeasureRecord) -> str:
    """Sharpness and curvature, as far as they were measured."""
    value, pairs = m.get("one_step"), m.pairs()
    rise = f"Loss {signed(significant(value))} one step uphill" if math.isfinite(value) else ""
    top = significant(pairs[0].value) if pairs else ""
    if rise and top:
        return f"{rise}, largest curvature {top}"
    return f"The largest Hessian eigenvalue is {top}" if top else rise or f"What was measured of {m.name}"


def sentence(m: MeasureRecord) -> str:
    """One-step sharpness, the largest eigenvalue and the share of zero eigenvalues, in words."""
    return " ".join(filter(None, (_step(m), _curvature(m), _zeros(m)))) or "Nothing was measured yet."


def _step(m: MeasureRecord) -> str:
    value, parts = m.get("one_step"), m.parts()
    if not math.isfinite(value):
        return ""
    moved = (f"A step of length {m.rho:g} uphill {'raises' if value >= 0 else 'lowers'} the loss from "
             f"{significant(m.loss)} by {significant(abs(value))}")
    if "RoundingWarning" in items(m.result("one_step").get("warnings")):
        return f"{moved}, which is within rounding: take a larger ρ."
    size = sum(map(abs, parts.values()))
    if not size:
        return f"{moved}."
    shares = {key: f"{100 * abs(v) / size:.0f} %" for key, v in parts.items()}
    if not m.explained():
        return (f"{moved}. Such a step is beyond the range of slope and curvature at the point, which leave "
                f"{significant(parts['remainder'])} unexplained ({shares['remainder']} of all parts): a smaller ρ "
                "would tell them apart.")
    if abs(parts["first_order"]) > size / 2:
        return (f"{moved}, mostly by the slope ({shares['first_order']}): the gradient leads, so this is not yet the "
                "sharpness of a minimum.")
    if abs(parts["second_order"]) > size / 2:
        return f"{moved}, mostly by curvature ({shares['second_order']})."
    return f"{moved}, by the slope ({shares['first_order']}) and curvature ({shares['second_order']})."


def _curvature(m: MeasureRecord) -> str:
    if not m.pairs():
        return ""
    top, residual, data, converged = m.pairs()[0]
    if not converged:
        return (f"The largest Hessian eigenvalue was not found to the tolerance asked for (so far {significant(top)}, "
                f"residual {error_of(residual)}).")
    rate = f", and a stable learning rate of plain gradient descent lies below 2/λ₁ = {significant(2 / top)}" \
        if top > 0 else ""
    found = f"{significant(top)} within {error_of(residual)}" if not data > 0 else (
        f"{uncertain(top, data)} over batches (computed to {error_of(residual)})")
    return f"The largest Hessian eigenvalue is {found}{rate}."


def _zeros(m: MeasureRecord) -> str:
    zero = section(m.result("density"), "mass_at_zero")
    bounds, share, error = (numbers(section(zero, "settings").get("bounds")), 100 * number(zero.get("value")),
                            100 * number(zero.get("stderr")))
    if len(bounds) == 2 and bounds[1] - bounds[0] > 0.5:
        return (f"Between {100 * bounds[0]:.0f} and {100 * bounds[1]:.0f} % of all eigenvalues are next to zero; more "
                "steps of Lanczos would resolve it.")
    spread = f" ± {error:.2g}" if error > 0 else ""
    return f"{share:.0f}{spread} % of all eigenvalues are next to zero." if math.isfinite(share) else ""
