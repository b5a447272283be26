"""Every measure of one model: its name, label, cost, and what its number depends on. Nothing here imports torch.

Each measuring package binds its functions to its entries in ``<package>/measure_functions.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

Radius = Literal["", "length", "coordinate"]
User = Literal["measure", "monitor", "compare"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of all measures; each measure reads those that concern it.

    ``tol`` is of eigenvalues, ``rtol`` of the trace, ``product`` says how their matvecs are computed (as for
    ``Hessian``). ``value_only`` leaves out parts that cost extra and do not change the value. ``quick`` takes fewer
    iterations or samples, as during training. ``optimizer`` gives a learning rate and an update. ``progress`` and
    ``checkpoint`` are for measures that take long.
    """

    rho: float = 0.05
    k: int = 5
    tol: float = 1e-3
    rtol: float = 0.05
    product: Any = "auto"
    seed: int = 0
    value_only: bool = False
    quick: bool = False
    optimizer: Any = None
    progress: Any = False
    checkpoint: str | None = None


Range = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a measure takes at least and at most, to predict its time and memory: passes over the data, and vectors.

    ``forward`` and ``backward`` passes, Hessian-vector products ``matvecs``, ``each`` more for every eigenvalue that is
    asked for; ``vectors`` and ``vectors_each``: as long as the weights, held at once, beside weights and gradient.
    """

    forward: Range = (0, 0)
    backward: Range = (0, 0)
    matvecs: Range = (0, 0)
    each: Range = (0, 0)
    vectors: int = 2
    vectors_each: int = 0


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One entry of the table. ``measure(objective, options)`` takes the measurement and returns its record."""

    name: str
    package: str               # the package that computes it
    label: str              # as displayed
    cost: str               # passes over the data: forward (F), backward (B), Hessian-vector products (H)
    quick_cost: str = ""    # with Options(quick=True); empty where that changes nothing
    invariant: bool = False  # whether rescaling a ReLU network without changing its function leaves the value
    random: bool = False    # whether the value may depend on the seed, beyond a tolerance
    resumable: bool = False     # whether it keeps its state in Options.checkpoint
    radius: Radius = ""     # what rho is: the length of the step, the standard deviation of each coordinate; "": no rho
    work: Work = Work()     # of what ``flatmin measure`` takes
    users: tuple[User, ...] = ()    # "measure": flatmin measure; "monitor": SharpnessMonitor; "compare": compare
    function: Callable[[Any, Options], Any] | None = None

    def __call__(self, objective: Any, options: Options = Options()) -> Any:
        assert self.function is not None, f"{self.name} is an entry without a function: take it from its package"
        return self.function(objective, options)

    def cost_for(self, user: User) -> str:
        """The cost with the settings that ``user`` takes."""
        return self.quick_cost or self.cost if user == "monitor" else self.cost


ALL = (
    Measure(name="one_step", package="sharpness", label="one-step sharpness", cost="2F + B + H", quick_cost="2F + B",
            radius="length",
            work=Work(forward=(2, 2), backward=(1, 1), matvecs=(1, 1)),
            users=("measure", "monitor", "compare")),
    Measure(name="first_order", package="sharpness", label="first-order sharpness", cost="F + B", radius="length",
            users=("monitor",)),
    Measure(name="spectrum", package="curvature", label="largest eigenvalues", cost="20 to 60 H", resumable=True,
            work=Work(matvecs=(15, 45), each=(1, 3), vectors=42, vectors_each=5),
            users=("measure",)),
    Measure(name="largest_eigenvalue", package="curvature", label="largest eigenvalue", cost="20 to 60 H",
            work=Work(matvecs=(20, 60), vectors=45),
            users=("monitor", "compare")),
    Measure(name="trace", package="curvature", label="trace", cost="up to 1000 H", random=True, resumable=True,
            work=Work(matvecs=(10, 1000)),
            users=("measure",)),
    Measure(name="density", package="curvature", label="density", cost="up to 480 H", random=True, resumable=True,
            work=Work(matvecs=(480, 480), vectors=62),
            users=("measure",)),
    Measure(name="worst_case", package="sharpness", label="worst case", cost="63 (F + B)", quick_cost="11 (F + B)",
            random=True, radius="length",
            work=Work(forward=(63, 63), backward=(63, 63), vectors=4),
            users=("measure", "monitor", "compare")),
    Measure(name="adaptive_worst_case", package="sharpness", label="adaptive worst case", cost="63 (F + B)",
            quick_cost="11 (F + B)", invariant=True, random=True, radius="length",
            work=Work(forward=(63, 63), backward=(63, 63), vectors=4),
            users=("measure", "monitor", "compare")),
    Measure(name="average_case", package="sharpness", label="average case", cost="101 F", quick_cost="21 F",
            random=True, radius="coordinate",
            work=Work(forward=(101, 101)),
            users=("measure", "monitor")),
    Measure(name="largest_random", package="sharpness", label="largest random rise", cost="21 F", random=True,
            radius="length",
            work=Work(forward=(21, 21)),
            users=("measure",)),
    Measure(name="m_sharpness", package="sharpness", label="m-sharpness", cost="11 (F + B)", radius="length",
            work=Work(forward=(11, 11), backward=(11, 11), vectors=4),
            users=("measure",)),
    Measure(name="normalized_flatness", package="sharpness", label="normalized flatness", cost="up to 100 H",
            quick_cost="up to 30 H", invariant=True, random=True,
            work=Work(forward=(1, 1), matvecs=(10, 100), vectors=3),
            users=("measure", "monitor", "compare")),
    Measure(name="critical_sharpness", package="sharpness", label="critical sharpness",
            cost="6 to 12 F, and F + B where no update is at hand",
            work=Work(forward=(7, 20), backward=(1, 1)),
            users=("measure", "monitor")),
    Measure(name="edge_of_stability", package="sharpness", label="distance to the edge of stability", cost="20 to 60 H",
            users=("monitor",)),
    Measure(name="agreement", package="sharpness", label="agreement", cost="46F + 43B and 20 to 60 H",
            random=True, radius="length",
            work=Work(forward=(46, 46), backward=(43, 43), matvecs=(10, 60), vectors=45),
            users=("measure",)),
    Measure(name="line", package="landscape", label="line", cost="159 F", random=True,
            work=Work(forward=(159, 159), vectors=4),
            users=("measure",)),
    Measure(name="surface", package="landscape", label="surface", cost="2603 F", random=True, resumable=True,
            work=Work(forward=(2603, 2603), vectors=4),
            users=("measure",)),
    Measure(name="sharpness_paths", package="paths", label="share of the logit path",
            cost="F + B, 2 H and the errors over batches", quick_cost="F + B and 2 H"),
    Measure(name="weight_noise", package="generalization", label="rise under weight noise", cost="21 F and up to 100 H",
            random=True),
    Measure(name="quantized", package="generalization", label="rise at 4-bit weights", cost="3F + B + H"),
    Measure(name="pruned", package="generalization", label="rise with half of the weights", cost="3F + B + H"),
    Measure(name="truncated", package="generalization", label="rise at half rank", cost="3F + B + H"),
)
"""All measures, in the order in which ``flatmin measure`` takes them."""

METRICS = {measure.name: measure for measure in ALL if "measure" in measure.users}
"""What ``flatmin measure --metrics`` offers."""

DEFAULT_METRICS = "one_step,spectrum,trace,density"


def offered(user: User) -> tuple[str, ...]:
    """The names that a user of the table offers."""
    return tuple(measure.name for measure in ALL if user in measure.users)


def bind(package: str, functions: Mapping[str, Callable[[Any, Options], Any]]) -> dict[str, Measure]:
    """The entries of a package with their functions; every entry needs a function, and every function an entry."""
    entries = {measure.name: measure for measure in ALL if measure.package == package}
    assert entries.keys() == functions.keys(), f"{package}: {sorted(entries.keys() ^ functions.keys())}"
    return {name: replace(measure, function=functions[name]) for name, measure in entries.items()}


def find_metrics(text: str) -> list[str]:
    """The names in ``a,b,c`` or "all", in the order in which they are measured.

    Raises:
        ValueError: an unknown name; the message lists the choices.
    """
    names = [part.strip() for part in text.split(",") if part.strip()]
    unknown = [name for name in names if name not in METRICS and name != "all"]
    if unknown or not names:
        raise ValueError(f"unknown metric {', '.join(map(repr, unknown)) or repr(text)}: choose from "
                         f"{', '.join(METRICS)}, or all")
    return [name for name in METRICS if name in names or "all" in names]
