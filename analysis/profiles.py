"""Methods across tasks: how often a method is within a factor of the best, and its mean speed-up.

Shapes: g tasks, k methods.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtrit

from analysis.comparisons import speed_up
from analysis.load import Results
from analysis.measured import Arm, Group
from analysis.statistics import LEVEL, RESAMPLES, Estimate, generator, ratio_estimate, resampled
from analysis.table import Column, Table
from analysis.targets import Times, group_curves, target_times, targets

FACTORS = (1.0, 1.1, 1.25, 1.5, 2.0)
MIN_TASKS = 2
MAX_FACTOR = 4.0  # of the drawn profile
TICKS = (1.0, 1.25, 1.5, 2.0, 3.0, 4.0)


def ratios_to_best(seconds: ArrayLike) -> NDArray[np.float64]:
    """Each method's seconds over those of the task's fastest method.

    Args:
        seconds: (..., g, k), infinite where a method missed the target, NaN where it was not measured.

    Returns:
        (..., g, k), at least 1; infinite for a miss, also where every method missed.
    """
    times = np.where(np.isnan(seconds), np.inf, np.asarray(seconds, dtype=float))
    best = times.min(axis=-1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratios = np.where(times == best, 1.0, times / best)
    return np.where(np.isfinite(times), ratios, np.inf)


def profile(ratios: ArrayLike, factor: float) -> NDArray[np.float64]:
    """(..., k) share of the tasks in which each method is within a factor of the best, from (..., g, k) ratios."""
    return np.mean(np.asarray(ratios) <= factor * (1 + 1e-12), axis=-2)


def geometric_mean(estimates: list[Estimate], *, level: float = LEVEL) -> Estimate:
    """Geometric mean of independent ratios with t intervals, one per task.

    The tasks are taken as they are, not as a sample of all tasks: the interval is about the seeds. Degrees of
    freedom are Welch's and Satterthwaite's.

    Args:
        estimates: ratios whose interval is Student's on the log scale, `n` pairs each; empty if one has no value.
    """
    values = [e.value for e in estimates]
    if not values or any(v is None or not 0 < v < math.inf for v in values):
        return Estimate(n=len(estimates))
    logs = np.array([math.log(v or 1.0) for v in values])
    mean = float(logs.mean())
    if any(e.low is None or e.low <= 0 for e in estimates):
        return Estimate(math.exp(mean), n=len(estimates))
    df = np.array([e.n - 1 for e in estimates], dtype=float)
    half = logs - np.log([e.low or 1.0 for e in estimates])
    variances = (half / stdtrit(df, 0.5 + level / 2)) ** 2
    total = float(variances.sum())
    if total == 0:
        return Estimate(math.exp(mean), math.exp(mean), math.exp(mean), len(estimates))
    pooled = total**2 / float((variances**2 / df).sum())
    width = float(stdtrit(pooled, 0.5 + level / 2)) * math.sqrt(total) / len(logs)
    return Estimate(mean, mean - width, mean + width, len(estimates)).exp()


@dataclass(frozen=True)
class TaskTimes:
    """Times of the methods of one task to its hardest target; `baselines` names what each is compared with."""

    group: Group
    target: float
    times: dict[str, Times]
    baselines: dict[str, str]


def task_times(groups: list[Group], results: Results) -> list[TaskTimes]:
    """One per group with a target and a baseline."""
    out = []
    for group in groups:
        levels, _ = targets(group, results)
        if levels and any(arm.role == "baseline" for arm in group.candidates):
            curves = group_curves(group, results)
            arms = [arm for arm in group.arms if arm.role != "control" and len(arm.tried)]
            times = {arm.name: target_times(arm, curves, levels[-1]) for arm in arms}
            bases = {arm.name: base.name for arm in arms if (base := group.baseline_of(arm)) and base is not arm}
            out.append(TaskTimes(group, levels[-1], times, bases))
    return out


@dataclass(frozen=True)
class Profile:
    """Methods that were measured on every task.

    Attributes:
        tasks: g tasks, at least two.
        arms: k names with the arm of each task.
        seconds: (1 + resamples, g, k) median seconds to the target: of the data, then of bootstrap samples.
    """

    tasks: list[TaskTimes]
    arms: dict[str, list[Arm]]
    seconds: NDArray[np.float64]

    def share(self, factor: float) -> list[Estimate]:
        """Of each method, the share of tasks within a factor of the best, and where it lies in the samples."""
        shares = profile(ratios_to_best(self.seconds), factor)
        ends = np.quantile(shares[1:], ((1 - LEVEL) / 2, (1 + LEVEL) / 2), axis=0, method="inverted_cdf")
        rows = zip(shares[0].tolist(), *ends.tolist(), strict=True)
        return [Estimate(value, low, high, len(self.tasks)) for value, low, high in rows]


def profiled(groups: list[Group], results: Results) -> Profile | None:
    """The tasks with a target and a baseline; None below two of them or two methods measured on all."""
    tasks = task_times(groups, results)
    names = [n for n in dict.fromkeys(n for t in tasks for n in t.times) if all(n in t.times for t in tasks)]
    if len(tasks) < MIN_TASKS or len(names) < 2:
        return None
    arms = {name: [next(a for a in t.group.arms if a.name == name) for t in tasks] for name in names}
    return Profile(tasks, arms, _medians(tasks, names))


def profile_curves(found: Profile) -> tuple[list[float], list[list[tuple[float, float, float]]]]:
    """Factors (f,) from 1 on, and of each method (share, low end, high end) at each of them."""
    factors = np.unique(np.concatenate([np.geomspace(1, MAX_FACTOR, 49), FACTORS])).tolist()
    shares = [found.share(factor) for factor in factors]
    curves = [[(e.value or 0.0, e.low or 0.0, e.high or 0.0) for e in own] for own in zip(*shares, strict=True)]
    return factors, curves


def profile_table(found: Profile) -> Table:
    """One row per method."""
    tasks = found.tasks
    shares = {f"within_{factor:g}": found.share(factor) for factor in FACTORS}
    rows = []
    for j, (name, arms) in enumerate(found.arms.items()):
        reached = np.count_nonzero(np.isfinite(found.seconds[0, :, j]))
        row: dict = {"arm": name, "reached": f"{reached} of {len(tasks)}"}
        row |= {key: values[j] for key, values in shares.items()}
        rows.append(row | _speed_ups(name, arms, tasks))
    listed = "; ".join(f"{t.group.title} at {100 * t.target:.2f} %" for t in tasks)
    caption = (
        "Performance profile over the tasks that have a target and a baseline, for methods measured on all of them: "
        "share of the tasks in which the median time to the hardest target is within a factor of the best method's. "
        "Brackets: 2.5 % to 97.5 % of bootstrap samples of the seeds; with few tasks the shares are coarse. "
        "Geometric means over the tasks, the tasks taken as given; none where a task was not reached. "
        f"Tasks and targets: {listed}."
    )
    columns = (
        Column("arm", "arm"),
        Column("reached", "tasks reached"),
        Column("within_1", "fastest", "share"),
        *(Column(f"within_{f:g}", f"within {f:g}×", "share") for f in FACTORS[1:]),
        Column("target_speed_up", "speed-up to target, mean", "ratio"),
        Column("speed_up", "speed-up, mean", "ratio"),
    )
    return Table("profiles", "Time to target against the best of each task", caption, columns, rows)


def _medians(tasks: list[TaskTimes], names: list[str], resamples: int = RESAMPLES) -> NDArray[np.float64]:
    """(1 + resamples, g, k) median seconds to the target: of the data, then of samples of each task's seeds.

    Runs that were stopped from outside are left out here.
    """
    out = np.full((1 + resamples, len(tasks), len(names)), np.inf)
    for i, task in enumerate(tasks):
        seeds = sorted({seed for name in names for seed in task.times[name].reached})
        values = np.array([[task.times[name].reached.get(seed, np.nan) for name in names] for seed in seeds])
        if not len(seeds):
            continue
        drawn = resampled(len(seeds), generator("profile", task.group.title), resamples)
        out[:, i] = _median(values[np.vstack([np.arange(len(seeds)), drawn])])
    return out


def _median(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Median over axis 1 of (m, n, k), NaN left out; infinite where nothing is left."""
    if not np.isnan(values).any():
        return np.median(values, axis=1)
    ordered = np.sort(values, axis=1)  # NaN last
    count = np.count_nonzero(~np.isnan(values), axis=1)
    low, high = np.maximum(count - 1, 0) // 2, count // 2
    ends = [
        np.take_along_axis(ordered, at[:, None], axis=1)[:, 0] for at in (low, np.minimum(high, len(ordered[0]) - 1))
    ]
    return np.where(count > 0, (ends[0] + ends[1]) / 2, np.inf)


def _speed_ups(name: str, arms: list[Arm], tasks: list[TaskTimes]) -> dict[str, Estimate]:
    """Geometric means over the tasks: of the speed-up in training time, and in time to the target."""
    if any(name not in task.baselines for task in tasks):
        return {"speed_up": Estimate(), "target_speed_up": Estimate()}
    plain = [speed_up(task.group, arm) for task, arm in zip(tasks, arms, strict=True)]
    paired = [_paired(task.times[task.baselines[name]], task.times[name]) for task in tasks]
    return {"speed_up": geometric_mean(plain), "target_speed_up": geometric_mean(paired)}


def _paired(base: Times, own: Times) -> Estimate:
    """Geometric mean of the paired ratios of times to the target; empty where one was not reached."""
    seeds = [seed for seed in own.reached if seed in base.reached]
    a, b = [base.reached[s] for s in seeds], [own.reached[s] for s in seeds]
    return ratio_estimate(a, b) if all(map(math.isfinite, [*a, *b])) else Estimate()
