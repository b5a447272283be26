"""A run that is killed at any moment and resumed ends in the bits of one that was not; on one process and on two.

Each kind trains all five toy recipes, one after the other, with what is most easily lost: two micro-batches a step,
clipping, dropout, augmentation, several optimizers. Processes are forked from one that has imported torch already.
"""

import json
import multiprocessing
import os
import random
import socket
import time

import pytest
import torch
from safetensors.torch import load_file
from toys import TOYS

KINDS = {
    "one process": (1, {"method": "sam"}),
    "ddp": (2, {"method": "friendly_sam"}),
    "fsdp2": (2, {"method": "sam", "parallel": "fsdp2"}),
    "bf16 ddp": (2, {"method": "looksam", "precision": "bf16"}),
    "bf16 fsdp2": (2, {"method": "looksam", "precision": "bf16", "parallel": "fsdp2"}),
    "fp16": (1, {"method": "functional_sam", "precision": "fp16"}),
}
COMMON = {"rho": 0.1, "accumulate": 2, "clip": 1.0, "save_every": 2, "log_every": 3}
STEPS = 10


@pytest.fixture(scope="module")
def processes():
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["worker", "torch.distributed.fsdp", "torch.distributed.checkpoint"])
    return context


def start(processes, folder, kind):
    import worker

    world, options = KINDS[kind]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [processes.Process(target=worker.main, args=(rank, world, port, str(folder), COMMON | options
                                                           | {"steps": STEPS})) for rank in range(world)]
    for process in started:
        process.start()
    return started


def finish(started):
    for process in started:
        process.join(120)
    assert [process.exitcode for process in started] == [0] * len(started)


def kill_after(started, count, folder, wait):
    """SIGKILL to every rank, ``wait`` seconds after the run has logged ``count`` lines more than now."""
    def logged():
        return sum(path.read_text().count("\n") for path in folder.glob("*/log.jsonl"))

    goal, end = logged() + count, time.monotonic() + 60
    while logged() < goal and started[0].is_alive() and time.monotonic() < end:
        time.sleep(0.005)
    time.sleep(wait)
    for process in started:
        process.kill()
    for process in started:
        process.join()


@pytest.fixture(scope="module")
def runs(tmp_path_factory, processes):
    """Every kind, once undisturbed and once killed at three random moments."""
    chance = random.Random(0)
    folders = {}
    for kind in KINDS:
        whole, cut = (tmp_path_factory.mktemp("training") for _ in range(2))
        finish(start(processes, whole, kind))
        for _ in range(3):
            kill_after(start(processes, cut, kind), chance.randint(2, 14), cut, chance.uniform(0, 0.05))
        finish(start(processes, cut, kind))
        folders[kind] = whole, cut
    return folders


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_killed_and_resumed_ends_in_the_same_bits(runs, kind):
    for name in (toy.name for toy in TOYS):
        a, b = (load_file(folder / name / "model.safetensors") for folder in runs[kind])
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), name
        logs = [[json.loads(row) for row in (folder / name / "log.jsonl").read_text().splitlines()]
                for folder in runs[kind]]
        assert logs[0] == logs[1] and len(logs[0]) >= 4, name


@pytest.mark.slow
def test_runs_were_cut(runs):
    """Or the test above compares undisturbed runs."""
    for _, cut in runs.values():
        began = [int(line) for line in (cut / "began").read_text().split()]
        assert len(began) > len(TOYS), began
    every = [int(line) for _, cut in runs.values() for line in (cut / "began").read_text().split()]
    assert sum(step > 0 for step in every) >= 6, every
