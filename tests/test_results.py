"""The standard error of a weighted mean over batches, which every record with an error by the data uses."""

import math

import pytest
import torch

from flatmin.results import weighted_mean


def test_equal_weights_give_the_standard_error_of_the_mean():
    x = torch.randn(9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean, error = weighted_mean(x.tolist(), [3.0] * 9)
    assert (mean, error) == pytest.approx((float(x.mean()), float(x.std()) / 3), rel=1e-12)


def test_the_error_covers_the_mean_of_unequal_batches():
    """Redrawn data: the spread of the mean is the error stated."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(400):
        n = torch.randint(1, 20, (60,), generator=generator).double()
        x = torch.randn(60, generator=generator, dtype=torch.float64) / n.sqrt() + 2
        found.append(weighted_mean(x.tolist(), n.tolist()))
    means, errors = torch.tensor(found).T
    assert float(errors.square().mean().sqrt()) == pytest.approx(float(means.std()), rel=0.15)


@pytest.mark.parametrize("factor", (1e-220, 1e-30, 1e30, 1e220))
def test_no_square_over_or_underflows(factor):
    x, n = [1.0, 2.0, 4.0], [1.0, 2.0, 3.0]
    mean, error = weighted_mean(x, n)
    assert weighted_mean([factor * v for v in x], n) == pytest.approx((factor * mean, factor * error), rel=1e-12)


def test_ranks_together_are_one_sample():
    x, n = [1.0, 2.0, 4.0, 8.0, 3.0], [1.0, 2.0, 3.0, 1.0, 2.0]
    parts = (slice(2), slice(2, 5))

    def of_both(take, *stage):
        """The sums over two ranks, of which this is called by one: the other's share is computed here too."""
        sums = [[float(len(x[p])), math.fsum(n[p]), math.fsum(a * b for a, b in zip(x[p], n[p], strict=True))]
                for p in parts]
        if len(stage) == 3:
            return [math.fsum(column) for column in zip(*sums, strict=True)]
        mean = math.fsum(s[2] for s in sums) / math.fsum(s[1] for s in sums)
        other = parts[1 - parts.index(take)]
        return [stage[0] + math.fsum((b * (a - mean)) ** 2 for a, b in zip(x[other], n[other], strict=True))]

    for p in parts:
        found = weighted_mean(x[p], n[p], total=lambda *stage, p=p: of_both(p, *stage))
        assert found == pytest.approx(weighted_mean(x, n), rel=1e-12)


def test_too_few_batches_have_no_error():
    assert math.isnan(weighted_mean([1.0], [2.0])[1])
    assert math.isnan(weighted_mean([1.0, 2.0, 3.0, 4.0], [1.0] * 4, fewest=5)[1])
