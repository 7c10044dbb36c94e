"""What changed between two sweeps: accuracy, time, settings, hardware and software, of the arms that both measured."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from analysis import labels
from analysis.errors import ReportError
from analysis.frames import count, records, where
from analysis.load import Results, load
from analysis.measured import Arm, Group, measured_groups
from analysis.report import write_file
from analysis.statistics import LEVEL, Estimate, mean_estimate
from analysis.table import Column, Table, markdown, plain_rows, to_markdown

SHOWN_VALUES = 3


@dataclass(frozen=True)
class Diff:
    """Names and number of runs of both sides, one sentence for each thing to know, and the tables with rows."""

    names: tuple[str, str]
    runs: tuple[int, int]
    notes: list[str]
    tables: list[Table]


@dataclass(frozen=True, eq=False)
class Place:
    """An arm and where it was measured; `task` and `title` are those of its group."""

    arm: Arm
    group: Group
    task: str
    title: str

    @property
    def key(self) -> tuple[str, str, str]:
        return self.task, self.arm.arm, self.arm.role


def diff(first: str, second: str, *, allow_mixed: bool = False, tracking_uri: str | None = None) -> Diff:
    """Compare what two sources measured; differences are the second's minus or over the first's.

    Args:
        allow_mixed: compare times although hardware or software differ.

    Raises:
        ReportError: a source cannot be read.
    """
    a, b = (load([source], tracking_uri=tracking_uri) for source in (first, second))
    pairs, only = matched(_places(a), _places(b))
    made = [_difference_table(pairs, allow_mixed), _only_table(only), _settings_table(pairs, a, b)]
    made += [_environment_table(a, b), _count_table(a, b)]
    unlike = [p for p in pairs if p[0].group.hardware != p[1].group.hardware]
    notes = [f"{side}: {problem}" for side, results in (("A", a), ("B", b)) for problem in results.problems]
    if unlike and not allow_mixed:
        notes.append(
            f"The times of {len(unlike)} of {len(pairs)} arms are left out, as hardware or software differ; "
            "--allow-mixed compares them all the same."
        )
    if not pairs:
        notes.append("No arm was measured in both.")
    return Diff((first, second), (len(a.runs), len(b.runs)), notes, [table for table in made if table.rows])


def _places(results: Results) -> list[Place]:
    places = []
    for group in measured_groups(results, allow_mixed=True):
        tasks = [task for arm in group.arms for task in arm.tried["task"]]
        title = labels.task_label(tasks[0], full=True) if tasks else group.title
        places += [Place(arm, group, labels.canonical(tasks[0]) if tasks else title, title) for arm in group.arms]
    return places


def matched(
    first: Sequence[Place], second: Sequence[Place]
) -> tuple[list[tuple[Place, Place]], list[tuple[str, Place]]]:
    """Arms of equal task, name and role; of several the most alike first: hardware, then settings, then order.

    Returns:
        The pairs, and what is left as ("A" or "B", arm).
    """
    pairs: list[tuple[Place, Place]] = []
    left, right = list(first), list(second)
    for alike in (_same_everything, _same_settings, _same_hardware, lambda a, b: a.key == b.key):
        for a in list(left):
            b = next((b for b in right if alike(a, b)), None)
            if b is not None:
                pairs.append((a, b))
                left.remove(a)
                right.remove(b)
    order = {id(place): i for i, place in enumerate(first)}
    pairs.sort(key=lambda pair: order[id(pair[0])])
    return pairs, [*(("A", p) for p in left), *(("B", p) for p in right)]


def _same_hardware(a: Place, b: Place) -> bool:
    return a.key == b.key and a.group.hardware == b.group.hardware


def _same_settings(a: Place, b: Place) -> bool:
    return a.key == b.key and labels.canonical(a.arm.values) == labels.canonical(b.arm.values)


def _same_everything(a: Place, b: Place) -> bool:
    return _same_hardware(a, b) and _same_settings(a, b)


# --- differences -------------------------------------------------------------------------------------------------


def change(first: dict[int, float], second: dict[int, float]) -> tuple[Estimate, str]:
    """Mean of the second minus mean of the first with its interval, and what it rests on.

    Paired by seed where at least two seeds are shared, as equal seeds start from equal weights and see equal
    data; otherwise Welch's interval for two independent samples.

    Args:
        first, second: values by seed; unknown ones are left out.
    """
    x, y = ({seed: value for seed, value in side.items() if np.isfinite(value)} for side in (first, second))
    shared = sorted(x.keys() & y.keys())
    if len(shared) >= 2:
        return mean_estimate([y[seed] - x[seed] for seed in shared]), f"{len(shared)} shared seeds"
    return welch(np.array([*x.values()]), np.array([*y.values()])), f"{len(x)} and {len(y)} seeds, unpaired"


def welch(x: NDArray[np.float64], y: NDArray[np.float64], *, level: float = LEVEL) -> Estimate:
    """Mean of y minus mean of x of independent samples of unequal variance, with the t interval of Welch.

    Args:
        x, y: (n,) and (m,) values.
    """
    n = min(len(x), len(y))
    if n == 0:
        return Estimate()
    value = float(y.mean() - x.mean())
    if n == 1:
        return Estimate(value, n=n)
    parts = x.var(ddof=1) / len(x), y.var(ddof=1) / len(y)
    total = sum(parts)
    if total == 0:
        return Estimate(value, value, value, n)
    freedom = total**2 / (parts[0] ** 2 / (len(x) - 1) + parts[1] ** 2 / (len(y) - 1))
    half = float(stdtrit(freedom, 0.5 + level / 2) * math.sqrt(total))
    return Estimate(value, value - half, value + half, n)


def _difference_table(pairs: Sequence[tuple[Place, Place]], allow_mixed: bool) -> Table:
    rows = []
    for a, b in pairs:
        column = "test_accuracy"
        if {a.group.accuracy_column, b.group.accuracy_column} != {column}:
            column = "val_accuracy"
        gain, rests_on = change(_by_seed(a.arm, column), _by_seed(b.arm, column))
        ratio = Estimate()
        if allow_mixed or a.group.hardware == b.group.hardware:
            logs, rests_on = change(*(_logs(_by_seed(side.arm, "train_seconds")) for side in (a, b)))
            ratio = logs.exp()
        if a.arm.n and set(a.arm.timed["run_key"]) == set(b.arm.timed["run_key"]):
            rests_on += ", the same runs"
        rows.append(
            {"task": a.title, "arm": a.arm.name, "role": a.arm.role, "gain": gain, "ratio": ratio}
            | {"verdict": _verdict(gain, ratio), "rests_on": rests_on}
        )
    columns = (
        Column("task", "task", shown=len({row["task"] for row in rows}) > 1),
        Column("arm", "arm"),
        Column("role", "role", shown=False),
        Column("gain", "accuracy, B − A", "points"),
        Column("ratio", "training time, B / A", "ratio"),
        Column("verdict", "B is"),
        Column("rests_on", "rests on"),
    )
    caption = "95 % intervals; means of the accuracies, geometric means of the times."
    return Table("differences", "Arms measured in both", caption, columns, rows)


def _by_seed(arm: Arm, column: str) -> dict[int, float]:
    return {
        int(seed): float(value) for seed, value in zip(arm.timed.index, arm.at(column, arm.timed.index), strict=True)
    }


def _logs(seconds: dict[int, float]) -> dict[int, float]:
    """Logarithms; a time of zero has none."""
    return {seed: math.log(value) for seed, value in seconds.items() if value > 0}


def _verdict(gain: Estimate, ratio: Estimate) -> str:
    if gain.low is None and ratio.low is None:
        return "not enough data"
    words = []
    for e, neutral, below, above in ((ratio, 1.0, "faster", "slower"), (gain, 0.0, "less accurate", "more accurate")):
        if e.low is not None and e.high is not None:
            words += [above] if e.low > neutral else [below] if e.high < neutral else []
    return ", ".join(words) or "not clearly different"


# --- everything else ---------------------------------------------------------------------------------------------


def _only_table(only: Iterable[tuple[str, Place]]) -> Table:
    rows = [
        {"side": side, "task": p.title, "arm": p.arm.name, "role": p.arm.role, "setting": p.arm.setting, "n": p.arm.n}
        for side, p in only
    ]
    columns = (
        Column("side", "in"),
        Column("task", "task"),
        Column("arm", "arm"),
        Column("role", "role", shown=False),
        Column("n", "seeds", "count"),
        Column("setting", "setting"),
    )
    return Table("only", "Arms measured in one of the two", "", columns, rows)


def _settings_table(pairs: Sequence[tuple[Place, Place]], a: Results, b: Results) -> Table:
    """Settings of matched arms and plans of sweeps that differ, each change once with all arms that have it."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for one, other in pairs:
        x, y = one.arm.values, other.arm.values
        for name in dict.fromkeys((*x, *y)):
            change = name, _value(x, name), _value(y, name)
            if change[1] != change[2]:
                found.setdefault(change, []).append(one.arm.name)
    rows = []
    for (name, old, new), arms in found.items():
        whose = "every arm" if len(arms) == len(pairs) > 1 else ", ".join(dict.fromkeys(arms))
        rows.append({"arm": whose, "setting": name, "a": old, "b": new})
    if len(a.sweeps) == 1 == len(b.sweeps):
        for name in ("sweep", "search_trials", "seeds", "targets"):
            old, new = (_value(results.sweeps[0], name) for results in (a, b))
            if old != new:
                rows.append({"arm": "the sweep", "setting": name, "a": old, "b": new})
    columns = (Column("arm", "of"), Column("setting", "setting"), Column("a", "A"), Column("b", "B"))
    return Table("settings", "Settings that differ", "", columns, rows)


def _value(values: dict[str, Any], name: str) -> str:
    return labels.plain(values[name]) if name in values else "–"


def _environment_table(a: Results, b: Results) -> Table:
    rows = []
    sides = [_environment(results) for results in (a, b)]
    for name in dict.fromkeys((*sides[0], *sides[1])):
        old, new = (sorted(side.get(name, ())) for side in sides)
        if old != new:
            rows.append({"name": name, "a": _listed(old), "b": _listed(new)})
    columns = (Column("name", "what"), Column("a", "A"), Column("b", "B"))
    return Table("environment", "Hardware and software that differ", "", columns, rows)


def _environment(results: Results) -> dict[str, set[str]]:
    """Every fact about hardware, software and code to the values it has, over the measured runs if there are any."""
    measured = where(results.runs, results.runs["phase"] == "measure")
    out: dict[str, set[str]] = {}
    for run in records(measured if len(measured) else results.runs):
        facts = labels.flatten({"device": run["device"], "software": run["software"], "git_commit": run["git_commit"]})
        for name, value in facts.items():
            out.setdefault(name, set()).add("unknown" if value in (None, "", {}) else labels.plain(value))
    return out


def _listed(values: list[str]) -> str:
    more = f" and {len(values) - SHOWN_VALUES} more" if len(values) > SHOWN_VALUES else ""
    return (", ".join(values[:SHOWN_VALUES]) or "–") + more


def _count_table(a: Results, b: Results) -> Table:
    """Runs by phase and end on both sides, where the numbers differ."""
    rows = []
    cells = {pair for side in (a, b) for pair in zip(side.runs["phase"], side.runs["status"], strict=True)}
    for phase, status in sorted(cells, key=lambda cell: (cell[0] == "measure", *cell)):
        numbers = [count((s.runs["phase"] == phase) & (s.runs["status"] == status)) for s in (a, b)]
        if numbers[0] != numbers[1]:
            rows.append({"phase": phase, "status": status, "a": numbers[0], "b": numbers[1]})
    columns = (
        Column("phase", "phase"),
        Column("status", "status"),
        Column("a", "A", "count"),
        Column("b", "B", "count"),
    )
    return Table("runs", "Numbers of runs that differ", "", columns, rows)


# --- files -------------------------------------------------------------------------------------------------------


def write_diff(made: Diff, out: Path) -> None:
    """Write as Markdown or JSON, as the suffix says.

    Raises:
        ReportError: another suffix, or the file cannot be written.
    """
    forms = {".md": to_text, ".json": to_json}
    if out.suffix not in forms:
        raise ReportError(f"{out}: the difference is written as {' or '.join(forms)}; name such a file")
    try:
        write_file(out, forms[out.suffix](made).encode())
    except OSError as error:
        raise ReportError(f"{out}: cannot be written ({error.strerror})") from error


def to_text(made: Diff) -> str:
    """Markdown."""
    names = [
        f"- {side}: {markdown(name)}, {n} runs\n" for side, name, n in zip("AB", made.names, made.runs, strict=True)
    ]
    notes = [f"- {markdown(note)}\n" for note in made.notes]
    parts = ["# What changed from A to B\n\n" + "".join(names + notes)]
    for table in made.tables:
        caption = f"{markdown(table.caption)}\n\n" if table.caption else ""
        parts.append(f"## {markdown(table.title)}\n\n{caption}{to_markdown(table)}")
    return "\n".join(parts)


def to_json(made: Diff) -> str:
    data: dict[str, Any] = {
        side: {"source": n, "runs": r} for side, n, r in zip("ab", made.names, made.runs, strict=True)
    }
    data |= {"notes": made.notes, **{table.name: plain_rows(table) for table in made.tables}}
    return json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
