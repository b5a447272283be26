"""Each fault is found on a run that has it and not on the healthy one, which differs in nothing else."""

import dataclasses
import functools
import itertools
import json
import math
import random

import pytest
import torch
from torch import nn

from flatmin import presets
from flatmin.jobs.histories import history_of, steps_of
from flatmin.jobs.settings import CompareSettings
from flatmin.jobs.trainings import RECORDED_STEPS, training
from flatmin.recipes import Classification, Data, digits
from flatmin.sharpness import diagnose, next_radius
from flatmin.sharpness.diagnosis import LARGER, SMALLER, TABLE, WITHOUT_RHO, Finding, consistent
from flatmin.training.methods import METHODS
from flatmin.training.run import Diverged
from problems import NoisyNet, Vector, batch, build, loss_fn


def healthy(n=200, **changes):
    """A record in which nothing is wrong; ``changes`` replace a column by a function of t in [0, 1]."""
    columns = {
        "loss": lambda t: 0.1 + 2.2 * math.exp(-4 * t) * (1 + 0.1 * math.sin(900 * t)),
        "gradient_norm": lambda t: 0.2 + math.exp(-3 * t), "perturbed_gradient_norm": lambda t: 0.25 + math.exp(-3 * t),
        "radius": lambda t: 0.05, "cosine": lambda t: 1.0, "train_accuracy": lambda t: 0.3 + 0.68 * t,
        "accuracy": lambda t: 0.3 + 0.65 * t, "confidence": lambda t: 0.3 + 0.65 * t, "ece": lambda t: 0.02,
        "tau_func": lambda t: 1 - 0.8 * t,
    }
    columns["perturbed_loss"] = lambda t: 1.1 * columns["loss"](t)
    columns |= changes
    steps = [{name: column(i / (n - 1)) for name, column in columns.items() if column} for i in range(n)]
    for i, step in enumerate(steps):    # what is evaluated is so every tenth step
        if i % 10 and i != n - 1:
            for name in ("train_accuracy", "accuracy", "confidence", "ece", "tau_func"):
                step.pop(name, None)
    return steps


BASE = healthy(accuracy=lambda t: 0.3 + 0.6 * t)
FAULTS = {
    "diverging": [healthy(loss=lambda t: 0.5 + 3 * abs(t - 0.4)), healthy(loss=lambda t: math.nan if t > 0.7 else 1.0)],
    "unstable": [healthy(loss=lambda t: 0.3 + 2 * math.exp(-5 * t) + (5 if round(199 * t) % 30 == 29 else 0))],
    "hallucinated minimizer": [healthy(perturbed_gradient_norm=lambda t: 1e-3 + math.exp(-9 * t))],
    "bf16 rounding": [healthy(cosine=lambda t: 0.6), healthy(radius=lambda t: 0.02)],
    "rho too small": [healthy(loss=lambda t: 1 - 0.5 * t, perturbed_loss=lambda t: (1 - 0.5 * t) * 1.001)],
    "rho too large": [healthy(loss=lambda t: 1 - 0.5 * t, perturbed_loss=lambda t: (1 - 0.5 * t) * 4)],
    "spurious flattening": [healthy(tau_func=lambda t: 1.0), healthy(tau_func=None, ece=lambda t: 0.02 + 0.1 * t)],
    "no improvement": [healthy(accuracy=lambda t: 0.3 + 0.6 * t, loss=lambda t: 1 - 0.5 * t,
                               perturbed_loss=lambda t: (1 - 0.5 * t) * 1.02)],
    "no improvement at this radius": [healthy(accuracy=lambda t: 0.3 + 0.6 * t)],
    "undecided": [healthy(accuracy=lambda t: 0.3 + 0.602 * t)],
    "too few records": [[{"loss": 1.0}], healthy(19)],
    "underfitting": [healthy(train_accuracy=lambda t: 0.3 + 0.4 * t, accuracy=lambda t: 0.3 + 0.29 * t)],
    "overfitting": [healthy(train_accuracy=lambda t: min(1, 0.3 + t), accuracy=lambda t: 0.3 + 0.5 * t)],
}


def test_every_row_of_the_table_has_a_run():
    assert set(FAULTS) == set(TABLE)


def test_a_healthy_run_has_no_finding():
    assert diagnose(healthy(), base=BASE, rho=0.05) == []
    assert diagnose(healthy(), rho=0.05) == []


@pytest.mark.parametrize("steps", [[], [{}], [{"step": 3, "Loss": 1.0}] * 30, [{"loss": None}] * 30])
def test_what_cannot_be_diagnosed_is_refused(steps):
    with pytest.raises(ValueError, match="loss, perturbed_loss"):
        diagnose(steps)
    for noise, classes in ((1.5, 10), (0.3, None)):
        with pytest.raises(ValueError, match="noise is a share"):
            diagnose(healthy(), noise=noise, classes=classes)


def test_training_accuracy_is_judged_by_what_can_be_had_without_memorising():
    """60 % of 10 classes' labels re-drawn: 0.46 can be had."""
    def names(train, validation):
        steps = healthy(train_accuracy=lambda t: train, accuracy=lambda t: validation, tau_func=None)
        return {f.name: f for f in diagnose(steps, noise=0.6, classes=10)}

    assert names(0.44, 0.42) == {} and set(names(0.3, 0.29)) == {"underfitting"}
    found = names(0.62, 0.4)["overfitting"]
    assert "memorising" in found.symptom and found.evidence["attainable without memorising"] == pytest.approx(0.46)
    plain = healthy(perturbed_loss=None, train_accuracy=lambda t: 0.62, accuracy=lambda t: 0.6)
    assert [f.name for f in diagnose(plain)] == ["underfitting"] and diagnose(plain, noise=0.4, classes=10) == []


def test_a_method_that_is_ahead_within_the_spread_is_told_no_other_radius():
    steps = healthy(accuracy=lambda t: 0.575)
    base = healthy(accuracy=lambda t: 0.55)
    found, = diagnose(steps, base=base, rho=0.05, spread=0.03)
    assert found.evidence == pytest.approx({"accuracy": 0.575, "base": 0.55, "spread": 0.03,
                                            "sharpness over loss": 0.1})
    assert str(found).startswith("Not measurably better") and "rho" not in str(found) and "radius" not in str(found)
    assert next_radius([found], 0.05)[0] == 0.05


def test_no_radius_that_did_worse_is_recommended():
    too_large, too_small = [made_up("rho too large")], [made_up("rho too small")]
    grid = (0.05, 0.1, 0.2, 0.4)
    for found, rho, expected in ((too_large, 0.4, 0.4), (too_large, 0.05, 0.025), (too_small, 0.05, 0.05),
                                 (too_small, 0.4, 0.8), (too_large, 0.1, 0.1)):
        after, why = next_radius(found, rho, tried=grid)
        assert after == expected and (after != rho) == ("did no better" not in why)
    assert "0.2, 0.1, 0.05 did no better" in next_radius(too_large, 0.4, tried=grid)[1]


@pytest.mark.parametrize(("name", "steps"), [(name, steps) for name, runs in FAULTS.items() for steps in runs])
def test_each_fault_is_found_with_its_evidence(name, steps):
    found = {f.name: f for f in diagnose(steps, base=BASE, rho=0.05)}
    assert name in found
    finding = found[name]
    assert finding.evidence and all(isinstance(v, (int, float)) for v in finding.evidence.values())
    assert (finding.symptom, finding.cause, finding.solution) == TABLE[name]
    assert finding.symptom[1:] in str(finding) and json.dumps(finding.to_dict())


@pytest.mark.parametrize("name", FAULTS)
def test_other_faults_are_not_found_with_it(name):
    """Losses and accuracies belong together, so a few faults come in pairs; nothing else may appear."""
    pairs = {"overfitting": {"no improvement at this radius"}, "too few records": {"underfitting"}}
    for steps in FAULTS[name]:
        assert {f.name for f in diagnose(steps, base=BASE, rho=0.05)} <= {name} | pairs.get(name, set())


def test_without_a_base_run_nothing_is_compared():
    assert "no improvement at this radius" not in {f.name for f in diagnose(FAULTS["no improvement at this radius"][0])}


def test_the_recipe_for_the_radius():
    def after(name):
        return next_radius(diagnose(FAULTS[name][0], base=BASE, rho=0.05), 0.05)[0]

    assert after("diverging") == after("rho too large") == 0.025
    assert after("rho too small") == after("no improvement") == 0.1
    assert next_radius([], 0.05)[0] == 0.05
    assert next_radius(diagnose(FAULTS["unstable"][0]), 0.01)[0] == 0.01
    assert next_radius(diagnose(FAULTS["rho too small"][0]), 3.0)[0] == 3.0


def records(model, loss, data, rho, lr=0.1, steps=40):
    """What a real run of plain SAM leaves behind."""
    sharpener = presets.sam(model, rho=rho, perturbed_norm=True)
    optimizer, out = torch.optim.SGD(model.parameters(), lr), []
    for step in range(steps):
        optimizer.zero_grad()
        sharpener.backward(lambda step=step: loss(model, data(step)))
        out.append(sharpener.last.to_dict())
        optimizer.step()
    return out


def network(rho):
    return records(build(NoisyNet), lambda m, b: loss_fn(m(b[0]), b[1]), lambda step: batch(0), rho)


def test_real_records():
    names = {rho: {f.name for f in diagnose(network(rho), rho=rho)} for rho in (1e-4, 0.1)}
    assert names == {1e-4: {"rho too small"}, 0.1: set()}


def test_a_real_hallucinated_minimizer():
    """L = 2 − cos w has a maximum at π: from π − ρ the step leads onto it, and the gradient vanishes there only."""
    def loss(model, _):
        return 2 - model().cos().sum()

    stuck = records(Vector([math.pi - 0.5]), loss, lambda step: None, 0.5, lr=1e-9)
    assert "hallucinated minimizer" in {f.name for f in diagnose(stuck, rho=0.5)}
    free = records(Vector([math.pi - 1.5]), loss, lambda step: None, 0.5, lr=1e-9)
    assert "hallucinated minimizer" not in {f.name for f in diagnose(free, rho=0.5)}


# real runs: 200 digits, a small network, 25 epochs; each fault beside a run that lacks it

SMALL = Classification("small", lambda: nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)), digits.data,
                       batch_size=20)


@functools.cache
def trained(method="sam", rho=0.1, noise=0.0, epochs=25, n=200, **changes):
    """The recorded steps of one run, with its accuracy, confidence and calibration on held-out data."""
    data = dataclasses.replace(digits, noise=noise).load(None)
    x, y, held = data.train_inputs, data.train_targets, slice(n, n + 200)
    recipe = dataclasses.replace(SMALL, data=lambda folder: Data(x[:n], y[:n], x[held], y[held], 10), **changes)
    method = METHODS[method]
    with torch.random.fork_rng():
        kept = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            run = training(recipe, method, rho, 0, CompareSettings(epochs=epochs), splits=("tune", "train"))
            run.run()
        except Diverged:
            pass
        finally:
            torch.set_default_dtype(kept)
    every = math.ceil(n / recipe.batch_size)
    return steps_of(history_of(run.trained, "accuracy", every, not method.rhos))


def sgd(**options):
    return trained("sgd", None, **options)


def linear():
    return nn.Linear(64, 10)


def half(kind, rho=1e-3, steps=60):
    """SAM as written by hand, with weights of a dtype: what becomes of the step, as the record notes it."""
    torch.manual_seed(0)
    model, out = SMALL.model().to(kind), []
    w = list(model.parameters())
    x, y = torch.randn(40, 64, dtype=kind), torch.arange(40) % 10
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(x), y)
        at = loss.item()
        g = torch.autograd.grad(loss, w)
        norm = torch.stack([t.double().norm() for t in g]).norm()
        asked = [rho * t.double() / norm for t in g]
        there = [(p.detach() + e.to(kind)) for p, e in zip(w, asked, strict=True)]
        done = torch.cat([(a.double() - p.detach().double()).flatten() for a, p in zip(there, w, strict=True)])
        wanted = torch.cat([e.flatten() for e in asked])
        out.append({"loss": at, "perturbed_loss": at * 1.1, "radius": float(done.norm()),
                    "cosine": float(done @ wanted / (done.norm() * wanted.norm()).clamp(min=1e-30))})
        with torch.no_grad():
            for p, t in zip(w, g, strict=True):
                p -= 0.01 * t
    return out


REAL = {  # fault: (the run that has it, the run that has not), each as (steps, base, rho)
    "diverging": ((lambda: trained(lr=1e4), sgd, 0.1), (trained, sgd, 0.1)),
    "unstable": ((lambda: trained(rho=0.01, lr=1.0, batch_size=5, epochs=10, model=linear), None, 0.01),
                 (lambda: trained(rho=0.01, lr=0.1, batch_size=5, epochs=10, model=linear), None, 0.01)),
    "no improvement": ((lambda: trained(rho=1e-4), sgd, 1e-4), (lambda: trained(rho=0.2), sgd, 0.2)),
    "no improvement at this radius": ((lambda: trained(rho=0.05), sgd, 0.05), (lambda: trained(rho=0.2), sgd, 0.2)),
    "too few records": ((lambda: trained(epochs=1), None, 0.1), (trained, None, 0.1)),
    "rho too small": ((lambda: trained(rho=1e-4), None, 1e-4), (trained, None, 0.1)),
    "rho too large": ((lambda: trained(rho=50.0), None, 50.0), (trained, None, 0.1)),
    "underfitting": ((lambda: trained(rho=0.8), sgd, 0.8), (trained, sgd, 0.1)),
    "overfitting": ((lambda: trained(noise=0.6, n=100, epochs=50), None, 0.1), (trained, None, 0.1)),
    "spurious flattening": ((lambda: trained(noise=0.6, n=100, epochs=50), None, 0.1), (trained, None, 0.1)),
    "bf16 rounding": ((lambda: half(torch.bfloat16), None, 1e-3), (lambda: half(torch.float32), None, 1e-3)),
}


def test_every_row_has_a_real_run():
    alone = {"hallucinated minimizer", "undecided"}     # which have their own tests
    assert set(REAL) | alone == set(TABLE)


@pytest.mark.parametrize("fault", REAL)
def test_each_fault_on_a_real_run_that_has_it_and_one_that_has_not(fault):
    for (steps, base, rho), has in zip(REAL[fault], (True, False), strict=True):
        found = [f.name for f in diagnose(steps(), base=base() if base else None, rho=rho)]
        assert (fault in found) == has, found
        assert not (set(found) & set(SMALLER) and set(found) & set(LARGER)), found


def test_a_run_that_ends_in_nan_is_recorded_up_to_there():
    steps = trained(lr=1e4)
    assert not math.isfinite(steps[-1]["loss"]) and len(steps) > 3
    found, = diagnose(steps, rho=0.1)
    assert found.name == "diverging" and next_radius([found], 0.1)[0] == 0.05


def test_a_plain_optimizer_gets_no_advice_on_rho():
    runs = [sgd(lr=1e4), sgd(lr=1.0), sgd(noise=0.6, n=100, epochs=50),
            sgd(lr=1.0, batch_size=5, epochs=10, model=linear), sgd(epochs=1)]
    found = [f for steps in runs for f in diagnose(steps)]
    assert {f.name for f in found} == set(WITHOUT_RHO)
    assert not any("rho" in str(f) for f in found)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "sam_on"])
def test_a_healthy_run_of_every_method_has_no_fault(method):
    """At a radius of its own; one-pass methods know no loss at w, ESAM and LookSAM do not step by rho."""
    rho = {"asam": 0.5, "layer_sam": 0.02, "momentum_sam": 0.3, "random_sam": 0.5, "wsam": 0.02,
           "preconditioned_sam": 0.2, "preconditioned_functional_sam": 0.2}.get(method, 0.1) if METHODS[method].rhos \
        else None
    steps = trained(method, rho)
    names = {f.name for f in diagnose(steps, rho=rho if METHODS[method].steps_by_rho else None)}
    assert names <= {"overfitting"} and steps[-1]["accuracy"] > 0.75, names


def test_which_methods_step_by_rho():
    """As the table says, so the record shows."""
    torch.set_default_dtype(torch.float32)
    for method in METHODS.values():
        if not method.rhos or method.name == "sam_on":
            continue
        run, radii = training(SMALL, method, 0.1, 0, CompareSettings(epochs=1)), []
        for batch_of_digits in itertools.islice(run.stream, 8):
            run.step([batch_of_digits])
            radii.append(run.sharpener.last.radius)
        same = all(abs(r / 0.1 - 1) < 1e-3 for r in radii[1:])      # momentum has nothing to go by at first
        assert same == method.steps_by_rho, (method.name, radii)


def test_a_run_has_some_hundreds_of_records():
    assert len(trained()) == RECORDED_STEPS == 250 and len(trained(epochs=10)) == 100
    steps = trained(epochs=50, n=400)
    assert 100 < len(steps) <= RECORDED_STEPS + 1 and steps[1]["step"] == 4
    assert "confidence" in steps[-1] and "train_accuracy" in steps[-1] and sum("ece" in s for s in steps) == 50


@pytest.mark.parametrize("n", [60, 200, 1000])
@pytest.mark.parametrize("spread", [0.3, 0.6, 1.0])
def test_a_noisy_healthy_run_is_not_unstable(n, spread):
    for seed in range(50):
        rng = random.Random(seed)
        losses = [(0.1 + 2.2 * math.exp(-4 * i / (n - 1))) * math.exp(spread * rng.gauss(0, 1)) for i in range(n)]
        assert diagnose([{"loss": v, "perturbed_loss": 1.1 * v} for v in losses]) == []


def made_up(name, **evidence):
    return Finding(name=name, symptom="s", cause="c", solution="rho", evidence=evidence)


def test_findings_never_ask_for_both():
    every = [made_up(name) for name in TABLE]
    for left in every:
        for right in every:
            names = {f.name for f in consistent([left, right])}
            assert names and not (names & {*SMALLER} - {"underfitting"} and names & {*LARGER})
            if "no improvement at this radius" in names:
                assert not names & {*SMALLER, *LARGER}
    kept = consistent([made_up("rho too small"), made_up("underfitting")])
    assert [f.name for f in kept] == ["rho too small", "underfitting"] and "rho" not in str(kept[1])
    assert next_radius(kept, 0.1) == (0.2, "rho too small")
    harmed = consistent([made_up("rho too small"), made_up("underfitting", **{"base train": 1.0})])
    assert [f.name for f in harmed] == ["underfitting"] and next_radius(harmed, 0.1) == (0.05, "underfitting")


def test_the_radius_to_try_says_where_it_ends():
    assert next_radius([made_up("rho too small")], 4.0, high=8.0) == (8.0, "rho too small")
    assert next_radius([made_up("rho too small")], 2.0) == \
        (2.0, "rho too small, and 2 is already the largest to try")
