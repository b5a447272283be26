"""What a step costs: how often the model is called, and how often the host waits for the device.

No other law notices a LookSAM that pays two passes every step (a peer's does), or a ``.item()`` per tensor.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import problems
from flatmin import vectors
from problems import batch, build, loss_fn
from rows import ROWS, case_id, parts_for, start, warm_up


class HostReads(TorchDispatchMode):
    """Counts the operations that make the host wait: a device value turned into a Python number or bool."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default,
                    torch.ops.aten.equal.default, torch.ops.aten.nonzero.default):
            self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("row", ROWS, ids=case_id)
def test_forward_passes_are_what_the_row_says(row):
    model = build()
    optimizer, sharpener = start(row, row.bases[-1], model)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    for t in range(7):
        parts = parts_for(row, *batch(t))
        calls.clear()
        row.backward(sharpener, model, parts)
        assert len(calls) == row.passes(t) * len(parts), f"step {t}"
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("row", ROWS, ids=case_id)
def test_backward_passes_are_what_the_row_says(row):
    model = build()
    optimizer, sharpener = start(row, row.bases[-1], model)
    calls = []
    for t in range(4):
        parts = parts_for(row, *batch(t))
        calls.clear()

        def loss(z, y):
            z.register_hook(lambda g: calls.append(1))
            return loss_fn(z, y)

        row.backward(sharpener, model, parts, loss)
        assert len(calls) == row.passes(t) * len(parts), f"step {t}"
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("row", ROWS, ids=case_id)
def test_the_host_reads_one_flag_a_step(row, monkeypatch):
    monkeypatch.setattr(vectors, "READABLE", ())      # as on an accelerator
    model = build()
    optimizer, sharpener = start(row, row.bases[-1], model)
    warm_up(row, sharpener, optimizer, model, 3 if row.stateful else 1)
    parts = parts_for(row, *batch(0))
    with HostReads() as reads:
        row.backward(sharpener, model, parts)
    assert reads.count <= 1, f"{reads.count} host synchronisations in one step"


def test_the_counter_of_host_reads_counts():
    with HostReads() as reads:
        float(torch.ones(()) + 1)
        bool(torch.ones(()) > 0)
    assert reads.count == 2


@pytest.mark.parametrize("row", ROWS, ids=case_id)
def test_telemetry_holds_no_graph_and_no_copy_of_the_weights(row):
    """``last`` must not keep the step's graph alive."""
    import gc
    import weakref

    model = build(problems.RolesNet)
    _, sharpener = start(row, row.bases[-1], model)
    kept = []

    def loss(z, y):
        kept.append(weakref.ref(z))
        return loss_fn(z, y)

    value = row.backward(sharpener, model, parts_for(row, *batch(0)), loss)
    assert not value.requires_grad
    gc.collect()
    assert all(ref() is None for ref in kept)
