"""How long and in what way a recipe is trained; every field is a flag of ``flatmin train``. Imports no torch."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from dataclasses import dataclass
from typing import Any, Literal

Schedule = Literal["cosine", "constant", "wsd"]
Precision = Literal["float32", "bf16", "fp16"]
Parallel = Literal["ddp", "fsdp2"]


@dataclass(frozen=True)
class TrainSettings:
    """Settings of one training run.

    Raises:
        ValueError: a value of the wrong type or out of its range, or ``steps`` beside ``epochs``.
    """

    method: str = "base"
    """base (the recipe's own optimizer), or a preset such as sam"""
    rho: float | None = None
    """radius (default: the method's own)"""
    steps: int | None = None
    """optimizer steps (default: the recipe's own number of steps or epochs)"""
    epochs: int | None = None
    """passes over the training data, instead of steps"""
    seed: int = 0
    """of the weights, the order of the data and everything drawn"""
    accumulate: int = 1
    """micro-batches a step, on each rank"""
    precision: Precision = "float32"
    """float32, or autocast to bf16, or to fp16 with a loss scaler"""
    clip: float | None = None
    """largest norm of the gradient that is stepped with (default: not clipped)"""
    schedule: Schedule = "cosine"
    """of the learning rate after warm-up: cosine to 0, constant, or wsd (linear to 0 over the last fifth)"""
    warmup: int = 0
    """steps over which the learning rate rises from 0"""
    late: float = 1.0
    """share of the steps, at the end, in which the method acts; before it the step is the base optimizer's"""
    start: str | None = None
    """run folder, checkpoint in one, or .safetensors file of weights to begin with"""
    device: str = "auto"
    """auto (an accelerator where there is one), cpu, cuda, ..."""
    parallel: Parallel = "ddp"
    """how ranks share the model under torchrun: ddp or fsdp2"""
    compile: bool = False
    """compile the model by torch.compile"""
    checkpointing: bool = False
    """run the recipe's blocks again in the backward pass instead of keeping their activations"""
    evaluate_every: int | None = None
    """steps between evaluations; 0: at the end alone (default: ten in a run)"""
    save_every: int | None = None
    """steps between checkpoints (default: twenty in a run)"""
    keep_every: int | None = None
    """steps between checkpoints that stay, to fork a run from (default: the newest alone)"""
    log_every: int = 10
    """steps between lines of log.jsonl"""
    monitor: str = ""
    """sharpness measures to follow, with commas between, such as one_step,largest_eigenvalue"""
    monitor_every: int = 100
    """steps between them"""
    threads: int | None = None
    """threads of one process (default: torch's own number)"""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("steps", "epochs", "accumulate", "save_every", "keep_every", "log_every", "monitor_every",
                     "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
        for name in ("warmup", "evaluate_every", "rho", "clip", "seed"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"--{name.replace('_', '-')} must not be negative, got {value}")
        if not 0 < self.late <= 1:
            raise ValueError(f"--late is a share of the steps, above 0 and at most 1, got {self.late}")
        if self.steps is not None and self.epochs is not None:
            raise ValueError("--steps and --epochs are two ways to say one thing: pass one of them")

    def to_dict(self) -> dict[str, object]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}


def check_types(settings: Any) -> None:
    """Raise a ``ValueError`` where a field of a dataclass does not have the type that it is declared with."""
    hints = typing.get_type_hints(type(settings))
    for field in dataclasses.fields(settings):
        value, hint = getattr(settings, field.name), hints[field.name]
        flag = f"--{field.name.replace('_', '-')}"
        if typing.get_origin(hint) is Literal:
            if value not in typing.get_args(hint):
                raise ValueError(f"{flag} must be one of {', '.join(map(str, typing.get_args(hint)))}, got {value!r}")
            continue
        kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        kinds = tuple(typing.get_origin(kind) or kind for kind in kinds)
        accepted = (*kinds, int) if float in kinds else kinds
        if not isinstance(value, accepted) or isinstance(value, bool) and bool not in kinds:
            raise ValueError(f"{field.name} must be {_NAMES.get(kinds[0], kinds[0].__name__)}, got {value!r}")


_NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


def learning_rate_factor(step: int, steps: int, schedule: str, warmup: int) -> float:
    """What the learning rate is multiplied by in a step.

    Linear from 1/warmup to 1 over the first ``warmup`` steps; then ½(1 + cos πt) over the others ("cosine"), 1
    ("constant"), or 1 and linear to 0 over the last fifth of all steps ("wsd").
    """
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))
    decay = max(1, round(0.2 * steps))
    return min(1.0, max(0.0, (steps - step) / decay))
