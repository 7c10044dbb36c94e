"""What a figure of dose and response holds, and its drawing for papers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from analysis.ablation import Dose
from analysis.labels import Style, plain
from analysis.statistics import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OUTCOMES = (("accuracy", "accuracy − baseline (points)", 100.0, 0.0), ("time", "time / baseline", 1.0, 1.0))
"""Outcome, what stands at the axis, factor to its unit, and where there is no effect."""


def known_levels(dose: Dose) -> list[int]:
    """Numbers of the levels with both outcomes."""
    pairs = zip(dose.accuracy, dose.time, strict=True)
    return [i for i, pair in enumerate(pairs) if all(e.value is not None and math.isfinite(e.value) for e in pair)]


def places(dose: Dose) -> tuple[list[float], bool]:
    """Where the levels stand on the axis, numbers or else their order, and whether that is logarithmic."""
    if not dose.is_number:
        return [float(i) for i in range(len(dose.levels))], False
    values = [float(level) for level in dose.levels]
    return values, min(values) > 0 and max(values) >= 30 * min(values)


def ends(e: Estimate, factor: float) -> tuple[float, float, float]:
    """Value, low and high in the unit of the axis; without a finite interval the value thrice."""
    value = factor * (e.value or 0.0)
    low, high = (value if end is None or not math.isfinite(end) else factor * end for end in (e.low, e.high))
    return value, low, high


def draw_dose(axes: Axes, dose: Dose, style: Style, outcome: tuple[str, str, float, float]) -> None:
    """The same for a paper: means with 95 % intervals, the chosen level hollow."""
    name, title, factor, neutral = outcome
    values, log = places(dose)
    known = known_levels(dose)
    spans = np.array([ends(getattr(dose, name)[i], factor) for i in known])
    x = [values[i] for i in known]
    bars = np.abs(spans[:, 1:].T - spans[:, 0])
    axes.axhline(neutral, color="#7a828e", linewidth=0.9, linestyle="--", zorder=1)
    axes.errorbar(x, spans[:, 0], yerr=bars, fmt=f"{style.marker}-", color=style.light, capsize=2, linewidth=1.2)
    for i, value in zip(known, spans[:, 0], strict=True):
        if i == dose.chosen:
            axes.plot(values[i], value, style.marker, color=style.light, markerfacecolor="white", zorder=3)
    if log:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
    if not dose.is_number:
        axes.set_xticks(values, [plain(level) for level in dose.levels])
    axes.set_xlabel(dose.factor)
    axes.set_ylabel(title)
