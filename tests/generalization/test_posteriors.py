"""Gaussian posteriors against closed forms and dense twins, and certificates against the true risk.

Bayesian linear regression gives the posterior in closed form; a linear classifier of one weight gives E_Q of the error
rate; simulated data sets with a known risk show whether a certificate, union bound and draws included, holds.
"""

import math

import pytest
import torch
from torch import nn

from flatmin import Objective
from flatmin.curvature import Hessian, diagonal
from flatmin.generalization import pac_bayes, posteriors
from problems import NoisyNet, TiedNet, build

PHI = torch.distributions.Normal(0.0, 1.0).cdf


def regression(n=40, d=4):
    torch.manual_seed(3)
    model = nn.Linear(d, 1, bias=False)
    x = torch.randn(n, d)
    return Objective(model, nn.MSELoss(), (x, x @ torch.randn(d, 1) + 0.1 * torch.randn(n, 1))), x


def threshold(n=300, seed=0, flip=0.1):
    """x = ±1 with the label of its sign, ``flip`` of them wrong, and a model of one weight: right where w > 0."""
    g = torch.Generator().manual_seed(seed)
    x = torch.where(torch.rand(n, 1, generator=g) < 0.5, -1.0, 1.0)
    y = ((x > 0) ^ (torch.rand(n, 1, generator=g) < flip)).double()
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
    return Objective(model, nn.BCEWithLogitsLoss(), [(x[:200], y[:200]), (x[200:], y[200:])])


def one(mean, variance, prior_variance=1.0):
    return posteriors.Gaussian(mean=[torch.full((1, 1), mean)], variance=[torch.full((1, 1), variance)],
                               prior_mean=[torch.zeros(1, 1)], prior_variance=prior_variance)


def test_laplace_precision_is_that_of_bayesian_linear_regression():
    """n H + 1/λ, of a design whose Gram matrix is diagonal: the posterior variances in closed form."""
    x = torch.cat([torch.eye(3) * 2, torch.eye(3)])
    model = nn.Linear(3, 1, bias=False)
    objective = Objective(model, lambda z, y: 0.5 * (z - y).square().mean(), (x, torch.randn(6, 1)))
    h = diagonal(Hessian(objective))
    q = posteriors.from_curvature(objective, h, 6, prior_variance=0.5)
    assert torch.allclose(q.variance[0], (1 / ((x.T @ x).diagonal() + 1 / 0.5)))
    assert torch.equal(q.mean[0], model.weight.detach()) and q.price == 0


def test_variance_of_the_posterior_minimises_the_linearised_bound():
    """E_Q L + KL / (βn) of the quadratic loss, over s: any other variance is worse."""
    objective, _ = regression()
    h, beta, n = diagonal(Hessian(objective), rtol=1e-9).values[0], 0.7, 40
    q = posteriors.from_curvature(objective, [h], n, prior_variance=0.3, beta=beta)

    def cost(s):
        return 0.5 * (s * h).sum() + pac_bayes.gaussian_kl(q.mean[0], s, 0.0, 0.3).value / (beta * n)

    best = cost(q.variance[0])
    for _ in range(20):
        assert best < cost(q.variance[0] * torch.exp(0.1 * torch.randn_like(h)))


def test_trace_is_spread_evenly():
    objective, _ = regression()
    q = posteriors.from_curvature(objective, 8.0, 40, prior_variance=0.3)
    assert torch.allclose(q.variance[0], torch.tensor(pac_bayes.isotropic_variance(8.0, 4, 40, 0.3)))


def test_prior_variance_is_the_best_of_the_grid_and_is_paid_for():
    objective, _ = regression()
    h = [torch.tensor([[3.0, 0.1, -1.0, 0.0]])]
    found = posteriors.from_curvature(objective, h, 40)
    every = {}
    for j in range(1, 2500, 3):
        at = posteriors.GRID[0] * math.exp(-j / posteriors.GRID[1])
        q = posteriors.from_curvature(objective, h, 40, prior_variance=at)
        every[j] = q.kl.value + math.log(math.pi**2 / 6) + 2 * math.log(j)
    assert found.kl.value + found.price == pytest.approx(min(every.values()), rel=1e-3)
    j = round(-posteriors.GRID[1] * math.log(found.prior_variance / posteriors.GRID[0]))
    assert found.price == pytest.approx(math.log(math.pi**2 / 6) + 2 * math.log(j))
    assert found.price == pytest.approx(-math.log(6 / (math.pi**2 * j**2)))     # δ_j = 6 δ / (π² j²), which sum to δ


def test_risk_equals_its_closed_form():
    """P(w > 0) · 0.1 + P(w < 0) · 0.9 for one weight."""
    objective = threshold()
    wrong = float(((objective.model.weight * torch.cat([x for x, _ in objective.data]) > 0)
                   != (torch.cat([y for _, y in objective.data]) > 0.5)).double().mean())
    q = one(0.5, 0.64)
    p = float(PHI(torch.tensor(0.5 / 0.8)))
    truth = p * wrong + (1 - p) * (1 - wrong)
    found = posteriors.risk(objective, q, draws=1000)
    assert abs(found.value - truth) < 4 * found.stderr and found.upper > found.value and found.samples == 300
    covered = sum(posteriors.risk(objective, q, draws=20, delta=0.1, seed=s).upper >= truth for s in range(80)) / 80
    assert covered >= 0.9


def test_certificates_hold_at_their_rate_and_say_something():
    """40 data sets with 10 % of labels wrong; the risk of Q is known. Everything random is in play."""
    q = one(1.0, 0.3)
    p = float(PHI(torch.tensor(1 / math.sqrt(0.3))))
    risk = p * 0.1 + (1 - p) * 0.9
    found = [posteriors.certify(threshold(seed=s), q, delta=0.1, monte_carlo_delta=0.02, draws=60, seed=s)
             for s in range(40)]
    assert sum(float(f) < risk for f in found) <= 4
    assert float(posteriors.certify(threshold(), q, draws=1000)) < risk + 0.15
    assert found[0].n == 300 and found[0].delta == 0.1 and not found[0].vacuous


def test_certificate_is_the_bound_of_its_parts():
    q = posteriors.from_curvature(threshold(), 2.0, 300)
    found = posteriors.certify(threshold(), q, delta=0.05, monte_carlo_delta=0.02, draws=50)
    by_hand = pac_bayes.kl_inverse(found.risk.upper, (q.kl.value + q.price + math.log(2 * math.sqrt(300) / 0.03)) / 300)
    assert float(found) == pytest.approx(by_hand.value) and found.risk.delta == 0.02


def test_price_raises_the_bound():
    free = one(1.0, 0.3)
    paid = posteriors.Gaussian(**{**vars(free), "price": 10.0})
    assert float(posteriors.certify(threshold(), paid, draws=50)) > float(posteriors.certify(threshold(), free,
                                                                                             draws=50))


def blobs(seed=0, n=200):
    g = torch.Generator().manual_seed(seed)
    y = (torch.rand(n, generator=g) < 0.5).double()
    x = torch.randn(n, 6, generator=g) + 2 * (2 * y[:, None] - 1) * torch.tensor([1.0, 0.5, 0, 0, 0, 0])
    return x, y[:, None]


def test_optimised_posterior_has_a_smaller_bound():
    """Than its own start and than the Laplace posterior, with a prior at the initialization."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1))
    data = list(zip(*(t.split(50) for t in blobs()), strict=True))
    objective = Objective(model, nn.BCEWithLogitsLoss(), data)
    prior = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(100):
        optimizer.zero_grad()
        model_loss = objective.loss_fn(model(blobs()[0]), blobs()[1])
        model_loss.backward()
        optimizer.step()
    laplace = posteriors.from_curvature(objective, diagonal(Hessian(objective), rtol=0.2), 200, prior_mean=prior)
    before = [p.detach().clone() for p in model.parameters()]
    q = posteriors.optimized(objective, 200, prior_mean=prior, steps=400, lr=3e-3)
    assert all(map(torch.equal, before, model.parameters()))
    found = [float(posteriors.certify(objective, p, draws=200)) for p in (laplace, q)]
    assert found[1] < found[0] - 0.02 and found[1] < 0.5
    again = posteriors.optimized(objective, 200, prior_mean=prior, steps=20, lr=3e-3)
    twin = posteriors.optimized(objective, 200, prior_mean=prior, steps=20, lr=3e-3)
    assert all(map(torch.equal, again.mean + again.variance, twin.mean + twin.variance))


def test_gradient_of_the_inverse():
    for q, c in ((0.02, 0.3), (0.3, 0.1), (0.5, 0.5)):
        of_q, of_c = posteriors._slopes(q, c)
        h = 1e-6
        along_q, along_c = [[float(pac_bayes.kl_inverse(q + a * side * h, c + (1 - a) * side * h)) for side in (1, -1)]
                            for a in (1, 0)]
        assert of_q == pytest.approx((along_q[0] - along_q[1]) / (2 * h), rel=1e-5)
        assert of_c == pytest.approx((along_c[0] - along_c[1]) / (2 * h), rel=1e-5)


def test_optimised_variance_without_data_terms_is_the_prior():
    """A loss that the weights do not change: all that is left is KL, so that Q becomes P."""
    model = nn.Linear(2, 1, bias=False)
    flat = Objective(model, lambda z, y: 0.3 + 0 * z.sum(), (torch.eye(2), torch.zeros(2, 1)))
    q = posteriors.optimized(flat, 100, prior_mean=0.0, steps=1500, lr=1e-2)
    assert q.kl.value < 1e-3


@pytest.mark.parametrize("cls", [NoisyNet, TiedNet])
@pytest.mark.parametrize("fails", [False, True])
def test_weights_buffers_and_random_state_are_given_back(cls, fails):
    model = build(cls).double()
    x, y = torch.randn(12, 6), torch.randint(3, (12,))
    calls = 0

    def loss(z, y):
        nonlocal calls
        calls += 1
        if fails and calls > 3:
            raise RuntimeError("half-way")
        return nn.functional.cross_entropy(z, y)

    def error(outputs, batch):
        loss(outputs, batch[1])
        return (outputs.argmax(-1) != batch[1]).double()

    objective = Objective(model, loss, [(x[:7], y[:7]), (x[7:], y[7:])])
    before, state = [t.clone() for t in model.state_dict().values()], torch.get_rng_state()
    q = posteriors.from_curvature(objective, 1.0, 12, prior_variance=0.1)
    for job in (lambda: posteriors.risk(objective, q, draws=3, error=error),
                lambda: posteriors.optimized(objective, 12, prior_mean=0.0, steps=5)):
        calls = 0
        if fails:
            with pytest.raises(RuntimeError, match="half-way"):
                job()
        else:
            job()
        assert all(map(torch.equal, before, model.state_dict().values()))
        assert all(p.grad is None for p in model.parameters())
    assert torch.equal(state, torch.get_rng_state())


def test_zero_one_loss_of_classes_logits_and_sequences():
    z = torch.tensor([[2.0, 1.0], [0.0, 1.0]])
    assert posteriors.zero_one(z, (None, torch.tensor([0, 0]))).tolist() == [0, 1]
    assert posteriors.zero_one(torch.tensor([[1.0], [-1.0]]), (None, torch.tensor([[1.0], [1.0]]))).tolist() == [0, 1]
    sequences = z.expand(1, 2, 2), torch.tensor([[0, 0]])
    assert posteriors.zero_one(sequences[0], (None, sequences[1])).tolist() == [0.5]
    assert posteriors.zero_one(sequences[0], (None, torch.tensor([[0, -100]]))).tolist() == [0]
    with pytest.raises(ValueError, match="pass error="):
        posteriors.zero_one(z, {"labels": torch.tensor([0, 0])})


@pytest.mark.parametrize("call, message", [
    (lambda o: posteriors.risk(o, one(1.0, 0.1), error=lambda z, b: 2 * torch.ones(len(z))), r"one loss in \[0, 1\]"),
    (lambda o: posteriors.risk(o, one(1.0, 0.1), error=lambda z, b: z.mean()), r"one loss in \[0, 1\]"),
    (lambda o: posteriors.risk(o, one(1.0, 0.1), draws=0), "draws"),
    (lambda o: posteriors.risk(o, one(1.0, 0.1), delta=0.0), r"\(0, 1\)"),
    (lambda o: posteriors.certify(o, one(1.0, 0.1), monte_carlo_delta=0.05), "a part of delta"),
    (lambda o: posteriors.from_curvature(o, [torch.ones(3)], 10), "one tensor for each parameter"),
    (lambda o: posteriors.from_curvature(o, 1.0, 10, prior_mean=[torch.ones(3)]), "prior_mean must hold"),
    (lambda o: posteriors.from_curvature(o, 1.0, 10, prior_variance=0.0), "must be positive"),
    (lambda o: posteriors.optimized(o, 10, prior_mean=0.0, delta=1.0), r"\(0, 1\)"),
    (lambda o: posteriors.risk(o, posteriors.Gaussian(mean=[], variance=[], prior_mean=[], prior_variance=1.0)),
     "other parameters"),
])
def test_errors_say_what_is_needed(call, message):
    with pytest.raises(ValueError, match=message):
        call(threshold())
