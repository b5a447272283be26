"""The sharpness measures by name; what each is and costs stands in ``flatmin.measures``."""

from __future__ import annotations

import math
from typing import Any

from ..batches import samples_in
from ..measures import Options, bind
from ..objective import Objective
from .agreement import agreement
from .average_case import average_case, largest_random
from .critical import critical_sharpness, edge_of_stability, update_of
from .flatness import normalized_flatness
from .one_step import first_order, one_step
from .variants import m_sharpness
from .worst_case import WorstCase, worst_case

QUICK_ASCENT: dict[str, Any] = {"iterations": 10, "restarts": 0}


def learning_rate(options: Options) -> float:
    """That of the optimizer's first group.

    Raises:
        ValueError: no optimizer.
    """
    if options.optimizer is None:
        raise ValueError("edge_of_stability needs the learning rate: pass optimizer=")
    return float(options.optimizer.param_groups[0]["lr"])


def _ascent(objective: Objective, options: Options, adaptive: bool) -> WorstCase:
    return worst_case(objective, options.rho, adaptive=adaptive, seed=options.seed,
                      **(QUICK_ASCENT if options.quick else {}))


def _m_sharpness(objective: Objective, options: Options) -> Any:
    """Four chunks of the data, of 128 samples at most."""
    samples = sum(samples_in(batch) for batch in objective.data)
    return m_sharpness(objective, max(1, min(128, math.ceil(samples / 4))), options.rho, seed=options.seed,
                       **QUICK_ASCENT)


def _critical(objective: Objective, options: Options) -> Any:
    """Along the optimizer's own next update where there are gradients for one."""
    if options.optimizer is None:
        return critical_sharpness(objective)
    w = objective.parameters
    update = update_of(options.optimizer, w) if any(p.grad is not None for p in w) else None
    return critical_sharpness(objective, update, lr=learning_rate(options))


MEASURES = bind("sharpness", {
    "one_step": lambda o, a: one_step(o, a.rho, second_order=not (a.value_only or a.quick)),
    "first_order": lambda o, a: first_order(o, a.rho),
    "worst_case": lambda o, a: _ascent(o, a, False),
    "adaptive_worst_case": lambda o, a: _ascent(o, a, True),
    "average_case": lambda o, a: average_case(o, a.rho, samples=20 if a.quick else 100, seed=a.seed),
    "largest_random": lambda o, a: largest_random(o, a.rho, seed=a.seed),
    "m_sharpness": _m_sharpness,
    "normalized_flatness": lambda o, a: normalized_flatness(o, samples=30 if a.quick else 100, seed=a.seed),
    "critical_sharpness": _critical,
    "edge_of_stability": lambda o, a: edge_of_stability(o, learning_rate(a), seed=a.seed),
    "agreement": lambda o, a: agreement(o, a.rho, seed=a.seed),
})
