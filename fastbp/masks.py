"""Which units LayerDropBack drops: pure functions of (seed, epoch, step, unit), without any generator.

Every device, rank, resumed run and recomputed forward therefore sees the same masks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_POOL_EPOCH = -1  # the pool's own random numbers: no step ever draws in this epoch
_STRATIFIED_EPOCHS = (-2, -3)  # nor in these


def dropped_mask(seed: int, epoch: int, steps: range, units: Tensor, drop_rate: float) -> Tensor:
    """Which units are dropped where every unit has a coin of its own.

    Args:
        seed: of all masks.
        epoch: 0-based.
        steps: optimizer steps within the epoch.
        units: unit indices, shape (U,), int64.
        drop_rate: probability that a unit is dropped.

    Returns:
        bool tensor, shape (len(steps), U), True with probability `drop_rate`, independent over all four arguments.
    """
    return uniform(seed, epoch, steps, units) < drop_rate


def prefix_top(units: int, drop_rate: float) -> int:
    """The highest cut: the cut is uniform on 0..top, so that units are dropped `drop_rate` of the time on average.

    Above 1/2, where no uniform cut from 0 reaches that average, the top is the number of units.
    """
    return min(round(2 * drop_rate * units), units)


def prefix_mask(seed: int, epoch: int, steps: range, units: int, drop_rate: float) -> Tensor:
    """Which units lie below the step's random cut: bool, shape (len(steps), units)."""
    cuts = (_of_step(seed, epoch, steps) * (prefix_top(units, drop_rate) + 1)).floor()
    return torch.arange(units) < cuts[:, None]


def pool_masks(seed: int, sizes: Sequence[int], drop_rate: float, pool: int) -> Tensor:
    """The fixed set of patterns that steps choose from, as even as M patterns can be.

    Units are sorted by size, so that what costs (convolutions) and what does not (norms) falls apart, and dealt into
    strata of M neighbours. Unit i of the n in a stratum is dropped by p M patterns in a row, the first of them
    floor(i M / n): in a full stratum a circulant matrix. Each stratum then shuffles the patterns. So every unit is
    dropped by exactly p M patterns, every pattern drops exactly p M units of every full stratum, and in the last,
    partial one the numbers differ by at most 1.

    Args:
        seed: of all masks.
        sizes: of each unit, such as the elements of its largest tensor, shape (U,).
        drop_rate: p, with p M whole.
        pool: the number M of patterns.

    Returns:
        bool tensor, shape (M, U).
    """
    masks = torch.zeros(pool, len(sizes), dtype=torch.bool)
    order = sorted(range(len(sizes)), key=lambda unit: -sizes[unit])
    for stratum, start in enumerate(range(0, len(order), pool)):
        units = torch.tensor(order[start : start + pool])
        first = torch.arange(len(units)) * pool // len(units)
        draws = uniform(seed, _POOL_EPOCH, range(stratum, stratum + 1), torch.arange(pool))
        shuffled = draws[0].argsort()
        masks[:, units] = (shuffled[:, None] - first) % pool < round(drop_rate * pool)
    return masks


def pool_pattern(seed: int, epoch: int, steps: range, pool: int) -> Tensor:
    """The pattern of each step, uniform on 0..pool-1: int64, shape (len(steps),)."""
    return (_of_step(seed, epoch, steps) * pool).long()


def stratified_masks(units: int, drop_rate: float, count: int) -> Tensor:
    """A few masks whose mean stands for all masks of independent coins, the same in every run.

    Over the masks, the numbers of a unit fall into `count` strata of equal size, one each, in an order of the unit's
    own. So each unit is dropped in floor or ceil of p x count masks, p x count of them on average; which units are
    dropped together is random.

    Args:
        units: their number U.
        drop_rate: p.
        count: of the masks.

    Returns:
        bool tensor, shape (count, U).
    """
    order, within = (uniform(0, epoch, range(count), torch.arange(units)) for epoch in _STRATIFIED_EPOCHS)
    return (order.argsort(dim=0) + within) / count < drop_rate


def evenly(total: int, count: int) -> Tensor:
    """At most `count` of the indices 0..total-1, evenly spaced: int64, all of them where they are few.

    >>> evenly(3, 16).tolist(), evenly(100, 4).tolist()
    ([0, 1, 2], [12, 37, 62, 87])
    """
    count = min(total, count)
    return (2 * torch.arange(count) + 1) * total // (2 * count)


def fitting_pool(drop_rate: float, pool: int) -> int | None:
    """The smallest pool, of at least `pool` patterns, that can drop every unit by exactly `drop_rate` of them.

    None where there is none up to 1000.

    >>> fitting_pool(0.5, 4), fitting_pool(0.3, 4)
    (4, 10)
    """
    sizes = range(pool, max(pool, 1000) + 1)
    return next((size for size in sizes if abs(drop_rate * size - round(drop_rate * size)) < 1e-9), None)


def uniform(seed: int, epoch: int, steps: range, units: Tensor) -> Tensor:
    """Uniform numbers in [0, 1), shape (len(steps), U), float64: 53 bits of a counter-based 64-bit hash."""
    word = _mix(torch.tensor(seed)) + epoch
    word = _mix(_mix(word) + torch.arange(steps.start, steps.stop)[:, None])
    word = _mix(word + units)
    return _shift(word, 11).double() * 2.0**-53


def _of_step(seed: int, epoch: int, steps: range) -> Tensor:
    """One uniform number per step, shape (len(steps),)."""
    return uniform(seed, epoch, steps, torch.zeros(1, dtype=torch.int64))[:, 0]


def _mix(word: Tensor) -> Tensor:
    """The splitmix64 finaliser (Steele, Lea, Flood, OOPSLA 2014) on int64 words, which wrap like unsigned ones."""
    word = word + -7046029254386353131
    word = (word ^ _shift(word, 30)) * -4658895280553007687
    word = (word ^ _shift(word, 27)) * -7723592293110705685
    return word ^ _shift(word, 31)


def _shift(word: Tensor, bits: int) -> Tensor:
    """Logical shift to the right of an int64 tensor."""
    return (word >> bits) & ((1 << (64 - bits)) - 1)
