"""A phase of a sweep as a Ray Tune experiment: what its trials are told, and what listens to them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastbp.config import RunConfig
from fastbp.environment import git_state
from fastbp.record import RecordWriter, RunRecord
from sweeps.ledger import Ledger
from sweeps.progress import Progress
from sweeps.saved_states import saved_states
from sweeps.spec import Sweep
from sweeps.stopping import Stop

if TYPE_CHECKING:
    from sweeps.rungs import RungScheduler

OnEnd = Callable[[RunRecord], None]
Say = Callable[[str], None]


@dataclass
class Experiments:
    """Runs phases of a sweep, one Tune experiment each.

    Attributes:
        storage: Tune's `storage_path`.
        say: prints a sentence.
    """

    sweep: Sweep
    storage: str
    writer: RecordWriter
    ledger: Ledger
    progress: Progress
    stop: Stop
    say: Say

    def common(self, *, exclusive: bool, threads: int, gpus: float) -> dict[str, Any]:
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

    def trial(self, *, exclusive: bool, threads: int, gpus: float) -> Callable[[RunConfig, int], dict[str, Any]]:
        """Makes the Tune config of a run and its attempt."""
        common = self.common(exclusive=exclusive, threads=threads, gpus=gpus)

        def trial(run: RunConfig, attempt: int) -> dict[str, Any]:
            # A measured run starts anew after a failure: resumed seconds are worth nothing.
            saved = [] if exclusive or attempt == 0 else self._saved(run)
            return {"run": run.to_dict(), "attempt": attempt, "checkpoints": saved, **common}

        return trial

    def _saved(self, run: RunConfig) -> list[str]:
        try:
            return saved_states(self.storage, run.key)
        except (OSError, ValueError, NotImplementedError) as error:  # a bucket that does not answer ends no sweep
            first = (str(error).splitlines() or [""])[0]
            self.say(f"{run.phase} {run.arm}: starts anew, as its saved states cannot be looked up ({first[:200]})")
            return []

    def fit(
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

        search = self.sweep.search
        searches = search is not None and phase == "search"
        every = search.checkpoint_epochs if search is not None and searches else 0
        searcher.stop = self.stop
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
                name=f"{self.sweep.name}-{phase}",
                storage_path=self.storage,
                checkpoint_config=tune.CheckpointConfig(
                    num_to_keep=2, checkpoint_frequency=every, checkpoint_at_end=False
                ),
                callbacks=[Recorder(self.writer, self.ledger, on_end, self.progress, reasons, self.stop, searches)],
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


def _trial_name(trial: Any) -> str:
    run = RunConfig.from_dict(trial.config["run"])
    return f"{run.key}-{trial.config['attempt']}"
