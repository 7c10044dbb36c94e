"""Every method against the baseline of its sweep: effects, tests corrected over all of them, detectable effects."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from analysis.measured import Arm, Group
from analysis.paired import (
    ALPHA,
    POWER,
    detectable_effect,
    holm,
    known,
    sign_flip_test,
    t_test,
    wilcoxon_test,
    without_spread,
)
from analysis.statistics import Estimate, bootstrap_interval, difference_estimate, generator, ratio_estimate
from analysis.table import Column, Table

MIN_SEEDS = 3


@dataclass(frozen=True)
class Effect:
    """One outcome of one method against the baseline.

    Attributes:
        estimate: speed-up, or accuracy minus the baseline's.
        p: paired t test; p_signs, p_wilcoxon: the same question with fewer assumptions.
        p_holm: `p` corrected over all methods and both outcomes of the group.
        bootstrap: the estimate with a paired bootstrap's interval, which assumes no normal spread.
        detectable: smallest speed-up above 1, or accuracy difference, that so many pairs with this spread find
            with a power of 80 % after the correction; None below three pairs and where they have no spread.
    """

    estimate: Estimate
    p: float | None
    p_signs: float | None
    p_wilcoxon: float | None
    p_holm: float | None
    bootstrap: Estimate
    detectable: float | None
    is_difference: bool

    @property
    def direction(self) -> int:
        """1 or -1 for a corrected difference above or below the neutral value, else 0."""
        if self.p_holm is None or self.p_holm >= ALPHA or self.estimate.value is None:
            return 0
        return 1 if self.shift > 0 else -1

    @property
    def shift(self) -> float:
        """The estimate on the scale on which no effect is 0."""
        value = self.estimate.value or 0.0
        return value if self.is_difference else (math.log(value) if value > 0 else -math.inf)


@lru_cache(maxsize=4096)
def speed_up(group: Group, arm: Arm) -> Estimate:
    """Baseline's training seconds over the arm's, paired by seed; empty for the baseline itself."""
    baseline = group.baseline_of(arm)
    if baseline is None or arm is baseline:
        return Estimate()
    seeds = list(arm.timed.index)
    return ratio_estimate(baseline.at("train_seconds", seeds), arm.at("train_seconds", seeds))


@lru_cache(maxsize=4096)
def accuracy_gain(group: Group, arm: Arm, other: Arm | None) -> Estimate:
    """Accuracy of the arm minus that of another, paired by seed."""
    if other is None or arm is other:
        return Estimate()
    seeds = list(arm.timed.index)
    return difference_estimate(arm.at(group.accuracy_column, seeds), other.at(group.accuracy_column, seeds))


def differences(group: Group, arm: Arm, other: Arm) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(n,) log of the other's seconds over the arm's, and (n,) accuracy of the arm minus the other's."""
    seeds = list(arm.timed.index)
    seconds, others = arm.at("train_seconds", seeds), other.at("train_seconds", seeds)
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(others) - np.log(seconds)
    gains = arm.at(group.accuracy_column, seeds) - other.at(group.accuracy_column, seeds)
    return known(logs), known(gains)


@lru_cache(maxsize=64)
def comparisons(group: Group) -> dict[str, tuple[Effect, Effect]]:
    """Name of each method with a baseline and enough pairs to (speed-up, accuracy gain)."""
    pairs: list[tuple[Arm, tuple[NDArray[np.float64], NDArray[np.float64]]]] = []
    for arm in group.arms:
        baseline = group.baseline_of(arm)
        if arm.role == "method" and baseline is not None:
            found = differences(group, arm, baseline)
            if min(map(len, found)) >= MIN_SEEDS:
                pairs.append((arm, found))
    tests = [t_test(x) for _, found in pairs for x in found]
    adjusted = holm([np.nan if p is None else p for p in tests])
    out = {}
    for i, (arm, found) in enumerate(pairs):
        estimates = speed_up(group, arm), accuracy_gain(group, arm, group.baseline_of(arm))
        made = []
        for j, (x, e) in enumerate(zip(found, estimates, strict=True)):
            at = 2 * i + j
            rng = generator("signs", group.title, arm.name, j)
            made.append(
                Effect(
                    e, tests[at], sign_flip_test(x, rng), wilcoxon_test(x), float(adjusted[at]),
                    _bootstrap(x, rng, logarithm=j == 0), _detectable(x, len(tests), logarithm=j == 0),
                    is_difference=j == 1,
                )
            )  # fmt: skip
        out[arm.name] = (made[0], made[1])
    return out


def _bootstrap(x: NDArray[np.float64], rng: np.random.Generator, *, logarithm: bool) -> Estimate:
    """The estimate with the interval of resampled pairs."""
    found = Estimate(float(x.mean()), *bootstrap_interval(x, np.mean, rng), n=len(x))
    return found.exp() if logarithm else found


def _detectable(x: NDArray[np.float64], family: int, *, logarithm: bool) -> float | None:
    """In the unit of the estimate; the correction is taken at its strictest."""
    effect = detectable_effect(len(x), ALPHA / family)
    if effect is None or without_spread(x):
        return None
    shift = effect * float(x.std(ddof=1))
    return math.exp(min(shift, 700.0)) if logarithm else shift


def comparison_table(group: Group) -> Table:
    """The tests behind the verdicts, one row per method and outcome."""
    arms = {arm.name: arm for arm in group.arms}
    rows = []
    for name, effects in comparisons(group).items():
        for outcome, effect in zip(("training time", group.accuracy_name), effects, strict=True):
            row: dict = {"arm": name, "outcome": outcome, "n": effect.estimate.n}
            row["speed_up" if outcome == "training time" else "gain"] = effect.estimate
            row |= {"bootstrap": effect.bootstrap, "bootstrap_kind": "points" if effect.is_difference else "ratio"}
            row["found"] = {1: "better", 0: "undecided", -1: "worse"}[effect.direction]
            row |= {"p": effect.p, "p_holm": effect.p_holm, "p_signs": effect.p_signs, "p_wilcoxon": effect.p_wilcoxon}
            undecided = effect.direction == 0 and effect.detectable is not None
            kind = "speed_up" if outcome == "training time" else "gain"
            row[f"detectable_{kind}"] = effect.detectable if undecided else None
            rows.append(row | {"setting": arms[name].setting})
    caption = (
        "Paired by seed. p: Student's paired t test, of the log ratio for times. Holm: corrected over all "
        f"{len(rows)} rows; a difference is called where it is below {ALPHA:g}, whatever the uncorrected interval "
        "says. Sign flips and Wilcoxon assume less and confirm; with n pairs they cannot fall below 2^(1−n), so "
        "with five pairs never below 0.06. Paired bootstrap: the same mean with expanded percentiles of resampled "
        "pairs; below ten pairs it covers less than 95 %. Detectable, where undecided: the smallest effect that so "
        f"many pairs with this spread find in {POWER:.0%} of sweeps after the strictest correction; smaller ones go "
        "unseen."
    ).replace("80%", "80 %")
    columns = (
        Column("arm", "arm"),
        Column("outcome", "outcome"),
        Column("n", "pairs", "count"),
        Column("speed_up", "speed-up", "ratio"),
        Column("gain", "accuracy − baseline", "points"),
        Column("bootstrap", "paired bootstrap", "number"),
        Column("found", "against baseline"),
        Column("p_holm", "p, Holm", "p"),
        Column("p", "p", "p"),
        Column("p_signs", "p, sign flips", "p"),
        Column("p_wilcoxon", "p, Wilcoxon", "p"),
        Column("detectable_speed_up", "detectable speed-up", "ratio"),
        Column("detectable_gain", "detectable difference", "points"),
        Column("setting", "setting", shown=False),
    )
    table = Table("comparisons", "Tests against the baseline", caption, columns, rows, folded=True)
    return table.without_empty("speed_up", "gain", "detectable_speed_up", "detectable_gain")
