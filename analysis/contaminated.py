"""Measured runs that were not alone on their device: what they took is shown apart and compared with nothing."""

from __future__ import annotations

from typing import Any

import pandas as pd

from analysis import labels
from analysis.columns import TIMED
from analysis.frames import cells, where
from analysis.load import Results
from analysis.measured import ROLE_ORDER
from analysis.statistics import mean_estimate, median_estimate
from analysis.table import Column, Table


def contaminated(runs: pd.DataFrame) -> pd.DataFrame:
    """The finished measured runs beside which somebody else used the device."""
    return where(runs, runs["phase"].isin(TIMED) & (runs["status"] == "finished") & ~runs["exclusive"])


def contaminated_table(results: Results) -> Table:
    """Accuracy and seconds of these runs by arm: numbers to look at, from which nothing is concluded."""
    runs = contaminated(results.runs)
    tasks = {labels.canonical(task): labels.task_label(task, full=True) for task in runs["task"]}
    columns = (
        Column("sweep", "sweep", shown=len({*runs["sweep"]}) > 1),
        Column("task", "task", shown=len(tasks) > 1),
        Column("part", "part", shown="ablate" in {*runs["phase"]}),
        Column("arm", "arm"),
        Column("role", "role"),
        Column("n", "runs", "count"),
        Column("accuracy", "test accuracy", "percent"),
        Column("seconds", "training time, contaminated", "seconds"),
        Column("setting", "setting"),
    )
    values = [labels.settings(m, r) for m, r in zip(runs["method"], runs["recipe"], strict=True)]
    families = [labels.family(method) for method in runs["method"]]
    varying = {f: labels.varying([v for v, of in zip(values, families, strict=True) if of == f]) for f in {*families}}
    pairs = zip(families, values, strict=True)
    runs = runs.assign(
        setting=[labels.label(family, own, varying[family]) for family, own in pairs],
        task_key=[labels.canonical(task) for task in runs["task"]],
    )
    by = ["sweep", "task_key", "phase", "arm", "role", "setting"]
    rows = [
        {
            "sweep": sweep,
            "task": tasks[task],
            "part": phase,
            "arm": arm,
            "role": role,
            "n": len(part),
            "accuracy": mean_estimate(part["test_accuracy"], bounds=(0.0, 1.0)),
            "seconds": median_estimate(part["train_seconds"]),
            "setting": setting,
        }
        for (sweep, task, phase, arm, role, setting), part in cells(runs, by)
    ]
    rows.sort(key=_place)
    caption = (
        "Finished measured runs beside which other programs used the device. Their seconds are too long, unequally so, "
        "and nobody knows by how much: they are in no other table, figure or verdict, nor are their accuracies. "
        "Measure again, in a new folder, when the machine is quiet."
    )
    return Table("contaminated", "Contaminated times", caption, columns, rows)


def _place(row: dict[str, Any]) -> tuple[Any, ...]:
    """Measured before ablated, the baseline first, controls behind their method."""
    where_from = row["sweep"], row["task"], TIMED.index(row["part"])
    return *where_from, row["role"] != "baseline", row["arm"], ROLE_ORDER[row["role"]]
