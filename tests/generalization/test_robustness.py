"""Rounding, pruning, low rank and noise against slow twins and closed forms; the weights come back bit for bit.

A quadratic loss is the truth for predictions (they are exact there), a loop over rows the one for rounding. Wrappers,
tied weights, embeddings and errors half-way catch weights that are not given back or the wrong ones being changed.
"""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from flatmin import Objective
from flatmin.curvature import Hessian
from flatmin.generalization import robustness as r
from problems import ConvNet, NoisyNet, RolesNet, TiedNet, build

METHODS = [lambda o, **k: r.weight_noise(o, 0.05, draws=3, **k), lambda o, **k: r.quantized(o, 3, **k),
           lambda o, **k: r.pruned(o, 0.4, **k), lambda o, **k: r.truncated(o, 0.5, **k)]
NAMES = ["noise", "quantized", "pruned", "truncated"]
REPLACING = METHODS[1:]


def data(rows=((0, 12), (12, 20), (20, 25)), classes=3):
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(25, 6, generator=g), torch.randint(classes, (25,), generator=g)
    return [(x[a:b], y[a:b]) for a, b in rows]


def objective_of(cls=RolesNet, classes=3):
    return Objective(build(cls).double(), nn.CrossEntropyLoss(), data(classes=classes))


def linear(n=5, outputs=3, rows=8):
    """½ mean squared error of a linear map: quadratic in the weights, so that predictions are exact."""
    torch.manual_seed(1)
    model = nn.Linear(n, outputs, bias=False)
    x, y = torch.randn(rows, n), torch.randn(rows, outputs)
    return Objective(model, nn.MSELoss(), [(x[:5], y[:5]), (x[5:], y[5:])])


def state(objective):
    model = objective.model
    return ([t.clone() for t in model.state_dict().values()], [p.requires_grad for p in model.parameters()],
            [p.grad for p in model.parameters()], [m.training for m in model.modules()], torch.get_rng_state())


def same(a, b):
    return all(map(torch.equal, a[0], b[0])) and a[1:4] == b[1:4] and torch.equal(a[4], b[4])


def rise_of(objective, change):
    """L(changed copy) − L: the slow twin."""
    twin = copy.deepcopy(objective.model)
    with torch.no_grad():
        for name, p in twin.named_parameters():
            p.copy_(change(name, p.clone()))
    other = Objective(twin, objective.loss_fn, objective.data, mode=objective.mode)
    return float(other.value()) - float(objective.value())


# --- what is done to the weights --------------------------------------------------------------------------------------

def slowly_rounded(row, bits):
    """One group of weights, number by number."""
    step = max(abs(v) for v in row) / (2 ** (bits - 1) - 1)
    return [round(v / step) * step if step else 0.0 for v in row]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [None, 3, 6])
def test_rounding_equals_the_slow_twin(bits, group):
    objective = objective_of()

    def change(name, p):
        if p.dim() < 2:
            return p
        rows = [[slowly_rounded(part.tolist(), bits) for part in row.split(group or len(row))] for row in p]
        return torch.tensor([sum(row, []) for row in rows])

    found = r.quantized(objective, bits, group=group, predict=False)
    assert float(found) == pytest.approx(rise_of(objective, change), abs=1e-12)
    assert found.changed == sum(p.numel() for p in objective.model.parameters() if p.dim() >= 2)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_pruning_equals_the_slow_twin(share, scope):
    objective = objective_of()
    matrices = [p for p in objective.model.parameters() if p.dim() >= 2]
    sizes = torch.cat([p.detach().abs().flatten() for p in matrices]).sort().values

    def change(name, p):
        if p.dim() < 2:
            return p
        ordered = sizes if scope == "global" else p.abs().flatten().sort().values
        k = round(share * len(ordered))
        return torch.where(p.abs() <= (ordered[k - 1] if k else -1), torch.zeros_like(p), p)

    found = r.pruned(objective, share, scope=scope, predict=False)
    assert float(found) == pytest.approx(rise_of(objective, change), abs=1e-12)


@pytest.mark.parametrize("keep", [0.01, 0.5, 1.0])
def test_low_rank_is_the_best_of_its_rank(keep):
    objective = objective_of(LinearOnly)

    def change(name, p):
        if p.dim() < 2:
            return p
        U, s, V = torch.svd(p.flatten(1))
        s[max(1, math.ceil(keep * len(s))):] = 0
        return (U @ s.diag() @ V.T).view_as(p)

    assert float(r.truncated(objective, keep, predict=False)) == pytest.approx(rise_of(objective, change), abs=1e-10)


class LinearOnly(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(6, 7), nn.Linear(7, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.first(x)))


class Transposed(nn.Module):
    """A transposed convolution, whose second dimension counts outputs."""

    def __init__(self):
        super().__init__()
        self.up, self.head = nn.ConvTranspose1d(2, 5, 2), nn.Linear(20, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.up(x.view(-1, 2, 3))).flatten(1))


def test_channels_of_convolutions():
    for cls, name, dim in ((ConvNet, "conv.weight", 0), (Transposed, "up.weight", 1)):
        objective = objective_of(cls)

        def change(n, p, name=name, dim=dim):
            if n != name:
                return p
            rows = p.movedim(dim, 0)
            flat = torch.stack([torch.tensor(slowly_rounded(row.flatten().tolist(), 3)) for row in rows])
            return flat.view(rows.shape).movedim(0, dim)

        found = r.quantized(objective, 3, parameters=name, predict=False)
        assert float(found) == pytest.approx(rise_of(objective, change), abs=1e-12)


class Words(nn.Module):
    """An embedding tied to the head, two-dimensional layer normalization, and a frozen matrix."""

    def __init__(self):
        super().__init__()
        self.words, self.norm = nn.Embedding(9, 6), nn.LayerNorm((2, 6))
        self.mix = nn.Linear(6, 6).requires_grad_(False)
        self.head = nn.Linear(6, 9, bias=False)
        self.head.weight = self.words.weight

    def forward(self, x):
        return self.head(torch.tanh(self.mix(self.norm(self.words(x))))).flatten(0, 1)


def words():
    torch.manual_seed(0)
    x = torch.randint(9, (8, 2))
    return Objective(Words(), nn.CrossEntropyLoss(), [(x[:4], x[:4].flatten()), (x[4:], x[4:].flatten())])


def test_embeddings_norms_and_biases_stay_and_frozen_matrices_do_not():
    objective = words()
    for method in (r.quantized, r.pruned, r.truncated):
        found = method(objective)
        assert found.settings["parameters"] == ["mix.weight"] and found.changed == 36
        assert found.value != 0 and not math.isnan(found.predicted)
    assert r.quantized(objective, parameters="words").changed == 54
    assert not objective.model.mix.weight.requires_grad


def test_nothing_to_change_is_an_error():
    bare = Objective(nn.LayerNorm(6), nn.MSELoss(), (torch.randn(4, 6), torch.randn(4, 6)))
    with pytest.raises(ValueError, match="no matrix outside of embeddings"):
        r.quantized(bare)
    with pytest.raises(ValueError, match="no parameter is called or lies below 'nowhere'"):
        r.quantized(objective_of(), parameters="nowhere")
    with pytest.raises(ValueError, match="fewer than two dimensions"):
        r.pruned(objective_of(), parameters="head.bias")


# --- the weights come back --------------------------------------------------------------------------------------------

@pytest.mark.filterwarnings("ignore:the trace is known")
@pytest.mark.parametrize("cls", [RolesNet, NoisyNet, ConvNet, TiedNet])
@pytest.mark.parametrize("method", METHODS, ids=NAMES)
def test_everything_is_given_back(cls, method):
    objective = objective_of(cls, 4 if cls is TiedNet else 3)
    if cls is TiedNet:
        objective = Objective(objective.model, lambda z, y: z.square().mean(), data())
    before = state(objective)
    method(objective)
    assert same(before, state(objective))
    if cls is TiedNet:
        assert objective.model.head.weight is objective.model.first.weight


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_everything_is_given_back_when_the_loss_fails(method, error):
    """The third batch after the change: weights stand elsewhere when it raises."""
    objective, calls = words(), 0

    def failing(z, y):
        nonlocal calls
        calls += 1
        if calls == 4:
            raise error("half-way")
        return F.cross_entropy(z, y)

    objective.loss_fn = failing
    before = state(objective)
    with pytest.raises(error):
        method(objective)
    assert same(before, state(objective))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_rounded_and_given_back(dtype):
    model = build(LinearOnly).to(dtype)
    objective = Objective(model, lambda z, y: F.cross_entropy(z.float(), y), [(x.to(dtype), y) for x, y in data()])
    before = state(objective)
    found = r.quantized(objective, 3, predict=False)

    def change(name, p):
        return p if p.dim() < 2 else torch.stack([torch.tensor(slowly_rounded(row.float().tolist(), 3)) for row in p])

    assert float(found) == pytest.approx(rise_of(objective, change), rel=0.02)
    assert same(before, state(objective))


# --- predictions ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("method", REPLACING, ids=NAMES[1:])
def test_prediction_is_exact_for_a_quadratic_loss(method):
    found = method(linear())
    assert found.value != 0 and found.predicted == pytest.approx(found.value, rel=1e-10)


def test_prediction_at_eight_bits_is_within_a_thousandth():
    """And at two bits a parabola is not the truth."""
    objective = objective_of(LinearOnly)
    optimizer = torch.optim.SGD(objective.model.parameters(), 0.5, weight_decay=1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        sum(F.cross_entropy(objective.model(x), y) * len(y) / 25 for x, y in objective.data).backward()
        optimizer.step()
    fine, coarse = r.quantized(objective, 8), r.quantized(objective, 2)
    assert fine.predicted == pytest.approx(fine.value, rel=1e-3)
    assert abs(coarse.predicted / coarse.value - 1) > 0.05


def test_prediction_converges_at_third_order():
    """The error of gᵀδ + ½ δᵀHδ falls about eightfold for one more bit."""
    objective = objective_of(LinearOnly)
    errors = [abs((f := r.quantized(objective, bits)).predicted - f.value) for bits in (6, 10)]
    assert errors[1] < errors[0] / 8**2


@pytest.mark.filterwarnings("ignore:the trace is known")
def test_noise_of_a_quadratic_loss():
    """½ σ² tr H, and ½ Σ σ_t² tr H_t where σ is relative to each tensor."""
    objective = linear()
    H = Hessian(objective).dense()
    found = r.weight_noise(objective, 0.1, draws=200, max_matvecs=30)
    truth = 0.5 * 0.01 * float(H.trace())
    assert abs(found.value - truth) < 4 * found.stderr and found.stderr < 0.1 * truth
    assert abs(found.predicted - truth) <= 4 * found.predicted_stderr + 1e-12
    size = float(objective.model.weight.detach().square().mean())
    relative = r.weight_noise(objective, 0.1, relative=True, draws=200, max_matvecs=30)
    assert abs(relative.value - truth * size) < 4 * relative.stderr
    assert abs(relative.predicted - truth * size) <= 4 * relative.predicted_stderr + 1e-12


def test_standard_error_of_noise_covers_at_its_rate():
    objective = linear()
    truth, inside = 0.5 * 0.04 * float(Hessian(objective).dense().trace()), 0
    for seed in range(60):
        found = r.weight_noise(objective, 0.2, draws=20, predict=False, seed=seed)
        inside += abs(found.value - truth) < 2.09 * found.stderr        # Student's t, 19 degrees of freedom
    assert 52 <= inside


def test_antithetic_draws_cancel_the_slope():
    objective = objective_of()
    pairs, single = (r.weight_noise(objective, 1e-3, draws=20, antithetic=a, predict=False) for a in (True, False))
    assert pairs.stderr < 0.1 * single.stderr


# --- errors, metrics, curves ------------------------------------------------------------------------------------------

def test_standard_error_over_batches():
    """Equal batches: the standard error of the mean of their rises; one batch has none."""
    rows = [(i, i + 5) for i in range(0, 25, 5)]
    objective = Objective(build(RolesNet).double(), nn.CrossEntropyLoss(), data(rows))
    found = r.quantized(objective, 2, predict=False)
    rises = torch.tensor([rise_of(Objective(objective.model, objective.loss_fn, batch), lambda n, p: p if p.dim() < 2
                                  else torch.stack([torch.tensor(slowly_rounded(row.tolist(), 2)) for row in p]))
                          for batch in objective.data])
    assert torch.allclose(torch.tensor(found.rises), rises)
    assert found.stderr == pytest.approx(float(rises.std()) / math.sqrt(5))
    whole = Objective(objective.model, nn.CrossEntropyLoss(), data([(0, 25)]))
    assert math.isnan(r.quantized(whole, 2, predict=False).stderr)
    assert float(r.quantized(whole, 2, predict=False)) == pytest.approx(float(found))


def test_unequal_batches_and_summed_losses():
    merged = Objective(build(RolesNet).double(), nn.CrossEntropyLoss(), data([(0, 25)]))
    assert float(r.pruned(objective_of(), predict=False)) == pytest.approx(float(r.pruned(merged, predict=False)))
    model = build(RolesNet).double()
    total = Objective(model, nn.CrossEntropyLoss(reduction="sum"), data())
    found = r.pruned(total)
    assert float(found) == pytest.approx(25 * float(r.pruned(merged, predict=False)))
    assert found.stderr == pytest.approx(math.sqrt(3) * float(torch.tensor(found.rises).std()))


def test_accuracy_as_a_metric():
    objective = objective_of()
    found = r.pruned(objective, 1.0, metric=r.accuracy, predict=False)
    right = sum(float((objective.model(x).argmax(-1) == y).sum()) for x, y in objective.data) / 25
    assert found.metric_before == pytest.approx(right) and 0 <= found.metric <= 1
    assert found.metric != found.metric_before


def test_curve_and_its_area():
    objective = objective_of()
    found = r.curve(r.quantized, objective, bits=[8, 4, 3], group=4, metric=r.accuracy)
    rises = [float(r.quantized(objective, b, group=4, predict=False)) for b in (3, 4, 8)]
    assert [p.value for p in found.points] == pytest.approx(rises[::-1])
    assert float(found) == pytest.approx(((rises[0] + rises[1]) / 2 + 4 * (rises[1] + rises[2]) / 2) / 5)
    assert found.stderr > 0 and 0 <= found.metric_area <= 1 and found.x == (8, 4, 3)
    assert found.settings == {"group": 4}
    noise = r.curve(r.weight_noise, objective, sigma=[0.01, 0.1], draws=4, predict=False)
    assert 0 < noise.stderr < float("inf")
    with pytest.raises(ValueError, match="exactly one setting that is a list"):
        r.curve(r.quantized, objective, bits=4)
    with pytest.raises(ValueError, match="must differ"):
        r.curve(r.quantized, objective, bits=[4, 4])


def test_figure():
    pytest.importorskip("matplotlib").use("agg")
    ax = r.curve(r.pruned, objective_of(), share=[0.1, 0.5, 0.9]).plot()
    assert ax.get_xlabel() == "share" and len(ax.lines) >= 2


def test_record_prints_and_saves():
    found = r.quantized(objective_of(), 4)
    assert "predicted" in str(found) and float(found) == found.value
    assert found.to_dict()["settings"]["bits"] == 4


def test_same_seed_same_draws():
    a, b, other = (r.weight_noise(objective_of(), 0.1, draws=3, predict=False, seed=s) for s in (0, 0, 1))
    assert a.rises == b.rises != other.rises


@pytest.mark.parametrize("call, message", [
    (lambda o: r.weight_noise(o, 0.0), "sigma must be positive"), (lambda o: r.weight_noise(o, math.nan), "sigma"),
    (lambda o: r.weight_noise(o, 0.1, draws=0), "draws at least 1"), (lambda o: r.quantized(o, 1), "from 2 to 16"),
    (lambda o: r.quantized(o, 4, group=0), "group"), (lambda o: r.pruned(o, 1.5), r"in \[0, 1\]"),
    (lambda o: r.pruned(o, 0.5, scope="layer"), "scope"), (lambda o: r.truncated(o, 0.0), r"in \(0, 1\]"),
])
def test_wrong_settings(call, message):
    with pytest.raises(ValueError, match=message):
        call(linear())
