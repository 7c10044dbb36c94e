"""Tables of the `ablate` part: components in and out, main effects and interactions, dose and response."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from analysis import labels
from analysis.contrasts import Step, estimates, model
from analysis.designs import Design
from analysis.factorial import OUTCOMES, corrected, effect_row
from analysis.statistics import Estimate, mean_estimate
from analysis.table import Column, Table

_PAIRED = (
    "Paired over the seeds of the randomised blocks, 95 % t intervals; time as a ratio, below 1 is faster. p: t test, "
    "Holm over this table. All cells keep the whole arm's chosen setting and recipe but for what is named."
)


def ablation_tables(found: Sequence[Design]) -> list[Table]:
    """Those with rows are for the report."""
    return [component_table(found), effect_table(found), dose_table(found)]


def component_table(found: Sequence[Design]) -> Table:
    """Leave one out and add one in."""
    rows: dict[tuple[str, ...], dict[str, Any]] = {}
    for design in found:
        steps = _steps(design)
        for component, step, after, before in steps:
            key = {"arm": design.title, "component": component, "step": step}
            rows.setdefault(tuple(key.values()), effect_row(key, design.difference(after, before)))
    columns = (Column("arm", "arm"), Column("component", "component"), Column("step", "step"), *OUTCOMES)
    caption = (
        "One component at a time: accuracy after the step minus before, time after over before. A component earns its "
        f"place if removing it makes things worse. {_PAIRED} Only the baseline has a recipe of its own."
    )
    return corrected("ablate_components", "Ablation: components out and in", caption, columns, list(rows.values()))


def _steps(design: Design) -> list[tuple[str, str, str, str]]:
    """(component, step, cell after, cell before) of a design over components."""
    if design.kind not in ("leave_one_out", "add_one_in"):
        return []
    out = [("all", f"{design.arm} against {design.baseline}", design.arm, design.baseline)]
    plain = next((name for name, levels in design.cells if levels and not any(levels.values())), None)
    for name, levels in design.cells:
        on, off = ([c for c, level in levels.items() if bool(level) is wanted] for wanted in (True, False))
        if design.kind == "leave_one_out" and len(off) == 1:
            out.append((off[0], f"removed from {design.arm}", name, design.arm))
        elif design.kind == "add_one_in" and len(on) == 1 and plain is not None:
            out.append((on[0], "added to backprop with the arm’s recipe", name, plain))
    return out


def effect_table(found: Sequence[Design]) -> Table:
    """Main effects and two-factor interactions of the factorial designs."""
    rows, notes = [], []
    for design in found:
        rows += _effects(design) if design.kind == "factorial" else []
        notes += [f" {design.title}: {design.note}."] if design.note and design.kind == "factorial" else []
    columns = (Column("arm", "arm"), Column("effect", "effect"), Column("mixed", "or", null=""), *OUTCOMES)
    caption = (
        "Least squares on the coded design, within each seed. Main effect: in minus out, or the level behind the arrow "
        "minus the first, averaged over all other factors. Interaction (×): how much more one does where the other is "
        "in or at its later level; 0 points and 1.00× where effects simply add up (times: multiply). "
        f"{_PAIRED} “Or” names effects that the fraction cannot tell from this one.{''.join(dict.fromkeys(notes))}"
    )
    table = corrected("ablate_factorial", "Ablation: main effects and interactions", caption, columns, rows)
    return table.without_empty("mixed")


def _effects(design: Design) -> list[dict[str, Any]]:
    factors = list(design.factors.items())
    cells = [
        (name, [own.index(levels[factor]) for factor, own in factors])
        for name, levels in design.cells
        if all(levels.get(factor) in own for factor, own in factors)
    ]
    if not cells or not factors:
        return []
    made = model(np.array([places for _, places in cells]), [len(own) for _, own in factors])
    outcomes = np.stack([design.outcomes(name) for name, _ in cells])  # (cells, 2, seeds)
    both = [estimates(made, outcomes[:, i]) for i in range(2)]
    rows = []
    for steps in made.effects:
        others = [_effect_name(other, factors) for other in made.aliases.get(steps, [])]
        key = {"arm": design.title, "effect": _effect_name(steps, factors), "mixed": "; ".join(others) or None}
        rows.append(effect_row(key, [effects[steps] for effects in both]))
    return rows


def _effect_name(steps: tuple[Step, ...], factors: list[tuple[str, list[Any]]]) -> str:
    """`ldb`, `recipe.lr 0.1 → 0.2`, `ldb × recipe.lr`."""
    out = []
    for factor, level in steps:
        name, levels = factors[factor]
        switch = levels == [False, True] and not name.startswith(("method.", "recipe."))
        shown = not switch and (len(steps) == 1 or len(levels) > 2)
        arrow = f" {labels.plain(levels[0])} → {labels.plain(levels[level])}" if shown else ""
        out.append(name.removeprefix("method.") + arrow)
    return " × ".join(out)


@dataclass(frozen=True, eq=False)
class Dose:
    """One field of one arm at several levels, each against the baseline.

    Attributes:
        chosen: number of the level at which the whole arm was run, None where it is none of them.
        accuracy, time: per level, accuracy minus the baseline's and time over the baseline's.
    """

    design: Design
    factor: str
    levels: list[Any]
    chosen: int | None
    accuracy: list[Estimate]
    time: list[Estimate]

    @property
    def is_number(self) -> bool:
        return all(isinstance(v, int | float) and not isinstance(v, bool) for v in self.levels)


def doses(found: Sequence[Design]) -> list[Dose]:
    """Every field of the dose-response designs, its levels in order."""
    out = []
    for design in found:
        for factor in design.factors if design.kind == "dose_response" else ():
            cells = [(levels[factor], name) for name, levels in design.cells if factor in levels]
            if all(isinstance(level, int | float) for level, _ in cells):
                cells.sort(key=lambda cell: cell[0])
            effects = [design.difference(name, design.baseline) for _, name in cells]
            names = [name for _, name in cells]
            out.append(
                Dose(
                    design,
                    factor.removeprefix("method."),
                    [level for level, _ in cells],
                    names.index(design.arm) if design.arm in names else None,
                    [mean_estimate(accuracy) for accuracy, _ in effects],
                    [mean_estimate(seconds).exp() for _, seconds in effects],
                )
            )
    return out


def dose_table(found: Sequence[Design]) -> Table:
    """Every level of every field against the baseline."""
    rows = []
    for design in found:
        for dose in doses([design]):
            cells = {labels.canonical(levels[f]): name for name, levels in design.cells for f in levels
                     if f.removeprefix("method.") == dose.factor}  # fmt: skip
            for i, level in enumerate(dose.levels):
                shown = labels.plain(level) + (" (chosen)" if i == dose.chosen else "")
                key = {"arm": design.title, "field": dose.factor, "level": shown}
                rows.append(effect_row(key, design.difference(cells[labels.canonical(level)], design.baseline)))
    columns = (Column("arm", "arm"), Column("field", "field"), Column("level", "level"), *OUTCOMES)
    caption = (
        "One field at a time, all else at the arm’s chosen setting: accuracy minus the baseline’s, time over the "
        f"baseline’s, which has a recipe of its own. {_PAIRED}"
    )
    return corrected("ablate_dose", "Ablation: dose and response", caption, columns, rows)
