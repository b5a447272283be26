"""Names and signatures of the most used SAM classes and of notes that copy them, each a few lines over this library.

Where such code differs from its paper or from arithmetic, the docstring says in a line what is done here instead.
Training code that is new should take ``flatmin.Sharpener`` and ``flatmin.presets``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from . import ascent
from .ascent.directions import Gradient
from .ascent.steepest import Ascent, AscentInfo
from .curvature import Hessian, compute_hessian_sharpness, eigenpairs
from .generalization.pac_bayes import compute_pac_bayes_bound
from .objective import Objective
from .parallel import local
from .perturbed import unchanged_buffers
from .sharpness import one_step
from .vectors import Space

__all__ = ["ASAM", "SAM", "EfficientSAM", "LookSAM", "MemoryEfficientSAM", "MomentumSAM", "compute_hessian_sharpness",
           "compute_hessian_vector_product", "compute_pac_bayes_bound", "compute_sam_sharpness",
           "disable_running_stats", "enable_running_stats", "power_iteration_top_eigenvalue",
           "train_sam_distributed", "train_sam_with_accumulation"]

Base = Callable[..., Optimizer]


class SAM(ascent.SAM):
    """``flatmin.SAM`` for subclasses that override ``first_step`` in the way of the most used class.

    Such a subclass keeps w in ``self.state[p]["old_p"]``, moves the weights itself, scaled with ``_grad_norm()``, and
    inherits ``second_step`` and ``step``. ``step`` calls its closure twice, with gradients cleared before each call.
    What else the subclass keeps in ``self.state`` it shares with the base optimizer.
    """

    @torch.no_grad()
    def _grad_norm(self) -> Tensor:
        """‖g‖₂ over all groups, ‖|w| g‖₂ in the adaptive ones, 0-d."""
        scaled = [(p, p.grad * p.abs() if group["adaptive"] else p.grad)
                  for group in self.param_groups for p in group["params"] if p.grad is not None]
        return Space([p for p, _ in scaled]).norm([local(g) for _, g in scaled])

    def second_step(self, zero_grad: bool = False) -> None:
        moved = [(p, state.pop("old_p")) for p, state in self.state.items() if "old_p" in state]
        if not moved:
            return super().second_step(zero_grad)
        with torch.no_grad():
            for p, old in moved:
                p.copy_(old)
        self.base_optimizer.step()
        if zero_grad:
            self.zero_grad()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore
        if closure is None or type(self).first_step is ascent.SAM.first_step:
            return super().step(closure)
        # first_step is a subclass's own, which the sharpener does not know of
        with torch.enable_grad():
            self.zero_grad()
            loss = closure()
            self.first_step(zero_grad=True)
            closure()
        self.second_step()
        return loss

    step.hooked = True  # pyright: ignore[reportFunctionMemberAccess]  the base optimizer's step runs the hooks


class ASAM(SAM):
    """SAM with ε = ρ w²g/‖|w| g‖ on every tensor, biases too, for which ρ = 2 is usual.

    With ``eta`` it is the paper's form (arXiv:2102.11600): T = |w| + η on weights and, unless ``biases``, T = 1 on
    biases, for which ρ = 0.5 is usual. With bare parameters, tensors of one dimension count as biases.
    """

    def __init__(self, params: Any, base_optimizer: Base, rho: Any = 2.0, *, eta: float | None = None,
                 biases: bool = False, **options: Any):
        if eta is not None:
            options["direction"] = ascent.Adaptive(eta, biases=biases)
        super().__init__(params, base_optimizer, rho, adaptive=eta is None, **options)


class LookSAM(SAM):
    """SAM every k steps, the first included, re-using its sharpness component between (arXiv:2203.02714).

    ``step(closure)`` evaluates once on the steps between; ``first_step`` and ``second_step`` cannot save the pass.
    ``alpha=0`` takes plain steps between.
    """

    def __init__(self, params: Any, base_optimizer: Base, rho: Any = 0.05, k: int = 5, alpha: float = 0.7,
                 **options: Any):
        reuse = ascent.Reuse(alpha) if alpha else None
        super().__init__(params, base_optimizer, rho, cadence=ascent.Every(k, reuse), **options)

    @property
    def k(self) -> int:
        return cast(ascent.Every, self.sharpener.cadence).k

    @property
    def step_count(self) -> int:
        """Steps taken."""
        return self.sharpener.state_dict()["step"]

    def should_apply_sam(self) -> bool:
        """Whether the next step evaluates twice."""
        return self.sharpener.cadence(self.step_count)


@final
@dataclass(frozen=True)
class LargestGradients:
    """ε = ρ g/‖g‖ on the ``fraction`` of the tensors whose gradients have the largest norms, at least one of them.

    The norm is over these tensors, so that ‖ε‖ = ρ. Choosing them reads their norms on the host once a step.
    """

    fraction: float = 0.5
    needs_gradient = True
    needs_optimizer = False
    counts_steps = False

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ValueError(f"the fraction of tensors to perturb must lie in (0, 1], got {self.fraction}")

    def __call__(self, info: AscentInfo) -> Ascent:
        norms = info.space.norms(info.gradient).tolist()
        order = sorted(range(len(norms)), key=norms.__getitem__, reverse=True)
        chosen = set(order[:max(1, int(self.fraction * len(norms)))])
        return Gradient()(info.only([i in chosen for i in range(len(norms))]))


class EfficientSAM(SAM):
    """SAM that moves only the ``perturbation_ratio`` of the tensors with the largest gradients.

    It saves no pass: both gradients are of all tensors. Measured in floating-point operations a step costs 2.00 plain
    steps, as SAM does. ESAM proper saves by leaving out samples: ``flatmin.presets.esam``. LookSAM (1.2 plain steps)
    and MomentumSAM (1.0) save more. A random part of the tensors is ``direction=flatmin.ascent.RandomFraction()``.
    """

    def __init__(self, params: Any, base_optimizer: Base, rho: Any = 0.05, perturbation_ratio: float = 0.5,
                 **options: Any):
        super().__init__(params, base_optimizer, rho, direction=LargestGradients(perturbation_ratio), **options)

    @property
    def perturbation_ratio(self) -> float:
        return cast(LargestGradients, self.sharpener.direction).fraction


@final
@dataclass(frozen=True)
class AgainstAverage:
    """ε = −ρ m/‖m‖ with m the average gradient that the optimizer's state holds as "perturbation_buffer"."""

    momentum: float = 0.9
    needs_gradient = False
    needs_optimizer = True
    counts_steps = False

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ValueError(f"the perturbation's momentum must lie in [0, 1), got {self.momentum}")

    def __call__(self, info: AscentInfo) -> Ascent:
        assert info.optimizer is not None
        states = [info.optimizer.state.get(p.parameter, {}) for p in info.parameters]
        d = [torch.zeros_like(w) if "perturbation_buffer" not in state
             else local(state["perturbation_buffer"]).neg() for w, state in zip(info.w, states, strict=True)]
        return Ascent(info, d, info.space.norm(d))


class MomentumSAM(SAM):
    """SAM along minus an average of past gradients, m ← μ m + (1 − μ) g: ``step(closure)`` evaluates once.

    ε = −ρ m/‖m‖ (Momentum-SAM, arXiv:2401.12033, which reports that the plus sign of common copies harms accuracy).
    μ is ``perturbation_momentum``; with None, m is the base optimizer's own momentum, as in the paper. In the first
    step ε = 0. The paper's radii are near 3.
    """

    def __init__(self, params: Any, base_optimizer: Base, rho: Any = 0.05,
                 perturbation_momentum: float | None = 0.9, **options: Any):
        direction = ascent.Momentum() if perturbation_momentum is None else AgainstAverage(perturbation_momentum)
        super().__init__(params, base_optimizer, rho, direction=direction, **options)

    @property
    def perturbation_momentum(self) -> float | None:
        return getattr(self.sharpener.direction, "momentum", None)

    def second_step(self, zero_grad: bool = False) -> None:
        super().second_step()
        self._average()
        if zero_grad:
            self.zero_grad()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore
        loss = super().step(closure)
        self._average()
        return loss

    step.hooked = True  # pyright: ignore[reportFunctionMemberAccess]

    @torch.no_grad()
    def _average(self) -> None:
        """After the base optimizer's step, whose own state is complete then: fill m with this step's gradients."""
        mu = self.perturbation_momentum
        for p in itertools.chain.from_iterable(group["params"] for group in self.param_groups if mu is not None):
            if p.grad is not None:
                m = self.state[p].setdefault("perturbation_buffer", torch.zeros_like(p))
                m.lerp_(p.grad.to(m.dtype), 1 - cast(float, mu))


class MemoryEfficientSAM(SAM):
    """SAM with the copy of w in the host's memory, and a step that recomputes activations segment by segment.

    On an accelerator the optimizer then needs the weights and one gradient, as a plain step does. Measured on 16 pairs
    of a linear layer and tanh, at a batch so large that activations dominate, the peak of a step is 0.67 of SAM's with
    2 segments and 0.57 with 4. With 2 it costs 2.3 plain steps.
    """

    def __init__(self, params: Any, base_optimizer: Base, rho: Any = 0.05, checkpoint_segments: int = 2,
                 **options: Any):
        if checkpoint_segments < 1:
            raise ValueError(f"checkpoint_segments must be at least 1, got {checkpoint_segments}")
        super().__init__(params, base_optimizer, rho, **{"offload": True, **options})
        self.checkpoint_segments = checkpoint_segments

    def step_with_checkpointing(self, model: nn.Sequential, inputs: Tensor, targets: Any,
                                loss_fn: Callable[[Tensor, Any], Tensor]) -> float:
        """One step of a sequential model in ``checkpoint_segments`` segments; returns the loss at w.

        Each pass keeps the inputs of the segments and the activations of one. BatchNorm statistics move once.

        Raises:
            ValueError: the model is not an ``nn.Sequential``.
        """
        if not isinstance(model, nn.Sequential):
            raise ValueError(f"step_with_checkpointing takes an nn.Sequential, which it can cut, and got a "
                             f"{type(model).__name__}: switch on the model's own activation checkpointing and call "
                             "step(closure)")
        layers = list(model)
        size = max(1, math.ceil(len(layers) / self.checkpoint_segments))
        segments = [nn.Sequential(*layers[i:i + size]) for i in range(0, len(layers), size)] or [model]
        calls = itertools.count()

        def closure() -> Tensor:
            self.zero_grad()
            first = next(calls) == 0
            with nullcontext() if first else unchanged_buffers(model):
                z: Any = inputs
                for segment in segments[:-1]:
                    z = checkpoint(segment, z, use_reentrant=False,
                                   context_fn=lambda: (nullcontext(), unchanged_buffers(model)))
                loss = loss_fn(segments[-1](z), targets)     # needed first: nothing to gain by recomputing it
                loss.backward()
            return loss.detach()

        return float(self.step(closure))

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"checkpoint_segments": self.checkpoint_segments}


def enable_running_stats(model: nn.Module) -> None:
    """Let BatchNorm layers update their running statistics again after ``disable_running_stats``."""
    for module in _with_running_statistics(model):
        module.track_running_stats = True


def disable_running_stats(model: nn.Module) -> None:
    """Keep BatchNorm layers in training mode from updating their running statistics, as in a second pass.

    Momentum is not touched, ``num_batches_tracked`` stands still too, and calling it twice does no harm.
    """
    for module in _with_running_statistics(model):
        module.track_running_stats = False


def _with_running_statistics(model: nn.Module) -> Iterator[Any]:
    """BatchNorm layers built with ``track_running_stats=True``: those that have the buffers."""
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    return (module for module in model.modules() if isinstance(module, kinds) and module.running_mean is not None)


def compute_sam_sharpness(model: nn.Module, loss_fn: Callable[..., Tensor], inputs: Tensor, targets: Tensor,
                          rho: float = 0.05) -> float:
    """L(w + ρĝ) − L(w), ĝ = g/‖g‖, in eval mode; the model is left bit for bit as it was.

    >>> model = nn.Linear(1, 1, bias=False)
    >>> target = model.weight.detach() - 1                              # L = (u + 1)², g = 2
    >>> round(compute_sam_sharpness(model, nn.MSELoss(), torch.ones(8, 1), target.expand(8, 1), rho=0.1), 4)
    0.21
    """
    return float(one_step(Objective(model, loss_fn, (inputs, targets)), rho, second_order=False))


def compute_hessian_vector_product(model: nn.Module, loss_fn: Callable[..., Tensor], inputs: Tensor, targets: Tensor,
                                   vector: Tensor) -> Tensor:
    """H v for a flat v, in eval mode; flat, in the order of the parameters that require a gradient."""
    return cast(Tensor, Hessian(Objective(model, loss_fn, (inputs, targets))).matvec(vector))


def power_iteration_top_eigenvalue(model: nn.Module, loss_fn: Callable[..., Tensor], inputs: Tensor, targets: Tensor,
                                   n_iterations: int = 100, tol: float = 1e-6) -> float:
    """The algebraically largest eigenvalue of the Hessian in eval mode, by Lanczos.

    Plain power iteration returns the eigenvalue of largest magnitude, which may be the most negative one.

    Args:
        n_iterations: Hessian-vector products at most; beyond, a warning.
        tol: of the eigenvalue, relative. Its error is of the order of the residual's square, so the residual is asked
            to be √tol.
    """
    H = Hessian(Objective(model, loss_fn, (inputs, targets)))
    return eigenpairs(H, 1, tol=math.sqrt(tol), max_matvecs=n_iterations).largest


def train_sam_with_accumulation(model: nn.Module, train_loader: Iterable[Any], optimizer: ascent.SAM,
                                accumulation_steps: int = 4, device: Any = None,
                                loss_fn: Callable[..., Tensor] = F.cross_entropy) -> float:
    """One epoch with one SAM step for every ``accumulation_steps`` batches; returns the mean loss at w.

    Both passes go over all batches of a step, weighted by samples, so that the step is that of the merged batch. The
    last step takes the batches that are left. BatchNorm statistics move in the first pass alone. ``device`` is the
    model's by default.

    Raises:
        ValueError: fewer than one batch a step.
    """
    if accumulation_steps < 1:
        raise ValueError(f"accumulation_steps must be at least 1, got {accumulation_steps}")
    model.train()
    batches, losses, samples = iter(train_loader), 0.0, 0
    while group := [_moved(batch, model, device) for batch in itertools.islice(batches, accumulation_steps)]:
        n = sum(len(targets) for _, targets in group)
        losses += n * float(optimizer.step(_closure(model, group, optimizer, loss_fn)))
        samples += n
    return losses / samples if samples else math.nan


def _closure(model: nn.Module, group: Sequence[tuple[Any, Tensor]], optimizer: ascent.SAM,
             loss_fn: Callable[..., Tensor]) -> Callable[[], Tensor]:
    """Forward and backward over a group of batches; from the second call on buffers are left as they are."""
    n, calls = sum(len(targets) for _, targets in group), itertools.count()

    def closure() -> Tensor:
        optimizer.zero_grad()
        total = torch.zeros(())
        with nullcontext() if next(calls) == 0 else unchanged_buffers(model):
            for inputs, targets in group:
                loss = loss_fn(model(inputs), targets) * (len(targets) / n)
                loss.backward()
                total = total.to(loss) + loss.detach()
        return total
    return closure


def train_sam_distributed(model: nn.Module, train_loader: Iterable[Any], optimizer: ascent.SAM, device: Any = None,
                          loss_fn: Callable[..., Tensor] = F.cross_entropy) -> float:
    """One epoch in which each rank perturbs by its own gradient, and the gradients there are averaged (m-sharpness).

    The first forward and backward are both inside ``no_sync``: around backward alone it has no effect. BatchNorm
    statistics move in the first pass alone. Returns this rank's mean loss at w. ``device`` is the model's by default.

    Raises:
        ValueError: the model is not wrapped in DistributedDataParallel.
    """
    if not isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError(f"the model must be wrapped in DistributedDataParallel, and is a {type(model).__name__}: wrap "
                         "it, or use flatmin.Sharpener, which knows other wrappers")
    model.train()
    losses, count = 0.0, 0
    for inputs, targets in (_moved(batch, model, device) for batch in train_loader):
        optimizer.zero_grad()
        with model.no_sync():
            loss = loss_fn(model(inputs), targets)
            loss.backward()
        optimizer.first_step(zero_grad=True)
        try:
            with unchanged_buffers(model):
                loss_fn(model(inputs), targets).backward()
        except BaseException:
            optimizer.restore()
            raise
        optimizer.second_step(zero_grad=True)
        losses, count = losses + loss.item(), count + 1
    return losses / count if count else math.nan


def _moved(batch: Any, model: nn.Module, device: Any) -> tuple[Any, Tensor]:
    inputs, targets = batch
    device = device or next(model.parameters()).device
    return inputs.to(device), targets.to(device)
