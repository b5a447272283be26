"""Law 9: accumulated micro-batches of unequal size equal the merged batch, for the loss returned and the gradient kept.

Seeds and peers replay only the last micro-batch in the second pass, or average sizes 2, 7 and 3 as if they were equal:
the magnitude looks right and every other law is kept.
"""

import math

import pytest
import torch

import oracles
import problems
from problems import batch, build, flat_grad, loss_fn, relative
from rows import ROWS, backward, case_id, cut, presets, start, warm_up, whole

WHOLE = [row for row in ROWS if not row.micro and not row.random]


@pytest.mark.parametrize("sizes", [(2, 7, 3), (11, 1)])
@pytest.mark.parametrize("row", WHOLE, ids=case_id)
def test_weighted_micro_batches_equal_the_merged_batch(row, sizes):
    x, y = batch(0)
    found = []
    for parts in (whole(x, y), cut(x, y, sizes)):
        model = build()
        optimizer, sharpener = start(row, row.bases[-1], model)
        warm_up(row, sharpener, optimizer, model, 3 if row.stateful else 1)
        found.append((float(row.backward(sharpener, model, parts)), flat_grad(model), sharpener.last))
    (loss, gradient, last), (parts_loss, parts_gradient, parts_last) = found
    assert relative(parts_gradient, gradient) < 1e-13
    assert parts_loss == pytest.approx(loss, rel=1e-13)
    for name in ("loss", "perturbed_loss", "sharpness", "gradient_norm", "radius"):
        if getattr(last, name) is not None and not math.isnan(float(getattr(last, name))):  # nan: not measured
            assert float(getattr(parts_last, name)) == pytest.approx(float(getattr(last, name)), rel=1e-10, abs=1e-14)


def test_unweighted_micro_batches_count_one_nth_each():
    parts = [(x, y, 1 / 3) for x, y, _ in cut(*batch(0))]
    model = build()
    value = presets.sam(model, rho=0.1).backward([lambda x=x, y=y: loss_fn(model(x), y) for x, y, _ in parts])
    at = oracles.Point(build(), parts)
    assert float(value) == pytest.approx(float(at.loss(at.w)), rel=1e-14)
    assert relative(flat_grad(model), oracles.sam(at, 0.1)) < 1e-13


def test_weights_are_taken_as_given():
    """They need not add up to one: (2, 1) is a sum in which the first batch counts twice."""
    parts = [(x, y, weight) for (x, y, _), weight in zip(cut(*batch(0), (5, 7)), (2.0, 1.0), strict=True)]
    model = build()
    value = backward(presets.sam(model, rho=0.1), model, parts)
    at = oracles.Point(build(), parts)
    assert float(value) == pytest.approx(float(at.loss(at.w)), rel=1e-14)
    assert relative(flat_grad(model), oracles.sam(at, 0.1)) < 1e-13


def test_weights_may_be_tensors_and_a_single_micro_batch_may_come_in_a_list():
    x, y = batch(0)
    expected = oracles.sam(oracles.Point(build(), whole(x, y)), 0.1)
    model = build()
    presets.sam(model, rho=0.1).backward([lambda: loss_fn(model(x), y)])
    assert relative(flat_grad(model), expected) < 1e-13
    model = build()
    parts = cut(x, y)
    presets.sam(model, rho=0.1).backward([lambda x=x, y=y: loss_fn(model(x), y) for x, y, _ in parts],
                                         weights=torch.tensor([w for *_, w in parts]))
    assert relative(flat_grad(model), expected) < 1e-13


def test_pairs_of_forward_and_loss_are_micro_batches_too():
    x, y = batch(0)
    parts = cut(x, y)
    model = build()
    presets.sam(model, rho=0.1).backward(
        [(lambda x=x: model(x), lambda z, y=y: loss_fn(z, y)) for x, y, _ in parts], weights=[w for *_, w in parts])
    assert relative(flat_grad(model), oracles.sam(oracles.Point(build(), whole(x, y)), 0.1)) < 1e-13


def test_the_number_of_weights_must_be_the_number_of_micro_batches():
    model = build()
    with pytest.raises(ValueError, match="weight"):
        presets.sam(model).backward([lambda: loss_fn(model(batch(0)[0]), batch(0)[1])], weights=[0.5, 0.5])


def test_no_micro_batches_at_all_is_refused():
    with pytest.raises(ValueError):
        presets.sam(build()).backward([])


def test_dropout_masks_are_replayed_by_micro_batch():
    """Each micro-batch sees in the second pass the mask it saw in the first: seeds are not mixed up."""
    model = build(problems.NoisyNet)
    masks = {}
    parts = cut(*batch(0))
    model.drop.register_forward_hook(lambda m, i, o: masks.setdefault(len(o), []).append((o == 0).detach()))
    backward(presets.sam(model, rho=0.1), model, parts)
    assert all(len(pair) == 2 and torch.equal(*pair) for pair in masks.values())


def test_a_padded_batch_counts_its_tokens():
    """Sequences of unequal length, loss a mean over tokens: weights proportional to tokens give the merged batch."""
    x, y = batch(0)
    y = y.clone()
    y[::3] = -100  # ignored targets, unevenly spread over the micro-batches
    sizes = (5, 4, 3)
    tokens = [(part != -100).sum().item() for part in y.split(sizes)]
    parts = [(a, b, n / sum(tokens)) for a, b, n in zip(x.split(sizes), y.split(sizes), tokens, strict=True)]
    model, merged = build(), build()
    backward(presets.sam(model, rho=0.1), model, parts)
    backward(presets.sam(merged, rho=0.1), merged, whole(x, y))
    assert relative(flat_grad(model), flat_grad(merged)) < 1e-13
