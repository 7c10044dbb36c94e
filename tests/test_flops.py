"""Counted FLOPs: convolutions, grouped ones too, against what a layer computes by its definition."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fastbp.flops import Counter


def count(layer, x, frozen=False):
    """FLOPs of the forward, and of forward and backward."""
    layer.weight.requires_grad_(not frozen)
    with Counter() as forward:
        y = layer(x)
    with Counter() as backward:
        y.sum().backward()
    return forward.total, backward.total


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_each_gradient_of_a_convolution_costs_a_forward(kind, groups):
    """2 multiply-adds per weight and position, whatever the groups; a frozen weight's gradient is not counted."""
    layer = kind(8, 16, 3, stride=2, padding=1, groups=groups)
    x = torch.randn(5, 8, 9, 9, requires_grad=True)
    positions = 5 * (9 * 9 if kind is nn.ConvTranspose2d else 5 * 5)
    want = 2 * positions * layer.weight.numel()
    assert count(layer, x) == (want, 2 * want), f"{kind.__name__}, {groups} groups: forward and backward"
    assert count(layer, x, frozen=True) == (want, want), "the gradient of the input alone"
    assert count(layer, x.detach()) == (want, want), "the gradient of the weight alone"


def test_ungrouped_convolutions_are_counted_as_torch_does():
    net = nn.Sequential(nn.Conv2d(3, 8, 5, stride=2), nn.ReLU(), nn.Conv2d(8, 4, 3, dilation=2), nn.Flatten())
    x = torch.randn(2, 3, 21, 21)
    with Counter() as ours:
        net(x).sum().backward()
    with FlopCounterMode(display=False) as theirs:
        net(x).sum().backward()
    assert ours.total == theirs.get_total_flops()
