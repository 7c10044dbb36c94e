"""How much Highway-BP's backward over time holds at once, in states: sequences (T, B, hidden) of one layer."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from fastbp import rounds
from fastbp.cell_rounds import LayerRounds
from fastbp.highway_recurrent import highway_layer

STEPS, BATCH, HIDDEN = 121, 8, 64  # chunks of the scan without a rest
FIXED, PER_ROUND = {"gru": 11, "lstm": 14, "lstm-ch": 16}, {"gru": 1, "lstm": 2, "lstm-ch": 2}


class LiveBytes(TorchDispatchMode):
    """The most that what is made in it takes at the same time, memory that tensors share counted once."""

    def __init__(self, given):
        super().__init__()
        self.given = {tensor.untyped_storage().data_ptr() for tensor in given}
        self.made, self.peak = WeakIdKeyDictionary(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.made[tensor] = True
        held = {storage.data_ptr(): storage.nbytes() for storage in map(torch.Tensor.untyped_storage, self.made)}
        self.peak = max(self.peak, sum(size for place, size in held.items() if place not in self.given))
        return out


def states_held(kind, iterations, gamma=0.0, *, min_residual=False):
    """Beyond the layer's input, its output and the output's gradient, which backprop holds too."""
    torch.manual_seed(0)
    layer = (nn.GRU if kind == "gru" else nn.LSTM)(HIDDEN, HIDDEN)
    x = torch.randn(STEPS, BATCH, HIDDEN, requires_grad=True)
    how = LayerRounds(iterations, gamma, "ch" if kind == "lstm-ch" else "co", min_residual)
    out = highway_layer(layer, x, how)
    G = torch.randn_like(out)
    with LiveBytes([x, out, G]) as live:
        out.backward(G)
    return live.peak / out.untyped_storage().nbytes()


@pytest.mark.parametrize("gamma", [0.0, 0.3])
@pytest.mark.parametrize("kind", FIXED)
def test_the_sum_holds_as_many_states_whatever_the_number_of_rounds(kind, gamma):
    most = FIXED[kind] + (2 if gamma else 0) + 0.1  # K's share, and what it takes along
    peaks = {k: states_held(kind, k, gamma) for k in (1, 2, 10)}
    assert max(peaks.values()) <= most, f"{peaks}, {most} at most"
    assert peaks[2] == peaks[10], f"more rounds hold no more: {peaks}"


@pytest.mark.parametrize("kind", FIXED)
def test_the_smallest_residual_holds_one_set_of_signals_more_per_round(kind, monkeypatch):
    monkeypatch.setattr(rounds, "_PIECE", 1)  # as many pieces as those of a large state
    peaks = {k: states_held(kind, k, min_residual=True) for k in (2, 5, 10)}
    for k, peak in peaks.items():
        most = FIXED[kind] + PER_ROUND[kind] * (k + 1) + 0.2
        assert peak <= most, f"k = {k}: {peak:.2f} states, {most} at most; of all k: {peaks}"
