"""No entry takes the preconditioned step because its second moment is zero, or nearly: new embedding rows, rows last
seen long ago, tensors that have had no gradient yet.

The slow twin holds the formula (``test_oracle.py``); here the claims about it: the share of ‖ε‖², what it does not
depend on, and what it costs.
"""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from flatmin import Sharpener
from flatmin.ascent import Preconditioned

FORMS = [(norm, power) for norm in ("l2", "dual", "raw") for power in (0.5, 1)]
NEW = 19  # a token that no step before the last one contains


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.norm, self.head = nn.Embedding(20, 8), nn.LayerNorm(8), nn.Linear(8, 20)

    def forward(self, tokens):
        return self.head(self.norm(self.embedding(tokens)).mean(1))


def trained(steps=30, rare=None, **options):
    """A model and its optimizer after some steps without token ``NEW``; ``rare`` is in the first batch alone."""
    torch.manual_seed(0)
    model = Words().double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, **options)
    for t in range(steps):
        step(model, optimizer, tokens(t, rare if t == 0 else None))
    return model, optimizer


def tokens(t, extra=None):
    x = torch.randint(0, 16, (32, 6), generator=torch.Generator().manual_seed(t))
    if extra is not None:
        x[0, 0] = extra
    return x


def loss_of(model, x):
    return nn.functional.cross_entropy(model(x), x[:, -1])


def step(model, optimizer, x):
    optimizer.zero_grad()
    loss_of(model, x).backward()
    optimizer.step()


def displacement(model, optimizer, x, rho=1e-3, scaler=None, factor=1.0, **settings):
    """ε of one step, by parameter."""
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    moved = {}

    def forward():
        for n, p in model.named_parameters():
            moved[n] = p.detach() - before[n]
        return factor * loss_of(model, x)

    direction = Preconditioned(**settings)
    Sharpener(model, direction=direction, optimizer=optimizer, rho=rho, scaler=scaler).backward(forward)
    model.zero_grad()
    return moved


def share(moved, row):
    return float(moved["embedding.weight"][row].square().sum() / sum(e.square().sum() for e in moved.values()))


@pytest.mark.parametrize("norm,power", FORMS)
def test_a_new_row_takes_no_more_than_a_row_like_the_others(norm, power):
    """One of 17 rows in the batch, in one of 192 places: without a floor it is the whole step."""
    model, optimizer = trained()
    x = tokens(100, NEW)
    assert share(displacement(model, optimizer, x, norm=norm, power=power, floor=0.0), NEW) > 0.999
    assert share(displacement(model, optimizer, x, norm=norm, power=power), NEW) < 0.02


@pytest.mark.parametrize("norm,power", FORMS)
def test_nor_does_a_row_seen_long_ago(norm, power):
    """Its v̂ has decayed to 0.9^199 of what it was."""
    model, optimizer = trained(steps=200, rare=NEW, betas=(0.9, 0.9))
    x = tokens(300, NEW)
    v = optimizer.state[model.embedding.weight]["exp_avg_sq"][NEW]
    assert (v > 0).all()
    assert share(displacement(model, optimizer, x, norm=norm, power=power, floor=0.0), NEW) > 0.99
    assert share(displacement(model, optimizer, x, norm=norm, power=power), NEW) < 0.05


@pytest.mark.parametrize("norm,power", FORMS)
@pytest.mark.parametrize("how", ["no state", "zero state"])
def test_nor_does_a_tensor_that_never_had_a_gradient(norm, power, how):
    """An expert that was not routed to, a layer just unfrozen: M there is the mean over the other tensors."""
    model, optimizer = trained()
    new = model.head.bias
    if how == "no state":
        del optimizer.state[new]
    else:
        optimizer.state[new]["exp_avg_sq"].zero_()
    moved = displacement(model, optimizer, tokens(100), norm=norm, power=power)
    part = float(moved["head.bias"].square().sum() / sum(e.square().sum() for e in moved.values()))
    plain = torch.autograd.grad(loss_of(model, tokens(100)), list(model.parameters()))
    assert 0 < part < 4 * float(plain[-1].square().sum() / sum(g.square().sum() for g in plain))


@pytest.mark.parametrize("norm", ["l2", "dual", "raw"])
def test_before_the_optimizers_first_step_it_is_the_gradient(norm):
    """Also where a checkpoint's or a framework's initial state is all zeros, at step 0 or 1."""
    model, optimizer = trained(steps=0)
    expected = displacement(model, optimizer, tokens(0), norm="l2")
    gradient = torch.autograd.grad(loss_of(model, tokens(0)), list(model.parameters()))
    length = torch.stack([g.norm() for g in gradient]).norm()
    for e, g in zip(expected.values(), gradient, strict=True):
        assert torch.allclose(e, 1e-3 * g / length, rtol=1e-9, atol=1e-15)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    moved = displacement(model, optimizer, tokens(0), norm=norm)
    gradient = torch.autograd.grad(loss_of(model, tokens(0)), list(model.parameters()))
    length = torch.stack([g.norm() for g in gradient]).norm()
    for e, g in zip(moved.values(), gradient, strict=True):
        assert torch.allclose(e, 1e-3 * g / length, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("norm,power", FORMS)
def test_a_loss_scale_does_not_matter(norm, power):
    model, optimizer = trained()
    model.float()
    for state in optimizer.state.values():
        state.update({k: v.float() for k, v in state.items()})
    x = tokens(100, NEW)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    plain = displacement(model, optimizer, x, norm=norm, power=power)
    scaled = displacement(model, optimizer, x, norm=norm, power=power, scaler=scaler)
    for name, e in plain.items():
        assert torch.allclose(scaled[name], e, rtol=1e-4, atol=1e-9), name


@pytest.mark.parametrize("power", [0.5, 1])
def test_units_of_the_loss_do_not_matter(power):
    """Gradients a thousand times as large all along give the same ε: the floor is relative."""
    moved = []
    for factor in (1.0, 1e3):
        model, optimizer = trained()
        for state in optimizer.state.values():
            state["exp_avg_sq"].mul_(factor**2)
        moved.append(displacement(model, optimizer, tokens(100, NEW), factor=factor, power=power, eps=0.0))
    for a, b in zip(*(m.values() for m in moved), strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-16)


def test_a_frozen_tensor_takes_no_part():
    """Its second moment, however large, is not what the others are measured by."""
    moved = []
    for size in (1.0, 1e6):
        model, optimizer = trained()
        optimizer.state[model.head.weight]["exp_avg_sq"].mul_(size)
        model.head.weight.requires_grad_(False)
        del optimizer.state[model.head.bias]  # M there is the mean over the tensors that move
        moved.append(displacement(model, optimizer, tokens(100, NEW)))
    for a, b in zip(*(m.values() for m in moved), strict=True):
        assert torch.equal(a, b)
    assert not moved[0]["head.weight"].any()


@pytest.mark.parametrize("kind", [lambda s: float(s), lambda s: torch.tensor(float(s)),
                                  lambda s: torch.tensor([float(s)], dtype=torch.float64)])
def test_the_step_may_be_a_number_or_any_tensor(kind):
    model, optimizer = trained()
    expected = displacement(model, optimizer, tokens(100, NEW), norm="raw")
    for state in optimizer.state.values():
        state["step"] = kind(state["step"])
    for a, b in zip(displacement(model, optimizer, tokens(100, NEW), norm="raw").values(), expected.values(),
                    strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=0)


def test_a_step_on_the_device_is_not_read():
    """``capturable=True`` keeps it there; the meta device stands for one whose numbers cannot be read."""
    direction = Preconditioned()
    p = nn.Parameter(torch.ones(3, device="meta"))
    optimizer = SimpleNamespace(state={p: {"exp_avg_sq": torch.ones(3, device="meta"),
                                           "step": torch.ones((), device="meta")}})
    info = SimpleNamespace(optimizer=optimizer, parameters=[SimpleNamespace(parameter=p)])
    assert direction._root(info, 0, {"betas": (0.9, 0.999)}).is_meta


@pytest.mark.parametrize("make,found", [
    (lambda p: torch.optim.Adafactor(p, lr=1e-2), "Adafactor.*exp_avg_sq"),
    (lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9), "SGD.*exp_avg_sq"),
])
def test_an_optimizer_without_a_second_moment_is_refused(make, found):
    model = Words().double()
    optimizer = make(model.parameters())
    step(model, optimizer, tokens(0))
    with pytest.raises(ValueError, match=found):
        displacement(model, optimizer, tokens(1))


def test_amsgrad_has_one():
    model, optimizer = trained(amsgrad=True)
    assert 0 < share(displacement(model, optimizer, tokens(100, NEW)), NEW) < 0.02


def test_bias_correction_without_what_it_needs_is_refused():
    model, optimizer = trained()
    for state in optimizer.state.values():
        del state["step"]
    with pytest.raises(ValueError, match=r"bias_correction=False"):
        displacement(model, optimizer, tokens(100))
    displacement(model, optimizer, tokens(100), bias_correction=False)


def test_a_negative_floor_is_refused():
    with pytest.raises(ValueError, match="floor"):
        Preconditioned(floor=-0.1)


def test_each_group_has_its_own_betas():
    """Two groups whose corrections differ: v̂ = v/(1 − β₂ᵗ) with each tensor's own β₂."""
    torch.manual_seed(0)
    model = Words().double()
    embedding = list(model.embedding.parameters())
    others = [p for p in model.parameters() if p is not embedding[0]]
    optimizer = torch.optim.Adam([{"params": embedding, "betas": (0.9, 0.9)}, {"params": others}], lr=1e-2)
    for t in range(3):
        step(model, optimizer, tokens(t))
    moved = displacement(model, optimizer, tokens(100))
    gradient = dict(zip(moved, torch.autograd.grad(loss_of(model, tokens(100)), list(model.parameters())), strict=True))
    expected = {}
    for n, p in model.named_parameters():
        root = (optimizer.state[p]["exp_avg_sq"] / (1 - (0.9 if p is embedding[0] else 0.999) ** 3)).sqrt()
        expected[n] = gradient[n] / (root + root[root > 0].mean())
    length = torch.stack([e.norm() for e in expected.values()]).norm()
    for n, e in expected.items():
        assert torch.allclose(moved[n], 1e-3 * e / length, rtol=1e-9, atol=1e-15), n


def test_finding_each_tensors_group_is_linear_in_their_number():
    """Counted: how often a parameter list of the optimizer is read, for 10 and for 40 tensors."""
    class Counting(list):
        reads = 0

        def __iter__(self):
            for item in super().__iter__():
                Counting.reads += 1
                yield item

    counts = []
    for n in (10, 40):
        model = nn.ParameterList([nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(n)])
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

        def loss(model=model):
            return sum(p.square().sum() for p in model)

        loss().backward()
        optimizer.step()
        sharpener = Sharpener(model, direction=Preconditioned(), optimizer=optimizer, rho=0.1)
        optimizer.param_groups[0]["params"] = Counting(optimizer.param_groups[0]["params"])
        Counting.reads = 0
        sharpener.backward(loss)
        counts.append(Counting.reads)
    assert counts[1] == 4 * counts[0] > 0


