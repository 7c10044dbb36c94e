"""The output folder of a sweep: one process at a time, one sweep for ever; what it holds and who may write there."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from fastbp.record import RecordWriter, read_records
from sweeps.ledger import Ledger
from sweeps.plan import Plan
from sweeps.source import SweepError, SweepStopped
from sweeps.stopping import Stop

RECORDS = "records.jsonl"
SEARCH_LOG = "search.jsonl"


@contextlib.contextmanager
def locked(out: Path) -> Iterator[bool]:
    """Hold the output folder; yields False where another process holds it.

    Raises:
        SweepError: the folder cannot be written, or its file system has no locks.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / ".lock").open("w")
    except OSError as error:
        raise SweepError(f"{out}: cannot be written ({error.strerror}); give another folder with --out") from error
    with lock as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError as error:
            raise SweepError(
                f"{out}: its file system cannot lock files ({error.strerror}), which keeps two sweeps out of one "
                "folder; give another folder with --out, or mount it with locks (Lustre: -o flock)"
            ) from error
        yield True


def load_ledger(path: Path) -> Ledger:
    """What a records file holds.

    Raises:
        SweepError: a line is not a record.
    """
    try:
        return Ledger.of(read_records(path) if path.exists() else ())
    except ValueError as error:
        raise SweepError(f"{error}; move the file away, or mend that line") from error


def open_ledger(plan: Plan, out: Path) -> tuple[Ledger, RecordWriter]:
    """What the output folder already holds, after checking that it is of this very sweep.

    Raises:
        SweepError: the folder holds another sweep.
    """
    path = out / RECORDS
    writer = RecordWriter(path)
    ledger = load_ledger(path)
    if ledger.sweep is not None and ledger.sweep.file_hash != plan.sweep.hash:
        raise SweepError(
            f"{out} holds sweep {ledger.sweep.sweep!r} as it was before the file or fastbp's settings changed; "
            f"give the changed sweep another `name`, or another folder with --out"
        )
    return ledger, writer


def keep_copy(file: Path, copy: Path) -> None:
    """Copy the sweep file into the output folder, whole or not at all.

    Raises:
        SweepStopped: the disk is full.
    """
    text = file.read_bytes()
    if copy.exists() and copy.read_bytes() == text:
        return
    draft = copy.with_suffix(".tmp")
    try:
        draft.write_bytes(text)
        os.replace(draft, copy)
    except OSError as error:
        raise SweepStopped(Stop().why(error) or f"{copy}: cannot be written ({error.strerror})") from error
