"""Dense ``torch.func.hessian`` in float64: every product of every operator against the whole matrix.

What the other families would miss: a parameter left out or out of order, a batch weighed wrongly, a transpose; closed
forms exist for hardly any net, finite differences see six digits, and other libraries share conventions.
"""

import functools

import pytest
import torch
from torch import nn

from flatmin import Objective
from flatmin.curvature import Fisher, FunctionalPart, GaussNewton, Hessian, dense_hessian
from nets import Attention, classification, mlp, ragged, samples

PRODUCTS = ("auto", "cached", "recomputed", "forward")


@pytest.fixture(scope="module")
def truth():
    torch.set_default_dtype(torch.float64)
    model, (x, y) = mlp(), samples()
    names = list(dict(model.named_parameters()))

    def loss(*values):
        z = torch.func.functional_call(model, dict(zip(names, values, strict=True)), (x,))
        return nn.functional.cross_entropy(z, y)

    w = tuple(p.detach() for p in model.parameters())
    rows = torch.func.hessian(loss, argnums=tuple(range(len(w))))(*w)
    return torch.cat([torch.cat([b.reshape(p.numel(), -1) for b in row], 1) for row, p in zip(rows, w, strict=True)])


@pytest.mark.parametrize("split", (False, True))
@pytest.mark.parametrize("product", PRODUCTS)
def test_every_product(truth, product, split):
    assert torch.allclose(Hessian(classification(split=split), product=product).dense(), truth, atol=1e-14)


@pytest.mark.parametrize("product", ("cached", "forward"))
def test_blocks_of_vectors(truth, product):
    v = torch.randn(len(truth), 4)
    assert torch.allclose(Hessian(classification(split=True), product=product, vmap=True) @ v, truth @ v, atol=1e-13)


def test_every_form_of_a_vector(truth):
    H = Hessian(classification())
    v = torch.randn(H.size)
    shapes = [p.shape for p in H.parameters]
    parts = [t.view(s) for t, s in zip(v.split([s.numel() for s in shapes]), shapes, strict=True)]
    rows = H.matvec(parts)
    assert [t.shape for t in rows] == shapes
    assert torch.allclose(torch.cat([t.reshape(-1) for t in rows]), truth @ v, atol=1e-14)
    assert torch.allclose(H @ v, truth @ v, atol=1e-14)
    assert torch.allclose(torch.from_numpy(H.to_scipy() @ v.numpy()), truth @ v, atol=1e-14)
    assert torch.allclose(torch.from_numpy(H.to_numpy()), truth, atol=1e-14)
    with pytest.raises(ValueError, match="expected 75 numbers"):
        H.matvec(torch.zeros(99))
    with pytest.raises(ValueError, match="number 0 has shape"):
        H.matvec([t.flatten() for t in parts])


def test_the_two_parts_and_their_sum(truth):
    objective = classification(split=True)
    G, F = GaussNewton(objective), FunctionalPart(objective)
    assert torch.allclose((G + F).dense(), truth, atol=1e-14)
    assert torch.linalg.eigvalsh(G.dense())[0] > -1e-14
    assert torch.allclose((Hessian(objective) - G).dense(), F.dense(), atol=1e-14)
    for product in ("recomputed", "forward"):
        assert torch.allclose(GaussNewton(objective, product=product).dense(), G.dense(), atol=1e-14)
    assert torch.allclose(Fisher(objective).dense(), G.dense(), atol=1e-14)


def test_sums_scalings_blocks_and_preconditioning(truth):
    H = Hessian(classification())
    d = torch.rand(H.size)
    assert torch.allclose((H + 2 * H - H / 2).dense(), 2.5 * truth, atol=1e-13)
    assert torch.allclose((-H).dense(), -truth, atol=1e-14)
    assert torch.allclose(H.preconditioned(d).dense(), d.sqrt()[:, None] * truth * d.sqrt(), atol=1e-14)
    assert torch.allclose(H.restrict("0").dense(), truth[:48, :48], atol=1e-14)
    assert torch.allclose((2 * H + H).restrict(["0.bias", "2.bias"]).dense(),
                          3 * truth[[*range(40, 48), *range(72, 75)]][:, [*range(40, 48), *range(72, 75)]], atol=1e-14)
    assert torch.allclose(H.restrict(H.objective.model[2]).dense(), truth[48:, 48:], atol=1e-14)
    assert torch.allclose(H.preconditioned(d).restrict("2").dense(),
                          (d.sqrt()[:, None] * truth * d.sqrt())[48:, 48:], atol=1e-14)
    with pytest.raises(ValueError, match="no parameter"):
        H.restrict("layer7")


def test_the_fishers(truth):
    model, (x, y) = mlp(), samples()
    objective = Objective(model, nn.CrossEntropyLoss(), ragged(x, y))
    rows = []
    for xi, yi in zip(x, y, strict=True):
        if yi != -100:
            g = torch.autograd.grad(nn.functional.cross_entropy(model(xi[None]), yi[None]), list(model.parameters()))
            rows.append(torch.cat([t.reshape(-1) for t in g]))
    rows = torch.stack(rows)
    assert torch.allclose(Fisher(objective, kind="empirical").dense(), rows.T @ rows / len(rows), atol=1e-14)
    v = torch.randn(len(exact := Fisher(objective).dense()))
    draws = torch.stack([Fisher(objective, kind="monte_carlo", seed=s) @ v for s in range(200)])
    assert ((draws.mean(0) - exact @ v).norm() < 0.25 * (draws - exact @ v).norm(dim=1).mean())
    with pytest.raises(ValueError, match="likelihood="):
        Fisher(Objective(model, lambda z, t: z.mean(), (x, y)))


@pytest.mark.parametrize("loss", (nn.MSELoss(), nn.BCEWithLogitsLoss(), nn.MSELoss(reduction="sum")), ids=str)
def test_fishers_of_other_likelihoods(loss):
    x, t = torch.randn(9, 5), torch.rand(9, 3).round()
    objective = Objective(mlp(), loss, [(x[:4], t[:4]), (x[4:], t[4:])])
    whole = GaussNewton(Objective(objective.model, loss, (x, t))).dense()
    assert torch.allclose(Fisher(objective).dense(), whole, atol=1e-13)
    v = torch.randn(len(whole))
    draws = torch.stack([Fisher(objective, kind="monte_carlo", seed=s) @ v for s in range(200)])
    error = draws.std(0).norm() / 200**0.5
    assert (draws.mean(0) - whole @ v).norm() < 2 * error < 0.2 * (whole @ v).norm()


@pytest.mark.parametrize("classes", ("second", "last"))
def test_fishers_of_tokens(classes):
    """A row of the three-dimensional outputs is one term, wherever the classes are."""
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, x):
            return self.net(x).movedim(-1, 1) if classes == "second" else self.net(x)

    def flat(z, t):
        return nn.functional.cross_entropy(z.reshape(-1, 3), t.reshape(-1))

    model, x, t = Tokens(), torch.randn(2, 4, 5), torch.randint(0, 3, (2, 4))
    objective = Objective(model, nn.CrossEntropyLoss() if classes == "second" else flat, (x, t))
    apart = Objective(model.net, nn.CrossEntropyLoss(), (x.reshape(8, 5), t.reshape(8)))
    for kind in ("exact", "empirical"):
        found = Fisher(objective, kind=kind, likelihood="softmax").dense()
        assert torch.allclose(found, Fisher(apart, kind=kind).dense(), atol=1e-14)
    v = torch.randn(75)
    exact = Fisher(apart) @ v
    draws = torch.stack([Fisher(objective, kind="monte_carlo", likelihood="softmax", seed=s) @ v for s in range(100)])
    assert (draws.mean(0) - exact).norm() < 0.25 * (draws - exact).norm(dim=1).mean()


def test_fishers_of_outputs_without_a_dimension_of_classes():
    net = nn.Sequential(nn.Linear(5, 1), nn.Flatten(0))
    x, t = torch.randn(9, 5), torch.rand(9).round()
    rows = torch.cat([x, torch.ones(9, 1)], 1)      # ∂z/∂(w, b)
    p = net(x).sigmoid().detach()
    objective = Objective(net, nn.BCEWithLogitsLoss(), [(x[:4], t[:4]), (x[4:], t[4:])])
    for kind, weight in (("exact", p * (1 - p)), ("empirical", (p - t) ** 2)):
        assert torch.allclose(Fisher(objective, kind=kind).dense(), rows.T @ (rows * weight[:, None]) / 9, atol=1e-14)


def test_attention_goes_through_the_kernel_that_can():
    model = Attention()
    x, y = torch.randn(6, 5, 4), torch.randint(0, 3, (6,))
    objective = Objective(model, nn.CrossEntropyLoss(), (x, y))
    H = Hessian(objective).dense()
    assert torch.allclose(H, dense_hessian(objective), atol=1e-14)
    assert torch.allclose((GaussNewton(objective) + FunctionalPart(objective)).dense(), H, atol=1e-14)
    q = torch.randn(1, 1, 3, 4, requires_grad=True)     # outside the product the default kernel is what it was
    g, = torch.autograd.grad(nn.functional.scaled_dot_product_attention(q, q, q).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(g.sum(), q)


def test_unused_frozen_and_tied_parameters():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.unused, self.frozen = nn.Linear(5, 5), nn.Linear(2, 2), nn.Linear(5, 5)
            self.frozen.requires_grad_(False)
            self.head = nn.Linear(5, 3)
            self.tied = self.a

        def forward(self, x):
            return self.head(torch.tanh(self.tied(self.frozen(self.a(x)))))

    objective = Objective(Odd(), nn.CrossEntropyLoss(), samples())
    H = Hessian(objective)
    assert H.names == ["a.weight", "a.bias", "unused.weight", "unused.bias", "head.weight", "head.bias"]
    dense = H.dense()
    assert torch.allclose(dense, dense_hessian(objective), atol=1e-14)
    assert dense[30:36].abs().max() == 0
    gradient = objective.gradient()
    assert [g.shape for g in gradient] == [p.shape for p in objective.model.parameters()]


@pytest.mark.parametrize("loss", (functools.partial(nn.functional.cross_entropy, ignore_index=1),
                                  nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0, 0.5])).double(),
                                  nn.CrossEntropyLoss(reduction="sum"),
                                  nn.CrossEntropyLoss(label_smoothing=0.1)),
                         ids=("ignore_index", "class_weights", "sum", "smoothed"))
def test_averages_are_those_of_the_merged_batch(loss):
    x, y = samples()
    if isinstance(loss, functools.partial):
        y = y.clamp(min=1)
    model = mlp()
    whole, parts = Objective(model, loss, (x, y)), Objective(model, loss, ragged(x, y))
    assert float(whole.value()) == pytest.approx(float(parts.value()), rel=1e-14)
    for a, b in zip(whole.gradient(), parts.gradient(), strict=True):
        assert torch.allclose(a, b, atol=1e-13)
    v = torch.randn(Hessian(whole).size)
    for kind in (Hessian, GaussNewton, FunctionalPart):
        assert torch.allclose(kind(whole) @ v, kind(parts) @ v, atol=1e-12)


@pytest.mark.parametrize(("norm", "mode"), ((nn.LayerNorm(4), "eval"), (nn.BatchNorm1d(4), "train"),
                                            (nn.BatchNorm1d(4, track_running_stats=False), "eval")))
def test_the_dense_hessian_of_normalization(norm, mode):
    """Beside differences of gradients: torch's own derivatives of these kernels inside torch.func are wrong."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), norm, nn.Tanh(), nn.Linear(4, 2)).double()
    objective = Objective(model, nn.MSELoss(), (torch.randn(6, 3).double(), torch.randn(6, 2).double()), mode=mode)
    truth = []
    for p in model.parameters():
        for i in range(p.numel()):
            ends = []
            for h in (1e-5, -2e-5):
                with torch.no_grad():
                    p.view(-1)[i] += h
                ends.append(torch.cat([g.reshape(-1) for g in objective.gradient()]))
            with torch.no_grad():
                p.view(-1)[i] += 1e-5
            truth.append((ends[0] - ends[1]) / 2e-5)
    assert torch.allclose(dense_hessian(objective), torch.stack(truth), atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("kind", (Hessian, GaussNewton))
def test_embeddings_with_sparse_gradients(kind):
    """Products are exact there too, and those of the same net without."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 2, sparse=True), nn.Flatten(), nn.Linear(6, 3)).double()
    objective = Objective(model, nn.CrossEntropyLoss(), (torch.randint(0, 5, (7, 3)), torch.randint(0, 3, (7,))))
    ours = kind(objective)
    found, settings = ours.dense(), ours.describe()
    model[0].sparse = False
    assert torch.allclose(found, kind(objective).dense(), atol=1e-14)
    assert settings["product"] == "cached" and settings["product_check"]["error"] < 1e-3


@pytest.mark.parametrize("kind", (Hessian, GaussNewton))
def test_differences_of_embeddings_with_sparse_gradients(kind):
    model = nn.Sequential(nn.Embedding(5, 2, sparse=True), nn.Flatten(), nn.Linear(6, 3)).double()
    objective = Objective(model, nn.CrossEntropyLoss(), (torch.randint(0, 5, (7, 3)), torch.randint(0, 3, (7,))))
    exact = kind(objective).dense()
    torch.testing.assert_close(kind(objective, product="finite_difference").dense(), exact, rtol=0,
                               atol=1e-5 * float(exact.abs().max()))     # differences err by h², about 1e-8 here
