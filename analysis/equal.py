"""Speed-up at equal accuracy: the table, from settings where there are several, else from learning curves."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from analysis.curves import LearningCurve
from analysis.load import Results
from analysis.measured import Arm, Group
from analysis.statistics import Estimate, generator
from analysis.table import Column, Table
from analysis.targets import group_curves, targets
from analysis.tradeoff import equal_accuracy_speed_up

MIN_PAIRS = 2
Points = tuple[NDArray[np.float64], NDArray[np.float64]]


@dataclass(frozen=True)
class Family:
    """The arms of one method family in one sweep: the points of its accuracy-versus-time curve."""

    name: str
    role: str
    arms: tuple[Arm, ...]

    def points(self, seeds: list[int], column: str) -> Points:
        """Seconds and accuracies, each (seeds, arms)."""
        seconds = np.column_stack([arm.at("train_seconds", seeds) for arm in self.arms])
        return seconds, np.column_stack([arm.at(column, seeds) for arm in self.arms])


def equal_accuracy_table(group: Group, results: Results) -> Table:
    """One row per method family and accuracy."""
    curves = group_curves(group, results)
    levels, _ = targets(group, results)
    rows: list[dict] = []
    for baseline, family in pairs(group):
        if max(len(baseline.arms), len(family.arms)) > 1:
            rows += _from_settings(group, baseline, family)
        else:
            rows += _from_curves(group, baseline.arms[0], family.arms[0], curves, levels)
    caption = (
        "Seconds to the same accuracy, interpolated on curves of mean accuracy against geometric-mean training "
        "time (log time linear in accuracy; the best so far counts). Interval: bootstrap over the paired seeds, "
        "Student's t on the log scale; “not reached” where the method's curve ends below the accuracy."
    )
    sources = {row["source"] for row in rows}
    if any("settings" in source for source in sources):
        caption += (
            f" Settings: the curve joins the method's measured settings or budgets, and the accuracy is the mean "
            f"{group.accuracy_name} of one of the baseline's; a method that is already more accurate at its "
            "fastest setting is given that setting's time."
        )
    if "learning curves" in sources:
        caption += (
            " Learning curves: only one budget was measured, so the accuracy is a validation accuracy along the "
            "run. A point inside a run whose learning rate decays is not what a shorter run would reach: read "
            "these as time to target, not as a trade-off."
        )
    columns = (
        Column("arm", "arm"),
        Column("source", "from"),
        Column("n", "pairs", "count"),
        Column("accuracy", "at accuracy", "percent"),
        Column("base_seconds", "baseline", "seconds"),
        Column("seconds", "arm", "seconds"),
        Column("speed_up", "speed-up", "ratio"),
        Column("setting", "settings"),
    )
    return Table("equal_accuracy", "Speed-up at equal accuracy", caption, columns, rows)


def pairs(group: Group) -> Iterator[tuple[Family, Family]]:
    """(baseline's family, method family) of each sweep of the group."""
    found: dict[tuple[str, str, str], list[Arm]] = {}
    for arm in group.candidates:
        found.setdefault((arm.sweep, arm.role, arm.family), []).append(arm)
    for (sweep, role, name), arms in found.items():
        base = [own for key, own in found.items() if key[:2] == (sweep, "baseline")]
        if role == "method" and base:
            yield Family(base[0][0].family, "baseline", tuple(base[0])), Family(name, role, tuple(arms))


def _from_settings(group: Group, baseline: Family, family: Family) -> Iterator[dict]:
    """One row per setting of the baseline, at its accuracy."""
    shared = set.intersection(*({int(s) for s in arm.timed.index} for arm in (*baseline.arms, *family.arms)))
    seeds = sorted(shared)
    base, own = (f.points(seeds, group.accuracy_column) for f in (baseline, family))
    seconds = np.concatenate([base[0], own[0]], axis=1)
    if len(seeds) < MIN_PAIRS or not (np.isfinite(base[1]).all() and np.isfinite(own[1]).all() and (seconds > 0).all()):
        return
    for i, arm in enumerate(baseline.arms):
        rng = generator("equal accuracy", group.title, family.name, arm.name)
        found = equal_accuracy_speed_up(base, own, None, rng, point=i)
        source = f"{len(family.arms)} settings, baseline {len(baseline.arms)}"
        yield _row(family, source, "; ".join(a.setting for a in family.arms), found)


def _from_curves(
    group: Group, baseline: Arm, arm: Arm, curves: dict[str, LearningCurve], levels: tuple[float, ...]
) -> Iterator[dict]:
    """One row per target."""
    seeds = [seed for seed in arm.timed.index if seed in baseline.timed.index]
    both = [_stacked([curves.get(str(a.timed["run_key"][seed])) for seed in seeds]) for a in (baseline, arm)]
    if len(seeds) < MIN_PAIRS or both[0] is None or both[1] is None:
        return
    for level in levels:
        rng = generator("equal accuracy", group.title, arm.name, level)
        found = equal_accuracy_speed_up(both[0], both[1], level, rng)
        if found[0].value is None:
            continue  # neither gets there, which the times to target show
        yield _row(Family(arm.name, arm.role, (arm,)), "learning curves", arm.setting, found)


def _stacked(curves: list[LearningCurve | None]) -> Points | None:
    """(seeds, evaluations) seconds and accuracies where all runs were evaluated; None where there are none."""
    if not curves or any(curve is None for curve in curves):
        return None
    length = min(len(curve.seconds) for curve in curves if curve is not None)
    seconds = np.array([curve.seconds[:length] for curve in curves if curve is not None])
    accuracy = np.array([curve.accuracy[:length] for curve in curves if curve is not None])
    usable = (seconds > 0).all(axis=0) & ~np.isnan(accuracy).any(axis=0)
    return (seconds[:, usable], accuracy[:, usable]) if usable.any() else None


def _row(family: Family, source: str, setting: str, found: tuple[Estimate, float, float, float]) -> dict:
    speed_up, accuracy, base_seconds, seconds = found
    return {
        "arm": family.name,
        "source": source,
        "n": speed_up.n,
        "accuracy": accuracy,
        "base_seconds": base_seconds if not math.isnan(base_seconds) else None,
        "seconds": seconds,
        "speed_up": speed_up,
        "setting": setting,
    }
