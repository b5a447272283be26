"""The TensorScope pipeline: the names and signatures of its documentation, each a few lines over this library.

Everything returned is a plain float, list or dict. It differs from that documentation in four points. One-step
sharpness is ρ‖g‖ + ½ρ²ĝᵀHĝ + ... and not ½ρ²λ₁. Measures that disagree give a warning and not an assertion. All batches
count and not the first alone. An indefinite Hessian has no condition number.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from . import batches, parallel
from .curvature import Hessian, condition_number, eigenpairs, trace
from .curvature.measures import MEASURES as CURVATURE
from .landscape.measures import MEASURES as LANDSCAPE
from .measures import METRICS as OFFERED
from .measures import Options
from .objective import Objective
from .results import Scalar, plain
from .sharpness import Agreement, agreement, compare, first_order, one_step, scaled_radius
from .sharpness.cautions import DisagreementWarning
from .sharpness.measures import MEASURES as SHARPNESS

__all__ = ["ICLRMetrics", "ModularityMetrics", "UnifiedModelAnalysis", "compare_model_sharpness",
           "compute_hessian_eigenvalues", "compute_hessian_eigenvalues_lanczos", "compute_sam_sharpness",
           "objective_for"]

Loss = Callable[..., Tensor] | None
INPUTS = ("input_ids", "inputs", "pixel_values", "images", "image", "x")
TARGETS = ("labels", "targets", "label", "target", "y")


def compute_sam_sharpness(model: nn.Module, batch: Any, epsilon: float = 0.01, adaptive_epsilon: bool = False, *,
                          loss_fn: Loss = None) -> float:
    """L(w + εĝ) − L(w), the rise of the loss over a step of length ε along the gradient.

    Two forward passes and a backward one, in the memory of weights and one gradient; the model is left bit for bit as
    it was.

    Args:
        model: any module; evaluated in eval mode.
        batch: a mapping with ``input_ids`` and, where there is padding, ``attention_mask`` (``labels`` default to the
            shifted inputs, without padding); a mapping with inputs and labels; a pair (inputs, targets); or several
            of them, in a list or a loader.
        epsilon: the radius.
        adaptive_epsilon: scale it by model size, ε √(d / 10⁶).
        loss_fn: ``loss_fn(outputs, targets)`` for pairs; by default cross-entropy, or the mean square for floating
            point targets.

    Raises:
        ValueError: a batch without what is needed; the message lists the choices.

    >>> import torch
    >>> model = torch.nn.Linear(2, 3)
    >>> isinstance(compute_sam_sharpness(model, (torch.randn(8, 2), torch.zeros(8, dtype=torch.long))), float)
    True
    """
    return float(one_step(objective_for(model, batch, loss_fn), epsilon, second_order=False,
                          adaptive_epsilon=adaptive_epsilon))


def compute_hessian_eigenvalues_lanczos(model: nn.Module, batch: Any, k: int = 20, *, loss_fn: Loss = None,
                                        seed: int = 0) -> dict[str, Any]:
    """The k algebraically largest eigenvalues of the Hessian, its trace and condition number, and what each is worth.

    Returns:
        ``max_eigenvalue``; ``top_eigenvalues``, largest first, with their ``residuals`` and whether they have
        ``converged``; ``trace`` and its ``trace_stderr``; ``condition_number``, nan with a
        ``condition_number_reason`` where the Hessian is indefinite or singular, as those of networks are; the
        ``smallest_eigenvalue`` that says so; ``matvecs``.

    >>> import torch
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> result = compute_hessian_eigenvalues_lanczos(model, (torch.eye(2).repeat(4, 1), torch.ones(8, 1)), k=2)
    >>> [round(x, 4) for x in result["top_eigenvalues"]], round(result["condition_number"], 4)
    ([1.0, 1.0], 1.0)
    """
    H = Hessian(objective_for(model, batch, loss_fn))
    found = eigenpairs(H, k, seed=seed, find_missing=True)
    with warnings.catch_warnings():     # what has not converged is said in the result
        warnings.simplefilter("ignore")
        total = trace(H, seed=seed, max_matvecs=200)
        condition = condition_number(H, tol=1e-3, seed=seed, max_matvecs=200)
    return {"max_eigenvalue": found.largest, "top_eigenvalues": found.eigenvalues.flip(0).tolist(),
            "residuals": found.residuals.flip(0).tolist(), "converged": found.converged.flip(0).tolist(),
            "condition_number": condition.value, "condition_number_reason": condition.reason,
            "smallest_eigenvalue": condition.smallest, "trace": total.value, "trace_stderr": total.stderr,
            "matvecs": found.matvecs + total.matvecs}


compute_hessian_eigenvalues = compute_hessian_eigenvalues_lanczos


class ModularityMetrics:
    """``compute_sam_sharpness`` under the class name of TensorScope."""

    compute_sam_sharpness = staticmethod(compute_sam_sharpness)


class ICLRMetrics:
    """``compute_hessian_eigenvalues_lanczos`` and ``compute_sam_sharpness`` under the class name of TensorScope."""

    compute_hessian_eigenvalues_lanczos = staticmethod(compute_hessian_eigenvalues_lanczos)
    compute_hessian_eigenvalues = staticmethod(compute_hessian_eigenvalues_lanczos)
    compute_sam_sharpness = staticmethod(compute_sam_sharpness)


TABLE = {**SHARPNESS, **CURVATURE, **LANDSCAPE}
UNDER_OTHER_NAMES = ("one_step", "spectrum", "agreement")   # "sam", "hessian" and the sanity check
METHODS = {"adaptive": "adaptive_worst_case"} | {name: name for name in OFFERED if name not in UNDER_OTHER_NAMES}
KEYS = {"worst_case": "worst_case_sharpness", "average_case": "average_case_sharpness",
        "adaptive_worst_case": "adaptive_sharpness"}
"""Where the key of a result is not the name of its measure."""
SHARPNESS_METHODS = ("hessian", "sam", *METHODS)
METRICS = ("sharpness", "loss", "gradient_norm")
OPTIONS = ("metrics", "sharpness_methods", "use_sam_as_sanity_check", "epsilon", "adaptive_epsilon", "k",
           "max_batches", "loss_fn", "seed")


class UnifiedModelAnalysis:
    """One call for several measures of a model."""

    def analyze_model(self, model: nn.Module, data: Any, config: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Measure a model over all batches of ``data``.

        Args:
            model, data: as for ``compute_sam_sharpness``; a loader is averaged over, exactly.
            config: ``metrics`` of "sharpness" (the default), "loss", "gradient_norm"; ``sharpness_methods`` of
                "hessian", "sam" (the defaults), "adaptive", or a measure of ``flatmin measure`` such as "worst_case",
                "average_case", "largest_random", "m_sharpness", "normalized_flatness", "density", "surface";
                ``use_sam_as_sanity_check`` for the third-order test of one against the other, with a
                ``DisagreementWarning`` where it fails; ``epsilon`` (0.01), ``adaptive_epsilon``, ``k`` (20),
                ``max_batches`` (all), ``loss_fn``, ``seed``.

        Returns:
            ``hessian_eigenvalues`` (a dict), ``sam_sharpness``, ``sanity_check`` (a dict with a plain ``sentence``),
            ``worst_case_sharpness``, ``m_sharpness``, ... for what was asked for: a float, or a dict for a density, a
            line or a surface.

        Raises:
            ValueError: an unknown metric, method or option; the message lists the choices.

        >>> import torch
        >>> data = torch.randn(8, 2), torch.zeros(8, dtype=torch.long)
        >>> sorted(UnifiedModelAnalysis().analyze_model(torch.nn.Linear(2, 3), data, {"metrics": ["loss"]}))
        ['loss']
        """
        config = dict(config or {})
        _choose("config option", config, OPTIONS)
        metrics = _choose("metric", config.get("metrics", ["sharpness"]), METRICS)
        methods = _choose("sharpness method", config.get("sharpness_methods", ["hessian", "sam"]), SHARPNESS_METHODS)
        objective = objective_for(model, _first(data, config.get("max_batches")), config.get("loss_fn"))
        epsilon, out = float(config.get("epsilon", 0.01)), {}
        if config.get("adaptive_epsilon"):
            epsilon = scaled_radius(epsilon, sum(p.numel() for p in objective.parameters))
        if "loss" in metrics:
            out["loss"] = float(objective.value())
        if "gradient_norm" in metrics:
            out["gradient_norm"] = first_order(objective).gradient_norm
        if "sharpness" not in metrics:
            return out
        if "hessian" in methods:
            out["hessian_eigenvalues"] = compute_hessian_eigenvalues_lanczos(
                model, _first(data, config.get("max_batches")), int(config.get("k", 20)),
                loss_fn=config.get("loss_fn"), seed=int(config.get("seed", 0)))
        if "sam" in methods:
            out["sam_sharpness"] = float(one_step(objective, epsilon, second_order=False))
        options = Options(rho=epsilon, seed=int(config.get("seed", 0)), value_only=True)
        for name in dict.fromkeys(METHODS[method] for method in METHODS if method in methods):
            out[KEYS.get(name, name)] = _plain(TABLE[name](objective, options))
        if config.get("use_sam_as_sanity_check"):
            check = agreement(objective, epsilon, iterations=10, restarts=0)
            _warn_of_disagreement(check)
            out["sanity_check"] = {key: getattr(check, key) for key in
                                   ("third_order", "worst_case", "bound", "applies", "ratio", "sentence")}
        return out


def compare_model_sharpness(model_a: nn.Module, model_b: nn.Module, dataloader: Any, *, epsilon: float = 0.01,
                            loss_fn: Loss = None) -> dict[str, Any]:
    """Two models side by side, over all batches; a ``DisagreementWarning`` where the measures order them differently.

    Returns:
        ``sharper_model`` "A" or "B" by one-step sharpness ("neither" where equal); ``hessian_confirms``, whether the
        largest eigenvalue says the same; ``sam_ratio`` and ``eigenvalue_ratio``, a over b (nan unless both have one
        sign); ``signs`` of all measures, 1 where A is sharper; the numbers under ``model_a`` and ``model_b``;
        ``invariant_ratio``, of Σ w²H_ii; ``same_scale``, whether the plain measures may be compared; ``sentence``.

    >>> import torch
    >>> data = torch.randn(8, 2), torch.zeros(8, dtype=torch.long)
    >>> result = compare_model_sharpness(torch.nn.Linear(2, 3), torch.nn.Linear(2, 3), data)
    >>> result["sharper_model"] in ("A", "B")
    True
    """
    found = compare(objective_for(model_a, dataloader, loss_fn), objective_for(model_b, dataloader, loss_fn), epsilon,
                    measures=("one_step", "largest_eigenvalue", "normalized_flatness"))
    sam, top, flat = (found.rows[name] for name in ("one_step", "largest_eigenvalue", "normalized_flatness"))
    if sam.sign * top.sign < 0:
        warnings.warn(f"SAM and Hessian disagree on relative sharpness. {found.sentence}", DisagreementWarning,
                      stacklevel=2)
    return {"sharper_model": {1: "A", -1: "B", 0: "neither"}[sam.sign], "hessian_confirms": sam.sign == top.sign,
            "sam_ratio": sam.ratio, "eigenvalue_ratio": top.ratio, "invariant_ratio": flat.ratio,
            "signs": found.signs, "same_scale": found.same_scale, "sentence": found.sentence,
            "model_a": {name: row.a for name, row in found.rows.items()},
            "model_b": {name: row.b for name, row in found.rows.items()}}


def _plain(found: Any) -> Any:
    """A number as a float; a picture as plain lists with its axes."""
    if isinstance(found, Scalar):
        return float(found)
    if hasattr(found, "density"):
        x, density, error = found.density()
        return plain(found) | plain({"x": x, "density": density, "density_stderr": error})
    return plain(found)


def _warn_of_disagreement(check: Agreement, factor: float = 10.0) -> None:
    """Warn where the third-order test fails, or where worst case and ½ρ²λ₁ are comparable and a factor apart."""
    apart = check.applies and not 1 / factor <= check.ratio <= factor
    if check.third_order is False or apart:
        warnings.warn(f"SAM and Hessian sharpness diverge: {check.sentence}", DisagreementWarning, stacklevel=3)


def objective_for(model: nn.Module, data: Any, loss_fn: Loss = None) -> Objective:
    """The loss of a model over batches of the kinds that ``compute_sam_sharpness`` lists."""
    first = data
    if not isinstance(data, (Mapping, tuple)) and not batches.is_pair(data):
        batches.as_data(data, any_form=True)
        first = next(iter(data), None)
    if isinstance(first, Mapping):
        return _of_mappings(model, data, first, loss_fn)
    if not (isinstance(first, (tuple, list)) and len(first) == 2):
        raise ValueError(f"a batch must be a mapping with one of {', '.join(INPUTS)}, or a pair (inputs, targets); got "
                         f"{type(first).__name__}")
    return Objective(model, loss_fn or _default_loss(first[1]), data)


def _of_mappings(model: nn.Module, data: Any, first: Mapping[str, Any], loss_fn: Loss) -> Objective:
    source = next((key for key in INPUTS if key in first), None)
    target = next((key for key in TARGETS if key in first), None)
    if source is None:
        raise ValueError(f"the batch has no inputs: one of {', '.join(INPUTS)} is needed; it has "
                         f"{', '.join(map(str, first)) or 'nothing'}")
    if loss_fn is None and _returns_loss(model):
        if target is None and source == "input_ids" and batches.predicts_next_label(model):
            return Objective(model, None, _Mapped(data, _with_labels))
        if target == "labels":
            return Objective(model, None, data)
    if target is None and source != "input_ids":
        raise ValueError(f"the batch has no labels: one of {', '.join(TARGETS)} is needed beside {source}; it has "
                         f"{', '.join(map(str, first))}")
    if target is None:      # a language model that returns logits
        return Objective(model, loss_fn or next_token_cross_entropy, _Mapped(data, _with_labels),
                         forward=lambda m, b: m(b["input_ids"]),
                         weight=lambda b: float((b["labels"][..., 1:] != -100).sum()))
    return Objective(model, loss_fn or _default_loss(first[target]), _Mapped(data, lambda b: (b[source], b[target])))


def _returns_loss(model: nn.Module) -> bool:
    """Whether ``model(..., labels=...)`` computes a loss, as in the ``transformers`` library."""
    return "labels" in inspect.signature(parallel.unwrapped(model).forward).parameters


def _with_labels(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch with labels: the inputs, without padding and without what follows padding on its left."""
    out = {key: value for key, value in batch.items() if value is not None}
    if "labels" in out:
        return out
    labels, mask = out["input_ids"].clone(), out.get("attention_mask")
    if mask is not None:
        labels[mask == 0] = -100
        labels[..., 1:][mask[..., :-1] == 0] = -100
    return out | {"labels": labels}


def next_token_cross_entropy(outputs: Any, batch: Mapping[str, Any]) -> Tensor:
    z, labels = batches.logits(outputs)[..., :-1, :], batch["labels"][..., 1:]
    return F.cross_entropy(z.reshape(-1, z.shape[-1]), labels.reshape(-1))


def _default_loss(targets: Any) -> Callable[..., Tensor]:
    floating = isinstance(targets, Tensor) and targets.is_floating_point()
    function = nn.MSELoss() if floating else nn.CrossEntropyLoss()

    def taken(outputs: Any, y: Any) -> Tensor:
        return function(batches.logits(outputs), y)

    taken.__name__ = f"{type(function).__name__}, the default for {'floating-point' if floating else 'integer'} targets"
    return taken


class _Mapped:
    """Data with a function applied to each batch; can be iterated again and again."""

    def __init__(self, data: Any, function: Callable[[Any], Any]):
        self.data, self.function = batches.as_data(data, any_form=True), function

    def __iter__(self) -> Iterator[Any]:
        return map(self.function, self.data)


def _first(data: Any, count: int | None) -> Any:
    """The first batches of a loader."""
    if count is None or isinstance(data, (Mapping, tuple)) or batches.is_pair(data):
        return data
    return [batch for _, batch in zip(range(math.ceil(count)), data, strict=False)]


def _choose(what: str, given: Any, choices: Sequence[str]) -> list[str]:
    given = [given] if isinstance(given, str) else list(given)
    unknown = [name for name in given if name not in choices]
    if unknown:
        raise ValueError(f"unknown {what} {', '.join(map(repr, unknown))}: choose from {', '.join(choices)}")
    return given
