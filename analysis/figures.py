"""Figures for papers: what each of them draws."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.collections import LineCollection

from analysis.attainment import band
from analysis.curves import epochs_of, learning_curves
from analysis.dose_drawing import OUTCOMES, draw_dose
from analysis.frames import known, where
from analysis.knobs import Knob, figure_names
from analysis.labels import Style, shortened
from analysis.measured import Arm, Group
from analysis.profiles import MAX_FACTOR, TICKS, Profile, profile_curves
from analysis.rendering import Drawing
from analysis.shades import arm_styles
from analysis.tables import front

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from analysis.ablation import Dose

MAX_POINTS = 500  # of a drawn curve


def figures(group: Group, epochs: pd.DataFrame, styles: dict[str, Style]) -> Iterator[Drawing]:
    """The figures of one group; none where nothing was measured."""
    if not group.candidates:
        return
    drawn = arm_styles(group, styles)
    curves = [Curves(arm, drawn[arm], run_curves(arm, epochs), mean_curve(arm, epochs)) for arm in group.arms]
    for name, panel in (
        ("pareto", partial(_pareto, group=group, drawn=drawn)),
        ("curves", partial(_curves, arms=curves)),
    ):
        yield Drawing(f"{name}-{group.slug}", group.title, (panel,))


def knob_figures(knobs: Iterable[Knob], styles: dict[str, Style]) -> Iterator[Drawing]:
    """One figure for each searched arm, one panel for each numeric knob."""
    for name, own in figure_names(knobs).items():
        first = own[0]
        panels = tuple(partial(_knob, knob=knob, style=styles[knob.family]) for knob in own)
        yield Drawing(name, f"{first.sweep}/{first.arm}" if first.sweep else first.arm, panels)


def dose_figures(doses: Sequence[Dose], slug: str, styles: dict[str, Style]) -> Iterator[Drawing]:
    """One figure for each field of an ablation: accuracy and time against its levels."""
    for i, dose in enumerate(doses, 1):
        style = styles[dose.design.family]
        panels = tuple(partial(draw_dose, dose=dose, style=style, outcome=outcome) for outcome in OUTCOMES)
        yield Drawing(f"doses-{slug}-{i}", dose.design.title, panels)


def profile_figure(found: Profile, styles: dict[str, Style]) -> Drawing:
    """Performance profile: share of the tasks within a factor of the best, with the band of the samples."""
    drawn = arm_styles(found.tasks[0].group, styles)
    panel = partial(_profile, found=found, styles={name: drawn[arms[0]] for name, arms in found.arms.items()})
    return Drawing("profiles", f"{len(found.tasks)} tasks", (panel,))


def _profile(axes: Axes, found: Profile, styles: dict[str, Style]) -> None:
    factors, curves = profile_curves(found)
    for name, curve in zip(found.arms, curves, strict=True):
        color = styles[name].light
        shares, low, high = np.array(curve).T
        axes.fill_between(factors, low, high, step="post", color=color, alpha=0.12, linewidth=0)
        axes.step(factors, shares, where="post", color=color, linewidth=2, label=f" {shortened(name)}")
    axes.set(xscale="log", xlim=(1, MAX_FACTOR), ylim=(-0.02, 1.02))
    axes.set_xticks(TICKS)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    axes.set_xlabel("time to target over the best method's")
    axes.set_ylabel("share of tasks")
    _legend(axes)


def _knob(axes: Axes, knob: Knob, style: Style) -> None:
    """Trials as points with their running median, measured runs hollow."""
    if knob.is_log:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
    shown = np.isfinite(knob.measured)
    axes.plot(knob.values, 100 * knob.accuracy, style.marker, color=style.light, alpha=0.7, label="trials")
    axes.plot(knob.values, 100 * knob.line, color=style.light, linewidth=1.4, label="median")
    if shown.any():
        axes.plot(
            knob.measured[shown], 100 * knob.measured_accuracy[shown], style.marker,
            color=style.light, markerfacecolor="white", label="measured",
        )  # fmt: skip
    axes.set_xlabel(knob.name.removeprefix("recipe."))
    axes.set_ylabel("validation accuracy (%)")
    axes.legend(fontsize=7, frameon=True, framealpha=0.7, edgecolor="none")


def _pareto(axes: Axes, group: Group, drawn: dict[Arm, Style]) -> None:
    """Points with 95 % intervals; controls hollow; the front as a step line; the band of the seeds' fronts."""
    for arm in group.arms:
        seconds, accuracy = group.seconds(arm), group.accuracy(arm)
        if seconds.value is None or accuracy.value is None:
            continue
        style = drawn[arm]
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
            capsize=3,
            label=f" {shortened(arm.name)}",  # matplotlib leaves out names that begin with an underscore
        )
    (right, bottom), (x, y) = (axes.get_xlim()[1], axes.get_ylim()[0]), steps(group)
    outline, middle = band(group, right, bottom / 100)
    if outline:
        axes.fill(
            *(100 * np.array(outline) / [100, 1]).T,
            color="#7a828e",
            alpha=0.14,
            linewidth=0,
            zorder=0,
            label="seeds’ fronts",
        )
        axes.plot(*(100 * np.array(middle) / [100, 1]).T, color="#7a828e", linewidth=0.9, linestyle="--", zorder=1)
    if x:  # what lies below and to the right of the line is dominated
        corners = [x[0], *x, right], [bottom, *(100 * np.array(y)), 100 * y[-1]]
        axes.plot(*corners, color="#c3cbd6", linewidth=4, solid_joinstyle="round", zorder=0.9, label="front")
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


@dataclass(frozen=True)
class Curves:
    """One arm's learning curves: (evaluations, 2) seconds and accuracy of each run, and their mean."""

    arm: Arm
    style: Style
    runs: list[np.ndarray]
    mean: pd.DataFrame


def _curves(axes: Axes, arms: list[Curves]) -> None:
    """One thin line per run, one thick line per arm."""
    for own in arms:
        runs = [run * (1, 100) for run in own.runs]
        axes.add_collection(LineCollection(runs, colors=own.style.light, linewidths=0.6, alpha=0.35))
        axes.plot(
            own.mean["train_seconds"],
            100 * own.mean["val_accuracy"],
            color=own.style.light,
            linewidth=1.8,
            linestyle="--" if own.arm.role == "control" else "-",
            label=f" {shortened(own.arm.name)}",  # matplotlib leaves out names that begin with an underscore
        )
    axes.set_xlabel("training time (s)")
    axes.set_ylabel("validation accuracy (%)")
    _legend(axes)


def _legend(axes: Axes) -> None:
    handles, names = axes.get_legend_handles_labels()
    if handles:
        axes.legend(handles, names, loc="center left", bbox_to_anchor=(1, 0.5))


def run_curves(arm: Arm, epochs: pd.DataFrame) -> list[np.ndarray]:
    """(evaluations, 2) seconds and validation accuracy of each timed run of an arm, thinned to what can be seen."""
    curves = learning_curves(epochs, arm.timed["run_key"]).values()
    points = [np.column_stack([curve.seconds, curve.accuracy]) for curve in curves]
    points = [p[~np.isnan(p[:, 1])] for p in points]
    return [p[_thinned(len(p))] for p in points if len(p)]


def mean_curve(arm: Arm, epochs: pd.DataFrame) -> pd.DataFrame:
    """Mean seconds and mean validation accuracy over the runs, per epoch that all of them evaluated."""
    own, keys = epochs_of(epochs, arm.timed["run_key"])
    evaluated = known(own["val_accuracy"])
    own, runs = where(own, evaluated), len(np.unique(keys.codes[evaluated]))
    cells = own.groupby("epoch")
    means = pd.DataFrame(cells[["train_seconds", "val_accuracy"]].mean())
    means = where(means, cells.size() == runs).reset_index()
    return means.iloc[_thinned(len(means))]


def _thinned(n: int) -> np.ndarray:
    """Indices of at most MAX_POINTS of n points, the ends among them."""
    return np.unique(np.linspace(0, n - 1, min(n, MAX_POINTS)).round().astype(int))


def _bars(value: float, low: float | None, high: float | None) -> np.ndarray:
    """(2, 1) lengths of the error bar below and above; zero where there is no interval."""
    low, high = (value if end is None else end for end in (low, high))
    return np.array([[value - low], [high - value]])
