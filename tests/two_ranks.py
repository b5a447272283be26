"""Checks that run in two gloo ranks, started once for all the tests that read their results."""

from __future__ import annotations

import datetime
import os
import traceback
import warnings

import torch
import torch.distributed as dist
from torch import nn

WORLD = 2


def wrap(kind, model):
    """A sequential model under "ddp", or sharded layer by layer under "fsdp"."""
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (WORLD,))
    for child in model:
        if any(True for _ in child.parameters()):
            fully_shard(child, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def run(rank, folder, kinds, jobs, seconds):
    """In a rank: for each kind what every (name, function, arguments) of ``jobs(kind)`` returns, or its traceback."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for kind in kinds:
        dist.init_process_group("gloo", init_method=f"file://{folder}/{kind}", rank=rank, world_size=WORLD,
                                timeout=datetime.timedelta(seconds=seconds))
        results = {}
        for name, job, args in jobs(kind):
            torch.manual_seed(0)
            try:
                results[name] = job(kind, rank, *args)
            except BaseException:  # a CheckpointException is no Exception
                results[name] = traceback.format_exc()
            finally:
                torch.save(results, f"{folder}/{kind}-{rank}.pt")
        dist.destroy_process_group()


def launch(worker, folder, kinds, seconds=180):
    """``worker(rank, folder)`` in two processes; the results of each kind and rank."""
    context = torch.multiprocessing.get_context("spawn")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    processes = [context.Process(target=worker, args=(rank, folder)) for rank in range(WORLD)]
    for p in processes:
        p.start()
    for p in processes:
        p.join(seconds)
        if p.is_alive():
            p.kill()
    return {kind: [torch.load(f"{folder}/{kind}-{rank}.pt") if os.path.exists(f"{folder}/{kind}-{rank}.pt") else {}
                   for rank in range(WORLD)] for kind in kinds}


def results(launched, kind, name):
    """What a check returned on each rank; a traceback fails the test."""
    for rank in range(WORLD):
        result = launched[kind][rank].get(name, "never ran: an earlier check hung or died")
        assert not isinstance(result, str), f"rank {rank}:\n{result}"
        yield rank, result
