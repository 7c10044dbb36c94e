"""The rounds of Highway-BP over blocks: the increments, and how they are weighed."""

import pytest
import torch
from torch import nn

from fastbp import rounds
from fastbp.chain import Chain, Residual
from fastbp.tapes import BlockPlan, Tapes


@pytest.mark.parametrize("gamma", [0.0, 0.2])
def test_increments_with_the_coefficient_one_are_the_plain_sum(gamma, monkeypatch):
    """Increment by increment, each made of the last alone, against the sum pushed on as a whole; below full k too."""
    torch.manual_seed(0)
    blocks = [Residual(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))) for _ in range(6)]
    chain = Chain(nn.Identity(), blocks, nn.Identity()).double()
    monkeypatch.setattr(rounds, "coefficients", lambda increments: torch.ones(len(increments) - 1))
    for k in (1, 2, 4, 6):
        signals = []
        for combine in (rounds.min_residual, rounds.sum_of_increments):
            torch.manual_seed(1)
            tapes = Tapes(BlockPlan(chain.residuals()), torch.randn(2, 3, dtype=torch.float64), gamma)
            signals.append(combine(tapes, torch.randn(2, 3, dtype=torch.float64), k)[0])
        for i, (a, b) in enumerate(zip(*signals, strict=True)):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14, msg=f"k={k}: w_{i} differs")


@pytest.mark.parametrize("shape", [(7, 3), (65, 2), (1, 5), (640,)], ids=str)
def test_the_coefficients_are_the_same_from_pieces(shape, monkeypatch):
    torch.manual_seed(0)
    increments = [[torch.randn(shape) * 0.5**m for _ in range(max(1, 4 - m))] for m in range(4)]
    whole = rounds.coefficients(increments)
    monkeypatch.setattr(rounds, "_PIECE", 1)
    torch.testing.assert_close(rounds.coefficients(increments), whole, rtol=1e-9, atol=1e-9)
