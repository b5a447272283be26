"""The other drop-in classes are the presets behind the same façade: each equals its slow twin by ``step(closure)``.

``laws/`` tests the presets and ``test_drop_in.py`` the façade; a wrong wiring between the two (LookSAM paying two
passes, Momentum-SAM along plus the momentum) is seen only here.
"""

import pytest
import torch

import oracles
from flatmin import SAM, ascent
from problems import BASES, assert_same, batch, build, flat, loss_fn, relative
from rows import whole

OPTIONS = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3}
TWINS = {
    "ASAM": (dict(rho=0.5, eta=0.02), oracles.asam, dict(rho=0.5, eta=0.02), (2, 2, 2)),
    "LookSAM": (dict(rho=0.1, k=3, alpha=0.3), oracles.looksam, dict(rho=0.1, k=3, alpha=0.3), (2, 1, 1)),
    "MomentumSAM": (dict(rho=0.5, perturbation_momentum=None), oracles.momentum_sam, dict(rho=0.5), (1, 1, 1)),
    "EfficientSAM": (dict(rho=0.1, perturbation_ratio=1.0), oracles.sam, dict(rho=0.1), (2, 2, 2)),
    "MemoryEfficientSAM": (dict(rho=0.1), oracles.sam, dict(rho=0.1), (2, 2, 2)),
}


def closure_of(optimizer, model, t, calls):
    x, y = batch(t)

    def closure():
        calls.append(t)
        optimizer.zero_grad()
        loss = loss_fn(model(x), y)
        loss.backward()
        return loss
    return closure


@pytest.mark.parametrize("name", TWINS)
def test_equals_its_slow_twin_and_pays_what_it_says(name):
    settings, rule, oracle_settings, passes = TWINS[name]
    model = build()
    optimizer = getattr(ascent, name)(model, torch.optim.SGD, **settings, **OPTIONS)
    expected, _ = oracles.train(model, BASES["sgd"], rule, [whole(*batch(t)) for t in range(9)], **oracle_settings)
    counts = []
    for t in range(9):
        calls = []
        optimizer.step(closure_of(optimizer, model, t, calls))
        counts.append(len(calls))
    assert relative(flat(model), expected[-1]) < 1e-12
    assert tuple(counts) == passes * 3


@pytest.mark.parametrize("name", TWINS)
def test_state_is_plain_enough_to_resume_bitwise(name, tmp_path):
    """Through a file loaded with ``weights_only``, in the middle of the cadence."""
    model, other = build(), build(seed=1)
    make = getattr(ascent, name)
    optimizer = make(model, torch.optim.SGD, **TWINS[name][0], **OPTIONS)
    for t in range(4):
        optimizer.step(closure_of(optimizer, model, t, []))
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "saved.pt")
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    resumed = make(other, torch.optim.SGD, **TWINS[name][0], **OPTIONS)
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    for t in range(4, 9):
        optimizer.step(closure_of(optimizer, model, t, []))
        resumed.step(closure_of(resumed, other, t, []))
    assert_same(flat(other), flat(model))


def test_the_memory_saving_class_is_sam_bit_for_bit():
    weights = []
    for cls in (SAM, ascent.MemoryEfficientSAM):
        model = build()
        optimizer = cls(model.parameters(), torch.optim.SGD, rho=0.1, **OPTIONS)
        for t in range(5):
            optimizer.step(closure_of(optimizer, model, t, []))
        weights.append(flat(model))
    assert_same(*weights)


def test_a_random_fraction_moves_a_random_part():
    model = build()
    optimizer = SAM(model, torch.optim.SGD, rho=0.1, direction=ascent.RandomFraction(beta=0.5), lr=0.0)
    start, patterns = flat(model), set()
    for t in range(12):
        stood = []
        inner = closure_of(optimizer, model, t, [])

        def closure(inner=inner, stood=stood):
            stood.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
            return inner()

        optimizer.step(closure)
        patterns.add(tuple((stood[-1] != start).tolist()))
        assert_same(flat(model), start)
    assert len(patterns) > 3
