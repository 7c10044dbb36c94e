"""Time to a target accuracy, with the runs that missed it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from analysis.curves import LearningCurve, learning_curves
from analysis.load import Results
from analysis.measured import Arm, Group
from analysis.statistics import Estimate, censored_ratio, mean_estimate, time_to_target
from analysis.survival import median_time, restricted_mean
from analysis.table import Column, Table


@dataclass(frozen=True)
class Times:
    """Seconds to one target by seed.

    Attributes:
        reached: seed to seconds, infinite for a run that ended without: no further seconds would have come.
        interrupted: seed to the seconds until which a run that was stopped from outside had not reached it.
    """

    reached: dict[int, float]
    interrupted: dict[int, float]

    def arrays(self) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """(n,) times and whether the target was seen then, as `analysis.survival` wants them."""
        times = np.array([*self.reached.values(), *self.interrupted.values()], dtype=float)
        seen = np.isfinite(times)
        seen[len(self.reached) :] = False
        return times, seen

    @property
    def count(self) -> str:
        """How many runs reached it, as people read it."""
        n = len(self.reached) + len(self.interrupted)
        text = f"{sum(map(math.isfinite, self.reached.values()))} of {n}"
        return f"{text}, {len(self.interrupted)} stopped before" if self.interrupted else text

    def median(self) -> Estimate:
        return median_time(*self.arrays())


@lru_cache(maxsize=64)
def targets(group: Group, results: Results) -> tuple[tuple[float, ...], str]:
    """Validation accuracies to reach, and where they come from."""
    sweeps = {arm.sweep for arm in group.arms}
    planned = {float(t) for s in results.sweeps if s["sweep"] in sweeps for t in s["targets"]}
    if planned:
        return tuple(sorted(planned)), "Targets were fixed in the sweep file before measuring."
    baselines = [arm for arm in group.candidates if arm.role == "baseline"]
    reached = mean_estimate(baselines[0].timed["val_accuracy"]).value if baselines else None
    if reached is None:
        return (), "No targets were planned and there is no baseline to take them from."
    return (0.95 * reached, 0.99 * reached), (
        "No targets were planned: they are 95 % and 99 % of the baseline's mean final validation accuracy, "
        "so they were chosen after measuring."
    )


@lru_cache(maxsize=64)
def group_curves(group: Group, results: Results) -> dict[str, LearningCurve]:
    """Learning curves of everything that was tried, by run key."""
    return learning_curves(results.epochs, {key for arm in group.arms for key in arm.tried["run_key"]})


def target_times(arm: Arm, curves: dict[str, LearningCurve], target: float) -> Times:
    """Times of the arm's runs to the target.

    A run that finished, diverged or failed without reaching it never does; one that was stopped from outside
    says only that it had not until then.
    """
    reached, interrupted = {}, {}
    for seed, key, status in zip(arm.tried.index, arm.tried["run_key"], arm.tried["status"], strict=True):
        curve = curves.get(key)
        seconds = math.inf if curve is None else time_to_target(curve.seconds, curve.accuracy, target)
        if status == "stopped" and math.isinf(seconds):
            interrupted[int(seed)] = 0.0 if curve is None else curve.end
        else:
            reached[int(seed)] = math.inf if math.isnan(seconds) else seconds
    return Times(reached, interrupted)


def target_speed_up(base: Times, own: Times) -> Estimate:
    """Median of the baseline's time over the arm's, paired by seed; pairs with an interrupted run say nothing."""
    seeds = [seed for seed in own.reached if seed in base.reached]
    return censored_ratio([base.reached[s] for s in seeds], [own.reached[s] for s in seeds])


def target_table(group: Group, results: Results) -> Table:
    """Time to each target; runs that missed it, or did not finish, count as not reached."""
    values, source = targets(group, results)
    curves = group_curves(group, results)
    horizon = max((arm.at("train_seconds", arm.timed.index).max() for arm in group.arms if arm.n), default=math.nan)
    rows = []
    for target in values:
        times = {arm.name: target_times(arm, curves, target) for arm in group.arms}
        for arm in group.arms:
            own, baseline = times[arm.name], group.baseline_of(arm)
            with_pair = baseline is not None and baseline is not arm
            rows.append(
                {"arm": arm.name, "role": arm.role, "setting": arm.setting, "target": target}
                | {
                    "reached": own.count,
                    "seconds": own.median(),
                    "restricted": restricted_mean(*own.arrays(), horizon),
                    "speed_up": target_speed_up(times[baseline.name], own) if baseline and with_pair else Estimate(),
                }
            )
    caption = (
        "Training seconds until an evaluation first reached the target validation accuracy, in steps of one "
        f"evaluation. {source} Runs that finished, diverged or failed without it count as never reaching it and "
        "stay in the median (Kaplan–Meier; a run stopped from outside counts until it was stopped). Speed-up: "
        "median of the baseline's time over the arm's, paired by seed. Mean without: mean seconds spent without "
        "the target"
    )
    caption += f", of the first {horizon:.4g}, the longest training time here." if math.isfinite(horizon) else "."
    columns = (
        Column("target", "target", "percent"),
        Column("arm", "arm"),
        Column("role", "role", shown=False),
        Column("reached", "reached"),
        Column("seconds", "time to target, median", "seconds"),
        Column("speed_up", "speed-up", "ratio"),
        Column("restricted", "mean without", "seconds"),
        Column("setting", "setting"),
    )
    return Table("time_to_target", "Time to target accuracy", caption, columns, rows)
