"""Groups and state that are assigned, loaded or changed behind the façade: the next step follows.

Trainers do all of it: Accelerate assigns ``param_groups`` and ``state`` and replaces ``group["params"]``, Lightning's
fine-tuning assigns groups on a restart, checkpoints load into ``base_optimizer``. Every change is compared with an
optimizer that was built so from the start.
"""

import copy
import pickle
from collections import defaultdict

import pytest
import torch
from torch import nn

from flatmin import SAM, ascent
from flatmin.errors import PerturbedStateError
from problems import assert_same, batch, build, flat, loss_fn

SGD = torch.optim.SGD
OPTIONS = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3}


def halves(model):
    parameters = list(model.parameters())
    return parameters[:-2], parameters[-2:]


def make(model, rho=0.1, head_rho=0.3, cls=SAM, **kw):
    body, head = halves(model)
    return cls([{"params": body}, {"params": head, "rho": head_rho, "lr": 0.02}], SGD, rho=rho, **OPTIONS, **kw)


def one_step(optimizer, model, t, style="closure"):
    x, y = batch(t)
    if style == "closure":
        def closure():
            optimizer.zero_grad()
            loss = loss_fn(model(x), y)
            loss.backward()
            return loss
        optimizer.step(closure)
        return
    for step in (optimizer.first_step, optimizer.second_step):
        loss_fn(model(x), y).backward()
        step(zero_grad=True)


def train(optimizer, model, first=0, last=4, style="closure"):
    for t in range(first, last):
        one_step(optimizer, model, t, style)
    return flat(model)


def fresh(**kw):
    model = build()
    return model, make(model, **kw)


def assigned(optimizer, groups):
    optimizer.param_groups = groups


def through_the_base(optimizer, groups):
    optimizer.base_optimizer.param_groups = groups


def in_place(optimizer, groups):
    optimizer.param_groups[:] = groups


@pytest.mark.parametrize("style", ["closure", "two steps"])
@pytest.mark.parametrize("how", [assigned, through_the_base, in_place])
def test_new_groups_count_at_the_next_step(how, style):
    model, optimizer = fresh()
    groups = [dict(g) for g in optimizer.param_groups]
    groups[0]["rho"], groups[1]["rho"], groups[1]["adaptive"] = 0.02, 0.5, True
    how(optimizer, groups)
    assert optimizer.param_groups is optimizer.base_optimizer.param_groups
    assert all(a is b for a, b in zip(optimizer.param_groups, groups, strict=True))
    body, head = halves(other := build())
    reference = SAM([{"params": body}, {"params": head, "rho": 0.5, "adaptive": True, "lr": 0.02}], SGD, rho=0.02,
                    **OPTIONS)
    assert_same(train(optimizer, model, style=style), train(reference, other, style=style))


def test_an_assigned_group_without_rho_keeps_its_parameters_own():
    model, optimizer = fresh()
    plain = [{k: v for k, v in g.items() if k not in ("rho", "adaptive")} for g in optimizer.param_groups]
    optimizer.param_groups = plain[::-1]
    assert [g["rho"] for g in optimizer.param_groups] == [0.3, 0.1]
    assert [g["adaptive"] for g in optimizer.param_groups] == [False, False]
    assert torch.allclose(train(optimizer, model), train(*reversed(fresh())), rtol=0, atol=1e-14)  # summed in turn


def test_an_impossible_radius_is_refused_before_anything_changes():
    model, optimizer = fresh()
    groups = optimizer.param_groups
    with pytest.raises(ValueError, match="rho"):
        optimizer.param_groups = [{**groups[0], "rho": -1.0}]
    with pytest.raises(ValueError, match="rho"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "rho": -1.0})
    assert optimizer.param_groups is groups and len(groups) == 2


def test_nothing_is_assigned_between_the_two_steps():
    model, optimizer = fresh()
    loss_fn(model(batch(0)[0]), batch(0)[1]).backward()
    optimizer.first_step(zero_grad=True)
    with pytest.raises(PerturbedStateError, match="second_step"):
        optimizer.param_groups = list(optimizer.param_groups)


@pytest.mark.parametrize("how", ["base_optimizer", "facade"])
def test_a_loaded_rho_counts(how):
    """The base optimizer's own loading replaces every group by a new dictionary."""
    model, optimizer = fresh()
    other, source = fresh(rho=0.4, head_rho=0.0)
    state = copy.deepcopy((source if how == "facade" else source.base_optimizer).state_dict())
    (optimizer if how == "facade" else optimizer.base_optimizer).load_state_dict(state)
    assert [g["rho"] for g in optimizer.param_groups] == [0.4, 0.0]
    assert_same(train(optimizer, model), train(source, other))


@pytest.mark.parametrize("how", ["base_optimizer", "facade"])
def test_loading_a_plain_optimizers_state_keeps_each_groups_rho(how):
    model, optimizer = fresh()
    body, head = halves(other := build())
    plain = SGD([{"params": body}, {"params": head, "lr": 0.02}], **OPTIONS)
    assert "rho" not in plain.state_dict()["param_groups"][0]
    (optimizer if how == "facade" else optimizer.base_optimizer).load_state_dict(plain.state_dict())
    assert_same(train(optimizer, model), train(*reversed(fresh())))
    assert [g["rho"] for g in optimizer.param_groups] == [0.1, 0.3]
    del other


def test_a_rho_written_into_a_loaded_group_counts():
    model, optimizer = fresh()
    optimizer.base_optimizer.load_state_dict(optimizer.base_optimizer.state_dict())
    optimizer.param_groups[0]["rho"] = 0.7
    assert_same(train(optimizer, model), train(*reversed(fresh(rho=0.7))))


def test_a_group_added_through_the_base_optimizer_is_perturbed():
    model = build()
    body, head = halves(model)
    optimizer = SAM(body, SGD, rho=0.1, **OPTIONS)
    optimizer.base_optimizer.add_param_group({"params": head, "lr": 0.02, "rho": 0.3})
    assert_same(train(optimizer, model), train(*reversed(fresh())))


def test_parameters_replaced_in_a_group_are_the_ones_that_move():
    """As Accelerate does after it has wrapped the model: ``group["params"] = [mapping[p] for p in ...]``."""
    model, optimizer = fresh()
    other = build()
    mapping = dict(zip(model.parameters(), other.parameters(), strict=True))
    for group in optimizer.param_groups:
        group["params"] = [mapping[p] for p in group["params"]]
    before = flat(model)
    assert_same(train(optimizer, other), train(*reversed(fresh())))
    assert_same(flat(model), before)


def test_one_parameter_replaced_in_its_list():
    model, optimizer = fresh()
    new = nn.Parameter(model.head.bias.detach().clone())
    optimizer.param_groups[1]["params"][1] = new
    model.head.bias = new
    assert_same(train(optimizer, model), train(*reversed(fresh())))


def test_state_may_be_assigned():
    model, optimizer = fresh()
    train(optimizer, model, 0, 3)
    optimizer.state = defaultdict(dict)
    assert optimizer.state is optimizer.base_optimizer.state and not optimizer.state
    other = build()
    other.load_state_dict(model.state_dict())
    assert_same(train(optimizer, model, 3, 6), train(make(other), other, 3, 6), "the momenta were not forgotten")
    assert all("momentum_buffer" in optimizer.state[p] for p in model.parameters())


@pytest.mark.parametrize("style", ["closure", "two steps"])
def test_a_scheduler_reaches_assigned_groups(style):
    model, optimizer = fresh()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    optimizer.param_groups = [dict(g) for g in optimizer.param_groups]
    reference_model, reference = fresh()
    for t in range(3):
        one_step(optimizer, model, t, style)
        scheduler.step()
        one_step(reference, reference_model, t, style)
        for group in reference.param_groups:
            group["lr"] *= 0.5
    assert_same(flat(model), flat(reference_model))


def test_hooks_survive_an_assignment():
    model, optimizer = fresh()
    fired = []
    optimizer.register_step_pre_hook(lambda *_: fired.append(1))
    optimizer.param_groups = [dict(g) for g in optimizer.param_groups]
    optimizer.state = defaultdict(dict)
    train(optimizer, model, 0, 3)
    assert fired == [1, 1, 1]


@pytest.mark.parametrize("how", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_of_an_assigned_optimizer_train_on_bitwise(how):
    model, optimizer = fresh()
    train(optimizer, model, 0, 2)
    optimizer.param_groups = [{**g, "rho": 0.2} for g in optimizer.param_groups]
    other, copied = how((model, optimizer))
    assert [g["rho"] for g in copied.param_groups] == [0.2, 0.2]
    assert copied.param_groups is copied.base_optimizer.param_groups
    assert_same(train(copied, other, 2, 5), train(optimizer, model, 2, 5))


def test_a_cadences_memory_stays_with_its_parameters():
    """Bare parameters are known by their place: after other groups, LookSAM's component must not change owner."""
    weights = []
    for turn in (False, True):
        model = build()
        optimizer = make(model, cls=ascent.LookSAM, k=4)
        train(optimizer, model, 0, 2)
        if turn:
            optimizer.param_groups = [dict(g) for g in optimizer.param_groups[::-1]]
            first = optimizer.param_groups[1]
            first["params"] = first["params"][::-1]
        weights.append(train(optimizer, model, 2, 8))
    assert torch.allclose(*weights, rtol=0, atol=1e-14)


def test_loading_into_the_base_leaves_the_cadence_and_loading_here_starts_it_anew():
    counts = {}
    for how in ("base", "facade"):
        model = build()
        optimizer = make(model, cls=ascent.LookSAM, k=3)
        train(optimizer, model, 0, 2)
        plain = optimizer.base_optimizer.state_dict()
        (optimizer.base_optimizer if how == "base" else optimizer).load_state_dict(plain)
        passes = []
        for t in range(2, 6):
            one_step(optimizer, model, t)
            passes.append(optimizer.sharpener.last.passes)
        counts[how] = passes
    assert counts == {"base": [1, 2, 1, 1], "facade": [2, 1, 1, 2]}


def test_a_direction_that_draws_resumes_bitwise():
    """The number of the step seeds its draws, also where the cadence has nothing to save."""
    model = build()
    optimizer = make(model, direction=ascent.RandomFraction(beta=0.5))
    train(optimizer, model, 0, 3)
    state, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    other = build(seed=1)
    other.load_state_dict(weights)
    resumed = make(other, direction=ascent.RandomFraction(beta=0.5))
    resumed.load_state_dict(state)
    assert_same(train(resumed, other, 3, 9), train(optimizer, model, 3, 9))


def test_two_ways_of_choosing_the_direction_are_refused():
    with pytest.raises(ValueError, match="adaptive=True.*Momentum"):
        SAM(build().parameters(), SGD, adaptive=True, direction=ascent.Momentum(), lr=0.1)


def test_a_sharpeners_groups_may_be_adaptive_one_by_one():
    """``Adaptive(by_group=True)`` is what ``adaptive=True`` stands for; the norm is over all groups together."""
    from flatmin import Sharpener

    weights = []
    for by_facade in (True, False):
        model = build()
        body, head = halves(model)
        groups = [{"params": body, "rho": 0.1}, {"params": head, "rho": 0.1, "adaptive": True}]
        if by_facade:
            optimizer = SAM(groups, SGD, **OPTIONS)
            train(optimizer, model)
        else:
            sharpener = Sharpener(model, direction=ascent.Adaptive(0.0, biases=True, by_group=True), groups=groups)
            base = SGD(model.parameters(), **OPTIONS)
            for t in range(4):
                base.zero_grad()
                x, y = batch(t)
                sharpener.backward(lambda model=model, x=x, y=y: loss_fn(model(x), y))
                base.step()
        weights.append(flat(model))
    assert torch.allclose(*weights, rtol=0, atol=1e-14)
