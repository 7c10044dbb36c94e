"""Which runs may be compared on a time axis, and how they group: task and hardware, then arm, then seed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import pandas as pd

from analysis import labels
from analysis.columns import TIMED
from analysis.errors import ReportError
from analysis.frames import cells, count, known, where
from analysis.load import Results
from analysis.statistics import Estimate, mean_estimate, median_estimate

ROLE_ORDER = {"baseline": 0, "method": 1, "control": 2}


@dataclass(frozen=True, eq=False)
class Arm:
    """The runs of one setting in one role.

    Attributes:
        name: how the arm is called in this report, unique in its group.
        setting: short label of the method with the settings in which the arms of its family differ.
        timed: measured alone, not resumed, finished; one row per seed, index = seed. All that has times.
        tried: the same without the condition `finished`; what did not reach a target is counted from here.
        shared: how many runs finished beside other programs, and are in neither.
    """

    name: str
    sweep: str
    arm: str
    role: str
    family: str
    setting: str
    values: dict[str, Any]
    timed: pd.DataFrame
    tried: pd.DataFrame
    shared: int = 0

    def at(self, column: str, seeds: Iterable[int]) -> np.ndarray:
        """(seeds,) values of a column, NaN for a seed without a timed run."""
        places = self.timed.index.get_indexer(pd.Index(list(seeds), dtype="int64"))
        values = np.append(self.timed[column].to_numpy(dtype=float), np.nan)  # -1, not found, is the last
        return values[places]

    @property
    def n(self) -> int:
        return len(self.timed)

    @property
    def workers(self) -> int:
        """Devices that trained a run side by side."""
        return int(np.nanmax([1.0, *_workers(self.timed)]))

    @property
    def components(self) -> tuple[str, ...]:
        """Names of the methods in the combination, outermost first; none for plain backprop."""
        return tuple(name for name in self.family.split("+") if name != "bp")

    @property
    def recipe(self) -> dict[str, Any]:
        """The recipe's settings by dotted name."""
        return {k: v for k, v in self.values.items() if k.startswith("recipe.")}


@dataclass(frozen=True, eq=False)
class Group:
    """Arms that may be compared: one task on one kind of hardware and software.

    Attributes:
        ablated: the cells of the ablations there, which are no arms to choose from; None where there are none.
        task: what all its runs train, those too that no arm may use.
    """

    title: str
    hardware: str
    slug: str
    arms: tuple[Arm, ...]
    ablated: Group | None = None
    task: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def seeds(self) -> list[int]:
        return sorted({int(s) for arm in self.arms for s in arm.timed.index})

    @cached_property
    def accuracy_column(self) -> str:
        """`test_accuracy`, or `val_accuracy` where a timed run has none."""
        complete = all(arm.timed["test_accuracy"].notna().all() for arm in self.arms)
        return "test_accuracy" if complete else "val_accuracy"

    @property
    def accuracy_name(self) -> str:
        return "test accuracy" if self.accuracy_column == "test_accuracy" else "validation accuracy"

    @property
    def candidates(self) -> list[Arm]:
        """What one could use: baselines and methods with a timed run; controls only explain."""
        return [arm for arm in self.arms if arm.role != "control" and arm.n]

    def baseline_of(self, arm: Arm) -> Arm | None:
        """The baseline of the arm's sweep, with as many epochs where there are several."""
        found = [a for a in self.arms if a.role == "baseline" and a.sweep == arm.sweep and a.n]
        epochs = arm.values.get("recipe.epochs")
        return next((a for a in found if a.values.get("recipe.epochs") == epochs), found[0] if found else None)

    def control_of(self, arm: Arm) -> Arm | None:
        """The arm's control: same sweep, arm name and recipe."""
        found = [a for a in self.arms if a.role == "control" and a.sweep == arm.sweep and a.arm == arm.arm]
        same = [a for a in found if a.n and a.recipe == arm.recipe]
        return min(same, key=lambda a: _differing(a.values, arm.values), default=None)

    @lru_cache(maxsize=512)  # noqa: B019  a handful of groups per report
    def accuracy(self, arm: Arm) -> Estimate:
        return mean_estimate(arm.timed[self.accuracy_column], bounds=(0.0, 1.0))

    @lru_cache(maxsize=512)  # noqa: B019
    def seconds(self, arm: Arm) -> Estimate:
        return median_estimate(arm.timed["train_seconds"])

    @property
    def side_by_side(self) -> bool:
        """Whether a run of any arm used several devices at once."""
        return any(arm.workers > 1 for arm in self.arms)

    def device_seconds(self, arm: Arm) -> Estimate:
        """Training seconds times the devices that trained."""
        return median_estimate(arm.timed["train_seconds"] * _workers(arm.timed))


def _differing(a: dict[str, Any], b: dict[str, Any]) -> int:
    return sum(a.get(name) != b.get(name) for name in {*a, *b})


def measured_groups(results: Results, *, allow_mixed: bool = False) -> list[Group]:
    """Groups of measured runs, in order of task and hardware.

    Raises:
        ReportError: measured runs of unlike hardware or software, and `allow_mixed` is false.
    """
    runs = where(results.runs, results.runs["phase"].isin(TIMED)).copy()
    if runs.empty:
        return []
    pairs = zip(runs["device"], runs["software"], strict=True)
    runs["stratum"] = [labels.stratum(device, software) for device, software in pairs]
    strata = sorted(set(runs["stratum"]))
    if len(strata) > 1 and not allow_mixed:
        raise ReportError(
            f"the measured runs come from {len(strata)} kinds of hardware or software ({'; '.join(strata)}), "
            "whose seconds cannot be compared; report them apart, or pass --allow-mixed for one section each"
        )
    runs["task_key"] = [labels.canonical(task) for task in runs["task"]]
    tasks = {key: task for key, task in zip(runs["task_key"], runs["task"], strict=True)}
    short = [labels.task_label(task) for task in tasks.values()]
    groups: list[Group] = []
    for (key, stratum), part in cells(runs, ["task_key", "stratum"]):
        task = tasks[key]
        title = labels.task_label(task, full=short.count(labels.task_label(task)) > 1)
        title += f" — {stratum}" if len(strata) > 1 else ""
        measured, others = (where(part, part["phase"] == phase) for phase in TIMED)
        name = (title, stratum, f"group{len(groups) + 1}")
        ablated = None if others.empty else Group(*name, _arms(others, results), task=task)
        groups.append(Group(*name, _arms(measured, results), ablated, task))
    return groups


def _workers(runs: pd.DataFrame) -> pd.Series:
    """Devices of every run; 1 in records from before there could be more."""
    return pd.Series(runs.get("workers", 1.0), index=runs.index, dtype=float).fillna(1.0)


def left_out(results: Results, groups: Iterable[Group]) -> dict[str, int]:
    """Measured runs that finished but are not drawn on a time axis, by reason."""
    runs = where(results.runs, results.runs["phase"].isin(TIMED) & (results.runs["status"] == "finished"))
    usable = runs["exclusive"] & ~runs["resumed"]
    drawn = sum(arm.n for group in groups for part in (group, group.ablated) if part for arm in part.arms)
    timeless = count(usable & ~known(runs["train_seconds"]))
    counts = {
        "shared their device with other work": count(~runs["exclusive"]),
        "were resumed from a checkpoint": count(runs["exclusive"] & runs["resumed"]),
        "have no training time": timeless,
        "repeat a seed of the same arm": count(usable) - timeless - drawn,
    }
    return {reason: count for reason, count in counts.items() if count}


def _arm_order(results: Results) -> dict[tuple[str, str], int]:
    """(sweep, arm) to its place in the sweep file."""
    return {(s["sweep"], arm): i for s in results.sweeps for i, arm in enumerate(s["arms"])}


def _arms(runs: pd.DataFrame, results: Results) -> tuple[Arm, ...]:
    """Arms of one group in the order of the sweep files, the baseline first, controls behind their method."""
    order = _arm_order(results)
    values = [labels.settings(m, r) for m, r in zip(runs["method"], runs["recipe"], strict=True)]
    runs = runs.assign(setting_key=[labels.canonical(v) for v in values])
    found = sorted(cells(runs, ["sweep", "arm", "role", "setting_key"]), key=lambda cell: _place(cell[0], order))
    settings: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for key, part in found:
        settings.setdefault(key[:3], []).append(labels.settings(part["method"].iloc[0], part["recipe"].iloc[0]))
    several_sweeps = len({key[0] for key, _ in found}) > 1
    knobs = _knobs(results, values)
    arms, used = [], dict.fromkeys(settings, 0)
    for key, part in found:
        own = settings[key[:3]][used[key[:3]]]
        used[key[:3]] += 1
        sweep, arm, role = key[:3]
        name = f"{sweep}/{arm}" if several_sweeps else arm
        name = labels.label(name, own, labels.varying(settings[key[:3]]))
        name += " (control)" if role == "control" else ""
        family = labels.family(part["method"].iloc[0])
        tried, timed = _usable(part)
        shared = count(~part["exclusive"] & (part["status"] == "finished"))
        setting = labels.label(family, own, knobs[family])
        arms.append(Arm(name, sweep, arm, role, family, setting, own, timed, tried, shared))
    return tuple(arms)


def _knobs(results: Results, measured: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Family to what its label shows: fields that differ in any run of the family, and measured recipe fields."""
    by_family: dict[str, list[dict[str, Any]]] = {}
    for method in results.runs["method"]:
        by_family.setdefault(labels.family(method), []).append(labels.settings(method, {}))
    recipe = [name for name in labels.varying(measured) if name.startswith("recipe.")]
    return {family: labels.varying(values) + recipe for family, values in by_family.items()}


def _usable(runs: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """`tried` and `timed` of an arm; a seed that is repeated is no second sample."""
    alone = runs["exclusive"] | (runs["status"] != "finished")  # a run that diverged did so in any company
    tried = where(runs, alone & ~runs["resumed"] & (runs["status"] != "running"))
    tried = tried.sort_values("status", key=lambda s: s != "finished", kind="stable")
    tried = where(tried, ~tried["seed"].duplicated()).set_index("seed").sort_index()
    return tried, where(tried, (tried["status"] == "finished") & known(tried["train_seconds"]))


def _place(key: Any, order: dict[tuple[str, str], int]) -> tuple[Any, ...]:
    sweep, arm, role, setting = key
    first = 0 if role == "baseline" else 1
    return sweep, first, order.get((sweep, arm), len(order)), arm, ROLE_ORDER[role], setting
