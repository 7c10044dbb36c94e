"""Whether the outcomes of an arm changed between two sweeps: estimates, tests, and what they rest on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtr, stdtrit

from analysis.comparisons import MIN_SEEDS
from analysis.matching import Place
from analysis.measured import Arm
from analysis.paired import ALPHA, holm, t_test, without_spread
from analysis.statistics import LEVEL, Estimate, mean_estimate
from analysis.table import Column, Table


@dataclass(frozen=True)
class Change:
    """The second sweep's mean minus the first's.

    Attributes:
        p: of the t test, paired or Welch's, not corrected; NaN below three pairs, or three values on a side.
        rests_on: how many seeds, and whether they are paired.
    """

    estimate: Estimate = field(default_factory=Estimate)
    p: float = math.nan
    rests_on: str = ""


def change(first: dict[int, float], second: dict[int, float]) -> Change:
    """Mean of the second minus mean of the first with its 95 % interval, and the p of the t test that belongs to it.

    Paired by seed where at least three seeds are shared (two where a side has no more), as equal seeds start from
    equal weights and see equal data; otherwise Welch's for two independent samples.

    Args:
        first, second: values by seed; unknown and infinite ones are left out.
    """
    x, y = ({seed: value for seed, value in side.items() if np.isfinite(value)} for side in (first, second))
    shared, fewest = sorted(x.keys() & y.keys()), min(len(x), len(y))
    if len(shared) >= max(2, min(MIN_SEEDS, fewest)):
        differences = [y[seed] - x[seed] for seed in shared]
        estimate, p, fewest = mean_estimate(differences), t_test(differences), len(shared)
        rests_on = f"{len(shared)} shared seeds"
    else:
        estimate, p = welch(np.array([*x.values()]), np.array([*y.values()]))
        rests_on = f"{len(x)} and {len(y)} seeds, unpaired"
    return Change(estimate, math.nan if p is None or fewest < MIN_SEEDS else p, rests_on)


def welch(x: NDArray[np.float64], y: NDArray[np.float64], *, level: float = LEVEL) -> tuple[Estimate, float | None]:
    """Mean of y minus mean of x of independent samples of unequal variance: Welch's t interval and two-sided p.

    Where neither sample has a spread the interval is a point, and p is not 0 but 2**(1 - n) of the smaller, as in
    `t_test`.

    Args:
        x, y: (n,) and (m,) values.

    Returns:
        Without interval and p where one of them has fewer than two values.
    """
    n = min(len(x), len(y))
    if n == 0:
        return Estimate(), None
    value = float(y.mean() - x.mean())
    if n == 1:
        return Estimate(value, n=n), None
    parts = float(x.var(ddof=1)) / len(x), float(y.var(ddof=1)) / len(y)
    total = sum(parts)
    if without_spread(x, y):
        same = without_spread(np.concatenate((x, y)))
        return Estimate(value, value, value, n), 1.0 if same else 2.0 ** (1 - n)
    shares = [part / total for part in parts]  # the squares of tiny variances would be 0
    freedom = 1 / (shares[0] ** 2 / (len(x) - 1) + shares[1] ** 2 / (len(y) - 1))
    error = math.sqrt(total)
    half = float(stdtrit(freedom, 0.5 + level / 2)) * error
    return Estimate(value, value - half, value + half, n), float(2 * stdtr(freedom, -abs(value) / error))


def difference_table(pairs: Sequence[tuple[Place, Place]], *, allow_mixed: bool) -> Table:
    """One row per matched arm; p corrected by Holm over both outcomes of all rows."""
    rows = [_difference(a, b, timed=allow_mixed or a.group.hardware == b.group.hardware) for a, b in pairs]
    adjusted = iter(holm([row[p] for row in rows for p in ("gain_p", "ratio_p")]).tolist())
    for row in rows:
        row["gain_p"], row["ratio_p"] = next(adjusted), next(adjusted)
        row["verdict"] = _verdict(row)
    columns = (
        Column("task", "task", shown=len({row["task"] for row in rows}) > 1),
        Column("part", "part", shown=len({row["part"] for row in rows}) > 1),
        Column("arm", "arm"),
        Column("role", "role", shown=False),
        Column("hardware", "hardware and software", shown=len({row["hardware"] for row in rows}) > 1),
        Column("gain", "accuracy, B − A", "points"),
        Column("gain_p", "p, Holm", "p"),
        Column("ratio", "training time, B / A", "ratio"),
        Column("ratio_p", "p, Holm", "p"),
        Column("verdict", "B is"),
        Column("rests_on", "rests on"),
    )
    caption = (
        "Means of the accuracies, geometric means of the times, with 95 % intervals that are not corrected. p: t test, "
        "paired by seed or Welch's as the last column says, Holm over both outcomes of all rows; a difference is "
        f"called where it is below {ALPHA:g}. “Not clearly different” does not mean equal."
    )
    return Table("differences", "Arms measured in both", caption, columns, rows)


def _difference(a: Place, b: Place, *, timed: bool) -> dict[str, Any]:
    """Both outcomes of one arm, their p not yet corrected."""
    column = "test_accuracy"
    if {a.group.accuracy_column, b.group.accuracy_column} != {column}:
        column = "val_accuracy"
    gain = change(_by_seed(a.arm, column), _by_seed(b.arm, column))
    ratio = change(*(_logs(_by_seed(side.arm, "train_seconds")) for side in (a, b))) if timed else Change()
    rests_on = ratio.rests_on or gain.rests_on
    if a.arm.n and set(a.arm.timed["run_key"]) == set(b.arm.timed["run_key"]):
        rests_on += ", the same runs"
    return {
        "task": a.title,
        "part": a.part,
        "arm": a.arm.name,
        "role": a.arm.role,
        "hardware": a.group.hardware
        if a.group.hardware == b.group.hardware
        else f"{a.group.hardware} → {b.group.hardware}",
        "gain": gain.estimate,
        "gain_p": gain.p,
        "ratio": ratio.estimate.exp(),
        "ratio_p": ratio.p,
        "rests_on": rests_on,
    }


def _by_seed(arm: Arm, column: str) -> dict[int, float]:
    return {
        int(seed): float(value) for seed, value in zip(arm.timed.index, arm.at(column, arm.timed.index), strict=True)
    }


def _logs(seconds: dict[int, float]) -> dict[int, float]:
    """Logarithms; a time of zero has none."""
    return {seed: math.log(value) for seed, value in seconds.items() if value > 0}


def _verdict(row: dict[str, Any]) -> str:
    """What the corrected tests call, in words."""
    if math.isnan(row["gain_p"]) and math.isnan(row["ratio_p"]):
        return "not enough data"
    words = []
    if row["ratio_p"] < ALPHA:
        words.append("slower" if row["ratio"].value > 1 else "faster")
    if row["gain_p"] < ALPHA:
        words.append("more accurate" if row["gain"].value > 0 else "less accurate")
    return ", ".join(words) or "not clearly different"
