"""The driver's ears: every result becomes a line of records.jsonl before anybody else hears of it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ray.tune import Callback

from fastbp.config import RunConfig
from fastbp.record import EpochRecord, RecordWriter, RunRecord, Seconds, utc_now
from sweeps.ledger import Ledger
from sweeps.progress import Progress
from sweeps.stopping import Stop

# What Tune and the searchers still need of a result. Of every number that is left in it Tune keeps statistics until the
# experiment ends: 0.2 MB per trial for whole records.
_KEPT = {"done", "training_iteration", "val_accuracy", "record/flops_executed", "end/status", "should_checkpoint"}

# What Tune keeps of a trial until the experiment ends, and writes again and again: what it was told, three times, and
# statistics of every number it reported. All of it is in the records too.
_TOLD = ("config", "evaluated_params", "_Trial__unresolved_config")
_STATISTICS = ("metric_analysis", "metric_n_steps")


class Recorder(Callback):
    """Writes records and keeps the ledger; tells `on_end` of every run that ended.

    Args:
        on_end: called between two trials with the run's last record, which is on disk by then.
        progress: is told what happens in between.
        reasons: run_key to why a run is being stopped, as the scheduler fills it.
        stop: is asked between two steps whether the sweep has to end.
        saves: whether trials are saved after their epoch once it has to.
    """

    def __init__(
        self,
        writer: RecordWriter,
        ledger: Ledger,
        on_end: Callable[[RunRecord], None],
        progress: Progress,
        reasons: dict[str, str],
        stop: Stop,
        saves: bool = False,
    ) -> None:
        self._writer, self._ledger, self._on_end, self._progress = writer, ledger, on_end, progress
        self._reasons, self._stop, self._saves = reasons, stop, saves
        self._saved: set[str] = set()  # since the signal
        self._starts: dict[str, RunRecord] = {}
        self._epochs: dict[str, EpochRecord] = {}
        self._best: dict[str, float] = {}  # validation accuracy
        self._noted: set[str] = set()

    def on_trial_result(self, iteration: int, trials: list, trial: Any, result: dict[str, Any], **info: Any) -> None:
        records: list[RunRecord | EpochRecord] = []
        if "start" in result:
            self._starts[trial.trial_id] = start = RunRecord(**result["start"])
            records.append(start)
            self._note(start)
        self._epochs[trial.trial_id] = epoch = EpochRecord(**result["record"])
        records.append(epoch)
        self._best[trial.trial_id] = max(self._best.get(trial.trial_id, 0.0), epoch.val_accuracy or 0.0)
        if "end" in result:
            records.append(end := RunRecord(**result["end"]))
            if end.status == "finished":
                self._note(end)
        elif epoch.run_key in self._reasons:
            records.append(self._stopped(trial.trial_id, epoch))
        self._write(*records)
        for name in result.keys() - _KEPT:
            del result[name]
        if self._saves and self._stop.signal:
            result["should_checkpoint"] = True
        self._progress.epoch(epoch)

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        self._starts.pop(trial.trial_id, None)
        self._best.pop(trial.trial_id, None)
        epoch = self._epochs.pop(trial.trial_id, None)
        if epoch is not None:
            self._on_end(self._ledger.runs[epoch.run_key])
        _forget(trial)

    def on_trial_save(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        if self._stop.signal:
            self._saved.add(trial.trial_id)

    def on_trial_start(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        self._progress.started(_unstarted(trial.config))

    def on_step_end(self, iteration: int, trials: list, **info: Any) -> None:
        self._progress.tick()
        saving = self._saves and self._stop.signal and any(self._is_unsaved(trial) for trial in trials)
        self._stop.check(saving=bool(saving))

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        record = self._starts.pop(trial.trial_id, None) or _unstarted(trial.config)
        self._best.pop(trial.trial_id, None)
        epoch = self._epochs.pop(trial.trial_id, None)
        if epoch is not None:
            record.epochs_done, record.examples, record.steps = epoch.epoch + 1, epoch.examples, epoch.steps
            for name in Seconds.__dataclass_fields__:
                setattr(record, name, getattr(epoch, name))
        record.status, record.reason = "failed", reason_of(_error_text(trial))
        record.ended_at = max(utc_now(), record.started_at)  # clocks of two machines, or one that was set back
        self._write(record)
        self._on_end(record)
        _forget(trial)

    def _is_unsaved(self, trial: Any) -> bool:
        return trial.status == "RUNNING" and trial.trial_id not in self._saved

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its set-up for a restore that is never used: a sweep resumes from its records."""
        return {}

    def _stopped(self, trial_id: str, epoch: EpochRecord) -> RunRecord:
        """The end of a run that the scheduler stops after this epoch."""
        shared = {f.name for f in fields(EpochRecord)} & {f.name for f in fields(RunRecord)} - {"kind"}
        start = self._starts[trial_id]
        return replace(
            start,
            **{name: getattr(epoch, name) for name in shared},
            epochs_done=epoch.epoch + 1,
            best_val_accuracy=max(start.best_val_accuracy or 0.0, self._best[trial_id]),
            status="stopped",
            reason=self._reasons.pop(epoch.run_key),
            ended_at=max(utc_now(), start.started_at),
        )

    def _note(self, run: RunRecord) -> None:
        """Say what a run has to remark at its start, or at its end though it finished; each kind of remark once."""
        kind = run.reason.split(":")[0]
        if kind and kind not in self._noted:
            self._noted.add(kind)
            self._progress.console.print(
                f"{run.phase} {run.arm}: {run.reason}", highlight=False, markup=False, soft_wrap=True
            )

    def _write(self, *records: RunRecord | EpochRecord) -> None:
        """On disk at once, then in the ledger."""
        self._writer.write(*records)
        for record in records:
            self._ledger.add(record)


def _forget(trial: Any) -> None:
    for holder, names in ((trial, _TOLD), (trial.run_metadata, _STATISTICS)):
        for name in names:
            setattr(holder, name, {})
    trial.invalidate_json_state()  # a text that has them


_DEATH = r"^(ray\.exceptions\.\w+: )?(The actor (died|is dead)|Task was killed|\d+ worker\(s\) were killed)"
_CAUSES = {  # what Ray says of a process that is gone, and what it means
    r"low on memory|memory usage threshold": "out of memory: Ray killed the run's process before its node ran out; "
    "give a run more memory, or run fewer side by side",
    r"node (has died|was terminated)": "the node that trained the run died",
    r"worker process has died": "the run's process died: it was killed, ran out of memory, or crashed",
}


def reason_of(text: str) -> str:
    """The sentence of the newest error in a traceback."""
    if re.search(_DEATH, text, re.MULTILINE):
        for pattern, sentence in _CAUSES.items():
            if re.search(pattern, text):
                return sentence
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
        started_at=utc_now(),
        **{name: data[name] for name in names},
    )
