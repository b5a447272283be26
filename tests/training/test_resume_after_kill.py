"""A run that is killed at any moment and resumed ends in the bits of one that was not; on one process and on two.

Each kind runs all five toy recipes, one after the other, with what is most easily lost: two micro-batches a step,
clipping, dropout, augmentation, several optimizers.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toys import TOYS

HERE = Path(__file__).parent
KINDS = {
    "one process": (1, {"method": "sam", "rho": 0.1}),
    "ddp": (2, {"method": "sam", "rho": 0.1}),
    "fsdp2": (2, {"method": "sam", "rho": 0.1, "parallel": "fsdp2", "toys": ["regression", "tokens", "scorer"]}),
    "bf16 ddp": (2, {"method": "looksam", "rho": 0.1, "precision": "bf16", "toys": ["tokens", "augmented"]}),
}
COMMON = {"accumulate": 2, "clip": 1.0, "save_every": 2, "log_every": 3}


def start(folder, ranks, options):
    command = [sys.executable, str(HERE / "worker.py")] if ranks == 1 else [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}",
        str(HERE / "worker.py")]
    paths = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    return subprocess.Popen([*command, str(folder), json.dumps(COMMON | options)], env=environment,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def finish(process):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output


def kill_after(process, count, folder, wait):
    """SIGKILL to every rank, ``wait`` seconds after the run has logged ``count`` lines more than now."""
    def logged():
        return sum(path.read_text().count("\n") for path in folder.glob("*/log.jsonl"))

    goal, end = logged() + count, time.monotonic() + 120
    while logged() < goal and process.poll() is None and time.monotonic() < end:
        time.sleep(0.005)
    time.sleep(wait)
    for pid in (process.pid, *below(process.pid)):      # torchrun gives every rank a session of its own
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.communicate()


def below(pid):
    """The processes that a process has started, and theirs."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    found = [int(child) for child in children.read_text().split()] if children.exists() else []
    return found + [inner for child in found for inner in below(child)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Every kind, once undisturbed and once killed at three random moments."""
    chance = random.Random(0)
    folders = {}
    for kind, (ranks, options) in KINDS.items():
        whole, cut = (tmp_path_factory.mktemp("training") for _ in range(2))
        finish(start(whole, ranks, options))
        for _ in range(3):
            kill_after(start(cut, ranks, options), chance.randint(2, 8), cut, chance.uniform(0, 0.05))
        finish(start(cut, ranks, options))
        folders[kind] = whole, cut
    return folders


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_killed_and_resumed_ends_in_the_same_bits(runs, kind):
    whole, cut = runs[kind]
    for name in KINDS[kind][1].get("toys", [toy.name for toy in TOYS]):
        a, b = (load_file(folder / name / "model.safetensors") for folder in (whole, cut))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), name
        logs = [[row for row in map(json.loads, (folder / name / "log.jsonl").read_text().splitlines())]
                for folder in (whole, cut)]
        assert logs[0] == logs[1] and len(logs[0]) >= 3, name


@pytest.mark.slow
def test_runs_were_cut(runs):
    """Or the test above compares undisturbed runs."""
    began = [int(line) for _, cut in runs.values() if (cut / "began").exists()
             for line in (cut / "began").read_text().split()]
    assert sum(step > 0 for step in began) >= 4, began
