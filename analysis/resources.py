"""Memory, work and energy against the baseline: the table, and small plots of accuracy against each of them."""

from __future__ import annotations

import math

from analysis.measured import Arm, Group
from analysis.plot import Mark, Plot, axis, bars, ends, labelled, seeds
from analysis.response import HEIGHT, WIDTH
from analysis.statistics import Estimate, mean_estimate, ratio_estimate
from analysis.table import Column, Kind, Table, text
from analysis.tables import NAMES, name_cells

UNKNOWN = "not measured"
RESOURCES: dict[str, tuple[str, Kind]] = {
    "peak_memory_bytes": ("peak memory", "bytes"),
    "flops_executed": ("FLOPs executed", "number"),
    "energy_joules": ("energy (J)", "number"),
}


def resource_ratio(group: Group, arm: Arm, column: str) -> Estimate:
    """The arm's over the baseline's, paired by seed: geometric mean; 1 without an interval for the baseline itself."""
    baseline = group.baseline_of(arm)
    if baseline is None:
        return Estimate()
    own = arm.at(column, arm.timed.index)
    if arm is baseline:
        known = ratio_estimate(own, own)
        return Estimate(known.value, n=known.n)
    return ratio_estimate(own, baseline.at(column, arm.timed.index))


def resource_table(group: Group) -> Table:
    """Means and paired ratios; a column of ratios only where there is one."""
    rows = []
    for arm in group.arms:
        row: dict = name_cells(arm) | {"n": arm.n}
        for column in RESOURCES:
            row[column] = mean_estimate(arm.timed[column]).value
            row[f"{column}_ratio"] = resource_ratio(group, arm, column)
        rows.append(row)
    columns = [*NAMES, Column("n", "seeds", "count")]
    for column, (title, kind) in RESOURCES.items():
        columns.append(Column(column, title, kind, UNKNOWN))
        columns.append(Column(f"{column}_ratio", f"{title.partition(' (')[0]} / baseline", "ratio", UNKNOWN))
    caption = (
        "Means over the finished measured runs. Ratios to the baseline, below 1 is less: geometric means paired by "
        "seed with 95 % intervals, not corrected for their number. Peak memory: of the device's allocator while "
        "training. FLOPs: counted on a copy of the model, forward and backward. Energy: of the device over the "
        "training segments."
    )
    table = Table("resources", "Memory, work and energy", caption, columns, rows)
    return table.without_empty(*(f"{column}_ratio" for column in RESOURCES))


def resource_plots(group: Group) -> list[Plot]:
    """Accuracy against the ratio to the baseline, one small plot for each resource that two arms or more have."""
    return [plot for column in RESOURCES if (plot := _plot(group, column))]


def _plot(group: Group, column: str) -> Plot | None:
    ratios = {arm: resource_ratio(group, arm, column) for arm in group.arms if group.accuracy(arm).value is not None}
    known = {
        arm: ratio for arm, ratio in ratios.items() if ratio.value is not None and all(map(math.isfinite, ends(ratio)))
    }
    if len(known) < 2:
        return None
    title = f"{RESOURCES[column][0].partition(' (')[0]} / baseline"
    scores = {arm: group.accuracy(arm) for arm in known}
    x = axis([v for ratio in known.values() for v in ends(ratio)], (56.0, WIDTH - 14.0), title)
    percents = [100 * v for score in scores.values() for v in ends(score)]
    y = axis(percents, (HEIGHT - 44.0, 10.0), f"{group.accuracy_name} (%)")
    marks = []
    for arm, ratio in known.items():
        position = x(ratio.value or 0.0), y(100 * (scores[arm].value or 0.0))
        tip = [f"{arm.name} · {arm.role}", arm.setting, f"{title} {text(ratio, Column('', '', 'ratio'))}"]
        tip.append(f"{group.accuracy_name} {text(scores[arm], Column('', '', 'percent'))} %")
        drawn = bars(*position, ratio, scores[arm], x, y)
        marks.append(Mark(group.arms.index(arm), arm, *position, drawn, "\n".join([*tip, seeds(arm)])))
    return Plot(title, WIDTH, HEIGHT, x, y, tuple(labelled(marks, WIDTH)))
