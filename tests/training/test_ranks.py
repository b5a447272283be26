"""The loop on two gloo ranks, under DDP and FSDP2: equal to one process, and of one mind where something is wrong."""

import math
import warnings
from pathlib import Path

import pytest
import torch
from toys import Augmented, Regression, Tokens, Windows

from flatmin.parallel import Group
from flatmin.training import state
from flatmin.training.protocol import Metric, Place
from flatmin.training.run import Training
from flatmin.training.settings import TrainSettings
from flatmin.training.state import weights
from flatmin.training.streams import Shuffled
from two_ranks import launch, run

KINDS = ("ddp", "fsdp2")
METHODS = ("base", "sam", "asam", "looksam", "esam", "gsam", "functional_sam", "preconditioned_functional_sam",
           "friendly_sam")
CASES = [(method, accumulate, clip, checkpointing, "float32") for method in METHODS
         for accumulate, clip, checkpointing in ((1, None, False), (3, 0.5, True))]
CASES += [(method, 3, 0.5, False, precision) for method in ("sam", "functional_sam") for precision in ("bf16", "fp16")]


class Wide(Tokens):
    """In float64 where there is no autocast, so that rounding is far below any fault."""

    wide = True

    def model(self):
        return super().model().double() if self.wide else super().model()

    def losses(self, outputs, batch):
        targets = batch["tokens"][:, 1:]
        return torch.nn.functional.cross_entropy(outputs.transpose(1, 2), targets, reduction="none").mean(1)


class Narrow(Wide):
    wide = False


class BothRanks:
    """For one process: the micro-batches of both ranks, in turn."""

    def __init__(self, seed):
        self.streams = [Windows(Place(seed, rank, 2)) for rank in range(2)]

    def __iter__(self):
        for pair in zip(*self.streams, strict=True):
            yield from pair


def twin(recipe):
    return type("Twin", (type(recipe),), {"train_batches": lambda self, at: BothRanks(at.seed)})()


def options_of(case):
    method, accumulate, clip, checkpointing, precision = case
    return {"method": method, "rho": 0.05, "accumulate": accumulate, "clip": clip, "checkpointing": checkpointing,
            "precision": precision, "steps": 4, "seed": 2, "log_every": 1, "device": "cpu"}


def make(recipe, rank=0, kind=None, folder=None, tick=lambda done: None, **options):
    group = Group(None if kind is None else torch.distributed.group.WORLD, torch.device("cpu"))
    settings = TrainSettings(**{"parallel": kind or "ddp", "device": "cpu"} | options)
    return Training(recipe, settings, Place(settings.seed, rank, group.size, group=group), folder, tick)


# what runs in each rank


def trains(kind, rank, case):
    training = make(Narrow() if case[4] != "float32" else Wide(), rank, kind, **options_of(case))
    training.run()
    return weights(training.model), training.trained.steps


def resumes(kind, rank, folder, method):
    """Cut after step 5, resumed from step 3; and undisturbed."""
    def stop(done):
        if done == 5:
            raise KeyboardInterrupt

    options = {"method": method, "rho": 0.05, "steps": 8, "save_every": 3, "accumulate": 2, "evaluate_every": 2}
    whole = make(Augmented(), rank, kind, **options)
    whole.run()
    try:
        make(Augmented(), rank, kind, Path(folder), stop, **options).run()
    except KeyboardInterrupt:
        pass
    resumed = make(Augmented(), rank, kind, Path(folder), **options)
    begun = resumed.done
    resumed.run()
    return begun, weights(whole.model), weights(resumed.model), whole.trained.evaluations, resumed.trained.evaluations


class Uneven(Augmented):
    """Three batches to evaluate on rank 0 and none on rank 1; under DDP alone."""

    batches = (3, 0)

    def held_out(self, split, at):
        return super().held_out(split, Place(0))[:1] * self.batches[at.rank % len(self.batches)]


def evaluates(kind, rank, batches):
    recipe = type("Given", (Uneven,), {"batches": batches})()
    training = make(recipe, rank, kind, steps=2)
    training.run()
    alone = recipe.evaluate(training.inner.eval(), Augmented().held_out("tune", Place(0)))["accuracy"].value
    return training.trained.evaluations[-1]["tune"]["accuracy"], alone


class Broken(Regression):
    """Something is wrong on rank 1 in step 2."""

    what = ""

    def train_batches(self, at):
        self.__dict__["at"] = at
        self.__dict__["step"] = 0
        if self.what == "rows":
            x = torch.randn(20 + 8 * at.rank, 4)
            return Shuffled((x, x.sum(1, keepdim=True)), 4, Place(at.seed))
        if self.what == "same":
            return super().train_batches(Place(at.seed))
        return super().train_batches(at)

    def prepare(self, batch, generator):
        self.__dict__["step"] += 1
        if self.at.rank == 1 and self.step == 2 and self.what == "prepare":
            raise KeyError("no such image")
        return batch

    def loss(self, outputs, batch):
        nan = self.at.rank == 1 and self.step == 2 and self.what == "nan"
        return super().loss(outputs, batch) * (math.nan if nan else 1)

    def weight(self, batch):
        return -1 if self.at.rank == 1 and self.what == "weight" else super().weight(batch)

    def evaluate(self, model, batches):
        if self.at.rank == 1 and self.what == "evaluate":
            raise KeyError("no such metric")
        value = math.nan if self.at.rank == 1 and self.what == "nan metric" else 1.0
        return {"mse": Metric(value, weight=float(len(batches[0][0])))}


def fails(kind, rank, what):
    recipe = type("Broken", (Broken,), {"what": what})()
    try:
        training = make(recipe, rank, kind, steps=None if what == "rows" else 6, log_every=1)
        training.run()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return training.trained.evaluations[-1]["tune"]


def full_disk(kind, rank, folder):
    """The disk of rank 1 is full at the second checkpoint; the first one stays, and the run resumes from it."""
    real, options = state._write, {"steps": 6, "save_every": 2}

    def write(values, path):
        if rank == 1 and "step-00000004" in str(path):
            raise OSError(28, "No space left on device")
        real(values, path)

    state._write = write
    try:
        make(Regression(), rank, kind, Path(folder), **options).run()
        said = ""
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    finally:
        state._write = real
    torch.distributed.barrier()
    left = sorted(p.name for p in Path(folder, "checkpoints").iterdir())
    torch.distributed.barrier()
    return said, left, make(Regression(), rank, kind, Path(folder), **options).done


def starts(kind, rank, folders):
    """From checkpoints of one process, of DDP and of FSDP2: weights and optimizer state as they were."""
    out = {}
    for name, folder in folders.items():
        if Path(folder, "checkpoints").exists():
            training = make(Narrow(), rank, kind, start=folder, steps=9)
            out[name] = training.done, weights(training.model), moments(training)
    torch.distributed.barrier()
    return out


def saves(kind, rank, folders):
    make(Narrow(), rank, kind, Path(folders[kind]), steps=3).run()


def moments(training):
    from flatmin.parallel import full

    names = {p: n for n, p in training.inner.named_parameters()}
    return {names[p]: full(values["exp_avg"]).clone() for o in training.optimizers for p, values in o.state.items()}


def fewer(kind, rank, folder):
    """Resumed by two processes where one began."""
    try:
        make(Regression(), rank, kind, Path(folder), steps=6)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


BROKEN = ("rows", "same", "prepare", "nan", "weight", "evaluate", "nan metric")


def jobs(folder, folders):
    def of(kind):
        yield from ((str(case), trains, (case,)) for case in CASES)
        yield from ((f"resumes {m}", resumes, (f"{folder}/{kind}-{m}", m)) for m in ("looksam", "friendly_sam"))
        yield "uneven", evaluates, ((3, 0),)
        yield "even", evaluates, ((1, 1),)
        yield from ((what, fails, (what,)) for what in BROKEN)
        yield "full disk", full_disk, (f"{folder}/{kind}-full",)
        yield "saves", saves, (folders,)
        yield "starts", starts, (folders,)
        yield "fewer", fewer, (f"{folder}/one",)
    return of


def worker(rank, folder):
    warnings.simplefilter("ignore")
    folders = {name: f"{folder}/saved-{name}" for name in ("one", *KINDS)}
    run(rank, folder, KINDS, jobs(folder, folders), 120)


@pytest.fixture(autouse=True)
def single_precision():
    """As in the other processes."""
    kept = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(kept)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    torch.set_default_dtype(torch.float32)
    make(Narrow(), folder=folder / "saved-one", steps=3).run()
    make(Regression(), folder=folder / "one", steps=6, save_every=2).run()
    return launch(worker, str(folder), KINDS), folder


def of(found, kind, name):
    both = [rank.get(name, "Traceback: never ran, an earlier check hung or died") for rank in found[0][kind]]
    assert not any(isinstance(r, str) and "Traceback" in r for r in both), both
    return both


pytestmark = pytest.mark.slow


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_ranks_are_one_process(found, kind, case):
    """The mean over tokens is over all micro-batches and ranks: one process with the micro-batches of both ranks."""
    ends, steps = of(found, kind, str(case))[0]
    wide = case[4] == "float32"
    options = options_of(case) | {"accumulate": 2 * case[1]}
    single = make(twin(Wide() if wide else Narrow()), **options)
    single.run()
    if wide and case[0] != "esam":      # its tensors are drawn alike, its samples are chosen in each micro-batch
        assert all(t.dtype == torch.float64 for t in ends.values())
    for name, value in weights(single.model).items():
        if wide:
            torch.testing.assert_close(ends[name], value, rtol=1e-9, atol=1e-11)
        else:   # by norm: AdamW moves an entry whose gradient is all rounding by its learning rate, either way
            assert float((ends[name] - value).norm()) <= 0.03 * float(value.norm()), name
    if wide:
        for a, b in zip(steps, single.trained.steps, strict=True):
            for name in ("loss", "radius"):
                assert a[name] == pytest.approx(b[name], rel=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ("looksam", "friendly_sam"))
def test_resumed_ranks_end_in_the_same_bits(found, kind, method):
    """What the method carries is spread over ranks under FSDP2; BatchNorm's statistics are the first rank's."""
    for begun, whole, resumed, *evaluations in of(found, kind, f"resumes {method}"):
        assert begun == 3
        assert whole.keys() == resumed.keys() and [k for k in whole if not torch.equal(whole[k], resumed[k])] == []
        assert evaluations[0] == evaluations[1]


def test_a_rank_without_held_out_data_says_nothing(found):
    for together, alone in of(found, "ddp", "uneven"):
        assert together == alone
    for rank in found[0]["fsdp2"]:
        assert "gives the ranks [3, 0] batches of 'tune': under FSDP2" in rank["uneven"]


@pytest.mark.parametrize("kind", KINDS)
def test_all_ranks_evaluate_the_same_model(found, kind):
    """With the first rank's running statistics, as it is saved."""
    values = {value for pair in of(found, kind, "even") for value in pair}
    assert len(values) == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("what", "message"), (
    ("rows", "the ranks would take"), ("same", "all 2 ranks read the same batches"), ("prepare", "no such image"),
    ("nan", "Diverged: .*the loss is not finite in step 2"), ("weight", "must be finite and not negative"),
    ("evaluate", "no such metric")))
def test_all_ranks_raise_where_one_is_wrong(found, kind, what, message):
    import re

    for said in of(found, kind, what):
        assert re.search(message, said), said


@pytest.mark.parametrize("kind", KINDS)
def test_a_metric_that_is_nan_on_one_rank_is_nan(found, kind):
    assert all(math.isnan(metrics["mse"]) for metrics in of(found, kind, "nan metric"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_disk_on_one_rank_loses_nothing(found, kind):
    for said, left, done in of(found, kind, "full disk"):
        assert "RunFolderError" in said and "No space left on device" in said and "\n" not in said
        assert left == ["step-00000002"] and done == 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_begins_from_any_other(found, kind, tmp_path):
    """One process, DDP and FSDP2 begin from each other's checkpoints, with weights and optimizer states."""
    single = make(Narrow(), start=str(found[1] / f"saved-{kind}"), steps=9)
    expected = single.done, weights(single.model), moments(single)
    of(found, kind, "saves")
    seen = [of(found, other, "starts")[0][kind] for other in KINDS if kind in of(found, other, "starts")[0]]
    assert seen
    for done, ends, means in seen:
        assert done == expected[0] == 3
        for a, b in ((ends, expected[1]), (means, expected[2])):
            assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    for other in KINDS:
        done, ends, means = of(found, other, "starts")[0]["one"]
        saved = state.read(found[1] / "saved-one" / "checkpoints" / "step-00000003" / "state.pt")
        assert done == 3 and all(torch.equal(ends[k], saved["model"][k]) for k in ends)
        assert [torch.equal(m, s["exp_avg"]) for m, s in zip(means.values(), saved["optimizers"][0]["state"].values(),
                                                            strict=True)] == [True] * len(means)


@pytest.mark.parametrize("kind", KINDS)
def test_another_number_of_processes_is_refused(found, kind):
    said = of(found, kind, "fewer")
    assert "processes was '1'" in said[0] or "processes was 1" in said[0], said
    assert "fewer processes than the 2 of now" in said[1], said
