"""The drop-in ``SAM(params, base_optimizer, ...)``: the call of the most used SAM class, unchanged, as a full
``torch.optim.Optimizer``.

The laws run ``Sharpener.backward``, where the library runs both passes; here the caller does, or a closure, and the
façade must stand between them. Every test names a way in which existing classes fail: steps that crash or silently
train with a stale gradient, state that is lost, schedulers that warn, hooks that fire twice, copies that break.
"""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

import oracles
import problems
from flatmin import SAM
from problems import BASES, assert_same, batch, build, flat, loss_fn, relative
from rows import whole

SGD, ADAMW = torch.optim.SGD, torch.optim.AdamW
BASE = {"sgd": (SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3}),
        "adamw": (ADAMW, {"lr": 0.01, "weight_decay": 0.02})}
STYLES = ("two steps", "closure")


def make(model, base="sgd", **kw):
    cls, options = BASE[base]
    return SAM(model.parameters(), cls, **{"rho": 0.1, **options, **kw})


def closure_of(optimizer, model, x, y, clears=True):
    def closure():
        if clears:
            optimizer.zero_grad()
        loss = loss_fn(model(x), y)
        loss.backward()
        return loss
    return closure


def one_step(style, optimizer, model, t):
    x, y = batch(t)
    if style == "closure":
        return optimizer.step(closure_of(optimizer, model, x, y))
    loss = loss_fn(model(x), y)
    loss.backward()
    optimizer.first_step(zero_grad=True)
    loss_fn(model(x), y).backward()
    optimizer.second_step(zero_grad=True)
    return loss.detach()


def train(style, optimizer, model, first=0, last=10):
    for t in range(first, last):
        one_step(style, optimizer, model, t)
    return flat(model)


def twin(model, rule, base="sgd", steps=10, **settings):
    return oracles.train(model, BASES[base], rule, [whole(*batch(t)) for t in range(steps)], **settings)


# --- what a step does ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("base", BASE)
@pytest.mark.parametrize("adaptive", [False, True])
def test_twenty_steps_equal_the_slow_twin(style, base, adaptive):
    """``adaptive=True`` is that class's |w| on every tensor, without eta."""
    model = build()
    rule = oracles.facade_adaptive if adaptive else oracles.sam
    expected, _ = twin(model, rule, base, 20, rho=0.1)
    optimizer = make(model, base, adaptive=adaptive)
    assert relative(train(style, optimizer, model, 0, 20), expected[-1]) < 1e-12


def test_positional_rho_and_adaptive_as_in_that_class():
    model, other = build(), build()
    a = SAM(model.parameters(), SGD, 0.1, True, lr=0.05)
    b = SAM(other.parameters(), SGD, rho=0.1, adaptive=True, lr=0.05)
    assert_same(train("closure", a, model), train("closure", b, other))


def test_a_frozen_copy_of_that_class_gives_the_same_weights():
    """The formula as its users know it, in ten lines: e = (|p|² if adaptive) g · rho/(‖(|p|) g‖ + 1e-12)."""
    class Familiar:
        def __init__(self, params, rho, adaptive, **kw):
            self.params, self.rho, self.adaptive = list(params), rho, adaptive
            self.base = SGD(self.params, **kw)

        @torch.no_grad()
        def first_step(self):
            norm = torch.stack([((p.abs() if self.adaptive else 1.0) * p.grad).norm() for p in self.params]).norm()
            self.old = [p.clone() for p in self.params]
            for p in self.params:
                p.add_((p.pow(2) if self.adaptive else 1.0) * p.grad * self.rho / (norm + 1e-12))
            self.base.zero_grad()

        @torch.no_grad()
        def second_step(self):
            for p, old in zip(self.params, self.old, strict=True):
                p.copy_(old)
            self.base.step()
            self.base.zero_grad()

    for adaptive in (False, True):
        model, other = build(), build()
        familiar = Familiar(other.parameters(), 0.1, adaptive, lr=0.05, momentum=0.9)
        ours = SAM(model.parameters(), SGD, rho=0.1, adaptive=adaptive, lr=0.05, momentum=0.9)
        for t in range(10):
            one_step("two steps", ours, model, t)
            one_step("two steps", _With(familiar), other, t)
        assert relative(flat(model), flat(other)) < 1e-10


class _With:
    """The same ``zero_grad`` arguments on the familiar class."""

    def __init__(self, familiar):
        self.familiar = familiar

    def first_step(self, zero_grad):
        self.familiar.first_step()

    def second_step(self, zero_grad):
        self.familiar.second_step()


@pytest.mark.parametrize("style", STYLES)
def test_rho_zero_is_the_base_optimizer_bit_for_bit(style):
    for base in BASE:
        model, plain = build(), build()
        train(style, make(model, base, rho=0.0), model)
        optimizer = BASES[base](plain.parameters())
        for t in range(10):
            optimizer.zero_grad()
            loss_fn(plain(batch(t)[0]), batch(t)[1]).backward()
            optimizer.step()
        assert_same(flat(model), flat(plain), base)


def test_step_returns_the_loss_at_w_and_calls_the_closure_twice():
    model = build()
    optimizer = make(model)
    x, y = batch(0)
    at_w = float(loss_fn(model(x), y).detach())
    calls = []
    inner = closure_of(optimizer, model, x, y)

    def closure():
        calls.append(1)
        return inner()

    assert float(optimizer.step(closure)) == pytest.approx(at_w, rel=1e-15)
    assert len(calls) == 2


def test_gradients_are_cleared_before_each_call_of_the_closure():
    """torch's convention has the closure clear; a closure that forgets must not add the two passes up."""
    results = []
    for clears in (True, False):
        model = build()
        optimizer = make(model)
        for t in range(4):
            optimizer.step(closure_of(optimizer, model, *batch(t), clears=clears))
        results.append(flat(model))
    assert_same(*results)


def test_the_closure_runs_with_gradients_on_even_under_no_grad():
    model = build()
    optimizer = make(model)
    with torch.no_grad():
        optimizer.step(closure_of(optimizer, model, *batch(0)))
    other = build()
    train("closure", make(other), other, 0, 1)
    assert_same(flat(model), flat(other))


def test_step_without_a_closure_says_what_to_do():
    model = build()
    optimizer = make(model)
    loss_fn(model(batch(0)[0]), batch(0)[1]).backward()
    before = flat(model)
    with pytest.raises((RuntimeError, ValueError, TypeError), match="(?is)closure.*first_step|first_step.*closure"):
        optimizer.step()
    assert_same(flat(model), before)


def test_a_module_may_stand_for_the_parameters():
    """Then batch statistics move once a step and both passes see the same dropout mask; with step(closure)."""
    model, plain = build(problems.NoisyNet), build(problems.NoisyNet)
    optimizer = SAM(model, SGD, rho=0.2, lr=0.0)
    masks = []
    model.drop.register_forward_hook(lambda m, i, o: masks.append((o == 0).detach()))
    for t in range(3):
        torch.manual_seed(t)
        optimizer.step(closure_of(optimizer, model, *batch(t)))
        ours = torch.get_rng_state()
        torch.manual_seed(t)
        loss_fn(plain(batch(t)[0]), batch(t)[1]).backward()
        assert_same(ours, torch.get_rng_state(), "random state")
        assert torch.equal(masks[-1], masks[-2])
    for (name, a), b in zip(model.named_buffers(), plain.buffers(), strict=True):
        assert_same(a, b, name)


def test_with_bare_parameters_and_rho_zero_nothing_is_replayed():
    """The documented exception: with first_step/second_step the caller runs the passes, so two masks are drawn."""
    model = build(problems.NoisyNet)
    optimizer = SAM(model.parameters(), SGD, rho=0.1, lr=0.0)
    masks = []
    model.drop.register_forward_hook(lambda m, i, o: masks.append((o == 0).detach()))
    one_step("two steps", optimizer, model, 0)
    assert not torch.equal(*masks)


@pytest.mark.parametrize("style", STYLES)
def test_groups_with_their_own_rho_and_lr(style):
    """rho is a per-group option like lr; the norm is over all groups together."""
    model = build()
    head = list(model.head.parameters())
    body = [p for p in model.parameters() if all(p is not q for q in head)]
    optimizer = SAM([{"params": body}, {"params": head, "rho": 0.3, "lr": 0.02}], SGD, rho=0.1, lr=0.05, momentum=0.9,
                    weight_decay=1e-3)

    def same(params):  # the twin's copy has the same order
        params = list(params)
        return SGD([{"params": params[:-2]}, {"params": params[-2:], "lr": 0.02}], lr=0.05, momentum=0.9,
                   weight_decay=1e-3)

    assert [p is q for p, q in zip(list(model.parameters())[-2:], head, strict=True)] == [True, True]
    expected, _ = oracles.train(model, same, oracles.grouped_sam, [whole(*batch(t)) for t in range(6)], rho=0.1,
                                rhos={"head.weight": 0.3, "head.bias": 0.3})
    assert relative(train(style, optimizer, model, 0, 6), expected[-1]) < 1e-12


@pytest.mark.parametrize("rho", [-1.0, float("nan")])
def test_an_impossible_radius_is_refused(rho):
    with pytest.raises(ValueError, match="rho"):
        make(build(), rho=rho)


def test_an_instance_instead_of_a_class_is_refused_by_name():
    model = build()
    with pytest.raises((TypeError, ValueError), match="(?i)class|instance|callable"):
        SAM(model.parameters(), SGD(model.parameters(), lr=0.1), rho=0.1)


# --- restoring -------------------------------------------------------------------------------------------------------

class Stop(Exception):
    pass


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
def test_an_exception_in_the_closures_second_call_gives_the_weights_back(error):
    model = build()
    optimizer = make(model)
    train("closure", optimizer, model, 0, 2)
    before, calls = flat(model), []

    def closure():
        calls.append(1)
        loss = loss_fn(model(batch(0)[0]), batch(0)[1])
        loss.backward()
        if len(calls) == 2:
            raise error
        return loss

    with pytest.raises(error):
        optimizer.step(closure)
    assert len(calls) == 2
    assert_same(flat(model), before)
    optimizer.state_dict()  # and it is not believed to be between two steps
    train("closure", optimizer, model, 2, 4)


@pytest.mark.parametrize("schedule", ["ab", "ba"])
@pytest.mark.parametrize("style", STYLES)
def test_a_gradient_in_only_one_of_the_passes(style, schedule):
    """At lr 0 every weight is bitwise where it was; existing classes leave it at w + eps, or raise KeyError."""
    model = build(problems.FickleNet, schedule=schedule)
    optimizer = SAM(model.parameters(), SGD, rho=0.5, lr=0.0)
    before = flat(model)
    for t in range(3):
        one_step(style, optimizer, model, t)
        assert_same(flat(model), before)


def test_first_step_moves_by_rho_and_second_step_comes_back_bitwise():
    model = build()
    optimizer = SAM(model.parameters(), SGD, rho=0.1, lr=0.0)
    before, addresses = flat(model), [p.data_ptr() for p in model.parameters()]
    loss_fn(model(batch(0)[0]), batch(0)[1]).backward()
    optimizer.first_step(zero_grad=True)
    assert (flat(model) - before).norm().item() == pytest.approx(0.1, rel=1e-12)
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    loss_fn(model(batch(0)[0]), batch(0)[1]).backward()
    optimizer.second_step()
    assert_same(flat(model), before)
    assert [p.data_ptr() for p in model.parameters()] == addresses
    assert any(p.grad is not None and p.grad.any() for p in model.parameters()), "zero_grad is off by default"


def test_two_first_steps_in_a_row_are_refused_or_safe():
    """The misuse by micro-batch: whatever happens, the weights find their way back."""
    model = build()
    optimizer = SAM(model.parameters(), SGD, rho=0.1, lr=0.0)
    before = flat(model)
    x, y = batch(0)
    loss_fn(model(x), y).backward()
    optimizer.first_step(zero_grad=True)
    loss_fn(model(x), y).backward()
    try:
        optimizer.first_step(zero_grad=True)
    except RuntimeError as error:
        assert "second_step" in str(error)
    loss_fn(model(x), y).backward()
    optimizer.second_step(zero_grad=True)
    assert_same(flat(model), before)


def test_second_step_without_first_step_is_refused_or_plain():
    model = build()
    optimizer = make(model)
    before = flat(model)
    loss_fn(model(batch(0)[0]), batch(0)[1]).backward()
    try:
        optimizer.second_step()
    except RuntimeError as error:
        assert "first_step" in str(error)
        assert_same(flat(model), before)
    else:
        plain = build()
        loss_fn(plain(batch(0)[0]), batch(0)[1]).backward()
        BASES["sgd"](plain.parameters()).step()
        assert_same(flat(model), flat(plain))


def test_a_zero_gradient_takes_the_base_step():
    """No perturbation, no NaN; weight decay still applies."""
    model, plain = build(), build()
    optimizer = make(model)

    def closure():
        loss = 0.0 * model(batch(0)[0]).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    (0.0 * plain(batch(0)[0]).sum()).backward()
    BASES["sgd"](plain.parameters()).step()
    assert_same(flat(model), flat(plain))


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("which", [1, 2])
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_an_overflow_in_either_pass_leaves_the_weights_alone(style, which, bad):
    model = build()
    optimizer = make(model)
    train(style, optimizer, model, 0, 2)
    before, calls = flat(model), []
    state = copy.deepcopy(optimizer.state_dict()["state"])

    def loss():
        calls.append(1)
        return loss_fn(model(batch(0)[0]), batch(0)[1]) * (bad if len(calls) == which else 1.0)

    if style == "closure":
        def closure():
            value = loss()
            value.backward()
            return value
        optimizer.step(closure)
    else:
        loss().backward()
        optimizer.first_step(zero_grad=True)
        loss().backward()
        optimizer.second_step(zero_grad=True)
    assert_same(flat(model), before)
    for i, slot in optimizer.state_dict()["state"].items():
        for key, value in slot.items():
            if torch.is_tensor(value):
                assert_same(value, state[i][key], key)
    train(style, optimizer, model, 2, 4)
    assert flat(model).isfinite().all() and not torch.equal(flat(model), before)


# --- a full optimizer ------------------------------------------------------------------------------------------------

def test_it_is_an_optimizer():
    model = build()
    optimizer = make(model)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert isinstance(repr(optimizer), str) and optimizer.param_groups[0]["lr"] == 0.05
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_its_groups_are_the_base_optimizers_groups():
    """A scheduler that writes lr into ours must reach the one that steps, also after a reload."""
    model = build()
    optimizer = make(model)
    for _ in range(2):
        optimizer.param_groups[0]["lr"] = 0.0
        before = flat(model)
        train("closure", optimizer, model, 0, 2)
        if BASE["sgd"][1]["weight_decay"]:
            assert_same(flat(model), before, "lr 0 did not reach the base optimizer")
        optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("style", STYLES)
def test_rho_in_the_groups_may_be_scheduled(style):
    model, plain = build(), build()
    optimizer = make(model)
    assert optimizer.param_groups[0]["rho"] == 0.1
    optimizer.param_groups[0]["rho"] = 0.0
    train(style, optimizer, model, 0, 3)
    base = BASES["sgd"](plain.parameters())
    for t in range(3):
        base.zero_grad()
        loss_fn(plain(batch(t)[0]), batch(t)[1]).backward()
        base.step()
    assert_same(flat(model), flat(plain))


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("base", BASE)
def test_resumes_bitwise_from_its_state_dict(style, base, tmp_path):
    model = build()
    optimizer = make(model, base)
    train(style, optimizer, model, 0, 5)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint.pt")
    expected = train(style, optimizer, model, 5, 10)
    other = build(seed=1)
    resumed = make(other, base)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    assert_same(train(style, resumed, other, 5, 10), expected)


@pytest.mark.parametrize("base", BASE)
def test_its_state_is_that_of_a_plain_base_optimizer_both_ways(base):
    """Start with SAM and finish plain, or the other way round: momenta carry over, bit for bit."""
    model = build()
    optimizer = make(model, base)
    train("closure", optimizer, model, 0, 4)
    state = optimizer.state_dict()
    plain_model = build()
    plain = BASES[base](plain_model.parameters())
    loss_fn(plain_model(batch(0)[0]), batch(0)[1]).backward()
    plain.step()
    reference = plain.state_dict()
    assert set(state) == set(reference) == {"state", "param_groups"}
    assert {i: set(slot) for i, slot in state["state"].items()} == {i: set(s) for i, s in reference["state"].items()}
    # forward: SAM -> plain
    plain_model.load_state_dict(model.state_dict())
    plain.load_state_dict(copy.deepcopy(state))
    for i, slot in plain.state_dict()["state"].items():
        for key, value in slot.items():
            if torch.is_tensor(value):
                assert_same(value, state["state"][i][key], key)
    # both go on plainly (rho 0 is the base) and stay equal
    optimizer.param_groups[0]["rho"] = 0.0
    train("closure", optimizer, model, 4, 8)
    for t in range(4, 8):
        plain.zero_grad()
        loss_fn(plain_model(batch(t)[0]), batch(t)[1]).backward()
        plain.step()
    assert_same(flat(plain_model), flat(model))
    # back: plain -> SAM, which keeps the rho it was built with
    fresh_model = build()
    fresh_model.load_state_dict(plain_model.state_dict())
    fresh = make(fresh_model, base)
    fresh.load_state_dict(copy.deepcopy(plain.state_dict()))
    assert fresh.param_groups[0]["rho"] == 0.1
    optimizer.param_groups[0]["rho"] = 0.1
    assert_same(train("closure", fresh, fresh_model, 8, 12), train("closure", optimizer, model, 8, 12))


@pytest.mark.parametrize("how", ["state_dict", "pickle", "deepcopy"])
def test_a_save_between_the_two_steps_is_refused(how):
    from flatmin.errors import PerturbedStateError

    model = build()
    optimizer = make(model)
    before = flat(model)
    loss_fn(model(batch(0)[0]), batch(0)[1]).backward()
    optimizer.first_step(zero_grad=True)
    act = {"state_dict": optimizer.state_dict, "pickle": lambda: pickle.dumps(optimizer),
           "deepcopy": lambda: copy.deepcopy(optimizer)}[how]
    with pytest.raises(PerturbedStateError, match="second_step"):
        act()
    assert not torch.equal(flat(model), before)
    loss_fn(model(batch(0)[0]), batch(0)[1]).backward()
    optimizer.second_step(zero_grad=True)
    optimizer.state_dict()


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_train_on_independently_and_bitwise(style, how):
    model = build()
    optimizer = make(model)
    train(style, optimizer, model, 0, 3)
    pair = (model, optimizer)
    twin_model, twin_optimizer = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    at_copy = flat(model)
    copied = train(style, twin_optimizer, twin_model, 3, 6)
    assert_same(flat(model), at_copy, "training the copy moved the original")
    assert_same(train(style, optimizer, model, 3, 6), copied)


@pytest.mark.parametrize("style", STYLES)
def test_add_param_group(style):
    """Progressive unfreezing: the new group is perturbed and stepped, with the defaults or its own options."""
    model = build()
    head = list(model.head.parameters())
    body = list(model.parameters())[:-2]
    optimizer = SAM(body, SGD, rho=0.1, lr=0.05, momentum=0.9, weight_decay=1e-3)
    optimizer.add_param_group({"params": head})
    assert optimizer.param_groups[1]["rho"] == 0.1 and optimizer.param_groups[1]["momentum"] == 0.9
    expected, _ = twin(model, oracles.sam, rho=0.1, steps=5)
    assert relative(train(style, optimizer, model, 0, 5), expected[-1]) < 1e-12
    optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("style", STYLES)
def test_schedulers_do_not_warn_and_reach_the_base(style):
    model = build()
    optimizer = make(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
        rates = []
        for t in range(3):
            one_step(style, optimizer, model, t)
            scheduler.step()
            rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.025, 0.0125, 0.00625])
    other = build()
    plain = make(other)
    for t in range(3):
        plain.param_groups[0]["lr"] = 0.05 * 0.5**t
        one_step(style, plain, other, t)
    assert_same(flat(model), flat(other))


@pytest.mark.parametrize("style", STYLES)
def test_hooks_fire_once_a_step(style):
    model = build()
    optimizer = make(model)
    fired = {"pre": 0, "post": 0}
    optimizer.register_step_pre_hook(lambda *_: fired.__setitem__("pre", fired["pre"] + 1))
    optimizer.register_step_post_hook(lambda *_: fired.__setitem__("post", fired["post"] + 1))
    train(style, optimizer, model, 0, 3)
    assert fired == {"pre": 3, "post": 3}


def test_state_dict_hooks_fire():
    model = build()
    optimizer = make(model)
    train("closure", optimizer, model, 0, 1)
    seen = []
    optimizer.register_state_dict_post_hook(lambda o, s: seen.append("save"))
    optimizer.register_load_state_dict_pre_hook(lambda o, s: seen.append("load"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["save", "load"]


def test_state_is_visible_like_the_bases():
    model = build()
    optimizer = make(model, "adamw")
    train("closure", optimizer, model, 0, 1)
    assert all("exp_avg" in optimizer.state[p] for p in model.parameters())


def test_a_checkpoint_holds_no_copy_of_the_weights():
    """Nothing but the base optimizer's own state: half the usual size of such checkpoints."""
    model = build()
    optimizer = make(model)
    train("two steps", optimizer, model, 0, 2)
    size = sum(v.numel() for slot in optimizer.state_dict()["state"].values() for v in slot.values()
               if torch.is_tensor(v))
    assert size == flat(model).numel()


def test_tied_and_frozen_weights():
    model = build(problems.TiedNet)
    expected, _ = twin(model, oracles.sam, rho=0.1, steps=5)
    optimizer = SAM([p for p in model.parameters() if p.requires_grad], SGD, rho=0.1, **BASE["sgd"][1])
    assert relative(train("closure", optimizer, model, 0, 5), expected[-1]) < 1e-12
    optimizer = SAM(model.parameters(), SGD, rho=0.1, **BASE["sgd"][1])
    frozen = model.frozen.weight.detach().clone()
    train("closure", optimizer, model, 0, 2)
    assert_same(model.frozen.weight.detach(), frozen)


@pytest.mark.parametrize("base", [torch.optim.Adam, torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.NAdam])
def test_any_base_optimizer(base):
    model = build()
    expected, _ = oracles.train(model, lambda p: base(p, lr=0.01), oracles.sam, [whole(*batch(t)) for t in range(4)],
                                rho=0.1)
    optimizer = SAM(model.parameters(), base, rho=0.1, lr=0.01)
    assert relative(train("two steps", optimizer, model, 0, 4), expected[-1]) < 1e-11


# --- trainers --------------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_lightning_automatic_optimization_gives_the_weights_of_a_loop_by_hand(tmp_path):
    import lightning
    from torch.utils.data import DataLoader, TensorDataset

    x, y = batch(0, 24)

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = build()

        def training_step(self, pair, index):
            return loss_fn(self.net(pair[0]), pair[1])

        def configure_optimizers(self):
            optimizer = make(self.net)
            return {"optimizer": optimizer,
                    "lr_scheduler": {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5),
                                     "interval": "epoch"}}

    module = Module()
    loader = DataLoader(TensorDataset(x, y), batch_size=8, shuffle=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = lightning.Trainer(max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False,
                                    enable_progress_bar=False, enable_model_summary=False, precision="64-true",
                                    default_root_dir=tmp_path)
        trainer.fit(module, loader)
    net = build()
    optimizer = make(net)
    for epoch in range(2):
        optimizer.param_groups[0]["lr"] = 0.05 * 0.5**epoch
        for a, b in zip(x.split(8), y.split(8), strict=True):
            optimizer.step(closure_of(optimizer, net, a, b))
    assert_same(flat(module.net), flat(net))


def test_a_scaler_never_trains_on_scaled_gradients_in_silence():
    """``scaler.step(opt, closure)``: no scaler supports closures. An update 65536 times too large must not happen."""
    model, other = (build(dtype=torch.float32) for _ in range(2))
    x, y = batch(0, dtype=torch.float32)
    optimizer = make(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)

    def closure():
        optimizer.zero_grad()
        loss = scaler.scale(loss_fn(model(x), y))
        loss.backward()
        return loss

    reference = make(other)
    reference.step(closure_of(reference, other, x, y))
    before = flat(model)
    moved = (flat(other) - before).norm()
    try:
        scaler.step(optimizer, closure)
    except (RuntimeError, ValueError, TypeError, AssertionError):
        assert_same(flat(model), before)
    else:
        assert (flat(model) - before).norm() < 10 * moved, "trained on gradients that were never unscaled"


def test_the_two_steps_work_with_a_scaler_as_documented():
    """eps is free of the scale; the second step's gradient is unscaled and clipped by the scaler and the user."""
    model, other = (build(dtype=torch.float32) for _ in range(2))
    assert isinstance(model, nn.Module)
    optimizer, reference = make(model), make(other)
    scale = 2.0**10
    for t in range(3):
        x, y = batch(t, dtype=torch.float32)
        (scale * loss_fn(model(x), y)).backward()
        optimizer.first_step(zero_grad=True)
        (scale * loss_fn(model(x), y)).backward()
        for p in model.parameters():
            p.grad.div_(scale)
        optimizer.second_step(zero_grad=True)
        for step in (reference.first_step, reference.second_step):
            loss_fn(other(x), y).backward()
            step(zero_grad=True)
    assert relative(flat(model), flat(other)) < 1e-5
