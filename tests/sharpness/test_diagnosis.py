"""Each fault is found on a run that has it and not on the healthy one, which differs in nothing else."""

import json
import math

import pytest
import torch

from flatmin import presets
from flatmin.sharpness import diagnose, next_radius
from flatmin.sharpness.diagnosis import TABLE
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
    "underfitting": [healthy(train_accuracy=lambda t: 0.3 + 0.4 * t, accuracy=lambda t: 0.3 + 0.39 * t)],
    "overfitting": [healthy(train_accuracy=lambda t: min(1, 0.3 + t), accuracy=lambda t: 0.3 + 0.5 * t)],
}


def test_every_row_of_the_table_has_a_run():
    assert set(FAULTS) == set(TABLE)


def test_a_healthy_run_has_no_finding():
    assert diagnose(healthy(), base=BASE, rho=0.05) == []
    assert diagnose(healthy(), rho=0.05) == [] and diagnose([]) == [] and diagnose([{"loss": 1.0}]) == []


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
    pairs = {"overfitting": {"no improvement at this radius"}, "underfitting": {"no improvement at this radius"}}
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
