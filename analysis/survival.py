"""Times to an event that may be cut short: Kaplan-Meier curve, median and restricted mean with intervals.

Shapes: n runs. A run has a time and whether the event was seen then. A run that will never have the event has
an infinite time; a run that was interrupted from outside has the time until which nothing had happened.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtri, stdtrit

from analysis.statistics import LEVEL, Estimate, median_estimate


@dataclass(frozen=True)
class Curve:
    """Kaplan-Meier estimate.

    Attributes:
        times: (m,) times of events, rising.
        at_risk, events: (m,) runs without the event just before, and events at the time.
        survival: (m,) share without the event from this time on.
    """

    times: NDArray[np.float64]
    at_risk: NDArray[np.float64]
    events: NDArray[np.float64]
    survival: NDArray[np.float64]

    def variance_sums(self) -> NDArray[np.float64]:
        """(m,) Greenwood's sums; infinite once nobody is at risk."""
        with np.errstate(divide="ignore"):
            return np.cumsum(self.events / (self.at_risk * (self.at_risk - self.events)))


def kaplan_meier(times: ArrayLike, seen: ArrayLike) -> Curve:
    """Survival curve of (n,) times, of which `seen` (n,) says whether they are events."""
    t, is_event = np.asarray(times, dtype=float), np.asarray(seen, dtype=bool)
    at = np.unique(t[is_event])
    at_risk = np.array([np.count_nonzero(t >= x) for x in at], dtype=float)
    events = np.array([np.count_nonzero((t == x) & is_event) for x in at], dtype=float)
    return Curve(at, at_risk, events, np.cumprod(1 - events / at_risk, dtype=np.float64))


def median_time(times: ArrayLike, seen: ArrayLike, *, level: float = LEVEL) -> Estimate:
    """Median time to the event with its interval; infinite where fewer than half ever have it.

    Where no run was cut short it is the plain median with the interval of its order statistics. Otherwise it
    is where the Kaplan-Meier curve passes one half, and the interval is where its pointwise log-log interval
    contains one half (Brookmeyer and Crowley 1982).

    Args:
        times, seen: (n,) as in the module's description.
    """
    t, is_event = np.asarray(times, dtype=float), np.asarray(seen, dtype=bool)
    if not (np.isfinite(t) & ~is_event).any():
        return median_estimate(t, level=level)
    curve = kaplan_meier(t, is_event)
    low, high = _pointwise(curve, level)
    value = _first(curve.times, curve.survival < 0.5 - 1e-12)
    half = np.flatnonzero(np.isclose(curve.survival, 0.5, rtol=0, atol=1e-12))
    if half.size:  # flat at one half: the middle, as in a plain median
        value = (float(curve.times[half[0]]) + value) / 2
    n = int(t.size)
    if n < 2:
        return Estimate(value, n=n)
    return Estimate(value, _first(curve.times, low <= 0.5), _first(curve.times, high < 0.5), n)


def _pointwise(curve: Curve, level: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Ends of the log-log interval of the survival curve, each (m,); [0, 1] once nobody is at risk."""
    s = curve.survival
    inside = (s > 0) & (s < 1)
    low, high = np.zeros_like(s), np.ones_like(s)
    log = np.log(s[inside])
    error = np.sqrt(curve.variance_sums()[inside]) / np.abs(log)
    z = float(ndtri(0.5 + level / 2))
    low[inside], high[inside] = np.exp(log * np.exp(z * error)), np.exp(log * np.exp(-z * error))
    return low, high


def restricted_mean(times: ArrayLike, seen: ArrayLike, horizon: float, *, level: float = LEVEL) -> Estimate:
    """Mean time without the event within the horizon: area under the survival curve up to it.

    Where no run was cut short before the horizon it is the mean of min(time, horizon) with Student's t interval;
    otherwise the variance is Greenwood's, whose interval is a little narrow below ten runs.

    Args:
        times, seen: (n,) as in the module's description.
    """
    t, is_event = np.asarray(times, dtype=float), np.asarray(seen, dtype=bool)
    n = int(t.size)
    if n == 0 or not math.isfinite(horizon):
        return Estimate(n=n)
    curve = kaplan_meier(t, is_event)
    inside = curve.times < horizon
    edges = np.concatenate([[0.0], curve.times[inside], [horizon]])
    heights = np.concatenate([[1.0], curve.survival[inside]])
    areas = heights * np.diff(edges)
    value = float(areas.sum())
    if n < 2:
        return Estimate(value, n=n)
    right = areas[::-1].cumsum()[::-1][1:]  # area to the right of each event
    at_risk, events = curve.at_risk[inside], curve.events[inside]
    with np.errstate(divide="ignore", invalid="ignore"):
        parts = np.where(right > 0, right**2 * events / (at_risk * (at_risk - events)), 0.0)
    half = float(stdtrit(n - 1, 0.5 + level / 2)) * math.sqrt(float(parts.sum()) * n / (n - 1))
    return Estimate(value, max(value - half, 0.0), min(value + half, horizon), n)


def _first(times: NDArray[np.float64], mask: NDArray[np.bool_]) -> float:
    """First of the times at which the mask holds, infinite if none."""
    found = np.flatnonzero(mask)
    return float(times[found[0]]) if found.size else math.inf
