"""Law 5: save, reload in a new process, continue: bitwise what an uninterrupted run does.

Each row is stopped in the middle of its cadence. The states of model, optimizer and Sharpener go through one file that
``torch.load(weights_only=True)`` accepts. Peers lose the base optimizer's state here (a spike of loss on resume), the
cadence's counter, or the random direction's generator; within one process nothing of that shows.
"""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from problems import BASES, NoisyNet, assert_same, batch, build, flat
from rows import CASES, ROWS, Row, case_id, parts_for, start

BEFORE, AFTER = 7, 6  # 7 is in the middle of every cadence in the table


def network(row: Row):
    return build() if row.groups is not None or row.preset == "sam_on" else build(NoisyNet)


def steps(row, sharpener, optimizer, model, first, last):
    for t in range(first, last):
        torch.manual_seed(t)
        row.backward(sharpener, model, parts_for(row, *batch(t)))
        optimizer.step()
        optimizer.zero_grad()


def key(row, base):
    return f"{row.name}/{base}"


def save_all(path):
    saved = {}
    for row, base in CASES:
        model = network(row)
        optimizer, sharpener = start(row, base, model)
        steps(row, sharpener, optimizer, model, 0, BEFORE)
        saved[key(row, base)] = {"model": model.state_dict(), "optimizer": optimizer.state_dict(),
                                 "sharpener": sharpener.state_dict()}
        torch.save(saved[key(row, base)], path)  # one at a time first, so that a failure names its row
    torch.save(saved, path)


def continue_all(path, out):
    """Runs in a process of its own."""
    torch.set_default_dtype(torch.float64)
    loaded, result = torch.load(path, weights_only=True), {}
    for row, base in CASES:
        model = network(row)
        optimizer, sharpener = start(row, base, model)
        state = loaded[key(row, base)]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        sharpener.load_state_dict(state["sharpener"])
        steps(row, sharpener, optimizer, model, BEFORE, BEFORE + AFTER)
        result[key(row, base)] = flat(model)
    torch.save(result, out)


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        save_all(folder / "saved.pt")
    finally:
        torch.set_default_dtype(before)
    here = Path(__file__).parent
    saved, out = folder / "saved.pt", folder / "out.pt"
    code = (f"import sys; sys.path[:0] = [{str(here)!r}, {str(here.parent)!r}]; import torch; "
            f"torch.set_num_threads(1); import test_resume; "
            f"test_resume.continue_all({str(saved)!r}, {str(out)!r})")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "out.pt", weights_only=True)


@pytest.mark.parametrize(("row", "base"), CASES, ids=case_id)
def test_a_new_process_continues_bitwise(resumed, row, base):
    model = network(row)
    optimizer, sharpener = start(row, base, model)
    steps(row, sharpener, optimizer, model, 0, BEFORE + AFTER)
    assert_same(resumed[key(row, base)], flat(model))


@pytest.mark.parametrize("row", [r for r in ROWS if r.stateful or r.name == "random_sam"], ids=case_id)
def test_what_is_remembered_matters(row):
    """A fresh Sharpener in the place of the restored one gives other weights: the law above can fail."""
    results = []
    for forget in (False, True):
        model = network(row)
        optimizer, sharpener = start(row, row.bases[0], model)
        steps(row, sharpener, optimizer, model, 0, BEFORE)
        if forget:
            sharpener = row.make(model, optimizer)
        steps(row, sharpener, optimizer, model, BEFORE, BEFORE + AFTER)
        results.append(flat(model))
    assert not torch.equal(*results)


@pytest.mark.parametrize("row", ROWS, ids=case_id)
def test_state_is_a_snapshot(row):
    """A state taken now does not change when training goes on (or a checkpoint written late would lie)."""
    import copy

    model = network(row)
    optimizer, sharpener = start(row, row.bases[0], model)
    steps(row, sharpener, optimizer, model, 0, BEFORE)
    state = sharpener.state_dict()
    before = copy.deepcopy(state)
    steps(row, sharpener, optimizer, model, BEFORE, BEFORE + 4)
    assert_equal_states(state, before)


def assert_equal_states(a, b, path="state"):
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for k in a:
            assert_equal_states(a[k], b[k], f"{path}[{k!r}]")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal_states(x, y, f"{path}[{i}]")
    elif torch.is_tensor(a):
        assert_same(a, b, path)
    else:
        assert a == b, path


@pytest.mark.parametrize("row", [r for r in ROWS if not r.stateful and not r.random], ids=case_id)
def test_rows_without_memory_save_no_copy_of_the_weights(row):
    model = build()
    optimizer, sharpener = start(row, row.bases[0], model)
    steps(row, sharpener, optimizer, model, 0, 2)

    def numbers(value):
        if torch.is_tensor(value):
            return value.numel()
        children = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
        return sum(map(numbers, children))

    assert numbers(sharpener.state_dict()) < 100


def test_a_save_from_inside_the_second_pass_is_refused():
    """A checkpoint written by the forward itself, at w + eps, would hold the wrong weights."""
    from flatmin import presets
    from flatmin.errors import PerturbedStateError
    from problems import loss_fn

    model = build()
    sharpener = presets.sam(model, rho=0.1)
    x, y = batch(0)
    attempts = []

    def forward():
        attempts.append(1)
        if len(attempts) == 2:
            with pytest.raises(PerturbedStateError):
                sharpener.state_dict()
            attempts.append(1)
        return loss_fn(model(x), y)

    sharpener.backward(forward)
    assert len(attempts) == 3


def test_a_backward_from_inside_the_second_pass_is_refused_and_everything_comes_back():
    from flatmin import presets
    from problems import loss_fn

    model = build()
    before = flat(model)
    sharpener = presets.sam(model, rho=0.1)
    x, y = batch(0)

    def forward():
        if not torch.equal(flat(model), before):
            sharpener.backward(lambda: loss_fn(model(x), y))
        return loss_fn(model(x), y)

    with pytest.raises(RuntimeError):
        sharpener.backward(forward)
    assert_same(flat(model), before)


def test_a_state_of_another_model_or_variant_is_not_swallowed():
    """LookSAM's memory does not fit another network: an error, at the latest when it is used."""
    import rows

    look = next(r for r in ROWS if r.name == "looksam")
    model = build()
    optimizer, sharpener = start(look, "sgd", model)
    steps(look, sharpener, optimizer, model, 0, 2)
    other = build(NoisyNet)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fresh = look.make(other, BASES["sgd"](other.parameters()))
        with pytest.raises((ValueError, RuntimeError, KeyError)):
            fresh.load_state_dict(sharpener.state_dict())
            steps(look, fresh, BASES["sgd"](other.parameters()), other, 2, 4)
    assert rows.ROWS
