"""Counted FLOPs: layers against their definition, random masks against all masks there are."""

import itertools

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fastbp import DDG, DecorrelatedBP, LayerDropBack
from fastbp.flops import Counter, step_flops
from fastbp.masks import evenly, prefix_top, stratified_masks
from test_layerdropback import batches, conv_net, dropping


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


def flops_of(estimator, mask, x, y):
    """Of one step with this mask."""
    estimator.told = list(mask)
    estimator.model.zero_grad()
    with Counter() as counter:
        estimator.backward(x, y)
    return counter.total


@pytest.mark.parametrize("p", [0.25, 0.5, 0.8])
@pytest.mark.parametrize("unit", ["tensor", "layer"])
def test_flops_of_random_masks_are_the_expectation(unit, p):
    """Against all 2^U masks with their probabilities: exact where every unit saves by itself and 16 p is whole."""
    estimator = dropping(conv_net(), LayerDropBack(drop_rate=p, unit=unit))
    ((x, y),) = batches(1)
    masks = list(itertools.product([False, True], repeat=len(estimator.units)))
    chances = [p ** sum(mask) * (1 - p) ** (len(mask) - sum(mask)) for mask in masks]
    x.requires_grad_()  # so that no step saves an input gradient
    want = sum(chance * flops_of(estimator, mask, x, y) for chance, mask in zip(chances, masks, strict=True))
    estimator.start_epoch(2)
    got = step_flops(estimator, x, y)
    assert got == pytest.approx(want, rel=0.01 if p == 0.8 else 1e-9), f"counted {got}, expected {want}"


@pytest.mark.parametrize(("p", "close"), [(0.3, 0.01), (0.5, 0.02), (0.8, 0.05)])
def test_flops_of_random_masks_in_a_deep_net(p, close):
    """With the input gradients that nobody below needs: of equal layers, the i-th has one with probability 1 - p^i."""
    depth, width, size = 20, 16, 4
    net = nn.Sequential(*[nn.Linear(width, width) for _ in range(depth)], nn.Linear(width, width))
    estimator = dropping(net, LayerDropBack(drop_rate=p))
    x, y = torch.randn(size, width), torch.zeros(size, dtype=torch.int64)
    products = (depth + 1) + (depth * (1 - p) + 1) + sum(1 - p**i for i in range(1, depth + 1))
    want = 2 * size * width * width * products
    assert step_flops(estimator, x, y) == pytest.approx(want, rel=close)


def test_flops_do_not_depend_on_the_seed_of_the_masks():
    ((x, y),) = batches(1)
    found = {step_flops(dropping(conv_net(), LayerDropBack(seed=seed)), x, y) for seed in range(4)}
    assert len(found) == 1, f"counts {found}"


@pytest.mark.parametrize("method", [LayerDropBack(pool=4), LayerDropBack(unit="tensor", pool=8, drop_rate=0.25)])
def test_flops_of_a_pool_are_the_mean_of_its_masks(method):
    ((x, y),) = batches(1)
    estimator = dropping(conv_net(), method)
    want = [flops_of(estimator, mask.tolist(), x, y) for mask in estimator.pool]
    estimator.start_epoch(2)
    assert step_flops(estimator, x, y) == sum(want) / method.pool


def test_flops_of_prefix_are_the_mean_of_its_cuts():
    ((x, y),) = batches(1)
    estimator = dropping(conv_net(), LayerDropBack(unit="prefix"))
    units = len(estimator.units)
    want = [flops_of(estimator, [u < cut for u in range(units)], x, y) for cut in range(prefix_top(units, 0.5) + 1)]
    assert want == sorted(want, reverse=True)
    assert want[0] > 2 * want[-1], f"a whole step {want[0]}, all dropped {want[-1]}"
    estimator.start_epoch(2)
    assert step_flops(estimator, x, y) == sum(want) / len(want)


@pytest.mark.parametrize("inner", [DecorrelatedBP(decor_lr=1e-3, interval=3), DDG(modules=4)], ids=str)
def test_flops_of_a_masked_method_count_every_mask_at_every_place(inner):
    """Two masks in a period of three steps, or up to three steps late."""
    ((x, y),) = batches(1)
    method = LayerDropBack(unit="layer", pool=2, inner=inner)
    estimator = dropping(conv_net(), method)
    for _ in range(4):  # what is done once, a full pipeline
        flops_of(estimator, [False] * len(estimator.units), x, y)
    per_mask = []
    for mask in estimator.pool:
        for _ in range(3):  # until the latest module has this mask
            flops_of(estimator, mask.tolist(), x, y)
        per_mask.append(sum(flops_of(estimator, mask.tolist(), x, y) for _ in range(3)) / 3)
    estimator.start_epoch(2)
    assert step_flops(estimator, x, y) == pytest.approx(sum(per_mask) / 2)


def test_masks_to_count_with():
    assert evenly(5, 16).tolist() == [0, 1, 2, 3, 4]
    assert evenly(32, 16).tolist() == list(range(1, 32, 2))
    for p in (0.0, 0.25, 0.3, 0.5, 0.9):
        masks = stratified_masks(50, p, 16)
        rates = masks.double().mean(0)
        assert (rates - p).abs().max() < 1 / 16, f"p = {p}: rates {rates.tolist()}"
        assert abs(rates.mean().item() - p) < 0.02, f"p = {p}: mean rate {rates.mean()}"
    assert len({tuple(column) for column in masks.T.tolist()}) > 30, "units are dropped in step"
