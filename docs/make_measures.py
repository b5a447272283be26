"""Write ``docs/measures.md``, the table of measures, from the table itself: ``python docs/make_measures.py``."""

from __future__ import annotations

from pathlib import Path

from flatmin.measures import ALL, Measure

PAGE = Path(__file__).with_name("measures.md")

HEAD = """# The measures

Generated from `flatmin.measures` by `python docs/make_measures.py`. Each package binds its functions to its rows in
`flatmin.<package>.measures.MEASURES`; `flatmin.jobs.measures.MEASURES` joins them. A measure is called as
`MEASURES["worst_case"](objective, Options(rho=0.05, seed=0))` and returns its record.

* **Cost** is in passes over the data: forward (F), backward (B) and Hessian-vector products (H). The first measurement
  of an objective takes two more F, to see whether it is deterministic.
* **ρ** is the length of the step, or the standard deviation of each coordinate.
* **Invariant**: rescaling a ReLU network without changing its function does not change the value.
* **Random**: the value may depend on the seed, beyond the tolerance of an iteration.
* **Offered by** `flatmin measure --metrics`, `SharpnessMonitor` (with its own cost, where that is smaller) and
  `sharpness.compare`. The `sharpness_methods` of `flatmin.tensorscope` are those of `flatmin measure`.

| name | what it is | package | cost | cost in the monitor | ρ | invariant | random | offered by |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""


def row(measure: Measure) -> str:
    """One line of the table."""
    monitored = measure.cost_for("monitor") if "monitor" in measure.users else ""
    cells = (f"`{measure.name}`", measure.label, measure.room, measure.cost, monitored, measure.radius,
             "yes" if measure.invariant else "", "yes" if measure.random else "", ", ".join(measure.users))
    return f"| {' | '.join(cells)} |"


def page() -> str:
    """The whole page."""
    return HEAD + "".join(f"{row(measure)}\n" for measure in ALL)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
