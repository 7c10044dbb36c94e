"""The pool of masks: exact counts, pure patterns, and the gradient itself as the mean over the pool."""

import pytest
import torch

from fastbp import LayerDropBack
from fastbp.masks import fitting_pool, pool_masks, pool_pattern
from reference import layerdropback as twin
from test_layerdropback import batches, conv_net, cross_entropy, dropping


@pytest.mark.parametrize("units", [1, 3, 8, 37])
@pytest.mark.parametrize(("p", "pool"), [(0.5, 2), (0.5, 4), (0.25, 8), (0.3, 10), (0.8, 5), (0.0, 3)])
def test_pool_counts_are_exact(units, p, pool):  # I11
    generator = torch.Generator().manual_seed(units)
    sizes = torch.randint(1, 5, (units,), generator=generator).tolist()  # with ties
    masks = pool_masks(3, sizes, p, pool)
    dropped = round(p * pool)
    assert masks.shape == (pool, units)
    per_unit = masks.sum(0).tolist()
    assert per_unit == [dropped] * units, f"patterns that drop each unit: {per_unit}, not {dropped}"
    per_pattern = masks.sum(1)
    spread = (per_pattern.max() - per_pattern.min()).item()
    assert spread <= 1, f"units that each pattern drops: {per_pattern.tolist()}"
    largest_first = sorted(range(units), key=lambda unit: -sizes[unit])
    for start in range(0, units - pool + 1, pool):
        stratum = masks[:, largest_first[start : start + pool]].sum(1).tolist()
        assert stratum == [dropped] * pool, f"a full stratum drops {stratum} of {pool} units"


def test_pool_is_pure_and_depends_on_the_seed_alone():
    sizes = list(range(40))
    want = pool_masks(5, sizes, 0.5, 8)
    torch.manual_seed(99)
    torch.rand(3)
    assert torch.equal(want, pool_masks(5, sizes, 0.5, 8)), "the global generator changed the pool"
    assert not torch.equal(want, pool_masks(6, sizes, 0.5, 8)), "another seed gives the same pool"
    strata = want[:, :8], want[:, 8:16]
    assert not torch.equal(*strata), "two strata drop in step"


def test_pattern_of_a_step_is_pure_and_uniform():
    draws, pool = 20_000, 5
    patterns = pool_pattern(3, 4, range(draws), pool)
    alone = [pool_pattern(3, 4, range(t, t + 1), pool).item() for t in range(20)]
    assert patterns[:20].tolist() == alone, "the pattern depends on how many steps are drawn at once"
    slow = [int(twin.uniform(3, 4, t, 0) * pool) for t in range(200)]
    assert patterns[:200].tolist() == slow, "not the pattern of Python's integers"
    counts = patterns.bincount(minlength=pool).double()
    sigma = (draws / pool * (1 - 1 / pool)) ** 0.5
    worst = ((counts - draws / pool).abs() / sigma).max()
    assert worst < 4.5, f"patterns are used {counts.tolist()} times, {worst:.1f} sigma from uniform"
    assert not torch.equal(patterns, pool_pattern(3, 6, range(draws), pool)), "another epoch chooses the same patterns"


@pytest.mark.parametrize("unit", ["tensor", "layer", "block"])
def test_mean_over_the_pool_is_the_gradient(unit):
    """With the learning rate of the plan, the mean update over all M patterns is backprop's."""
    ours, plain = conv_net(torch.float64), conv_net(torch.float64)
    method = LayerDropBack(drop_rate=0.75, unit=unit, pool=4)
    estimator = dropping(ours, method)
    ((x, y),) = batches(1, torch.float64)
    cross_entropy(plain(x), y).backward()
    seen = {}
    for step in range(40):
        pattern = pool_pattern(0, 2, range(step, step + 1), 4).item()
        ours.zero_grad()
        estimator.backward(x, y)
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in ours.parameters()]
        for got, before in zip(grads, seen.get(pattern, grads), strict=True):
            assert torch.equal(got, before), f"pattern {pattern} in step {step} is not what it was"
        seen[pattern] = grads
    assert sorted(seen) == [0, 1, 2, 3], f"patterns used: {sorted(seen)}"
    head = [id(p) for p in ours[-1].parameters()]
    for i, (name, p) in enumerate(plain.named_parameters()):
        mean = sum(grads[i] for grads in seen.values()) / 4
        scale = 1.0 if id(list(ours.parameters())[i]) in head else method.lr_scale
        torch.testing.assert_close(scale * mean, p.grad, msg=f"{name}: the mean over the pool is not the gradient")


def test_pools_that_cannot_be():
    assert [fitting_pool(*pair) for pair in [(0.5, 3), (0.3, 10), (1 / 3, 4), (0.0, 7), (0.5, 2000)]] == [
        4,
        10,
        6,
        7,
        2000,
    ]
    for settings, message in (
        ({"drop_rate": 0.3, "pool": 4}, "drop_rate x pool must be a whole number: pool=10 works"),
        ({"drop_rate": 0.5, "pool": 1}, "drop_rate x pool must be a whole number: pool=2 works"),
        (
            {"drop_rate": 0.12345, "pool": 8},
            "drop_rate x pool must be a whole number: take a drop_rate that is a multiple of 1/8",
        ),
        ({"pool": -1}, "must not be negative; 0 tosses a coin per unit"),
        ({"pool": 4, "unit": "prefix"}, "unit='prefix' has one mask per cut already; set pool to 0"),
    ):
        with pytest.raises(ValueError, match=r"^LayerDropBack\.pool") as caught:
            LayerDropBack(**settings)
        assert str(caught.value) == f"LayerDropBack.pool = {settings['pool']}: {message}"
