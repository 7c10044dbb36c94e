"""Figures for papers: PNG and SVG of the same drawing, without dates and random ids."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from analysis.frames import cells, known, where
from analysis.labels import Style
from analysis.measured import Arm, Group
from analysis.tables import front

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_RC: Any = {
    "svg.hashsalt": "fastbp",
    "text.parse_math": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e3e6ea",
    "axes.axisbelow": True,
    "font.size": 10,
    "legend.frameon": False,
}


def figures(group: Group, epochs: pd.DataFrame, styles: dict[str, Style]) -> Iterator[tuple[str, bytes]]:
    """File names and contents of the figures of one group; none where nothing was measured."""
    if not group.candidates:
        return
    for name, draw in (
        ("pareto", lambda a: _pareto(a, group, styles)),
        ("curves", lambda a: _curves(a, group, epochs, styles)),
    ):
        with matplotlib.rc_context(_RC), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing from")  # a name in a script that the font lacks
            figure = Figure(figsize=(7, 4.4), layout="constrained")
            axes = figure.subplots()
            draw(axes)
            axes.set_title(group.title, loc="left", fontsize=10)
            for suffix, metadata in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
                out = io.BytesIO()
                figure.savefig(out, format=suffix, dpi=160, metadata=metadata)
                yield f"{name}-{group.slug}.{suffix}", out.getvalue()


def _pareto(axes: Axes, group: Group, styles: dict[str, Style]) -> None:
    """Points with 95 % intervals; controls hollow; the front as a step line."""
    for arm in group.arms:
        seconds, accuracy = group.seconds(arm), group.accuracy(arm)
        if seconds.value is None or accuracy.value is None:
            continue
        style = styles[arm.family]
        hollow = arm.role == "control"
        axes.errorbar(
            seconds.value,
            100 * accuracy.value,
            xerr=_bars(seconds.value, seconds.low, seconds.high),
            yerr=100 * _bars(accuracy.value, accuracy.low, accuracy.high),
            fmt=style.marker,
            color=style.light,
            markerfacecolor="white" if hollow else style.light,
            markersize=7,
            linewidth=1,
            capsize=2,
            label=f" {arm.name}",  # matplotlib leaves out names that begin with an underscore
        )
    (right, bottom), (x, y) = (axes.get_xlim()[1], axes.get_ylim()[0]), steps(group)
    if x:  # what lies below and to the right of the line is dominated
        corners = [x[0], *x, right], [bottom, *(100 * np.array(y)), 100 * y[-1]]
        axes.plot(*corners, color="#7a828e", linewidth=1.2, zorder=1, label="front")
        axes.set(xlim=(None, right), ylim=(bottom, None))
    axes.set_xlabel("training time (s), median")
    axes.set_ylabel(f"{group.accuracy_name} (%), mean")
    _legend(axes)


def steps(group: Group) -> tuple[list[float], list[float]]:
    """Corners of the front from its fastest to its most accurate point."""
    on_front = front(group)
    corners = sorted(
        (group.seconds(arm).value or 0.0, group.accuracy(arm).value or 0.0)
        for arm in group.candidates
        if on_front[arm.name][0]
    )
    x: list[float] = []
    y: list[float] = []
    for seconds, accuracy in corners:
        if y:
            x.append(seconds)
            y.append(y[-1])
        x.append(seconds)
        y.append(accuracy)
    return x, y


def _curves(axes: Axes, group: Group, epochs: pd.DataFrame, styles: dict[str, Style]) -> None:
    """One thin line per run, one thick line per arm."""
    for arm in group.arms:
        style, hollow = styles[arm.family], arm.role == "control"
        for run in run_curves(arm, epochs):
            axes.plot(run["train_seconds"], 100 * run["val_accuracy"], color=style.light, linewidth=0.6, alpha=0.35)
        mean = mean_curve(arm, epochs)
        axes.plot(
            mean["train_seconds"],
            100 * mean["val_accuracy"],
            color=style.light,
            linewidth=1.8,
            linestyle="--" if hollow else "-",
            label=f" {arm.name}",  # matplotlib leaves out names that begin with an underscore
        )
    axes.set_xlabel("training time (s)")
    axes.set_ylabel("validation accuracy (%)")
    _legend(axes)


def _legend(axes: Axes) -> None:
    handles, names = axes.get_legend_handles_labels()
    if handles:
        axes.legend(handles, names, loc="center left", bbox_to_anchor=(1, 0.5))


def run_curves(arm: Arm, epochs: pd.DataFrame) -> list[pd.DataFrame]:
    """Evaluated epochs of each timed run of an arm."""
    own = where(epochs, epochs["run_key"].isin(arm.timed["run_key"]) & known(epochs["val_accuracy"]))
    return [part for _, part in cells(own, ["run_key"])]


def mean_curve(arm: Arm, epochs: pd.DataFrame) -> pd.DataFrame:
    """Mean seconds and mean validation accuracy over the runs, per epoch that all of them evaluated."""
    runs = run_curves(arm, epochs)
    if not runs:
        return pd.DataFrame({"epoch": [], "train_seconds": [], "val_accuracy": []})
    parts = [part for _, part in cells(pd.concat(runs), ["epoch"]) if len(part) == len(runs)]
    return pd.DataFrame([part[["epoch", "train_seconds", "val_accuracy"]].mean() for part in parts])


def _bars(value: float, low: float | None, high: float | None) -> np.ndarray:
    """(2, 1) lengths of the error bar below and above; zero where there is no interval."""
    low, high = (value if end is None else end for end in (low, high))
    return np.array([[value - low], [high - value]])
