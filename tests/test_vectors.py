"""Norms and inner products of float32 and bfloat16 tensors over the whole range of their numbers, against float64."""

import math

import pytest
import torch

from flatmin.vectors import Space, dots, sums_of_squares

SIZES = (7, 70_000, 200_003)    # one block, a block and a rest, several blocks


def drawn(n, scale, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(n, generator=generator, dtype=torch.float64) * scale).to(dtype)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("scale", (1e-36, 1e-25, 1e-20, 1e-12, 1.0, 1e18, 1e22, 1e34))
def test_norms_and_inner_products_over_the_whole_range(scale, n, dtype):
    x, y = drawn(n, scale, dtype), drawn(n, scale, dtype, 1) + scale / 2
    space = Space([x])
    norm, dot = float(x.double().norm()), float(x.double() @ y.double())
    assert float(space.norm([x])) == pytest.approx(norm, rel=1e-5)
    assert float(space.dot([x], [y])) == pytest.approx(dot, abs=1e-5 * norm * float(y.double().norm()))
    assert float(space.share(x.split(n), y.split(n))) == pytest.approx(dot / float(y.double().square().sum()), abs=1e-5)
    strided = x[:50_000:2]
    assert sums_of_squares([strided, y]).tolist() == pytest.approx(
        [float(t.double().square().sum()) for t in (strided, y)], rel=1e-5)


def test_tensors_of_very_different_size_beside_each_other():
    tensors = [drawn(100, 10.0**k, torch.float32, k + 40) for k in range(-40, 38, 6)]
    expected = [float(t.double().square().sum()) for t in tensors]
    assert sums_of_squares(tensors).tolist() == pytest.approx(expected, rel=1e-5)
    assert dots(tensors, tensors).tolist() == pytest.approx(expected, rel=1e-5)


def test_what_is_zero_or_not_finite_stays_so():
    tensors = [torch.zeros(5), torch.zeros(0), torch.tensor([1.0, math.inf]), torch.tensor([math.nan, 0.0])]
    for found in (sums_of_squares(tensors), dots(tensors, tensors)):
        assert found[:3].tolist() == [0, 0, math.inf] and bool(found[3].isnan())
    assert float(dots([torch.tensor([1e-30, 0.0])], [torch.tensor([0.0, 1.0])])) == 0
