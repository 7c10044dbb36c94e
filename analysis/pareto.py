"""Fronts of accuracy against time. Non-dominance and hypervolume are moocore's; here are ties, unknowns and
seeds.

Shapes: k points (arms); n seeds. Seconds are minimised, accuracy is maximised.
"""

from __future__ import annotations

import warnings

import moocore
import numpy as np
from numpy.typing import ArrayLike, NDArray

from analysis.statistics import LEVEL, RESAMPLES, Estimate, resampled


def pareto_front(seconds: ArrayLike, accuracy: ArrayLike) -> NDArray[np.bool_]:
    """Which points no other point beats.

    A point is beaten by one that is at least as fast and at least as accurate and better in one of the two;
    equal points are all on the front or all off it. A point with an unknown or infinite coordinate is never
    on the front.

    Args:
        seconds: (k,).
        accuracy: (k,).

    Returns:
        (k,) mask.
    """
    points = _minimised(seconds, accuracy)
    front = np.zeros(len(points), dtype=bool)
    known = np.isfinite(points).all(axis=1)
    if known.any():
        front[known] = moocore.is_nondominated(points[known], keep_weakly=True)
    return front


def hypervolume(seconds: ArrayLike, accuracy: ArrayLike, reference: tuple[float, float]) -> float:
    """Area that the points dominate, up to the reference point, in seconds times accuracy.

    Args:
        seconds, accuracy: (k,); unknown points are left out.
        reference: the worst seconds and the worst accuracy that count; points beyond it contribute nothing.
    """
    points = _minimised(seconds, accuracy)
    corner = np.array([reference[0], -reference[1]])
    points = points[np.isfinite(points).all(axis=1)]
    return float(moocore.hypervolume(points, ref=corner)) if len(points) else 0.0


def resampled_points(
    seconds: ArrayLike, accuracy: ArrayLike, rng: np.random.Generator, resamples: int = RESAMPLES
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Median seconds and mean accuracy of every arm in bootstrap samples of the seeds.

    All arms share the drawn seeds, so what a seed does to all of them alike cancels.

    Args:
        seconds, accuracy: (n, k), row = seed; NaN where an arm has no run with that seed.

    Returns:
        Two arrays (resamples, k); NaN where a sample drew no seed that the arm has.
    """
    times, scores = np.asarray(seconds, dtype=float), np.asarray(accuracy, dtype=float)
    drawn = resampled(len(times), rng, resamples)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN slice|Mean of empty slice", RuntimeWarning)
        return np.nanmedian(times[drawn], axis=1), np.nanmean(scores[drawn], axis=1)


def front_membership(
    seconds: ArrayLike, accuracy: ArrayLike, rng: np.random.Generator, resamples: int = RESAMPLES
) -> NDArray[np.float64]:
    """Share of bootstrap samples of the seeds in which each arm is on the front.

    Args:
        seconds, accuracy: (n, k) as in `resampled_points`.

    Returns:
        (k,) shares in [0, 1]; all NaN where n < 2, as one seed says nothing about spread.
    """
    times = np.asarray(seconds, dtype=float)
    if len(times) < 2:
        return np.full(times.shape[1], np.nan)
    samples = zip(*resampled_points(seconds, accuracy, rng, resamples), strict=True)
    return np.mean([pareto_front(t, a) for t, a in samples], axis=0)


def hypervolume_estimate(
    seconds: ArrayLike,
    accuracy: ArrayLike,
    reference: tuple[float, float],
    rng: np.random.Generator,
    *,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
) -> Estimate:
    """Hypervolume of the arms' (median seconds, mean accuracy), with a bootstrap interval over the seeds.

    Args:
        seconds, accuracy: (n, k) as in `resampled_points`.
    """
    times, scores = np.asarray(seconds, dtype=float), np.asarray(accuracy, dtype=float)
    n = len(times)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN slice|Mean of empty slice", RuntimeWarning)
        value = hypervolume(np.nanmedian(times, axis=0), np.nanmean(scores, axis=0), reference)
    if n < 2:
        return Estimate(value, n=n)
    samples = zip(*resampled_points(times, scores, rng, resamples), strict=True)
    volumes = [hypervolume(t, a, reference) for t, a in samples]
    low, high = np.quantile(volumes, ((1 - level) / 2, (1 + level) / 2))
    return Estimate(value, float(low), float(high), n)


def _minimised(seconds: ArrayLike, accuracy: ArrayLike) -> NDArray[np.float64]:
    """(k, 2) points of which both coordinates are to be small."""
    return np.column_stack([np.asarray(seconds, dtype=float), -np.asarray(accuracy, dtype=float)])
