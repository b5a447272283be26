"""Law 11: every value, gradient and product comes from one function of the weights, on data that stay as they are.

What makes it two: a model that computes something else where gradients are off, data that come in another order in
each pass, and whatever changes the weights, the inputs or the targets while it is evaluated.
"""

import random
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, TensorDataset, WeightedRandomSampler

from flatmin import Objective
from flatmin.curvature import GaussNewton, Hessian, eigenpairs
from flatmin.linalg import memory
from flatmin.sharpness import (
    agreement,
    average_case,
    critical_sharpness,
    edge_of_stability,
    first_order,
    largest_random,
    m_sharpness,
    normalized_flatness,
    one_step,
    worst_case,
)
from problems import assert_same, batch

pytestmark = pytest.mark.filterwarnings("ignore::flatmin.sharpness.SharpnessWarning")


class Encoder(nn.Module):
    """Padded positions are zeros on the fast path and numbers on the plain one."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(6, 3)

    def forward(self, x):
        x = x[:, None] * torch.arange(1.0, 5.0)[:, None]
        padding = (torch.arange(4) > 1).expand(len(x), 4)
        return self.head(self.encoder(x, src_key_padding_mask=padding).mean(1))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, 3)

    def forward(self, x):
        x = torch.stack([x, x.flip(1), -x], 1)
        padding = (torch.arange(3) > 1).expand(len(x), 3)
        return self.head(self.attention(x, x, x, key_padding_mask=padding)[0].sum(1))


class GradientMode(nn.Linear):
    """Someone's cheaper path for inference, as with caches, fused kernels and quantised weights."""

    def __init__(self):
        super().__init__(6, 3)

    def forward(self, x):
        return super().forward(x) if torch.is_grad_enabled() else super().forward(x).round(decimals=1)


class Recorded(nn.Linear):
    def __init__(self):
        super().__init__(6, 3)

    def forward(self, x):
        z = super().forward(x)
        return z.tanh() if z.requires_grad else z


MODELS = (Encoder, Attention, GradientMode, Recorded)
MEASURES = {
    "one_step": one_step, "first_order": first_order, "average_case": lambda o: average_case(o, samples=4),
    "largest_random": lambda o: largest_random(o, draws=2), "critical_sharpness": critical_sharpness,
    "worst_case": lambda o: worst_case(o, iterations=2, restarts=1), "agreement": lambda o: agreement(o, iterations=2),
    "normalized_flatness": lambda o: normalized_flatness(o, samples=2), "m_sharpness": lambda o: m_sharpness(o, 6),
    "edge_of_stability": lambda o: edge_of_stability(o, 0.1),
}


def plain_value(model, x, y):
    """By hand: with gradients, on the plain path."""
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        return nn.functional.cross_entropy(model.eval()(x), y)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize("cls", MODELS)
def test_value_and_sharpness_are_of_one_function(cls):
    torch.manual_seed(0)
    model = cls()
    objective = Objective(model, nn.CrossEntropyLoss(), batch(0))
    loss = plain_value(model, *batch(0))
    g = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True, allow_unused=True)
    assert float(objective.value()) == pytest.approx(float(loss.detach()), rel=1e-14)
    with torch.no_grad():
        assert float(objective.value()) == pytest.approx(float(loss.detach()), rel=1e-14)
    assert torch.backends.mha.get_fastpath_enabled()
    rho, length = 1e-4, float(torch.cat([t.flatten() for t in g]).norm())
    s = one_step(objective, rho)
    assert s.first_order == pytest.approx(rho * length, rel=1e-9)
    assert abs(s.remainder) < 1e-3 * abs(s.second_order) + 1e-12
    with torch.no_grad():
        for p, t in zip(model.parameters(), g, strict=True):
            p.add_(t, alpha=rho / length)
    assert s.perturbed_loss == pytest.approx(float(plain_value(model, *batch(0)).detach()), rel=1e-13)


def test_under_inference_mode_too():
    model = nn.Linear(6, 3)
    objective = Objective(model, nn.CrossEntropyLoss(), batch(0))
    expected = objective.gradient()
    with torch.inference_mode():
        found = objective.gradient()
        assert float(one_step(objective).first_order) > 0
    assert all(map(torch.equal, expected, found)) and float(expected[0].norm()) > 0


def test_a_gradient_penalty_is_a_function_for_every_measure():
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))

    def loss(z, b):
        return nn.functional.cross_entropy(z, b[1]) + torch.autograd.grad(
            z.square().sum(), model[0].weight, create_graph=True)[0].square().mean()

    objective = Objective(model, loss, batch(0), forward=lambda m, b: m(b[0]))
    expected = float(loss(model(batch(0)[0]), batch(0)).detach())
    assert float(objective.value()) == pytest.approx(expected, rel=1e-14)
    s = average_case(objective, 1e-3, samples=40)
    assert abs(s.value) > 0 and s.loss == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("name", MEASURES)
def test_every_measure_checks_its_objective_once(name):
    class Noisy(nn.Linear):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x) * random.random()     # a generator that no seed of torch controls

    model = Noisy(6, 3)
    with pytest.raises(ValueError, match="two evaluations at the same weights.*Noisy"):
        MEASURES[name](Objective(model, nn.CrossEntropyLoss(), batch(0)))
    healthy = Objective(nn.Linear(6, 3), nn.CrossEntropyLoss(), batch(0))
    MEASURES[name](healthy)
    assert not healthy._check


class MovingMean(nn.Linear):
    """Its output in training depends on a buffer that every evaluation moves (by rebinding it)."""

    def __init__(self):
        super().__init__(6, 3)
        self.register_buffer("mean", torch.ones(3))

    def forward(self, x):
        z = super().forward(x)
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * z.detach().mean(0)
        return z * self.mean


class Counting(nn.Linear):
    """A schedule by the number of calls, counted in place."""

    def __init__(self):
        super().__init__(6, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.calls += 1
        return super().forward(x) / (1 + self.calls)


STATEFUL = (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(6, 3)), MovingMean, Counting,
            lambda: nn.Sequential(nn.BatchNorm1d(6, momentum=0.5), nn.Linear(6, 3)))


@pytest.mark.parametrize("model", STATEFUL)
@pytest.mark.parametrize("measure", [one_step, lambda o: worst_case(o, iterations=3, restarts=0),
                                     lambda o: average_case(o, samples=4)])
def test_buffers_that_evaluations_move_do_not_make_two_functions(model, measure):
    """In training mode each batch finds the buffers as they are, in whatever order and however often it is read."""
    torch.manual_seed(0)
    model = model()
    parts = [batch(0, 6), batch(1, 9)]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found, losses = [measure(Objective(model, nn.CrossEntropyLoss(), p, mode="train")) for p in (parts, parts[::-1])], 0
    assert found[0].value == pytest.approx(found[1].value, rel=1e-6)
    for x, y in parts:
        model.load_state_dict(before)
        losses += nn.functional.cross_entropy(model.train()(x), y, reduction="sum")
    model.load_state_dict(before)
    objective = Objective(model, nn.CrossEntropyLoss(), parts, mode="train")
    assert found[0].loss == pytest.approx(float(losses) / 15, rel=1e-12)
    with Hessian(objective).session():
        pass
    for key, value in model.state_dict().items():
        assert_same(value, before[key], key)


# --- data that differ from pass to pass -------------------------------------------------------------------------------

def loaders():
    x, y = batch(0, 24)
    data = TensorDataset(x, y)
    g = torch.Generator

    def seeded():
        return g().manual_seed(3)

    return {
        "shuffle": DataLoader(data, 4, shuffle=True),
        "generator": DataLoader(data, 4, shuffle=True, generator=seeded()),
        "sampler": DataLoader(data, 4, sampler=RandomSampler(data, generator=seeded())),
        "batch sampler": DataLoader(data, batch_sampler=torch.utils.data.BatchSampler(
            RandomSampler(data, generator=seeded()), 4, False)),
        "drawn with replacement": DataLoader(data, 4, sampler=WeightedRandomSampler(
            torch.arange(1.0, 25.0), 24, generator=seeded())),
    }


def in_reverse_every_other_pass():
    x, y = batch(0, 24)

    class Reversing:
        passes = 0

        def __iter__(self):
            Reversing.passes += 1
            parts = list(zip(x.split(4), y.split(4), strict=True))
            return iter(parts[::-1] if Reversing.passes % 2 else parts)

    return Reversing()


@pytest.mark.parametrize("name", list(loaders()))
def test_every_pass_reads_the_same_order_and_the_generator_is_given_back(name):
    loader = loaders()[name]
    objective = Objective(nn.Linear(6, 3), nn.CrossEntropyLoss(), loader)
    held = [g for g in (loader.generator, getattr(loader.sampler, "generator", None),
                        getattr(getattr(loader.batch_sampler, "sampler", None), "generator", None)) if g is not None]
    before, state = [g.get_state() for g in held], torch.get_rng_state()
    with objective.session():
        first, second = ([t.data[0] for t in objective.weighted_batches()] for _ in range(2))
    assert all(map(torch.equal, first, second))
    assert float(objective.value()) == float(objective.value())
    m_sharpness(objective, 6, measure="one_step")
    assert all(torch.equal(a, g.get_state()) for a, g in zip(before, held, strict=True))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("cls", [Hessian, GaussNewton])
@pytest.mark.parametrize("name", ["generator", "batch sampler", "by hand"])
def test_kept_graphs_belong_to_their_batches(cls, name, monkeypatch):
    """Room for about half of the graphs: the rest is evaluated anew, and must not take the place of what is kept."""
    data = in_reverse_every_other_pass() if name == "by hand" else loaders()[name]
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))
    x, y = batch(0, 24)
    whole = cls(Objective(model, nn.CrossEntropyLoss(), (x, y))).dense()
    monkeypatch.setattr(memory, "available", lambda device: 15_000)
    operator = cls(Objective(model, nn.CrossEntropyLoss(), data))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with operator.session():
            rows = []
            for i, v in enumerate(torch.eye(operator.size)):
                rows.append(operator @ v)
                assert i or 0 < len(operator._autograd.cache.graphs) < 6, "the test needs room for a part of the graphs"
    assert any("not kept between matvecs" in str(w.message) for w in caught) == (name == "by hand")
    torch.testing.assert_close(torch.stack(rows), whole, rtol=1e-10, atol=1e-12)


def test_a_loader_over_a_stream_has_no_length():
    x, y = batch(0, 24)

    class Stream(IterableDataset):
        def __iter__(self):
            return iter(list(zip(x, y, strict=True)))

    objective = Objective(nn.Linear(6, 3), nn.CrossEntropyLoss(), DataLoader(Stream(), batch_size=8))
    whole = Objective(objective.model, nn.CrossEntropyLoss(), (x, y))
    assert not objective.single
    torch.testing.assert_close(Hessian(objective).dense(), Hessian(whole).dense())
    assert one_step(objective).value == pytest.approx(one_step(whole).value, rel=1e-10)
    with pytest.raises(ValueError, match="gave no batch"):
        Objective(nn.Linear(6, 3), nn.CrossEntropyLoss(), DataLoader(TensorDataset(x[:0], y[:0]), 4)).value()
    with pytest.raises(ValueError, match="every target is ignored"):
        Objective(nn.Linear(6, 3), nn.CrossEntropyLoss(), (x, torch.full_like(y, -100))).value()


# --- models and losses that change what they are given ----------------------------------------------------------------

class ScalesItsInput(nn.Linear):
    def forward(self, x):
        return super().forward(x.mul_(0.5))


class Sorts(nn.Linear):
    def forward(self, x):
        x.copy_(x.sort(dim=1).values.cumsum(1))
        return super().forward(x)


def relabels(z, y):
    y[y == 2] = -100
    y[y == 1] = 2
    return nn.functional.cross_entropy(z, y)


@pytest.mark.parametrize(("model", "loss"), [
    (lambda: ScalesItsInput(6, 3), nn.CrossEntropyLoss()),
    (lambda: nn.Sequential(nn.ReLU(inplace=True), ScalesItsInput(6, 3)), nn.CrossEntropyLoss()),
    (lambda: Sorts(6, 3), nn.CrossEntropyLoss()),
    (lambda: nn.Linear(6, 3), relabels),
])
def test_data_stay_as_they_were(model, loss):
    torch.manual_seed(0)
    net, (x, y) = model(), batch(0, 30)
    expected = float(loss(net(x.clone()), y.clone()).detach())
    kept = x.clone(), y.clone()
    objective = Objective(net, loss, (x, y))
    assert float(objective.value()) == pytest.approx(expected, rel=1e-14)
    s = one_step(objective, 1e-3)
    assert s.loss == pytest.approx(expected, rel=1e-14) and abs(s.remainder) < 1e-6
    Hessian(objective).dense()
    assert_same(x, kept[0])
    assert_same(y, kept[1])


def test_a_loss_may_differentiate_by_the_inputs_it_was_given():
    """Physics-informed losses differentiate outputs by the very batch that the model saw."""
    model, x = nn.Sequential(nn.Linear(1, 5), nn.Tanh(), nn.Linear(5, 1)), torch.linspace(0, 1, 9)[:, None]

    def residual(u, b):
        return (torch.autograd.grad(u.sum(), b, create_graph=True)[0] + u).square().mean()

    objective = Objective(model, residual, x, forward=lambda m, b: m(b.requires_grad_()), weight=len)
    b = x.clone().requires_grad_()
    assert float(objective.value()) == pytest.approx(float(residual(model(b), b).detach()), rel=1e-13)
    assert one_step(objective, 1e-3).first_order > 0 and not x.requires_grad


class Renormalized(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Parameter(torch.randn(3, 4) * 5), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(nn.functional.embedding((x[:, 0] > 0).long(), self.table, max_norm=1.0))


class Clamped(nn.Linear):
    def forward(self, x):
        with torch.no_grad():
            self.weight.clamp_(-0.1, 0.1)
        return super().forward(x)


class Halved(nn.Linear):
    def forward(self, x):
        self.bias.data.mul_(0.5)
        return super().forward(x)


@pytest.mark.parametrize(("model", "name"), [(Renormalized, "table"), (lambda: Clamped(6, 3), "weight"),
                                             (lambda: Halved(6, 3), "bias")])
@pytest.mark.parametrize("measure", [one_step, average_case, lambda o: eigenpairs(Hessian(o), 1)])
def test_a_model_that_changes_its_weights_is_refused_and_its_weights_given_back(model, name, measure):
    model = model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"changed its parameter '{name}'"):
        measure(Objective(model, nn.CrossEntropyLoss(), batch(0)))
    for key, value in model.state_dict().items():
        assert_same(value, before[key], key)


@pytest.mark.parametrize(("model", "message"), [
    (lambda: nn.Sequential(nn.Embedding(4, 3, max_norm=1.0)), "module '0' .Embedding. has max_norm=1.0"),
    (lambda: nn.Sequential(nn.Identity(), nn.EmbeddingBag(4, 3, max_norm=2.0)), "module '1' .EmbeddingBag. has max_"),
    (lambda: nn.Sequential(nn.Linear(6, 3, dtype=torch.complex64)), "parameter '0.weight' is complex"),
    (lambda: nn.Sequential(nn.Linear(6, 3, device="meta")), "parameter '0.weight' is on the meta device"),
    (lambda: nn.Sequential(nn.LazyLinear(3)), "parameter '0.weight' of a lazy module has no shape"),
])
def test_models_without_a_function_of_real_weights_are_refused_by_name(model, message):
    with pytest.raises(ValueError, match=message):
        Objective(model(), nn.CrossEntropyLoss(), batch(0))


def test_an_objective_says_what_it_is():
    objective = Objective(nn.Linear(6, 3), nn.CrossEntropyLoss(), batch(0))
    assert repr(objective) == "Objective(Linear, CrossEntropyLoss, one batch of 12, mode='eval')"
    assert "3 batches" in repr(Objective(nn.Linear(6, 3), nn.functional.cross_entropy, [batch(i) for i in range(3)]))
    assert "the model's own loss, one batch of 12" in repr(Objective(nn.Linear(6, 3), None, {"x": batch(0)[0]}))


def test_hooks_on_parameters_do_not_enter_a_measurement():
    """A user's mask or scaling of gradients belongs to training; the derivative of the loss has none."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    objective = Objective(model, nn.CrossEntropyLoss(), (torch.randn(16, 4), torch.randint(3, (16,))))
    gradient, top = objective.gradient(), eigenpairs(Hessian(objective)).largest
    calls = []
    model[0].weight.register_hook(lambda g: calls.append(1) or 2 * g)
    torch.testing.assert_close(objective.gradient(), gradient)
    assert eigenpairs(Hessian(objective)).largest == top and not calls
    objective.model(torch.randn(2, 4)).sum().backward()
    assert calls, "the hook is there again"
