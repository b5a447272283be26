"""Second derivatives by a second reverse pass, and the reasons why a model may have none."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..batches import unwrapped
from ..objective import Objective
from .linearization import ZERO, LinearMap, Parts


class NoSecondDerivative(RuntimeError):
    """Autograd cannot differentiate the gradient of this model, or is known to do it wrong."""


def derivative_of_gradient(loss: Tensor, w: list[nn.Parameter]) -> LinearMap:
    """v ↦ ∇²loss · v by a second reverse pass over the graph of the gradient."""
    if not loss.requires_grad:
        return ZERO
    # From a constant, functions that are once_differentiable make constants, and leave no mark in the graph.
    one = torch.ones_like(loss, requires_grad=True)
    roots, used = differentiable_gradient(loss, w, one)
    if not roots:
        return ZERO

    def derivative(v: Sequence[Tensor], retain_graph: bool, batched: bool = False) -> Parts:
        return torch.autograd.grad(roots, w, [v[i] for i in used], retain_graph=retain_graph, allow_unused=True,
                                   is_grads_batched=batched)

    # torch cannot tell whether the Python code of a custom function takes a block of vectors
    custom = any(isinstance(node, torch.autograd.function.BackwardCFunction) for node in _nodes(roots))
    return LinearMap(derivative, None if custom else lambda v, retain_graph: derivative(v, retain_graph, True))


def differentiable_gradient(z: Tensor, w: list[nn.Parameter], u: Tensor) -> tuple[list[Tensor], list[int]]:
    """The parts of ∂⟨u, z⟩/∂w that depend on anything, with their graph, and their positions in w.

    Raises ``NoSecondDerivative`` where that graph is cut off (such a node has no way back to the parameters, so that
    autograd leaves its part out in silence), or has a derivative that torch has wrong.
    """
    if wrong := {name for node in _nodes([z]) if (name := node.name()).startswith(_WRONG_THIRD_DERIVATIVE)}:
        raise NoSecondDerivative(f"torch has wrong third derivatives of {', '.join(sorted(wrong))}, which this loss "
                                 "needs because it differentiates inside")
    g = torch.autograd.grad(z, w, u, create_graph=True, allow_unused=True)
    used = [i for i, t in enumerate(g) if t is not None and t.requires_grad]
    roots: list[Any] = [g[i] for i in used]
    if {node.name() for node in _nodes(roots)} & {"torch::autograd::Error", "torch::autograd::NotImplemented"}:
        raise NoSecondDerivative("a function of this model is marked once_differentiable, or torch has no derivative "
                                 "of its backward pass")
    return roots, used


_WRONG_THIRD_DERIVATIVE = tuple(f"{kind}NormBackwardBackward" for kind in ("NativeLayer", "NativeBatch", "CudnnBatch",
                                                                           "MiopenBatch"))


def _nodes(roots: Sequence[Tensor]) -> set[Any]:
    """All nodes of a graph."""
    seen: set[Any] = set()
    stack: list[Any] = [t.grad_fn for t in roots]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            stack.extend(following for following, _ in node.next_functions)
    return seen


@contextmanager
def second_derivatives(objective: Objective) -> Iterator[None]:
    """Inside, kernels are used that can be differentiated twice: plain attention, native recurrent layers."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with ExitStack() as stack, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*performance drop because we have not yet implemented.*")
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if objective.device.type == "cuda" and any(isinstance(m, nn.RNNBase) for m in
                                                   unwrapped(objective.model).modules()):
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        yield
