"""Tables that count: what was planned, what became of it, and what the search tried."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pandas as pd

from analysis import labels
from analysis.frames import cells, count, known, records, where
from analysis.load import Results
from analysis.measured import ROLE_ORDER
from analysis.table import Column, Table

CELL = ("sweep", "phase", "arm", "role")
_PHASE_ORDER = {"search": 0, "measure": 1, "ablate": 2}
ENDS = ("finished", "stopped", "failed", "diverged")


def summary_table(results: Results) -> Table:
    """Runs per sweep, phase, arm and role by how they ended, and how many of the planned ones are missing."""
    found = {key: part for key, part in cells(results.runs, CELL)}
    planned = planned_cells(results)
    order = {(s["sweep"], arm): i for s in results.sweeps for i, arm in enumerate(s["arms"])}

    def place(key: tuple[Any, ...]) -> tuple[Any, ...]:
        sweep, phase, arm, role = key
        place = order.get((sweep, arm.partition("/")[0]), len(order))  # cells of an ablation stand behind their arm
        return sweep, _PHASE_ORDER.get(phase, 1), place, arm, ROLE_ORDER[role]

    keys = sorted({*found, *planned}, key=place)
    rows = []
    for key in keys:
        part = found.get(key)
        ends = Counter() if part is None else Counter(part["status"])
        plan = planned.get(key)
        if plan is None and key[3] == "control" and part is not None:
            plan = _control_plan(results, part)
        missing = None if plan is None else max(plan - ends.total(), 0)
        rows.append(
            dict(zip(CELL, key, strict=True))
            | {end: ends[end] for end in (*ENDS, "running")}
            | {"planned": plan, "missing": missing, "reasons": "" if part is None else reasons(part)}
        )
    columns = (
        *(Column(k, k) for k in CELL),
        *(Column(k, k, "count") for k in ("planned", *ENDS)),
        Column("running", "unfinished", "count"),
        Column("missing", "missing", "count"),
        Column("reasons", "reasons", null=""),
    )
    return Table("summary", "What became of every run", _summary_caption(results), columns, rows)


def planned_cells(results: Results) -> dict[tuple[Any, ...], int]:
    """(sweep, phase, arm, role) to planned runs; controls are planned only where the method has one."""
    settings = _settings_per_cell(results.runs)
    found = {key: len(part) for key, part in cells(results.runs, CELL)}
    out = {}
    for sweep in results.sweeps:
        for arm in sweep["arms"]:
            key = (sweep["sweep"], "search", arm, _role(sweep["sweep"], "search", arm, found))
            if sweep["search_trials"] and found.get(key) != 1:  # an arm that searches nothing gets one trial
                out[key] = sweep["search_trials"]
            key = (sweep["sweep"], "measure", arm, _role(sweep["sweep"], "measure", arm, found))
            if sweep["seeds"]:
                out[key] = len(sweep["seeds"]) * settings.get(key, 1)
        for arm, seeds in _ablated_seeds(sweep).items():
            out[sweep["sweep"], "ablate", arm, _role(sweep["sweep"], "ablate", arm, found)] = len(seeds)
    return out


def _ablated_seeds(sweep: dict[str, Any]) -> dict[str, set[int]]:
    """Arm of a cell to the seeds over which the sweep's ablations run it."""
    out: dict[str, set[int]] = {}
    for ablation in sweep["ablations"]:
        for cell in ablation["cells"]:
            out.setdefault(cell["arm"], set()).update(ablation["seeds"])
    return out


def _role(sweep: str, phase: str, arm: str, found: dict[tuple[Any, ...], int]) -> str:
    """Baseline or method, as the arm's runs of this phase say, or else those of another phase."""
    same = [key for key in found if (key[0], key[2]) == (sweep, arm) and key[3] != "control"]
    return min(same, key=lambda key: key[1] != phase)[3] if same else "method"


def _control_plan(results: Results, part: pd.DataFrame) -> int | None:
    name = part["sweep"].iloc[0]
    seeds = next((s["seeds"] for s in results.sweeps if s["sweep"] == name), [])
    count = _settings_per_cell(part)
    return len(seeds) * max(count.values()) if seeds else None


def _settings_per_cell(runs: pd.DataFrame) -> dict[Any, int]:
    """(sweep, phase, arm, role) to the number of different settings and tasks measured in it."""
    seen: dict[Any, set[str]] = {}
    for run in records(runs):
        key = tuple(run[column] for column in CELL)
        seen.setdefault(key, set()).add(labels.canonical([run["task"], run["method"], run["recipe"]]))
    return {key: len(values) for key, values in seen.items()}


def _summary_caption(results: Results) -> str:
    caption = "Every run of the records, none dropped."
    for sweep in results.sweeps:
        for phase, planned in (("measure", sweep["measure_cells"]), ("ablate", sweep["ablate_cells"])):
            runs = where(results.runs, (results.runs["sweep"] == sweep["sweep"]) & (results.runs["phase"] == phase))
            done, what = count(runs["status"] == "finished"), {"measure": "measured", "ablate": "ablation"}[phase]
            if planned:
                caption += f" Of {sweep['sweep'] or 'the sweep'}, {done} of {planned} planned {what} runs finished."
    if not results.sweeps:
        caption += " There is no sweep record, so what was planned is unknown."
    return caption + _code(results.runs)


def _code(runs: pd.DataFrame) -> str:
    """Which commits the runs were made from."""
    pairs = sorted({(run["git_commit"], run["git_dirty"]) for run in records(runs) if run["git_commit"]})
    named = [f"{commit[:10]}{' with uncommitted changes' if dirty else ''}" for commit, dirty in pairs]
    return f" Code: commit {', '.join(named)}." if named else ""


def reasons(runs: pd.DataFrame) -> str:
    """Why runs did not finish, and what there is to remark on those that did; most frequent first."""
    ended = [r for r in records(runs) if r["status"] in ENDS[1:] or (r["status"] == ENDS[0] and r["reason"])]
    said = Counter(f"{run['status']}: {run['reason'] or 'no reason given'}" for run in ended)
    ordered = sorted(said.items(), key=lambda item: (-item[1], item[0]))
    parts = [f"{reason} ({n}×)" if n > 1 else reason for reason, n in ordered[:3]]
    more = sum(n for _, n in ordered[3:])
    return "; ".join(parts) + (f"; {more} more" if more else "")


def search_table(results: Results) -> Table:
    """What the search tried per arm and what it found."""
    runs = where(results.runs, results.runs["phase"] == "search")
    order = {(s["sweep"], arm): i for s in results.sweeps for i, arm in enumerate(s["arms"])}
    rows = []
    arms = sorted(cells(runs, ["sweep", "arm"]), key=lambda c: (c[0][0], order.get(c[0], len(order)), c[0]))
    for (sweep, arm), part in arms:
        values = [labels.settings(m, r) for m, r in zip(part["method"], part["recipe"], strict=True)]
        scored = records(where(part, (part["status"] == "finished") & known(part["val_accuracy"])))
        best = max(scored, key=lambda run: run["val_accuracy"], default=None)
        rows.append(
            {
                "sweep": sweep,
                "arm": arm,
                "trials": len(part),
                "best": None if best is None else best["val_accuracy"],
            }
            | {end: count(part["status"] == end) for end in ENDS}
            | {"setting": None if best is None else _best_setting(best, labels.varying(values))}
            | {"seconds": float(np.nansum(part["train_seconds"]))}
        )
    columns = (
        Column("sweep", "sweep"),
        Column("arm", "arm"),
        Column("trials", "trials", "count"),
        *(Column(end, end, "count") for end in ENDS),
        Column("best", "best validation accuracy", "percent"),
        Column("setting", "best setting"),
        Column("seconds", "search time, not comparable", "seconds"),
    )
    caption = (
        "Finished trials ranked by their final validation accuracy. Trials may share a device and stop "
        "early, so their seconds add up to a cost but compare nothing."
    )
    trials = {row["trials"] for row in rows}
    if len(trials) > 1:
        caption += f" The trial counts differ ({min(trials)} to {max(trials)}): the arms were not tuned equally."
    return Table("search", "What the search found", caption, columns, rows)


def _best_setting(run: dict[str, Any], show: list[str]) -> str:
    return labels.label(labels.family(run["method"]), labels.settings(run["method"], run["recipe"]), show)
