"""Records: one JSON line per epoch and per run state, the interface between everything that trains and `analysis`.

A records file is append-only and holds three kinds of line, told apart by `kind`:

* `sweep`  what was planned: written once by a sweep before anything starts;
* `run`    one training run: a line with status `running` when it starts, another with its end; the last line of a
           (run_key, attempt) holds;
* `epoch`  the state of a run after an epoch; all counters are cumulative from the run's start.

Units are in the names. Unknown is null, never 0. Accuracies are fractions in [0, 1].
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

SCHEMA_VERSION = 1
DISK_FULL = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}

Phase = Literal["search", "measure", "ablate", "single"]
Role = Literal["baseline", "method", "control"]
Status = Literal["running", "finished", "stopped", "failed", "diverged"]


@dataclass
class Seconds:
    """Wall-clock seconds of one run by segment, device-synchronised at the edges, cumulative from the run's start."""

    train_seconds: float = 0.0  # training steps only: batch assembly, forward, backward, optimizer
    setup_seconds: float = 0.0  # data, model, bind, fingerprint
    warmup_seconds: float = 0.0  # steps on dummy data, on a copy, before the first epoch; FLOP counting
    compile_seconds: float | None = None  # compilation; null where nothing is compiled
    eval_seconds: float = 0.0  # validation and test
    checkpoint_seconds: float = 0.0  # saving and loading state
    report_blocked_seconds: float = 0.0  # waiting for whoever receives the epoch's record


@dataclass
class EpochRecord(Seconds):
    """The state of a run after one epoch; counters are cumulative."""

    kind: str = "epoch"
    schema_version: int = SCHEMA_VERSION
    run_key: str = ""
    attempt: int = 0  # 0 for the first try; a run resumed or retried counts up
    epoch: int = 0  # 0-based
    examples: int = 0  # training examples seen
    steps: int = 0  # optimizer steps taken
    batch_size: int = 0  # in this epoch
    lr: float = 0.0  # in this epoch, first parameter group, method's plan included
    train_loss: float | None = None  # mean over the epoch's examples
    val_loss: float | None = None
    val_accuracy: float | None = None  # null where this epoch was not evaluated
    test_accuracy: float | None = None  # only in the last epoch
    peak_memory_bytes: int | None = None  # device allocator's peak while training; null on CPU
    flops_executed: float | None = None  # counted on a copy, forward and backward; null where the counter is blind
    energy_joules: float | None = None  # device energy of the train segments; null where unknown
    metrics: dict[str, float] = field(default_factory=dict)  # the method's own numbers


@dataclass
class RunRecord(Seconds):
    """One run: its whole configuration, its end, and where it was made."""

    kind: str = "run"
    schema_version: int = SCHEMA_VERSION
    run_key: str = ""
    attempt: int = 0
    sweep: str = ""
    phase: Phase = "single"
    arm: str = ""  # the arm's name in the sweep file; of an ablation's cell such as both/without-ldb
    role: Role = "method"  # baseline: plain backprop anchor; control: the method at its exact setting
    block: int | None = None  # measure and ablate: the randomised block this run was timed in
    task: dict[str, Any] = field(default_factory=dict)  # data, model and their arguments
    recipe: dict[str, Any] = field(default_factory=dict)
    method: dict[str, Any] = field(default_factory=dict)  # Method.to_dict()
    seed: int = 0
    status: Status = "running"
    reason: str = ""  # one sentence for stopped, failed and diverged; else a remark, as why it was not exclusive
    epochs_done: int = 0
    examples: int = 0
    steps: int = 0
    parameters: int | None = None  # trainable parameters of the plain model
    train_loss: float | None = None  # of the last epoch
    val_loss: float | None = None
    val_accuracy: float | None = None  # of the last epoch
    best_val_accuracy: float | None = None  # highest over the evaluated epochs
    test_accuracy: float | None = None  # of the last epoch
    peak_memory_bytes: int | None = None
    flops_executed: float | None = None
    energy_joules: float | None = None
    exclusive: bool = False  # alone on its device: only then may the seconds be compared
    resumed: bool = False  # continued from a checkpoint: seconds are never drawn
    workers: int = 1  # devices that trained it side by side; on the CPU: times the threads that the run was given
    device: dict[str, Any] = field(default_factory=dict)  # type, name, threads; cores or uuid and memory_bytes; node
    software: dict[str, Any] = field(default_factory=dict)  # python, torch, cuda, fastbp, precision flags
    git_commit: str | None = None
    git_dirty: bool | None = None
    started_at: str = ""  # UTC, ISO 8601
    ended_at: str = ""


@dataclass
class SweepRecord:
    """What a sweep planned, so that a reader can count what is missing."""

    kind: str = "sweep"
    schema_version: int = SCHEMA_VERSION
    sweep: str = ""
    file_hash: str = ""  # of the validated sweep
    arms: list[str] = field(default_factory=list)  # in the order of the file
    search_trials: int = 0  # per arm
    search_runs: dict[str, int] = field(default_factory=dict)  # by arm; a small space has fewer settings than trials
    seeds: list[int] = field(default_factory=list)  # of the measure part
    measure_cells: int = 0  # planned measure runs, controls included
    ablate_cells: int = 0  # planned ablation runs; those that several ablations share count once
    ablations: list[dict[str, Any]] = field(default_factory=list)  # arm, design, baseline, factors, seeds, note, cells
    targets: list[float] = field(default_factory=list)  # validation accuracies, fixed before measuring
    config: dict[str, Any] = field(default_factory=dict)  # the validated sweep file
    started_at: str = ""


Record = EpochRecord | RunRecord | SweepRecord
KINDS: dict[str, type[EpochRecord] | type[RunRecord] | type[SweepRecord]] = {
    "epoch": EpochRecord,
    "run": RunRecord,
    "sweep": SweepRecord,
}


def utc_now(precision: str = "seconds") -> str:
    """The time as records hold it: UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec=precision)


def to_line(record: Record) -> str:
    """One line of JSON, newline included; not-a-number and infinities become null."""
    return json.dumps(_finite(dataclasses.asdict(record)), sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def from_dict(data: dict[str, Any]) -> Record:
    """A record from a parsed line.

    Raises:
        ValueError: unknown kind, newer schema, or an unknown column.
    """
    kind = KINDS.get(data.get("kind", ""))
    if kind is None:
        raise ValueError(f"record of unknown kind {data.get('kind')!r}; expected one of {', '.join(KINDS)}")
    version = data.get("schema_version")
    if version != SCHEMA_VERSION:
        raise ValueError(f"record has schema_version {version!r}, this version of fastbp reads {SCHEMA_VERSION}")
    known = {f.name for f in dataclasses.fields(kind)}
    unknown = sorted(set(data) - known)
    if unknown:
        raise ValueError(f"{data['kind']} record has unknown columns {', '.join(unknown)}")
    return kind(**data)


class RecordError(OSError):
    """Records that could not be written; the text says where and why."""


class RecordWriter:
    """Appends records to a file; every line is on disk before `write` returns."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _mend_tail(self.path)

    def write(self, *records: Record) -> None:
        """Append, all or nothing.

        Raises:
            RecordError: the disk is full, a quota or size limit is reached, or the disk fails; the file is as before.
        """
        lines = "".join(to_line(record) for record in records).encode()
        try:
            with self.path.open("ab", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                try:
                    while lines:
                        lines = lines[file.write(lines) :]
                    os.fsync(file.fileno())
                except OSError:
                    file.truncate(size)  # what is not surely on disk must not be read as if it were
                    raise
        except OSError as error:
            reason = error.strerror or str(error)
            hint = ": free space" if error.errno in DISK_FULL else ""
            raise RecordError(f"{self.path}: a record cannot be written ({reason}){hint}") from error


def read_records(path: Path) -> Iterator[Record]:
    """The records of a file in order; a torn last line, as a crash leaves it, is skipped.

    Raises:
        ValueError: a line before the last is not a record; the message has file and line number.
    """
    with Path(path).open(encoding="utf-8", errors="replace") as file:
        lines = file.read().split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield from_dict(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):  # no newline after it: the write was cut short
                return
            raise ValueError(f"{path}:{number}: not JSON ({error.msg})") from error
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}:{number}: {error}") from error


def last_runs(records: Iterable[Record]) -> dict[str, RunRecord]:
    """The newest state of every run, by run_key."""
    return {record.run_key: record for record in records if isinstance(record, RunRecord)}


def config_key(config: dict[str, Any]) -> str:
    """16 hex digits of the SHA-256 of a JSON-able configuration, independent of key order."""
    text = json.dumps(config, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _mend_tail(path: Path) -> None:
    """Close a torn last line, so that the next record starts on a line of its own; the torn text is dropped."""
    if not path.exists() or path.stat().st_size == 0:
        return
    with path.open("r+b") as file:
        data = file.read()
        if not data.endswith(b"\n"):
            file.truncate(data.rfind(b"\n") + 1)
