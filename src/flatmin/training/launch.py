"""From settings to a place to train: processes, device, precision, and the model wrapped for them."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..ascent import Late, Sharpener
from ..ascent.presets import PRESETS
from ..objective import Objective
from ..parallel import all_processes
from ..sharpness import SharpnessMonitor
from .log import Log
from .protocol import Place
from .settings import TrainSettings, learning_rate_factor
from .state import OptimizerStates
from .streams import steps_an_epoch


@contextmanager
def place(settings: TrainSettings, folder: str | None = None) -> Iterator[Place]:
    """Join the processes that ``torchrun`` started, if it did, and choose the device; left again at the end."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    device = _device(settings.device)
    with all_processes(device) as group:
        yield Place(settings.seed, group.rank, group.size, device, folder, group)


def _device(name: str) -> torch.device:
    if name != "auto":
        try:
            device = torch.device(name)
        except RuntimeError:
            raise ValueError(f"--device must be auto, cpu, cuda or another device of torch, got {name!r}") from None
    elif torch.accelerator.is_available():
        device = torch.device(torch.accelerator.current_accelerator() or "cpu")
    else:
        device = torch.device("cpu")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"--device {name}: this torch sees no CUDA device; use --device cpu")
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index or 0)))
        if device.index >= torch.cuda.device_count():
            raise ValueError(f"--device {name}: this process takes CUDA device {device.index}, and there are "
                             f"{torch.cuda.device_count()}: start at most one process a device")
        torch.cuda.set_device(device)
    return device


def autocast(settings: TrainSettings, at: Place) -> AbstractContextManager[Any]:
    """The context of every forward pass."""
    if settings.precision == "float32":
        return nullcontext()
    return torch.autocast(at.device.type, torch.bfloat16 if settings.precision == "bf16" else torch.float16)


def scaler(settings: TrainSettings, at: Place) -> torch.amp.GradScaler | None:
    """The loss scaler of fp16."""
    return torch.amp.GradScaler(at.device.type) if settings.precision == "fp16" else None


def blocks(recipe: Any, model: nn.Module) -> list[nn.Module]:
    """The recipe's blocks, or the members of the model's largest list of modules."""
    if hasattr(recipe, "blocks"):
        return list(recipe.blocks(model))
    lists = [m for m in model.modules() if isinstance(m, (nn.ModuleList, nn.Sequential))]
    largest: Any = max(lists, key=lambda m: sum(p.numel() for p in m.parameters()), default=())
    return [m for m in largest if any(p.requires_grad for p in m.parameters())]


def wrapped(recipe: Any, model: nn.Module, settings: TrainSettings, at: Place) -> nn.Module:
    """The model on its device, as it is trained: checkpointed, data-parallel or sharded, compiled."""
    model.to(at.device)
    if settings.checkpointing:
        found = blocks(recipe, model)
        if not found:
            raise ValueError(f"--checkpointing: the model of recipe {recipe.name} has no list of modules whose members "
                             "could be run again; add blocks(model) to the recipe")
        for block in found:
            _recomputed(block)
    if at.world > 1:
        at.group.broadcast([t.detach() for t in (*model.parameters(), *model.buffers())])    # FSDP2 does not
        model = data_parallel(model, settings.parallel, blocks(recipe, model), at.device)
    return torch.compile(model) if settings.compile else model      # type: ignore[return-value]


def data_parallel(model: nn.Module, kind: str, blocks: Sequence[nn.Module], device: torch.device) -> nn.Module:
    """A model under DDP ("ddp"), or sharded over all processes, block by block ("fsdp2")."""
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)    # type: ignore[return-value]


def _recomputed(block: nn.Module) -> None:
    """Keep the inputs of a block alone; its forward runs again in the backward pass, on copies of its buffers."""
    forward = block.forward

    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        return nullcontext(), _copied_buffers(block)

    changes = any(True for _ in block.buffers())
    options: dict[str, Any] = {"use_reentrant": False} | ({"context_fn": contexts} if changes else {})
    block.forward = lambda *args, **kwargs: checkpoint(forward, *args, **options, **kwargs)


@contextmanager
def _copied_buffers(block: nn.Module) -> Iterator[None]:
    """Inside, the block has copies of its buffers: running statistics move once a pass, not twice."""
    owners = [(m, name, b) for m in block.modules() for name, b in m.named_buffers(recurse=False)]
    for module, name, buffer in owners:
        setattr(module, name, buffer.clone())
    try:
        yield
    finally:
        for module, name, buffer in owners:
            setattr(module, name, buffer)


def number_of_steps(recipe: Any, settings: TrainSettings, stream: Any) -> int:
    """Optimizer steps of a run: as the settings say, or the recipe."""
    if settings.steps is not None:
        return settings.steps
    epochs = settings.epochs or getattr(recipe, "epochs", None)
    each = steps_an_epoch(stream, settings.accumulate)
    if epochs is not None and each is not None:
        return int(epochs) * each
    if settings.epochs is not None:
        raise ValueError(f"--epochs {epochs}: the training data of recipe {recipe.name} have no length; pass --steps")
    steps = getattr(recipe, "steps", None)
    if steps is None:
        raise ValueError(f"how long? recipe {recipe.name} says no number of steps, and its stream no length: pass "
                         "--steps")
    return int(steps)


def scheduler(settings: TrainSettings, optimizer: torch.optim.Optimizer, steps: int
              ) -> torch.optim.lr_scheduler.LRScheduler:
    """The schedule of the learning rate."""
    if settings.schedule == "cosine" and not settings.warmup:
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, steps, settings.schedule, settings.warmup))


def sharpener(settings: TrainSettings, model: nn.Module, optimizers: list[torch.optim.Optimizer],
              scaler: torch.amp.GradScaler | None, steps: int) -> Sharpener:
    """The method over the model; a plain optimizer is the radius 0."""
    name = settings.method
    optimizer: Any = optimizers[0] if len(optimizers) == 1 else OptimizerStates(optimizers)
    if name == "base":
        return Sharpener(model, rho=0.0, optimizer=optimizer, scaler=scaler)
    if name not in PRESETS:
        raise ValueError(f"unknown method {name!r}: choose from base, {', '.join(PRESETS)}")
    rho: Any = settings.rho
    if rho is None:
        rho = inspect.signature(PRESETS[name]).parameters["rho"].default
    if settings.late < 1:
        rho = Late(rho, round((1 - settings.late) * steps))
    return PRESETS[name](model, rho=rho, optimizer=optimizer, scaler=scaler)


def monitor(recipe: Any, settings: TrainSettings, model: nn.Module, optimizers: list[torch.optim.Optimizer],
            at: Place, log: Log) -> SharpnessMonitor | None:
    """What follows the sharpness, on the recipe's "measure" data; None where nothing is asked for."""
    names = [n.strip() for n in settings.monitor.split(",") if n.strip()]
    if not names:
        return None
    if not hasattr(recipe, "held_out"):
        raise ValueError(f"--monitor measures on held-out data and recipe {recipe.name} has none (held_out)")
    objective = Objective(model, recipe.loss, list(recipe.held_out("measure", at)), forward=recipe.forward,
                          weight=recipe.weight)
    return SharpnessMonitor(objective, names, every=settings.monitor_every, logger=log, optimizer=optimizers[0])
