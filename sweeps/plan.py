"""What a sweep will run: search budgets per arm, then measured cells in randomised blocks."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path

from fastbp.record import RunRecord
from fastbp.run import RunConfig, check_bind
from sweeps.arms import Arm, Values, build_arms, check_arms
from sweeps.ledger import Ledger
from sweeps.source import Source, SweepError
from sweeps.spec import MeasurePart, SearchPart, Sweep, load_sweep


@dataclass(frozen=True)
class Plan:
    """A validated sweep with its arms built."""

    sweep: Sweep
    arms: list[Arm]

    @property
    def anchor(self) -> str:
        """The arm of plain backprop that every measured block contains."""
        return next(arm.name for arm in self.arms if arm.plain)

    def trials(self, arm: Arm) -> int:
        """Search trials of an arm: the same number for every arm that searches anything."""
        search = self.sweep.search
        return 0 if search is None else search.trials if arm.space else 1

    def search_run(self, arm: Arm, values: Values) -> RunConfig:
        search = self.search_part
        method, recipe = arm.at(values)
        return RunConfig(
            task=arm.task,
            recipe=replace(recipe, epochs=search.epochs or recipe.epochs),
            method=method,
            seed=search.seed,
            sweep=self.sweep.name,
            phase="search",
            arm=arm.name,
            role="baseline" if arm.plain else "method",
        )

    def chosen(self, arm: Arm, ledger: Ledger) -> Values | None:
        """The arm's setting to measure; None where no search trial finished.

        Once an arm is being measured its setting stands, whatever its search still finds.
        """
        if not arm.space:
            failed = self.sweep.search is not None and ledger.best_trial(arm.name) is None
            return None if failed and not self.measured(arm, ledger) else {}
        record = next(iter(self.measured(arm, ledger)), None) or ledger.best_trial(arm.name)
        return None if record is None else arm.values_of(record.method, record.recipe)

    def measured(self, arm: Arm, ledger: Ledger) -> list[RunRecord]:
        return [r for r in ledger.of_phase("measure", arm.name) if r.role != "control"]

    def measure_runs(self, ledger: Ledger) -> list[RunConfig]:
        """All measured cells in running order; arms without a chosen setting are left out.

        A block is one seed: every arm and control once, in an order drawn for that block.
        """
        measure = self.measure_part
        cells = [cell for arm in self.arms for cell in self._cells(arm, ledger)]
        runs: list[RunConfig] = []
        for block, seed in enumerate(measure.seeds):
            order = list(cells)
            random.Random(f"{measure.order_seed}/{block}").shuffle(order)
            runs += [replace(cell, seed=seed, block=block) for cell in order]
        return runs

    def _cells(self, arm: Arm, ledger: Ledger) -> list[RunConfig]:
        """The arm at its chosen setting and its exact control, without seed and block."""
        values = self.chosen(arm, ledger)
        if values is None:
            return []
        method, recipe = arm.at(values)
        cell = RunConfig(
            task=arm.task,
            recipe=recipe,
            method=method,
            seed=0,
            sweep=self.sweep.name,
            phase="measure",
            arm=arm.name,
            role="baseline" if arm.name == self.anchor else "method",
        )
        exact = check_bind(cell) if self.measure_part.controls and not arm.plain else None
        return [cell] if exact in (None, method) else [cell, replace(cell, method=exact, role="control")]

    @property
    def search_part(self) -> SearchPart:
        assert self.sweep.search is not None
        return self.sweep.search

    @property
    def measure_part(self) -> MeasurePart:
        assert self.sweep.measure is not None
        return self.sweep.measure


def find_sweep(file: str) -> tuple[Path, str]:
    """The path of a sweep file, or of a packaged one by its bare name, and how messages call it.

    Raises:
        SweepError: there is neither.
    """
    path = Path(file)
    if path.is_file():
        return path, file
    packaged = Path(__file__).parent / f"{file}.yaml"
    if path.name == file and packaged.is_file():
        return packaged, f"{file}.yaml"
    names = ", ".join(sorted(p.stem for p in Path(__file__).parent.glob("*.yaml")))
    raise SweepError(f"{file}: no such sweep file; packaged sweeps: {names}")


def load_plan(file: str, *, smoke: bool = False) -> Plan:
    """Read, validate and bind a sweep file, without Ray.

    Raises:
        SweepError: everything found, as `file:line: sentence`.
    """
    sweep, source = load_sweep(*find_sweep(file))
    sweep = sweep.smoke() if smoke else sweep
    plan = Plan(sweep, build_arms(sweep, source))
    check_arms(plan.arms, source)
    if sweep.search is not None:
        for arm in plan.arms:
            try:
                plan.search_run(arm, {})
            except ValueError as error:
                source.problem(("search", "epochs"), f"search.epochs: arm {arm.name}: {error}")
        _check_grid(plan, source)
        source.check()
    return plan


def _check_grid(plan: Plan, source: Source) -> None:
    """A grid with fewer points than trials would give its arm a smaller budget than the others have."""
    if plan.search_part.sampler != "grid":
        return
    from sweeps.studies import ArmStudy

    for arm in plan.arms:
        budget = ArmStudy(arm, "grid", plan.search_part.trials, plan.search_part.seed, plan.search_run).budget
        if arm.space and budget < plan.search_part.trials:
            source.problem(
                ("search", "trials"),
                f"search.trials = {plan.search_part.trials}: arm {arm.name} has a grid of {budget} points, and every "
                f"arm must have the same budget; use {budget} trials or fewer, or another sampler",
            )
