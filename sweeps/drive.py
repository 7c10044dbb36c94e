"""Run a planned sweep: search, choose, measure. All it needs to continue is in the records."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import math
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastbp.environment import git_state
from fastbp.method import Method
from fastbp.record import RecordWriter, RunRecord, SweepRecord, read_records
from fastbp.run import RunConfig
from fastbp.staged import stages
from sweeps.ledger import DONE, Ledger
from sweeps.plan import Plan
from sweeps.progress import Progress
from sweeps.source import SweepError, SweepStopped
from sweeps.stopping import RAY_DIED, Interrupted, NodeWatch, Stop

if TYPE_CHECKING:
    from sweeps.arms import Arm
    from sweeps.rungs import RungScheduler

STATE_FILE = "run.pt"  # as MethodTrainable names it
OnEnd = Callable[[RunRecord], None]
RECORDS = "records.jsonl"
SEARCH_LOG = "search.jsonl"


@dataclass
class Outcome:
    """How a sweep ended.

    Attributes:
        failed: newest record of every run that failed.
        missing: planned runs that never ended, one sentence each.
        interrupted: the signal with which the user stopped the sweep; 0 where nobody did.
        mlflow_error: why MLflow lags behind the records; empty where it does not.
        uri: of the MLflow store; empty where none was wanted.
    """

    failed: list[RunRecord]
    missing: list[str]
    interrupted: int = 0
    mlflow_error: str = ""
    uri: str = ""

    @property
    def ok(self) -> bool:
        return not self.failed and not self.missing


@contextlib.contextmanager
def locked(out: Path) -> Iterator[bool]:
    """Hold the output folder; yields False where another process holds it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / ".lock").open("w")
    except OSError as error:
        raise SweepError(f"{out}: cannot be written ({error.strerror}); give another folder with --out") from error
    with lock as file:
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
        SweepStopped: the disk is full, or Ray died.
    """
    from sweeps.cluster import prepare_environment

    prepare_environment()
    out = out.resolve()
    with locked(out) as free:
        if not free:
            raise SweepError(f"{out} is in use: this sweep is already running")
        ledger, writer = open_ledger(plan, out)
        _keep_copy(file, out / "sweep.yaml")
        driver = _Driver(plan, out, ledger, writer, progress, mlflow)
        return driver.run()


def _keep_copy(file: Path, copy: Path) -> None:
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


class _Driver:
    def __init__(
        self, plan: Plan, out: Path, ledger: Ledger, writer: RecordWriter, progress: Progress, mlflow: bool
    ) -> None:
        self.plan, self.out, self.ledger, self.writer, self.progress = plan, out, ledger, writer, progress
        self._ray = contextlib.ExitStack()
        self._has_ray = False
        self.stop = Stop()
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
        from sweeps.mlflow_pace import BackgroundSync, final_sync

        done, stopped, failure = False, "", None
        with self.stop:
            try:
                if self.ledger.sweep is None:
                    self._announce({})
                with self._ray:
                    if self.plan.sweep.search is not None:
                        with BackgroundSync(self.mirror):
                            done = self._search()
                    if self.plan.sweep.exclusive is not None and (done or self.plan.sweep.search is None):
                        done = self._measure()
            except (KeyboardInterrupt, Interrupted):
                done, stopped = False, self.stop.cause
            except Exception as error:
                stopped, failure = self.stop.why(error), error
            self.stop.closing = True  # what was refused before its first run leaves nothing in MLflow
            behind = final_sync(self.mirror, self.progress.console.print) if self.ledger.runs or not failure else ""
        if stopped:
            raise SweepStopped(stopped) from failure
        if failure is not None:
            raise failure
        interrupted = 0 if done else self.stop.signal or signal.SIGINT
        return Outcome(self._failed(), self._missing(), interrupted, behind, self.uri)

    def _announce(self, timed: dict[str, list[RunConfig]]) -> None:
        """Write what is planned; again once the measured cells and those of the ablations are known."""
        sweep, sampler = self.plan.sweep, {}
        if sweep.search is not None:
            from sweeps.samplers import describe

            sampler = {"sampler": describe(sweep.search.sampler, sweep.search.trials)}
        record = SweepRecord(
            sweep=sweep.name,
            file_hash=sweep.hash,
            arms=[arm.name for arm in self.plan.arms],
            search_trials=sweep.search.trials if sweep.search else 0,
            seeds=list(sweep.measure.seeds) if sweep.measure else [],
            measure_cells=len(timed.get("measure", ())),
            ablate_cells=len(timed.get("ablate", ())),
            ablations=[ablation.to_dict() for ablation in self.plan.ablations(self.ledger)] if timed else [],
            targets=list(sweep.measure.targets) if sweep.measure else [],
            config=sweep.config() | sampler,
            started_at=self.ledger.sweep.started_at if self.ledger.sweep else _now("milliseconds"),
        )
        if record != self.ledger.sweep:
            self.writer.write(record)
            self.ledger.add(record)

    def _search(self) -> bool:
        """Tune every arm that is not being measured yet; False where the user interrupted."""
        from sweeps.cluster import check_resources, concurrent_trials, gpus_or_default, in_cluster
        from sweeps.searcher import ArmSearcher
        from sweeps.studies import ArmStudy, search_log
        from trainables.stage_actors import stage_resources

        search, plan = self.plan.search_part, self.plan
        arms = [arm for arm in plan.arms if not plan.measured(arm, self.ledger)]
        if not arms:
            return True
        self._start_ray()
        studies = [
            ArmStudy.of_sweep(plan.sweep, arm, plan.search_run, search_log(self.out / SEARCH_LOG)) for arm in arms
        ]
        gpus = gpus_or_default(search.gpus)
        self._say(check_resources("search", search.cpus, _devices(gpus, (arm.method for arm in arms))))
        trial = self._trial(exclusive=False, threads=max(1, int(search.cpus)), gpus=gpus)
        searcher = ArmSearcher(studies, self.ledger, trial, plan.sweep.max_failures)
        self.progress.phase("search", {arm.name: plan.trials(arm) for arm in plan.arms}, self.ledger)
        # On a cluster Tune keeps one trial waiting beyond what fits, for which an autoscaler may bring a node.
        concurrent = None if in_cluster() else concurrent_trials(search.cpus, gpus)
        rungs = self._rungs(arms, search.cpus, gpus)
        needs = functools.partial(stage_resources, cpus=search.cpus, gpus=gpus)
        return self._fit("search", searcher, needs, concurrent, True, self.progress.ended, scheduler=rungs)

    def _rungs(self, arms: list[Arm], cpus: float, gpus: float) -> RungScheduler | None:
        """What stops lagging trials, with all that earlier starts of the sweep have seen; None where nothing does."""
        from sweeps.remote_pilot import remote_pilot
        from sweeps.rungs import RungScheduler, make_ladders, pilot_costs

        part = self.plan.search_part.rungs
        if part is None:
            return None
        costs = {}
        if part.unit == "seconds":
            self._say("pilot: timing a few steps of every arm, alone, to place the rungs")
            common = self._common(exclusive=True, threads=max(1, int(cpus)), gpus=gpus)
            measure = remote_pilot(cpus, gpus, common, self._say)
            costs = pilot_costs(self.out, {a.name: self.plan.search_run(a, {}) for a in arms}, measure)
        scheduler = RungScheduler(make_ladders(part, arms, costs))
        scheduler.restore_from(read_records(self.out / RECORDS))
        return scheduler

    def _measure(self) -> bool:
        """Run every measured cell, then every cell of the ablations, one at a time; False where interrupted."""
        plan = self.plan
        anchor = next(arm for arm in plan.arms if arm.name == plan.anchor)
        if plan.chosen(anchor, self.ledger) is None:
            return True  # nothing to compare with; the outcome says so
        timed = plan.timed_runs(self.ledger)
        self._announce(timed)
        return all(self._alone(phase, timed) for phase in timed)  # none after one that was interrupted

    def _alone(self, phase: str, timed: dict[str, list[RunConfig]]) -> bool:
        """One phase of runs that are alone on their device; False where the user interrupted."""
        from sweeps.cluster import check_resources, gpus_or_default

        runs, order = timed[phase], [arm.name for arm in self.plan.arms]
        arms = sorted((run.arm for run in runs), key=lambda arm: order.index(arm.partition("/")[0]))
        self.progress.phase(phase, Counter(arms), self.ledger)
        if all(self.ledger.done(run.key) for run in runs):
            return True
        self._start_ray()
        gpus = int(gpus_or_default(self.plan.exclusive_part.gpus))
        self._say(check_resources(phase, 1, _devices(gpus, (run.method for run in runs))))
        return self._measure_on_one_node(phase, timed, gpus)

    def _measure_on_one_node(self, phase: str, timed: dict[str, list[RunConfig]], gpus: int) -> bool:
        """Run a phase on the node of all that is timed; where it dies, what is left on another with the same device."""
        from sweeps import placement
        from sweeps.cluster import in_cluster
        from sweeps.searcher import ListSearcher

        runs, every = timed[phase], [run for of in timed.values() for run in of]
        threads, between = self.plan.exclusive_part.threads, self._between_trials()
        while True:
            if all(self.ledger.done(run.key) for run in runs):
                return True  # the node died with nothing left to run
            last = placement.last_device(self.ledger, every)
            try:
                node = placement.pick_node(gpus, threads, last, self._say)
            except KeyboardInterrupt:
                return False
            for sentence in placement.split_blocks(runs, self.ledger, node):
                self._say(sentence)
            trial = self._trial(exclusive=True, threads=threads or int(node.cpus), gpus=gpus)
            searcher = ListSearcher(runs, self.ledger, trial, self.plan.sweep.max_failures)
            watch = placement.NodeGone(node)
            ended = self._fit(phase, searcher, functools.partial(node.request, gpus=gpus), 1, gpus == 0, between, watch)
            if ended or not watch.gone:
                return ended
            if not in_cluster():
                self.stop.lose(RAY_DIED)  # a private cluster is this one node
                raise Interrupted
            self._say(f"{phase}: node {node.name} is gone; what was running there is tried again")

    def _say(self, sentence: str) -> None:
        if sentence:
            self.progress.console.print(sentence, highlight=False, markup=False, soft_wrap=True)

    def _start_ray(self) -> None:
        """Start or join the cluster, once, and only where something is left to run."""
        from sweeps.cluster import ray_session

        if not self._has_ray:
            self._ray.enter_context(ray_session())
            self._has_ray = True
            self.stop.listen()
            self._ray.enter_context(NodeWatch(self.stop))

    def _between_trials(self) -> OnEnd:
        """Sync while no trial trains."""
        from sweeps.mlflow_pace import BetweenTrials

        between = BetweenTrials(self.mirror)
        between.sync()

        def ended(record: RunRecord) -> None:
            self.progress.ended(record)
            between.sync()

        return ended

    def _common(self, *, exclusive: bool, threads: int, gpus: float) -> dict[str, Any]:
        """What every trial of a phase is told beside its run."""
        from sweeps.cluster import in_cluster

        commit, dirty = git_state()
        return {
            "git_commit": commit,
            "git_dirty": dirty,
            "exclusive": exclusive,
            "threads": threads,
            "device": "cuda" if gpus else "cpu",
            "cluster": in_cluster(),
            "cwd": os.getcwd(),
            "sys_path": [p for p in sys.path if p and not p.startswith((sys.prefix, sys.base_prefix))],
        }

    def _trial(self, *, exclusive: bool, threads: int, gpus: float) -> Any:
        common = self._common(exclusive=exclusive, threads=threads, gpus=gpus)

        def trial(run: RunConfig, attempt: int) -> dict[str, Any]:
            # A measured run starts anew after a failure: resumed seconds are worth nothing.
            saved = [] if exclusive or attempt == 0 else saved_states(self.storage, run.key)
            return {"run": run.to_dict(), "attempt": attempt, "checkpoints": saved, **common}

        return trial

    def _fit(
        self,
        phase: str,
        searcher: Any,
        needs: Callable[[RunConfig], Any],
        concurrent: int | None,
        reuse: bool,
        on_end: OnEnd,
        stop: Any = None,
        scheduler: RungScheduler | None = None,
    ) -> bool:
        """One Tune experiment; False where it ended before the searcher had nothing left."""
        from ray import tune

        from sweeps.recorder import Recorder
        from trainables.method_trainable import MethodTrainable

        search = self.plan.sweep.search
        every = search.checkpoint_epochs if search is not None and phase == "search" else 0
        reasons = scheduler.reasons if scheduler is not None else {}
        tuner = tune.Tuner(
            tune.with_resources(MethodTrainable, lambda config: needs(RunConfig.from_dict(config["run"]))),
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                scheduler=scheduler,
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
                    num_to_keep=2, checkpoint_frequency=every, checkpoint_at_end=False
                ),
                callbacks=[Recorder(self.writer, self.ledger, on_end, self.progress, reasons, self.stop)],
                stop=stop,
                verbose=0,
            ),
        )
        self.stop.tuning = True
        try:
            tuner.fit()
        finally:
            self.stop.tuning = False
        return searcher.exhausted

    def _failed(self) -> list[RunRecord]:
        return [record for record in self.ledger.runs.values() if record.status == "failed"]

    def _missing(self) -> list[str]:
        """Planned runs without an end, and arms that could not be planned."""
        plan, out = self.plan, []
        if plan.sweep.exclusive is None:
            from sweeps.studies import ArmStudy

            for arm in plan.arms:
                wanted = ArmStudy.of_sweep(plan.sweep, arm, plan.search_run).distinct
                ended = sum(record.status in (*DONE, "failed") for record in self.ledger.of_phase("search", arm.name))
                if ended < wanted:
                    out.append(f"search {arm.name}: {ended} of {wanted} trials ended")
            return out
        phase, ablated = "measure", {plan.anchor, *(part.arm for part in plan.sweep.ablate)}
        if plan.sweep.measure is None:
            phase, arms = "ablate", [arm for arm in plan.arms if arm.name in ablated]
        else:
            arms = plan.arms
        for arm in arms:
            if plan.chosen(arm, self.ledger) is None:
                out.append(f"{phase} {arm.name}: no search trial finished, so there is no setting to measure")
        timed = [run for runs in plan.timed_runs(self.ledger).values() for run in runs]
        ends = [run for run in timed if self.ledger.done(run.key) is None]
        return out + [
            f"{run.phase} {run.arm} {run.role} seed {run.seed}: not run"
            for run in ends
            if run.key not in self.ledger.runs or self.ledger.runs[run.key].status == "running"
        ]


def saved_states(storage: str, key: str) -> list[str]:
    """The saved states of a run in Tune's local or shared folder, the newest first: by attempt and number, as clocks
    of several machines, or one that was set back, put files in another order.
    """

    def age(path: Path) -> tuple[int, int]:
        return int(path.parts[-3].rpartition("-")[2]), int(path.parts[-2].rpartition("_")[2])

    found = Path(storage).glob(f"*/{key}-*/checkpoint_*/{STATE_FILE}") if "://" not in storage else ()
    return [str(path) for path in sorted(found, key=age, reverse=True)]


def _devices(gpus: float, methods: Iterable[Method]) -> float:
    """GPUs of the largest run: one for each of its modules that is a process of its own."""
    most = max((stages(method) for method in methods), default=1)
    return gpus if most == 1 else math.ceil(gpus) * most


def _trial_name(trial: Any) -> str:
    run = RunConfig.from_dict(trial.config["run"])
    return f"{run.key}-{trial.config['attempt']}"


def _now(precision: str = "seconds") -> str:
    return datetime.now(UTC).isoformat(timespec=precision)
