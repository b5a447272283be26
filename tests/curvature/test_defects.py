"""Silent errors of the peers, each as a test of the right behaviour. The numbers are those of PEERS.md part B."""

import contextlib
import copy

import pytest
import torch
from torch import nn

from flatmin import Objective, curvature
from flatmin.curvature import (
    Fisher,
    FunctionalPart,
    GaussNewton,
    Hessian,
    diagonal,
    eigenpairs,
    frobenius,
    spectral_density,
    trace,
)
from flatmin.sharpness import one_step
from nets import classification, mlp, ragged, samples


class Noisy(nn.Module):
    """Drops whatever the mode says."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 3)

    def forward(self, x):
        return nn.functional.dropout(self.linear(x), 0.5)


@pytest.mark.parametrize("measure", (lambda H: eigenpairs(H), lambda H: trace(H), lambda H: spectral_density(H)))
def test_randomness_is_detected_and_named(measure):
    """H13: with dropout left on, two products differ by more than their size, and no error."""
    with pytest.raises(ValueError, match=r"the model \(Noisy\) is random.*mode=\"train\""):
        measure(Hessian(Objective(Noisy(), nn.CrossEntropyLoss(), samples())))
    inner = nn.Sequential(nn.Linear(5, 5), Noisy())
    with pytest.raises(ValueError, match="module '1'"):
        measure(Hessian(Objective(inner, nn.CrossEntropyLoss(), samples())))


def test_random_data_are_detected_and_named():
    class Augmented:
        count = 0

        def __iter__(self):
            self.count += 1
            x, y = samples()
            yield x + 0.01 * self.count, y

    with pytest.raises(ValueError, match="the data differ from pass to pass"):
        eigenpairs(Hessian(Objective(mlp(), nn.CrossEntropyLoss(), Augmented())))


class InPlace(nn.Module):
    """Changes what it is given."""

    def __init__(self, change):
        super().__init__()
        self.first, self.change = nn.Linear(5, 3), change

    def forward(self, x):
        return self.first(self.change(x))


@pytest.mark.parametrize("change", (lambda x: x.mul_(2), lambda x: x.add_(1), lambda x: x.view(-1).sub_(1).view_as(x),
                                    lambda x: nn.functional.elu(x, inplace=True)))
def test_an_input_that_is_changed_in_place(change):
    """Each evaluation gets a copy of the batch: the numbers are those of a model that leaves its input alone."""
    changing, (x, y) = InPlace(change), samples()
    inputs = x.clone()
    other = copy.deepcopy(changing.first)
    found = eigenpairs(Hessian(Objective(changing, nn.CrossEntropyLoss(), (x, y))), 3)
    assert torch.equal(x, inputs)
    with torch.no_grad():
        plain = change(inputs)
    wanted = eigenpairs(Hessian(Objective(other, nn.CrossEntropyLoss(), (plain, y))), 3)
    torch.testing.assert_close(found.eigenvalues, wanted.eigenvalues)


class Reentrant(nn.Module):
    """Checkpoints its second layer, or its first, whose input requires no gradient."""

    def __init__(self, first=False, active=True):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.first, self.active = first, active

    def forward(self, x):
        def run(layer, x):
            return torch.tanh(layer(x))

        if not self.active:
            return self.head(run(self.b, run(self.a, x)))
        if self.first:
            return self.head(run(self.b, torch.utils.checkpoint.checkpoint(run, self.a, x, use_reentrant=True)))
        return self.head(torch.utils.checkpoint.checkpoint(run, self.b, run(self.a, x), use_reentrant=True))


def sequential():
    model = Reentrant()
    model.forward = lambda x: model.head(torch.utils.checkpoint.checkpoint_sequential([model.a, model.b], 2, x,
                                                                                      use_reentrant=True))
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", (Reentrant, lambda: Reentrant(first=True), sequential))
@pytest.mark.parametrize("measure", (
    lambda o: o.gradient(), lambda o: eigenpairs(Hessian(o)), lambda o: trace(GaussNewton(o)),
    lambda o: Hessian(o, product="finite_difference") @ torch.ones(Hessian(o).size), lambda o: one_step(o, rho=0.1),
    lambda o: Fisher(o).dense(), lambda o: (o.value(), o.gradient())))
def test_reentrant_checkpoints_are_refused(make, measure):
    """They give autograd.grad no gradient, and measurements the spectrum of the rest of the network."""
    objective = Objective(make(), nn.CrossEntropyLoss(), samples())
    with pytest.raises(ValueError, match="use_reentrant=True"):
        measure(objective)


@pytest.mark.filterwarnings("ignore")
def test_the_value_of_a_model_with_reentrant_checkpoints():
    torch.manual_seed(0)
    model = Reentrant(first=True)
    value = Objective(model, nn.CrossEntropyLoss(), samples()).value()
    model.active = False
    assert float(Objective(model, nn.CrossEntropyLoss(), samples()).value()) == float(value)


@pytest.mark.parametrize("product", ("auto", "cached", "finite_difference"))
def test_an_error_of_the_model_surfaces_once_and_unchanged(product):
    calls = []

    def loss(z, y):
        calls.append(1)
        raise RuntimeError("double backward: vmap is not implemented for this batching rule")

    H = Hessian(Objective(mlp(), loss, samples(), check=False), product=product)
    for measure in (lambda: H @ torch.ones(H.size), lambda: H.dense(), lambda: eigenpairs(H, certify=False)):
        calls.clear()
        with pytest.raises(RuntimeError, match="double backward: vmap is not implemented for this"):
            measure()
        assert len(calls) == 1


def test_train_mode_holds_its_draws_fixed():
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
    H = Hessian(Objective(model, nn.CrossEntropyLoss(), ragged(*samples()), mode="train"))
    before = copy.deepcopy(model.state_dict())
    a, b = H.dense(), H.dense()
    assert torch.equal(a, b) and torch.allclose(a, a.T, atol=1e-14)
    assert eigenpairs(H, 2, tol=1e-8).converged.all()
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    running = Hessian(Objective(model, nn.CrossEntropyLoss(), samples())).dense()
    batch = Hessian(Objective(model, nn.CrossEntropyLoss(), samples(), mode="batch_statistics")).dense()
    assert not torch.allclose(running, batch, rtol=0.01)


@contextlib.contextmanager
def untouched(model):
    """Weights, buffers, flags, gradients and random state are bitwise the same afterwards."""
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    grads = [(p.grad, p.grad.clone()) for p in model.parameters()]
    model[0].eval()
    flags = [m.training for m in model.modules()]
    state, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    yield
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is g and torch.equal(g, copied) for p, (g, copied) in
               zip(model.parameters(), grads, strict=True))
    assert flags == [m.training for m in model.modules()] and torch.equal(rng, torch.get_rng_state())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", (Hessian, GaussNewton, FunctionalPart, Fisher))
def test_nothing_is_changed_by_measuring(kind):
    """P8, H7: modes never given back, graphs left on .grad, weights off by a rounding."""
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 3))
    for mode in ("eval", "train"):
        operator = kind(Objective(model, nn.CrossEntropyLoss(), ragged(*samples()), mode=mode))
        with untouched(model):
            eigenpairs(operator, 2)
            for measure in (trace, diagonal, frobenius):
                measure(operator, max_matvecs=20)
            spectral_density(operator, probes=2, steps=5)
            operator.dense()
    v = torch.randn(operator.size)
    with untouched(model):
        Hessian(operator.objective, product="finite_difference") @ v


def test_an_error_in_the_middle_gives_everything_back():
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 3))
    calls = []

    def loss(z, y):
        calls.append(1)
        if len(calls) > 5:
            raise KeyboardInterrupt
        return nn.functional.cross_entropy(z, y)

    with untouched(model), pytest.raises(KeyboardInterrupt):
        eigenpairs(Hessian(Objective(model, loss, ragged(*samples()), mode="train"), product="finite_difference"))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision_weights(dtype):
    """H9, C7: small matrices kept in the weights' dtype crash in eigh and qr."""
    x, y = samples()
    model = mlp(dtype=dtype)
    H = Hessian(Objective(model, nn.CrossEntropyLoss(), (x.to(dtype), y)))
    wide = mlp()
    wide.load_state_dict({k: v.double() for k, v in model.state_dict().items()})
    exact = float(torch.linalg.eigvalsh(Hessian(Objective(wide, nn.CrossEntropyLoss(), (x, y))).dense())[-1])
    found = eigenpairs(H, 1, tol=0.05)
    assert found.eigenvectors.dtype == torch.float32 and found.largest == pytest.approx(exact, rel=0.1)
    assert trace(H, rtol=0.3).converged


def test_tiny_curvature_is_not_converged_at_once():
    """H6: an absolute threshold returns 0 for a spectrum of scale 1e-14."""
    objective = classification()
    H = 1e-14 * Hessian(objective)
    assert eigenpairs(H, 1, tol=1e-6).largest == pytest.approx(1e-14 * eigenpairs(Hessian(objective), tol=1e-6).largest)


def test_cached_graphs_never_outlive_the_weights():
    objective = classification()
    H = Hessian(objective)
    before = H.dense()
    eigenpairs(H, 2)
    with torch.no_grad():
        for p in objective.parameters:
            p.data.mul_(1.5)
    after = H.dense()
    assert not torch.allclose(before, after)
    assert torch.allclose(after, Hessian(objective, product="recomputed").dense(), atol=1e-14)


@pytest.mark.filterwarnings("ignore")
def test_language_models_and_their_mappings():
    """C4, H11: padded tokens weigh like real ones; BatchEncoding is no dict. And attention has no second derivative."""
    import transformers
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=11, n_positions=12, bos_token_id=0,
                                     eos_token_id=0)
    model = transformers.GPT2LMHeadModel(config).double().eval()
    ids = torch.randint(0, 11, (5, 9))
    labels = ids.clone()
    labels[0, 3:], labels[3, 7:] = -100, -100
    whole = Objective(model, None, transformers.BatchEncoding({"input_ids": ids, "labels": labels}))
    parts = Objective(model, None, [{"input_ids": ids[:2], "labels": labels[:2]},
                                    transformers.BatchEncoding({"input_ids": ids[2:], "labels": labels[2:]})])
    merged = nn.functional.cross_entropy(model(ids).logits[:, :-1].transpose(1, 2), labels[:, 1:])
    assert float(whole.value()) == pytest.approx(float(merged), rel=1e-6)
    assert float(parts.value()) == pytest.approx(float(merged), rel=1e-6)
    v = torch.randn(Hessian(whole).size)
    # transformers computes this loss in float32
    for kind in (Hessian, GaussNewton, Fisher):
        truth = kind(whole) @ v
        assert (kind(parts) @ v - truth).norm() < 1e-5 * truth.norm()
    found = eigenpairs(Hessian(parts), 2, tol=1e-3)
    assert found.converged.all()
    block = Hessian(parts).restrict("transformer.h.0.attn")
    assert all(name.startswith("transformer.h.0.attn.") for name in block.names)
    exact = torch.linalg.eigvalsh(block.dense())[-1]
    assert eigenpairs(block, 1, tol=1e-4).largest == pytest.approx(float(exact), rel=1e-3)


def test_sequence_classifiers_do_not_shift():
    import transformers
    config = transformers.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
                                     vocab_size=11, num_labels=3)
    model = transformers.BertForTokenClassification(config)
    ids, labels = torch.randint(0, 11, (4, 6)), torch.randint(0, 3, (4, 6))
    labels[1, 2:] = -100
    objective = Objective(model, None, [{"input_ids": ids, "labels": labels}])
    assert objective.weight({"input_ids": ids, "labels": labels}) == 20


def test_one_graph_a_session_and_one_pass_over_the_data():
    """Products share their graphs inside an algorithm: data and model are run once, and once more for the check."""
    calls = []
    x, y = samples()

    def forward(model, batch):
        calls.append(1)
        return model(batch[0])

    objective = Objective(mlp(), lambda z, batch: nn.functional.cross_entropy(z, batch[1]), ragged(x, y),
                          forward=forward)
    found = eigenpairs(Hessian(objective), 3, certify=False)
    assert found.matvecs > 5 and len(calls) == 3
    H = Hessian(objective)
    H @ torch.randn(H.size)     # a product of its own before changes nothing
    calls.clear()
    eigenpairs(H, 3, certify=False)
    assert len(calls) == 3
    calls.clear()
    eigenpairs(Hessian(objective, product="recomputed"), 3, certify=False)
    assert len(calls) == 3 * found.matvecs


@pytest.mark.parametrize("make", (GaussNewton, FunctionalPart, Fisher, Hessian))
@pytest.mark.filterwarnings("ignore:the loss does not depend on any parameter")
def test_outputs_that_no_parameter_reaches(make):
    """A matrix of zeros, for a detached model, and where one batch of two does not reach the parameters."""
    class Detached(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 3)

        def forward(self, x):
            return self.layer(x) if x[0, 0] > 0 else self.layer(x).detach()

    model, y = Detached(), torch.tensor([0, 1])
    reached, not_reached = (torch.ones(2, 2), y), (-torch.ones(2, 2), y)
    loss = nn.CrossEntropyLoss()
    assert make(Objective(model, loss, not_reached)).dense().abs().max() == 0
    both = make(Objective(model, loss, [reached, not_reached])).dense()
    torch.testing.assert_close(both, make(Objective(model, loss, reached)).dense() / 2)


@pytest.mark.parametrize("measure", (curvature.trace, curvature.frobenius, curvature.diagonal, curvature.eigenpairs,
                                     curvature.eigenvalues, curvature.power_iteration, curvature.spectral_density))
def test_an_objective_where_an_operator_is_expected(measure):
    with pytest.raises(TypeError, match=r"got Objective: write Hessian\(objective\)"):
        measure(classification())
    with pytest.raises(TypeError, match="expected a CurvatureOperator, got Linear"):
        measure(nn.Linear(2, 1))


@pytest.mark.parametrize("kind", (curvature.Hessian, curvature.GaussNewton, curvature.Fisher, curvature.FunctionalPart))
def test_a_model_where_an_objective_is_expected(kind):
    with pytest.raises(TypeError, match=r"expected an Objective, got Linear: write Objective\(model, loss_fn, data\)"):
        kind(nn.Linear(2, 1))
