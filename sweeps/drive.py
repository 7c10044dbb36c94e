"""Run a planned sweep: search, choose, measure. All it needs to continue is in the records."""

from __future__ import annotations

import contextlib
import functools
import math
import signal
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastbp.config import RunConfig
from fastbp.method import Method
from fastbp.record import RecordWriter, RunRecord, SweepRecord, read_records, utc_now
from fastbp.staged import stages
from sweeps.experiments import Experiments, OnEnd
from sweeps.ledger import Ledger
from sweeps.outcome import Outcome, failed, missing, planned_trials, unsearched
from sweeps.output_folder import RECORDS, SEARCH_LOG, keep_copy, locked, open_ledger
from sweeps.plan import Plan
from sweeps.progress import Progress
from sweeps.source import SweepError, SweepStopped
from sweeps.stopping import RAY_DIED, Interrupted, NodeWatch, Stop

if TYPE_CHECKING:
    from sweeps.arms import Arm
    from sweeps.rungs import RungScheduler


def run_sweep(
    plan: Plan, file: Path, out: Path, progress: Progress, *, mlflow: bool = True, remeasure: bool = False
) -> Outcome:
    """Run what is missing of a sweep.

    Args:
        plan: the validated sweep.
        file: its file, copied into the output folder.
        out: the output folder.
        progress: where ended runs are shown.
        mlflow: whether to mirror the records into MLflow.
        remeasure: whether measured runs that shared their device run again, with all of their block.

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
        if remeasure:
            ledger.again = ledger.spoiled
        keep_copy(file, out / "sweep.yaml")
        driver = _Driver(plan, out, ledger, writer, progress, mlflow)
        return driver.run()


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
        storage = plan.sweep.storage_path or str(out / "tune")
        storage = storage if "://" in storage else str(Path(storage).resolve())
        self.tune = Experiments(plan.sweep, storage, writer, ledger, progress, self.stop, self._say)
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
        contaminated = len(self.ledger.contaminated)
        return Outcome(
            failed(self.ledger), missing(self.plan, self.ledger), interrupted, behind, self.uri, contaminated
        )

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
            search_runs=planned_trials(self.plan),
            seeds=list(sweep.measure.seeds) if sweep.measure else [],
            measure_cells=len(timed.get("measure", ())),
            ablate_cells=len(timed.get("ablate", ())),
            ablations=[ablation.to_dict() for ablation in self.plan.ablations(self.ledger)] if timed else [],
            targets=list(sweep.measure.targets) if sweep.measure else [],
            config=sweep.config() | sampler,
            started_at=self.ledger.sweep.started_at if self.ledger.sweep else utc_now("milliseconds"),
        )
        if record != self.ledger.sweep:
            self.writer.write(record)
            self.ledger.add(record)

    def _search(self) -> bool:
        """Run the search trials that are left; False where the user interrupted."""
        from sweeps.cluster import check_resources, concurrent_trials, gpus_or_default, in_cluster
        from sweeps.searcher import ArmSearcher
        from sweeps.studies import ArmStudy, search_log
        from trainables.stage_actors import stage_resources

        search, plan = self.plan.search_part, self.plan
        arms = unsearched(plan, self.ledger)
        if arms or plan.sweep.exclusive is None:
            self.progress.phase("search", {arm.name: plan.trials(arm) for arm in plan.arms}, self.ledger)
        if not arms:
            return True
        self._start_ray()
        studies = [
            ArmStudy.of_sweep(plan.sweep, arm, plan.search_run, search_log(self.out / SEARCH_LOG)) for arm in arms
        ]
        gpus = gpus_or_default(search.gpus)
        self._say(check_resources("search", search.cpus, _devices(gpus, (arm.method for arm in arms))))
        trial = self.tune.trial(exclusive=False, threads=max(1, int(search.cpus)), gpus=gpus)
        searcher = ArmSearcher(studies, self.ledger, trial, plan.sweep.max_failures)
        # On a cluster Tune keeps one trial waiting beyond what fits, for which an autoscaler may bring a node.
        concurrent = None if in_cluster() else concurrent_trials(search.cpus, gpus)
        rungs = self._rungs(arms, search.cpus, gpus)
        needs = functools.partial(stage_resources, cpus=search.cpus, gpus=gpus)
        return self.tune.fit("search", searcher, needs, concurrent, True, self.progress.ended, scheduler=rungs)

    def _rungs(self, arms: list[Arm], cpus: float, gpus: float) -> RungScheduler | None:
        """What stops lagging trials, with all that earlier starts of the sweep have seen; None where nothing does."""
        from sweeps.remote_pilot import remote_pilot
        from sweeps.rungs import RungScheduler, make_ladders, pilot_costs

        part = self.plan.search_part.rungs
        if part is None:
            return None
        costs = {}
        if part.unit == "seconds":
            common = self.tune.common(exclusive=True, threads=max(1, int(cpus)), gpus=gpus)
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
                node = placement.pick_node(gpus, threads, last, self._say, phase)
            except KeyboardInterrupt:
                return False
            for sentence in placement.split_blocks(runs, self.ledger, node):
                self._say(sentence)
            trial = self.tune.trial(exclusive=True, threads=threads or int(node.cpus), gpus=gpus)
            searcher = ListSearcher(runs, self.ledger, trial, self.plan.sweep.max_failures)
            watch = placement.NodeGone(node)
            needs = functools.partial(node.request, gpus=gpus)
            ended = self.tune.fit(phase, searcher, needs, 1, gpus == 0, between, watch)
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


def _devices(gpus: float, methods: Iterable[Method]) -> float:
    """GPUs of the largest run: one for each of its modules that is a process of its own."""
    most = max((stages(method) for method in methods), default=1)
    return gpus if most == 1 else math.ceil(gpus) * most
