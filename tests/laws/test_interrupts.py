"""A Ctrl-C at every line of a step, where it runs first and last: w is back, and the next step is an ordinary one.

Exceptions raised by a pass (``test_restores.py``) arrive at one place only; an interrupt arrives anywhere, also while
the weights are being given back.
"""

import sys
from pathlib import Path

import pytest
import torch

import flatmin
import problems
from flatmin import presets
from problems import assert_same, batch, build, flat, flat_grad, loss_fn
from rows import cut

SOURCE = str(Path(flatmin.__file__).parent)


def traced(step, at=0):
    """Run ``step``, with a KeyboardInterrupt at its ``at``-th line inside the library; the lines that were seen."""
    lines = []

    def trace(frame, event, arg):
        if not frame.f_code.co_filename.startswith(SOURCE):
            return None
        if event == "line":
            lines.append((frame.f_code.co_filename, frame.f_lineno))
            if len(lines) == at:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        step()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(None)
    return lines


CASES = {"groups": dict(), "float32_weights": dict()}


def case(kind):
    model = build(problems.NoisyNet)
    options = dict(CASES[kind])
    if kind == "float32_weights":
        model = model.bfloat16()
    if kind == "groups":
        options["groups"] = [{"modules": [model.head], "rho": 0.3}]
    sharpener = presets.sam(model, rho=0.1, **options)
    dtype = model.first.weight.dtype
    data = cut(*batch(0, dtype=dtype), (4, 8))

    def step():
        sharpener.backward(lambda b: model(b[0]), lambda z, b: loss_fn(z, b[1]), batches=data)
    return model, sharpener, step


@pytest.mark.parametrize("kind", CASES)
def test_weights_come_back_from_an_interrupt_at_every_line(kind):
    model, sharpener, step = case(kind)
    torch.manual_seed(0)
    step()  # the first step looks at more
    before = flat(model)
    addresses = [p.data_ptr() for p in model.parameters()]
    model.zero_grad()
    lines = traced(step)
    assert len(set(lines)) > 150, "hardly any line was seen"
    first = {line: at for at, line in reversed(list(enumerate(lines, 1)))}
    last = {line: at for at, line in enumerate(lines, 1)}
    for at in sorted({*first.values(), *last.values()}):
        model.zero_grad()
        traced(step, at)
        assert_same(flat(model), before, f"interrupted at {lines[at - 1]}")
        assert not sharpener.is_perturbed, lines[at - 1]
    assert [p.data_ptr() for p in model.parameters()] == addresses
    fresh_model, _, fresh = case(kind)
    for m, s in ((model, step), (fresh_model, fresh)):
        m.zero_grad()
        m.load_state_dict(fresh_model.state_dict())
        torch.manual_seed(1)
        s()
    assert_same(flat_grad(model), flat_grad(fresh_model))


@pytest.mark.parametrize("preset", ["friendly_sam", "looksam"])
def test_an_interrupted_step_is_undone_or_complete(preset):
    """Gradients that were there, the number of the step and what is kept of it: as before, or as after."""
    model = build(problems.NoisyNet)
    sharpener = getattr(presets, preset)(model, rho=0.1)
    data = cut(*batch(0), (4, 8))

    def step():
        sharpener.backward(lambda b: model(b[0]), lambda z, b: loss_fn(z, b[1]), batches=data)

    for _ in range(1 if preset == "friendly_sam" else 5):     # LookSAM's next step is a full one
        step()
    kept, buffers = sharpener.state_dict(), [b.clone() for b in model.buffers()]
    earlier = [p.grad.clone() for p in model.parameters()]

    def start():
        sharpener.load_state_dict(kept)
        for p, g in zip(model.parameters(), earlier, strict=True):
            p.grad = g.clone()
        for b, value in zip(model.buffers(), buffers, strict=True):
            b.copy_(value)
        torch.manual_seed(0)

    def seen():
        state = sharpener.state_dict()
        memory = [t for kind in sorted(state["memory"]) for _, t in sorted(state["memory"][kind].items())]
        return torch.cat([torch.tensor([state["step"]], dtype=torch.float64), flat_grad(model),
                          *[t.flatten() for t in memory]])

    start()
    before = seen()
    lines = traced(step)
    after = seen()
    assert not torch.equal(before, after)
    first = {line: at for at, line in reversed(list(enumerate(lines, 1)))}
    last = {line: at for at, line in enumerate(lines, 1)}
    outcomes = set()
    for at in sorted({*first.values(), *last.values()}):
        start()
        traced(step, at)
        now = seen()
        assert torch.equal(now, before) or torch.equal(now, after), f"interrupted at {lines[at - 1]}"
        outcomes.add(torch.equal(now, after))
    assert outcomes == {True, False}
