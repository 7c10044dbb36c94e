"""Estimates with intervals over seeds: pure functions; axes in the docstrings, random generators passed in.

Means of accuracies, differences and log ratios get Student's t interval, which keeps its coverage at the
three to ten seeds that people can afford, where a bootstrap of the mean is too narrow. Statistics without a
closed form get the percentile bootstrap.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtrit

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


def median_estimate(values: ArrayLike, rng: np.random.Generator, *, level: float = LEVEL) -> Estimate:
    """Median with a percentile bootstrap interval; infinite values are allowed, NaN are left out.

    Below six values no distribution-free interval of a median reaches 95 %; this one is then at most the
    range.
    """
    x = _known(values)
    if x.size == 0:
        return Estimate()
    low, high = bootstrap_interval(x, np.median, rng, level=level)
    return Estimate(float(np.median(x)), low, high, int(x.size))


def bootstrap_interval(
    values: ArrayLike,
    statistic: Statistic,
    rng: np.random.Generator,
    *,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
) -> tuple[float | None, float | None]:
    """Percentile bootstrap interval of a statistic.

    The ends are values that the statistic took (no interpolation), so infinite values need no special case.

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
    tail = (1 - level) / 2
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
    logs = mean_estimate(np.log(a[usable]) - np.log(b[usable]), level=level)
    return Estimate(*(None if x is None else math.exp(x) for x in (logs.value, logs.low, logs.high)), n=logs.n)


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


def censored_ratio(numerator: ArrayLike, denominator: ArrayLike, rng: np.random.Generator) -> Estimate:
    """Median of the paired ratios of times that may be infinite (not reached).

    A pair in which the denominator alone is infinite counts as 0, the numerator alone as infinite; a pair in
    which both are infinite says nothing and makes the estimate empty, rather than being dropped.
    """
    a, b = np.asarray(numerator, dtype=float), np.asarray(denominator, dtype=float)
    if a.size == 0 or bool((np.isinf(a) & np.isinf(b)).any()) or bool((b == 0).any()):
        return Estimate(n=int(a.size))
    return median_estimate(a / b, rng)


def _known(values: ArrayLike) -> NDArray[np.float64]:
    x = np.asarray(values, dtype=float)
    return x[~np.isnan(x)]
