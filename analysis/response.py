"""Geometry of the small plots of accuracy against a knob; the template only writes it down."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from analysis.knobs import Knob, figure_names
from analysis.plot import Axis, Plot, axis

WIDTH, HEIGHT = 340, 240  # pixels
Points = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Response:
    """One knob of one arm: trials, measured runs, and the running median as the line of `plot`."""

    plot: Plot
    family: str
    trials: Points
    measured: Points


def responses(found: Iterable[Knob]) -> list[Response]:
    """One small plot for each numeric knob of the arms that have figures."""
    return [response(knob) for own in figure_names(found).values() for knob in own]


def response(knob: Knob) -> Response:
    """Accuracy against the values of a numeric knob, on a log scale where they are spread widely."""
    shown = np.isfinite(knob.measured) & ((knob.measured > 0) if knob.is_log else True)
    measured = knob.measured[shown]
    scores, beside = 100 * knob.accuracy, 100 * knob.measured_accuracy[shown]
    title = knob.name.removeprefix("recipe.")
    pixels = (52.0, WIDTH - 12.0)
    values = [float(v) for v in (*knob.values, *measured)]
    x = log_axis(values, pixels, title) if knob.is_log else axis(values, pixels, title)
    y = axis([float(v) for v in (*scores, *beside)], (HEIGHT - 44.0, 10.0), "validation accuracy (%)")
    line = _points(knob.values, 100 * knob.line, x, y, log=knob.is_log)
    path = " ".join(f"{'L' if i else 'M'}{a:g},{b:g}" for i, (a, b) in enumerate(line))
    name = f"{knob.sweep}/{knob.arm}" if knob.sweep else knob.arm
    return Response(
        Plot(f"{name}: {title}", WIDTH, HEIGHT, x, y, (), path),
        knob.family,
        _points(knob.values, scores, x, y, log=knob.is_log),
        _points(measured, beside, x, y, log=knob.is_log),
    )


def _points(values: np.ndarray, scores: np.ndarray, x: Axis, y: Axis, *, log: bool) -> Points:
    """Pixel positions."""
    at = np.log10(values) if log else values
    return tuple((x(float(v)), y(float(s))) for v, s in zip(at, scores, strict=True))


def log_axis(values: Sequence[float], pixels: tuple[float, float], title: str) -> Axis:
    """A scale of logarithms with ticks at powers of ten, at most five."""
    low, high = (math.log10(f(values)) for f in (min, max))
    margin = 0.06 * (high - low)
    plain = Axis(low - margin, high + margin, *pixels, title, ())
    powers = list(range(math.ceil(low - margin), math.floor(high + margin) + 1))
    step = -(-len(powers) // 5)
    ticks = tuple((plain(p), f"{10.0**p:g}") for p in powers[::step])
    return Axis(plain.low, plain.high, *pixels, title, ticks)
