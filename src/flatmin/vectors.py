"""Lists of tensors as one vector: norms, inner products, random vectors, whole or sharded.

A sharded parameter counts once: every sum over coordinates is taken over the local shard and then over the ranks that
hold the other shards.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from .parallel import all_reduce, local, part, shard_groups

BLOCK = 1 << 18
"""Numbers handled at once: large enough to hide call overhead, small enough for a second-level cache."""

_NORM_BLOCK = 1 << 16

HALF = (torch.float16, torch.bfloat16)


def blocks(*columns: Sequence[Tensor], limit: int = BLOCK) -> Iterator[tuple[list[Tensor], ...]]:
    """Walk equally shaped lists of tensors in lockstep, about ``limit`` numbers at a time.

    Large contiguous tensors are cut into flat pieces and small ones gathered, so that element-wise work on several
    lists stays in cache and needs scratch memory for one piece. Yields one list of pieces a column.
    """
    if sum(map(Tensor.numel, columns[0])) <= limit:
        if columns[0]:
            yield tuple(list(column) for column in columns)
        return
    batch: list[list[Tensor]] = [[] for _ in columns]
    size = 0
    for row in zip(*columns, strict=True):
        n = row[0].numel()
        if n == 0:
            continue
        if n > limit and all(t.is_contiguous() for t in row):
            for pieces in zip(*(t.view(-1).split(limit) for t in row), strict=True):
                yield tuple([piece] for piece in pieces)
            continue
        if size and size + n > limit:
            yield tuple(batch)
            batch, size = [[] for _ in columns], 0
        for column, tensor in zip(batch, row, strict=True):
            column.append(tensor)
        size += n
    if size:
        yield tuple(batch)


class Scratch:
    """Memory for one block of intermediate results, used again for every block.

    On the CPU, writing to newly allocated pages costs more than the arithmetic.
    """

    def __init__(self) -> None:
        self._blocks: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def scaled(self, pieces: Sequence[Tensor], factor: float | Tensor, finite: bool = False) -> list[Tensor]:
        """factor · pieces; overwritten by the next call.

        ``finite``: with 0 in the place of inf and nan; the pieces are then of one dtype and device.
        """
        if len(pieces) == 1:
            out = torch.mul(pieces[0], factor, out=self._memory(pieces[0]))
            return [out.nan_to_num_(0.0, 0.0, 0.0) if finite else out]
        if not finite:
            return list(torch._foreach_mul(list(pieces), factor))
        flat = _flatten_dense_tensors(list(pieces)).mul_(factor).nan_to_num_(0.0, 0.0, 0.0)
        return list(_unflatten_dense_tensors(flat, list(pieces)))

    def magnitudes(self, pieces: Sequence[Tensor]) -> list[Tensor]:
        """|pieces|; overwritten by the next call."""
        if len(pieces) > 1:
            return list(torch._foreach_abs(list(pieces)))
        return [torch.abs(pieces[0], out=self._memory(pieces[0]))]

    def _memory(self, piece: Tensor) -> Tensor:
        key = (piece.device, piece.dtype)
        if key not in self._blocks or self._blocks[key].numel() < piece.numel():
            self._blocks[key] = torch.empty(max(BLOCK, piece.numel()), device=piece.device, dtype=piece.dtype)
        block = self._blocks[key][: piece.numel()]
        return block if piece.dim() == 1 else block.view(piece.shape)


def _wide(device: torch.device) -> torch.dtype:
    """The widest floating-point type of a device."""
    return torch.float32 if device.type == "mps" else torch.float64


def _summed_in(dtype: torch.dtype) -> torch.dtype | None:
    """The dtype in which the squares of half precisions are summed, which they would overflow; None for their own."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else None


def sums_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    """Per tensor, the sum of squares of its local part: a float64 vector of ``len(tensors)``.

    Float32 sums run over blocks of 65 536 and the blocks are added in float64: as fast as a float32 norm and accurate
    to about 1e-6, where a plain float32 norm of 58 million numbers is off by 4e-3. On the CPU, tensors whose squares
    leave the range of float32 are summed again in float64. On other devices, where asking would wait for the device,
    a norm above about 1e19 is inf, and one below 1e-19 loses digits, down to 0.
    """
    assert tensors
    device = tensors[0].device
    wide = _wide(device)
    out: list[Tensor] = [torch.empty(0)] * len(tensors)
    small: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, t in enumerate(tensors):
        n = t.numel()
        if n <= _NORM_BLOCK or not t.is_contiguous():
            small.setdefault((t.device, t.dtype), []).append(i)
            continue
        flat, cut, dtype = t.view(-1), n - n % _NORM_BLOCK, _summed_in(t.dtype)
        squares = torch.linalg.vector_norm(flat[:cut].view(-1, _NORM_BLOCK), dim=1, dtype=dtype).to(wide).square().sum()
        if cut < n:
            squares = squares + torch.linalg.vector_norm(flat[cut:], dtype=dtype).to(wide).square()
        out[i] = squares.to(device)
    if len(small) == 1 and len(tensors) == len(next(iter(small.values()))):
        norms = torch._foreach_norm(list(tensors), 2, dtype=_summed_in(tensors[0].dtype))
        return _exact_where_lost(torch.stack(list(norms)).to(wide).square(), tensors, tensors)
    for (_, dtype), where in small.items():
        norms = torch._foreach_norm([tensors[i] for i in where], 2, dtype=_summed_in(dtype))
        for i, value in zip(where, torch.stack(list(norms)).to(device, wide).square().unbind(), strict=True):
            out[i] = value
    return _exact_where_lost(torch.stack(out), tensors, tensors)


def dots(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """Per tensor, the inner product of the local parts: a float64 vector of ``len(a)``.

    What leaves the range of float32 is treated as in ``sums_of_squares``.
    """
    assert len(a) == len(b) and a
    device = a[0].device
    wide = _wide(device)
    out = []
    for x, y in zip(a, b, strict=True):
        dtype = _summed_in(x.dtype) or x.dtype
        pieces = [torch.dot(p.to(dtype), q.to(dtype))
                  for p, q in zip(x.reshape(-1).split(_NORM_BLOCK), y.reshape(-1).split(_NORM_BLOCK), strict=True)]
        out.append(torch.stack(pieces).to(device, wide).sum() if len(pieces) > 1 else pieces[0].to(device, wide))
    return _exact_where_lost(torch.stack(out), a, b)


_SMALLEST = 1e-20
"""Sums of float32 products above this lost no digits to products below the range of float32."""


def _exact_where_lost(found: Tensor, a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """Inner products of tensors, in float64 where products left the range of float32, on the CPU; in place."""
    if found.device.type != "cpu":
        return found
    size = found.abs()
    low, high = torch.aminmax(size)
    if float(low) > _SMALLEST and float(high) < math.inf:
        return found
    for i in (~((size > _SMALLEST) & (size < math.inf))).nonzero().flatten().tolist():
        if a[i].dtype != torch.float64 and not (_all_zero(a[i]) or _all_zero(b[i])):
            pieces = zip(a[i].reshape(-1).split(_NORM_BLOCK), b[i].reshape(-1).split(_NORM_BLOCK), strict=True)
            found[i] = sum(float(torch.dot(x.double(), y.double())) for x, y in pieces)
    return found


def _all_zero(t: Tensor) -> bool:
    """Whether no number differs from 0; a NaN does."""
    if t.numel() == 0:
        return True
    low, high = torch.aminmax(t)
    return float(low) == float(high) == 0


class Space:
    """The coordinates of a list of parameters, whole or sharded over ranks, seen as one vector.

    Every method takes and returns *local* tensors, in the order of the parameters; results are float64 0-d tensors on
    the first parameter's device, equal on all ranks.
    """

    def __init__(self, parameters: Sequence[Tensor]):
        self.parameters = list(parameters)
        if not self.parameters:
            raise ValueError("no parameters: pass a model or tensors that require a gradient")
        self._where: dict[tuple[Any, ...], list[int]] = {}
        for i, p in enumerate(self.parameters):
            self._where.setdefault(shard_groups(p), []).append(i)
        self.sharded = any(self._where)
        self._large = [i for i, p in enumerate(self.parameters) if local(p).numel() > _NORM_BLOCK]
        self._small = _gathered(self.parameters)

    def reduce(self, per_tensor: Tensor, op: str = "sum") -> Tensor:
        """Total of one number a tensor, each tensor's number first reduced over the ranks that share it."""
        return self.reduce_each(per_tensor, op).sum() if op == "sum" else self.reduce_each(per_tensor, op).amax()

    def reduce_each(self, per_tensor: Tensor, op: str = "sum") -> Tensor:
        """One number a tensor, reduced over the ranks that hold its shards."""
        if not self.sharded:
            return per_tensor
        per_tensor = per_tensor.clone()
        for groups, where in self._where.items():
            index = torch.tensor(where, device=per_tensor.device)
            per_tensor[index] = all_reduce(per_tensor[index], groups, op)
        return per_tensor

    def norms(self, a: Sequence[Tensor]) -> Tensor:
        """The Euclidean norm of each tensor."""
        return self.reduce_each(sums_of_squares(a)).sqrt()

    def norm(self, a: Sequence[Tensor], p: float = 2) -> Tensor:
        """‖a‖_p over all coordinates, for p = 1, 2 or infinity."""
        if p == 2:
            return self._total(sums_of_squares(self._pieces(a))).sqrt()
        wide = _wide(a[0].device)
        if p == 1:
            return self.reduce(torch.stack([t.abs().sum(dtype=_wide(t.device)).to(a[0].device) for t in a]))
        if p == float("inf"):
            tops = [t.abs().amax() if t.numel() else t.new_zeros(()) for t in a]
            return self.reduce(torch.stack([t.to(a[0].device, wide) for t in tops]), "max")
        raise ValueError(f"p must be 1, 2 or infinity, got {p}")

    def dot(self, a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
        """aᵀb over all coordinates."""
        return self._total(dots(self._pieces(a), self._pieces(b)))

    def share(self, a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
        """aᵀb/‖b‖², the coefficient of a's part along b; 0 where b is 0."""
        x, y = self._pieces(a), self._pieces(b)
        return ratio(self._total(dots(x, y)), self._total(sums_of_squares(y)))

    def finite(self, a: Sequence[Tensor]) -> Tensor:
        """Whether every number is finite, as a 0-d flag; equal on the ranks that share the tensors."""
        bad = torch.zeros((), device=a[0].device)
        for same in _by_device(a):
            if same[0].device.type in ("cpu", "cuda"):
                found, one = (torch.full((), x, device=same[0].device, dtype=torch.float32) for x in (0.0, 1.0))
                torch._amp_foreach_non_finite_check_and_unscale_(same, found, one)  # times 1: leaves them as they are
            else:
                found = 1 - torch.isfinite(sums_of_squares(same).sum()).float()
            bad = torch.maximum(bad, found.to(bad.device))
        if self.sharded:
            bad = self.reduce(bad.expand(len(self.parameters)), "max")
        return bad == 0

    def _pieces(self, a: Sequence[Tensor]) -> list[Tensor]:
        """The same numbers in fewer tensors: small ones gathered, unless ranks share them."""
        if self.sharded:
            return list(a)
        gathered = [_flatten_dense_tensors([a[i] for i in group]) if len(group) > 1 else a[group[0]]
                    for group in self._small]
        return gathered + [a[i] for i in self._large]

    def _total(self, per_piece: Tensor) -> Tensor:
        return self.reduce(per_piece) if self.sharded else per_piece.sum()

    def random(self, generator: torch.Generator, kind: str = "normal") -> list[Tensor]:
        """A random vector, ``kind`` "normal", "rademacher" or "uniform" on [0, 1).

        The same on every sharding: drawn on the generator's device for the whole tensor, then cut to the local part.
        """
        return [_random(p, generator, kind) for p in self.parameters]


def _gathered(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Small tensors of one device and dtype, in groups to be looked at as one piece."""
    out: list[list[int]] = []
    current: dict[tuple[torch.device, torch.dtype], tuple[list[int], int]] = {}
    for i, t in enumerate(tensors):
        n = local(t).numel()
        if n > _NORM_BLOCK:
            continue
        group, size = current.get((t.device, t.dtype), ([], BLOCK + 1))
        if size + n > BLOCK:
            group, size = [], 0
            out.append(group)
        group.append(i)
        current[t.device, t.dtype] = (group, size + n)
    return out


def signs(n: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """n random numbers ±1 on the generator's device, 64 from each draw."""
    words = torch.randint(-2**63, 2**63 - 1, (-(-n // 64),), generator=generator, device=generator.device)
    return _signs_of_bytes(dtype, generator.device).index_select(0, words.view(torch.uint8).int()).view(-1)[:n]


@functools.cache
def _signs_of_bytes(dtype: torch.dtype, device: torch.device) -> Tensor:
    bits = torch.arange(256, device=device).unsqueeze(1) >> torch.arange(8, device=device) & 1
    return bits.to(dtype).mul_(2).sub_(1)


def _random(parameter: Tensor, generator: torch.Generator, kind: str) -> Tensor:
    dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    shape = tuple(parameter.shape)
    if kind == "normal":
        whole = torch.randn(shape, generator=generator, device=generator.device, dtype=dtype)
    elif kind == "rademacher":
        whole = signs(math.prod(shape), generator, dtype).view(shape)
    elif kind == "uniform":
        whole = torch.rand(shape, generator=generator, device=generator.device, dtype=dtype)
    else:
        raise ValueError(f'kind must be "normal", "rademacher" or "uniform", got {kind!r}')
    return part(whole, parameter).to(parameter.device, parameter.dtype).contiguous()


def seeded(seed: int | torch.Generator) -> torch.Generator:
    """A generator from a seed; a generator is returned as it is."""
    return seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)


def axpy(alpha: float | Tensor, x: Sequence[Tensor], y: Sequence[Tensor]) -> None:
    """y ← y + αx in place, block by block."""
    scratch = Scratch()
    for xs, ys in blocks(x, y):
        if isinstance(alpha, Tensor):
            torch._foreach_add_(ys, scratch.scaled(xs, alpha.to(xs[0].device)))
        else:
            torch._foreach_add_(ys, xs, alpha=alpha)


def scale(alpha: float | Tensor, x: Sequence[Tensor]) -> None:
    """x ← αx in place."""
    for xs in _by_device(x):
        torch._foreach_mul_(xs, alpha.to(xs[0].device) if isinstance(alpha, Tensor) else alpha)


def copy(source: Sequence[Tensor], target: Sequence[Tensor]) -> None:
    """target ← source in place, never by rebinding."""
    if target:
        torch._foreach_copy_(list(target), list(source))


def _by_device(x: Sequence[Tensor]) -> list[list[Tensor]]:
    devices = {t.device for t in x}
    return [list(x)] if len(devices) == 1 else [[t for t in x if t.device == device] for device in devices]


def ratio(a: Tensor, b: Tensor) -> Tensor:
    """a/b, and 0 where b is 0 or the ratio is not finite."""
    value = a / b
    return torch.where(torch.isfinite(value), value, torch.zeros_like(value))


def combine(a: float | Tensor, x: Sequence[Tensor], b: float | Tensor, y: Sequence[Tensor]) -> None:
    """x ← a x + b y in place, block by block."""
    scratch = Scratch()
    for xs, ys in blocks(x, y):
        torch._foreach_mul_(xs, _on(a, xs[0]))
        torch._foreach_add_(xs, scratch.scaled(ys, _on(b, ys[0])))


def _on(value: float | Tensor, tensor: Tensor) -> float | Tensor:
    return value.to(tensor.device) if isinstance(value, Tensor) else value
