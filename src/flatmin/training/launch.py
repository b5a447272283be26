"""From settings to a place to train: processes, device, precision, and the model wrapped for them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..parallel import all_processes, data_parallel
from .protocol import Place
from .settings import TrainSettings


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
        for block in blocks(recipe, model):
            _recomputed(block)
    if at.world > 1:
        model = data_parallel(model, settings.parallel, blocks(recipe, model), at.device)
    return torch.compile(model) if settings.compile else model      # type: ignore[return-value]


def _recomputed(block: nn.Module) -> None:
    """Keep the inputs of a block alone; its forward runs again in the backward pass."""
    forward = block.forward
    block.forward = lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)
