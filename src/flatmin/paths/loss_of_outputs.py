"""Whether a loss depends on the weights through the outputs alone, as the split of the Hessian needs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from .. import batches
from ..objective import Objective


def checked(objective: Objective) -> Objective:
    """The same objective, whose losses raise a ValueError where they reach weights other than through the outputs.

    The check reads the graph that the loss has anyway, from the loss to the outputs: no pass and no memory.
    """
    names = {id(p): name for name, p in objective.model.named_parameters()}

    def check(outputs: Any, loss: Tensor) -> None:
        leaves = [names.get(id(leaf)) for leaf in reached_beside(batches.logits(outputs), loss)]
        if objective.ranks.in_step:     # FSDP2 runs on gathered weights, which have no names
            leaves = [name or "sharded weights" for name in leaves]
        if reached := sorted({name for name in leaves if name}):
            raise ValueError(_message(reached, own=objective.loss_fn is None))

    return objective.with_loss_check(check)


def reached_beside(z: Tensor, loss: Tensor) -> Iterator[Tensor]:
    """The leaves of the graph that a loss reaches on a way that does not lead through z."""
    through = (z.grad_fn, z.output_nr)
    seen: set[Any] = set()
    stack: list[Any] = [(loss.grad_fn, loss.output_nr)]
    while stack:
        node, number = stack.pop()
        if node is None or node in seen or (node, number) == through:
            continue
        seen.add(node)
        if node.name() == "torch::autograd::AccumulateGrad":
            if node.variable is not z:
                yield node.variable
        else:
            stack.extend(node.next_functions)


def _message(reached: list[str], own: bool) -> str:
    some = ", ".join(reached[:4]) + (f" and {len(reached) - 4} more" if len(reached) > 4 else "")
    what = "the loss that the model returns" if own else "loss_fn"
    do = ("pass a loss of the logits, loss_fn=lambda outputs, batch: ..., without the auxiliary parts (a router's "
          "balance loss, say)") if own else (
          "leave that part out (a weight penalty, an auxiliary loss, a second run of the model, a gradient penalty)")
    return (f"{what} depends on weights beside the outputs ({some}), so its Hessian is not the sum of a logit and a "
            f"functional part: {do}; what is left out has a Hessian of its own that can be added")
