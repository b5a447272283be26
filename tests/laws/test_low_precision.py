"""Law 6, second half: low precision is honest.

With bf16 or fp16 weights, adding eps to w rounds most of it away: on a million weights of size .02 a step of .05 keeps
86 % of its direction in bf16, and on fifty million .39. Either the weights that the second pass really sees stand at
‖w' − w‖ = rho (to 2 %) in the direction of the gradient (cosine above .99), or a warning is raised and ``last.radius``
tells the realised length. Float64 laws cannot see any of this; nor can a test on small networks.
"""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import oracles
import problems
from problems import batch, build, flat_grad, loss_fn, relative
from rows import ROWS, case_id, parts_for, presets, start

SIDE = 1000  # a million weights


class Wide(nn.Module):
    """A linear map on low-precision weights of size .02, with a smooth loss computed in float32."""

    def __init__(self, dtype: torch.dtype, side: int = SIDE):
        super().__init__()
        self.map = nn.Linear(side, side, bias=False, dtype=torch.float32)
        with torch.no_grad():
            self.map.weight.normal_(0, 0.02, generator=torch.Generator().manual_seed(0))
        self.to(dtype)
        self.stood = []

    def forward(self, x):
        self.stood.append(self.map.weight.detach().clone())  # what this pass really multiplies with
        return self.map(x.to(self.map.weight.dtype))


def honest(dtype, rho, scale=1.0, make=None, side=SIDE):
    torch.set_default_dtype(torch.float32)
    model = Wide(dtype, side)
    x = torch.randn(8, side, generator=torch.Generator().manual_seed(1), dtype=torch.float32)
    target = torch.randn(8, side, generator=torch.Generator().manual_seed(2), dtype=torch.float32)
    before = model.map.weight.detach().clone()
    sharpener = (make or presets.sam)(model, rho=rho)
    gradients = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")

        def forward():
            loss = scale * (model(x).float() - target).square().mean()
            return loss

        handle = model.map.weight.register_hook(lambda g: gradients.append(g.detach().clone()))
        sharpener.backward(forward)
        handle.remove()
    problems.assert_same(model.map.weight.detach(), before, "weights")
    assert model.map.weight.dtype == dtype and model.map.weight.grad.isfinite().all()
    eps = model.stood[-1].double() - before.double()
    return sharpener, eps, before.double(), caught


def check(sharpener, eps, direction, rho, caught):
    length = eps.norm().item()
    cosine = torch.nn.functional.cosine_similarity(eps.flatten(), direction.flatten(), dim=0).item()
    faithful = abs(length - rho) <= 0.02 * rho and cosine > 0.99
    if not faithful:
        assert caught, f"the step had length {length:.4f} for {rho}, cosine {cosine:.3f}, and nobody was told"
        assert any("rho" in str(c.message) or "radius" in str(c.message) or "precision" in str(c.message)
                   or "float" in str(c.message) for c in caught), [str(c.message) for c in caught]
        assert float(sharpener.last.radius) == pytest.approx(length, rel=0.02)
    else:
        assert float(sharpener.last.radius) == pytest.approx(rho, rel=0.03)


def true_gradient(before, scale, side=SIDE):
    x = torch.randn(8, side, generator=torch.Generator().manual_seed(1), dtype=torch.float32).double()
    target = torch.randn(8, side, generator=torch.Generator().manual_seed(2), dtype=torch.float32).double()
    w = before.clone().requires_grad_()
    return torch.autograd.grad(scale * (x @ w.T - target).square().mean(), w)[0]


@pytest.mark.parametrize("rho", [0.05, 0.5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_realised_radius_and_direction_or_a_warning(dtype, rho):
    sharpener, eps, before, caught = honest(dtype, rho)
    check(sharpener, eps, true_gradient(before, 1.0), rho, caught)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_asam_too(dtype):
    """T = |w| + eta everywhere here: direction T²g, length measured as ‖eps/T‖."""
    sharpener, eps, before, caught = honest(dtype, 0.5, make=presets.asam)
    T = before.abs() + 0.01
    check(sharpener, eps / T, T * true_gradient(before, 1.0), 0.5, caught)


def test_fp16_gradients_too_small_to_square():
    """A million gradients near 1e-7: their squares are zero in fp16, and the norm must not be."""
    sharpener, eps, before, caught = honest(torch.float16, 0.5, scale=30.0)
    assert eps.isfinite().all() and eps.any()
    assert 0.02 < float(sharpener.last.gradient_norm)
    check(sharpener, eps, true_gradient(before, 30.0), 0.5, caught)


def test_fp16_gradients_too_large_to_square():
    """A million gradients up to hundreds: the sum of squares overflows fp16, and the norm must not."""
    side = SIDE
    torch.set_default_dtype(torch.float32)
    model = Wide(torch.float16, side)
    before = model.map.weight.detach().clone()
    pull = 100 * torch.randn(side, side, generator=torch.Generator().manual_seed(3)).sign().half()
    sharpener = presets.sam(model, rho=20.0)

    def forward():
        model.stood.append(model.map.weight.detach().clone())
        return (model.map.weight.float() * pull.float()).sum()

    sharpener.backward(forward)
    eps = model.stood[-1].double() - before.double()
    assert float(sharpener.last.gradient_norm) == pytest.approx(1e5, rel=1e-3)
    assert eps.norm().item() == pytest.approx(20.0, rel=0.02)
    assert not sharpener.last.skipped


def test_a_zero_gradient_in_fp16_is_not_a_nan():
    torch.set_default_dtype(torch.float32)
    model = Wide(torch.float16, 10)
    presets.sam(model, rho=0.05).backward(lambda: 0 * model(torch.ones(2, 10)).float().sum())
    assert not model.map.weight.grad.any() and model.map.weight.isfinite().all()


def test_parameters_of_several_dtypes_in_one_model():
    """A bf16 body under a float32 head: one norm over both, each tensor restored in its own dtype."""
    torch.set_default_dtype(torch.float32)
    model = nn.Sequential(nn.Linear(6, 8).bfloat16(), nn.Linear(8, 3))
    before = [p.detach().clone() for p in model.parameters()]
    x, y = batch(0)

    def forward():
        return loss_fn(model[1](model[0](x.bfloat16()).float()), y)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sharpener = presets.sam(model, rho=0.5)
        sharpener.backward(forward)
    for p, q in zip(model.parameters(), before, strict=True):
        problems.assert_same(p.detach(), q)
        assert p.grad.dtype == p.dtype and p.grad.isfinite().all()
    assert float(sharpener.last.radius) == pytest.approx(0.5, rel=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("row", ROWS, ids=case_id)
def test_every_row_restores_half_precision_weights_bitwise(row, dtype):
    model = build(dtype=dtype)
    optimizer, sharpener = start(row, row.bases[-1], model)
    addresses = [p.data_ptr() for p in model.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for t in range(3):
            before = [p.detach().clone() for p in model.parameters()]
            row.backward(sharpener, model, parts_for(row, *batch(t, dtype=dtype)))
            for p, q in zip(model.parameters(), before, strict=True):
                problems.assert_same(p.detach(), q)
                assert p.grad.dtype == dtype and p.grad.isfinite().all()
            if dtype == torch.bfloat16:  # AdamW's 1e-8 is zero in fp16
                optimizer.step()
            optimizer.zero_grad()
    assert [p.data_ptr() for p in model.parameters()] == addresses


class Multiply(torch.autograd.Function):
    """Someone's own kernel: it takes one dtype, and checks."""

    @staticmethod
    def forward(ctx, x, w):
        assert x.dtype == w.dtype
        ctx.save_for_backward(x, w)
        return x @ w.T

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        assert g.dtype == w.dtype
        return g @ w, g.T @ x


class OwnKernel(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(5, 8, generator=torch.Generator().manual_seed(0)))

    def forward(self, x):
        return Multiply.apply(x, self.w)


class Recurrent(nn.Module):
    """cuDNN-style recurrent layers keep references to their weights and compare dtypes."""

    def __init__(self):
        super().__init__()
        self.cells = nn.LSTM(8, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.cells(x[None])[0][0])


class Recomputing(nn.Module):
    """Activation checkpointing: the forward is run again during backward, on autograd's own terms."""

    def __init__(self, reentrant=False):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 5))
        self.reentrant = reentrant

    def forward(self, x):
        return checkpoint(self.net, x.requires_grad_(), use_reentrant=self.reentrant)


KINDS = {"own kernel": OwnKernel, "recurrent": Recurrent, "checkpoint": Recomputing,
         "checkpoint-reentrant": lambda: Recomputing(True), "compiled": lambda: torch.compile(nn.Linear(8, 5),
                                                                                             backend="eager")}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_models_that_train_without_sam_train_with_it(kind, dtype):
    """Whatever stands in for a wider w + eps, a network that works with ``loss.backward()`` must not fail: recomputed
    activations, kernels and recurrent layers that compare dtypes, compiled modules. The gradient is that of the float32
    network at its w + eps, to the precision of the dtype."""
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    model = KINDS[kind]().to(dtype)
    wide = copy.deepcopy(model).float()
    x = torch.randn(6, 8)
    grads = []
    for m, inputs in ((model, x.to(dtype)), (wide, x.to(dtype).float())):
        def forward(m=m, inputs=inputs):
            return m(inputs.clone()).float().square().mean()

        before = [p.detach().clone() for p in m.parameters()]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            presets.sam(m, rho=1.0).backward(forward)
        for p, q in zip(m.parameters(), before, strict=True):
            problems.assert_same(p.detach(), q)
        grads.append(flat_grad(m).float())
    assert relative(*grads) < 0.05


# --- autocast --------------------------------------------------------------------------------------------------------

def expected_under_autocast(model, x, y, rho):
    """By hand, each pass in an autocast region of its own, so that no cast survives from one to the next."""
    params = list(model.parameters())

    def gradient():
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_fn(model(x).float(), y)
        return torch.autograd.grad(loss, params), loss.detach()

    plain, _ = gradient()
    norm = torch.stack([g.norm() for g in plain]).norm()
    with torch.no_grad():
        before = [p.clone() for p in params]
        for p, g in zip(params, plain, strict=True):
            p.add_(g, alpha=float(rho / norm))
    there, loss = gradient()
    with torch.no_grad():
        for p, b in zip(params, before, strict=True):
            p.copy_(b)
    return torch.cat([g.flatten() for g in plain]), torch.cat([g.flatten() for g in there]), loss


@pytest.mark.parametrize("style", ["around the call", "inside the callable"])
def test_the_second_pass_really_uses_the_moved_weights_under_autocast(style):
    """Autocast caches the low-precision cast of each weight for the whole region: a second pass inside the same region
    would multiply with the casts of w, and SAM would silently be plain training."""
    torch.set_default_dtype(torch.float32)
    model = build(dtype=torch.float32)
    x, y = batch(0, dtype=torch.float32)
    plain, there, loss = expected_under_autocast(model, x, y, 1.0)
    assert relative(plain, there) > 0.2, "the radius is too small for this test to see anything"
    sharpener = presets.sam(model, rho=1.0)
    if style == "around the call":
        with torch.autocast("cpu", torch.bfloat16):
            sharpener.backward(lambda: loss_fn(model(x).float(), y))
    else:
        def forward():
            with torch.autocast("cpu", torch.bfloat16):
                return loss_fn(model(x).float(), y)
        sharpener.backward(forward)
    assert relative(flat_grad(model), there) < 0.02
    assert float(sharpener.last.perturbed_loss) == pytest.approx(float(loss), rel=0.01)


@pytest.mark.parametrize("row", [r for r in ROWS if r.passes(0) == 2], ids=case_id)
def test_autocast_around_the_call_is_autocast_inside_it(row):
    """For every row; and casts of w + eps must not survive for whoever uses the model next in the same region."""
    torch.set_default_dtype(torch.float32)
    x, y = batch(0, dtype=torch.float32)
    found = []
    for around in (True, False):
        model = build(dtype=torch.float32)
        _, sharpener = start(row, row.bases[-1], model)

        class Inside(nn.Module):
            def __init__(self, inner):
                super().__init__()
                self.inner = inner

            def forward(self, x):
                with torch.autocast("cpu", torch.bfloat16):
                    return self.inner(x).float()

        def loss(z, y):
            return loss_fn(z.float(), y)

        torch.manual_seed(0)
        if around:
            with torch.autocast("cpu", torch.bfloat16):
                row.backward(sharpener, model, parts_for(row, x, y), loss)
                after = model(x)
            with torch.autocast("cpu", torch.bfloat16):
                assert torch.equal(model(x), after), "a stale cast of w + eps was served after the step"
        else:
            row.backward(sharpener, Inside(model), parts_for(row, x, y), loss)
        found.append(flat_grad(model))
    assert relative(*found) < 0.02


def test_one_step_of_the_twin_agrees_in_float32():
    x, y = batch(0, dtype=torch.float32)
    model = build(dtype=torch.float32)
    twin = copy.deepcopy(model).double()
    presets.sam(model, rho=0.1).backward(lambda: loss_fn(model(x), y))
    expected = oracles.sam(oracles.Point(twin, [(x.double(), y, 1.0)]), 0.1)
    assert relative(flat_grad(model).double(), expected) < 1e-4


@pytest.mark.parametrize("preset, options", (("random_sam", {}), ("sam", {}), ("sam", {"scope": "first"})))
def test_running_statistics_move_in_widened_passes(preset, options):
    """Where a pass at w + ε moves them, they are half-precision buffers beside float32 weights."""
    means = {}
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)).to(dtype)
        sharpener = getattr(presets, preset)(model, rho=0.05, **options)
        for step in range(4):
            x = torch.randn(2, 16, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float32) + 1
            sharpener.backward(lambda b, m=model: m(b).float().square().mean(), batches=list(x.to(dtype)))
            model.zero_grad()
        means[dtype] = model[1].running_mean.float()
    torch.testing.assert_close(means[torch.bfloat16], means[torch.float32], rtol=0.03, atol=0.01)   # bfloat16's digits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_groups_with_radii_of_their_own_all_move_in_float32(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)).to(dtype)
    groups = [{"modules": model[2], "rho": 2e-3}, {"modules": model[4], "rho": 4e-3}]
    sharpener, x = presets.sam(model, rho=1e-3, groups=groups), torch.randn(4, 8).to(dtype)
    sharpener.backward(lambda: model(x).float().square().mean())
    assert sharpener.last.cosine == 1 and not sharpener.last.rounded
    assert {p.dtype for p in model.parameters()} == {dtype}
