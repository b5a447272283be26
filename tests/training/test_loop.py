"""The training loop against slow twins: means over all micro-batches, late phases, forks, and what bad input gets."""

import dataclasses
import json
import math
import random

import numpy
import pytest
import torch
from toys import TOYS, Augmented, Regression, Scorer, Tokens, Windows

from flatmin.errors import RunFolderError
from flatmin.recipes.supervised import Supervised, classification
from flatmin.training import state
from flatmin.training.protocol import Metric, Place
from flatmin.training.run import Diverged, Training
from flatmin.training.settings import TrainSettings, learning_rate_factor
from flatmin.training.streams import Loaded, Shuffled, groups


def train(recipe, folder=None, tick=lambda done: None, **options):
    return Training(recipe, TrainSettings(**options), Place(options.get("seed", 0)), folder, tick)


def weights(training):
    return [p.detach().clone() for p in training.model.parameters()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# the mean


@pytest.mark.parametrize("method", ("base", "sam", "functional_sam"))
def test_accumulation_is_the_merged_batch(method):
    """Batches of 8 rows, or twice 4; the last of an epoch is smaller, and its rows weigh as much as the others."""
    ends = []
    for size, accumulate in ((8, 1), (4, 2)):
        recipe = dataclasses.replace(Regression(), rows=43)

        class Sized(Regression):
            def train_batches(self, at, size=size, recipe=recipe):
                return Shuffled(recipe.train_batches(at).tensors, size, at)

        trained = train(Sized(rows=43), method=method, epochs=4, accumulate=accumulate)
        assert trained.steps == 4 * 6
        trained.run()
        ends.append(torch.cat([w.flatten() for w in weights(trained)]))
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-5)


def test_a_mean_over_tokens_is_over_all_micro_batches():
    """Against the loss of all tokens of a step together, by hand."""
    recipe, at = Tokens(), Place(3)
    training = train(recipe, seed=3, accumulate=4, steps=3, schedule="constant")
    torch.manual_seed(3)
    model = recipe.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _, micro in zip(range(3), groups(Windows(at), 4), strict=False):
        sums = [recipe.loss(model(b["tokens"][:, :-1]), b) * b["tokens"][:, 1:].numel() for b in micro]
        (sum(sums) / sum(b["tokens"][:, 1:].numel() for b in micro)).backward()
        optimizer.step()
        optimizer.zero_grad()
    training.run()
    for a, b in zip(training.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_schedules_by_their_formulas():
    assert [learning_rate_factor(t, 10, "constant", 4) for t in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    for t in range(11):
        assert learning_rate_factor(t, 10, "cosine", 0) == pytest.approx((1 + math.cos(math.pi * t / 10)) / 2)
    assert [learning_rate_factor(t, 10, "wsd", 1) for t in (0, 1, 8, 9, 10)] == [1, 1, 1, 0.5, 0]


def test_cosine_is_torchs_own():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)
    for t in range(40):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(learning_rate_factor(t, 40, "cosine", 0), rel=1e-12)
        optimizer.step()
        scheduler.step()


# resuming and forking


@pytest.mark.parametrize("recipe", TOYS, ids=lambda toy: toy.name)
@pytest.mark.parametrize("stop", (1, 4, 9))
def test_an_interrupted_run_ends_in_the_same_bits(tmp_path, recipe, stop):
    def interrupt(done):
        if done == stop:
            raise KeyboardInterrupt

    options = {"method": "looksam", "rho": 0.1, "accumulate": 2, "save_every": 3, "steps": 12, "log_every": 2}
    whole = train(recipe, tmp_path / "whole", **options)
    whole.run()
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "cut", interrupt, **options).run()
    resumed = train(recipe, tmp_path / "cut", **options)
    assert resumed.done == stop // 3 * 3
    resumed.run()
    assert same(weights(whole), weights(resumed))
    logs = [(tmp_path / name / "log.jsonl").read_text() for name in ("whole", "cut")]
    assert logs[0] == logs[1]


def test_a_late_phase_begins_as_the_base_and_differs_after(tmp_path):
    plain = train(Augmented(), tmp_path / "plain", steps=12, keep_every=3)
    late = train(Augmented(), tmp_path / "late", steps=12, keep_every=3, method="sam", rho=0.1, late=0.25)
    plain.run(), late.run()
    states = [torch.load(tmp_path / name / "checkpoints" / "step-00000009" / "state.pt", weights_only=True)["model"]
              for name in ("plain", "late")]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert not same(weights(plain), weights(late))
    assert [row["radius"] for row in late.trained.steps] == [0.0, *[pytest.approx(0.1, rel=1e-5)] * 2]
    # a fork of the plain run at that step, with the method from there on, is the same run
    fork = train(Augmented(), tmp_path / "fork", steps=12, method="sam", rho=0.1,
                 start=str(tmp_path / "plain" / "checkpoints" / "step-00000009"))
    assert fork.done == 9
    fork.run()
    assert same(weights(fork), weights(late))


def test_weights_alone_begin_at_step_0(tmp_path):
    from safetensors.torch import save_file

    model = Regression().model()
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    training = train(Regression(), start=str(tmp_path / "w.safetensors"))
    assert training.done == 0 and same(weights(training), model.parameters())


def test_old_checkpoints_go_and_kept_ones_stay(tmp_path):
    train(Regression(), tmp_path, steps=10, save_every=2, keep_every=5).run()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000005", "step-00000010"]


def test_a_write_that_fails_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    options = {"steps": 9, "save_every": 3}
    whole = train(Regression(), tmp_path / "whole", **options)
    whole.run()
    real, count = torch.save, [0]

    def full(state, file):
        count[0] += 1
        if count[0] == 3:       # the shared state of the second checkpoint
            raise OSError(28, "No space left on device")
        return real(state, file)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(RunFolderError, match="cannot write .*No space left.*--resume"):
        train(Regression(), tmp_path / "cut", **options).run()
    monkeypatch.setattr(torch, "save", real)
    assert [p.name for p in (tmp_path / "cut" / "checkpoints").iterdir()] == ["step-00000003"]
    resumed = train(Regression(), tmp_path / "cut", **options)
    assert resumed.done == 3
    resumed.run()
    assert same(weights(whole), weights(resumed))


def test_loops_do_not_touch_each_other(tmp_path):
    """Evaluating, monitoring and saving leave a run bit for bit."""
    bare = train(Augmented(), steps=10, method="sam", evaluate_every=0)
    busy = train(Augmented(), tmp_path, steps=10, method="sam", evaluate_every=1, save_every=1, log_every=1,
                 monitor="one_step", monitor_every=2)
    bare.run(), busy.run()
    assert same(weights(bare), weights(busy))
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert sum("sharpness" in row for row in rows) == 5 and sum("evaluation" in row for row in rows) == 10


def test_esam_takes_the_losses_of_samples():
    trained = train(Augmented(), steps=6, method="esam", accumulate=2).run()
    assert trained.steps[0]["perturbed_loss"] > 0
    with pytest.raises(ValueError, match="add losses"):
        train(Scorer(), steps=2, method="esam").run()


def test_the_training_loss_is_the_mean_since_the_last_evaluation():
    training = train(Regression(), steps=8, log_every=1, evaluate_every=4)
    trained = training.run()
    losses = [row["loss"] for row in trained.steps]
    means = [row["train_loss"] for row in trained.evaluations]
    assert means == [pytest.approx(sum(losses[:4]) / 4), pytest.approx(sum(losses[4:]) / 4)]


# streams


def test_shares_of_ranks_make_the_whole_epoch():
    x = torch.arange(23)
    streams = [Shuffled((x,), 3, Place(5, rank, 2)) for rank in range(2)]
    assert {len(s) for s in streams} == {4}
    parts = [[b[0] for b in s] for s in streams]
    assert sorted(torch.cat([t for p in parts for t in p]).tolist()) == list(range(23))
    assert [len(t) for t in parts[0]] == [3, 3, 3, 3] and [len(t) for t in parts[1]] == [3, 3, 3, 2]


@pytest.mark.parametrize("cut", range(9))
def test_a_stream_resumes_in_the_middle_of_an_epoch(cut):
    def make():
        loader = torch.utils.data.DataLoader(torch.arange(7), 2, shuffle=True)
        return [Shuffled((torch.arange(7),), 2, Place(1)), Loaded(loader, Place(1))]

    for whole, first, second in zip(make(), make(), make(), strict=True):
        expected = [b for _, (b,) in zip(range(10), groups(whole, 1), strict=False)]
        before = [b for _, (b,) in zip(range(cut), groups(first, 1), strict=False)]
        second.load_state_dict(first.state_dict())
        after = [b for _, (b,) in zip(range(10 - cut), groups(second, 1), strict=False)]
        flat = [[x.tolist() for x in (b if isinstance(b, tuple) else (b,))] for b in expected]
        assert [[x.tolist() for x in (b if isinstance(b, tuple) else (b,))] for b in before + after] == flat


# bad input


class Lacking:
    name = "lacking"

    def model(self):
        return torch.nn.Linear(1, 1)


def test_bad_input_is_one_error():
    with pytest.raises(ValueError, match="lacks train_batches, forward, loss, weight, optimizers"):
        train(Lacking())
    with pytest.raises(ValueError, match="one of held_out and evaluate"):
        train(type("Half", (Scorer,), {"evaluate": None})())
    with pytest.raises(ValueError, match="pass --steps"):
        train(Tokens(steps=None))
    with pytest.raises(ValueError, match="unknown method 'sma'"):
        train(Regression(), method="sma")
    with pytest.raises(ValueError, match="two ways to say one thing"):
        TrainSettings(steps=3, epochs=4)
    with pytest.raises(ValueError, match="--late is a share"):
        TrainSettings(late=0)
    with pytest.raises(ValueError, match="no checkpoint there"):
        train(Regression(), start="nowhere")


@pytest.mark.parametrize("value", ("high", None, torch.zeros(2)))
def test_a_metric_that_is_no_number(value):
    recipe = type("Odd", (Regression,), {"evaluate": lambda self, model, batches: {"mse": value}})()
    with pytest.raises(ValueError, match="the metric 'mse' of recipe regression must be"):
        train(recipe, steps=1).run()


def test_an_empty_loader_and_a_weight_of_nothing():
    recipe = classification(lambda: torch.nn.Linear(2, 2), [], epochs=1)
    with pytest.raises(ValueError, match="is empty"):
        train(recipe, steps=2).run()
    recipe = type("Weightless", (Regression,), {"weight": lambda self, batch: 0})()
    with pytest.raises(ValueError, match="nothing|anything to average"):
        train(recipe, steps=2).run()


def test_a_loss_that_is_no_mean_and_one_that_diverges():
    recipe = type("PerSample", (Regression,), {"loss": lambda self, outputs, batch: (outputs - batch[1]).square()})()
    with pytest.raises(ValueError, match="one element"):
        train(recipe, steps=2).run()
    recipe = type("Fast", (Regression,), {"optimizers": lambda self, model: [
        torch.optim.SGD(model.parameters(), lr=1e6)]})()
    with pytest.raises(Diverged, match="the loss is not finite in step .*lower the learning rate"):
        train(recipe, steps=60, log_every=1).run()


# recipes in a line


def test_supervised_takes_tensors_data_sets_and_loaders():
    torch.manual_seed(0)
    x, y = torch.randn(40, 3), torch.randn(40, 1)
    data = torch.utils.data.TensorDataset(x, y)
    for source in ((x, y), data, [(x[:20], y[:20]), (x[20:], y[20:])], torch.utils.data.DataLoader(data, 10),
                   lambda: (x, y)):
        recipe = Supervised(lambda: torch.nn.Linear(3, 1), torch.nn.functional.mse_loss, source, source, epochs=2)
        trained = train(recipe, method="sam").run()
        assert trained.evaluations[-1]["tune"]["loss"] == pytest.approx(
            float(torch.nn.functional.mse_loss(trained.model(x), y).detach()), rel=1e-6)


def test_classification_reports_accuracy_with_its_error():
    x = torch.randn(200, 2)
    recipe = classification(lambda: torch.nn.Linear(2, 2), (x, (x[:, 0] > 0).long()), (x, (x[:, 1] > 0).long()))
    trained = train(recipe, epochs=1)
    found = trained.evaluate()["tune"]
    p = (trained.model(x).argmax(1) == (x[:, 1] > 0)).double().mean().item()
    assert found["accuracy"].value == p and found["accuracy"].stderr == pytest.approx((p * (1 - p) / 200) ** 0.5)
    assert found["accuracy"].higher_is_better and not found["loss"].higher_is_better
    assert isinstance(found["loss"], Metric)


# what loaders and kills leave


class Drawing(torch.utils.data.Dataset):
    """Samples with random noise from the global generators."""

    def __len__(self):
        return 10

    def __getitem__(self, i):
        return i + torch.rand(()) + random.random() + float(numpy.random.rand())


@pytest.mark.parametrize("workers", (0, 2))
def test_a_loader_resumes_with_the_same_order_and_noise(workers):
    """A generator of the loader's own, and a data set that draws, wherever the training draws in between."""
    def make():
        torch.manual_seed(5)
        loader = torch.utils.data.DataLoader(Drawing(), 3, shuffle=True, num_workers=workers,
                                             generator=torch.Generator().manual_seed(9))
        return Loaded(loader, Place(1))

    def read(stream, count):
        for _, (batch,) in zip(range(count), groups(stream, 1), strict=False):
            torch.rand(3), random.random(), numpy.random.rand()     # the step draws too
            yield batch

    expected = list(read(make(), 7))
    first = make()
    before = list(read(first, 5))
    torch.manual_seed(77)
    again = make()
    again.load_state_dict(first.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(expected, before + list(read(again, 2)), strict=True))


@pytest.mark.parametrize("moment", ("before the name", "after the name", "in the removal"))
def test_a_kill_between_two_names_leaves_a_complete_checkpoint(tmp_path, monkeypatch, moment):
    """Before or after the new checkpoint has its name, and while the old one is removed."""
    options = {"steps": 9, "save_every": 3, "log_every": 1}
    whole = train(Regression(), tmp_path / "whole", **options)
    whole.run()
    real_move, real_remove, moves = state.move_file, state.shutil.rmtree, []

    def move(source, target):
        moves.append(source)
        if len(moves) == 2 and moment == "before the name":
            raise KeyboardInterrupt
        real_move(source, target)
        if len(moves) == 2 and moment == "after the name":
            raise KeyboardInterrupt

    def remove(path, **more):
        if moment == "in the removal" and len(moves) == 3:
            (path / "state.pt").unlink()
            raise KeyboardInterrupt
        real_remove(path, **more)

    monkeypatch.setattr(state, "move_file", move)
    monkeypatch.setattr(state.shutil, "rmtree", remove)
    with pytest.raises(KeyboardInterrupt):
        train(Regression(), tmp_path / "cut", **options).run()
    monkeypatch.undo()
    resumed = train(Regression(), tmp_path / "cut", **options)
    assert resumed.done == (3 if moment == "before the name" else 6)
    resumed.run()
    assert same(weights(whole), weights(resumed))
    assert [p.name for p in (tmp_path / "cut" / "checkpoints").iterdir()] == ["step-00000009"]
    assert (tmp_path / "whole" / "log.jsonl").read_text() == (tmp_path / "cut" / "log.jsonl").read_text()


def test_epochs_of_data_without_a_length_are_refused():
    with pytest.raises(ValueError, match="--epochs 2: the training data of recipe tokens have no length"):
        train(Tokens(), epochs=2)


def test_a_loss_that_was_not_finite_ends_the_run_whether_it_was_logged_or_not():
    for log_every in (1, 7, 100):
        losses = iter(range(100))
        recipe = type("Once", (Regression,), {"loss": lambda self, outputs, batch, losses=losses: (
            outputs - batch[1]).square().mean() * (math.nan if next(losses) == 4 else 1)})()
        with pytest.raises(Diverged):
            train(recipe, steps=12, log_every=log_every).run()
