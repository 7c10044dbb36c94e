"""Estimates with intervals over seeds: pure functions; axes in the docstrings, random generators passed in.

Means of accuracies, differences and log ratios get Student's t interval, which keeps its coverage at the
three to ten seeds that people can afford, where a bootstrap of the mean is too narrow. Medians get the
interval of their order statistics. What has no closed form (hypervolume, speed-up at equal accuracy) gets the
bootstrap's standard error with Student's t, which for a mean is Student's interval again.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import bdtr, ndtr, stdtrit

LEVEL = 0.95
RESAMPLES = 4000

Statistic = Callable[..., NDArray[np.float64]]
"""`statistic(values, axis=...)` reduces one axis, as numpy's mean and median do."""


@dataclass(frozen=True)
class Estimate:
    """A number with its interval.

    Attributes:
        value: None where nothing is known; may be infinite for times (target not reached).
        low, high: ends of the 95 % interval, None where n < 2.
        n: independent values (seeds) behind it.
    """

    value: float | None = None
    low: float | None = None
    high: float | None = None
    n: int = 0

    def scaled(self, factor: float) -> Estimate:
        """The estimate in another unit; `factor` is positive."""
        return Estimate(*(None if x is None else x * factor for x in (self.value, self.low, self.high)), n=self.n)

    def exp(self) -> Estimate:
        """The ratio of which this is the logarithm."""
        return Estimate(*(None if x is None else _exp(x) for x in (self.value, self.low, self.high)), n=self.n)


def generator(*names: object) -> np.random.Generator:
    """A random generator that depends on the names alone, so that one cell of a table never moves another."""
    return np.random.default_rng(zlib.crc32("\x1f".join(map(str, names)).encode()))


def mean_estimate(values: ArrayLike, *, level: float = LEVEL, bounds: tuple[float, float] | None = None) -> Estimate:
    """Mean with Student's t interval.

    Args:
        values: (n,) independent values; NaN are left out.
        bounds: the interval is cut to this range, e.g. (0, 1) for an accuracy.
    """
    x = _known(values)
    if x.size == 0:
        return Estimate()
    mean = float(x.mean())
    if x.size == 1:
        return Estimate(mean, n=1)
    half = float(stdtrit(x.size - 1, 0.5 + level / 2) * x.std(ddof=1) / math.sqrt(x.size))
    low, high = mean - half, mean + half
    if bounds is not None:
        low, high = max(low, bounds[0]), min(high, bounds[1])
    return Estimate(mean, low, high, int(x.size))


def median_estimate(values: ArrayLike, *, level: float = LEVEL) -> Estimate:
    """Median with the interval between two order statistics; infinite values are allowed, NaN are left out.

    The ends are interpolated between neighbouring order statistics so that the coverage is close to `level`
    (Hettmansperger and Sheather 1986). Up to five values the interval is the range: it covers the median with
    probability 1 - 2**(1 - n), which is 94 % at five, 88 % at four and 75 % at three.
    """
    x = np.sort(_known(values))
    n = int(x.size)
    if n < 2:
        return Estimate(float(x[0]), n=1) if n else Estimate()
    rank, weight = _median_ranks(n, level)
    ends = []
    for outer, inner in ((x[rank - 1], x[rank]), (x[n - rank], x[n - rank - 1])):
        mixed = weight > 0 and np.isfinite(outer) and np.isfinite(inner)
        ends.append(float((1 - weight) * outer + weight * inner) if mixed else float(outer))
    return Estimate(float(np.median(x)), ends[0], ends[1], n)


@lru_cache(maxsize=256)
def _median_ranks(n: int, level: float) -> tuple[int, float]:
    """Rank (from 1) of the lower end, and the weight of the next rank in it; the upper end mirrors it."""

    def coverage(rank: int) -> float:
        return 1 - 2 * float(bdtr(rank - 1, n, 0.5))

    rank = 1
    while coverage(rank + 1) >= level:
        rank += 1
    if coverage(rank) <= level:
        return rank, 0.0
    share = (coverage(rank) - level) / (coverage(rank) - coverage(rank + 1))
    return rank, (n - rank) * share / (rank + (n - 2 * rank) * share)


def bootstrap_t_estimate(value: float, drawn: ArrayLike, n: int, *, level: float = LEVEL) -> Estimate:
    """A statistic with Student's t times its bootstrap standard error on both sides.

    The standard error is widened by sqrt(n / (n - 1)): the bootstrap divides by n where a sample variance
    divides by n - 1. An end is infinite where more than a tail's share of the samples is infinite on that side.

    Args:
        value: the statistic of the sample.
        drawn: (resamples,) the statistic of bootstrap samples; NaN are left out.
        n: independent values in the sample; without an interval where n < 2.
    """
    x = _known(drawn)
    if n < 2 or x.size == 0 or math.isnan(value):
        return Estimate(None if math.isnan(value) else value, n=n)
    tail, finite = (1 - level) / 2, x[np.isfinite(x)]
    spread = float(finite.std()) if finite.size else 0.0
    half = float(stdtrit(n - 1, 1 - tail)) * spread * math.sqrt(n / (n - 1))
    low = -math.inf if np.mean(x == -math.inf) > tail else value - half
    high = math.inf if np.mean(x == math.inf) > tail else value + half
    return Estimate(value, low, high, n)


def bootstrap_interval(
    values: ArrayLike,
    statistic: Statistic,
    rng: np.random.Generator,
    *,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
) -> tuple[float | None, float | None]:
    """Percentile bootstrap interval of a statistic; of paired differences it is the paired bootstrap.

    The percentiles are moved outwards so that a mean has the width of Student's interval (Hesterberg 2015, "expanded
    percentiles"); plain ones are too narrow by sqrt((n - 1) / n) and the tails of t. With fewer than ten values
    the samples do not reach so far, and it covers less: see `tests/test_analysis_proof.py`. The ends are values
    that the statistic took (no interpolation), so infinite values need no special case.

    Args:
        values: (n,) independent values.
        statistic: reduces the axis given as `axis=`, as `np.median` does.

    Returns:
        Low and high end, (None, None) where n < 2.
    """
    x = np.asarray(values, dtype=float)
    if x.size < 2:
        return None, None
    drawn = np.sort(statistic(x[resampled(x.size, rng, resamples)], axis=1))
    tail = float(ndtr(-math.sqrt(x.size / (x.size - 1)) * stdtrit(x.size - 1, (1 + level) / 2)))
    low, high = np.quantile(drawn, (tail, 1 - tail), method="inverted_cdf")
    return float(low), float(high)


def resampled(n: int, rng: np.random.Generator, resamples: int = RESAMPLES) -> NDArray[np.intp]:
    """(resamples, n) indices drawn with replacement."""
    return rng.integers(n, size=(resamples, n))


def difference_estimate(a: ArrayLike, b: ArrayLike, *, level: float = LEVEL) -> Estimate:
    """Mean of the paired differences a - b.

    Args:
        a, b: (n,) values of the same seeds in the same order; a pair with a NaN is left out.
    """
    return mean_estimate(np.asarray(a, dtype=float) - np.asarray(b, dtype=float), level=level)


def ratio_estimate(numerator: ArrayLike, denominator: ArrayLike, *, level: float = LEVEL) -> Estimate:
    """Geometric mean of the paired ratios, with the t interval of the mean log ratio.

    Args:
        numerator, denominator: (n,) values of the same seeds in the same order; a pair with one that is not
            positive and finite is left out.
    """
    a, b = np.asarray(numerator, dtype=float), np.asarray(denominator, dtype=float)
    usable = np.isfinite(a) & np.isfinite(b) & (a > 0) & (b > 0)
    return mean_estimate(np.log(a[usable]) - np.log(b[usable]), level=level).exp()


def time_to_target(seconds: ArrayLike, accuracy: ArrayLike, target: float) -> float:
    """Seconds at the first evaluation that reached the target; infinite if none did.

    Args:
        seconds: (epochs,) cumulative training seconds.
        accuracy: (epochs,) validation accuracy after the epoch, NaN where it was not evaluated.

    >>> time_to_target([1.0, 2.0, 3.0], [0.5, 0.9, 0.8], target=0.8)
    2.0
    """
    reached = np.flatnonzero(np.asarray(accuracy, dtype=float) >= target)
    return float(np.asarray(seconds, dtype=float)[reached[0]]) if reached.size else math.inf


def censored_ratio(numerator: ArrayLike, denominator: ArrayLike) -> Estimate:
    """Median of the paired ratios of times that may be infinite (not reached).

    A pair in which the denominator alone is infinite counts as 0, the numerator alone as infinite; a pair in
    which both are infinite says nothing and makes the estimate empty, rather than being dropped.
    """
    a, b = np.asarray(numerator, dtype=float), np.asarray(denominator, dtype=float)
    if a.size == 0 or bool((np.isinf(a) & np.isinf(b)).any()) or bool((b == 0).any()):
        return Estimate(n=int(a.size))
    return median_estimate(a / b)


def _exp(x: float) -> float:
    """Infinite where the result has no place in a float."""
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf


def _known(values: ArrayLike) -> NDArray[np.float64]:
    x = np.asarray(values, dtype=float)
    return x[~np.isnan(x)]
