"""What changed between two sweeps: accuracy, time, settings, hardware and software, of the arms that both measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis import labels
from analysis.changes import difference_table
from analysis.columns import TIMED
from analysis.contaminated import contaminated
from analysis.errors import ReportError
from analysis.frames import count, records, where
from analysis.load import Results, load
from analysis.matching import Place, matched, places
from analysis.report import write_file
from analysis.table import Column, Table, finite, markdown, plain_rows, to_markdown

SHOWN_VALUES = 3


@dataclass(frozen=True)
class Diff:
    """Names and number of runs of both sides, one sentence for each thing to know, and the tables with rows."""

    names: tuple[str, str]
    runs: tuple[int, int]
    notes: list[str]
    tables: list[Table]


def diff(first: str, second: str, *, allow_mixed: bool = False, tracking_uri: str | None = None) -> Diff:
    """Compare what two sources measured; differences are the second's minus or over the first's.

    Args:
        allow_mixed: compare times although hardware or software differ.

    Raises:
        ReportError: a source cannot be read.
    """
    a, b = (load([source], tracking_uri=tracking_uri) for source in (first, second))
    pairs, only = matched(places(a), places(b))
    made = [difference_table(pairs, allow_mixed=allow_mixed), _only_table(only), _settings_table(pairs, a, b)]
    made += [_environment_table(a, b), _count_table(a, b)]
    unlike = [p for p in pairs if p[0].group.hardware != p[1].group.hardware]
    notes = [f"{side}: {problem}" for side, results in (("A", a), ("B", b)) for problem in results.problems]
    notes += [note for side, results in (("A", a), ("B", b)) if (note := _contaminated_note(side, results))]
    if unlike and not allow_mixed:
        notes.append(
            f"The times of {len(unlike)} of {len(pairs)} arms are left out, as hardware or software differ; "
            "--allow-mixed compares them all the same."
        )
    if not pairs:
        notes.append("No arm was measured in both.")
    return Diff((first, second), (len(a.runs), len(b.runs)), notes, [table for table in made if table.rows])


def _contaminated_note(side: str, results: Results) -> str:
    runs, k = results.runs, len(contaminated(results.runs))
    n = count(runs["phase"].isin(TIMED) & (runs["status"] == "finished"))
    return f"{side}: {k} of {n} finished measured runs were contaminated and are left out." if k else ""


def _only_table(only: Sequence[tuple[str, Place]]) -> Table:
    rows = [
        {"side": side, "task": p.title, "part": p.part, "arm": p.arm.name, "role": p.arm.role}
        | {"setting": p.arm.setting, "n": p.arm.n}
        for side, p in only
    ]
    columns = (
        Column("side", "in"),
        Column("task", "task"),
        Column("part", "part", shown=any(p.part != "measure" for _, p in only)),
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
    measured = where(results.runs, results.runs["phase"].isin(TIMED))
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
    for phase, status in sorted(cells, key=lambda cell: (cell[0] in TIMED, *cell)):
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
    data["notes"] = made.notes
    for table in made.tables:
        data[table.name] = [{key: finite(value) for key, value in row.items()} for row in plain_rows(table)]
    return json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
