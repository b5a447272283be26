"""What a batch is, how many terms its loss averages, and what data draw from."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader, Dataset, Sampler

from .parallel import unwrapped


class Single:
    """One batch as data."""

    def __init__(self, batch: Any):
        self.batch = batch

    def __iter__(self) -> Iterator[Any]:
        yield self.batch

    def __len__(self) -> int:
        return 1


def as_data(data: Any, *, any_form: bool) -> Any:
    """Data as something that can be iterated over batches any number of times."""
    if isinstance(data, (Mapping, tuple, Tensor)) or is_pair(data):
        if not any_form and not isinstance(data, Mapping) and not (isinstance(data, (tuple, list)) and len(data) == 2):
            raise ValueError("a batch is (inputs, targets) or a mapping; pass forward= for any other form")
        return Single(data)
    if isinstance(data, list):
        if not data:
            raise ValueError("data is an empty list: pass at least one batch")
        return data
    if hasattr(data, "__next__"):
        raise ValueError("data is an iterator, which can be read only once, and a measurement reads it many times: "
                         "pass list(data), or the DataLoader itself")
    if not hasattr(data, "__iter__"):
        if hasattr(data, "__getitem__"):
            raise ValueError("data is a data set of single samples: pass torch.utils.data.DataLoader(data, batch_size)")
        raise ValueError(f"data must be a batch, a list of batches or a loader, got {type(data).__name__}")
    return data


def described(data: Any) -> str:
    """What data are, in a few words, without reading them."""
    if isinstance(data, Single):
        return f"one batch of {samples_in(data.batch)}"
    return f"{len(data)} batches" if isinstance(data, list) else type(data).__name__


def is_pair(batch: Any) -> bool:
    """Whether a list is one batch, [inputs, targets], rather than a list of batches."""
    return isinstance(batch, list) and len(batch) == 2 and all(isinstance(t, Tensor) for t in batch)


def move(batch: Any, device: torch.device) -> Any:
    """A batch with its tensors on a device; the caller's own is not changed."""
    if all(t.device == device for t in tensors(batch)):
        return batch
    return each_tensor(batch, lambda t: t.to(device))


def copied(batch: Any) -> Any:
    """A batch with tensors of its own, so that a model or a loss may change them in place."""
    return each_tensor(batch, lambda t: t.detach().clone().requires_grad_() if t.requires_grad else t.clone())


def each_tensor(batch: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """A batch with ``function`` of its tensors in their place."""
    if isinstance(batch, Mapping):
        out: Any = copy.copy(batch)
        for key, value in batch.items():
            out[key] = each_tensor(value, function)
        return out
    return tree_map(lambda t: function(t) if isinstance(t, Tensor) else each_tensor(t, function)
                    if isinstance(t, Mapping) else t, batch)


def tensors(batch: Any) -> list[Tensor]:
    """The tensors of a batch, or of whatever a model gave."""
    return [t for t in leaves(batch) if isinstance(t, Tensor)]


def leaves(batch: Any) -> list[Any]:
    """What a batch holds, in order; inside mappings of any kind too."""
    if isinstance(batch, Mapping):
        return [leaf for value in batch.values() for leaf in leaves(value)]
    return [leaf for part in tree_leaves(batch) for leaf in (leaves(part) if isinstance(part, Mapping) else [part])]


def equal(a: Any, b: Any) -> bool:
    """Whether the tensors of two batches are the same, number by number."""
    left, right = leaves(a), leaves(b)
    pairs = [(x, y) for x, y in zip(left, right, strict=False) if isinstance(x, Tensor) and isinstance(y, Tensor)]
    return len(left) == len(right) and all(x.shape == y.shape and torch.equal(x, y) for x, y in pairs)


def samples(batch: Any, wanted: slice) -> Any:
    """Some samples of a batch, or None where a tensor of it has not one row a sample."""
    n = samples_in(batch)
    if not all(t.dim() and len(t) == n for t in tensors(batch)):
        return None
    return each_tensor(batch, lambda t: t[wanted])


def merged(a: Any, b: Any) -> Any:
    """The samples of two batches as one batch, or None where their tensors cannot be concatenated."""
    if isinstance(a, Tensor) and isinstance(b, Tensor) and a.dim() and a.shape[1:] == b.shape[1:]:
        return torch.cat([a, b]) if a.dim() == b.dim() and a.dtype == b.dtype else None
    if isinstance(a, Mapping) and isinstance(b, Mapping) and list(a) == list(b):
        out: Any = copy.copy(a)
        parts = {key: merged(a[key], b[key]) for key in a}
        for key, value in parts.items():
            out[key] = value
        return None if any(value is None for value in parts.values()) else out
    if isinstance(a, (tuple, list)) and type(a) is type(b) and len(a) == len(b) and not hasattr(a, "_fields"):
        found = [merged(x, y) for x, y in zip(a, b, strict=True)]
        return None if any(part is None for part in found) else type(a)(found)
    return None


def generators(data: Any) -> list[torch.Generator]:
    """The generators that a loader, its samplers and its data set hold as attributes."""
    found: dict[int, torch.Generator] = {}
    seen: dict[int, Any] = {}
    waiting = [data]
    while waiting:
        owner = waiting.pop()
        if id(owner) in seen:
            continue
        seen[id(owner)] = owner
        for value in list(getattr(owner, "__dict__", {}).values()):
            if isinstance(value, torch.Generator):
                found[id(value)] = value
            elif isinstance(value, (DataLoader, Sampler, Dataset)):
                waiting.append(value)
    return list(found.values())


def option(loss_fn: Any, name: str) -> Any:
    """An option of a loss: an attribute of a module, or a keyword of a partial function."""
    if isinstance(loss_fn, functools.partial):
        return loss_fn.keywords.get(name)
    return getattr(loss_fn, name, None) if isinstance(loss_fn, nn.Module) else None


def base_function(loss_fn: Any) -> Any:
    """The function under ``functools.partial``."""
    return base_function(loss_fn.func) if isinstance(loss_fn, functools.partial) else loss_fn


def terms(batch: Any, loss_fn: Callable[..., Any] | None, shift: bool) -> float:
    """How many terms the mean loss of a batch is over, by the rule that ``Objective`` states."""
    ignore = option(loss_fn, "ignore_index")
    ignore = -100 if ignore is None else ignore
    if isinstance(batch, Mapping):
        if isinstance(batch.get("shift_labels"), Tensor):
            return float((batch["shift_labels"] != ignore).sum())
        labels = batch.get("labels")
        if isinstance(labels, Tensor):
            if labels.is_floating_point():
                return float(labels.numel())
            return float((labels[..., 1:] if shift else labels).ne(ignore).sum())
        return _samples(batch)
    targets = batch[1] if isinstance(batch, (tuple, list)) and len(batch) == 2 else None
    if not isinstance(targets, Tensor):
        return _samples(batch)
    if option(loss_fn, "reduction") == "batchmean":
        return float(targets.shape[0])
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        return float(targets.numel())
    valid = targets != ignore
    classes = option(loss_fn, "weight")
    if isinstance(classes, Tensor) and _weighs_classes(base_function(loss_fn)):
        return float(classes.double()[targets[valid].to(classes.device)].sum())
    return float(valid.sum())


def _weighs_classes(loss_fn: Any) -> bool:
    return isinstance(loss_fn, (nn.CrossEntropyLoss, nn.NLLLoss)) or loss_fn in (F.cross_entropy, F.nll_loss)


def _samples(batch: Any) -> float:
    if not tensors(batch):
        raise ValueError("cannot tell how many terms this batch averages: pass weight=, a function of the batch")
    return float(samples_in(batch))


def samples_in(batch: Any) -> int:
    """How many samples a batch holds: the length of its first tensor."""
    first = next(iter(tensors(batch)), None)
    return first.shape[0] if first is not None and first.dim() else 1


def predicts_next_label(model: nn.Module) -> bool:
    """Whether a model of the ``transformers`` library compares position t with label t + 1 by itself."""
    model = unwrapped(model)
    name = type(model).__name__
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    if "WithLMHead" in name or name.startswith("XLNet"):
        return False
    return name.endswith(("ForCausalLM", "LMHeadModel")) or getattr(model, "loss_type", None) == "ForCausalLM"


def own_loss(outputs: Any, batch: Mapping[str, Any]) -> Tensor:
    """The loss that a model returned itself."""
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    if loss is None:
        raise ValueError(f"model(**batch) returned no loss for a batch with {', '.join(map(repr, batch))}: "
                         "put 'labels' into the batch, or pass loss_fn(outputs, batch)")
    return loss


def of_torch(loss_fn: Any) -> bool:
    """Whether a loss is one of ``torch.nn``: a function of two tensors."""
    base = base_function(loss_fn)
    base = type(base) if isinstance(base, nn.Module) else base
    return getattr(base, "__module__", None) in (nn.modules.loss.__name__, F.__name__)


def logits(outputs: Any) -> Tensor:
    """The one tensor of outputs that a loss is taken of."""
    if isinstance(outputs, Tensor):
        return outputs
    found = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    if found is None:
        found = [t for t in tree_leaves(outputs) if isinstance(t, Tensor) and t.is_floating_point()]
        found = found[0] if len(found) == 1 else None
    if not isinstance(found, Tensor):
        raise ValueError("the outputs must be one tensor, or have .logits, for this measure")
    return found


@contextmanager
def eager(model: nn.Module) -> Iterator[None]:
    """Run compiled modules uncompiled: compiled code has no second derivative."""
    if not any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in model.modules()):
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
