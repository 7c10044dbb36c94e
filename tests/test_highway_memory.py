"""How many states Highway-BP's rounds hold at once: three per block, whatever the number of rounds."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from fastbp.chain import Chain, Residual
from fastbp.rounds import min_residual, sum_of_increments
from fastbp.tapes import BlockPlan, Tapes

BLOCKS, SHAPE = 16, (4, 6)


class Live(TorchDispatchMode):
    """Counts the tensors of one shape that are alive at the same time, those that share their memory as one."""

    def __init__(self):
        super().__init__()
        self.made, self.peak = WeakIdKeyDictionary(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.shape == SHAPE:
            self.made[out] = True
            self.peak = max(self.peak, len({tensor.data_ptr() for tensor in self.made}))
        return out


def states_held(combine, iterations, gamma=0.0):
    torch.manual_seed(0)
    blocks = [Residual(nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 6))) for _ in range(BLOCKS)]
    tapes = Tapes(BlockPlan(Chain(nn.Identity(), blocks, nn.Identity()).residuals()), torch.randn(SHAPE), gamma)
    with Live() as live:
        combine(tapes, torch.randn(SHAPE), iterations)
    return live.peak


@pytest.mark.parametrize("gamma", [0.0, 0.2])
def test_the_sum_holds_three_states_per_block(gamma):
    peaks = {k: states_held(sum_of_increments, k, gamma) for k in (1, 2, 4, 8)}
    assert max(peaks.values()) <= 3 * BLOCKS + 4, peaks
    assert peaks[4] == peaks[8], f"more rounds hold no more: {peaks}"


def test_the_smallest_residual_holds_one_more_per_round():
    peaks = {k: states_held(min_residual, k) for k in (2, 4, 8)}
    assert all(peak <= (k + 3) * BLOCKS + 4 for k, peak in peaks.items()), peaks
