"""The performance profile as an interactive plot: share of the tasks within a factor of the best."""

from __future__ import annotations

import math

from analysis.plot import Axis, Mark, Plot, path, tick_axis
from analysis.profiles import FACTORS, MAX_FACTOR, TICKS, Profile, profile_curves
from analysis.table import Column, text


def profile_plot(found: Profile, width: int, height: int) -> Plot:
    """One step line per method with the band of the bootstrap samples."""
    x = tick_axis((0.0, math.log(MAX_FACTOR)), (64, width - 24), "time to target over the best method's", [
        (math.log(factor), f"{factor:g}\N{MULTIPLICATION SIGN}") for factor in TICKS
    ])  # fmt: skip
    quarters = [(share, f"{share:g}") for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
    y = tick_axis((-0.03, 1.03), (height - 48, 16), "share of tasks", quarters)
    factors, curves = profile_curves(found)
    places = [x(math.log(factor)) for factor in factors]
    marks = []
    for index, ((name, arms), curve) in enumerate(zip(found.arms.items(), curves, strict=True)):
        middle, low, high = (steps(places, [point[i] for point in curve], y) for i in range(3))
        within = {factor: curve[factors.index(factor)][0] for factor in FACTORS}
        said = [f"within {factor:g}\N{MULTIPLICATION SIGN}: {share(value)}" for factor, value in within.items()]
        tip = "\n".join([name, f"fastest in {share(within[1.0])} of {len(found.tasks)} tasks", *said[1:]])
        dot = next(corner for corner in middle if corner[1] == middle[-1][1])  # where it has all it will have
        marks.append(Mark(index, arms[0], *dot, (), tip, path(middle), path([*low, *reversed(high)])))
    return Plot(f"{len(found.tasks)} tasks", width, height, x, y, tuple(marks))


def share(value: float) -> str:
    return text(value, Column("", "", "share"))


def steps(places: list[float], shares: list[float], y: Axis) -> list[tuple[float, float]]:
    """Corners of a line that keeps its height until the next place, without those on a straight line."""
    corners = [(places[0], y(shares[0]))]
    for place, value in zip(places[1:], shares[1:], strict=True):
        if y(value) != corners[-1][1]:
            corners += [(place, corners[-1][1]), (place, y(value))]
    return [*corners, (places[-1], corners[-1][1])]
