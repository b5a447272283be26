"""The one table: every preset, and combinations no preset names, as rows; each law in ``laws/`` runs over all of them.

A row is a name, how to make its Sharpener, its slow twin in ``oracles.py`` and a few facts about it. Adding a direction
or a preset is adding a row here and a function there. A preset that does not exist yet is simply not in the table;
``laws/test_table.py`` says which must be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import flatmin
import oracles
from oracles import Point
from problems import BASES, loss_fn

presets = getattr(flatmin, "presets", None)
ascent = getattr(flatmin, "ascent", None)

Parts = Sequence[tuple[Tensor, Tensor, float]]


def euclidean(at: Point, g: Tensor, eps: Tensor, s: dict) -> Tensor:
    return eps.norm()


def weighted_by_T(at: Point, g: Tensor, eps: Tensor, s: dict) -> Tensor:
    T = torch.where(at.weight_mask() > 0, at.w.abs() + s["eta"], torch.ones_like(at.w))
    return (eps / T).norm()


def fisher_norm(at: Point, g: Tensor, eps: Tensor, s: dict) -> Tensor:
    return (eps**2 * (1 + s["eta"] * g**2)).sum().sqrt()


def largest_by_T(at: Point, g: Tensor, eps: Tensor, s: dict) -> Tensor:
    T = torch.where(at.weight_mask() > 0, at.w.abs() + s["eta"], torch.ones_like(at.w))
    return (eps / T).abs().max()


def of_each_layer(at: Point, g: Tensor, eps: Tensor, s: dict) -> Tensor:
    return torch.stack([eps[c].norm() / at.w[c].norm() for c in at.slices.values()])


def over_gradient(at: Point, g: Tensor, eps: Tensor, s: dict) -> Tensor:
    return eps.norm() / g.norm()


def only_norm_layers(at: Point, g: Tensor, eps: Tensor, s: dict) -> Tensor:
    assert not (eps * (1 - at.norm_layer_mask())).any(), "a tensor outside normalization layers was moved"
    return eps.norm()


def largest(at: Point, g: Tensor, eps: Tensor, s: dict) -> Tensor:
    return eps.abs().max()


def summed(at: Point, g: Tensor, eps: Tensor, s: dict) -> Tensor:
    return eps.abs().sum()


@dataclass(frozen=True, kw_only=True)
class Row:
    """One variant. ``settings`` go to the preset and the oracle alike; ``only_preset`` and ``only_oracle`` to one."""

    name: str
    preset: str = ""  # or, for a combination that no preset names:
    parts: Callable[[], dict[str, Any]] | None = None  # direction, rule, cadence; not called until needed
    settings: dict[str, Any]
    oracle: Callable[..., Tensor] | None
    only_preset: dict[str, Any] = field(default_factory=dict)
    only_oracle: dict[str, Any] = field(default_factory=dict)
    groups: Callable[[nn.Module], list[dict]] | None = None  # groups of RolesNet
    bases: tuple[str, ...] = ("sgd", "adamw")
    pair: bool = False  # needs the outputs: forward and loss apart
    reads_optimizer: bool = False
    passes: Callable[[int], int] = lambda t: 2  # forward calls at step t, per micro-batch
    own_norm: Callable[..., Tensor] | None = euclidean  # in which ‖eps‖ is rho; None: the row says nothing about it
    micro: bool = False  # scope "micro_batch"
    stateful: bool = False  # remembers something between steps (besides the optimizer)
    random: bool = False  # draws its own direction
    plain: bool = True  # keeps the gradient at w + eps as it is

    def __str__(self) -> str:
        return self.name

    @property
    def one_pass(self) -> bool:
        return self.passes(1) == 1 and self.passes(2) == 1

    def make(self, model: nn.Module, optimizer=None, *, grouped: nn.Module | None = None, **override):
        """The row's Sharpener. ``grouped``: the model whose tensors the groups name (a wrapped model's inside)."""
        kw = {**self.settings, **self.only_preset, **override}
        if self.reads_optimizer:
            kw["optimizer"] = optimizer
        if self.groups is not None:
            kw["groups"] = self.groups(grouped if grouped is not None else model)
            if "rho" in override:
                kw["groups"] = [{**g, "rho": override["rho"]} for g in kw["groups"]]
        if self.parts is None:
            return getattr(presets, self.preset)(model, **kw)
        kw = {name: value for name, value in kw.items() if name not in self.settings or name == "rho"}
        return flatmin.Sharpener(model, **self.parts(), **kw)

    def backward(self, sharpener, model: nn.Module, parts: Parts, loss=loss_fn) -> Tensor:
        """One ``Sharpener.backward`` on some micro-batches (a single one of weight 1 goes in bare)."""
        return backward(sharpener, model, parts, pair=self.pair, loss=loss)

    def twin(self, model: nn.Module, make_optimizer, steps: Sequence[Parts], **kw):
        assert self.oracle is not None
        return oracles.train(model, make_optimizer, self.oracle, steps, **self.settings, **self.only_oracle, **kw)


def backward(sharpener, model: nn.Module, parts: Parts, *, pair: bool = False, loss=loss_fn) -> Tensor:
    def callables(x, y):
        if pair:
            return (lambda: model(x)), (lambda z: loss(z, y))
        return (lambda: loss(model(x), y)),

    if len(parts) == 1 and parts[0][2] == 1.0:
        return sharpener.backward(*callables(*parts[0][:2]))
    made = [callables(x, y) for x, y, _ in parts]
    return sharpener.backward([c if pair else c[0] for c in made], weights=[weight for *_, weight in parts])


def cut(x: Tensor, y: Tensor, sizes: Sequence[int] = (2, 7, 3)) -> Parts:
    """A batch in micro-batches of unequal size, weighted by their size, so that together they are the batch."""
    assert sum(sizes) == len(x)
    return [(a, b, len(a) / len(x)) for a, b in zip(x.split(list(sizes)), y.split(list(sizes)), strict=True)]


def whole(x: Tensor, y: Tensor) -> Parts:
    return [(x, y, 1.0)]


def parts_for(row: Row, x: Tensor, y: Tensor) -> Parts:
    """What one step of this row is fed: micro-batches where the row is about them."""
    return cut(x, y, (2, 7, 3)) if row.micro else whole(x, y)


def _two_groups(model) -> list[dict]:
    """The head with a larger radius, the first map left out."""
    return [{"params": list(model.head.parameters()), "rho": 0.3}, {"modules": [model.first], "rho": 0.0}]


_GROUPED = {"head.weight": 0.3, "head.bias": 0.3, "first.kernel": 0.0, "first.weight_shift": 0.0}
_LOOK = {"rho": 0.1, "k": 3, "alpha": 0.3}

_ALL = [
    Row(name="sam", preset="sam", settings={"rho": 0.1}, oracle=oracles.sam),
    Row(name="asam", preset="asam", settings={"rho": 0.5, "eta": 0.01}, oracle=oracles.asam, own_norm=weighted_by_T),
    # combinations
    Row(name="sam-groups", preset="sam", settings={"rho": 0.1}, oracle=oracles.grouped_sam,
        only_oracle={"rhos": _GROUPED}, groups=_two_groups, own_norm=None),
    Row(name="sam-micro", preset="sam", settings={"rho": 0.1}, only_preset={"scope": "micro_batch"},
        oracle=oracles.micro_batch(oracles.sam), micro=True),
    Row(name="asam-micro", preset="asam", settings={"rho": 0.5, "eta": 0.2}, only_preset={"scope": "micro_batch"},
        oracle=oracles.micro_batch(oracles.asam), own_norm=weighted_by_T, micro=True),
    Row(name="looksam-micro", preset="looksam", settings=_LOOK, only_preset={"scope": "micro_batch"}, micro=True,
        oracle=oracles.looksam_micro, stateful=True, plain=False, passes=lambda t: 2 if t % 3 == 0 else 1,
        own_norm=None),
    Row(name="friendly-micro", preset="friendly_sam", settings={"rho": 0.2, "sigma": 1.0, "decay": 0.6}, micro=True,
        only_preset={"scope": "micro_batch"}, oracle=oracles.friendly_micro, stateful=True),
    # the rest of the family
    Row(name="esam", preset="esam", settings={"rho": 0.1, "beta": 1.0, "gamma": 1.0}, oracle=lambda at, rho, **_:
        oracles.sam(at, rho)),
    Row(name="esam-half", preset="esam", settings={"rho": 0.1, "beta": 0.5, "gamma": 1.0}, oracle=None, own_norm=None,
        random=True),
    Row(name="looksam", preset="looksam", settings=_LOOK, oracle=oracles.looksam, stateful=True, plain=False,
        passes=lambda t: 2 if t % 3 == 0 else 1),
    Row(name="layer_sam", preset="layer_sam", settings={"rho": 0.1}, oracle=oracles.layer_sam, own_norm=of_each_layer),
    Row(name="momentum_sam", preset="momentum_sam", settings={"rho": 0.5}, oracle=oracles.momentum_sam,
        reads_optimizer=True, passes=lambda t: 1),
    Row(name="fisher_sam", preset="fisher_sam", settings={"rho": 0.1, "eta": 1.0}, oracle=oracles.fisher_sam,
        own_norm=fisher_norm),
    Row(name="functional_sam", preset="functional_sam", settings={"rho": 0.2}, oracle=oracles.functional_sam,
        pair=True, plain=False),
    Row(name="preconditioned_sam", preset="preconditioned_sam", settings={"rho": 0.1},
        oracle=oracles.preconditioned_sam, reads_optimizer=True, bases=("adamw",)),
    Row(name="preconditioned_functional_sam", preset="preconditioned_functional_sam", settings={"rho": 0.1},
        oracle=oracles.preconditioned_functional_sam, reads_optimizer=True, bases=("adamw",), pair=True, plain=False),
    Row(name="gsam", preset="gsam", settings={"rho": 0.1, "alpha": 0.4}, oracle=oracles.gsam, plain=False),
    Row(name="friendly_sam", preset="friendly_sam", settings={"rho": 0.2, "sigma": 1.0, "decay": 0.6},
        oracle=oracles.friendly_sam, stateful=True),
    Row(name="wsam", preset="wsam", settings={"rho": 0.05, "gamma": 0.8}, oracle=oracles.wsam, plain=False),
    Row(name="sam_on", preset="sam_on", settings={"rho": 0.5}, oracle=oracles.sam_on, own_norm=only_norm_layers),
    Row(name="random_sam", preset="random_sam", settings={"rho": 0.1}, oracle=None, random=True, passes=lambda t: 1),
    Row(name="unnormalized_sam", preset="unnormalized_sam", settings={"rho": 0.1}, oracle=oracles.unnormalized_sam,
        own_norm=over_gradient),
    # products that no preset names
    Row(name="gradient-inf", parts=lambda: dict(direction=ascent.Gradient(p=math.inf)),
        settings={"rho": 0.01, "p": math.inf}, oracle=oracles.sam, own_norm=largest),
    Row(name="gradient-1", parts=lambda: dict(direction=ascent.Gradient(p=1)),
        settings={"rho": 0.1, "p": 1}, oracle=oracles.sam, own_norm=summed),
    Row(name="adaptive-inf", parts=lambda: dict(direction=ascent.Adaptive(eta=0.1, p=math.inf)),
        settings={"rho": 0.02, "eta": 0.1}, oracle=oracles.asam_inf, own_norm=largest_by_T),
    Row(name="adaptive-biases", parts=lambda: dict(direction=ascent.Adaptive(eta=0.1, biases=True)),
        settings={"rho": 0.3}, only_oracle={"eta": 0.1}, oracle=oracles.asam_biases, own_norm=None),
    Row(name="adaptive-filter", parts=lambda: dict(direction=ascent.Adaptive(eta=0.1, kind="filter")),
        settings={"rho": 0.3}, only_oracle={"eta": 0.1, "kind": "filter"}, oracle=oracles.asam_by_norms, own_norm=None),
    Row(name="adaptive-layer", parts=lambda: dict(direction=ascent.Adaptive(eta=0.1, kind="layer")),
        settings={"rho": 0.3}, only_oracle={"eta": 0.1, "kind": "layer"}, oracle=oracles.asam_by_norms, own_norm=None),
    Row(name="logit-only", parts=lambda: dict(rule=ascent.LogitOnly()), settings={"rho": 0.2},
        oracle=oracles.logit_only, pair=True, plain=False, own_norm=None,
        passes=lambda t: 3),
    Row(name="fisher-functional", parts=lambda: dict(direction=ascent.Fisher(eta=1.0), rule=ascent.Functional()),
        settings={"rho": 0.2, "eta": 1.0}, oracle=oracles.fisher_functional, own_norm=fisher_norm, pair=True,
        plain=False),
    Row(name="functional-micro", preset="functional_sam", settings={"rho": 0.2}, only_preset={"scope": "micro_batch"},
        oracle=oracles.micro_batch(oracles.functional_sam), micro=True, pair=True, plain=False),
    Row(name="preconditioned-gap-every-5", reads_optimizer=True, bases=("adamw",), plain=False, stateful=True,
        parts=lambda: dict(direction=ascent.Preconditioned(), rule=ascent.SurrogateGap(alpha=0.4),
                           cadence=ascent.Every(5)),
        settings={"rho": 0.1, "alpha": 0.4}, oracle=oracles.every(5, oracles.preconditioned_gap), own_norm=None,
        passes=lambda t: 2 if t % 5 == 0 else 1),
    Row(name="preconditioned-dual", preset="preconditioned_sam", settings={"rho": 0.1, "norm": "dual"},
        oracle=oracles.preconditioned_sam, reads_optimizer=True, bases=("adamw",), own_norm=None),
    Row(name="preconditioned-raw-1", preset="preconditioned_sam", settings={"rho": 1e-5, "norm": "raw", "power": 1.0},
        oracle=oracles.preconditioned_sam, reads_optimizer=True, bases=("adamw",), own_norm=None),
    Row(name="momentum-gap", reads_optimizer=True, plain=False,
        parts=lambda: dict(direction=ascent.Momentum(), rule=ascent.SurrogateGap(alpha=0.4)),
        settings={"rho": 0.5, "alpha": 0.4}, oracle=oracles.momentum_gap),
    Row(name="adaptive-weighted-micro", micro=True, plain=False, own_norm=weighted_by_T,
        parts=lambda: dict(direction=ascent.Adaptive(eta=0.01), rule=ascent.Weighted(gamma=0.8), scope="micro_batch"),
        settings={"rho": 0.5, "eta": 0.01, "gamma": 0.8}, oracle=oracles.micro_batch(oracles.adaptive_weighted)),
    Row(name="every-3", parts=lambda: dict(cadence=ascent.Every(3)), settings={"rho": 0.1}, own_norm=None,
        oracle=oracles.every(3, oracles.sam), stateful=True, plain=False, passes=lambda t: 2 if t % 3 == 0 else 1),
    Row(name="look-by-tensor", parts=lambda: dict(cadence=ascent.Every(3, ascent.Reuse(alpha=0.3, per_tensor=True))),
        settings=_LOOK, oracle=oracles.looksam_by_tensor, stateful=True, plain=False,
        passes=lambda t: 2 if t % 3 == 0 else 1),
    Row(name="warm-start", parts=lambda: dict(cadence=ascent.WarmStart(2)), settings={"rho": 0.1}, own_norm=None,
        oracle=oracles.warm_start(2, oracles.sam), stateful=True, plain=False, passes=lambda t: 1 if t < 2 else 2),
    Row(name="decay-in-ascent", parts=lambda: dict(direction=ascent.WithWeightDecay(0.5)), settings={"rho": 0.1},
        oracle=oracles.decayed_sam),
]


def _exists(row: Row) -> bool:
    if presets is None:
        return False
    if row.parts is None:
        return hasattr(presets, row.preset)
    try:
        row.parts()
    except AttributeError:  # a part of a later issue
        return False
    return True


ROWS = [row for row in _ALL if _exists(row)]
TWINS = [row for row in ROWS if row.oracle is not None]
CASES = [(row, base) for row in ROWS for base in row.bases]
TWIN_CASES = [(row, base) for row in TWINS for base in row.bases]


def case_id(value) -> str:
    return str(value)


def start(row: Row, base: str, model: nn.Module):
    """An optimizer of this base and the row's Sharpener."""
    optimizer = BASES[base]([p for p in model.parameters() if p.requires_grad])
    return optimizer, row.make(model, optimizer)


def warm_up(row: Row, sharpener, optimizer, model: nn.Module, steps: int = 1, first: int = 50) -> None:
    """A few ordinary steps, so that momentum, moments and memories exist."""
    from problems import batch

    dtype = next(model.parameters()).dtype
    for t in range(first, first + steps):
        row.backward(sharpener, model, parts_for(row, *batch(t, dtype=dtype)))
        optimizer.step()
        optimizer.zero_grad()
