"""What each component of a combination of methods does: main effects, interactions, one in and one out.

A component is a method in the chain of an arm: `dbp` around `ldb` has the components dbp and ldb, the baseline has
none. All effects are computed within a seed first and then averaged over the seeds.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from analysis.comparisons import MIN_SEEDS
from analysis.measured import Arm, Group
from analysis.paired import holm, t_test
from analysis.statistics import mean_estimate
from analysis.table import Column, Table

Design = dict[frozenset[str], NDArray[np.float64]]
"""Components that are present to the (n,) outcomes by seed, NaN where a run is missing."""


def main_effect(design: Design, component: str) -> NDArray[np.float64]:
    """(n,) outcome with the component minus without, averaged over all contexts in which both were measured."""
    return _mean([design[on] - design[on - {component}] for on in contexts(design, {component})])


def interaction(design: Design, first: str, second: str) -> NDArray[np.float64]:
    """(n,) how much more one component does where the other is present, averaged over all complete contexts.

    It is the difference of two differences: 0 where effects add up.
    """
    both = {first, second}
    return _mean(
        [design[on] - design[on - {first}] - design[on - {second}] + design[on - both] for on in contexts(design, both)]
    )


def contexts(design: Design, components: set[str]) -> list[frozenset[str]]:
    """Arms with all the components, of which every arm with some of them removed was measured too."""
    removed = [set(r) for k in range(1, len(components) + 1) for r in itertools.combinations(sorted(components), k)]
    return [on for on in design if components <= on and all(on - r in design for r in removed)]


def _mean(parts: list[NDArray[np.float64]]) -> NDArray[np.float64]:
    return np.mean(parts, axis=0) if parts else np.empty(0)


@dataclass(frozen=True)
class Study:
    """The combinations of one sweep in a group: accuracy and log seconds by what is present, and the arms."""

    sweep: str
    arms: dict[frozenset[str], Arm]
    accuracy: Design
    log_seconds: Design

    @property
    def components(self) -> list[str]:
        return list(dict.fromkeys(c for on, arm in self.arms.items() for c in arm.components if c in on))


def studies(group: Group) -> Iterator[Study]:
    """Sweeps with an arm of two components or more that has a neighbour with one component less.

    A combination measured at several settings is left out: which of them to compare would be a choice.
    """
    for sweep in dict.fromkeys(arm.sweep for arm in group.candidates):
        found: dict[frozenset[str], list[Arm]] = {}
        for arm in group.candidates:
            if arm.sweep == sweep:
                found.setdefault(frozenset(arm.components), []).append(arm)
        arms = {on: own[0] for on, own in found.items() if len(own) == 1}
        if not any(len(on) > 1 and any(on - {c} in arms for c in on) for on in arms):
            continue
        seeds = group.seeds
        with np.errstate(divide="ignore"):
            seconds = {on: np.log(arm.at("train_seconds", seeds)) for on, arm in arms.items()}
        accuracy = {on: arm.at(group.accuracy_column, seeds) for on, arm in arms.items()}
        yield Study(sweep, arms, accuracy, seconds)


def factorial_table(group: Group) -> Table:
    """Main effects and two-factor interactions."""
    rows = []
    for study in studies(group):
        for component in study.components:
            count = len(contexts(study.accuracy, {component}))
            if count:
                effects = [main_effect(d, component) for d in (study.accuracy, study.log_seconds)]
                rows.append(effect_row(_of(study, group, {"effect": component, "contexts": count}), effects))
        for first, second in itertools.combinations(study.components, 2):
            count = len(contexts(study.accuracy, {first, second}))
            if count:
                effects = [interaction(d, first, second) for d in (study.accuracy, study.log_seconds)]
                names = {"effect": f"{first} × {second}", "contexts": count}
                rows.append(effect_row(_of(study, group, names), effects))
    caption = (
        "Main effect: with the component minus without, averaged over the arms that differ in nothing else. "
        "Interaction (×): how much more one does where the other is present; 0 points and 1.00× where effects "
        "simply add up (times: multiply). Paired over seeds, 95 % t intervals; time as a ratio, below 1 is "
        "faster. p: t test, Holm over this table. Arms keep the recipes they were measured with."
    )
    columns = (Column("effect", "effect"), Column("contexts", "contexts", "count"), *OUTCOMES)
    return corrected("factorial", "Effects and interactions of the components", caption, columns, rows)


def ablation_table(group: Group) -> Table:
    """Each component added to the baseline, and removed from the largest combinations."""
    rows = []
    for study in studies(group):
        arms = study.arms
        for on in sorted(arms, key=lambda on: (len(on), sorted(on))):
            if len(on) == 1 and frozenset() in arms:
                rows.append(_step(group, study, "added to the baseline", frozenset(), on))
        for on in sorted(arms, key=lambda on: (-len(on), sorted(on))):
            if len(on) > 1 and not any(on < other for other in arms):
                for component in (c for c in study.components if c in on and on - {c} in arms):
                    what = f"removed from {arms[on].name}"
                    rows.append(_step(group, study, what, on, on - {component}))
    caption = (
        "One component at a time: accuracy after the step minus before, and time after over before (below 1 is "
        "faster). A component earns its place in a combination if removing it makes things worse. Paired over "
        "seeds, 95 % t intervals; p: t test, Holm over this table."
    )
    columns = (Column("component", "component"), Column("step", "step"), *OUTCOMES)
    return corrected("ablation", "One in, one out", caption, columns, rows)


OUTCOMES = (
    Column("n", "seeds", "count"),
    Column("accuracy", "accuracy", "points"),
    Column("accuracy_p", "p, Holm", "p"),
    Column("time", "time", "ratio"),
    Column("time_p", "p, Holm (time)", "p"),
)


def _step(group: Group, study: Study, what: str, before: frozenset[str], after: frozenset[str]) -> dict:
    (component,) = before ^ after
    effects = [design[after] - design[before] for design in (study.accuracy, study.log_seconds)]
    return effect_row(_of(study, group, {"component": component, "step": what}), effects)


def _of(study: Study, group: Group, names: dict) -> dict:
    """The names of a row, the first with its sweep where the group has several."""
    several = len({arm.sweep for arm in group.candidates}) > 1
    key = next(iter(names))
    return {**names, key: f"{study.sweep}: {names[key]}" if several else names[key]}


def effect_row(names: dict, effects: Sequence[NDArray[np.float64]] | NDArray[np.float64]) -> dict:
    """Estimates of an effect on accuracy and log seconds, each (seeds,).

    p values are corrected later; with fewer than three seeds there are none.
    """
    accuracy, seconds = (np.where(np.isfinite(x), x, np.nan) for x in effects)
    e, time = mean_estimate(accuracy), mean_estimate(seconds)
    return {
        **names,
        "n": e.n,
        "accuracy": e,
        "accuracy_p": t_test(accuracy) if e.n >= MIN_SEEDS else None,
        "time": time.exp(),
        "time_p": t_test(seconds) if time.n >= MIN_SEEDS else None,
    }


def corrected(name: str, title: str, caption: str, columns: tuple[Column, ...], rows: list[dict]) -> Table:
    """The table with Holm's p over both outcomes of all rows."""
    raw = [row[key] for row in rows for key in ("accuracy_p", "time_p")]
    adjusted = iter(holm([np.nan if p is None else p for p in raw]).tolist())
    made = [{**row, "accuracy_p": next(adjusted), "time_p": next(adjusted)} for row in rows]
    return Table(name, title, caption, columns, made)
