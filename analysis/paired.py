"""Tests of paired differences, their correction for many comparisons, and what n pairs could have shown."""

from __future__ import annotations

import itertools
import math
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from scipy.optimize import brentq
from scipy.special import nctdtr, stdtr, stdtrit

ALPHA = 0.05
POWER = 0.8
ROUNDING = 1e-9  # values that differ by a smaller share are equal
EXACT_PAIRS = 14  # up to here all 2**n signs are tried


def t_test(differences: ArrayLike) -> float | None:
    """Two-sided p of Student's paired t test; None below two pairs.

    Differences without spread (accuracies are multiples of one over the images) say nothing about how much others
    would vary: their p is the least that sign flips can have, 2**(1 - n). Their t interval is a point all the same.

    Args:
        differences: (n,) paired differences; NaN are left out.
    """
    x = known(differences)
    if x.size < 2:
        return None
    mean, error = float(x.mean()), float(x.std(ddof=1)) / math.sqrt(x.size)
    if without_spread(x):
        return 1.0 if mean == 0 else 2.0 ** (1 - x.size)
    return float(2 * stdtr(x.size - 1, -abs(mean) / error))


def without_spread(*samples: NDArray[np.float64]) -> bool:
    """Whether the values of every sample are equal, but for rounding of the largest of all.

    Args:
        samples: each (n,), n at least 2.
    """
    largest = max(float(np.abs(x).max()) for x in samples)
    return all(float(x.std(ddof=1)) <= ROUNDING * largest for x in samples)


def sign_flip_test(differences: ArrayLike, rng: np.random.Generator, resamples: int = 20_000) -> float | None:
    """Two-sided p of the mean under random signs; exact up to 14 pairs; None below two pairs.

    It assumes only that without an effect a difference is as likely as its negative, and cannot fall below
    2**(1 - n): with five pairs below 0.0625.

    Args:
        differences: (n,) paired differences; NaN are left out.
    """
    x = known(differences)
    if x.size < 2:
        return None
    if x.size <= EXACT_PAIRS:
        signs = np.array(list(itertools.product((-1.0, 1.0), repeat=x.size - 1)))
        sums = np.abs(x[0] + signs @ x[1:])  # by symmetry the first sign may stay
        return float(np.mean(sums >= abs(x.sum()) * (1 - 1e-12)))
    sums = np.abs(rng.choice((-1.0, 1.0), size=(resamples, x.size)) @ x)
    return float((1 + np.count_nonzero(sums >= abs(x.sum()) * (1 - 1e-12))) / (1 + resamples))


def wilcoxon_test(differences: ArrayLike) -> float | None:
    """Two-sided p of Wilcoxon's signed-rank test, scipy's; differences of zero are left out; None below two pairs."""
    x = known(differences)
    if x.size < 2:
        return None
    x = x[x != 0]
    if not x.size:
        return 1.0
    found: Any = stats.wilcoxon(x)
    return float(found.pvalue)


def holm(p_values: ArrayLike) -> NDArray[np.float64]:
    """Holm's adjusted p values in the given order; unknown ones stay NaN and do not count.

    >>> holm([0.01, 0.04, 0.03]).round(3).tolist()
    [0.03, 0.06, 0.06]
    """
    p = np.asarray(p_values, dtype=float)
    out = np.full(p.shape, np.nan)
    found = np.flatnonzero(~np.isnan(p))
    order = found[np.argsort(p[found], kind="stable")]
    out[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(order.size, 0, -1)), 1.0)
    return out


@lru_cache(maxsize=1024)
def detectable_effect(n: int, alpha: float = ALPHA, power: float = POWER) -> float | None:
    """Smallest mean, in standard deviations of the differences, that a two-sided t test of n pairs finds with `power`.

    None below three pairs, where no sensible effect would be found.
    """
    if n < 3:
        return None
    df, critical = n - 1, float(stdtrit(n - 1, 1 - alpha / 2))

    def missing(shift: float) -> float:
        return power - (1 - float(nctdtr(df, shift, critical)))

    root: Any = brentq(missing, 0.0, 20 * critical)
    return float(root) / math.sqrt(n)


def known(values: ArrayLike) -> NDArray[np.float64]:
    """The finite values."""
    x = np.asarray(values, dtype=float)
    return x[np.isfinite(x)]
