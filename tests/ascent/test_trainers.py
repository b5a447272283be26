"""The façade inside the real Lightning and the real Accelerate: accumulation, assigned groups, replaced weights."""

import warnings

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from flatmin import SAM
from problems import assert_same, batch, build, flat, loss_fn

SGD = torch.optim.SGD
OPTIONS = {"lr": 0.05, "momentum": 0.9}
pytestmark = pytest.mark.slow


def by_hand(net, optimizer, pairs):
    for x, y in pairs:
        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = loss_fn(net(x), y)
            loss.backward()
            return loss
        optimizer.step(closure)
    return flat(net)


def pairs_of(n, size=8):
    x, y = batch(0, n)
    return list(zip(x.split(size), y.split(size), strict=True))


@pytest.fixture
def fit(tmp_path):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self, make):
            super().__init__()
            self.net, self.make = build(), make

        def training_step(self, pair, index):
            return loss_fn(self.net(pair[0]), pair[1])

        def configure_optimizers(self):
            return self.make(self.net)

    def run(make, epochs=1, n=24, path=None, callbacks=(), **options):
        module = Module(make)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = lightning.Trainer(max_epochs=epochs, accelerator="cpu", logger=False,
                                        enable_checkpointing=False, enable_progress_bar=False, barebones=False,
                                        enable_model_summary=False, precision="64-true", default_root_dir=tmp_path,
                                        callbacks=list(callbacks), **options)
            trainer.fit(module, DataLoader(TensorDataset(*batch(0, n)), batch_size=8), ckpt_path=path)
        return module, trainer

    return run


def test_lightnings_accumulation_is_refused_by_name(fit):
    """Its closure back-propagates the last micro-batch alone; the others' gradients would be lost."""
    with pytest.raises(ValueError, match=r"flatmin\.Sharpener"):
        fit(lambda net: SAM(net.parameters(), SGD, rho=0.1, **OPTIONS), accumulate_grad_batches=2)


def test_lightnings_fine_tuning_resumes_with_the_groups_it_assigns(fit, tmp_path):
    from lightning.pytorch.callbacks import BaseFinetuning

    class Unfreeze(BaseFinetuning):
        def freeze_before_training(self, module):
            self.freeze(module.net.head)

        def finetune_function(self, module, epoch, optimizer):
            if epoch >= 1:
                self.make_trainable(module.net.head)
            if epoch == 1:
                optimizer.add_param_group({"params": list(module.net.head.parameters()), "rho": 0.3, "lr": 0.02})

    def make(net):
        return SAM([p for p in net.parameters() if p.requires_grad], SGD, rho=0.1, **OPTIONS)

    whole, _ = fit(make, epochs=4, callbacks=[Unfreeze()])
    _, trainer = fit(make, epochs=2, callbacks=[Unfreeze()])
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    resumed, trainer = fit(make, epochs=4, callbacks=[Unfreeze()], path=tmp_path / "two.ckpt")
    optimizer = trainer.optimizers[0]
    assert optimizer.param_groups is optimizer.base_optimizer.param_groups
    assert [g["rho"] for g in optimizer.param_groups] == [0.1, 0.3]
    assert_same(flat(resumed.net), flat(whole.net))


def accelerate(model, optimizer, **options):
    module = pytest.importorskip("accelerate")
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    accelerator = module.Accelerator(cpu=True, **options)
    return accelerator, *accelerator.prepare(model, optimizer)


def test_accelerates_loop_gives_the_weights_of_a_loop_by_hand():
    """Preparing reloads the state into the optimizer; then groups and state are assigned through its wrapper."""
    net, other = build(), build()
    accelerator, net, optimizer = accelerate(net, SAM(net.parameters(), SGD, rho=0.1, **OPTIONS))
    scheduler = accelerator.prepare(torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5))
    optimizer.param_groups = [{**g, "rho": 0.2} for g in optimizer.param_groups]
    optimizer.state = optimizer.state
    for x, y in pairs_of(24):
        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = loss_fn(net(x), y)
            accelerator.backward(loss)
            return loss
        optimizer.step(closure)
        scheduler.step()
    reference = SAM(other.parameters(), SGD, rho=0.2, **OPTIONS)
    for pair in pairs_of(24):
        by_hand(other, reference, [pair])
        reference.param_groups[0]["lr"] *= 0.5
    assert_same(flat(net), flat(other))


def test_accelerates_accumulation_is_refused_by_name():
    net = build()
    before = flat(net)
    accelerator, net, optimizer = accelerate(net, SAM(net.parameters(), SGD, rho=0.1, **OPTIONS),
                                             gradient_accumulation_steps=2)
    with pytest.raises(ValueError, match=r"flatmin\.Sharpener"):
        for x, y in pairs_of(16):
            with accelerator.accumulate(net):
                def closure(x=x, y=y):
                    loss = loss_fn(net(x), y)
                    accelerator.backward(loss)
                    return loss
                if accelerator.sync_gradients:
                    optimizer.step(closure)
                else:
                    closure()
    assert_same(flat(net), before)


def test_accelerate_switches_parameters_after_wrapping():
    """What it does under FSDP2 and TPU: ``_switch_parameters`` writes other tensors into the groups."""
    net, wrapped = build(), build()
    _, _, optimizer = accelerate(torch.nn.Linear(1, 1), SAM(net.parameters(), SGD, rho=0.1, **OPTIONS))
    optimizer._switch_parameters(dict(zip(net.parameters(), wrapped.parameters(), strict=True)))
    before, other = flat(net), build()
    expected = by_hand(other, SAM(other.parameters(), SGD, rho=0.1, **OPTIONS), pairs_of(24))
    assert_same(by_hand(wrapped, optimizer, pairs_of(24)), expected)
    assert_same(flat(net), before)
