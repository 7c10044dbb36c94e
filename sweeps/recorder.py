"""The driver's ears: every result becomes a line of records.jsonl before anybody else hears of it."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ray.tune import Callback

from fastbp.record import EpochRecord, RecordWriter, RunRecord, Seconds
from fastbp.run import RunConfig
from sweeps.ledger import Ledger


class Recorder(Callback):
    """Writes records and keeps the ledger; tells `on_end` of every run that ended.

    Args:
        on_end: called between two trials with the run's last record, which is on disk by then.
    """

    def __init__(self, writer: RecordWriter, ledger: Ledger, on_end: Callable[[RunRecord], None]) -> None:
        self._writer, self._ledger, self._on_end = writer, ledger, on_end
        self._starts: dict[str, RunRecord] = {}
        self._epochs: dict[str, EpochRecord] = {}

    def on_trial_result(self, iteration: int, trials: list, trial: Any, result: dict[str, Any], **info: Any) -> None:
        if "start" in result:
            self._starts[trial.trial_id] = start = RunRecord(**result["start"])
            self._write(start)
        self._epochs[trial.trial_id] = epoch = EpochRecord(**result["record"])
        self._write(epoch)
        if "end" in result:
            self._write(RunRecord(**result["end"]))

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        key = RunConfig.from_dict(trial.config["run"]).key
        if key in self._ledger.runs:
            self._on_end(self._ledger.runs[key])

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        record = self._starts.get(trial.trial_id) or _unstarted(trial.config)
        epoch = self._epochs.get(trial.trial_id)
        if epoch is not None:
            record.epochs_done, record.examples, record.steps = epoch.epoch + 1, epoch.examples, epoch.steps
            for name in Seconds.__dataclass_fields__:
                setattr(record, name, getattr(epoch, name))
        record.status, record.reason, record.ended_at = "failed", reason_of(_error_text(trial)), _now()
        self._write(record)
        self._on_end(record)

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its set-up for a restore that is never used: a sweep resumes from its records."""
        return {}

    def _write(self, record: RunRecord | EpochRecord) -> None:
        self._writer.write(record)
        self._ledger.add(record)


def reason_of(text: str) -> str:
    """The sentence of the newest error in a traceback."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[A-Za-z_][\w.]*(Error|Exception|Interrupt|Exit|Killed)\b", line)]
    return ((errors or lines or ["the trial ended without a message"])[-1])[:500]


def _error_text(trial: Any) -> str:
    """The traceback that Tune wrote beside the trial; the copy in its storage comes later."""
    path = trial.error_file
    return Path(path).read_text(encoding="utf-8", errors="replace") if path and Path(path).exists() else ""


def _unstarted(config: dict[str, Any]) -> RunRecord:
    """The record of a run that failed before its first epoch."""
    run = RunConfig.from_dict(config["run"])
    data = run.to_dict()
    names = ("sweep", "phase", "arm", "role", "block", "task", "recipe", "method", "seed")
    return RunRecord(
        run_key=run.key,
        attempt=config["attempt"],
        exclusive=config["exclusive"],
        started_at=_now(),
        **{name: data[name] for name in names},
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
