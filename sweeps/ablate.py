"""Ablations: an arm at its chosen setting, with components taken out or fields changed; pure expansion into cells.

A component is one method of the combination. A field is a dotted knob name as in the arms: `method.inner.drop_rate`,
`recipe.lr`. Whatever is not changed stays as it was chosen for the whole arm, its recipe included.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from itertools import product
from math import prod
from typing import Any

from fastbp.knobs import nearest, set_knobs
from fastbp.method import Method, nest, parts
from fastbp.recipe import Recipe
from sweeps.arms import Arm
from sweeps.fraction import ROMAN, Fraction, regular_fraction
from sweeps.source import Key
from sweeps.spec import AblatePart

Levels = dict[str, Any]  # factor to level; of a component false (out) or true (in)
SWITCH = [False, True]


@dataclass(frozen=True)
class Cell:
    """One setting of an ablation.

    Attributes:
        name: of the run's arm: the whole arm's, the anchor's, or such as `both/without-ldb`.
        levels: of the factors; empty where the cell stands in the design for itself alone.
    """

    name: str
    method: Method
    recipe: Recipe
    levels: Levels

    @property
    def setting(self) -> str:
        return json.dumps([self.method.to_dict(), self.recipe.to_dict()], sort_keys=True)


@dataclass(frozen=True)
class Ablation:
    """One ablation of one arm, expanded.

    Attributes:
        factors: to their levels, low first.
        cells: the anchor, the whole arm, then those of the design; a name that comes twice is run once.
        note: what a fraction can tell apart.
    """

    arm: str
    design: str
    baseline: str
    factors: dict[str, list[Any]]
    cells: list[Cell]
    seeds: list[int]
    note: str

    def to_dict(self) -> dict[str, Any]:
        """As in `fastbp.record.SweepRecord.ablations`."""
        cells = [{"arm": cell.name, "levels": cell.levels} for cell in self.cells]
        names = ("arm", "design", "baseline", "factors", "seeds", "note")
        return {name: getattr(self, name) for name in names} | {"cells": cells}


def expand(part: AblatePart, whole: Cell, anchor: Cell, seeds: list[int], known: dict[str, str]) -> Ablation:
    """The cells of an ablation without `faults`.

    Args:
        whole, anchor: the arm and the baseline at their chosen settings.
        seeds: of the part, or of the measure part.
        known: setting to the name under which the sweep's ablations run it already; extended here.
    """
    factors = factors_of(part, whole.method)
    added, note = design_levels(part, whole.method, factors)
    if part.design == "dose_response":  # the whole arm is a dose of each factor too
        own = {name: _read(whole, name) for name in factors}
        added += [{name: level} for name, level in own.items() if level not in factors[name]]
    cells = [anchor, whole]
    for levels in added:
        method, recipe = _changed(whole, levels)
        cell = Cell(f"{whole.name}/{_suffix(levels, components(whole.method))}", method, recipe, levels)
        cells.append(replace(cell, name=known.setdefault(cell.setting, cell.name)))
    return Ablation(part.arm, part.design, anchor.name, factors, cells, seeds, note)


def design_levels(part: AblatePart, method: Method, factors: dict[str, list[Any]]) -> tuple[list[Levels], str]:
    """The levels of the cells that a design adds to anchor and whole arm, and what a fraction can tell apart."""
    every = components(method)
    whole, plain = dict.fromkeys(every, True), dict.fromkeys(every, False)
    if part.design == "leave_one_out":
        return [whole, *(whole | {out: False} for out in factors)], ""
    if part.design == "add_one_in":
        return [plain, *(plain | {only: True} for only in factors), whole], ""
    if part.design == "dose_response":
        return [{name: level} for name, levels in factors.items() for level in levels], ""
    if prod(map(len, factors.values())) <= part.max_cells:
        return [dict(zip(factors, row, strict=True)) for row in product(*factors.values())], ""
    found = regular_fraction(len(factors), part.max_cells)
    assert found is not None, "`faults` refuses such a part"
    rows = [
        {name: levels[high] for (name, levels), high in zip(factors.items(), row, strict=True)} for row in found.rows
    ]
    return rows, _fraction_note(found, list(factors))


def _fraction_note(found: Fraction, names: list[str]) -> str:
    clear = {3: "main effects are mixed with two-factor interactions", 4: "main effects are clear of two-factor "
             "interactions, which are mixed with one another"}  # fmt: skip
    words = ", ".join(f"{names[i]} = {' × '.join(names[j] for j in of)}" for i, of in found.generators.items())
    share = f"1/{2 ** len(found.generators)} fraction of 2^{len(names)}, resolution {ROMAN[min(found.resolution, 8)]}"
    return f"{share} ({words}): " + clear.get(
        found.resolution, "main effects and two-factor interactions are clear of one another"
    )


def components(method: Method) -> list[str]:
    """Names of the methods of a combination, outermost first."""
    return [part.name for part in parts(method)]


def factors_of(part: AblatePart, method: Method) -> dict[str, list[Any]]:
    """Factor to its levels: the arm's components where the part names none."""
    named = part.factors or dict.fromkeys(components(method))
    return {name: SWITCH if levels is None or name in components(method) else levels for name, levels in named.items()}


def faults(part: AblatePart, arm: Arm) -> Iterator[tuple[Key, str]]:
    """What is wrong with an ablation of this arm, each with its place inside of the part."""
    method, recipe = arm.at({})
    own, named = components(method), part.factors or {}
    where = f"ablate.factors of arm {arm.name}"
    if twice := [name for name, count in Counter(own).items() if count > 1]:
        yield ("arm",), f"ablate.arm = {arm.name!r}: {twice[0]} is in it twice, so that its name does not say which"
    elif not own and part.design != "dose_response":
        yield ("arm",), f"ablate.arm = {arm.name!r}: plain backprop has no components; name an arm with methods"
    elif part.design == "dose_response" and not named:
        yield ("factors",), "ablate.factors: dose_response needs fields with levels: {method.drop_rate: [0.0, 0.5]}"
    for name, levels in named.items():
        at = ("factors", name)
        if name in own:
            if part.design == "dose_response":
                yield at, f"{where}: {name} is a component; dose_response takes fields such as method.drop_rate"
            elif levels is not None and (sorted(map(str, levels)) != ["False", "True"]):
                yield at, f"{where}: {name} = {levels!r}: a component has the levels [off, on], or none given"
        elif part.design in ("leave_one_out", "add_one_in") or name.split(".")[0] not in ("method", "recipe"):
            valid = [*own, *(_fields(arm) if part.design in ("dose_response", "factorial") else ())]
            yield (
                at,
                f"{where}: no component{' or field' if len(valid) > len(own) else ''} {name!r}{nearest(name, valid)}",
            )
        elif levels is None or len(levels) < (1 if part.design == "dose_response" else 2):
            yield at, f"{where}: {name} needs a list of levels"
        elif len({json.dumps(level) for level in levels}) < len(levels):
            yield at, f"{where}: {name} has a level twice"
        elif any(path.startswith(f"{name}.") for path in _fields(arm)):
            yield at, f"{where}: {name} is a whole method; name one of its fields, such as {name}.drop_rate"
        else:
            yield from _refused(name, levels, method, recipe, where)
    if part.design == "factorial":
        yield from _unplannable(part, method)


def _refused(name: str, levels: list[Any], method: Method, recipe: Recipe, where: str) -> Iterator[tuple[Key, str]]:
    """Levels that the method or the recipe refuses."""
    for i, level in enumerate(levels):
        try:
            _changed(Cell("", method, recipe, {}), {name: level})
        except (TypeError, ValueError) as error:
            yield ("factors", name, i), f"{where}: {name} = {level!r}: {error}"


def _unplannable(part: AblatePart, method: Method) -> Iterator[tuple[Key, str]]:
    """Factors of a factorial that cannot be crossed, or not in so few cells."""
    factors = factors_of(part, method)
    prefix = "method."
    for name in components(method):
        inside = [f for f in factors if f.startswith(prefix) and "." not in f.removeprefix(prefix)]
        if name in factors and inside:
            yield (
                ("factors", inside[0]),
                f"ablate.factors: {inside[0]} means nothing where {name} is out; drop one of them",
            )
        prefix += "inner."
    full = prod(map(len, factors.values()))
    many = [name for name, levels in factors.items() if len(levels) > 2]
    if full > part.max_cells and many:
        fix = f"give {', '.join(many)} two levels each, name fewer factors, or set max_cells: {full}"
        yield ("max_cells",), f"ablate.max_cells = {part.max_cells}: all combinations are {full} cells, and only " \
            f"two-level factors have a regular fraction; {fix}"  # fmt: skip
    elif full > part.max_cells and regular_fraction(len(factors), part.max_cells) is None:
        need = 1 << len(factors).bit_length()
        yield ("max_cells",), f"ablate.max_cells = {part.max_cells}: {len(factors)} factors need at least " \
            f"{min(need, full)} cells; set max_cells: {min(need, full)}, or name fewer factors"  # fmt: skip


def _changed(whole: Cell, levels: Levels) -> tuple[Method, Recipe]:
    """Method and recipe with some fields set and then some components taken out."""
    of: dict[str, Levels] = {"method": {}, "recipe": {}}
    for name, level in levels.items():
        kind, _, path = name.partition(".")
        if name not in components(whole.method):
            of[kind][path] = tuple(level) if isinstance(level, list) else level
    method, recipe = set_knobs(whole.method, of["method"]), set_knobs(whole.recipe, of["recipe"])
    return nest(part for part in parts(method) if levels.get(part.name, True)), recipe


def _read(whole: Cell, name: str) -> Any:
    value: Any = {"method": whole.method.to_dict(), "recipe": whole.recipe.to_dict()}
    for part in name.split("."):
        value = value[part]
    return value


def _suffix(levels: Levels, every: list[str]) -> str:
    """What stands behind the arm's name: `without-ldb`, `only-dbp`, `plain`, `drop_rate=0.25`."""
    on = [name for name in every if levels.get(name, True)]
    off = [name for name in every if name not in on]
    out = f"only-{on[0]}" if len(on) == 1 < len(off) else f"without-{'+'.join(off)}" if on else "plain"
    texts = {name: level if isinstance(level, str) else json.dumps(level) for name, level in levels.items()}
    changed = [f"{name.removeprefix('method.')}={text}" for name, text in texts.items() if name not in every]
    return ",".join([*([out] if off else []), *changed])


def _fields(arm: Arm) -> list[str]:
    """Dotted names of all fields of the arm's method and recipe."""

    def walk(value: Any, prefix: str) -> Iterator[str]:
        for f in fields(value):
            yield f"{prefix}.{f.name}"
            if is_dataclass(inner := getattr(value, f.name)):
                yield from walk(inner, f"{prefix}.{f.name}")

    return [*walk(arm.method, "method"), *walk(arm.recipe, "recipe")]
