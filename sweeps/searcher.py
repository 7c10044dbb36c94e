"""Which run Ray Tune starts next: a fixed list for measuring, one study per arm for searching."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from ray.tune.search import Searcher

from fastbp.config import RunConfig
from sweeps.ledger import Ledger, config_of
from sweeps.stopping import Stop
from sweeps.studies import ArmStudy, measured_of

Trial = dict[str, Any]  # a MethodTrainable config
MakeTrial = Callable[[RunConfig, int], Trial]  # of a run and its attempt


class ListSearcher(Searcher):
    """Hands out runs in their order, those already done left out; a failed run comes again at the end.

    Args:
        runs: what to run.
        ledger: what has been done before.
        make_trial: the Tune config of a run and its attempt.
        retries: how often a failed run is tried again.

    Attributes:
        exhausted: whether every run was handed out and ended; not so after an interruption.
        stop: after a signal nothing more is handed out.
    """

    stop: Stop | None = None

    def __init__(self, runs: list[RunConfig], ledger: Ledger, make_trial: MakeTrial, retries: int) -> None:
        super().__init__()
        self._queue = deque(run for run in runs if ledger.done(run.key) is None)
        self._ledger, self._make_trial, self._retries = ledger, make_trial, retries
        self._live: dict[str, RunConfig] = {}
        self._attempts = dict(ledger.attempts)
        self._failures: dict[str, int] = {}
        self.exhausted = False

    def suggest(self, trial_id: str) -> Trial | str | None:
        if self.stop is not None and self.stop.signal:
            return None
        run = self._next()
        if run is None:
            self.exhausted = not self._live
            return Searcher.FINISHED if self.exhausted else None
        self._live[trial_id] = run
        attempt = self._attempts.get(run.key, 0)
        self._attempts[run.key] = attempt + 1
        return self._make_trial(run, attempt)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        run = self._live.pop(trial_id, None)
        if run is None:
            return
        failures = self._failures[run.key] = self._failures.get(run.key, 0) + bool(error)
        if error and failures <= self._retries:
            self._queue.append(run)
            return
        result = result or {}
        status = "failed" if error else result.get("end/status", "stopped")
        self._ended(run, status, result)

    def _next(self) -> RunConfig | None:
        return self._queue.popleft() if self._queue else None

    def _ended(self, run: RunConfig, status: str, result: dict[str, Any]) -> None:
        """A run reached its last attempt's end; `result` is its last one, flat."""

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its set-up for a restore that is never used; see `restore`."""
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the records hold all that a new start needs."""

    def restore(self, checkpoint_path: str) -> None:
        raise RuntimeError("a sweep is resumed from its records: run the same file again")


class ArmSearcher(ListSearcher):
    """Hands out the arms' proposals in turn until every arm has used its budget.

    Args:
        studies: one per arm.
    """

    def __init__(self, studies: list[ArmStudy], ledger: Ledger, make_trial: MakeTrial, retries: int) -> None:
        super().__init__([], ledger, make_trial, retries)
        self._studies = {study.arm.name: study for study in studies}
        self._turn = deque(studies)
        for study in studies:
            study.restore(ledger.of_phase("search", study.arm.name))
            again = [r for r in ledger.of_phase("search", study.arm.name) if study.is_waiting(r.run_key)]
            self._queue.extend(config_of(record) for record in again)

    def _next(self) -> RunConfig | None:
        if self._queue:
            return self._queue.popleft()
        for _ in range(len(self._turn)):
            study = self._turn[0]
            self._turn.rotate(-1)
            run = self._proposal(study)
            if run is not None:
                return run
        return None

    def _proposal(self, study: ArmStudy) -> RunConfig | None:
        """The arm's next setting that must be trained; known results are told at once and use budget too."""
        while True:
            live = {run.key for run in self._live.values()} | {run.key for run in self._queue}
            run = study.ask()
            if run is None:
                return None
            record = self._ledger.done(run.key)
            if record is not None:
                study.tell(run.key, record.status, measured_of(record))
            elif run.key not in live:  # else its trial waits for the run under way
                return run

    def _ended(self, run: RunConfig, status: str, result: dict[str, Any]) -> None:
        measured = {"val_accuracy": result.get("val_accuracy"), "flops": result.get("record/flops_executed")}
        self._studies[run.arm].tell(run.key, status, measured)
