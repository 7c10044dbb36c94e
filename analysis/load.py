"""From records to two frames: one row per run, one row per epoch of the attempt that holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis import columns
from analysis.checks import checked_numbers, checked_run, checked_sweep
from analysis.errors import ReportError
from analysis.labels import canonical
from analysis.links import Origin, run_url
from analysis.sources import Batch, File, batches, found_files, printable


@dataclass(frozen=True, eq=False)
class Results:
    """Everything that was read.

    Attributes:
        runs: one row per run_key, the last line of its last attempt; columns as in `analysis.columns`.
        epochs: one row per (run_key, epoch) of that attempt, sorted; `train_seconds` is cumulative; `run_key` is
            categorical.
        sweeps: the last sweep record of every sweep name.
        problems: what was wrong with the input but could be read around, one sentence each.
        origins: run_key of every run outside the search to where it can be looked up.
    """

    runs: pd.DataFrame
    epochs: pd.DataFrame
    sweeps: list[dict[str, Any]]
    problems: list[str]
    origins: dict[str, Origin] = field(default_factory=dict)


def load(sources: Iterable[str | Path], *, tracking_uri: str | None = None) -> Results:
    """Read records from folders, files (`.jsonl`, also gzipped) and `mlflow:EXPERIMENT`, in any number and order.

    A run that several files tell, as copies do, is one run: its highest attempt holds, and of that an end, the
    one that ended last.

    Args:
        tracking_uri: of the experiments; default MLFLOW_TRACKING_URI, else the sqlite store of the current folder.

    Raises:
        ReportError: a source does not exist or has no runs, or a line is not a record of this schema.
    """
    sources = list(sources)
    problems: list[str] = []
    runs, epochs, sweeps, unknown = Runs(), Epochs(), Sweeps(), Counter[str]()
    with found_files(sources, tracking_uri, problems) as files:
        for number, file in enumerate(files):
            for batch in batches(file, problems):
                runs.add(batch, number, unknown)
                epochs.add(batch, number, unknown)
                sweeps.add(batch)
            runs.end_file()
        problems += runs.conflicts([file.name for file in files])
        origins = _origins(runs.held, files, problems)
    if not runs.held:
        names = ", ".join(str(s) for s in sources)
        raise ReportError(f"{names}: there is no run in the records, so there is nothing to report")
    problems += [
        f"{name} is infinite or absurdly large in {count} records and is read as unknown"
        for name, count in unknown.items()
    ]
    frame, orphans = epochs.frame(runs.held)
    if orphans:
        problems.append(f"{orphans} epochs belong to no run in the records and are left out")
    return Results(runs.frame(), frame, sweeps.last(), sorted(set(problems)), origins)


def _origins(held: dict[str, Telling], files: list[File], problems: list[str]) -> dict[str, Origin]:
    """Of every run outside the search its file, and what MLflow calls it where the file came from there."""
    measured = {key: files[at.file].name for key, at in held.items() if at.values["phase"] != "search"}
    origins = {key: Origin(key, name) for key, name in measured.items()}
    for uri, experiment in sorted({file.tracked for file in files if file.tracked}) if measured else ():
        from analysis.mlflow_source import measured_run_ids

        for key, run_id in measured_run_ids(uri, experiment, problems).items():
            if key in origins:
                origins[key] = Origin(key, measured[key], run_id, run_url(uri, experiment, run_id))
    return origins


@dataclass
class Telling:
    """What one file says of one run: the line that holds there.

    Attributes:
        rank: (whether it is a result, attempt, whether it ended); the highest holds. A result that was to be measured
            again stands until there is another.
        file: number of the file.
        line: number of the line in it.
    """

    values: dict[str, Any]
    rank: tuple[bool, int, bool]
    file: int
    line: int

    @property
    def among_files(self) -> tuple[Any, ...]:
        """What decides between files; the values themselves, so that no order of files does."""
        return (*self.rank, self.values["ended_at"], canonical(self.values))


@dataclass
class Runs:
    """The line that holds of each run, as files are read one after another.

    Attributes:
        key: what a line is about, of which one line is held.
        held: by that key.
    """

    key: Callable[[dict[str, Any]], Any] = itemgetter("run_key")
    held: dict[Any, Telling] = field(default_factory=dict)
    _in_file: dict[Any, Telling] = field(default_factory=dict)
    _differing: dict[str, tuple[int, int]] = field(default_factory=dict)

    def add(self, batch: Batch, file: int, unknown: Counter[str]) -> None:
        found = batch.kinds["run"]
        rows = [checked_run(batch, i) for i in found]
        for name in columns.RUN_NUMBERS:
            values = checked_numbers(name, [row[name] for row in rows], lambda i: batch.where(found[i]), unknown)
            for row, value in zip(rows, values.tolist(), strict=True):
                row[name] = value
        for i, row in zip(found, rows, strict=True):
            status = row["status"]
            rank = status in columns.RESULTS, row["attempt"], status != "running"
            new = Telling(row, rank, file, batch.numbers[i])
            key = self.key(row)
            known = self._in_file.get(key)
            if known is None or new.rank >= known.rank:
                self._in_file[key] = new

    def end_file(self) -> None:
        """Let what the file says compete with what earlier files said."""
        for key, new in self._in_file.items():
            known = self.held.get(key)
            if known is None or new.rank > known.rank:
                self.held[key] = new
            elif new.rank == known.rank:
                order = known.among_files, new.among_files
                if order[0] != order[1] and new.rank[2]:
                    self._differing[new.values["run_key"]] = (known.file, new.file)
                if order[1] > order[0]:
                    self.held[key] = new
        self._in_file = {}

    def conflicts(self, names: list[str]) -> Iterator[str]:
        """Ends of one attempt that differ between files, in one sentence."""
        if self._differing:
            key, pair = min(self._differing.items())
            first, second = (names[file] for file in pair)
            yield (
                f"{len(self._differing)} runs end differently in several files (such as {key} in {first} and "
                f"{second}); the end that came last is used"
            )

    def frame(self) -> pd.DataFrame:
        """One row per run, sorted by what a reader looks for."""
        rows = [telling.values for telling in self.held.values()]
        frame = pd.DataFrame({name: [row[name] for row in rows] for name in columns.READ["run"] if name in rows[0]})
        for name in columns.RUN_NUMBERS:
            frame[name] = frame[name].astype("int64" if name in columns.WHOLE else "float64")
        for name in columns.RUN_TEXTS:
            frame[name] = frame[name].astype("str")
        frame["exclusive"] &= ~frame["reason"].str.startswith(columns.SHARED)  # once only the remark said so
        for name in columns.RUN_MAPPINGS:
            frame[name] = pd.Series(_shared([row[name] for row in rows]), index=frame.index, dtype=object)
        order = ["sweep", "phase", "arm", "role", "seed", "run_key"]
        return frame.sort_values(order, ignore_index=True)


def _shared(values: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same values, equal ones as one object: thousands of runs share a task, a device, a recipe."""
    seen: dict[str, dict[str, Any]] = {}
    return [seen.setdefault(canonical(value), value) for value in values]


@dataclass
class Epochs:
    """Columns of all epochs that were read, in pieces; `codes` number the run keys in order of appearance."""

    codes: dict[str, int] = field(default_factory=dict)
    _pieces: dict[str, list[NDArray[Any]]] = field(default_factory=dict)

    def add(self, batch: Batch, file: int, unknown: Counter[str]) -> None:
        found = batch.kinds["epoch"]
        if not found:
            return
        records = batch.records if len(found) == len(batch.records) else [batch.records[i] for i in found]
        keys = [record.get("run_key") for record in records]
        for key in set(map(type, keys)) - {str}:
            i = next(i for i, value in enumerate(keys) if type(value) is key)
            raise ReportError(f"{batch.where(found[i])}: run_key is {keys[i]!r:.80}, expected str")
        codes = self.codes
        piece: dict[str, NDArray[Any]] = {
            "code": np.array([codes.setdefault(str(key), len(codes)) for key in keys], dtype="int32"),
            "file": np.full(len(found), file, dtype="int32"),
            "line": np.array(batch.numbers, dtype="int32")[found],
        }
        for name in columns.EPOCH_NUMBERS:
            values = [record.get(name) for record in records]
            piece[name] = checked_numbers(name, values, lambda i: batch.where(found[i]), unknown)
        for name, array in piece.items():
            self._pieces.setdefault(name, []).append(array)

    def columns(self) -> dict[str, NDArray[Any]]:
        """`code`, `file`, `line` and the numbers of all epochs in the order read; hands them over."""
        return {name: np.concatenate(self._pieces.pop(name)) for name in list(self._pieces)}

    def frame(self, held: dict[str, Telling]) -> tuple[pd.DataFrame, int]:
        """Epochs of the attempts that hold, sorted by run and epoch, and how many epochs belong to no run.

        Of an epoch that is told twice, the file of the run's own line holds, in it the last line.
        """
        keys = sorted(held)
        place = {key: i for i, key in enumerate(keys)}
        found = self.columns()
        if not found:
            empty = {name: [] for name in columns.EPOCH_NUMBERS}
            return _epoch_frame(empty, np.empty(0, dtype="int32"), keys), 0
        found.pop("line")
        place_of_code = np.array([place.get(printable(key), -1) for key in self.codes], dtype="int32")
        run = place_of_code[found.pop("code")]
        orphans = int(np.count_nonzero(run < 0))
        attempt = np.array([held[key].rank[1] for key in keys], dtype="int64")
        mine = (run >= 0) & (found["attempt"] == attempt[run])
        own_file = np.array([held[key].file for key in keys], dtype="int32")
        run, found = run[mine], {name: values[mine] for name, values in found.items()}
        order = np.lexsort((found.pop("file") == own_file[run], found["epoch"], run))
        run, epoch = run[order], found["epoch"][order]
        last = is_last(run, epoch)
        order = order[last]
        return _epoch_frame({name: values[order] for name, values in found.items()}, run[last], keys), orphans


def is_last(*columns: NDArray[Any]) -> NDArray[np.bool_]:
    """(n,) which rows of sorted columns are followed by a different one."""
    last = np.ones(len(columns[0]), dtype=bool)
    last[:-1] = np.logical_or.reduce([column[1:] != column[:-1] for column in columns])
    return last


def _epoch_frame(values: dict[str, Any], run: NDArray[np.int32], keys: list[str]) -> pd.DataFrame:
    frame = pd.DataFrame({name: values[name] for name in columns.EPOCH_NUMBERS})
    for name in columns.EPOCH_NUMBERS:
        frame[name] = frame[name].astype("int64" if name in columns.WHOLE else "float64")
    frame["run_key"] = pd.Categorical.from_codes(run, categories=pd.Index(keys, dtype="str"))
    return frame


@dataclass
class Sweeps:
    """Sweep records in the order in which they were read."""

    found: list[dict[str, Any]] = field(default_factory=list)

    def add(self, batch: Batch) -> None:
        self.found += [checked_sweep(batch, i) for i in batch.kinds["sweep"]]

    def last(self) -> list[dict[str, Any]]:
        """Of every name the one that started last; of those the one read last."""
        by_name = {sweep["sweep"]: sweep for sweep in sorted(self.found, key=lambda s: s["started_at"])}
        return [by_name[name] for name in sorted(by_name)]
