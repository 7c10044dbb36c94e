"""A run whose modules live in processes of their own, driven like any other run.

`StagedRun` has the face of `fastbp.run.Run` and asks K workers, each with a `Run` of its own in one `torch.distributed`
group, to take every step of it together. Who the workers are is the caller's choice: `LocalWorkers` are processes of
this machine. If one of them fails, what is in flight in all of them is void: all are ended, and the caller starts again
from the last checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields, replace
from datetime import UTC, datetime
from typing import Any, Protocol

import torch

from fastbp.clock import Clock
from fastbp.config import RunConfig
from fastbp.method import Method, parts
from fastbp.methods.ddg import DDG
from fastbp.record import EpochRecord, RunRecord, Seconds
from fastbp.run import Run
from fastbp.stage_workers import LocalWorkers, StageError, loaded_bytes, saved_bytes


class Workers(Protocol):
    """K processes, in the order of their ranks."""

    def call(self, name: str, *args: Sequence[Any]) -> list[Any]:
        """Call a `StageWorker` method on all ranks at once; each of `args` holds one value per rank.

        Raises:
            StageError: one of them failed; all are ended.
        """
        ...

    def close(self) -> None: ...


def stages(method: Method) -> int:
    """Processes that a run with this method needs: the modules of a DDG with `processes`, else 1."""
    return next((m.modules for m in parts(method) if isinstance(m, DDG) and m.processes), 1)


def open_run(config: RunConfig, **options: Any) -> Run | StagedRun:
    """The run of a configuration: a `Run`, or a `StagedRun` on local processes where the method asks for them.

    Args:
        config: what to train.
        options: of `Run`; the threads are shared out among the processes.

    Raises:
        ValueError: more processes than GPUs, where these are to be used.
        StageError: a process could not start.
    """
    count = stages(config.method)
    if count == 1:
        return Run(config, **options)
    device = torch.device(options.get("device") or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and torch.cuda.device_count() < count:
        raise ValueError(
            f"DDG.processes = True: {count} modules need {count} GPUs, this machine has {torch.cuda.device_count()}; "
            "set processes to False, or the device to cpu"
        )
    threads = options.get("threads") or torch.get_num_threads()
    workers = LocalWorkers(count, config, options | {"threads": max(1, threads // count)})
    return StagedRun(config, workers, threads)


class StagedRun:
    """A run over K workers, with the face of `Run`.

    Attributes:
        clock: passes on what is added to it; the workers keep the time.

    Args:
        config: of the run.
        workers: one per module.
        threads: that the run was given on the CPU, shared out among the workers where there are enough.
    """

    def __init__(self, config: RunConfig, workers: Workers, threads: int | None = None) -> None:
        self.threads = threads
        self.config, self.recipe, self.workers = config, config.recipe, workers
        self.ranks = stages(config.method)
        self._closed = False
        self.device = torch.device("cpu")  # of what `state_dict` returns
        self.epoch, self.done, self.status = 0, False, "running"
        self.clock = _RemoteClock(self)
        self._known: RunRecord | None = None  # the run's record so far

    def start_record(self) -> RunRecord:
        self._known = self._one(self.workers.call("start_record"))
        return self._known

    def train_epoch(self) -> EpochRecord:
        results = self.workers.call("train_epoch")
        self.epoch, self.done = results[0][0].epoch + 1, results[0][1]
        epoch = merged([record for record, _ in results])
        if self._known is not None:
            shared = {f.name for f in fields(RunRecord)} & {f.name for f in fields(EpochRecord)}
            measured = {name: getattr(epoch, name) for name in shared - {"kind"}}
            self._known = replace(self._known, **measured, epochs_done=self.epoch)
        return epoch

    def end(self, status: Any = None, reason: str = "") -> RunRecord:
        """As `Run.end`; of a run whose workers are gone, what was known of it when they went."""
        every = [status] * self.ranks, [reason] * self.ranks
        try:
            record = self._one(self.workers.call("end", *every))
        except StageError as error:
            if self._known is None:
                raise
            now = datetime.now(UTC).isoformat(timespec="seconds")
            record = replace(self._known, status=status or "failed", reason=reason or str(error), ended_at=now)
        self.status = record.status
        return record

    def close(self) -> None:
        """End the workers, for good."""
        if not self._closed:
            self._closed = True
            self.workers.close()

    def split_table(self) -> list[dict[str, float]]:
        return self.workers.call("table")[0]

    def state_dict(self) -> dict[str, Any]:
        ranks = [loaded_bytes(state, self.device) for state in self.workers.call("state_dict")]
        return {"run_key": self.config.key, "ranks": ranks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        saved = len(state.get("ranks", ()))
        if saved != self.ranks:
            raise ValueError(
                f"checkpoint of run {state['run_key']} has {saved} ranks, this run {self.ranks}; start this run anew"
            )
        self.epoch, self.done = self.workers.call("load_state_dict", [saved_bytes(rank) for rank in state["ranks"]])[0]

    def _one(self, records: list[RunRecord]) -> RunRecord:
        """The run's record, comparable with those of one process that was given as many threads."""
        device, count = dict(records[0].device), self.ranks
        if self.threads is not None:
            if device.get("type") == "cpu":
                count = math.ceil(self.ranks * device["threads"] / self.threads)
            device["threads"] = self.threads
        return replace(merged(records), workers=count, device=device)


class _RemoteClock(Clock):
    """Adds up what happens outside the workers, and tells them."""

    def __init__(self, run: StagedRun) -> None:
        super().__init__()
        self._run = run

    def add(self, name: str, seconds: float) -> None:
        super().add(name, seconds)
        if seconds and name != "checkpoint":  # the workers time theirs
            self._run.workers.call("add_seconds", [name] * self._run.ranks, [seconds] * self._run.ranks)


def merged(records: Sequence[Any]) -> Any:
    """One record of a run from those of its ranks, which took every step together.

    Seconds are those of the slowest rank, FLOPs, energy and memory are summed; all else is rank 0's.
    """
    changes: dict[str, Any] = {}
    for field in fields(Seconds):
        known = [value for r in records if (value := getattr(r, field.name)) is not None]
        changes[field.name] = max(known) if known else None
    for name in ("flops_executed", "energy_joules", "peak_memory_bytes"):
        values = [getattr(r, name) for r in records]
        changes[name] = None if None in values else sum(values)
    return replace(records[0], **changes)
