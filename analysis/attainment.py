"""Attainment surfaces: which accuracy is reached by when, in how many of the seeds.

Each seed has its own front over all arms. A point (seconds, accuracy) is attained by a seed if an arm was there at
least as fast and as accurate. moocore computes the empirical attainment function.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import moocore
import numpy as np
from numpy.typing import ArrayLike, NDArray

from analysis.measured import Group
from analysis.table import Column, Table
from analysis.tables import points

BEST, MEDIAN, WORST = "some seed", "half of the seeds", "every seed"
MIN_SEEDS = 2


@dataclass(frozen=True)
class Surface:
    """Corners (k, 2) of the seconds and accuracies that a share of the seeds attains, from the fastest on."""

    name: str
    corners: NDArray[np.float64]


def attainment_surfaces(seconds: ArrayLike, accuracy: ArrayLike) -> tuple[Surface, Surface, Surface]:
    """Surfaces attained by some seed, by at least half of them, and by every seed.

    Args:
        seconds, accuracy: (n, k) points of k arms in n seeds; no NaN.
    """
    times, scores = np.asarray(seconds, dtype=float), np.asarray(accuracy, dtype=float)
    n, k = times.shape
    flat = np.column_stack([times.ravel(), -scores.ravel()])
    sets = np.repeat(np.arange(1.0, n + 1), k)
    found = moocore.eaf(flat, sets, percentiles=[0.0, 50.0, 100.0])
    surfaces = []
    for name, percent in ((BEST, 0.0), (MEDIAN, 50.0), (WORST, 100.0)):
        part = found[found[:, 2] == percent][:, :2]
        surfaces.append(Surface(name, part[np.argsort(part[:, 0], kind="stable")] * [1.0, -1.0]))
    return surfaces[0], surfaces[1], surfaces[2]


@lru_cache(maxsize=64)
def group_surfaces(group: Group) -> tuple[Surface, Surface, Surface] | None:
    """Surfaces of the candidates over the seeds that all of them have; None below two such seeds."""
    if not group.candidates:
        return None
    times, scores = points(group, group.candidates)
    complete = np.isfinite(times).all(axis=1) & np.isfinite(scores).all(axis=1)
    if np.count_nonzero(complete) < MIN_SEEDS:
        return None
    return attainment_surfaces(times[complete], scores[complete])


def band(group: Group, right: float, bottom: float) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """What is drawn: outline between the best and the worst surface, and the median surface's line.

    Args:
        right: seconds at which the drawing ends.
        bottom: accuracy at which it ends.

    Returns:
        Two lists of (seconds, accuracy), both empty where there are no surfaces.
    """
    surfaces = group_surfaces(group)
    if surfaces is None:
        return [], []
    best, median, worst = (staircase(s.corners, right, bottom) for s in surfaces)
    return [*best, *reversed(worst)], median


def staircase(corners: NDArray[np.float64], right: float, bottom: float) -> list[tuple[float, float]]:
    """Corners of the step line through a surface, from the bottom edge to the right edge."""
    line: list[tuple[float, float]] = []
    level = bottom
    for seconds, accuracy in corners.tolist():
        line += [(seconds, level), (seconds, accuracy)]
        level = accuracy
    return [*line, (right, level)]


def attainment_table(group: Group) -> Table:
    """Corners of the surfaces."""
    surfaces = group_surfaces(group)
    rows = [
        {"attained_by": surface.name, "seconds": seconds, "accuracy": accuracy}
        for surface in surfaces or ()
        for seconds, accuracy in surface.corners.tolist()
    ]
    caption = (
        "Corners of the attainment surfaces of the baseline and the methods over the seeds that all of them have: "
        "by the seconds of a row, so many seeds have an arm with at least its accuracy. The shaded band of the "
        "figure lies between “some seed” and “every seed”; the dashed line is “half of the seeds”."
    )
    columns = (
        Column("attained_by", "attained by"),
        Column("seconds", "training time", "seconds"),
        Column("accuracy", group.accuracy_name, "percent"),
    )
    return Table("attainment", "Attainment surfaces", caption, columns, rows, folded=True)
