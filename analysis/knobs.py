"""How accuracy answers to each knob: what the search tried and what was measured, per arm."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from analysis import labels
from analysis.frames import cells, known, where
from analysis.load import Results
from analysis.table import Column, Table

MIN_TRIALS = 3
WINDOW = 5  # trials in a running median
MAX_FIGURES = 12


@dataclass(frozen=True)
class Knob:
    """One knob of one arm.

    Attributes:
        values, accuracy: (n,) search trials that finished, sorted by value; all runs of the measure part where the
            arm was not searched.
        measured, measured_accuracy: (m,) measured runs, drawn beside the trials; their budget may differ.
    """

    sweep: str
    arm: str
    task: str
    family: str
    name: str
    values: NDArray[Any]
    accuracy: NDArray[np.float64]
    measured: NDArray[Any]
    measured_accuracy: NDArray[np.float64]

    @property
    def is_number(self) -> bool:
        return self.values.dtype.kind == "f"

    @property
    def line(self) -> NDArray[np.float64]:
        """(n,) what joins the trials: a running median, or where that would smooth few trials away, the trials."""
        return running_median(self.accuracy) if len(self.accuracy) >= 2 * WINDOW else self.accuracy

    @property
    def is_log(self) -> bool:
        """Whether the values are spread over a factor of thirty or more."""
        return self.is_number and bool(self.values[0] > 0) and bool(self.values[-1] >= 30 * self.values[0])


def running_median(accuracy: ArrayLike, window: int = WINDOW) -> NDArray[np.float64]:
    """(n,) median of each value and its neighbours, of as many as there are at the ends.

    >>> running_median([1.0, 5.0, 2.0, 3.0], window=3).tolist()
    [3.0, 2.0, 3.0, 2.5]
    """
    x = np.asarray(accuracy, dtype=float)
    half = window // 2
    return np.array([np.median(x[max(i - half, 0) : i + half + 1]) for i in range(len(x))])


def knobs(results: Results) -> Iterator[Knob]:
    """Knobs with at least three trials and two values, by sweep, arm and task."""
    runs = results.runs
    usable = (runs["status"] == "finished") & (runs["role"] != "control") & known(runs["val_accuracy"])
    runs = where(runs, usable & runs["phase"].isin(["search", "measure"]))
    runs = runs.assign(task_key=[labels.canonical(task) for task in runs["task"]])
    order = {(s["sweep"], arm): i for s in results.sweeps for i, arm in enumerate(s["arms"])}
    found = cells(runs, ["sweep", "arm", "task_key"])
    for (sweep, arm, _), part in sorted(found, key=lambda c: (c[0][0], order.get(c[0][:2], len(order)), c[0])):
        search, measure = (where(part, part["phase"] == phase) for phase in ("search", "measure"))
        shown, others = (search, measure) if len(search) else (measure, search)
        if len(shown) < MIN_TRIALS:
            continue
        settings, extra = (
            [labels.settings(m, r) for m, r in zip(runs["method"], runs["recipe"], strict=True)]
            for runs in (shown, others)
        )
        scores, beside = (runs["val_accuracy"].to_numpy(dtype=float) for runs in (shown, others))
        task, method = shown["task"].iloc[0], shown["method"].iloc[0]
        for name in labels.varying(settings):
            values = _values([s.get(name) for s in settings])
            points = _values([s.get(name) for s in extra], like=values)
            at = np.lexsort((scores, values))
            yield Knob(
                sweep, arm, labels.task_label(task), labels.family(method), name,
                values[at], scores[at], points, beside,
            )  # fmt: skip


def _values(raw: Iterable[Any], like: NDArray[Any] | None = None) -> NDArray[Any]:
    """Numbers as floats, anything else as text; `like` another array if given."""
    items = list(raw)
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in items)
    if numbers if like is None else like.dtype.kind == "f":
        return np.array([float(v) if isinstance(v, int | float) else np.nan for v in items], dtype=float)
    return np.array([labels.plain(v) for v in items], dtype=str)


def figure_names(found: Iterable[Knob]) -> dict[str, list[Knob]]:
    """Name of a figure, without suffix, to the numeric knobs of the arm that it shows; of the first twelve arms."""
    arms: dict[tuple[str, str, str], list[Knob]] = {}
    for knob in found:
        if knob.is_number:
            arms.setdefault((knob.sweep, knob.arm, knob.task), []).append(knob)
    return {f"knobs-{i}": own for i, own in enumerate(list(arms.values())[:MAX_FIGURES], 1)}


def knob_table(found: Iterable[Knob]) -> Table:
    """One row per arm and knob."""
    rows = [_row(knob) for knob in found]
    caption = (
        "Final validation accuracy of the finished search trials (of the measured runs where an arm was not "
        "searched) against each knob that varied. Lower, middle, upper: median accuracy in the thirds of the trials "
        "in order of the knob's value; Spearman: −1 falls, 1 rises, near 0 for no trend or a peak. Knobs vary "
        "together, so this shows where the search looked and what it found there, not the effect of one knob alone. "
        "No times: search trials share devices and may stop early."
    )
    columns = (
        Column("sweep", "sweep"),
        Column("arm", "arm"),
        Column("task", "task"),
        Column("knob", "knob"),
        Column("trials", "trials", "count"),
        Column("tried", "tried"),
        Column("best", "best at"),
        Column("best_accuracy", "best", "percent"),
        Column("lower", "lower", "percent"),
        Column("middle", "middle", "percent"),
        Column("upper", "upper", "percent"),
        Column("spearman", "Spearman", "share"),
    )
    table = Table("knobs", "Accuracy against each knob", caption, columns, rows, folded=True)
    return table.without_empty("lower", "middle", "upper", "spearman")


def _row(knob: Knob) -> dict[str, Any]:
    best = int(np.argmax(knob.accuracy))
    values = [labels.plain(float(v)) if knob.is_number else str(v) for v in knob.values]
    row: dict[str, Any] = {
        "sweep": knob.sweep,
        "arm": knob.arm,
        "task": knob.task,
        "knob": knob.name.removeprefix("recipe."),
        "trials": len(values),
        "tried": f"{values[0]} to {values[-1]}" if knob.is_number else ", ".join(dict.fromkeys(values)),
        "best": values[best],
        "best_accuracy": float(knob.accuracy[best]),
    }
    if knob.is_number:
        thirds = [float(np.median(x)) for x in np.array_split(knob.accuracy, 3)]
        row |= dict(zip(("lower", "middle", "upper"), thirds, strict=True))
        if np.ptp(knob.accuracy) > 0:
            found: Any = stats.spearmanr(knob.values, knob.accuracy)
            row["spearman"] = float(found.statistic)
    return row
