"""Run a planned sweep: search, choose, measure. All it needs to continue is in the records."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fastbp.environment import git_state
from fastbp.record import RecordWriter, RunRecord, SweepRecord, read_records
from fastbp.run import RunConfig
from sweeps.ledger import DONE, Ledger
from sweeps.plan import Plan
from sweeps.progress import Progress
from sweeps.source import SweepError

STATE_FILE = "run.pt"  # as MethodTrainable names it
OnEnd = Callable[[RunRecord], None]
RECORDS = "records.jsonl"
SLOW_SYNC_SECONDS = 5.0  # a store slower than this is not asked again before the end of the measuring


@dataclass
class Outcome:
    """How a sweep ended.

    Attributes:
        failed: newest record of every run that failed.
        missing: planned runs that never ended, one sentence each.
        interrupted: whether the user stopped the sweep.
        mlflow_error: why MLflow lags behind the records; empty where it does not.
        uri: of the MLflow store; empty where none was wanted.
    """

    failed: list[RunRecord]
    missing: list[str]
    interrupted: bool = False
    mlflow_error: str = ""
    uri: str = ""

    @property
    def ok(self) -> bool:
        return not self.failed and not self.missing


@contextlib.contextmanager
def locked(out: Path) -> Iterator[bool]:
    """Hold the output folder; yields False where another process holds it."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
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
            f"{out} holds sweep {ledger.sweep.sweep!r} as it was before the file changed; "
            f"give the changed sweep another `name`, or another folder with --out"
        )
    return ledger, writer


def run_sweep(plan: Plan, file: Path, out: Path, progress: Progress, *, mlflow: bool = True) -> Outcome:
    """Run what is missing of a sweep.

    Args:
        plan: the validated sweep.
        file: its file, copied into the output folder.
        out: the output folder.
        progress: where ended runs are shown.
        mlflow: whether to mirror the records into MLflow.

    Raises:
        SweepError: the folder belongs to another sweep or another process.
    """
    from sweeps.cluster import prepare_environment

    prepare_environment()
    out = out.resolve()
    with locked(out) as free:
        if not free:
            raise SweepError(f"{out} is in use: this sweep is already running")
        ledger, writer = open_ledger(plan, out)
        if file.resolve() != out / "sweep.yaml":
            shutil.copyfile(file, out / "sweep.yaml")
        driver = _Driver(plan, out, ledger, writer, progress, mlflow)
        return driver.run()


class _Driver:
    def __init__(
        self, plan: Plan, out: Path, ledger: Ledger, writer: RecordWriter, progress: Progress, mlflow: bool
    ) -> None:
        self.plan, self.out, self.ledger, self.writer, self.progress = plan, out, ledger, writer, progress
        self._ray = contextlib.ExitStack()
        self._has_ray = False
        self.mirror: Any = None
        self.uri = ""
        self.storage = plan.sweep.storage_path or str(out / "tune")
        if "://" not in self.storage:
            self.storage = str(Path(self.storage).resolve())
        if mlflow:
            from sweeps.mlflow_sync import MlflowMirror, default_uri

            self.uri = default_uri(plan.sweep.mlflow.tracking_uri)
            self.mirror = MlflowMirror(out / RECORDS, self.uri, plan.sweep.mlflow.experiment)

    def run(self) -> Outcome:
        from sweeps.mlflow_sync import BackgroundSync, try_sync

        if self.ledger.sweep is None:
            self._announce(cells=0)
        interrupted = False
        with self._ray:
            if self.plan.sweep.search is not None:
                with BackgroundSync(self.mirror):
                    interrupted = not self._search()
            if self.plan.sweep.measure is not None and not interrupted:
                interrupted = not self._measure()
        error = try_sync(self.mirror, final=True)
        return Outcome(self._failed(), self._missing(), interrupted, error, self.uri)

    def _announce(self, cells: int) -> None:
        """Write what is planned; again once the number of measured cells is known."""
        sweep = self.plan.sweep
        record = SweepRecord(
            sweep=sweep.name,
            file_hash=sweep.hash,
            arms=[arm.name for arm in self.plan.arms],
            search_trials=sweep.search.trials if sweep.search else 0,
            seeds=list(sweep.measure.seeds) if sweep.measure else [],
            measure_cells=cells,
            targets=list(sweep.measure.targets) if sweep.measure else [],
            config=sweep.config(),
            started_at=self.ledger.sweep.started_at if self.ledger.sweep else _now(),
        )
        if record != self.ledger.sweep:
            self.writer.write(record)
            self.ledger.add(record)

    def _search(self) -> bool:
        """Tune every arm that is not being measured yet; False where the user interrupted."""
        from sweeps.cluster import check_resources, concurrent_trials, gpus_or_default
        from sweeps.searcher import ArmSearcher
        from sweeps.studies import ArmStudy

        search, plan = self.plan.search_part, self.plan
        arms = [arm for arm in plan.arms if not plan.measured(arm, self.ledger)]
        if not arms:
            return True
        self._start_ray()
        studies = [ArmStudy(a, search.sampler, search.trials, search.seed, plan.search_run) for a in arms]
        gpus = gpus_or_default(search.gpus)
        check_resources("search", search.cpus, gpus)
        trial = self._trial(exclusive=False, threads=max(1, int(search.cpus)), gpus=gpus)
        searcher = ArmSearcher(studies, self.ledger, trial, plan.sweep.max_failures)
        resources = {"CPU": search.cpus} | ({"GPU": gpus} if gpus else {})
        self.progress.phase("search", {arm.name: plan.trials(arm) for arm in plan.arms}, self.ledger)
        concurrent = concurrent_trials(search.cpus, gpus)
        return self._fit("search", searcher, resources, concurrent, True, self.progress.ended)

    def _measure(self) -> bool:
        """Run every measured cell, one at a time; False where the user interrupted."""
        from sweeps.cluster import check_resources, gpus_or_default, node_cpus
        from sweeps.searcher import ListSearcher

        measure, plan = self.plan.measure_part, self.plan
        anchor = next(arm for arm in plan.arms if arm.name == plan.anchor)
        if plan.chosen(anchor, self.ledger) is None:
            return True  # nothing to compare with; the outcome says so
        runs = plan.measure_runs(self.ledger)
        self._announce(cells=len(runs))
        counts = {arm.name: sum(run.arm == arm.name for run in runs) for arm in plan.arms}
        self.progress.phase("measure", counts, self.ledger)
        if all(self.ledger.done(run.key) for run in runs):
            return True
        self._start_ray()
        gpus = int(gpus_or_default(measure.gpus))
        check_resources("measure", 1, gpus)
        cpus = node_cpus(gpus)
        trial = self._trial(exclusive=True, threads=measure.threads or cpus, gpus=gpus)
        searcher = ListSearcher(runs, self.ledger, trial, plan.sweep.max_failures)
        resources = {"CPU": float(cpus)} | ({"GPU": float(gpus)} if gpus else {})
        return self._fit("measure", searcher, resources, 1, gpus == 0, self._between_trials())

    def _start_ray(self) -> None:
        """Start or join the cluster, once, and only where something is left to run."""
        from sweeps.cluster import ray_session

        if not self._has_ray:
            self._ray.enter_context(ray_session())
            self._has_ray = True

    def _between_trials(self) -> OnEnd:
        """Sync while no trial trains, and only as long as the store is quick."""
        from sweeps.mlflow_sync import try_sync

        quick = try_sync(self.mirror) == ""

        def ended(record: RunRecord) -> None:
            nonlocal quick
            self.progress.ended(record)
            began = time.monotonic()
            quick = quick and try_sync(self.mirror) == "" and time.monotonic() - began < SLOW_SYNC_SECONDS

        return ended

    def _trial(self, *, exclusive: bool, threads: int, gpus: float) -> Any:
        commit, dirty = git_state()
        common = {
            "git_commit": commit,
            "git_dirty": dirty,
            "exclusive": exclusive,
            "threads": threads,
            "device": "cuda" if gpus else "cpu",
            "cwd": os.getcwd(),
            "sys_path": [p for p in sys.path if p and not p.startswith((sys.prefix, sys.base_prefix))],
        }

        def trial(run: RunConfig, attempt: int) -> dict[str, Any]:
            # A measured run starts anew after a failure: resumed seconds are worth nothing.
            saved = None if exclusive or attempt == 0 else newest_checkpoint(self.storage, run.key)
            return {"run": run.to_dict(), "attempt": attempt, "checkpoint": saved, **common}

        return trial

    def _fit(
        self,
        phase: str,
        searcher: Any,
        resources: dict[str, float],
        concurrent: int,
        reuse: bool,
        on_end: OnEnd,
    ) -> bool:
        """One Tune experiment; False where it ended before the searcher had nothing left."""
        from ray import tune

        from sweeps.recorder import Recorder
        from trainables.method_trainable import MethodTrainable

        search = self.plan.sweep.search
        every = search.checkpoint_epochs if search is not None and phase == "search" else 0
        tuner = tune.Tuner(
            tune.with_resources(MethodTrainable, resources),
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                num_samples=-1,
                max_concurrent_trials=concurrent,
                reuse_actors=reuse,
                trial_name_creator=_trial_name,
                trial_dirname_creator=_trial_name,
            ),
            run_config=tune.RunConfig(
                name=f"{self.plan.sweep.name}-{phase}",
                storage_path=self.storage,
                checkpoint_config=tune.CheckpointConfig(
                    num_to_keep=1, checkpoint_frequency=every, checkpoint_at_end=False
                ),
                callbacks=[Recorder(self.writer, self.ledger, on_end)],
                verbose=0,
            ),
        )
        tuner.fit()
        return searcher.exhausted

    def _failed(self) -> list[RunRecord]:
        return [record for record in self.ledger.runs.values() if record.status == "failed"]

    def _missing(self) -> list[str]:
        """Planned runs without an end, and arms that could not be planned."""
        plan, out = self.plan, []
        if plan.sweep.measure is None:
            for arm in plan.arms:
                ended = sum(record.status in (*DONE, "failed") for record in self.ledger.of_phase("search", arm.name))
                if ended < plan.trials(arm):
                    out.append(f"search {arm.name}: {ended} of {plan.trials(arm)} trials ended")
            return out
        for arm in plan.arms:
            if plan.chosen(arm, self.ledger) is None:
                out.append(f"measure {arm.name}: no search trial finished, so there is no setting to measure")
        ends = [run for run in plan.measure_runs(self.ledger) if self.ledger.done(run.key) is None]
        return out + [
            f"measure {run.arm} {run.role} seed {run.seed}: not run"
            for run in ends
            if run.key not in self.ledger.runs or self.ledger.runs[run.key].status == "running"
        ]


def newest_checkpoint(storage: str, key: str) -> str | None:
    """The newest saved state of a run in Tune's local or shared folder, if it has one."""
    found = Path(storage).glob(f"*/{key}-*/checkpoint_*/{STATE_FILE}") if "://" not in storage else ()
    return max((str(path) for path in found), default=None, key=lambda path: Path(path).stat().st_mtime_ns)


def _trial_name(trial: Any) -> str:
    run = RunConfig.from_dict(trial.config["run"])
    return f"{run.key}-{trial.config['attempt']}"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
