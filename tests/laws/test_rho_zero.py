"""Law 2: with rho 0 every row is its base optimizer, bit for bit, with batch normalization and dropout present.

Weights, running statistics, random state and the optimizer's own state. The oracle comparison has neither statistics
nor masks, and a tolerance: it would miss statistics that move twice, a mask drawn anew, and a correction that is only
nearly zero (LookSAM divides by the norm of such a correction).
"""

import pytest
import torch

from problems import BASES, ConvNet, NoisyNet, assert_same, batch, build, flat
from rows import CASES, backward, case_id, cut, parts_for, presets, start, whole

NETS = [NoisyNet, ConvNet]


def run(step, model, optimizer, steps=7):
    torch.manual_seed(11)
    for t in range(steps):
        step(t)
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict(), torch.get_rng_state(), optimizer.state_dict()["state"]


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize(("row", "base"), CASES, ids=case_id)
def test_rho_zero_is_the_base_optimizer_bit_for_bit(row, base, net):
    from problems import loss_fn

    net = net if row.groups is None and row.preset != "sam_on" else None
    model, twin = (build(net) if net else build() for _ in range(2))
    ours, theirs = BASES[base](model.parameters()), BASES[base](twin.parameters())
    sharpener = row.make(model, ours, rho=0.0)

    def plain(t):
        for x, y, weight in parts_for(row, *batch(t)):
            loss = loss_fn(twin(x), y)
            (loss if weight == 1.0 else weight * loss).backward()

    mine = run(lambda t: row.backward(sharpener, model, parts_for(row, *batch(t))), model, ours)
    base_run = run(plain, twin, theirs)
    for name in mine[0]:
        assert_same(mine[0][name], base_run[0][name], name)
    assert_same(mine[1], base_run[1], "random state")
    for i in mine[2]:
        for key, value in mine[2][i].items():
            if torch.is_tensor(value):
                assert_same(value, base_run[2][i][key], f"optimizer state {key}")


def test_rho_zero_with_accumulation_is_the_accumulated_base():
    """Weighted micro-batches, whole-batch scope: the user's own accumulation loop, bit for bit."""
    from problems import loss_fn

    model, twin = build(NoisyNet), build(NoisyNet)
    parts = cut(*batch(0))
    torch.manual_seed(0)
    backward(presets.sam(model, rho=0.0), model, parts)
    torch.manual_seed(0)
    for x, y, weight in parts:
        (weight * loss_fn(twin(x), y)).backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert_same(p.grad, q.grad)


@pytest.mark.parametrize(("row", "base"), CASES, ids=case_id)
def test_a_positive_rho_is_not_the_base_optimizer(row, base):
    """So that the law above is not kept by a Sharpener that does nothing."""
    from problems import loss_fn

    model, twin = build(), build()
    optimizer, sharpener = start(row, base, model)
    theirs = BASES[base](twin.parameters())
    for t in range(3):
        row.backward(sharpener, model, parts_for(row, *batch(t)))
        for x, y, _ in whole(*batch(t)):
            loss_fn(twin(x), y).backward()
        for o in (optimizer, theirs):
            o.step()
            o.zero_grad()
    assert (flat(model) - flat(twin)).norm() > 1e-6
