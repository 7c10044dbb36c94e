"""What a sweep will run: search budgets per arm, then measured cells in randomised blocks."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path

from fastbp.config import RunConfig, check_bind
from fastbp.knobs import nearest
from fastbp.record import RunRecord
from sweeps.ablate import Ablation, Cell, expand, faults
from sweeps.arms import Arm, Loaded, Values, build_arms, check_arms, corners, refusal
from sweeps.ledger import Ledger
from sweeps.source import Source, SweepError
from sweeps.spec import AblatePart, MeasurePart, SearchPart, Sweep, load_sweep


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
        """The arm's first setting to measure, the most accurate; None where no search trial finished."""
        return next(iter(self.chosen_settings(arm, ledger)), None)

    def chosen_settings(self, arm: Arm, ledger: Ledger) -> list[Values]:
        """The arm's settings to measure, `measure.settings` at most and one of the anchor.

        Once an arm is being measured its settings stand, whatever its search still finds.
        """
        measured = self.measured(arm, ledger)
        if not arm.space:
            failed = self.sweep.search is not None and ledger.best_trial(arm.name) is None
            return [] if failed and not measured else [{}]
        measure = self.sweep.measure
        most = 1 if measure is None or arm.name == self.anchor else measure.settings
        best = [arm.values_of(r.method, r.recipe) for r in ledger.best_trials(arm.name, most)]
        found = [arm.values_of(r.method, r.recipe) for r in measured] + best
        standing = [values for i, values in enumerate(found) if values not in found[:i]][:most]
        return sorted(standing, key=lambda values: best.index(values) if values in best else len(best))

    def measured(self, arm: Arm, ledger: Ledger) -> list[RunRecord]:
        """What has been run of the arm at its chosen settings, in the measure part or as a whole in an ablation."""
        runs = [*ledger.of_phase("measure", arm.name), *ledger.of_phase("ablate", arm.name)]
        return [r for r in runs if r.role != "control"]

    def measure_runs(self, ledger: Ledger) -> list[RunConfig]:
        """All measured cells in running order; arms without a chosen setting are left out.

        A block is one seed: every arm and control once, in an order drawn for that block.
        """
        found = [c for arm in self.arms for v in self.chosen_settings(arm, ledger) for c in self.cells(arm, v)]
        cells = list({cell.key: cell for cell in found}.values())  # two settings may share their exact control
        return self._in_blocks(dict.fromkeys(self.measure_part.seeds, cells))

    def timed_runs(self, ledger: Ledger) -> dict[str, list[RunConfig]]:
        """Phase to its runs in running order, of those that run alone on the device and that the file has."""
        out = {"measure": self.measure_runs(ledger)} if self.sweep.measure else {}
        return out | ({"ablate": self.ablate_runs(ledger)} if self.sweep.ablate else {})

    def ablations(self, ledger: Ledger | None = None) -> list[Ablation]:
        """The ablations at the chosen settings, or without a ledger at the arms' defaults; those without are left out.

        Cells of equal setting have one name: the anchor's, a whole arm's, or the first that was given.
        """
        wholes = {}
        for arm in self.arms:
            values = {} if ledger is None else self.chosen(arm, ledger)
            if values is not None and arm.name in (self.anchor, *(part.arm for part in self.sweep.ablate)):
                wholes[arm.name] = Cell(arm.name, *arm.at(values), {})
        known: dict[str, str] = {}
        for name in (self.anchor, *wholes):
            if name in wholes:
                known.setdefault(wholes[name].setting, name)
        return [
            expand(part, wholes[part.arm], wholes[self.anchor], self.ablated_seeds(part), known)
            for part in self.sweep.ablate
            if {part.arm, self.anchor} <= set(wholes)
        ]

    def ablated_seeds(self, part: AblatePart) -> list[int]:
        return part.seeds or list(self.sweep.measure.seeds if self.sweep.measure else [])

    def ablate_runs(self, ledger: Ledger | None = None) -> list[RunConfig]:
        """All cells of the ablations in running order, each once.

        A block is one seed: the anchor, the whole arms and all other cells of the ablations over this seed.
        """
        blocks: dict[int, dict[str, RunConfig]] = {}
        for ablation in self.ablations(ledger):
            for seed in ablation.seeds:
                for cell in ablation.cells:
                    blocks.setdefault(seed, {}).setdefault(cell.name, self._ablated(cell))
        return self._in_blocks({seed: list(cells.values()) for seed, cells in blocks.items()})

    def _ablated(self, cell: Cell) -> RunConfig:
        return RunConfig(
            task=self.arms[0].task,  # all arms share it
            recipe=cell.recipe,
            method=cell.method,
            sweep=self.sweep.name,
            phase="ablate",
            arm=cell.name,
            role="baseline" if cell.name == self.anchor else "method",
        )

    def _in_blocks(self, cells: dict[int, list[RunConfig]]) -> list[RunConfig]:
        """Every seed's cells as one block, in an order drawn for that block."""
        runs: list[RunConfig] = []
        for block, (seed, own) in enumerate(cells.items()):
            order = list(own)
            random.Random(f"{self.exclusive_part.order_seed}/{block}").shuffle(order)
            runs += [replace(cell, seed=seed, block=block) for cell in order]
        return runs

    def cells(self, arm: Arm, values: Values | None) -> list[RunConfig]:
        """The arm at a setting and its exact control, without seed and block; nothing where it has no setting."""
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
    def exclusive_part(self) -> MeasurePart:
        """How measured runs and ablations are run."""
        assert self.sweep.exclusive is not None
        return self.sweep.exclusive

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
    loaded: Loaded = {}
    examples = check_arms(plan.arms, source, loaded)
    _check_ablations(plan, source, loaded)
    if sweep.search is not None:
        for arm in plan.arms:
            try:
                plan.search_run(arm, {})
            except ValueError as error:
                source.problem(("search", "epochs"), f"search.epochs: arm {arm.name}: {error}")
        _check_grid(plan, source)
        _check_rungs(plan, examples, source)
        source.check()
    return plan


def _check_ablations(plan: Plan, source: Source, loaded: Loaded) -> None:
    """Factors and levels of every ablation; then its cells are bound, also at the ends of searched ranges."""
    arms = {arm.name: arm for arm in plan.arms}
    for i, part in enumerate(plan.sweep.ablate):
        at = ("ablate",) if isinstance(source.data["ablate"], dict) else ("ablate", i)
        if not plan.ablated_seeds(part):
            source.problem(at, "ablate.seeds: there is no `measure` part to take them from; give seeds: [0, 1, 2]")
        if part.arm not in arms:
            source.problem((*at, "arm"), f"ablate.arm: no arm {part.arm!r}{nearest(part.arm, arms)}")
            continue
        arm, found = arms[part.arm], list(faults(part, arms[part.arm]))
        for key, sentence in found:
            source.problem((*at, *key), sentence)
        refused: dict[str, str] = {}
        for values in () if found else corners(arm.space):
            whole = Cell(arm.name, *arm.at(values), {})
            for cell in expand(part, whole, whole, [], {}).cells:
                error = refusal(arm.task, cell.method, cell.recipe, loaded) if cell.name not in refused else None
                if error is not None:
                    refused[cell.name] = f"ablate: cell {cell.name}: {error}"
        for sentence in refused.values():
            source.problem(at, sentence)
    source.check()


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


def _check_rungs(plan: Plan, examples: int, source: Source) -> None:
    """Rungs in examples must lie before the end of a trial; where they lie in seconds is known once it is piloted."""
    part = plan.search_part.rungs
    if part is None or part.unit != "examples":
        return
    from sweeps.rungs import make_ladders

    for arm, ladder in make_ladders(part, plan.arms, {}).items():
        epochs = plan.search_part.epochs or next(a.recipe.epochs for a in plan.arms if a.name == arm)
        if not ladder.epochs(examples, epochs):
            source.problem(
                ("search", "rungs"),
                f"search.rungs: arm {arm} has no rung before its end: its trials have {epochs} epochs of {examples} "
                f"examples, may be stopped after multiples of {ladder.period} epochs, and not before {part.first:g} "
                f"examples and {part.grace_epochs} epochs; lower `first` or `grace_epochs`, or give them more epochs",
            )
