"""The monitor: right numbers at the right steps through each kind of logger, on a run that is the same run."""

import math

import pytest
import torch

from flatmin import Objective
from flatmin.sharpness import SharpnessMonitor, edge_of_stability, one_step
from flatmin.sharpness.monitor import COSTS
from problems import NoisyNet, assert_same, batch, build, flat, loss_fn

pytestmark = pytest.mark.filterwarnings("ignore::flatmin.sharpness.SharpnessWarning")


class Dict:
    def __init__(self):
        self.rows = []

    def log_dict(self, values):
        self.rows.append((None, values))


class Scalars:
    def __init__(self):
        self.rows = []

    def add_scalar(self, name, value, step):
        self.rows.append((step, {name: value}))


class Log:
    def __init__(self):
        self.rows = []

    def log(self, values, step=None):
        self.rows.append((step, values))


class PlainLog(Log):
    def log(self, values):
        self.rows.append((None, values))


class Metrics(Scalars):
    """A logger of Lightning; Comet's has another second argument, so that the step must come by its name."""

    def log_metrics(self, metrics, prefix=None, step=None):
        self.rows.append((step, metrics))

    def add_scalar(self, name, value, step):
        raise AssertionError("log_metrics goes first")

    log_dict = log = add_scalar


class DictWithStep(Dict):
    """Lightning Fabric."""

    def log_dict(self, values, step=None):
        self.rows.append((step, values))

    def log(self, name, value, step=None):
        raise AssertionError("log_dict goes before log")


class LogAndScalars(Log):
    def add_scalar(self, name, value, step):
        raise AssertionError("log goes before add_scalar")


class Keywords(Log):
    def log(self, values, **options):
        self.rows.append((options["step"], values))


def train(monitor=None, steps=7):
    model = build(NoisyNet)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    watch = monitor(Objective(model, loss_fn, batch(99)), optimizer) if monitor else None
    torch.manual_seed(1)
    for step in range(steps):
        optimizer.zero_grad()
        loss_fn(model(batch(step)[0]), batch(step)[1]).backward()
        optimizer.step()
        if watch:
            watch.step()
    return model, watch


def test_a_monitored_run_is_the_same_run():
    plain = train()[0]
    model, monitor = train(lambda o, opt: SharpnessMonitor(o, list(COSTS), every=3, optimizer=opt))
    assert_same(flat(model), flat(plain))
    for a, b in zip(model.state_dict().values(), plain.state_dict().values(), strict=True):
        assert_same(a, b)
    assert [row["step"] for row in monitor.history] == [0, 3, 6]
    assert set(monitor.history[0]) == {"step", "sharpness/overhead", *(f"sharpness/{name}" for name in COSTS)}
    assert 0 < monitor.overhead < 1


@pytest.mark.parametrize("kind", [Metrics, Dict, DictWithStep, Scalars, Log, PlainLog, LogAndScalars, Keywords])
def test_the_step_arrives_at_every_logger(kind):
    """As an argument where the logger takes one, among the numbers where it does not."""
    logger = kind()
    train(lambda o, _: SharpnessMonitor(o, ["one_step"], every=3, logger=logger))
    seen = [values.get("sharpness/step", step) for step, values in logger.rows if "sharpness/one_step" in values]
    assert seen == [0, 3, 6]
    assert all(("sharpness/step" in values) is (kind in (Dict, PlainLog)) for _, values in logger.rows)


def test_loggers_of_lightning():
    lightning = pytest.importorskip("lightning")
    from lightning.pytorch.loggers.logger import DummyLogger

    class Kept(DummyLogger):
        rows = ()

        def log_metrics(self, metrics, step):
            self.rows = (*self.rows, (step, metrics["sharpness/one_step"]))

    logger = Kept()
    _, monitor = train(lambda o, _: SharpnessMonitor(o, ["one_step"], every=3, logger=logger))
    assert logger.rows == tuple((row["step"], row["sharpness/one_step"]) for row in monitor.history)
    sent = []
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    fabric.log_dict = lambda metrics, step=None: sent.append(step)
    train(lambda o, _: SharpnessMonitor(o, ["one_step"], every=3, logger=fabric))
    assert sent == [0, 3, 6]


def test_a_module_with_functions_is_a_logger(monkeypatch):
    """As mlflow is, whose ``log_metrics`` takes the step as its second argument."""
    import types

    rows = []
    mlflow = types.ModuleType("mlflow")
    mlflow.log_metrics = lambda metrics, step=None, synchronous=None: rows.append((step, sorted(metrics)))
    train(lambda o, _: SharpnessMonitor(o, ["one_step"], every=4, logger=mlflow))
    assert rows == [(step, ["sharpness/one_step", "sharpness/overhead"]) for step in (0, 4)]


def test_the_numbers_are_the_measures():
    model, monitor = train(lambda o, opt: SharpnessMonitor(o, ["one_step", "edge_of_stability"], every=1, rho=0.1,
                                                           optimizer=opt), steps=2)
    o = Objective(model, loss_fn, batch(99))
    assert monitor.history[-1]["sharpness/one_step"] == one_step(o, 0.1, second_order=False).value
    assert monitor.history[-1]["sharpness/edge_of_stability"] == pytest.approx(edge_of_stability(o, 0.1).value)


def test_own_measures_and_resuming():
    monitor = SharpnessMonitor(Objective(build(NoisyNet), loss_fn, batch(0)), {"norm": lambda o: 2.0}, every=2)
    assert [bool(monitor.step()) for _ in range(3)] == [True, False, True]
    other = SharpnessMonitor(monitor.objective, {"norm": lambda o: 2.0}, every=2)
    other.load_state_dict(monitor.state_dict())
    assert [bool(other.step()) for _ in range(2)] == [False, True] and len(other.history) == 3


def test_what_cannot_be_done_is_said():
    o = Objective(build(NoisyNet), loss_fn, batch(0))
    with pytest.raises(ValueError, match="one_step"):
        SharpnessMonitor(o, ["sharp"])
    with pytest.raises(ValueError, match="optimizer="):
        SharpnessMonitor(o, ["edge_of_stability"])
    with pytest.raises(ValueError, match="add_scalar"):
        SharpnessMonitor(o, logger=object())


def test_a_number_that_is_not_finite_stays_in_the_history():
    logger = Dict()
    measures = {"infinite": lambda o: math.inf, "nan": lambda o: math.nan, "one": lambda o: 1.0}
    monitor = SharpnessMonitor(Objective(build(NoisyNet), loss_fn, batch(0)), measures, logger=logger)
    values = monitor.step()
    (_, sent), = logger.rows
    assert set(sent) == {"sharpness/one", "sharpness/overhead", "sharpness/step"}
    assert values["sharpness/infinite"] == math.inf
    row, = monitor.history
    assert row["sharpness/infinite"] == math.inf and "sharpness/infinite, sharpness/nan" in row["note"]
    assert SharpnessMonitor.state_dict(monitor)["history"] == [row]
