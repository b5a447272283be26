"""What only the graph of a pass shows, looked at in the first step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.nn.modules.module import register_module_forward_pre_hook


class Inspection:
    """Called with the roots of each graph before it is back-propagated; later steps mostly pay nothing.

    A leaf outside the model that both passes reach would collect g + g_p. A parameter is refused. Any other tensor,
    such as an input that requires a gradient, gets its gradient at w + ε alone; where there is one, every step is
    looked at. A leaf that a forward makes anew is met in one pass only, and nobody reads its gradient.
    """

    def __init__(self, parameters: Iterable[Tensor], leaves: bool):
        self._parameters = list(parameters)
        self._leaves = leaves
        self._met: dict[int, tuple[Tensor, Tensor | None]] = {}  # in the first pass, with their gradient before
        self._second = False  # the pass at w + ε has begun
        self.done = False
        self._looked = False
        self._dtype_matters = False  # own autograd functions or recomputed modules see the dtype of the weights

    def __call__(self, roots: list[Tensor]) -> None:
        known = {id(p) for p in self._parameters}
        for node in _nodes(roots):
            self._dtype_matters |= isinstance(node, BackwardCFunction)
            if self._leaves and type(node).__name__ == "AccumulateGrad":
                self._meet(node.variable, known)  # pyright: ignore[reportAttributeAccessIssue]
        self._looked = True

    @property
    def flexible(self) -> bool:
        """Whether a pass was seen, and nothing in it that the dtype of the weights matters to."""
        return self._looked and not self._dtype_matters

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Around a back-propagation: notices modules that run again inside it."""
        handle = register_module_forward_pre_hook(self._recomputed)
        try:
            yield
        finally:
            handle.remove()

    def _recomputed(self, *_: object) -> None:
        self._dtype_matters = True

    def _meet(self, leaf: Tensor, known: set[int]) -> None:
        if id(leaf) in known:
            return
        if not self._second:
            self._met.setdefault(id(leaf), (leaf, None if leaf.grad is None else leaf.grad.clone()))
        elif id(leaf) in self._met and isinstance(leaf, nn.Parameter):
            self._put_back()
            raise ValueError(
                f"the loss reaches a trainable parameter of shape {tuple(leaf.shape)} outside the model, which would "
                "receive the gradients of both passes: put its module into the model "
                "(torch.nn.ModuleList([model, head])), or detach it")

    def begin(self) -> None:
        """A step starts; one before may have failed."""
        self._second, self._met = False, {}

    def begin_second(self) -> None:
        """Between the passes: tensors outside the model have the gradients that they had before the first."""
        self._second = True
        self._put_back()

    def _put_back(self) -> None:
        for tensor, before in self._met.values():
            tensor.grad = before

    def finish(self) -> None:
        """The step is over."""
        self.done = not self._met


def _nodes(roots: list[Tensor]) -> Iterator[torch.autograd.graph.Node]:
    stack = [t.grad_fn for t in roots if t.grad_fn is not None]
    seen = set(stack)
    while stack:
        node = stack.pop()
        yield node
        for below, _ in node.next_functions:
            if below is not None and below not in seen:
                seen.add(below)
                stack.append(below)
