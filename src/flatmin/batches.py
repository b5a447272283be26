"""What a batch is, how many terms its loss averages, and why two evaluations of it differ."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

if TYPE_CHECKING:
    from .objective import Objective


class _Single:
    """One batch as data."""

    def __init__(self, batch: Any):
        self.batch = batch

    def __iter__(self) -> Iterator[Any]:
        yield self.batch

    def __len__(self) -> int:
        return 1


def as_data(data: Any, *, any_form: bool) -> Any:
    """Data as something that can be iterated over batches any number of times."""
    if isinstance(data, (Mapping, tuple, Tensor)) or _is_pair(data):
        if not any_form and not isinstance(data, Mapping) and not (isinstance(data, (tuple, list)) and len(data) == 2):
            raise ValueError("a batch is (inputs, targets) or a mapping; pass forward= for any other form")
        return _Single(data)
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


def _is_pair(batch: Any) -> bool:
    return isinstance(batch, list) and len(batch) == 2 and all(isinstance(t, Tensor) for t in batch)


def move(batch: Any, device: torch.device) -> Any:
    """A batch with its tensors on a device; the caller's own is not changed."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        if all(t.device == device for t in tree_leaves(dict(batch)) if isinstance(t, Tensor)):
            return batch
        out: Any = copy.copy(batch)
        for key, value in batch.items():
            out[key] = move(value, device)
        return out
    return tree_map(lambda t: t.to(device) if isinstance(t, Tensor) else move(t, device) if isinstance(t, Mapping)
                    else t, batch)


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
        return _samples(dict(batch))
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
    first = next((t for t in tree_leaves(batch) if isinstance(t, Tensor)), None)
    if first is None:
        raise ValueError("cannot tell how many terms this batch averages: pass weight=, a function of the batch")
    return float(first.shape[0] if first.dim() else 1)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside compiled and data-parallel wrappers."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and type(model).__name__ in ("DistributedDataParallel", "DataParallel"):
            inner = getattr(model, "module", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def predicts_next_label(model: nn.Module) -> bool:
    """Whether a model of the ``transformers`` library compares position t with label t + 1 by itself."""
    model = unwrapped(model)
    name = type(model).__name__
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    if "WithLMHead" in name or name.startswith("XLNet"):
        return False
    return name.endswith(("ForCausalLM", "LMHeadModel")) or getattr(model, "loss_type", None) == "ForCausalLM"


def own_loss(outputs: Any) -> Tensor:
    """The loss that a model returned itself."""
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    if loss is None:
        raise ValueError("model(**batch) returned no loss: put labels into the batch, or pass loss_fn(outputs, batch) "
                         "or forward=")
    return loss


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


def culprit(objective: Objective) -> str:
    """Why two evaluations of an objective differ, as the end of a sentence."""
    with objective.session(), torch.no_grad():
        term = next(iter(objective.terms()), None)
        runs: list[Any] = []
        given = None if term is None else tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t,
                                                   _plain(term.batch))
        for shift in () if term is None else (0, 0 if objective.mode in ("train", "as_is") else 1):
            objective._model_seed = objective.seed + shift
            runs.append(_trace(objective, term))
        if term is not None and not _equal(given, term.batch):
            return "the model or the loss changes its batch in place. Let it work on a copy of its input"
        for (name, kind, a), (_, _, b) in zip(*runs, strict=False) if runs else ():
            if not _equal(a, b):
                where = f"module {name!r}" if name else "the model"
                return (f"{where} ({kind}) is random although it is evaluated in mode {objective.mode!r}. Make it "
                        'respect .eval(), or pass mode="train" to hold its draws fixed')
        first, second = ([t.batch for t in objective.terms()] for _ in range(2))
        if len(first) != len(second) or not all(map(_equal, first, second)):
            return "the data differ from pass to pass. Switch random augmentation off, or pass a list of batches"
    return "the loss function itself, or code between the modules, is random"


def _trace(objective: Objective, term: Any) -> list[tuple[str, str, Any]]:
    seen: list[tuple[str, str, Any]] = []
    hooks = [m.register_forward_hook(lambda m, _, out, name=name: seen.append((name, type(m).__name__, out)))
             for name, m in objective.model.named_modules()]
    try:
        term.loss(term.outputs())
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _plain(batch: Any) -> Any:
    return dict(batch) if isinstance(batch, Mapping) else batch


def _equal(a: Any, b: Any) -> bool:
    left, right = (tree_leaves(_plain(x)) for x in (a, b))
    pairs = [(x, y) for x, y in zip(left, right, strict=False) if isinstance(x, Tensor)]
    return len(left) == len(right) and all(x.shape == y.shape and torch.equal(x, y) for x, y in pairs)
