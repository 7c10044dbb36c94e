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
    """Median seconds and mean accuracy of every arm in bootstrap samples of the seeds.

    All arms share the drawn seeds, so what a seed does to all of them alike cancels.

    Args:
        seconds, accuracy: (n, k), row = seed; NaN where an arm has no run with that seed.

    Returns:
        Two arrays (resamples, k); NaN where a sample drew no seed that the arm has.
    """
    times, scores = np.asarray(seconds, dtype=float), np.asarray(accuracy, dtype=float)
    drawn = resampled(len(times), rng, resamples)
    return centres(times[drawn], scores[drawn])


def centres(seconds: ArrayLike, accuracy: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Median seconds and mean accuracy over the seeds, axis -2 of (..., n, k); NaN are left out."""
    times, scores = np.asarray(seconds, dtype=float), np.asarray(accuracy, dtype=float)
    if not (np.isnan(times).any() or np.isnan(scores).any()):
        return np.median(times, axis=-2), scores.mean(axis=-2)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN slice|Mean of empty slice", RuntimeWarning)
        return np.nanmedian(times, axis=-2), np.nanmean(scores, axis=-2)


def front_membership(
    seconds: ArrayLike,
    accuracy: ArrayLike,
    rng: np.random.Generator,
    resamples: int = RESAMPLES,
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
    return fronts(*resampled_points(seconds, accuracy, rng, resamples)).mean(axis=0)


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

    The reference point is twice that arm's median seconds and accuracy 0, drawn anew with every sample: the
    interval contains what is not known about the reference itself. It is made on the log scale.

    Args:
        seconds, accuracy: (n, k) as in `resampled_points`.
        base: column of the arm in whose units the volume is.
    """
    times, scores = np.asarray(seconds, dtype=float), np.asarray(accuracy, dtype=float)
    centre = centres(times[None], scores[None])
    value = _log_volume(centre[0], centre[1], base)[0]
    drawn = _log_volume(*resampled_points(times, scores, rng, resamples), base)
    found = bootstrap_t_estimate(float(value), drawn, len(times), level=level).exp()
    return found if found.low is None else replace(found, low=max(found.low, 1.0))  # it contains its own base


def _log_volume(seconds: NDArray[np.float64], accuracy: NDArray[np.float64], base: int) -> NDArray[np.float64]:
    """(m,) log of the volume relative to that of column `base`; NaN where the base has none."""
    own = seconds[:, base] * accuracy[:, base]
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(own > 0, np.log(hypervolumes(seconds, accuracy, 2 * seconds[:, base]) / own), np.nan)


def _minimised(seconds: ArrayLike, accuracy: ArrayLike) -> NDArray[np.float64]:
    """(k, 2) points of which both coordinates are to be small."""
    return np.column_stack([np.asarray(seconds, dtype=float), -np.asarray(accuracy, dtype=float)])
