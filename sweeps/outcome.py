"""What a sweep has still to do, and how it ended: both from its plan and its records alone."""

from __future__ import annotations

from dataclasses import dataclass

from fastbp.record import RunRecord
from sweeps.arms import Arm
from sweeps.ledger import DONE, Ledger
from sweeps.plan import Plan


@dataclass
class Outcome:
    """How a sweep ended.

    Attributes:
        failed: newest record of every run that failed.
        missing: planned runs that never ended, one sentence each.
        interrupted: the signal with which the user stopped the sweep; 0 where nobody did.
        mlflow_error: why MLflow lags behind the records; empty where it does not.
        uri: of the MLflow store; empty where none was wanted.
        contaminated: number of measured runs that shared their device with other programs.
    """

    failed: list[RunRecord]
    missing: list[str]
    interrupted: int = 0
    mlflow_error: str = ""
    uri: str = ""
    contaminated: int = 0

    @property
    def ok(self) -> bool:
        return not self.failed and not self.missing


def planned_trials(plan: Plan) -> dict[str, int]:
    """Arm to its number of search runs: its budget, or all of its settings where it has fewer; empty without search."""
    if plan.sweep.search is None:
        return {}
    from sweeps.studies import ArmStudy

    return {arm.name: ArmStudy.of_sweep(plan.sweep, arm, plan.search_run).distinct for arm in plan.arms}


def unsearched(plan: Plan, ledger: Ledger) -> list[Arm]:
    """Arms with trials left to run: failed ones always, new ones until the arm is measured: then its settings stand."""
    planned = planned_trials(plan)

    def left(arm: Arm) -> bool:
        trials = ledger.of_phase("search", arm.name)
        if any(record.status == "failed" for record in trials):
            return True
        return not plan.measured(arm, ledger) and sum(r.status in DONE for r in trials) < planned[arm.name]

    return [arm for arm in plan.arms if left(arm)]


def failed(ledger: Ledger) -> list[RunRecord]:
    return [record for record in ledger.runs.values() if record.status == "failed"]


def missing(plan: Plan, ledger: Ledger) -> list[str]:
    """Planned runs without an end, and arms that could not be planned."""
    out = []
    if plan.sweep.exclusive is None:
        for arm, wanted in planned_trials(plan).items():
            ended = sum(record.status in (*DONE, "failed") for record in ledger.of_phase("search", arm))
            if ended < wanted:
                out.append(f"search {arm}: {ended} of {wanted} trials ended")
        return out
    phase, arms = "measure", plan.arms
    if plan.sweep.measure is None:
        ablated = {plan.anchor, *(part.arm for part in plan.sweep.ablate)}
        phase, arms = "ablate", [arm for arm in plan.arms if arm.name in ablated]
    for arm in arms:
        if plan.chosen(arm, ledger) is None:
            out.append(f"{phase} {arm.name}: no search trial finished, so there is no setting to measure")
    timed = [run for runs in plan.timed_runs(ledger).values() for run in runs]
    return out + [
        f"{run.phase} {run.arm} {run.role} seed {run.seed}: not run"
        for run in timed
        if run.key not in ledger.runs or ledger.runs[run.key].status == "running"
    ]
