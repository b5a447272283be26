"""Metrics of a classifier, and their standard errors over the draw of test examples."""

import pytest
import torch

from flatmin.training.metrics import classification, standard_errors


def test_calibration_error_by_hand():
    """Four predictions with confidence 0.9 of which three are right, one with 0.6 that is right."""
    p = torch.tensor([[0.9, 0.1]] * 4 + [[0.4, 0.6]], dtype=torch.float64)
    found = classification(p.log(), torch.tensor([0, 0, 0, 1, 1]))
    assert found["ece"] == pytest.approx((4 * abs(0.75 - 0.9) + abs(1 - 0.6)) / 5)
    assert found["accuracy"] == pytest.approx(0.8)
    assert found["nll"] == pytest.approx(-(3 * torch.tensor(0.9).log() + torch.tensor(0.1).log()
                                           + torch.tensor(0.6).log()).item() / 5)


def test_standard_errors_are_those_of_many_draws():
    """Against the spread of the numbers themselves over 400 test sets drawn anew."""
    n, generator = 500, torch.Generator().manual_seed(1)

    def draw():
        logits = 1.5 * torch.randn(n, 3, generator=generator)
        return logits, torch.multinomial((0.5 * logits).softmax(1), 1, generator=generator).flatten()

    found = [classification(*draw()) for _ in range(400)]
    errors = standard_errors(*draw())
    for key in ("accuracy", "nll", "ece"):
        spread = torch.tensor([f[key] for f in found]).std().item()
        assert errors[key] == pytest.approx(spread, rel=0.3), key
