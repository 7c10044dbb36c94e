"""One Optuna study per arm, with the same number of trials for every arm.

Only a trial that ran its full budget to a finite accuracy is told COMPLETE. A stopped trial is PRUNED; a
failed or diverged one is FAIL, because a sampler that is told NaN or inf keeps it pending or best for ever.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import random
import warnings
from collections.abc import Callable
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

from fastbp.knobs import Choice, Domain, IntRange, LogUniform
from fastbp.record import RunRecord
from fastbp.run import RunConfig
from sweeps.arms import Arm, Values
from sweeps.ledger import DONE

optuna.logging.set_verbosity(optuna.logging.WARNING)


class ArmStudy:
    """The search of one arm: proposes settings, learns from their results, and stops at its budget.

    Attributes:
        budget: trials of this arm; 1 where nothing is searched.
    """

    def __init__(
        self, arm: Arm, sampler: str, trials: int, seed: int, config: Callable[[Arm, Values], RunConfig]
    ) -> None:
        self.arm = arm
        self.budget = trials if arm.space else 1
        self._config = config
        self._space = {path: _distribution(domain) for path, domain in arm.space.items()}
        self._grid = _grid(arm.space, trials, seed) if sampler == "grid" and arm.space else []
        self.budget = len(self._grid) or self.budget
        self._sampler, self._trials, self._seed = sampler, trials, seed
        self._study = self._new_study(known=0)
        self._waiting: dict[str, list[int]] = {}  # run_key to trial numbers that wait for its result

    @property
    def asked(self) -> int:
        return len(self.states())

    def restore(self, records: list[RunRecord]) -> None:
        """Tell results of an earlier start; only tpe needs it: the others propose the same sequence again."""
        if self._sampler != "tpe" or not self._space:
            return
        self._study = self._new_study(known=len(records))
        for record in records:
            again = record.status not in DONE
            state, value = (TrialState.RUNNING, None) if again else outcome(record.status, record.val_accuracy)
            values = self.arm.values_of(record.method, record.recipe)
            params = {path: _encode(self.arm.space[path], setting) for path, setting in values.items()}
            self._study.add_trial(
                optuna.trial.create_trial(state=state, value=value, params=params, distributions=self._space)
            )
            if again:
                self._waiting.setdefault(record.run_key, []).append(self.asked - 1)

    def ask(self) -> RunConfig | None:
        """The next proposed run, or None when the budget is used."""
        if self.asked >= self.budget:
            return None
        if self._grid:
            self._study.enqueue_trial(self._grid[self.asked])
        trial = self._study.ask(self._space)
        config = self._config(self.arm, {path: _decode(self.arm.space[path], v) for path, v in trial.params.items()})
        self._waiting.setdefault(config.key, []).append(trial.number)
        return config

    def is_waiting(self, key: str) -> bool:
        return key in self._waiting

    def tell(self, key: str, status: str, val_accuracy: float | None) -> None:
        """The result of a run, for every trial that proposed it."""
        state, value = outcome(status, val_accuracy)
        for number in self._waiting.pop(key, []):
            self._study.tell(number, value, state)

    def states(self) -> list[TrialState]:
        return [trial.state for trial in self._study.get_trials(deepcopy=False)]

    def _new_study(self, known: int) -> optuna.Study:
        sampler = _sampler(self._sampler, self._trials, _seed(self._seed, self.arm.name, known))
        return optuna.create_study(
            storage=None,
            sampler=sampler,
            pruner=optuna.pruners.NopPruner(),
            study_name=self.arm.name,
            direction="maximize",
            load_if_exists=False,
        )


def outcome(status: str, val_accuracy: float | None) -> tuple[TrialState, float | None]:
    """How a run's end is told to a sampler."""
    if status == "finished" and val_accuracy is not None and math.isfinite(val_accuracy):
        return TrialState.COMPLETE, float(val_accuracy)
    return (TrialState.PRUNED if status == "stopped" else TrialState.FAIL), None


def _sampler(name: str, trials: int, seed: int) -> optuna.samplers.BaseSampler:
    """The sampler with every argument given that is not deprecated: new defaults change no search."""
    if name == "tpe":
        return optuna.samplers.TPESampler(
            n_startup_trials=max(2, min(10, trials // 3)),
            n_ei_candidates=24,
            seed=seed,
            multivariate=True,
            group=False,
            constant_liar=True,
        )
    if name == "qmc":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return optuna.samplers.QMCSampler(
                qmc_type="sobol",
                scramble=True,
                seed=seed,
                independent_sampler=optuna.samplers.RandomSampler(seed=seed),
                warn_asynchronous_seeding=False,
                warn_independent_sampling=False,
            )
    return optuna.samplers.RandomSampler(seed=seed)


def _grid(space: dict[str, Domain], trials: int, seed: int) -> list[dict[str, Any]]:
    """Evenly spaced points of every range, as many as the budget allows, times all values of every choice.

    At most `trials` settings, in random order, so that a grid that is cut short by the budget has no blank corner.
    """
    ranges = [path for path, domain in space.items() if not isinstance(domain, Choice)]
    choices = math.prod(len(d.values) for d in space.values() if isinstance(d, Choice))
    points = max(2, int((trials / choices) ** (1 / len(ranges)) + 1e-9)) if ranges else 0
    axes = [_points(domain, points) for domain in space.values()]
    settings = [dict(zip(space, values, strict=True)) for values in itertools.product(*axes)]
    random.Random(seed).shuffle(settings)
    return settings[:trials]


def _points(domain: Domain, n: int) -> list[Any]:
    if isinstance(domain, Choice):
        return [_encode(domain, value) for value in domain.values]
    low, high = float(domain.low), float(domain.high)
    if isinstance(domain, LogUniform):
        inner = [low * (high / low) ** (i / (n - 1)) for i in range(1, n - 1)]
    else:
        inner = [low + (high - low) * i / (n - 1) for i in range(1, n - 1)]
    if isinstance(domain, IntRange):
        return sorted({domain.low, *(round(x) for x in inner), domain.high})
    return [low, *inner, high]


def _distribution(domain: Domain) -> BaseDistribution:
    if isinstance(domain, Choice):
        return CategoricalDistribution([_encode(domain, value) for value in domain.values])
    if isinstance(domain, IntRange):
        return IntDistribution(domain.low, domain.high)
    return FloatDistribution(domain.low, domain.high, log=isinstance(domain, LogUniform))


def _encode(domain: Domain, value: Any) -> Any:
    """Optuna takes no lists as choices: choices travel as JSON text."""
    return json.dumps(value) if isinstance(domain, Choice) else value


def _decode(domain: Domain, value: Any) -> Any:
    if not isinstance(domain, Choice):
        return value
    return next(candidate for candidate in domain.values if json.dumps(candidate) == value)


def _seed(seed: int, arm: str, known: int) -> int:
    """A sampler seed of its own for every arm and for every number of known results."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{arm}/{known}".encode()).digest()[:4], "big")
