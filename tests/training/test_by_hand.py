"""The loop against loops written by hand: bit for bit in one process, whatever is combined, and through a kill.

The plain loop is ``loss.backward()`` alone; the others call a preset's ``backward``, which has tests of its own.
"""

import contextlib
import itertools
import math

import pytest
import torch
from toys import Augmented, Regression, Scorer

from flatmin import presets
from flatmin.training.protocol import Place
from flatmin.training.run import Training
from flatmin.training.settings import TrainSettings
from flatmin.training.streams import step_seed

METHODS = ("base", "sam", "asam", "looksam", "esam", "gsam", "functional_sam", "preconditioned_functional_sam",
           "friendly_sam")
PRECISIONS = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
STEPS = 7


class TwoOptimizers(Augmented):
    """Weights and biases apart, so that a direction must look into both optimizers."""

    def optimizers(self, model):
        apart = {True: [], False: []}
        for p in model.parameters():
            apart[p.dim() > 1].append(p)
        return [torch.optim.AdamW(apart[True], lr=1e-2), torch.optim.AdamW(apart[False], lr=2e-2)]


class OneOptimizer(TwoOptimizers):
    """The same, as the two groups of one optimizer."""

    def optimizers(self, model):
        first, second = super().optimizers(model)
        return [torch.optim.AdamW([first.param_groups[0], second.param_groups[0]])]


def by_hand(recipe, method, precision="float32", accumulate=1, clip=None, steps=STEPS, seed=3):
    torch.manual_seed(seed)
    model = recipe.model()
    optimizers = recipe.optimizers(model)
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(o, steps) for o in optimizers]
    dtype = PRECISIONS[precision]
    scaler = torch.amp.GradScaler("cpu", enabled=precision == "fp16")
    context = contextlib.nullcontext() if dtype is None else torch.autocast("cpu", dtype)
    options = {"rho": 0.1, "scaler": scaler if precision == "fp16" else None}
    if method != "base":
        reads = {"optimizer": optimizers[0]} if "preconditioned" in method else {}
        sharpener = getattr(presets, method)(model, **options, **reads)
    stream = recipe.train_batches(Place(seed))
    for step, micro in enumerate(steps_of(stream, accumulate, steps)):
        generator = torch.Generator().manual_seed(step_seed(seed, step, 0, 1))
        micro = [recipe.prepare(batch, generator) if hasattr(recipe, "prepare") else batch for batch in micro]
        total = sum(recipe.weight(batch) for batch in micro)
        torch.manual_seed(step_seed(seed, step, 0))
        for optimizer in optimizers:
            optimizer.zero_grad()

        def forward(batch, *samples):
            with context:
                return recipe.forward(model, [t[samples[0]] for t in batch] if samples else batch)

        def loss(outputs, batch, *samples):
            with context:
                if samples:
                    return recipe.losses(outputs, [t[samples[0]] for t in batch])
                return recipe.loss(outputs, batch)

        if method == "base":
            for batch in micro:
                scaler.scale(loss(forward(batch), batch) * (recipe.weight(batch) / total)).backward()
        else:
            sharpener.backward(forward, loss, batches=micro, weights=[recipe.weight(b) / total for b in micro])
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            scaler.step(optimizer)
            scheduler.step()
        scaler.update()
    return model.state_dict()


def steps_of(stream, accumulate, steps):
    """Micro-batches step by step; no step goes over the end of an epoch."""
    done = 0
    while done < steps:
        epoch = iter(stream)
        while done < steps and (micro := list(itertools.islice(epoch, accumulate))):
            yield micro
            done += 1


def loop(recipe, folder=None, tick=lambda done: None, **options):
    options = {"steps": STEPS, "seed": 3, "rho": 0.1, "evaluate_every": 2, "log_every": 3} | options
    return Training(recipe, TrainSettings(**options), Place(options["seed"]), folder, tick)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("accumulate", (1, 3))
@pytest.mark.parametrize("method", METHODS)
def test_the_loop_is_the_one_written_by_hand(method, accumulate, precision, tmp_path):
    """With dropout, BatchNorm, augmentation and clipping; and once more through an interruption after step 5."""
    recipe = OneOptimizer() if "preconditioned" in method else Augmented()
    options = {"method": method, "accumulate": accumulate, "precision": precision, "clip": 0.5}
    expected = by_hand(recipe, method, precision, accumulate, 0.5)
    whole = loop(recipe, **options)
    whole.run()
    assert same(whole.inner.state_dict(), expected)

    def stop(done):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop(recipe, tmp_path, stop, save_every=3, **options).run()
    resumed = loop(recipe, tmp_path, save_every=3, **options)
    assert resumed.done == 3
    resumed.run()
    assert same(resumed.inner.state_dict(), expected)


@pytest.mark.parametrize("method", ("base", "sam", "functional_sam"))
def test_checkpointed_blocks_give_the_same(method):
    recipe = Augmented()
    recomputed = loop(recipe, method=method, checkpointing=True)
    recomputed.run()
    assert same(recomputed.inner.state_dict(), by_hand(recipe, method))
    with pytest.raises(ValueError, match="--checkpointing: .*blocks"):
        loop(Scorer(), checkpointing=True)


@pytest.mark.slow
def test_a_compiled_model_is_the_same_to_rounding():
    recipe = Regression()       # torch.compile draws other dropout masks
    compiled = loop(recipe, method="sam", compile=True, accumulate=2, steps=3)
    compiled.run()
    expected = by_hand(recipe, "sam", accumulate=2, steps=3)
    for name, value in compiled.inner.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ("preconditioned_sam", "preconditioned_functional_sam", "momentum_sam"))
def test_several_optimizers_are_read_like_the_groups_of_one(method):
    ends = [loop(recipe, method=method, log_every=1) for recipe in (TwoOptimizers(), OneOptimizer())]
    for training in ends:
        training.run()
    assert same(*(training.inner.state_dict() for training in ends))
    assert ends[0].trained.steps[-1]["radius"] == pytest.approx(0.1, rel=1e-4)


@pytest.mark.parametrize("bad", (0, 1))
@pytest.mark.parametrize("clip", (None, 1.0))
def test_an_overflow_skips_every_optimizer(bad, clip):
    """Under fp16, where an inf is in the gradient of one optimizer's parameters alone."""
    class Overflows(TwoOptimizers):
        def loss(self, outputs, batch):
            value = super().loss(outputs, batch)
            self.seen.append(1)
            if len(self.seen) == 4:
                p = [p for p in self.made[0].parameters() if (p.dim() > 1) == (bad == 0)][0]
                value = value + (p * 1e30).sum() * 1e30
            return value

        def model(self):
            model = super().model()
            self.made.append(model)
            return model

    Overflows.seen, Overflows.made, states = [], [], []
    training = loop(Overflows(), method="base", precision="fp16", clip=clip, steps=5,
                    tick=lambda done: states.append([p.detach().clone() for p in Overflows.made[0].parameters()]))
    training.run()
    flat = [torch.cat([p.flatten() for p in state]) for state in states]
    assert [torch.equal(a, b) for a, b in itertools.pairwise(flat)] == [False, False, True, False]


def test_a_fork_follows_its_own_schedule_and_options(tmp_path):
    """The learning rate and the schedule of a fork are its own, not those that the checkpoint was written with."""
    loop(Augmented(), tmp_path, steps=6, keep_every=3).run()
    start = str(tmp_path / "checkpoints" / "step-00000003")

    class Slower(Augmented):
        def optimizers(self, model):
            return [torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.8)]

    fork = loop(Slower(), steps=12, start=start, log_every=1)
    assert fork.done == 3 and fork.optimizers[0].param_groups[0]["momentum"] == 0.8
    fork.run()
    rates = {row["step"]: row["lr"] for row in fork.trained.steps if row["step"] > 3}
    assert rates == {t: pytest.approx(0.005 * (1 + math.cos(math.pi * t / 12))) for t in range(4, 12)}
    with pytest.raises(ValueError, match="stands at step 3, and this run has 3 steps"):
        loop(Slower(), steps=3, start=start)
    with pytest.raises(ValueError, match="its optimizers are"):
        loop(TwoOptimizers(), steps=12, start=start)


def test_a_fork_counts_steps_from_the_whole_run(tmp_path):
    """A schedule of rho, and a cadence, see the number of the step in the run, not in the fork."""
    loop(Augmented(), tmp_path, steps=4).run()
    fork = loop(Augmented(), steps=12, method="sam", late=0.5, start=str(tmp_path), log_every=1)
    fork.run()
    radii = {row["step"]: row["radius"] for row in fork.trained.steps if row["step"] >= 4}
    assert [step for step, radius in radii.items() if radius > 0] == list(range(6, 12))


def test_another_run_is_refused(tmp_path):
    loop(Augmented(), tmp_path, method="sam", save_every=3).run()
    for change, message in (({"rho": 0.2}, "rho was 0.1 there and is 0.2 here"), ({"seed": 4}, "seed was 3"),
                            ({"steps": 9}, "steps was 7"), ({"accumulate": 2}, "accumulate was 1")):
        with pytest.raises(Exception, match=f"belongs to another run: {message}"):
            loop(Augmented(), tmp_path, **{"method": "sam", "save_every": 3} | change)
    with pytest.raises(Exception, match="recipe was Augmented.*epochs=3.*epochs=4"):
        loop(Augmented(epochs=4), tmp_path, method="sam")
    loop(Augmented(), tmp_path, method="sam", save_every=1, log_every=1, threads=1)     # does not change the bits


def test_weights_of_another_model_are_refused(tmp_path):
    from safetensors.torch import save_file

    save_file(Scorer().model().state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="weights of another model: .* missing"):
        loop(Augmented(), start=str(tmp_path / "w.safetensors"))
