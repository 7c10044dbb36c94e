"""Many records files as one, every run, epoch and sweep once."""

from __future__ import annotations

import gzip
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis.checks import checked_sweep
from analysis.errors import ReportError
from analysis.labels import canonical
from analysis.load import Epochs, Runs, Telling, is_last
from analysis.sources import File, batches, found_files, printable


@dataclass(frozen=True)
class Merged:
    """What was written: lines by kind, lines that were read, and what could be read around."""

    kept: Counter[str]
    read: int
    problems: list[str]


def merge(sources: Iterable[str | Path], out: Path, *, tracking_uri: str | None = None) -> Merged:
    """Write the records of all sources into one file, gzipped if its name ends in `.gz`.

    Of every attempt of a run one line of its start, one of its end and one of every epoch are kept, those that
    `load` would let hold, as they stand; so loading the file gives what loading the sources gives. The same
    sources give the same bytes, in whatever order.

    Raises:
        ReportError: the sources cannot be read or have no records, or the file cannot be written.
    """
    problems: list[str] = []
    with found_files(sources, tracking_uri, problems) as files:
        kept, read, conflicts = _kept_lines(files, problems)
        if not read:
            raise ReportError("there is no record in the sources, so there is nothing to merge")
        counts = Counter[str]()
        try:
            _write(out, _lines(files, kept, counts))
        except OSError as error:
            raise ReportError(f"{out}: cannot be written ({error.strerror})") from error
    return Merged(counts, read, sorted({*problems, *conflicts}))


def _kept_lines(files: list[File], problems: list[str]) -> tuple[list[NDArray[np.bool_]], int, list[str]]:
    """Per file a mask by line number of what to keep; how many lines there are; where files differ."""
    runs, epochs, unknown, read = Runs(key=_state), Epochs(), Counter[str](), 0
    sweeps: dict[str, tuple[int, int]] = {}
    lengths = [0] * len(files)
    for number, file in enumerate(files):
        for batch in batches(file, problems):
            runs.add(batch, number, unknown)
            epochs.add(batch, number, unknown)
            for i in batch.kinds["sweep"]:
                checked_sweep(batch, i)
                sweeps[canonical(batch.records[i])] = (number, batch.numbers[i])
            read += len(batch.records)
            lengths[number] = batch.numbers[-1] + 1
        runs.end_file()
    kept = [np.zeros(length, dtype=bool) for length in lengths]
    for file, line in (*sweeps.values(), *((t.file, t.line) for t in runs.held.values())):
        kept[file][line] = True
    for file, lines in _epoch_lines(epochs, runs.held):
        kept[file][lines] = True
    return kept, read, list(runs.conflicts([file.name for file in files]))


def _state(row: dict[str, Any]) -> tuple[str, int, bool]:
    """What there is one line of: start or end of an attempt of a run."""
    return row["run_key"], row["attempt"], row["status"] != "running"


def _epoch_lines(epochs: Epochs, held: dict[Any, Telling]) -> Iterator[tuple[int, NDArray[Any]]]:
    """Per file the lines of the epochs to keep: of one told twice that of the file which tells the attempt's end."""
    found = epochs.columns()
    if not found:
        return
    own = {}
    for (key, attempt, _), telling in sorted(held.items()):  # an end after its start
        own[key, attempt] = telling.file
    keys = [printable(key) for key in epochs.codes]
    pairs, which = np.unique(np.stack([found["code"], found["attempt"]]), axis=1, return_inverse=True)
    files = np.array([own.get((keys[code], attempt), -1) for code, attempt in pairs.T.tolist()])
    order = np.lexsort((found["file"] == files[which], found["epoch"], which))
    which, epoch = which[order], found["epoch"][order]
    order = order[is_last(which, epoch)]
    for file in np.unique(found["file"][order]).tolist():
        yield file, found["line"][order][found["file"][order] == file]


def _lines(files: list[File], kept: list[NDArray[np.bool_]], counts: Counter[str]) -> Iterator[bytes]:
    for file, mask in zip(files, kept, strict=True):
        for batch in batches(file, []):
            for i in np.flatnonzero(mask[np.array(batch.numbers)]):
                counts[batch.records[i]["kind"]] += 1
                yield batch.lines[i].strip() + b"\n"


def _write(out: Path, lines: Iterable[bytes]) -> None:
    """Write in one step, without a date in the compressed file."""
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f"{out.name}.tmp")
    with part.open("wb") as raw:
        if out.suffix == ".gz":
            with gzip.GzipFile("", "wb", compresslevel=6, fileobj=raw, mtime=0) as packed:
                packed.writelines(lines)
        else:
            raw.writelines(lines)
        raw.flush()
        os.fsync(raw.fileno())
    os.replace(part, out)
