"""What a step finds and must not let pass: tensors outside the model, parameters it cannot move, names that collide,
records that hold gradients, buffers, masks, radii. Every other law is run on models that have none of it.
"""

import copy
import gc
import math
import pickle
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import oracles
import problems
from flatmin import Sharpener, ascent, presets
from flatmin.ascent.record import StepRecord
from flatmin.perturbed import Displacement
from problems import assert_same, batch, build, flat, flat_grad, loss_fn, relative
from rows import whole

# --- trainable tensors outside the model -----------------------------------------------------------------------------


def outside(kind, model, x):
    """A loss that reaches something trainable beside the model, and that thing."""
    if kind == "head":
        head = nn.Linear(3, 3)
        return head.weight, lambda: head(model(x)).square().mean()
    if kind == "temperature":
        t = torch.ones((), requires_grad=True)
        return t, lambda: (model(x) * t).square().mean()
    if kind == "input":
        x = x.clone().requires_grad_()
        return x, lambda: model(x).square().mean()
    table = nn.Embedding(4, 6)
    return table.weight, lambda: model(table(torch.arange(4))).square().mean()


@pytest.mark.parametrize("kind", ["head", "embedding"])
def test_trainable_tensors_outside_the_model_are_named(kind):
    model = build()
    tensor, loss = outside(kind, model, batch(0)[0])
    before = flat(model)
    with pytest.raises(ValueError, match="outside the model") as error:
        presets.sam(model).backward(loss)
    assert str(tuple(tensor.shape)) in str(error.value)
    assert tensor.grad is None and all(p.grad is None for p in model.parameters())
    assert_same(flat(model), before)


@pytest.mark.parametrize("kind", ["temperature", "input"])
def test_other_tensors_get_the_gradient_at_the_perturbed_weights_alone(kind):
    """Collocation points, adversarial inputs, a temperature: as with ρ = 0 for them, at every step."""
    model = build()
    tensor, loss = outside(kind, model, batch(0)[0])
    sharpener = presets.sam(model, rho=0.3)
    for _ in range(3):
        w, seen = flat(model), []
        tensor.grad = torch.ones_like(tensor)
        sharpener.backward(lambda seen=seen: (seen.append(problems.standing(model)), loss())[1])
        there, tensor.grad = tensor.grad - 1, None
        model.zero_grad()
        with torch.no_grad():
            nn.utils.vector_to_parameters(seen[-1], model.parameters())
        wanted, = torch.autograd.grad(loss(), tensor)
        with torch.no_grad():
            nn.utils.vector_to_parameters(w, model.parameters())
        assert relative(there.flatten(), wanted.flatten()) < 1e-12


def test_in_the_loss_of_a_functional_rule_too():
    model, x = build(), batch(0)[0]
    centres = nn.Parameter(torch.randn(3))
    with pytest.raises(ValueError, match="parameter of shape"):
        presets.functional_sam(model).backward(lambda: model(x), lambda z: (z - centres).square().mean())


def test_leaves_that_are_no_one_elses_are_not():
    """Detached, made anew in the forward, frozen, or inside the model by another way (parametrized, tied)."""
    x, _ = batch(0)
    head = nn.Linear(3, 3).requires_grad_(False)
    for model, loss in [(m := build(), lambda m=m: head(m(x)).square().mean()),
                        (m := build(), lambda m=m: m(x.clone().requires_grad_()).square().mean()),
                        (m := weight_norm(nn.Linear(6, 3)), lambda m=m: m(x).square().mean()),
                        (m := build(problems.TiedNet), lambda m=m: m(x).square().mean())]:
        presets.sam(model).backward(loss)
        assert flat_grad(model).any()
    model = build()
    both = nn.ModuleList([model, nn.Linear(3, 3)])
    presets.sam(both).backward(lambda: both[1](model(x)).square().mean())
    assert flat_grad(both[1]).any()


def test_later_steps_do_not_look():
    model, x = build(), batch(0)[0]
    sharpener = presets.sam(model)
    for _ in range(2):
        sharpener.backward(lambda: model(x).square().mean())
    assert sharpener.view.inspection.done and not sharpener.view.inspection._met


# --- parameters that cannot be perturbed -----------------------------------------------------------------------------

@pytest.mark.parametrize(("model", "words"), [
    (lambda: nn.Sequential(nn.Linear(2, 2, dtype=torch.complex64)), "0.weight.*complex"),
    (lambda: nn.Sequential(nn.Embedding(4, 2, sparse=True)), "0.weight.*sparse"),
    (lambda: nn.EmbeddingBag(4, 2, sparse=True), "weight.*sparse"),
    (lambda: nn.Sequential(nn.LazyLinear(3)), "0.weight.*shape"),
], ids=["complex", "sparse", "sparse-bag", "lazy"])
def test_what_cannot_be_perturbed_is_named_at_construction(model, words):
    with pytest.raises(ValueError, match=words):
        presets.sam(model())


def test_a_sparse_gradient_of_ones_own_is_named_and_frozen_ones_are_fine():
    table = nn.Parameter(torch.randn(5, 3))
    model = nn.ParameterList([table])
    with pytest.raises(ValueError, match="sparse"):
        presets.sam(model).backward(lambda: nn.functional.embedding(torch.tensor([1]), table, sparse=True).sum())
    presets.sam(nn.Sequential(nn.Embedding(4, 2, sparse=True).requires_grad_(False), nn.Linear(2, 2)))


# --- names -----------------------------------------------------------------------------------------------------------

class NamedModule(nn.Module):
    """Layers under names that wrappers use."""

    def __init__(self):
        super().__init__()
        self.module = nn.Linear(6, 6)
        self._orig_mod = nn.Linear(6, 6)
        self.weight, self.bias = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.zeros(6))
        self.head = nn.ModuleDict({"module": nn.Linear(6, 3)})

    def forward(self, x):
        return self.head["module"](torch.tanh(self._orig_mod(torch.tanh(self.module(x)) @ self.weight + self.bias)))


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: torch.compile(m, backend="eager"),
                                  lambda m: nn.DataParallel(m)], ids=["plain", "compiled", "data-parallel"])
def test_two_layers_never_share_a_state(wrap):
    x, y = batch(0)
    model = build(NamedModule)
    sharpener = presets.friendly_sam(wrap(model))
    sharpener.backward(lambda: loss_fn(model(x), y))
    assert set(sharpener.state_dict()["memory"]["average"]) == {n for n, _ in model.named_parameters()}
    presets.friendly_sam(build(NamedModule)).load_state_dict(sharpener.state_dict())


# --- records ---------------------------------------------------------------------------------------------------------

def test_a_record_keeps_no_gradient_alive_and_can_be_pickled():
    x, y = batch(0)
    model = build()
    sharpener = presets.sam(model, rho=0.1, perturbed_norm=True)
    sharpener.backward(lambda: loss_fn(model(x), y))
    norm, kept = flat_grad(model).norm(), [weakref.ref(p.grad) for p in model.parameters()]
    model.zero_grad()
    gc.collect()
    assert all(ref() is None for ref in kept)
    again = pickle.loads(pickle.dumps(sharpener.last))
    assert again.to_dict() == sharpener.last.to_dict() and repr(again) == repr(sharpener.last)
    assert again.perturbed_gradient_norm == pytest.approx(float(norm), rel=1e-13)
    sharpener.perturbed_norm = False
    sharpener.backward(lambda: loss_fn(model(x), y))
    assert sharpener.last.to_dict()["perturbed_gradient_norm"] != norm
    assert sharpener.last.perturbed_gradient_norm != sharpener.last.perturbed_gradient_norm  # nan


def test_the_recorded_norm_is_of_this_steps_gradient_unscaled():
    x, y = batch(0)
    found = []
    for options in ({}, {"scaler": torch.amp.GradScaler("cpu", init_scale=256.0)}, {"scope": "micro_batch"}):
        model = build()
        sharpener = presets.sam(model, rho=0.1, perturbed_norm=True, **options)
        for _ in range(2):  # the second adds to what is there
            sharpener.backward(lambda m=model: loss_fn(m(x), y))
        found.append(sharpener.last.perturbed_gradient_norm)
    expected = float(oracles.sam(oracles.Point(build(), whole(x, y)), 0.1).norm())
    assert found == pytest.approx([expected] * 3, rel=1e-12)


def test_the_repr_says_what_it_is():
    text = repr(presets.asam(build(), rho=0.3))
    assert "RolesNet" in text and "rho=0.3" in text and "Adaptive(eta=0.01" in text and "Plain()" in text


# --- buffers ---------------------------------------------------------------------------------------------------------

class Buffered(nn.Module):
    """A large constant buffer, and a large one that is written at the calls named."""

    def __init__(self, written=()):
        super().__init__()
        self.head, self.calls, self.written = nn.Linear(6, 3), 0, written
        self.register_buffer("mask", torch.ones(300, 300))
        self.register_buffer("queue", torch.zeros(300, 300))

    def forward(self, x):
        if self.calls in self.written:
            self.queue[0] += 1
        self.calls += 1
        return self.head(x) * self.mask[0, 0]


def clones(model, step):
    seen = []
    original = torch.Tensor.clone

    def clone(tensor, *args, **kwargs):
        seen.append(tensor.numel())
        return original(tensor, *args, **kwargs)

    torch.Tensor.clone = clone
    try:
        step()
    finally:
        torch.Tensor.clone = original
    return sum(n >= 90_000 for n in seen)


def test_only_buffers_that_a_forward_writes_are_copied():
    model, (x, y) = build(Buffered, written=range(100)), batch(0)
    sharpener = presets.sam(model)
    copied = [clones(model, lambda: sharpener.backward(lambda: loss_fn(model(x), y))) for _ in range(3)]
    assert copied == [1, 1, 1]
    assert model.queue[0, 0] == 3
    pickle.loads(pickle.dumps(sharpener))       # our own


def test_a_buffer_that_begins_to_be_written_moves_once_a_step():
    """And nothing is said of one that is written between steps (an average, a queue, ``load_state_dict``)."""
    model, (x, y) = build(Buffered, written=range(4, 100)), batch(0)      # from the 3rd step on
    sharpener, values = presets.sam(model), []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(5):
            model.mask.add_(1)
            sharpener.backward(lambda: loss_fn(model(x), y))
            values.append(float(model.queue[0, 0]))
    assert values == [0, 0, 1, 2, 3]


def test_a_buffer_written_at_the_perturbed_weights_alone_is_reported():
    model, (x, y) = build(Buffered, written=(5,)), batch(0)       # the second pass of the 3rd step
    sharpener = presets.sam(model)
    with pytest.warns(UserWarning, match="a buffer that the pass at w left alone"):
        for _ in range(3):
            sharpener.backward(lambda: loss_fn(model(x), y))


# --- one mask a micro-batch ------------------------------------------------------------------------------------------

def test_data_selection_compares_losses_under_one_mask():
    """At ρ → 0 no loss rises: with one mask every difference is of the size of ρ, for every micro-batch."""
    model, data = build(problems.NoisyNet), [batch(t) for t in range(3)]
    model.norm.eval()
    masks = []
    model.drop.register_forward_hook(lambda m, i, o: masks.append(o == 0))
    presets.esam(model, rho=1e-9).backward(
        lambda b, s: model(b[0][s]), lambda z, b, s: nn.functional.cross_entropy(z, b[1][s], reduction="none"),
        batches=data)
    assert len(masks) == 9
    for i in range(3):
        full, again, part = masks[i], masks[3 + 2 * i], masks[4 + 2 * i]
        assert torch.equal(full, again)
        assert torch.equal(full[:len(part)], part), "the selected samples start from another random state"
    assert not torch.equal(masks[0], masks[1])


# --- radii -----------------------------------------------------------------------------------------------------------

def taken(sharpener, model, x, y):
    seen, w = [], flat(model)

    def loss():
        seen.append(problems.standing(model))
        return loss_fn(model(x), y)

    sharpener.backward(loss)
    return seen[-1] - w, w


def own_norm(direction, eps, w, p=2.0):
    scale = (w.abs() + 0.1) if "Adaptive" in repr(direction) else torch.ones_like(w)
    return float(torch.linalg.vector_norm(eps / scale, p))


RADII = {"gradient": (ascent.Gradient(), 2), "inf": (ascent.Gradient(p=float("inf")), float("inf")),
         "one": (ascent.Gradient(p=1), 1), "adaptive": (ascent.Adaptive(0.1, biases=True), 2),
         "adaptive-inf": (ascent.Adaptive(0.1, float("inf"), biases=True), float("inf")),
         "random": (ascent.Random(), 2), "unnormalized": (ascent.Gradient(normalized=False), 2),
         "decay": (ascent.WithWeightDecay(0.3), 2), "fraction": (ascent.RandomFraction(), 2),
         "fraction-adaptive": (ascent.RandomFraction(ascent.Adaptive(0.1, biases=True)), 2),
         "entries": (ascent.RandomFraction(per_tensor=False), 2),
         "entries-adaptive": (ascent.RandomFraction(ascent.Adaptive(0.1, biases=True), per_tensor=False), 2),
         "decay-fraction": (ascent.WithWeightDecay(0.3, ascent.RandomFraction()), 2),
         "fraction-decay": (ascent.RandomFraction(ascent.WithWeightDecay(0.3)), 2)}


@pytest.mark.parametrize("groups", [False, True])
@pytest.mark.parametrize("kind", RADII)
def test_the_radius_recorded_is_the_radius_taken(kind, groups):
    x, y = batch(0)
    direction, p = RADII[kind]
    model = build()
    given = [{"modules": [model.head, model.norm_free], "rho": 0.25}] if groups else None
    sharpener = Sharpener(model, rho=0.1, direction=direction, groups=given)
    eps, w = taken(sharpener, model, x, y)
    assert sharpener.last.radius == pytest.approx(own_norm(direction, eps, w, p), rel=1e-9)
    assert eps.any()


def test_layerwise_radius_with_groups():
    x, y = batch(0)
    model = build()
    sharpener = Sharpener(model, rho=0.1, direction=ascent.Layerwise(),
                          groups=[{"modules": [model.head], "rho": 0.25}])
    eps, _ = taken(sharpener, model, x, y)
    at = oracles.Point(model, whole(x, y))
    lengths = [float(eps[c].norm() / at.w[c].norm()) for c in at.slices.values()]
    assert sharpener.last.radius == pytest.approx(max(lengths), rel=1e-9) == pytest.approx(0.25)


@pytest.mark.parametrize("nest", [lambda d: ascent.WithWeightDecay(0.5, d), lambda d: ascent.WithWeightDecay(
    0.2, ascent.WithWeightDecay(0.3, d)), lambda d: ascent.RandomFraction(d, beta=1.0)], ids=["one", "two", "fraction"])
def test_a_direction_around_a_fraction_moves_the_fraction_alone(nest):
    """As many tensors as the inner direction draws, and ρ/β far."""
    x, y = batch(0)
    model = build()
    inner = ascent.RandomFraction(beta=0.4, seed=3)
    sharpener = Sharpener(model, rho=0.1, direction=nest(inner))
    eps, _ = taken(sharpener, model, x, y)
    moved = [bool(eps[c].any()) for c in oracles.Point(model, whole(x, y)).slices.values()]
    assert moved == inner.chosen(len(moved), 0) and 0 < sum(moved) < len(moved)
    assert float(eps.norm()) == pytest.approx(0.25, rel=1e-9)


def test_a_fraction_needs_what_its_direction_needs():
    model = build()
    with pytest.raises(ValueError, match="optimizer"):
        Sharpener(model, direction=ascent.RandomFraction(ascent.Momentum()))
    with pytest.raises(ValueError, match="optimizer"):
        Sharpener(model, direction=ascent.RandomFraction(ascent.WithWeightDecay(0.1, ascent.Preconditioned())))
    with pytest.raises(ValueError, match="Momentum"):
        ascent.WithWeightDecay(0.1, ascent.Momentum())
    optimizer = problems.sgd(model.parameters())
    x, y = batch(0)
    sharpener = Sharpener(model, direction=ascent.RandomFraction(ascent.Momentum()), optimizer=optimizer)
    for _ in range(2):
        sharpener.backward(lambda: loss_fn(model(x), y))
        optimizer.step()
    assert sharpener.last.passes == 1 and sharpener.last.radius == pytest.approx(0.1)


def test_what_draws_by_the_step_is_saved_by_the_facade():
    for direction in (ascent.Random(), ascent.RandomFraction(), ascent.WithWeightDecay(0.1, ascent.RandomFraction())):
        assert Sharpener(build(), direction=direction).has_state
    assert not Sharpener(build()).has_state


# --- one storage, overflow -------------------------------------------------------------------------------------------

def test_parameters_over_one_storage_come_back_bit_for_bit():
    """Beyond one block: what is moved last goes back first."""
    storage = torch.randn(600_000, dtype=torch.float32)
    model = nn.ParameterList([nn.Parameter(storage[:400_000]), nn.Parameter(storage[100_000:500_000]),
                              nn.Parameter(storage[50_000:450_000].view(400, 1000))])
    before = storage.clone()
    presets.sam(model, rho=3.0).backward(lambda: sum((p * (i + 1)).sin().sum() for i, p in enumerate(model)))
    assert_same(storage, before)
    displacement, w = Displacement(), [p.detach() for p in model]
    displacement.move(w, [torch.randn_like(t) for t in w], torch.tensor(0.1))
    displacement.move(w, [torch.randn_like(t) for t in w], torch.tensor(0.1))
    displacement.restore()
    assert_same(storage, before)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("direction", [ascent.Gradient(), ascent.Adaptive(), ascent.Gradient(p=float("inf")),
                                       ascent.Fisher(), ascent.RandomFraction(), ascent.Layerwise()], ids=repr)
def test_an_overflow_in_the_first_pass_never_reaches_the_weights(direction, bad):
    model, (x, y) = build(dtype=torch.float32), batch(0, dtype=torch.float32)
    sharpener, seen = Sharpener(model, direction=direction), []

    def loss():
        seen.append(problems.standing(model))
        z = model(x)
        if len(seen) == 1:
            z.register_hook(lambda g: g * bad)
        return loss_fn(z, y)

    sharpener.backward(loss)
    assert len(seen) == 2 and seen[1].isfinite().all()
    assert sharpener.last.skipped and all(p.grad is None for p in model.parameters())


def test_an_error_of_the_users_own_in_half_precision_is_raised_once():
    model, (x, y) = build(dtype=torch.bfloat16), batch(0, dtype=torch.bfloat16)
    calls = []

    def loss():
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("checkpoint: my own")
        return loss_fn(model(x), y)

    with pytest.raises(RuntimeError, match="my own"):
        presets.sam(model).backward(loss)
    assert len(calls) == 2


def test_a_copied_sharpener_looks_at_its_own_model():
    model, (x, y) = build(), batch(0)
    twin, copied = copy.deepcopy((model, presets.sam(model)))
    copied.backward(lambda: loss_fn(twin(x), y))
    assert relative(flat_grad(twin), oracles.sam(oracles.Point(build(), whole(x, y)), 0.05)) < 1e-13


# --- what a later attack found ---------------------------------------------------------------------------------------

class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(4, 3)

    def forward(self, x, both):
        return self.head(torch.tanh(self.a(x) + (self.b(x) if both else 0)))


def test_looksam_reuses_the_component_of_the_last_full_step_alone():
    """ALGORITHMS 2.4 over the whole vector: 0 where that step had no gradient (a branch not taken)."""
    model, (x, y) = build(Branches), batch(0)
    sharpener = presets.looksam(model, rho=0.3, k=2, alpha=0.7)

    def gradient(both):
        rows = torch.autograd.grad(loss_fn(model(x, both), y), list(model.parameters()), allow_unused=True,
                                   materialize_grads=True)
        return torch.cat([t.flatten() for t in rows])

    for both in (True, True, False):
        model.zero_grad()
        sharpener.backward(lambda both=both: loss_fn(model(x, both), y))
    w, g = flat(model), gradient(False)
    with torch.no_grad():
        nn.utils.vector_to_parameters(w + 0.3 * g / g.norm(), model.parameters())
    perturbed = gradient(False)
    with torch.no_grad():
        nn.utils.vector_to_parameters(w, model.parameters())
    component = perturbed - (perturbed @ g) / (g @ g) * g
    model.zero_grad()
    sharpener.backward(lambda: loss_fn(model(x, True), y))
    g = gradient(True)
    assert relative(flat_grad(model), g + 0.7 * g.norm() / component.norm() * component) < 1e-12


@pytest.mark.parametrize("rule", (ascent.Functional(), ascent.LogitOnly()))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_output_gradients_follow_the_dtype_of_a_widened_pass(rule, dtype):
    """A language model begins with an embedding: with float32 weights all that follows is float32."""
    model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 10)).to(dtype)
    ids = torch.randint(0, 10, (4, 6))
    sharpener = Sharpener(model, rule=rule, rho=0.05)
    sharpener.backward(lambda: model(ids),
                       lambda z: nn.functional.cross_entropy(z.float().flatten(0, 1), ids.flatten()))
    assert sharpener.last.radius == pytest.approx(0.05, rel=1e-3) and all(p.grad.dtype == dtype
                                                                          for p in model.parameters())


@pytest.mark.parametrize("change", (lambda z: z.mul_(2), lambda z: z.masked_fill_(z > 1, 0.0),
                                    lambda z: z.__itruediv__(2)))
def test_a_loss_that_writes_into_the_outputs_is_refused_by_rules_that_exchange_their_gradient(change):
    model, (x, y) = build(), batch(0)
    w = flat(model)
    with pytest.raises(ValueError, match="writes into the network's outputs"):
        presets.functional_sam(model).backward(lambda: model(x) * 1.0, lambda z: loss_fn(change(z), y))
    assert_same(flat(model), w)


def test_in_place_operations_of_mixed_dtype_run_in_a_widened_pass():
    """Hand-written mixtures of experts and graph layers write into tensors of their own."""
    class Scatter(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 3)

        def forward(self, x):
            out = torch.zeros(len(x), 3, dtype=x.dtype)
            return out.index_add_(0, torch.arange(len(x)), self.layer(x)).scatter_add_(
                1, torch.zeros(len(x), 1, dtype=torch.long), self.layer(x)[:, :1])

    model, (x, y) = Scatter().to(torch.bfloat16), batch(0)
    sharpener = presets.sam(model, rho=0.05)
    sharpener.backward(lambda: loss_fn(model(x.bfloat16()).float(), y))
    assert sharpener.last.radius == pytest.approx(0.05, rel=1e-3)


@pytest.mark.parametrize("gamma, n, kept", ((0.29, 100, 29), (0.58, 50, 29), (0.5, 7, 3)))
def test_data_selection_keeps_the_floor_of_its_share(gamma, n, kept):
    model, seen = nn.Linear(6, 3), []
    x, y = torch.randn(n, 6), torch.randint(0, 3, (n,))
    presets.esam(model, gamma=gamma).backward(
        lambda s: (seen.append(len(y[s])), nn.functional.cross_entropy(model(x[s]), y[s], reduction="none"))[1])
    assert seen[-1] == kept


def test_what_a_step_does_not_know_is_a_number_that_is_nan():
    found = StepRecord(1, False, {"loss": 2.0}).to_dict()
    assert found["loss"] == 2.0 and all(isinstance(found[n], float) for n in ("perturbed_loss", "radius", "cosine"))
    assert math.isnan(found["perturbed_loss"])
