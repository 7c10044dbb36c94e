"""Small plots of an effect against the level of a field: geometry for the page, drawing for papers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from analysis.ablation import Dose
from analysis.dose_drawing import OUTCOMES, ends, known_levels, places
from analysis.labels import plain
from analysis.plot import Axis, Plot, axis
from analysis.response import HEIGHT, WIDTH, log_axis
from analysis.statistics import Estimate
from analysis.table import Column, text

MAX_FIGURES = 12


@dataclass(frozen=True)
class DosePlot:
    """One outcome of one field.

    Attributes:
        plot: its frame; `line` joins the means.
        points: (x, y, low, high, whether this is the chosen level, what the pointer shows) in pixels.
        neutral: height of no effect, None where it is not in the picture.
    """

    plot: Plot
    family: str
    points: tuple[tuple[float, float, float, float, bool, str], ...]
    neutral: float | None


def dose_plots(found: Iterable[Dose]) -> list[DosePlot]:
    """Accuracy and time of every field with two known levels or more."""
    return [plot for dose in shown(found) for plot in (_plot(dose, *outcome) for outcome in OUTCOMES)]


def shown(found: Iterable[Dose]) -> list[Dose]:
    """The fields that are drawn: with two levels or more whose accuracy and time are known."""
    return [dose for dose in found if len(known_levels(dose)) > 1][:MAX_FIGURES]


def _plot(dose: Dose, outcome: str, title: str, factor: float, neutral: float) -> DosePlot:
    values, log = places(dose)
    pixels = (56.0, WIDTH - 14.0)
    x = log_axis(values, pixels, dose.factor) if log else axis(values, pixels, dose.factor)
    if not dose.is_number:
        ticks = tuple((x(v), plain(level)) for v, level in zip(values, dose.levels, strict=True))
        x = Axis(x.low, x.high, *pixels, dose.factor, ticks)
    effects: list[Estimate] = getattr(dose, outcome)
    known = known_levels(dose)
    spans = {i: ends(effects[i], factor) for i in known}
    y = axis([*(v for three in spans.values() for v in three), neutral], (HEIGHT - 44.0, 10.0), title)
    points = []
    for i in known:
        value, low, high = spans[i]
        kind = Column("", "", "points" if outcome == "accuracy" else "ratio")
        tip = f"{dose.factor} = {plain(dose.levels[i])}\n{title.partition(' (')[0]}: {text(effects[i], kind)}"
        at = math.log10(values[i]) if log else values[i]
        points.append((x(at), y(value), y(low), y(high), i == dose.chosen, f"{tip}\n{effects[i].n} pairs"))
    line = " ".join(f"{'L' if n else 'M'}{p[0]:g},{p[1]:g}" for n, p in enumerate(points))
    zero = y(neutral) if y.low <= neutral <= y.high else None
    name = f"{dose.design.title}: {dose.factor}"
    return DosePlot(Plot(name, WIDTH, HEIGHT, x, y, (), line), dose.design.family, tuple(points), zero)
