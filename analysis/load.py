"""From records to two frames: one row per run, one row per epoch of the attempt that holds."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis import columns
from analysis.errors import ReportError


@dataclass(frozen=True)
class Results:
    """Everything that was read.

    Attributes:
        runs: one row per run_key, the last line of its last attempt; columns as in `analysis.columns`.
        epochs: one row per (run_key, epoch) of that attempt, sorted; `train_seconds` is cumulative.
        sweeps: the last sweep record of every sweep name.
        problems: what was wrong with the input but could be read around, one sentence each.
    """

    runs: pd.DataFrame
    epochs: pd.DataFrame
    sweeps: list[dict[str, Any]]
    problems: list[str]


@dataclass
class _Lines:
    """Record lines by kind; `where` names file and line of each, parallel to the lists."""

    runs: list[dict[str, Any]] = field(default_factory=list)
    runs_where: list[str] = field(default_factory=list)
    epochs: list[dict[str, Any]] = field(default_factory=list)
    epochs_where: list[tuple[str, int]] = field(default_factory=list)
    sweeps: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def load(sources: Iterable[str | Path]) -> Results:
    """Read records from folders (recursively, `records*.jsonl`), files, or `mlflow:EXPERIMENT`.

    Raises:
        ReportError: a source does not exist or has no runs, or a line is not a record of this schema.
    """
    lines = _Lines()
    seen: set[Path] = set()
    for source in sources:
        for path, name in _files(source, lines.problems):
            if path.resolve() not in seen:
                seen.add(path.resolve())
                _read_file(path, name, lines)
    if not lines.runs:
        names = ", ".join(str(s) for s in sources)
        raise ReportError(f"{names}: there is no run in the records, so there is nothing to report")
    return _results(lines)


def _files(source: str | Path, problems: list[str]) -> Iterator[tuple[Path, str]]:
    """Files of a source and the short name each has in messages."""
    if str(source).startswith("mlflow:"):
        from analysis.mlflow_source import downloaded_records

        yield from downloaded_records(str(source).removeprefix("mlflow:"), problems)
        return
    path = Path(source)
    if path.is_file():
        yield path, path.name
    elif path.is_dir():
        found = sorted(path.rglob("records*.jsonl"))
        if not found:
            raise ReportError(f"{source}: the folder has no file records*.jsonl; give the folder that a sweep wrote")
        for file in found:
            yield file, file.relative_to(path).as_posix()
    else:
        raise ReportError(f"{source}: no such file or folder (a tracked experiment is given as mlflow:NAME)")


def _read_file(path: Path, name: str, lines: _Lines) -> None:
    """Append the records of a file; a last line without newline that is not JSON was cut short by a crash."""
    try:
        parts = path.read_bytes().split(b"\n")
    except OSError as error:
        raise ReportError(f"{path}: cannot be read ({error.strerror})") from error
    for number, part in enumerate(parts, 1):
        if not part.strip():
            continue
        try:
            data = json.loads(part)
        except (ValueError, RecursionError) as error:
            if number == len(parts):
                lines.problems.append(f"{name}:{number}: the last line was cut short and is left out")
                return
            raise ReportError(f"{path}:{number}: not a line of JSON; repair or remove the line") from error
        _add(data, f"{path}:{number}", name, number, lines)


def _add(data: Any, where: str, name: str, number: int, lines: _Lines) -> None:
    kind = data.get("kind") if isinstance(data, dict) else None
    if kind not in columns.READ:
        raise ReportError(f"{where}: record of kind {kind!r}; expected run, epoch or sweep")
    version = data.get("schema_version")
    if version != columns.SCHEMA_VERSION:
        raise ReportError(
            f"{where}: schema_version is {version!r}, but this version of fastbp-report reads "
            f"{columns.SCHEMA_VERSION}; install the version that wrote the records"
        )
    kept = {column: data.get(column) for column in columns.READ[kind]}
    if kind == "run":
        lines.runs.append(kept)
        lines.runs_where.append(where)
    elif kind == "epoch":
        lines.epochs.append(kept)
        lines.epochs_where.append((where.rpartition(":")[0], number))
    else:
        lines.sweeps.append(_checked_sweep(kept, where))


def _checked_sweep(sweep: dict[str, Any], where: str) -> dict[str, Any]:
    """A sweep record with its lists checked."""
    for column, kind in (("arms", str), ("seeds", int), ("targets", int | float)):
        values = sweep[column] or []
        if not isinstance(values, list) or not all(isinstance(v, kind) and not isinstance(v, bool) for v in values):
            raise ReportError(
                f"{where}: {column} is {values!r}, expected a list of {getattr(kind, '__name__', 'numbers')}"
            )
        sweep[column] = values
    for column in ("search_trials", "measure_cells"):
        if not isinstance(sweep[column] or 0, int):
            raise ReportError(f"{where}: {column} is {sweep[column]!r}, expected a whole number")
        sweep[column] = sweep[column] or 0
    sweep["sweep"], sweep["started_at"] = str(sweep["sweep"] or ""), str(sweep["started_at"] or "")
    return sweep


def _results(lines: _Lines) -> Results:
    runs = pd.DataFrame(lines.runs, columns=list(columns.READ["run"]))
    problems = [*lines.problems]
    _check_runs(runs, lines.runs_where, problems)
    runs = _holding(runs)

    epochs = pd.DataFrame(lines.epochs, columns=list(columns.READ["epoch"]))

    def where_epoch(i: int) -> str:
        return "{}:{}".format(*lines.epochs_where[i])

    _numbers(epochs, columns.EPOCH_NUMBERS, where_epoch, problems)
    epochs = epochs.merge(runs[["run_key", "attempt"]], on=["run_key", "attempt"], how="inner")
    epochs = epochs.drop_duplicates(["run_key", "epoch"], keep="last")
    epochs = epochs.sort_values(["run_key", "epoch"], ignore_index=True)

    sweeps = {s["sweep"]: s for s in sorted(lines.sweeps, key=lambda s: s["started_at"])}
    return Results(runs, epochs, [sweeps[name] for name in sorted(sweeps)], problems)


def _holding(runs: pd.DataFrame) -> pd.DataFrame:
    """The row of each run_key that holds: of its highest attempt an end if there is one, the last line."""
    ended = runs["status"] != "running"
    order = runs.assign(_ended=ended, _line=np.arange(len(runs)))
    order = order.sort_values(["run_key", "attempt", "_ended", "_line"]).drop_duplicates("run_key", keep="last")
    order = order.sort_values(["sweep", "phase", "arm", "role", "seed", "run_key"], ignore_index=True)
    return order.drop(columns=["_ended", "_line"])


def _check_runs(runs: pd.DataFrame, where: list[str], problems: list[str]) -> None:
    """Check and convert all columns in place."""
    _numbers(runs, columns.RUN_NUMBERS, where.__getitem__, problems)
    for column in columns.RUN_TEXTS:
        runs[column] = [_typed(v, str, "", column, at) for v, at in zip(runs[column], where, strict=True)]
    for column in columns.RUN_FLAGS:
        runs[column] = [_typed(v, bool, False, column, at) for v, at in zip(runs[column], where, strict=True)]
    for column in columns.RUN_MAPPINGS:
        values = [_typed(v, dict, {}, column, at) for v, at in zip(runs[column], where, strict=True)]
        runs[column] = pd.Series(values, index=runs.index, dtype=object)
    allowed = {"status": columns.STATUSES, "phase": columns.PHASES, "role": columns.ROLES}
    for column, values in allowed.items():
        for value, at in zip(runs[column], where, strict=True):
            if value not in values:
                raise ReportError(f"{at}: {column} is {value!r}, expected one of {', '.join(values)}")
    for key, at in zip(runs["run_key"], where, strict=True):
        if not key:
            raise ReportError(f"{at}: run_key is empty; every run needs its key")


def _typed(value: Any, kind: type, default: Any, column: str, where: str) -> Any:
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return default
    if not isinstance(value, kind):
        raise ReportError(f"{where}: {column} is {value!r}, expected {kind.__name__}")
    return value


def _plain(number: float) -> str:
    return "null" if np.isnan(number) else f"{number:g}"


def _numbers(frame: pd.DataFrame, names: Iterable[str], where: Any, problems: list[str]) -> None:
    """Convert columns to float64 in place, null to NaN; infinities become NaN and are reported."""
    for name in names:
        values = frame[name]
        if values.dtype == object or not pd.api.types.is_numeric_dtype(values) or values.dtype == bool:
            for i, value in enumerate(values):
                if isinstance(value, bool) or not (value is None or isinstance(value, int | float)):
                    raise ReportError(f"{where(i)}: {name} is {value!r}, expected a number or null")
        array = values.astype("float64").to_numpy(copy=True)
        infinite = np.isinf(array)
        if infinite.any():
            problems.append(f"{name} is infinite in {infinite.sum()} records and is read as unknown")
            array[infinite] = np.nan
        if name in columns.ACCURACIES and ((array < 0) | (array > 1)).any():
            i = int(np.flatnonzero((array < 0) | (array > 1))[0])
            raise ReportError(f"{where(i)}: {name} is {array[i]:g}, expected a fraction in [0, 1]")
        if name.endswith("_seconds") and (array < 0).any():
            i = int(np.flatnonzero(array < 0)[0])
            raise ReportError(f"{where(i)}: {name} is {array[i]:g}, expected a time of at least 0")
        if name in columns.WHOLE:
            odd = np.flatnonzero(~(np.isfinite(array) & (array == np.floor(array))))
            if odd.size:
                raise ReportError(
                    f"{where(int(odd[0]))}: {name} is {_plain(float(array[odd[0]]))}, expected a whole number"
                )
        frame[name] = array.astype("int64") if name in columns.WHOLE else array
