"""Objective: every form of data and batch, exact averages, determinism, and that nothing is changed."""

import copy
import functools
import math
import warnings
from collections import UserDict
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from flatmin import Objective, batches
from flatmin.curvature import Hessian, eigenpairs
from flatmin.gradient_sum import GradientSum
from flatmin.sharpness import one_step


@pytest.fixture
def case():
    return nn.Linear(4, 3), torch.randn(10, 4), torch.randint(0, 3, (10,))


def test_forms_of_data(case):
    model, x, y = case
    loss = nn.CrossEntropyLoss()
    expected = float(loss(model(x), y).detach())
    parts = [(x[:7], y[:7]), [x[7:], y[7:]]]
    loader = DataLoader(TensorDataset(x, y), batch_size=4)
    shuffled = DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True)
    for data in ((x, y), [x, y], parts, tuple(parts[0:1]) and [(x, y)], loader, shuffled):
        objective = Objective(model, loss, data)
        for _ in range(2):
            value = objective.value()
            assert value.dim() == 0 and value.dtype == torch.float64
            assert float(value) == pytest.approx(expected, rel=1e-14)


def test_mappings(case):
    _, x, y = case

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x, labels=None):
            z = self.linear(x)
            return {"logits": z, "loss": nn.functional.cross_entropy(z, labels)}

    model = Model()
    expected = float(nn.functional.cross_entropy(model.linear(x), y))
    parts = [{"x": x[:7], "labels": y[:7]}, UserDict({"x": x[7:], "labels": y[7:]})]
    for data in ({"x": x, "labels": y}, UserDict({"x": x, "labels": y}), parts):
        assert float(Objective(model, None, data).value()) == pytest.approx(expected, rel=1e-14)
    own = Objective(model, lambda out, batch: 2 * out["loss"], parts)
    assert float(own.value()) == pytest.approx(2 * expected, rel=1e-14)
    with pytest.raises(ValueError, match="loss_fn=None is for batches that are mappings"):
        Objective(model.linear, None, (x, y)).value()


def test_any_other_batch_through_forward(case):
    model, x, y = case
    data = [{"a": x[:3], "t": y[:3]}, {"a": x[3:], "t": y[3:]}]
    objective = Objective(model, lambda z, batch: nn.functional.cross_entropy(z, batch["t"]), data,
                          forward=lambda model, batch: model(batch["a"]), weight=lambda batch: len(batch["t"]))
    assert float(objective.value()) == pytest.approx(float(nn.functional.cross_entropy(model(x), y)), rel=1e-14)
    pinn = Objective(model, lambda z, batch: z.square().mean(), torch.randn(5, 4), forward=lambda m, b: m(b))
    assert Hessian(pinn).dense().shape == (15, 15)


@pytest.mark.parametrize(("data", "message"), (
    (iter([1]), r"only once.*list\(data\)"),
    ((b for b in [1]), r"only once.*list\(data\)"),
    ([], "empty list"),
    (3, "a batch, a list of batches or a loader"),
    (TensorDataset(torch.zeros(2, 2), torch.zeros(2)), "DataLoader"),
    ((1, 2, 3), "forward="),
))
def test_data_that_cannot_be_used(case, data, message):
    with pytest.raises(ValueError, match=message):
        Objective(case[0], nn.CrossEntropyLoss(), data)


def test_a_loader_that_is_exhausted_after_one_pass(case):
    model, x, y = case

    class Once:
        def __init__(self):
            self.left = iter([(x, y)])

        def __iter__(self):
            return self.left

    objective = Objective(model, nn.CrossEntropyLoss(), Once())
    objective.value()
    with pytest.raises(ValueError, match="iterated only once"):
        objective.value()


def test_a_loss_that_is_not_one_number(case):
    model, x, y = case
    with pytest.raises(ValueError, match=r"must be one number.*\(10,\)"):
        Objective(model, nn.CrossEntropyLoss(reduction="none"), (x, y)).value()
    with pytest.raises(ValueError, match="weight of a batch"):
        Objective(model, nn.CrossEntropyLoss(), (x, y), weight=lambda batch: -1).value()


def test_batches_where_everything_is_ignored(case):
    model, x, y = case
    objective = Objective(model, nn.CrossEntropyLoss(), [(x, y), (x, torch.full_like(y, -100))])
    assert float(objective.value()) == pytest.approx(float(nn.functional.cross_entropy(model(x), y)), rel=1e-14)
    assert torch.isfinite(torch.cat([g.flatten() for g in objective.gradient()])).all()


@pytest.mark.parametrize("loss", (nn.MSELoss(), nn.BCEWithLogitsLoss(), nn.L1Loss(), nn.MSELoss(reduction="sum"),
                                  lambda z, t: 0.5 * (z - t).square().sum(1).mean()))
def test_float_targets(case, loss):
    model, x, _ = case
    t = torch.rand(10, 3)
    parts = Objective(model, loss, [(x[:7], t[:7]), (x[7:], t[7:])])
    assert float(parts.value()) == pytest.approx(float(loss(model(x), t)), rel=1e-13)


def test_gradient_in_parameter_order_with_zeros(case):
    _, x, y = case
    model = nn.ModuleDict({"unused": nn.Linear(2, 2), "frozen": nn.Linear(4, 4), "head": nn.Linear(4, 3)})
    model["frozen"].requires_grad_(False)
    objective = Objective(model, lambda z, batch: nn.functional.cross_entropy(z, batch[1]), (x, y),
                          forward=lambda m, batch: m["head"](m["frozen"](batch[0])))
    gradient = objective.gradient()
    assert [g.shape for g in gradient] == [p.shape for p in model.parameters()]
    assert all(float(g.abs().max()) == 0 for g in gradient[:4]) and gradient[4].abs().max() > 0
    assert [id(p) for p in objective.parameters] == [id(p) for p in model.parameters() if p.requires_grad]


def test_modes_and_that_nothing_is_changed(case):
    _, x, y = case
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
    model[1].eval()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    grads = [p.grad for p in model.parameters()]
    state, rng, flags = copy.deepcopy(model.state_dict()), torch.get_rng_state(), [m.training for m in model.modules()]
    values = {mode: float(Objective(model, nn.CrossEntropyLoss(), (x, y), mode=mode).value())
              for mode in ("eval", "train", "batch_statistics", "as_is")}
    Objective(model, nn.CrossEntropyLoss(), [(x, y)] * 2, mode="train").gradient()
    assert len(set(values.values())) == 4
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert torch.equal(rng, torch.get_rng_state()) and flags == [m.training for m in model.modules()]
    assert all(p.grad is g and float(g.min()) == float(g.max()) == 1 for p, g in
               zip(model.parameters(), grads, strict=True))
    again = Objective(model, nn.CrossEntropyLoss(), (x, y), mode="train")
    assert float(again.value()) == float(again.value()) == values["train"]
    assert float(Objective(model, nn.CrossEntropyLoss(), (x, y), mode="train", seed=1).value()) != values["train"]
    with pytest.raises(ValueError, match="mode must be"):
        Objective(model, nn.CrossEntropyLoss(), (x, y), mode="test")


def test_a_shuffled_loader_is_deterministic_enough(case):
    model, x, y = case
    loader = DataLoader(TensorDataset(x, y), batch_size=3, shuffle=True)
    Objective(model, nn.CrossEntropyLoss(), loader).check()


def test_compiled_models_are_run_uncompiled(case):
    _, x, y = case
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    plain = Hessian(Objective(model, nn.CrossEntropyLoss(), (x, y))).dense()
    graphs = []
    compiled = torch.compile(model, backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    assert torch.allclose(Hessian(Objective(compiled, nn.CrossEntropyLoss(), (x, y))).dense(), plain, atol=1e-14)
    assert not graphs
    compiled(x)
    assert graphs       # and compiled again afterwards


def test_batches_of_other_tensors_are_others():
    x, y = torch.randn(3, 2), torch.randn(3)
    assert batches.equal((x, y), (x.clone(), y.clone())) and batches.equal({"x": x, "y": [y]}, {"x": x, "y": [y]})
    for other in ((x,), (x, y, y), (x, y + 1), (x, y[:2]), (x[:, :1], y)):
        assert not batches.equal((x, y), other) and not batches.equal(other, (x, y))


def test_torchs_own_losses_are_known():
    for loss in (F.mse_loss, nn.MSELoss(), functools.partial(F.cross_entropy, ignore_index=1), nn.CrossEntropyLoss()):
        assert batches.of_torch(loss)
    for loss in (lambda z, y: F.mse_loss(z, y), nn.Linear(2, 2), functools.partial(torch.add, alpha=2)):
        assert not batches.of_torch(loss)


def test_samples_are_cut_out_only_where_every_tensor_has_a_row_for_each():
    x, y = torch.randn(6, 2), torch.randn(6)
    cut = batches.samples({"x": x, "y": [y]}, slice(1, 3))
    assert torch.equal(cut["x"], x[1:3]) and torch.equal(cut["y"][0], y[1:3])
    for other in (torch.tensor(1.0), torch.randn(4), torch.randn(1, 6)):
        assert batches.samples((x, y, other), slice(1, 3)) is None


@pytest.mark.parametrize("where", ("data", "weights"))
@pytest.mark.parametrize("measure", (lambda o: eigenpairs(Hessian(o)), one_step))
def test_a_loss_that_is_not_finite_is_named_with_its_batch(measure, where):
    model, batches = nn.Linear(2, 1), [(torch.randn(3, 2), torch.randn(3, 1)) for _ in range(2)]
    with torch.no_grad():
        (batches[1][0] if where == "data" else model.weight)[0, 0] = torch.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        said = "batch 1, whose data are not finite" if where == "data" else "batch 0, .* the weights are not"
        with pytest.raises(ValueError, match=f"the loss is nan at these weights, first in {said}"):
            measure(Objective(model, nn.MSELoss(), batches))


@pytest.mark.parametrize("arguments, said", (
    (lambda m, loss, data: (loss, m, data), "the loss Linear has some: write Objective"),
    (lambda m, loss, data: (F.mse_loss, m, data), "must be a torch.nn.Module, got function: write Objective"),
    (lambda m, loss, data: (m, data, loss), "must be a function of outputs and targets, got tuple: write Objective"),
    (lambda m, loss, data: (m.state_dict(), loss, data), "must be a torch.nn.Module, got OrderedDict: write")))
def test_arguments_in_another_order_are_refused(arguments, said):
    data = torch.randn(3, 2), torch.randn(3, 1)
    with pytest.raises(TypeError, match=said):
        Objective(*arguments(nn.Linear(2, 1), nn.MSELoss(), data))


def test_sums_of_gradients_take_the_memory_given_and_leave_grad_alone():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1)).double()
    w = list(model.parameters())
    memory = torch.full((sum(p.numel() for p in w),), math.nan, dtype=torch.float64)
    sums = GradientSum(w, memory.split([p.numel() for p in w]))
    x = torch.eye(3, dtype=torch.float64)
    for factor in (2.0, -0.5):
        handles = [p.register_hook(sums.hook(i, factor)) for i, p in enumerate(w)]
        torch.autograd.grad(model[0](x).square().sum() * factor, w, allow_unused=True)
        for handle in handles:
            handle.remove()
    assert sums.missing == [2, 3] and all(p.grad is None for p in w)
    expected = torch.autograd.grad(model[0](x).square().sum() * (2.0 * 2.0 + 0.5 * 0.5), w[:2])
    for found, true in zip(sums.totals(), (*expected, *map(torch.zeros_like, w[2:])), strict=True):
        torch.testing.assert_close(found, true)
    assert torch.equal(memory, torch.cat([t.flatten() for t in sums.totals()]))


def test_half_precision_gradients_are_summed_in_float32():
    p = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    sums = GradientSum([p])
    for _ in range(1000):       # 256 + 1 is 256 in bfloat16
        sums.add(0, torch.ones(1, dtype=torch.bfloat16), 1.0)
    assert float(sums.totals()[0]) == 1000


@pytest.mark.parametrize("inside", (False, True))
def test_a_loss_check_sees_every_batch_and_stays_with_its_objective(inside):
    model, loss, seen = nn.Linear(2, 1), nn.MSELoss(), []
    objective = Objective(model, loss, [(torch.eye(2) * k, torch.zeros(2, 1)) for k in (1, 2, 3)])
    with objective.session() if inside else nullcontext():
        other = objective.with_loss_check(lambda outputs, value: seen.append((outputs.shape, float(value))))
        assert other.value() == objective.value()
    assert [value for _, value in seen] == list(objective.evaluate().losses) and seen[0][0] == (2, 1)


def test_other_data_inside_a_session_are_evaluated_by_a_session_of_their_own():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    a, b = ((torch.randn(4, 2), torch.zeros(4, 2)) for _ in range(2))
    objective = Objective(model, nn.MSELoss(), [a], mode="train")
    alone = Objective(model, nn.MSELoss(), [b], mode="train").value()
    with objective.session():
        first = objective.value()
        assert objective.on_data([b]).value() == alone
        assert objective.value() == first
        assert len(list(objective.batches())) == 1
    assert model.training and int(model[1].num_batches_tracked) == 0


def test_an_objective_is_one_class():
    assert Objective.__mro__ == (Objective, object)
    with pytest.raises(AssertionError):
        next(Objective(nn.Linear(1, 1), nn.MSELoss(), (torch.ones(1, 1), torch.ones(1, 1))).batches())
