"""Early stopping of search trials: asynchronous successive halving within every arm.

A trial is looked at on *rungs*, amounts of training that grow by a factor, and goes on where its validation accuracy
is among the best of all trials of its arm that have reached the rung so far (Li et al. 2020, arXiv:1810.05934, in the
form that stops trials and never pauses them). Arms never compete with one another, so a method is not favoured because
its epochs are cheap. A rung is taken at the first epoch that is a multiple of the arm's period, and not before the
grace epochs: a method that alternates its epochs is always looked at in the same phase.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from fastbp.config import RunConfig
from fastbp.knobs import Choice, IntRange
from fastbp.record import EpochRecord, Record, RunRecord
from sweeps.arms import Arm
from sweeps.pilot import EpochCost, Pilot
from sweeps.spec import RungsPart

PILOTS = "pilots.json"


def seconds_alone(cost: EpochCost, epoch: EpochRecord) -> float:
    """Exclusive-equivalent training seconds of a run after an epoch: never what its own clock said.

    The run's counted FLOPs stand for how much dearer or cheaper than the pilot's its setting is.

    Args:
        cost: of the arm, from its pilot.
    """
    if epoch.flops_executed is None or not cost.flops_per_example:
        return epoch.examples * cost.seconds_per_example
    return epoch.flops_executed * cost.seconds_per_example / cost.flops_per_example


@dataclass
class Ladder:
    """The rungs of one arm and who has reached them.

    Attributes:
        part: the sweep's rungs.
        period: epochs; every rung is at a multiple of it.
        cost: of the arm, for rungs in seconds.
        values: per rung, run_key to validation accuracy.
        climbed: run_key to the number of rungs at which that run has been looked at.
    """

    part: RungsPart
    period: int = 1
    cost: EpochCost | None = None
    values: list[dict[str, float]] = field(default_factory=list)
    climbed: dict[str, int] = field(default_factory=dict)

    def climb(self, epoch: EpochRecord) -> list[int]:
        """Enter a run on the rungs that it has newly reached, which are returned."""
        done, accuracy = epoch.epoch + 1, epoch.val_accuracy
        if done % self.period or done < self.part.grace_epochs or accuracy is None or not math.isfinite(accuracy):
            return []
        new = list(range(self.climbed.get(epoch.run_key, 0), self._height(self._amount(epoch))))
        for rung in new:
            while len(self.values) <= rung:
                self.values.append({})
            self.values[rung].setdefault(epoch.run_key, accuracy)
        if new:
            self.climbed[epoch.run_key] = new[-1] + 1
        return new

    def verdict(self, rung: int, key: str) -> str:
        """Why a run is stopped at a rung; empty where it goes on.

        The best `keep` of the n runs there go on, at least one, and those that are equal to the last of them.
        """
        values = self.values[rung]
        kept = max(1, math.floor(self.part.share * len(values) + 1e-9))
        if sum(value > values[key] for value in values.values()) < kept:
            return ""
        amount = f"{self.part.first * self.part.factor**rung:.6g} {self.part.unit}"
        return (
            f"rung {rung + 1} at {amount}: val accuracy {values[key]:.4g} is not among the best {kept} of {len(values)}"
        )

    def epochs(self, examples_per_epoch: int, epochs: int) -> list[int]:
        """After which epochs a run of `epochs` epochs is looked at; only for rungs in examples."""
        found: dict[int, int] = {}
        for done in range(1, epochs):
            height = self._height(float(done * examples_per_epoch))
            if done % self.period == 0 and done >= self.part.grace_epochs and height > max(found.values(), default=0):
                found[done] = height
        return list(found)

    def _amount(self, epoch: EpochRecord) -> float:
        return float(epoch.examples) if self.cost is None else seconds_alone(self.cost, epoch)

    def _height(self, amount: float) -> int:
        """How many rungs lie at or below an amount."""
        rungs = 0
        while self.part.first * self.part.factor**rungs <= amount * (1 + 1e-9):
            rungs += 1
        return rungs


class RungScheduler(FIFOScheduler):
    """Tells Tune to stop trials that lag behind their arm, in the order in which the results arrive.

    Args:
        ladders: arm to its ladder.

    Attributes:
        reasons: run_key to why its run was stopped.
    """

    def __init__(self, ladders: dict[str, Ladder]) -> None:
        super().__init__()
        self.ladders = ladders
        self.reasons: dict[str, str] = {}

    def restore_from(self, records: Iterable[Record]) -> None:
        """Rebuild who reached which rung from the records of earlier starts of the sweep.

        An epoch is written together with the stop that it led to, so a run without a stop has passed its rungs, and
        they are not asked for again where it has to start anew.
        """
        arms: dict[str, str] = {}
        for record in records:
            if isinstance(record, RunRecord) and record.phase == "search" and record.arm in self.ladders:
                arms[record.run_key] = record.arm
            elif isinstance(record, EpochRecord) and record.run_key in arms:
                self.ladders[arms[record.run_key]].climb(record)

    def decide(self, arm: str, epoch: EpochRecord) -> str:
        """Why a run is to be stopped after an epoch; empty where it goes on."""
        ladder = self.ladders.get(arm)
        if ladder is None:
            return ""
        for rung in ladder.climb(epoch):
            reason = ladder.verdict(rung, epoch.run_key)
            if reason:
                self.reasons[epoch.run_key] = reason
                return reason
        return ""

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        names = ("run_key", "epoch", "examples", "flops_executed", "val_accuracy")
        epoch = EpochRecord(**{name: result[f"record/{name}"] for name in names})
        stop = self.decide(trial.config["run"]["arm"], epoch)
        return TrialScheduler.STOP if stop else TrialScheduler.CONTINUE

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its set-up for a restore that is never used: the rungs are rebuilt from the records."""
        return {}


def arm_period(arm: Arm) -> int:
    """Epochs after which kinds of epoch and evaluations repeat, at every setting that an arm may take."""
    settings = [{}] + [{path: value} for path, domain in arm.space.items() for value in _discrete(domain)]
    points = [arm.at(values) for values in settings]
    return math.lcm(*(math.lcm(method.epoch_period, recipe.eval_every_epochs) for method, recipe in points))


def make_ladders(part: RungsPart, arms: list[Arm], costs: dict[str, EpochCost]) -> dict[str, Ladder]:
    """Arm to its ladder; with rungs in seconds only for arms that have a cost."""
    if part.unit == "examples":
        return {arm.name: Ladder(part, arm_period(arm)) for arm in arms}
    return {arm.name: Ladder(part, arm_period(arm), costs[arm.name]) for arm in arms if arm.name in costs}


def pilot_costs(
    out: Path, runs: dict[str, RunConfig], measure: Callable[[RunConfig], Pilot | None]
) -> dict[str, EpochCost]:
    """The mean costs of arms over the epochs of a run, measured once per sweep and kept in `out/pilots.json`.

    Args:
        out: the sweep's output folder.
        runs: arm to the run that stands for it.
        measure: pilots a run, alone on the device of the search; None where that fails.
    """
    path, known = out / PILOTS, {}
    with contextlib.suppress(FileNotFoundError, ValueError):  # cut short by a crash: they are timed again
        known = json.loads(path.read_text(encoding="utf-8"))
    for arm, run in runs.items():
        found = None if arm in known else measure(run)
        if found is not None:
            known[arm] = asdict(EpochCost(found.seconds_per_example, found.flops_per_example))
            draft = path.with_suffix(".tmp")
            draft.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", encoding="utf-8")
            os.replace(draft, path)
    return {arm: EpochCost(**known[arm]) for arm in runs if arm in known}


def _discrete(domain: Any) -> Iterable[Any]:
    if isinstance(domain, Choice):
        return domain.values
    return range(domain.low, domain.high + 1) if isinstance(domain, IntRange) else ()
