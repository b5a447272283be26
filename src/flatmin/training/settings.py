"""How long and in what way a recipe is trained; every field is a flag of ``flatmin train``."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal

Schedule = Literal["cosine", "constant", "wsd"]
Precision = Literal["float32", "bf16", "fp16"]
Parallel = Literal["ddp", "fsdp2"]


@dataclass(frozen=True)
class TrainSettings:
    """Settings of one training run.

    Args:
        method: a plain optimizer of the recipe ("base"), or a preset such as "sam".
        rho: the radius ρ; None takes the method's default.
        steps: optimizer steps; None takes ``epochs``, or the recipe's own number of either.
        epochs: passes over the training data, instead of ``steps``.
        seed: of the weights, the order of the data and everything drawn.
        accumulate: micro-batches a step, on each rank.
        precision: float32, or autocast to bf16, or to fp16 with a loss scaler.
        clip: the largest norm of the gradient that is stepped with.
        schedule: of the learning rate after warm-up: cosine to 0, constant, or warm-up, stable, decay ("wsd": linear to
            0 over the last fifth).
        warmup: steps over which the learning rate rises from 0.
        late: the share of the steps, at the end, in which the method acts; before it the step is the base optimizer's.
        start: a run folder, a checkpoint in one, or a .safetensors file of weights to begin with.
        device: "auto" (an accelerator where there is one), "cpu", "cuda", ...
        parallel: how ranks share the model under ``torchrun``: "ddp" or "fsdp2".
        compile: whether the model is compiled by ``torch.compile``.
        checkpointing: whether the recipe's blocks are run again in the backward pass instead of kept.
        evaluate_every: steps between evaluations (default: ten in a run); 0: at the end alone.
        save_every: steps between checkpoints (default: twenty in a run).
        keep_every: steps between checkpoints that stay, to fork a run from; None: the newest one alone.
        log_every: steps between lines of ``log.jsonl``.
        monitor: comma-separated measures that are followed in training, such as "one_step,largest_eigenvalue".
        monitor_every: steps between them.
        threads: of one process; None leaves torch's own number.
    """

    method: str = "base"
    rho: float | None = None
    steps: int | None = None
    epochs: int | None = None
    seed: int = 0
    accumulate: int = 1
    precision: Precision = "float32"
    clip: float | None = None
    schedule: Schedule = "cosine"
    warmup: int = 0
    late: float = 1.0
    start: str | None = None
    device: str = "auto"
    parallel: Parallel = "ddp"
    compile: bool = False
    checkpointing: bool = False
    evaluate_every: int | None = None
    save_every: int | None = None
    keep_every: int | None = None
    log_every: int = 10
    monitor: str = ""
    monitor_every: int = 100
    threads: int | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "epochs", "accumulate", "save_every", "keep_every", "log_every", "monitor_every",
                     "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
        for name in ("warmup", "evaluate_every", "rho", "clip"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"--{name.replace('_', '-')} must not be negative, got {value}")
        for name, known in (("precision", ("float32", "bf16", "fp16")), ("schedule", ("cosine", "constant", "wsd")),
                            ("parallel", ("ddp", "fsdp2"))):
            if getattr(self, name) not in known:
                raise ValueError(f"--{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if not 0 < self.late <= 1:
            raise ValueError(f"--late is a share of the steps, above 0 and at most 1, got {self.late}")
        if self.steps is not None and self.epochs is not None:
            raise ValueError("--steps and --epochs are two ways to say one thing: pass one of them")

    def to_dict(self) -> dict[str, object]:
        return {f.name: getattr(self, f.name) for f in fields(self)}


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
