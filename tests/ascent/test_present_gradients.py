"""``step(closure)`` with gradients already in ``p.grad``: lost in silence they would be a wrong step.

They are fine when the closure clears them, when they are zero, when this optimizer's last step left them, and when they
are what the closure computes itself (the loop ``loss.backward(); optimizer.step(closure)``). Anything else is refused
before anything has changed.
"""

import copy
import warnings

import pytest
import torch
from torch import nn

import problems
from flatmin import SAM, ascent
from problems import assert_same, batch, build, flat, loss_fn, relative

SGD = torch.optim.SGD
OPTIONS = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3}


def make(model, cls=SAM, rho=0.1, **kw):
    return cls(model.parameters(), SGD, rho=rho, **OPTIONS, **kw)


def closure_of(model, t, clear=None, calls=None):
    x, y = batch(t)

    def closure():
        if calls is not None:
            calls.append(t)
        if clear is not None:
            clear()
        loss = loss_fn(model(x), y)
        loss.backward()
        return loss
    return closure


def earlier_gradient(model, t):
    loss_fn(model(batch(t)[0]), batch(t)[1]).backward()


def one_clean_step(t=0, cls=SAM, **kw):
    model = build()
    make(model, cls, **kw).step(closure_of(model, t))
    return flat(model)


def by_hand(optimizer, model):
    for p in model.parameters():
        p.grad = None


def only_used(optimizer, model):
    """Clears some with set_to_none, others in place."""
    for i, p in enumerate(model.parameters()):
        p.grad = p.grad.zero_() if p.grad is not None and i % 2 else None


CLEARS = {
    "optimizer": lambda optimizer, model: optimizer.zero_grad(),
    "optimizer in place": lambda optimizer, model: optimizer.zero_grad(set_to_none=False),
    "base": lambda optimizer, model: optimizer.base_optimizer.zero_grad(),
    "model": lambda optimizer, model: model.zero_grad(),
    "model in place": lambda optimizer, model: model.zero_grad(set_to_none=False),
    "by hand": by_hand,
    "each its way": only_used,
}


@pytest.mark.parametrize("how", CLEARS)
@pytest.mark.parametrize("name", ["SAM", "MomentumSAM", "LookSAM"])
def test_a_closure_that_clears_may_find_anything(how, name):
    """torch's convention: what was there is the closure's to throw away, however it does so."""
    model = build()
    optimizer = make(model, getattr(ascent, name))
    earlier_gradient(model, 7)
    optimizer.step(closure_of(model, 0, lambda: CLEARS[how](optimizer, model)))
    assert_same(flat(model), one_clean_step(cls=getattr(ascent, name)))


def accumulated(model):
    earlier_gradient(model, 1)
    earlier_gradient(model, 2)


def own_twice(model):
    earlier_gradient(model, 0)
    earlier_gradient(model, 0)


def own_and_a_penalty(model):
    (loss_fn(model(batch(0)[0]), batch(0)[1]) + 1e-4 * sum(p.square().sum() for p in model.parameters())).backward()


def on_one_tensor(model):
    parameter = list(model.parameters())[-1]
    parameter.grad = torch.full_like(parameter, 1e-3)


FOREIGN = {"another batch": lambda model: earlier_gradient(model, 1), "two batches": accumulated,
           "the batch twice": own_twice, "a penalty beside": own_and_a_penalty, "one tensor": on_one_tensor,
           "nan": lambda model: setattr(list(model.parameters())[0], "grad",
                                        torch.full_like(list(model.parameters())[0], float("nan")))}


@pytest.mark.parametrize("what", FOREIGN)
@pytest.mark.parametrize("name", ["SAM", "MomentumSAM", "LookSAM", "ASAM"])
def test_gradients_that_would_be_lost_are_refused_and_nothing_changes(what, name):
    model = build(problems.NoisyNet).eval()
    optimizer = getattr(ascent, name)(model, SGD, rho=0.1, **OPTIONS)
    for t in (5, 6):
        optimizer.step(closure_of(model, t))
    optimizer.zero_grad()
    FOREIGN[what](model)
    gradients = [(p.grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()]
    before, state, random = flat(model), copy.deepcopy(optimizer.state_dict()), torch.get_rng_state()
    with pytest.raises(ValueError, match=r"(?s)gradients.*zero_grad.*flatmin\.Sharpener"):
        optimizer.step(closure_of(model, 0))
    assert_same(flat(model), before)
    assert_same(torch.get_rng_state(), random)
    for p, (gradient, value) in zip(model.parameters(), gradients, strict=True):
        assert p.grad is gradient
        if gradient is not None:
            assert_same(gradient.nan_to_num(), value.nan_to_num())
    after = optimizer.state_dict()
    assert after.get("sharpener", {}).get("step") == state.get("sharpener", {}).get("step")
    for i, slot in state["state"].items():
        assert_same(after["state"][i]["momentum_buffer"], slot["momentum_buffer"])
    optimizer.zero_grad()  # and it goes on
    optimizer.step(closure_of(model, 0))


def test_a_refusal_gives_back_batch_statistics_and_random_state_of_a_module():
    model = build(problems.NoisyNet)
    optimizer = SAM(model, SGD, rho=0.1, **OPTIONS)
    earlier_gradient(model, 1)
    buffers, random = [b.clone() for b in model.buffers()], torch.get_rng_state()
    with pytest.raises(ValueError, match="Sharpener"):
        optimizer.step(closure_of(model, 0))
    for a, b in zip(model.buffers(), buffers, strict=True):
        assert_same(a, b)
    assert_same(torch.get_rng_state(), random)


@pytest.mark.parametrize("cls,calls", [("SAM", 2), ("LookSAM", 2), ("ASAM", 2), ("MomentumSAM", 2)])
def test_backward_and_then_step_with_a_closure_that_does_not_clear(cls, calls):
    """The loop as it was published: the gradient that is there is the closure's own, whatever is perturbed."""
    cls = getattr(ascent, cls)
    model, other = build(), build()
    optimizer, reference = make(model, cls), make(other, cls)
    for t in range(6):
        earlier_gradient(model, t)
        seen = []
        optimizer.step(closure_of(model, t, calls=seen))
        assert len(seen) <= calls
        optimizer.zero_grad()
        reference.step(closure_of(other, t, other.zero_grad))
    assert_same(flat(model), flat(other))


def test_that_loop_with_gradients_zeroed_in_place_and_one_tensor_unused():
    model, other = build(), build()
    optimizer, reference = make(model), make(other)
    unused = nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [unused]})
    unused.grad = torch.zeros(3)
    for t in range(4):
        earlier_gradient(model, t)
        optimizer.step(closure_of(model, t))
        optimizer.zero_grad(set_to_none=False)
        reference.step(closure_of(other, t, other.zero_grad))
    assert relative(flat(model), flat(other)) < 1e-14


def test_that_loop_without_its_extra_pass():
    """As the message says: the gradient that is there, the closure once, and the step."""
    model, other = build(), build()
    optimizer, reference = make(model), make(other)
    calls = []
    for t in range(4):
        earlier_gradient(model, t)
        optimizer.first_step(zero_grad=True)
        closure_of(model, t, calls=calls)()
        optimizer.second_step(zero_grad=True)
        reference.step(closure_of(other, t, other.zero_grad))
    assert len(calls) == 4
    assert_same(flat(model), flat(other))


def test_rounding_is_not_a_difference():
    """Two evaluations on an accelerator may differ in the last digits; a part of 1e-4 is a part, not rounding."""
    for dtype, size, refused in [(torch.float32, 1e-6, False), (torch.float32, 1e-4, True),
                                 (torch.float64, 1e-12, False), (torch.float64, 1e-9, True)]:
        model = build(dtype=dtype)
        optimizer = make(model)
        x, y = batch(0, dtype=dtype)
        loss_fn(model(x), y).backward()
        for p in model.parameters():
            p.grad.mul_(1 + size)

        def closure(model=model, x=x, y=y):
            loss = loss_fn(model(x), y)
            loss.backward()
            return loss

        if refused:
            with pytest.raises(ValueError, match="Sharpener"):
                optimizer.step(closure)
        else:
            optimizer.step(closure)


@pytest.mark.parametrize("cls", ["SAM", "MomentumSAM"])
def test_zero_gradients_are_nothing(cls):
    model = build()
    optimizer = make(model, getattr(ascent, cls))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step(closure_of(model, 0))
    assert_same(flat(model), one_clean_step(cls=getattr(ascent, cls)))


def test_what_its_own_step_left_is_nothing_until_something_is_added():
    model, other = build(), build()
    optimizer, reference = make(model), make(other)
    for t in range(3):
        optimizer.step(closure_of(model, t))
        reference.step(closure_of(other, t, other.zero_grad))
    assert_same(flat(model), flat(other))
    earlier_gradient(model, 5)  # in place, into the gradients that the step left
    with pytest.raises(ValueError, match="Sharpener"):
        optimizer.step(closure_of(model, 3))


def test_an_overflow_in_that_loop_skips_the_step():
    model = build()
    optimizer = make(model)
    before = flat(model)
    x, y = batch(0)

    def closure():
        loss = loss_fn(model(x), y) * float("inf")
        loss.backward()
        return loss

    closure()
    optimizer.step(closure)
    assert_same(flat(model), before)


@pytest.mark.parametrize("which", [1, 2])
def test_an_error_in_the_closure_leaves_what_was_found(which):
    """Weights at w after either call; gradients that were not yet judged are there again after the first."""
    model = build()
    optimizer = make(model)
    before, calls = flat(model), []
    earlier_gradient(model, 0)
    found = [p.grad for p in model.parameters()]

    def closure():
        calls.append(1)
        if len(calls) == which:
            raise RuntimeError("the loader died")
        return closure_of(model, 0)()

    with pytest.raises(RuntimeError, match="the loader died"):
        optimizer.step(closure)
    assert_same(flat(model), before)
    if which == 1:
        assert all(p.grad is g for p, g in zip(model.parameters(), found, strict=True))
    optimizer.zero_grad()
    optimizer.step(closure)
    assert_same(flat(model), one_clean_step())


def test_a_graph_through_the_gradient_is_judged_alike():
    """``backward(create_graph=True)`` adds out of place: no tensor's version tells."""
    model = build()
    optimizer = make(model)
    x, y = batch(0)

    def closure():
        loss = loss_fn(model(x), y)
        loss.backward(create_graph=True)
        return loss

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        earlier_gradient(model, 1)
        with pytest.raises(ValueError, match="Sharpener"):
            optimizer.step(closure)
        optimizer.zero_grad()
        optimizer.step(closure)
    assert relative(flat(model), one_clean_step()) < 1e-14


def test_a_closure_of_several_micro_batches_accumulates_within_itself():
    """The way to accumulate with this class: the closure loops. Both calls sum over the micro-batches."""
    model, other = build(), build()
    optimizer, reference = make(model), make(other)
    xs, ys = zip(*[batch(t) for t in range(3)], strict=True)

    def looped():
        optimizer.zero_grad(set_to_none=False)
        for x, y in zip(xs, ys, strict=True):
            (loss_fn(model(x), y) / 3).backward()

    def merged():
        reference.zero_grad()
        loss = loss_fn(other(torch.cat(xs)), torch.cat(ys))
        loss.backward()
        return loss

    earlier_gradient(model, 8)
    optimizer.step(looped)
    reference.step(merged)
    assert relative(flat(model), flat(other)) < 1e-12


def test_a_frozen_tensors_gradient_counts_too():
    """Frozen after its gradient was accumulated: torch's optimizers would step on it."""
    model = build()
    optimizer = make(model)
    earlier_gradient(model, 1)
    for p in list(model.parameters())[:-1]:
        p.grad = None
    list(model.parameters())[-1].requires_grad_(False)
    with pytest.raises(ValueError, match="Sharpener"):
        optimizer.step(closure_of(model, 0))


def test_found_gradients_are_not_kept_alive():
    import gc
    import weakref

    model = build()
    optimizer = make(model)
    earlier_gradient(model, 0)
    alive = [weakref.ref(p.grad) for p in model.parameters()]
    optimizer.step(closure_of(model, 0))
    optimizer.zero_grad()
    gc.collect()
    assert not any(ref() is not None for ref in alive)
