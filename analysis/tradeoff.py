"""Seconds to the same accuracy, read off curves of accuracy against time.

A curve is k points of one method: its settings or budgets, or the evaluations of a run. What counts is the best
accuracy so far in order of time; between two such records the logarithm of time is interpolated linearly in
accuracy.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from analysis.statistics import LEVEL, RESAMPLES, Estimate, bootstrap_t_estimate, resampled

LONGEST = 256  # points of a curve that are used; a longer one is thinned


def reaching_log_seconds(log_seconds: ArrayLike, accuracy: ArrayLike, level: ArrayLike) -> NDArray[np.float64]:
    """Log of the seconds at which each curve reaches an accuracy; infinite where it never does.

    A curve whose first point is already as accurate counts as reaching it there: nothing faster was measured.

    Args:
        log_seconds, accuracy: (m, k), in any order; NaN are points that are not there.
        level: (m,) accuracies to reach, or one for all.
    """
    times, scores = np.asarray(log_seconds, dtype=float), np.asarray(accuracy, dtype=float)
    m, k = times.shape
    if k == 0:
        return np.full(m, np.inf)
    known = np.isfinite(times) & np.isfinite(scores)
    times, scores = np.where(known, times, np.inf), np.where(known, scores, -np.inf)
    order = np.lexsort((-scores, times), axis=1)
    times, scores = np.take_along_axis(times, order, axis=1), np.take_along_axis(scores, order, axis=1)
    best = np.maximum.accumulate(scores, axis=1)
    wanted = np.broadcast_to(np.asarray(level, dtype=float), (m,))
    enough = best >= wanted[:, None]
    reached = enough.any(axis=1)
    after = enough.argmax(axis=1)
    before = np.argmax(best == np.take_along_axis(best, np.maximum(after - 1, 0)[:, None], axis=1), axis=1)
    rows = np.arange(m)
    t0, a0, t1, a1 = times[rows, before], best[rows, before], times[rows, after], best[rows, after]
    with np.errstate(invalid="ignore", divide="ignore"):
        inner = t0 + (t1 - t0) * (wanted - a0) / (a1 - a0)
    return np.where(reached, np.where(after == 0, t1, inner), np.inf)


def equal_accuracy_speed_up(
    base: tuple[NDArray[np.float64], NDArray[np.float64]],
    arm: tuple[NDArray[np.float64], NDArray[np.float64]],
    level: float | None,
    rng: np.random.Generator,
    *,
    point: int = 0,
    confidence: float = LEVEL,
    resamples: int = RESAMPLES,
) -> tuple[Estimate, float, float, float]:
    """Baseline's seconds over the arm's at the same accuracy, with an interval over paired seeds.

    Curves go through the geometric mean of the seconds and the mean of the accuracies over the seeds; samples of
    the seeds are drawn for both curves alike. The interval is made on the log scale.

    Args:
        base, arm: seconds and accuracies, each (n, k), row = seed; no NaN.
        level: accuracy to reach; None: the mean accuracy of the baseline's point `point`, drawn anew with it.

    Returns:
        Speed-up, accuracy, baseline's and arm's seconds. The speed-up is 0 where the arm does not reach the
        accuracy and infinite where the baseline does not; without a value where neither does.
    """
    n = len(base[0])
    base, arm = _thinned(base), _thinned(arm)
    weights = np.full((1, n), 1 / n)
    if n > 1:
        drawn = resampled(n, rng, resamples)
        counts = np.zeros((resamples, n))
        np.add.at(counts, (np.arange(resamples)[:, None], drawn), 1 / n)
        weights = np.vstack([weights, counts])
    curves = [(weights @ np.log(seconds), weights @ accuracy) for seconds, accuracy in (base, arm)]
    wanted = np.full(len(weights), level) if level is not None else curves[0][1][:, point]
    slow, fast = (reaching_log_seconds(*curve, wanted) for curve in curves)
    if level is None:
        slow = np.minimum(slow, curves[0][0][:, point])  # rounding must not put the point beyond itself
    with np.errstate(invalid="ignore"):
        logs = slow - fast
    found = bootstrap_t_estimate(float(logs[0]), logs[1:], n, level=confidence)
    return found.exp(), float(wanted[0]), float(np.exp(slow[0])), float(np.exp(fast[0]))


def _thinned(
    curve: tuple[NDArray[np.float64], NDArray[np.float64]],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """At most `LONGEST` points, evenly spread, the first and the last among them."""
    seconds, accuracy = curve
    k = seconds.shape[1]
    if k <= LONGEST:
        return curve
    kept = np.unique(np.linspace(0, k - 1, LONGEST).round().astype(int))
    return seconds[:, kept], accuracy[:, kept]
