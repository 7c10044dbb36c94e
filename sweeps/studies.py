"""One Optuna study per arm, with the same number of trials for every arm.

Only a trial that ran its full budget to finite values is told COMPLETE. A stopped trial is PRUNED; a failed or
diverged one is FAIL, because a sampler that is told NaN or inf keeps it pending or best for ever.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.study import StudyDirection
from optuna.trial import TrialState

from fastbp.config import RunConfig
from fastbp.record import RunRecord, utc_now
from sweeps.arms import Arm, Values
from sweeps.ledger import DONE
from sweeps.samplers import (
    LEARNING,
    decode,
    describe,
    distribution,
    encode,
    every_setting,
    fixed_settings,
    generation_attrs,
    make_sampler,
    space_size,
)
from sweeps.spec import Sweep

DIRECTIONS = {"val_accuracy": StudyDirection.MAXIMIZE, "flops": StudyDirection.MINIMIZE}
_FEW = 10_000  # settings: so small a space is searched for one that is new
_TRIES = 20  # proposals of a learning sampler that has repeated itself, before its repetition counts as a trial
Log = Callable[[dict[str, Any]], None]  # hears of every start, ask and tell


class ArmStudy:
    """The search of one arm: proposes settings, learns from their results, and stops at its budget.

    Args:
        objectives: `val_accuracy`, or `val_accuracy` and `flops`, the whole run's count.

    Attributes:
        budget: trials of this arm; 1 where nothing is searched.
    """

    def __init__(
        self,
        arm: Arm,
        sampler: str,
        trials: int,
        seed: int,
        config: Callable[[Arm, Values], RunConfig],
        objectives: Sequence[str] = ("val_accuracy",),
        log: Log = lambda event: None,
    ) -> None:
        self.arm = arm
        self.objectives = tuple(objectives)
        self._config, self._log = config, log
        self._sampler, self._trials, self._seed = sampler, trials, seed
        self._space = {path: distribution(domain) for path, domain in arm.space.items()}
        self._fixed = fixed_settings(sampler, arm.space, trials, _seed(seed, arm.name, 0))
        self.budget = len(self._fixed) or (trials if arm.space else 1)
        self._study = self._new_study(known=0)
        self._waiting: dict[str, list[int]] = {}  # run_key to trial numbers that wait for its result
        self._keys: set[str] = set()  # of all runs that were proposed
        self._repeats: set[int] = set()  # trial numbers that proposed such a run again and use no budget

    @classmethod
    def of_sweep(
        cls, sweep: Sweep, arm: Arm, config: Callable[[Arm, Values], RunConfig], log: Log = lambda event: None
    ) -> ArmStudy:
        """The study of an arm as the sweep file's `search` part wants it."""
        search = sweep.search
        assert search is not None
        return cls(arm, search.sampler, search.trials, search.seed, config, search.objectives, log)

    @property
    def distinct(self) -> int:
        """How many different settings the budget can hold: a space of choices may have fewer."""
        if self._fixed:
            return len({json.dumps(setting, sort_keys=True) for setting in self._fixed})
        return int(min(self.budget, space_size(self.arm.space)))

    @property
    def asked(self) -> int:
        return len(self.states())

    def restore(self, records: list[RunRecord]) -> None:
        """Tell results of an earlier start; the samplers that do not learn propose their list again instead."""
        known = records if self._sampler in LEARNING and self._space else []
        self._log({"event": "start", "arm": self.arm.name, "known": len(known), **self._description()})
        if not known:
            return
        self._study, complete = self._new_study(known=len(known)), 0
        for record in known:
            again = record.status not in DONE
            state, values = (TrialState.RUNNING, None) if again else self._outcome(record.status, measured_of(record))
            setting = self.arm.values_of(record.method, record.recipe)
            self._study.add_trial(
                optuna.trial.create_trial(
                    state=state,
                    values=values,
                    params={path: encode(self.arm.space[path], value) for path, value in setting.items()},
                    distributions=self._space,
                    system_attrs=generation_attrs(self._sampler, self._trials, complete),
                )
            )
            complete += state is TrialState.COMPLETE
            self._keys.add(record.run_key)
            if again:
                self._waiting.setdefault(record.run_key, []).append(len(self._study.get_trials(deepcopy=False)) - 1)

    def ask(self) -> RunConfig | None:
        """The next proposed run, or None when the budget is used."""
        if self.asked >= self.budget:
            return None
        if self._fixed:
            self._study.enqueue_trial(self._fixed[self.asked])
        trial, values, config = self._propose()
        for _ in range(_TRIES if self._sampler in LEARNING and len(self._keys) < self.distinct else 0):
            if config.key not in self._keys:
                break
            self._study.tell(trial.number, state=TrialState.FAIL)  # a child like its parent is no trial
            self._repeats.add(trial.number)
            trial, values, config = self._propose()
        if config.key in self._keys and (unseen := self._unseen()) is not None:
            self._study.tell(trial.number, state=TrialState.FAIL)
            self._repeats.add(trial.number)
            self._study.enqueue_trial(unseen)
            trial, values, config = self._propose()
        self._keys.add(config.key)
        self._waiting.setdefault(config.key, []).append(trial.number)
        self._tell_log("ask", trial.number, config.key, setting=values)
        return config

    def _unseen(self) -> dict[str, Any] | None:
        """A random setting that a learning sampler never came to; None where there is none, or where it may repeat."""
        if self._sampler not in LEARNING or len(self._keys) >= self.distinct or space_size(self.arm.space) > _FEW:
            return None
        settings = every_setting(self.arm.space)
        random.Random(_seed(self._seed, self.arm.name, self.asked)).shuffle(settings)
        return next((s for s in settings if self._config(self.arm, self._decoded(s)).key not in self._keys), None)

    def _decoded(self, params: dict[str, Any]) -> Values:
        return {path: decode(self.arm.space[path], value) for path, value in params.items()}

    def _propose(self) -> tuple[optuna.trial.Trial, Values, RunConfig]:
        trial = self._study.ask(self._space)
        values = self._decoded(trial.params)
        return trial, values, self._config(self.arm, values)

    def is_waiting(self, key: str) -> bool:
        return key in self._waiting

    def tell(self, key: str, status: str, measured: dict[str, float | None]) -> None:
        """The result of a run, for every trial that proposed it.

        Args:
            status: how the run ended.
            measured: its values by objective, at the end of the run.
        """
        state, values = self._outcome(status, measured)
        for number in self._waiting.pop(key, []):
            self._study.tell(number, values, state)
            self._tell_log("tell", number, key, state=state.name, values=values)

    def states(self) -> list[TrialState]:
        """Of every trial of the budget, in the order of asking."""
        return [t.state for t in self._study.get_trials(deepcopy=False) if t.number not in self._repeats]

    def _outcome(self, status: str, measured: dict[str, float | None]) -> tuple[TrialState, list[float] | None]:
        """How a run's end is told to the sampler."""
        values = [measured.get(name) for name in self.objectives]
        if status == "finished" and all(v is not None and math.isfinite(v) for v in values):
            return TrialState.COMPLETE, [float(v) for v in values if v is not None]
        return (TrialState.PRUNED if status == "stopped" else TrialState.FAIL), None

    def _new_study(self, known: int) -> optuna.Study:
        return optuna.create_study(
            storage=None,
            sampler=make_sampler(self._sampler, self._trials, _seed(self._seed, self.arm.name, known)),
            pruner=optuna.pruners.NopPruner(),
            study_name=self.arm.name,
            directions=[DIRECTIONS[name] for name in self.objectives],
            load_if_exists=False,
        )

    def _description(self) -> dict[str, Any]:
        return {
            "seed": self._seed,
            "budget": self.budget,
            "objectives": list(self.objectives),
            "sampler": describe(self._sampler, self._trials),
        }

    def _tell_log(self, event: str, number: int, key: str, **more: Any) -> None:
        self._log({"event": event, "arm": self.arm.name, "trial": number, "run_key": key, **more})


def search_log(path: Path) -> Log:
    """Appends the search's asks and tells, in their order, as JSON lines; a search is not repeatable without them."""

    def log(event: dict[str, Any]) -> None:
        with contextlib.suppress(OSError), path.open("a", encoding="utf-8") as file:  # a log stops no sweep
            file.write(json.dumps({"at": utc_now("milliseconds"), **event}) + "\n")

    return log


def measured_of(record: RunRecord) -> dict[str, float | None]:
    """A run's values by objective; FLOPs are counted, so that sharing a device does not touch them."""
    return {"val_accuracy": record.val_accuracy, "flops": record.flops_executed}


def _seed(seed: int, arm: str, known: int) -> int:
    """A sampler seed of its own for every arm and for every number of known results."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{arm}/{known}".encode()).digest()[:4], "big")
