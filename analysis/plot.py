"""Geometry of the interactive plots: data in, pixel positions out; the template only writes them down."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pandas as pd
from matplotlib.ticker import MaxNLocator

from analysis.attainment import band, group_surfaces
from analysis.comparisons import speed_up
from analysis.figures import mean_curve, steps
from analysis.measured import Arm, Group
from analysis.statistics import Estimate
from analysis.table import Column, text
from analysis.tables import front

LABELLED = 14  # with more points, names are left to the legend and the pointer


@dataclass(frozen=True)
class Axis:
    """A linear scale from data to pixels with its ticks as (pixel, label)."""

    low: float
    high: float
    start: float
    end: float
    title: str
    ticks: tuple[tuple[float, str], ...]

    def __call__(self, value: float) -> float:
        return round(self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start), 2)


@dataclass(frozen=True)
class Mark:
    """One arm in a plot: pixel positions; `label` is where its name stands, None where there is no room."""

    index: int
    arm: Arm
    x: float
    y: float
    bars: tuple[str, ...]
    tip: str
    path: str = ""
    area: str = ""
    label: tuple[float, float, str] | None = None


@dataclass(frozen=True)
class Plot:
    """A drawing of `width` x `height` pixels."""

    title: str
    width: int
    height: int
    x: Axis
    y: Axis
    marks: tuple[Mark, ...]
    line: str = ""
    band: str = ""
    band_line: str = ""


def pareto_plot(group: Group, width: int, height: int) -> Plot:
    """Accuracy against time of all arms that have both, with the front."""
    shown = [a for a in group.arms if group.seconds(a).value is not None and group.accuracy(a).value is not None]
    seconds, scores = [group.seconds(a) for a in shown], [group.accuracy(a) for a in shown]
    surfaces = group_surfaces(group) or ()
    edge = [corner for surface in surfaces for corner in surface.corners.tolist()]
    x = axis(
        [v for e in seconds for v in ends(e)] + [s for s, _ in edge], (64, width - 24), "training time (s), median"
    )
    percents = [100 * v for e in scores for v in ends(e)] + [100 * a for _, a in edge]
    y = axis(percents, (height - 48, 16), f"{group.accuracy_name} (%), mean")
    on_front = front(group)
    marks: list[Mark] = []
    for arm, s, a in zip(shown, seconds, scores, strict=True):
        position = (x(s.value or 0), y(100 * (a.value or 0)))
        tip = point_tip(group, arm, on_front.get(arm.name))
        marks.append(Mark(group.arms.index(arm), arm, *position, bars(*position, s, a, x, y), tip))
    corners = [(x(s), y(100 * a)) for s, a in zip(*steps(group), strict=True)]
    if corners:  # what lies below and to the right of the line is dominated
        corners = [(corners[0][0], y.start), *corners, (x.end, corners[-1][1])]
    outline, middle = ([(x(s), y(100 * a)) for s, a in line] for line in band(group, x.high, y.low / 100))
    shown_marks = tuple(labelled(marks, width))
    return Plot(group.title, width, height, x, y, shown_marks, path(corners), path(outline), path(middle))


def curve_plot(group: Group, epochs: pd.DataFrame, width: int, height: int) -> Plot:
    """Mean validation accuracy against mean training time, one line per arm."""
    curves = [(i, arm, mean_curve(arm, epochs)) for i, arm in enumerate(group.arms)]
    curves = [(i, arm, curve) for i, arm, curve in curves if len(curve)]
    x = axis([0.0, *(v for _, _, c in curves for v in c["train_seconds"])], (64, width - 24), "training time (s)")
    scores = [100 * v for _, _, c in curves for v in c["val_accuracy"]]
    y = axis(scores, (height - 48, 16), "validation accuracy (%)")
    marks = []
    for i, arm, curve in curves:
        corners = [(x(s), y(100 * a)) for s, a in zip(curve["train_seconds"], curve["val_accuracy"], strict=True)]
        last = curve.iloc[-1]
        tip = f"{arm.name}\n{arm.setting}\nmean of {arm.n} runs, {len(curve)} evaluations"
        tip += f"\nends at {100 * last['val_accuracy']:.2f} % after {last['train_seconds']:.3g} s\n{seeds(arm)}"
        marks.append(Mark(i, arm, *corners[-1], (), tip, path(corners)))
    return Plot(group.title, width, height, x, y, tuple(marks))


def point_tip(group: Group, arm: Arm, on_front: tuple[bool, float] | None) -> str:
    """What the pointer shows on a point, one fact per line."""
    lines = [
        f"{arm.name} · {arm.role}",
        arm.setting,
        f"{group.accuracy_name} {text(group.accuracy(arm), Column('', '', 'percent'))} %",
        f"training time {text(group.seconds(arm), Column('', '', 'seconds'))} s",
    ]
    if (speed := speed_up(group, arm)).value is not None:
        lines.append(f"speed-up {text(speed, Column('', '', 'ratio'))}")
    if on_front is not None:
        lines.append(f"{'on' if on_front[0] else 'not on'} the front; P {text(on_front[1], Column('', '', 'share'))}")
    return "\n".join([*lines, seeds(arm)])


def seeds(arm: Arm) -> str:
    """The seeds of an arm's points, many of them as their ends."""
    found = [int(seed) for seed in arm.timed.index]
    return (
        f"{len(found)} seeds, {found[0]} to {found[-1]}" if len(found) > 12 else f"seeds {', '.join(map(str, found))}"
    )


CAP = 4  # pixels of the end of an interval bar to each side


def bars(left: float, top: float, across: Estimate, accuracy: Estimate, x: Axis, y: Axis) -> tuple[str, ...]:
    """Paths of the intervals through a point, each with a cap at its ends."""
    out = []
    if across.low is not None and across.high is not None:
        low, high = x(across.low), x(across.high)
        out.append(f"M{low:g},{top - CAP:g}v{2 * CAP}m0,{-CAP}H{high:g}m0,{-CAP}v{2 * CAP}")
    if accuracy.low is not None and accuracy.high is not None:
        low, high = y(100 * accuracy.low), y(100 * accuracy.high)
        out.append(f"M{left - CAP:g},{low:g}h{2 * CAP}m{-CAP},0V{high:g}m{-CAP},0h{2 * CAP}")
    return tuple(out)


def ends(estimate: Estimate) -> list[float]:
    """All numbers that a plot of the estimate must contain."""
    return [v for v in (estimate.value, estimate.low, estimate.high) if v is not None]


def axis(values: Iterable[float], pixels: tuple[float, float], title: str) -> Axis:
    """A scale that contains all values with a margin, its ticks at round numbers."""
    known = list(values) or [0.0, 1.0]
    low, high = min(known), max(known)
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 0.5
    low, high = (0.0 if low == 0 else low - margin), high + margin
    plain = Axis(low, high, *pixels, title, ())
    room = abs(pixels[1] - pixels[0])
    ticks = [
        float(t)
        for t in MaxNLocator(nbins=max(3, int(room // 70)), steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
        if low <= t <= high
    ]
    digits = _digits(ticks)
    return Axis(low, high, *pixels, title, tuple((plain(t), f"{t:.{digits}f}") for t in ticks))


def tick_axis(
    span: tuple[float, float], pixels: tuple[float, float], title: str, ticks: Iterable[tuple[float, str]]
) -> Axis:
    """A scale over a given span with given ticks and their labels."""
    plain = Axis(*span, *pixels, title, ())
    return Axis(*span, *pixels, title, tuple((plain(value), label) for value, label in ticks))


def _digits(ticks: Sequence[float]) -> int:
    """Decimals that tell neighbouring ticks apart."""
    return next((d for d in range(10) if len({f"{t:.{d}f}" for t in ticks}) == len(ticks)
                 and all(abs(round(t, d) - t) < 1e-9 for t in ticks)), 10)  # fmt: skip


def path(corners: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{'L' if i else 'M'}{x:g},{y:g}" for i, (x, y) in enumerate(corners))


def labelled(marks: list[Mark], width: int) -> list[Mark]:
    """Put names beside points, where one of four places is free of points and of other names."""
    if len(marks) > LABELLED:
        return marks
    taken = [(m.x - 7, m.y - 7, m.x + 7, m.y + 7) for m in marks]
    out = []
    for mark in marks:
        size = 8.5 * len(mark.arm.name) + 4
        places = [(12.0, -8.0, "start"), (-12.0, -8.0, "end"), (12.0, 16.0, "start"), (-12.0, 16.0, "end")]
        for dx, dy, anchor in places if mark.arm.role != "control" else []:
            left = mark.x + dx - (size if anchor == "end" else 0)
            box = (left, mark.y + dy - 11, left + size, mark.y + dy + 3)
            free = not any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken)
            if free and left > 64 and left + size < width:
                taken.append(box)
                mark = Mark(**{**mark.__dict__, "label": (round(mark.x + dx, 2), round(mark.y + dy, 2), anchor)})
                break
        out.append(mark)
    return out
