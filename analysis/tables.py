"""The tables of the report that compare measured arms; those that count runs are in `counts`."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache

import numpy as np

from analysis import pareto
from analysis.columns import SEGMENTS
from analysis.comparisons import accuracy_gain, speed_up
from analysis.measured import Arm, Group
from analysis.statistics import Estimate, difference_estimate, generator, mean_estimate, ratio_estimate
from analysis.table import Column, Table, number

NAMES = (Column("arm", "arm"), Column("role", "role", shown=False))
SETTING = Column("setting", "setting")


def name_cells(arm: Arm) -> dict[str, str]:
    return {"arm": arm.name, "role": arm.role, "setting": arm.setting}


def points(group: Group, arms: list[Arm]) -> tuple[np.ndarray, np.ndarray]:
    """(seeds, arms) training seconds and accuracies, NaN where a run is missing."""
    times = np.column_stack([arm.at("train_seconds", group.seeds) for arm in arms])
    scores = np.column_stack([arm.at(group.accuracy_column, group.seeds) for arm in arms])
    return times, scores


@lru_cache(maxsize=64)
def front(group: Group) -> dict[str, tuple[bool, float]]:
    """Arm name to (on the front, probability to be), for the candidates; the probability is NaN for one run."""
    arms = group.candidates
    if not arms:
        return {}
    seconds = [group.seconds(arm).value for arm in arms]
    accuracy = [group.accuracy(arm).value for arm in arms]
    mask = pareto.pareto_front(
        np.array([np.nan if s is None else s for s in seconds]),
        np.array([np.nan if a is None else a for a in accuracy]),
    )
    shares = pareto.front_membership(*points(group, arms), generator("front", group.title))
    return {arm.name: (bool(on), float(share)) for arm, on, share in zip(arms, mask, shares, strict=True)}


def pareto_table(group: Group) -> Table:
    """Accuracy, time and speed-up of every arm, and whether it is on the front."""
    on_front, (volume, reference) = front(group), front_volume(group)
    rows = []
    for arm in group.arms:
        on, share = on_front.get(arm.name, (None, None))
        rows.append(
            name_cells(arm)
            | {
                "n": arm.n,
                "accuracy": group.accuracy(arm),
                "val_accuracy": mean_estimate(arm.timed["val_accuracy"], bounds=(0.0, 1.0)),
                "seconds": group.seconds(arm),
                "workers": arm.workers if group.side_by_side else None,
                "device_seconds": group.device_seconds(arm) if group.side_by_side else None,
                "speed_up": speed_up(group, arm),
                "accuracy_gain": accuracy_gain(group, arm, group.baseline_of(arm)),
                "on_front": on,
                "p_front": share,
                "hypervolume": volume,
                "reference_seconds": reference[0],
                "reference_accuracy": reference[1],
            }
        )
    columns = (
        *NAMES,
        Column("n", "seeds", "count"),
        Column("accuracy", group.accuracy_name, "percent"),
        Column("seconds", "training time", "seconds"),
        Column("speed_up", "speed-up", "ratio"),
        Column("accuracy_gain", "accuracy − baseline", "points"),
        Column("on_front", "on front", "flag"),
        Column("p_front", "P(on front)", "share"),
        Column("workers", "devices", "count"),
        Column("device_seconds", "device-seconds", "seconds"),
        Column("val_accuracy", "validation accuracy", "percent"),
        Column("hypervolume", "hypervolume of the front / baseline", "number", shown=False),
        Column("reference_seconds", "reference point, training time", "seconds", shown=False),
        Column("reference_accuracy", "reference point, accuracy", "percent", shown=False),
        SETTING,
    )
    if group.accuracy_column == "val_accuracy":
        columns = tuple(c for c in columns if c.key != "val_accuracy")
    table = Table("pareto", "Accuracy, time and speed-up", _pareto_caption(group), columns, rows)
    return table.without_empty("workers", "device_seconds")


def _pareto_caption(group: Group) -> str:
    caption = (
        "Finished measured runs, alone on the device. Accuracy: mean over seeds; training time: median over "
        "the same runs; brackets: 95 % intervals. Speed-up and accuracy − baseline are paired by seed. The "
        "front is that of the baseline and the methods; controls explain, they do not compete. P: from geometric "
        "means of the times, as the speed-up."
    )
    if group.side_by_side:
        caption += " Devices: those that trained a run side by side; device-seconds: training time times devices."
    if group.accuracy_column == "val_accuracy":
        caption += " Some runs have no test accuracy: this is validation accuracy, on which settings were chosen."
    volume, reference = front_volume(group)
    if volume.value is not None:
        interval = "" if volume.low is None else f" [{volume.low:.3f}, {volume.high:.3f}]"
        caption += (
            f" Hypervolume of the front: {volume.value:.3f}{interval} times the baseline's, reference point "
            f"{number(reference[0], 'seconds')} s (twice the baseline's geometric mean) and accuracy 0."
        )
    return caption


@lru_cache(maxsize=64)
def front_volume(group: Group) -> tuple[Estimate, tuple[float, float]]:
    """Hypervolume of the candidates in units of the baseline's own, and its reference point.

    The reference is twice the baseline's mean seconds and accuracy 0: adding a method does not move it.
    """
    candidates = group.candidates
    base = next((i for i, arm in enumerate(candidates) if arm.role == "baseline"), None)
    if base is None or not group.seconds(candidates[base]).value or not group.accuracy(candidates[base]).value:
        return Estimate(), (math.nan, math.nan)
    seconds, accuracy = points(group, candidates)
    volume = pareto.relative_volume(seconds, accuracy, base, generator("hypervolume", group.title))
    return volume, (2 * float(pareto.centres(seconds, accuracy)[0][base]), 0.0)


def control_table(group: Group) -> Table:
    """What the gradient estimate brings, what the plan, and what the machinery costs."""
    rows = []
    for arm in group.arms:
        control, baseline = group.control_of(arm), group.baseline_of(arm)
        if arm.role != "method" or not arm.n or control is None or baseline is None:
            continue
        seeds = [s for s in arm.timed.index if s in control.timed.index and s in baseline.timed.index]
        row: dict = {"arm": arm.name, "setting": arm.setting, "n": len(seeds)}
        for key, column in (("accuracy", group.accuracy_column), ("seconds", "train_seconds")):
            a, b, c = (x.at(column, seeds) for x in (arm, control, baseline))
            row |= {f"{key}_estimate": difference_estimate(a, b), f"{key}_plan": difference_estimate(b, c)}
        same = same_work(control, baseline, seeds)
        row["overhead"] = row["seconds_plan"] if same else None
        row["overhead_ratio"] = time_ratio(baseline, control, seeds) if same else None
        rows.append(row)
    caption = (
        "The control runs the method at the setting where its estimate is the exact gradient. Estimate effect: "
        "method − control. Plan and machinery effect (learning rate, batch size, hooks, a recipe tuned for the "
        "arm): control − baseline. Machinery, where the control has the baseline's recipe and took as many steps "
        "over as many examples: the seconds that the method's code adds to the same work, and its time over the "
        "baseline's. Paired by seed, mean with 95 % interval (ratio: geometric mean), not corrected for the number "
        "of comparisons; fewer seconds are better."
    )
    columns = (
        NAMES[0],
        Column("n", "pairs", "count"),
        Column("accuracy_estimate", "accuracy: estimate", "points"),
        Column("accuracy_plan", "accuracy: plan", "points"),
        Column("seconds_estimate", "time: estimate", "difference"),
        Column("seconds_plan", "time: plan and machinery", "difference"),
        Column("overhead", "time: machinery", "difference", null="plan differs"),
        Column("overhead_ratio", "machinery, relative", "ratio", null="plan differs"),
        SETTING,
    )
    table = Table("control_split", "What the estimate brings, and what the plan", caption, columns, rows)
    return table.without_empty("overhead", "overhead_ratio")


def same_work(control: Arm, baseline: Arm, seeds: list[int]) -> bool:
    """Whether the control took the baseline's steps over the baseline's examples with the baseline's recipe."""
    if not seeds or control.recipe != baseline.recipe:
        return False
    counts = ("steps", "examples")
    return all(np.array_equal(control.at(column, seeds), baseline.at(column, seeds)) for column in counts)


def time_ratio(baseline: Arm, control: Arm, seeds: list[int]) -> Estimate:
    """The control's seconds over the baseline's, paired by seed."""
    return ratio_estimate(control.at("train_seconds", seeds), baseline.at("train_seconds", seeds))


def segment_table(group: Group) -> Table:
    """Where the seconds went."""
    rows = []
    for arm in group.arms:
        row: dict = name_cells(arm) | {"n": arm.n}
        for column in SEGMENTS:
            row[column] = mean_estimate(arm.timed[column]).value
        rows.append(row)
    columns = (
        *NAMES,
        Column("n", "seeds", "count"),
        *(Column(s, s.removesuffix("_seconds").replace("_", " "), "seconds", "not measured") for s in SEGMENTS),
    )
    caption = "Means over the finished measured runs. Only “train” is the training time of the other tables."
    table = Table("segments", "Where the time went", caption, columns, rows).without_empty(*SEGMENTS[1:])
    absent = [c.title for c in columns if c not in table.columns]
    return replace(table, caption=f"{caption} Not measured: {', '.join(absent)}.") if absent else table
