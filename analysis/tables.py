"""The tables of the report that compare measured arms; those that count runs are in `counts`."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from analysis import pareto
from analysis.columns import SEGMENTS
from analysis.load import Results
from analysis.measured import Arm, Group
from analysis.statistics import (
    Estimate,
    censored_ratio,
    difference_estimate,
    generator,
    mean_estimate,
    median_estimate,
    ratio_estimate,
    time_to_target,
)
from analysis.table import Column, Table, number

NAMES = (Column("arm", "arm"), Column("role", "role", shown=False))
SETTING = Column("setting", "setting")


def name_cells(arm: Arm) -> dict[str, str]:
    return {"arm": arm.name, "role": arm.role, "setting": arm.setting}


def speed_up(group: Group, arm: Arm) -> Estimate:
    """Baseline's training seconds over the arm's, paired by seed; 1 for the baseline itself."""
    baseline = group.baseline_of(arm)
    if baseline is None or arm is baseline:
        return Estimate()
    seeds = list(arm.timed.index)
    return ratio_estimate(baseline.at("train_seconds", seeds), arm.at("train_seconds", seeds))


def accuracy_gain(group: Group, arm: Arm, other: Arm | None) -> Estimate:
    """Accuracy of the arm minus that of another, paired by seed."""
    if other is None or arm is other:
        return Estimate()
    seeds = list(arm.timed.index)
    return difference_estimate(arm.at(group.accuracy_column, seeds), other.at(group.accuracy_column, seeds))


def points(group: Group, arms: list[Arm]) -> tuple[np.ndarray, np.ndarray]:
    """(seeds, arms) training seconds and accuracies, NaN where a run is missing."""
    times = np.column_stack([arm.at("train_seconds", group.seeds) for arm in arms])
    scores = np.column_stack([arm.at(group.accuracy_column, group.seeds) for arm in arms])
    return times, scores


@lru_cache(maxsize=64)
def front(group: Group) -> dict[str, tuple[bool, float]]:
    """Arm name to (on the front, share of bootstrap samples on the front), for the candidates."""
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
    on_front = front(group)
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
                "speed_up": speed_up(group, arm),
                "accuracy_gain": accuracy_gain(group, arm, group.baseline_of(arm)),
                "on_front": on,
                "p_front": share,
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
        Column("val_accuracy", "validation accuracy", "percent"),
        SETTING,
    )
    if group.accuracy_column == "val_accuracy":
        columns = tuple(c for c in columns if c.key != "val_accuracy")
    return Table("pareto", "Accuracy, time and speed-up", _pareto_caption(group), columns, rows)


def _pareto_caption(group: Group) -> str:
    caption = (
        "Finished measured runs, alone on the device. Accuracy: mean over seeds; training time: median over "
        "the same runs; brackets: 95 % intervals. Speed-up and accuracy − baseline are paired by seed. The "
        "front is that of the baseline and the methods; controls explain, they do not compete."
    )
    if group.accuracy_column == "val_accuracy":
        caption += " Some runs have no test accuracy: this is validation accuracy, on which settings were chosen."
    volume, reference = front_volume(group)
    if volume.value is not None:
        interval = "" if volume.low is None else f" [{volume.low:.3f}, {volume.high:.3f}]"
        caption += (
            f" Hypervolume of the front: {volume.value:.3f}{interval} times the baseline's, reference point "
            f"{number(reference[0], 'seconds')} s and accuracy 0."
        )
    return caption


@lru_cache(maxsize=64)
def front_volume(group: Group) -> tuple[Estimate, tuple[float, float]]:
    """Hypervolume of the candidates in units of the baseline's own, and its reference point.

    The reference is twice the baseline's median seconds and accuracy 0: adding a method does not move it.
    """
    baselines = [arm for arm in group.candidates if arm.role == "baseline"]
    if not baselines:
        return Estimate(), (math.nan, math.nan)
    seconds, accuracy = group.seconds(baselines[0]).value, group.accuracy(baselines[0]).value
    if not seconds or not accuracy:
        return Estimate(), (math.nan, math.nan)
    reference = (2 * seconds, 0.0)
    rng = generator("hypervolume", group.title)
    volume = pareto.hypervolume_estimate(*points(group, group.candidates), reference, rng)
    return volume.scaled(1 / (seconds * accuracy)), reference


def targets(group: Group, results: Results) -> tuple[list[float], str]:
    """Validation accuracies to reach, and where they come from."""
    sweeps = {arm.sweep for arm in group.arms}
    planned = {float(t) for s in results.sweeps if s["sweep"] in sweeps for t in s["targets"]}
    if planned:
        return sorted(planned), "Targets were fixed in the sweep file before measuring."
    baselines = [arm for arm in group.candidates if arm.role == "baseline"]
    reached = mean_estimate(baselines[0].timed["val_accuracy"]).value if baselines else None
    if reached is None:
        return [], "No targets were planned and there is no baseline to take them from."
    return [0.95 * reached, 0.99 * reached], (
        "No targets were planned: they are 95 % and 99 % of the baseline's mean final validation accuracy, "
        "so they were chosen after measuring."
    )


def target_table(group: Group, results: Results) -> Table:
    """Time to each target; runs that missed it, or did not finish, count as not reached."""
    values, source = targets(group, results)
    curves = {key: part for key, part in results.epochs.groupby("run_key", sort=False)}
    rows = []
    for target in values:
        times = {arm.name: _target_times(arm, curves, target) for arm in group.arms}
        for arm in group.arms:
            own = times[arm.name]
            baseline = group.baseline_of(arm)
            ratio = Estimate()
            if baseline is not None and baseline is not arm:
                seeds = [s for s in own if s in times[baseline.name]]
                a, b = [times[baseline.name][s] for s in seeds], [own[s] for s in seeds]
                ratio = censored_ratio(a, b, generator("target ratio", group.title, arm.name, target))
            rows.append(
                name_cells(arm)
                | {
                    "target": target,
                    "reached": f"{sum(map(math.isfinite, own.values()))} of {len(own)}",
                    "seconds": median_estimate(list(own.values()), generator("target", group.title, arm.name, target)),
                    "speed_up": ratio,
                }
            )
    caption = (
        "Training seconds until an evaluation first reached the target validation accuracy, in steps of one "
        f"evaluation. {source} Runs that missed it, or ended before, count as not reached and stay in the "
        "median. Speed-up: median of the baseline's time over the arm's, paired by seed; 0 where the arm "
        "missed it."
    )
    columns = (
        Column("target", "target", "percent"),
        *NAMES,
        Column("reached", "reached"),
        Column("seconds", "time to target", "seconds"),
        Column("speed_up", "speed-up", "ratio"),
        SETTING,
    )
    return Table("time_to_target", "Time to target accuracy", caption, columns, rows)


def _target_times(arm: Arm, curves: dict, target: float) -> dict[int, float]:
    """Seed to seconds, infinite where the target was not reached."""
    out = {}
    for seed, run_key in zip(arm.tried.index, arm.tried["run_key"], strict=True):
        curve = curves.get(run_key)
        reached = math.inf if curve is None else time_to_target(curve["train_seconds"], curve["val_accuracy"], target)
        out[int(seed)] = math.inf if math.isnan(reached) else reached
    return out


def control_table(group: Group) -> Table:
    """What the gradient estimate brings and what the plan and machinery bring."""
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
        rows.append(row)
    caption = (
        "The control runs the method at the setting where its estimate is the exact gradient. Estimate effect: "
        "method − control. Plan and machinery effect (learning rate, batch size, hooks, a recipe tuned for the "
        "arm): control − baseline. Paired by seed, mean with 95 % interval; fewer seconds are better."
    )
    columns = (
        NAMES[0],
        Column("n", "pairs", "count"),
        Column("accuracy_estimate", "accuracy: estimate", "points"),
        Column("accuracy_plan", "accuracy: plan", "points"),
        Column("seconds_estimate", "time: estimate", "difference"),
        Column("seconds_plan", "time: plan", "difference"),
        SETTING,
    )
    return Table("control_split", "What the estimate brings, and what the plan", caption, columns, rows)


def segment_table(group: Group) -> Table:
    """Where the seconds went, and memory, FLOPs and energy where they were measured."""
    rows = []
    for arm in group.arms:
        row: dict = name_cells(arm) | {"n": arm.n}
        for column in (*SEGMENTS, "peak_memory_bytes", "flops_executed", "energy_joules"):
            row[column] = mean_estimate(arm.timed[column]).value
        rows.append(row)
    unknown = "not measured"
    columns = (
        *NAMES,
        Column("n", "seeds", "count"),
        *(Column(s, s.removesuffix("_seconds").replace("_", " "), "seconds", unknown) for s in SEGMENTS),
        Column("peak_memory_bytes", "peak memory", "bytes", unknown),
        Column("flops_executed", "FLOPs executed", "number", unknown),
        Column("energy_joules", "energy (J)", "number", unknown),
    )
    caption = "Means over the finished measured runs. Only “train” is the training time of the other tables."
    return Table("segments", "Where the time went; memory and work", caption, columns, rows)
