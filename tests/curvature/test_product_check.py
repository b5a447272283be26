"""The check of the matrix: wrong second derivatives are found and named, healthy nets raise no alarm."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from flatmin import Objective, composite_norms
from flatmin.curvature import (
    Fisher,
    FunctionalPart,
    GaussNewton,
    Hessian,
    diagonal,
    eigenpairs,
    eigenvalues,
    frobenius,
    power_iteration,
    spectral_density,
    trace,
)
from nets import Attention, classification, mlp, ragged, samples


class Cube(torch.autograd.Function):
    """x³, whose backward pass takes x from where autograd does not see it."""

    @staticmethod
    def forward(ctx, x):
        ctx.x = x.detach()
        return x**3

    @staticmethod
    def backward(ctx, g):
        return 3 * ctx.x**2 * g


class Scaled(torch.autograd.Function):
    """x times its norm; the norm is saved, and has no history."""

    @staticmethod
    def forward(ctx, x):
        size = x.norm()
        ctx.save_for_backward(x, size)
        return x * size

    @staticmethod
    def backward(ctx, g):
        x, size = ctx.saved_tensors
        return g * size + x * (g * x).sum() / size


class Applied(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class DetachedScale(nn.Module):
    """Divides by a norm of which the gradient knows nothing."""

    def forward(self, x):
        return x / x.detach().norm(dim=-1, keepdim=True)


class Tangent(nn.Module):
    """A directional derivative of a layer norm, by forward mode."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        return torch.func.jvp(self.norm, (x,), (x.sin(),))[1]


def deep(*layers, width=8, dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Sequential(*layers), nn.Linear(width, 3)).to(dtype)


def over(model, dtype=torch.float32, **options):
    x, y = samples(40)
    return Objective(model.to(dtype), nn.CrossEntropyLoss(), (x.to(dtype), y), **options)


def old_weight_norm(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(layer)


WRONG = {
    "weight_norm": (lambda: old_weight_norm(nn.Linear(8, 8)), "module '2.0' "),
    "parametrized weight_norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)),
                                 "module '2.0.parametrizations.weight.0' "),
    "saved without history": (lambda: Applied(Cube.apply), r"module '2.0' \(Applied\)"),
    "saved norm": (lambda: Applied(Scaled.apply), r"module '2.0' \(Applied\)"),
    "detached": (DetachedScale, r"module '2.0' \(DetachedScale\)"),
    "forward mode": (Tangent, "module '2.0' "),
}


@pytest.fixture
def fused(monkeypatch):
    """Normalization as torch has it."""
    monkeypatch.setattr(composite_norms, "_COMPOSITE", {})


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_second_derivative_is_found_and_named(name, fused):
    make, where = WRONG[name]
    model = deep(make())
    objective = over(model)
    before = copy.deepcopy({k: v.detach() for k, v in model.state_dict().items()})
    with pytest.warns(UserWarning, match=where):
        found = eigenpairs(Hessian(objective, product="cached"), tol=1e-2)
    assert not found.certified and found.settings["product_check"]["disagrees"]
    assert found.settings["product_check"]["error"] > 0.01
    assert all(torch.equal(before[k], v) and v.dtype == before[k].dtype for k, v in model.state_dict().items())


def test_by_itself_the_product_becomes_a_difference(fused):
    """λ is then right: that of the same net without the custom function."""
    ours, truth = (over(deep(Applied(f), dtype=torch.float64), torch.float64) for f in (Cube.apply, lambda x: x**3))
    with pytest.warns(UserWarning, match=r"module '2.0' \(Applied\).*differences of gradients"):
        found = eigenpairs(Hessian(ours), tol=1e-4)
    right = eigenpairs(Hessian(truth), tol=1e-4)
    assert found.certified and found.settings["product"] == "finite_difference"
    assert found.largest == pytest.approx(right.largest, rel=1e-3)
    wrong = eigenpairs(Hessian(ours, product="cached"), tol=1e-4, certify=False)
    assert abs(wrong.largest / right.largest - 1) > 0.01


@pytest.mark.parametrize("name", ("forward mode", "detached"))
def test_where_the_gradient_is_wrong_too_differences_of_it_are_no_way_out(name, fused):
    with pytest.warns(UserWarning, match="the gradient of module '2.0' .*not certified"):
        found = eigenpairs(Hessian(over(deep(WRONG[name][0]()))), tol=1e-2)
    assert not found.certified and found.settings["product"] == "cached"


class Doubled(torch.autograd.Function):
    """x, with twice its derivative in every order."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return 2 * g


def test_a_wrong_gradient_whose_derivative_is_right():
    """Products agree with differences of the gradient, which is that of another function."""
    with pytest.warns(UserWarning, match="the gradient of .*not certified"):
        found = eigenpairs(Hessian(over(deep(Applied(Doubled.apply)))), tol=1e-2)
    assert not found.certified and found.settings["product"] == "cached"
    assert found.settings["product_check"]["disagrees"]


class Pole(torch.autograd.Function):
    """x, with a second derivative that is not finite."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        x, = ctx.saved_tensors
        return g * (1 + 0 * (x - x.detach()).abs().sqrt())


def test_a_product_that_is_not_finite_is_a_reason_and_no_disagreement():
    H = Hessian(over(deep(Applied(Pole.apply))))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with H.session():
            pass
    assert "not finite" in H.describe()["product_check"]["not_checked"]


def test_gradients_scaled_by_frequency_are_refused():
    model = nn.Sequential(nn.Embedding(5, 2, scale_grad_by_freq=True), nn.Flatten(), nn.Linear(4, 3))
    with pytest.raises(ValueError, match=r"'0' \(Embedding\) has scale_grad_by_freq"):
        Objective(model, nn.CrossEntropyLoss(), (torch.zeros(2, 2, dtype=torch.long), torch.zeros(2)))


@pytest.mark.parametrize("measure", (trace, diagonal, frobenius, spectral_density, power_iteration,
                                     lambda H: eigenvalues(H, 1)))
def test_every_measurement_is_checked(measure):
    objective = over(deep(Applied(Cube.apply)))
    with pytest.warns(UserWarning, match=r"module '2.0' \(Applied\)"):
        found = measure(Hessian(objective, product="cached"))
    assert found.settings["product_check"]["disagrees"]


@pytest.mark.parametrize("kind", (GaussNewton, FunctionalPart, Fisher, Hessian))
def test_combinations_and_blocks_know(kind):
    objective = over(deep(Applied(Cube.apply)))
    H = Hessian(objective, product="cached")
    with pytest.warns(UserWarning, match="Applied"), H.session():
        pass
    assert not H.trusted and not (2 * H).trusted and not H.restrict("0").trusted
    assert not (H + kind(objective, product="cached")).trusted


class Recurrent(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        self.rnn, self.head = kind(5, 6, batch_first=True, **options), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.rnn(x.unsqueeze(1).expand(-1, 3, -1))[0][:, -1])


class Tokens(nn.Module):
    """Embeddings and a transformer layer."""

    def __init__(self, dropout=0.0, tied=True):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout, batch_first=True)
        self.head = nn.Linear(8, 11, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.layer(self.embed(x))).transpose(1, 2)


def tokens(model, **options):
    x = torch.randint(0, 11, (40, 6), generator=torch.Generator().manual_seed(0))
    return Objective(model, nn.CrossEntropyLoss(), (x, x.roll(1, 1)), **options)


def images(*layers, **options):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 3, 8, 8, generator=generator).relu(), torch.arange(40) % 3
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *layers, nn.Flatten(), nn.LazyLinear(3))
    model(x)
    return Objective(model, nn.CrossEntropyLoss(), (x, y), **options)


def trained(objective, steps=60, lr=1e-2):
    optimizer = torch.optim.Adam(objective.model.parameters(), lr)
    for _ in range(steps):
        optimizer.zero_grad()
        x, y = next(iter(objective.data))
        objective.loss_fn(objective.model(x), y).backward()
        optimizer.step()
    return objective


def penalized(norm):
    """A gradient penalty that holds on to the model's own tensors."""
    model = deep(norm, width=8)

    def loss(z, y):
        g, = torch.autograd.grad(F.cross_entropy(z, y), model[0].weight, create_graph=True)
        return F.cross_entropy(z, y) + g.square().sum()

    x, y = samples(40)
    return Objective(model, loss, (x.float(), y))


def energy(norm=nn.LayerNorm):
    """Score matching: ½‖s‖² + div s for the score s = −∇E, so that the gradient needs a third derivative of E."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 7), nn.GELU(), norm(7), nn.Linear(7, 1))
    x = torch.randn(40, 3)

    def forward(net, batch):
        x = batch[0].detach().clone().requires_grad_()
        s, = torch.autograd.grad(-net(x).sum(), x, create_graph=True)
        divergence = sum(torch.autograd.grad(s[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(3))
        return (divergence + s.square().sum(1) / 2).mean()

    return Objective(model, lambda out, batch: out, [(x,)], forward=forward)


def language(name, **options):
    import transformers

    torch.manual_seed(0)
    sizes = dict(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, vocab_size=11)
    if name == "gpt2":
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
            n_layer=2, n_head=2, n_embd=8, vocab_size=11, n_positions=12, bos_token_id=0, eos_token_id=0))
    elif name == "llama":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
            intermediate_size=16, num_key_value_heads=1, tie_word_embeddings=True, **sizes))
    else:
        model = transformers.BertForTokenClassification(transformers.BertConfig(
            intermediate_size=16, num_labels=3, **sizes))
    ids = torch.randint(0, 11, (8, 9), generator=torch.Generator().manual_seed(0))
    labels = ids.clone() if name != "bert" else ids % 3
    labels[0, 3:] = -100
    return Objective(model, None, {"input_ids": ids, "labels": labels}, **options)


def saturated():
    """A loss near zero: every sample is far on its side."""
    x = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] > 0).long()
    return trained(Objective(deep(dtype=torch.float64), nn.CrossEntropyLoss(), (x, y)), 300, 5e-2)


def weighted():
    """The loss holds a tensor in single precision."""
    x, y = samples()
    loss = nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 0.5]).float())
    return Objective(mlp(dtype=torch.float32), loss, (x.float(), y))


def steep():
    """A third derivative so large that the product is another one a step further."""
    torch.manual_seed(0)
    model, x = nn.Linear(8, 8), torch.randn(4, 4, 8)

    def loss(z, y):
        weighted = 3000 * torch.tanh(z).mul(torch.linspace(-1, 1.3, z.numel(), dtype=z.dtype).view_as(z)).sum()
        g, = torch.autograd.grad(weighted.sin(), model.weight, create_graph=True)
        return g.square().sum()

    return Objective(model, loss, (x, torch.zeros(4)), weight=lambda batch: 1.0)


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = self.first(x)
        return self.head(checkpoint(lambda z: torch.tanh(self.second(z)), x, use_reentrant=False))


class Casts(nn.Module):
    """Asks for a narrow type in three ways, as models in mixed precision do."""

    def forward(self, x):
        x = x.to(torch.bfloat16).tanh().float()
        return x.to(dtype=torch.float16).sin().type_as(x)


HEALTHY = {
    "mlp": lambda: over(deep()),
    "mlp in float64": lambda: classification(split=True),
    "mlp in bfloat16": lambda: over(deep(dtype=torch.bfloat16), torch.bfloat16),
    "casts": lambda: over(deep(Casts())),
    "relu": lambda: over(deep(nn.ReLU(), nn.Linear(8, 8), nn.ReLU())),
    "trained relu": lambda: trained(over(deep(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 8), nn.ReLU()))),
    "trained leaky relu": lambda: trained(over(deep(nn.Linear(8, 64), nn.LeakyReLU(), nn.Linear(64, 8)))),
    "wide relu": lambda: over(deep(nn.Linear(8, 2000), nn.ReLU(), nn.Linear(2000, 8))),
    "zero biases": lambda: over(deep(*[zeroed(nn.Linear(8, 8)), nn.ReLU()])),
    "gelu": lambda: over(deep(nn.GELU())),
    "silu, elu, softplus": lambda: over(deep(nn.SiLU(), nn.ELU(), nn.Softplus())),
    "hardtanh, relu6": lambda: over(deep(nn.Hardtanh(), nn.ReLU6())),
    "prelu": lambda: over(deep(nn.PReLU())),
    "max-pooling": lambda: images(nn.ReLU(), nn.MaxPool2d(2)),
    "trained max-pooling": lambda: trained(images(nn.ReLU(), nn.MaxPool2d(2)), 20),
    "average pooling": lambda: images(nn.ReLU(), nn.AvgPool2d(2)),
    "strided": lambda: images(nn.GELU(), nn.Conv2d(8, 4, 3, stride=2), nn.GELU()),
    "transposed": lambda: images(nn.Tanh(), nn.ConvTranspose2d(8, 2, 2)),
    "batch norm": lambda: images(nn.BatchNorm2d(8), nn.ReLU()),
    "batch norm, train": lambda: images(nn.BatchNorm2d(8), nn.ReLU(), mode="train"),
    "batch norm, batch statistics": lambda: images(nn.BatchNorm2d(8), nn.ReLU(), mode="batch_statistics"),
    "group norm": lambda: images(nn.GroupNorm(2, 8), nn.ReLU()),
    "instance norm": lambda: images(nn.InstanceNorm2d(8, affine=True), nn.ReLU()),
    "layer norm": lambda: over(deep(nn.LayerNorm(8))),
    "rms norm": lambda: over(deep(nn.RMSNorm(8))),
    "weight norm": lambda: over(deep(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)))),
    "old weight norm": lambda: over(deep(old_weight_norm(nn.Linear(8, 8)))),
    "spectral norm": lambda: over(deep(nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)))),
    "attention": lambda: over(Attention4().float()),
    "transformer layer": lambda: tokens(Tokens()),
    "transformer layer with dropout": lambda: tokens(Tokens(0.2), mode="train"),
    "untied": lambda: tokens(Tokens(tied=False)),
    "gpt2": lambda: language("gpt2"),
    "gpt2, train": lambda: language("gpt2", mode="train"),
    "llama": lambda: language("llama"),
    "bert": lambda: language("bert"),
    "gru": lambda: over(Recurrent(nn.GRU)),
    "lstm": lambda: over(Recurrent(nn.LSTM)),
    "two-layer rnn": lambda: over(Recurrent(nn.RNN, num_layers=2)),
    "dropout, train": lambda: over(deep(nn.Dropout(0.5)), mode="train"),
    "gradient penalty": lambda: penalized(nn.Identity()),
    "gradient penalty, layer norm": lambda: penalized(nn.LayerNorm(8)),
    "gradient penalty, batch norm": lambda: penalized(nn.BatchNorm1d(8)),
    "score matching": energy,
    "forward mode": lambda: over(deep(Tangent())),
    "loss near zero": saturated,
    "tiny loss": lambda: Objective(mlp(), lambda z, y: 1e-30 * F.cross_entropy(z, y), samples()),
    "squared error": lambda: Objective(mlp(), nn.MSELoss(), (samples()[0], torch.randn(13, 3).double())),
    "batch norm without statistics": lambda: Objective(
        deep(nn.BatchNorm1d(8, track_running_stats=False), dtype=torch.float64), nn.CrossEntropyLoss(), samples(6)),
    "class weights": lambda: weighted(),
    "summed": lambda: Objective(mlp(), nn.CrossEntropyLoss(reduction="sum"), ragged(*samples())),
    "steep": steep,
    "tiny weights": lambda: scaled(over(deep(), torch.float64), 1e-20),
    "checkpointed": lambda: over(Checkpointed()),
    "frozen": lambda: over(frozen(deep())),
    "one sample": lambda: Objective(mlp(), nn.CrossEntropyLoss(), tuple(t[:1] for t in samples())),
}


@torch.no_grad()
def scaled(objective, factor):
    for p in objective.parameters:
        p.mul_(factor)
    return objective


class Attention4(Attention):
    def forward(self, x):
        return super().forward(x[:, None, :4].expand(-1, 2, -1))


def zeroed(layer):
    nn.init.zeros_(layer.bias)
    return layer


def frozen(model):
    model[0].weight.requires_grad_(False)
    return model


NOT_COMPARED = {"loss near zero", "tiny weights"}


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_nets_raise_no_alarm(name):
    objective = HEALTHY[name]()
    state = torch.get_rng_state()
    before = {k: (v, v.clone()) for k, v in objective.model.state_dict(keep_vars=True).items()}
    H = Hessian(objective)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with H.session():
            pass
    assert H.product == "auto" and H.checked.agrees
    if name not in NOT_COMPARED:
        assert H.checked.error < 1e-3, H.checked
    assert torch.equal(state, torch.get_rng_state())
    after = objective.model.state_dict(keep_vars=True)
    assert all(after[k] is v and torch.equal(v, old) for k, (v, old) in before.items())
