"""Fronts of accuracy against time. Non-dominance and hypervolume are moocore's; here are ties, unknowns and
seeds.

Shapes: k points (arms); n seeds. Seconds are minimised, accuracy is maximised.
"""

from __future__ import annotations

import warnings
from dataclasses import replace

import moocore
import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import chdtri

from analysis.statistics import LEVEL, RESAMPLES, Estimate, bootstrap_t_estimate, resampled


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
    """`centres` of bootstrap samples of the seeds.

    All arms share the drawn seeds, so what a seed does to all of them alike cancels.

    Args:
        seconds, accuracy: (n, k), row = seed; NaN where an arm has no run with that seed.

    Returns:
        Two arrays (resamples, k); NaN where a sample drew no seed that the arm has.
    """
    times, scores = np.asarray(seconds, dtype=float), np.asarray(accuracy, dtype=float)
    drawn = resampled(len(times), rng, resamples)
    return centres(times[drawn], scores[drawn])


def plausible_points(
    seconds: ArrayLike, accuracy: ArrayLike, rng: np.random.Generator, resamples: int = RESAMPLES
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Where the true centres may lie: draws from their joint confidence distribution.

    Each seed's deviations from the centres, in log seconds and accuracy, get one normal weight for all arms, and all
    weights of a draw one Student's t factor: the shares of a difference between two arms on either side of zero
    are the one-sided p values of the paired t test. At few seeds a bootstrap is too sure, as it knows neither that
    the spread itself is uncertain nor values beyond those seen.

    Args:
        seconds, accuracy: (n, k), row = seed; NaN where an arm has no run with that seed.

    Returns:
        Two arrays (resamples, k). An arm with one run stays where it is, as nothing is known of its spread.
    """
    logs = np.maximum(_log(seconds), -700.0)  # of 0 s too
    values = np.concatenate([logs, np.asarray(accuracy, dtype=float)], axis=1)
    known = np.isfinite(values)
    count = known.sum(axis=0)
    middle = np.where(known, values, 0.0).sum(axis=0) / np.maximum(count, 1)
    deviations = np.where(known, values - middle, 0.0) / np.sqrt(np.maximum(count * (count - 1), 1))
    freedom, own = np.unique(np.maximum(count - 1, 1), return_inverse=True)
    spread = np.sqrt(freedom / chdtri(freedom, rng.random((resamples, 1))))[:, own]
    drawn = np.where(count > 0, middle, np.nan) + spread * (rng.standard_normal((resamples, len(values))) @ deviations)
    k = values.shape[1] // 2
    with np.errstate(over="ignore"):
        return np.exp(drawn[:, :k]), drawn[:, k:]


def centres(seconds: ArrayLike, accuracy: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Geometric-mean seconds and mean accuracy over the seeds, axis -2 of (..., n, k); NaN are left out."""
    times, scores = _log(seconds), np.asarray(accuracy, dtype=float)
    if not (np.isnan(times).any() or np.isnan(scores).any()):
        return np.exp(times.mean(axis=-2)), scores.mean(axis=-2)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Mean of empty slice", RuntimeWarning)
        return np.exp(np.nanmean(times, axis=-2)), np.nanmean(scores, axis=-2)


def front_membership(
    seconds: ArrayLike,
    accuracy: ArrayLike,
    rng: np.random.Generator,
    resamples: int = RESAMPLES,
) -> NDArray[np.float64]:
    """Probability of each arm to be on the front: its share of the draws of `plausible_points`.

    Args:
        seconds, accuracy: (n, k), row = seed; NaN where an arm has no run with that seed.

    Returns:
        (k,) shares in [0, 1]; NaN for an arm with fewer than two runs, as one says nothing about spread.
    """
    known = np.isfinite(np.asarray(seconds, dtype=float)) & np.isfinite(np.asarray(accuracy, dtype=float))
    shares = fronts(*plausible_points(seconds, accuracy, rng, resamples)).mean(axis=0)
    return np.where(known.sum(axis=0) > 1, shares, np.nan)


def fronts(seconds: NDArray[np.float64], accuracy: NDArray[np.float64]) -> NDArray[np.bool_]:
    """`pareto_front` of every row at once: (m, k) coordinates to (m, k) masks."""
    known = np.isfinite(seconds) & np.isfinite(accuracy)
    beaten = np.zeros_like(known)
    for j in range(seconds.shape[1]):
        t, a = seconds[:, j, None], accuracy[:, j, None]
        with np.errstate(invalid="ignore"):
            better = (t <= seconds) & (a >= accuracy) & ((t < seconds) | (a > accuracy))
        beaten |= known[:, j, None] & better
    return known & ~beaten


def hypervolumes(
    seconds: NDArray[np.float64], accuracy: NDArray[np.float64], worst: NDArray[np.float64]
) -> NDArray[np.float64]:
    """`hypervolume` of every row at once, with the reference (worst seconds of the row, accuracy 0).

    Args:
        seconds, accuracy: (m, k).
        worst: (m,) seconds of the reference points.
    """
    known = np.isfinite(seconds) & np.isfinite(accuracy)
    times = np.where(known, np.minimum(seconds, worst[:, None]), worst[:, None])
    order = np.argsort(times, axis=1, kind="stable")
    times = np.take_along_axis(times, order, axis=1)
    heights = np.take_along_axis(np.where(known, accuracy, 0.0), order, axis=1)
    widths = np.diff(times, axis=1, append=worst[:, None])
    return (widths * np.maximum.accumulate(heights, axis=1).clip(min=0)).sum(axis=1)


def relative_volume(
    seconds: ArrayLike,
    accuracy: ArrayLike,
    base: int,
    rng: np.random.Generator,
    *,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
) -> Estimate:
    """Hypervolume of the arms' centres over that of one arm alone, with an interval over the seeds.

    The reference point is twice that arm's geometric-mean seconds and accuracy 0, drawn anew with every sample: the
    interval contains what is not known about the reference itself. It is the bootstrap's standard error with
    Student's t on the log scale, with two corrections. A front of many arms picks the luckiest: the lower end
    is moved down by as much as the median of `plausible_points` lies above the value. Where an arm is just on or
    off the front the standard error is too small: the upper end is at least that of their percentiles.

    Args:
        seconds, accuracy: (n, k) as in `resampled_points`.
        base: column of the arm in whose units the volume is.
    """
    times, scores = np.asarray(seconds, dtype=float), np.asarray(accuracy, dtype=float)
    centre = centres(times[None], scores[None])
    value = float(_log_volume(centre[0], centre[1], base)[0])
    drawn = _log_volume(*resampled_points(times, scores, rng, resamples), base)
    found = bootstrap_t_estimate(value, drawn, len(times), level=level)
    if found.low is None or found.high is None:
        return found.exp()
    plausible = _log_volume(*plausible_points(times, scores, rng, resamples), base)
    middle, high = np.nanquantile(plausible, (0.5, (1 + level) / 2)).tolist()
    low = found.low - max(middle - value, 0.0)
    return replace(found, low=max(low, 0.0), high=max(high, found.high)).exp()  # it contains its own base


def _log_volume(seconds: NDArray[np.float64], accuracy: NDArray[np.float64], base: int) -> NDArray[np.float64]:
    """(m,) log of the volume relative to that of column `base`; NaN where the base has none."""
    own = seconds[:, base] * accuracy[:, base]
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(own > 0, np.log(hypervolumes(seconds, accuracy, 2 * seconds[:, base]) / own), np.nan)


def _minimised(seconds: ArrayLike, accuracy: ArrayLike) -> NDArray[np.float64]:
    """(k, 2) points of which both coordinates are to be small."""
    return np.column_stack([np.asarray(seconds, dtype=float), -np.asarray(accuracy, dtype=float)])


def _log(seconds: ArrayLike) -> NDArray[np.float64]:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.log(np.asarray(seconds, dtype=float))
