"""The façade against twenty lines that share nothing with it, over thirty steps in float64.

Every base optimizer, groups with their own rho and adaptive, both ways of calling, gradients that are None in one of
the passes, and errors in between: the weights must be those of the reference that never saw the error.
"""

import itertools

import pytest
import torch
from torch import nn

from flatmin import SAM
from problems import CLASSES, batch, build, flat, loss_fn, relative

BASES = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.01, weight_decay=0.02),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, lr=0.005, momentum=0.5),
    "adagrad": lambda groups: torch.optim.Adagrad(groups, lr=0.05),
    "amsgrad": lambda groups: torch.optim.Adam(groups, lr=0.01, foreach=False, amsgrad=True),
}
STYLES = ("closure", "closure without clearing", "two steps", "two steps, cleared by hand")


class Reference:
    """SAM as its paper and its most used class have it: e = rho T² g / ‖T g‖ over all groups together."""

    def __init__(self, groups, base):
        self.groups = [(list(g["params"]), g["rho"], g["adaptive"]) for g in groups]
        self.base = base([{k: v for k, v in g.items() if k not in ("rho", "adaptive")} for g in groups])

    def step(self, loss):
        entries = [(p, rho, adaptive) for params, rho, adaptive in self.groups for p in params]
        first = torch.autograd.grad(loss(0), [p for p, _, _ in entries], allow_unused=True)
        moves = [(p, rho, p.detach().abs() if adaptive else torch.ones_like(p), g)
                 for (p, rho, adaptive), g in zip(entries, first, strict=True) if g is not None and rho > 0]
        length = sum(float((t * g).square().sum()) for _, _, t, g in moves) ** 0.5
        old = [p.detach().clone() for p, _, _ in entries]
        with torch.no_grad():
            for p, rho, t, g in moves:
                p += rho * t * t * g / length if length else 0
        second = torch.autograd.grad(loss(1), [p for p, _, _ in entries], allow_unused=True)
        with torch.no_grad():
            for (p, _, _), w, g in zip(entries, old, second, strict=True):
                p.copy_(w)
                p.grad = g
        self.base.step()
        self.base.zero_grad()


class Branches(nn.Module):
    """The unused branch has no gradient; which one it is depends on the call."""

    def __init__(self):
        super().__init__()
        self.net, self.left, self.right = build(), nn.Linear(2, CLASSES), nn.Linear(2, CLASSES)

    def forward(self, x, which):
        return self.net(x) + {"left": self.left, "right": self.right}[which](x[:, :2])


def groups_of(model, setting):
    parameters = list(model.parameters())
    if setting == "one group":
        return [{"params": parameters, "rho": 0.1, "adaptive": False}]
    if setting == "adaptive":
        return [{"params": parameters, "rho": 0.5, "adaptive": True}]
    return [{"params": parameters[:2], "rho": 0.2, "adaptive": True}, {"params": parameters[2:5], "rho": 0.0,
             "adaptive": False}, {"params": parameters[5:], "rho": 0.05, "adaptive": False, "lr": 0.01}]


def facade(groups, base):
    return SAM(groups, lambda g, **_: base(g), rho=9.0)


def take_step(style, optimizer, loss):
    """One step of the façade; ``loss(i)`` builds the graph of pass i."""
    counter = itertools.count()
    if style.startswith("closure"):
        def closure():
            if style == "closure":
                optimizer.zero_grad()
            value = loss(next(counter))
            value.backward()
            return value
        optimizer.step(closure)
        return
    clears = style == "two steps"
    for i, step in enumerate((optimizer.first_step, optimizer.second_step)):
        loss(i).backward()
        step(zero_grad=clears)
        if not clears:
            optimizer.zero_grad()


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("base,setting", [*((base, "three groups") for base in BASES), ("sgd", "one group"),
                                          ("adamw", "adaptive")])
def test_thirty_steps(base, setting, style):
    model, other = build(), build()
    optimizer, reference = facade(groups_of(model, setting), BASES[base]), Reference(groups_of(other, setting),
                                                                                     BASES[base])
    for t in range(30):
        x, y = batch(t)
        take_step(style, optimizer, lambda i, x=x, y=y: loss_fn(model(x), y))
        reference.step(lambda i, x=x, y=y: loss_fn(other(x), y))
    assert relative(flat(model), flat(other)) < 1e-10


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("base", ["sgd", "adamw"])
@pytest.mark.parametrize("order", [("left", "right"), ("left", "left")])
def test_none_gradients_in_one_of_the_passes(order, base, style):
    torch.manual_seed(0)
    model = Branches().double()
    torch.manual_seed(0)
    other = Branches().double()
    optimizer = facade(groups_of(model, "one group"), BASES[base])
    reference = Reference(groups_of(other, "one group"), BASES[base])
    for t in range(30):
        x, y = batch(t)
        which = order if t % 3 else order[::-1]
        take_step(style, optimizer, lambda i, x=x, y=y, which=which: loss_fn(model(x, which[i]), y))
        reference.step(lambda i, x=x, y=y, which=which: loss_fn(other(x, which[i]), y))
    assert relative(flat(model), flat(other)) < 1e-10


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_errors_on_either_pass_leave_no_trace(base, style):
    """Every third step fails first, in the first or in the second pass, and is then taken again."""
    model, other = build(), build()
    optimizer = facade(groups_of(model, "three groups"), BASES[base])
    reference = Reference(groups_of(other, "three groups"), BASES[base])
    for t in range(30):
        x, y = batch(t)
        if t % 3 == 0:
            bad, before = t // 3 % 2, flat(model)

            def failing(i, x=x, y=y, bad=bad):
                if i == bad:
                    raise KeyboardInterrupt
                return loss_fn(model(x), y)

            with pytest.raises(KeyboardInterrupt):
                take_step(style, optimizer, failing)
            if style.startswith("two"):
                optimizer.restore()
            optimizer.zero_grad()
            assert torch.equal(flat(model), before)
        take_step(style, optimizer, lambda i, x=x, y=y: loss_fn(model(x), y))
        reference.step(lambda i, x=x, y=y: loss_fn(other(x), y))
    assert relative(flat(model), flat(other)) < 1e-10


@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_first_step_that_leaves_the_gradients_adds_the_two_up(base):
    """``first_step()`` without clearing is the caller's: as in the most used class, g stays and g_p is added to it."""
    model, other = build(), build()
    optimizer = facade(groups_of(model, "one group"), BASES[base])
    plain = BASES[base](other.parameters())
    for t in range(10):
        x, y = batch(t)
        loss_fn(model(x), y).backward()
        held = [p.grad for p in model.parameters()]
        values = [g.clone() for g in held]
        optimizer.first_step(zero_grad=False)
        assert all(torch.equal(p.grad, v) for p, v in zip(model.parameters(), values, strict=True))
        loss_fn(model(x), y).backward()
        optimizer.second_step(zero_grad=True)
        g = torch.autograd.grad(loss_fn(other(x), y), list(other.parameters()))
        length = torch.stack([v.norm() for v in g]).norm()
        old = [p.detach().clone() for p in other.parameters()]
        with torch.no_grad():
            for p, v in zip(other.parameters(), g, strict=True):
                p += 0.1 * v / length
        g_p = torch.autograd.grad(loss_fn(other(x), y), list(other.parameters()))
        with torch.no_grad():
            for p, w, a, b in zip(other.parameters(), old, g, g_p, strict=True):
                p.copy_(w)
                p.grad = a + b
        plain.step()
    assert relative(flat(model), flat(other)) < 1e-10
