"""What each column of a record may hold; what is wrong is said with file and line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis import columns
from analysis.errors import ReportError
from analysis.sources import Batch, has_odd_characters, printable

MAX_DEPTH = 30  # of nested settings
_WHOLE = (-(2.0**53), 2.0**53)
Where = Callable[[int], str]
_PLAIN = frozenset((float, int, type(None)))


def checked_run(batch: Batch, index: int) -> dict[str, Any]:
    """The columns of a run that the report reads, except its numbers, which are checked together.

    Raises:
        ReportError: a value is of the wrong type or not one of those allowed.
    """
    data = batch.records[index]
    if has_odd_characters(batch.lines[index]):
        data = printable(data)
    out = {name: data.get(name) for name in columns.RUN_NUMBERS}
    for names, kind in ((columns.RUN_TEXTS, str), (columns.RUN_FLAGS, bool), (columns.RUN_MAPPINGS, dict)):
        for name in names:
            value = data.get(name)
            if value is None:
                value = kind()
            elif not isinstance(value, kind):
                raise ReportError(f"{batch.where(index)}: {name} is {value!r:.80}, expected {kind.__name__}")
            out[name] = value
    for name, allowed in _ALLOWED.items():
        if out[name] not in allowed:
            raise ReportError(
                f"{batch.where(index)}: {name} is {out[name]!r:.80}, expected one of {', '.join(allowed)}"
            )
    if not out["run_key"]:
        raise ReportError(f"{batch.where(index)}: run_key is empty; every run needs its key")
    if batch.lines[index].count(b"{") + batch.lines[index].count(b"[") > MAX_DEPTH:
        for name in columns.RUN_MAPPINGS:
            if _is_deeper(out[name], MAX_DEPTH):
                raise ReportError(f"{batch.where(index)}: {name} is nested more than {MAX_DEPTH} deep")
    ended_at = data.get("ended_at")
    out["ended_at"] = ended_at if isinstance(ended_at, str) else ""
    return out


_ALLOWED = {"status": columns.STATUSES, "phase": columns.PHASES, "role": columns.ROLES}


def _is_deeper(value: Any, levels: int) -> bool:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels < 0 or any(_is_deeper(item, levels - 1) for item in items if isinstance(item, dict | list))


def checked_sweep(batch: Batch, index: int) -> dict[str, Any]:
    """The columns of a sweep that the report reads, none of them null but those it does not know."""
    data, where = printable(batch.records[index]), batch.where(index)
    sweep = {column: data.get(column) for column in columns.READ["sweep"]}
    for column, kind in (("arms", str), ("seeds", int), ("targets", int | float)):
        values = sweep[column] or []
        if not isinstance(values, list) or not all(isinstance(v, kind) and not isinstance(v, bool) for v in values):
            raise ReportError(
                f"{where}: {column} is {values!r:.80}, expected a list of {getattr(kind, '__name__', 'numbers')}"
            )
        sweep[column] = values
    for target in sweep["targets"]:
        if not 0 <= target <= 1:
            raise ReportError(f"{where}: targets has {target!r:.80}, expected fractions in [0, 1]")
    sweep["ablations"] = _checked_ablations(sweep["ablations"], where)
    for column in ("search_trials", "measure_cells", "ablate_cells"):
        value = sweep[column] or 0
        if not isinstance(value, int) or not 0 <= value <= _WHOLE[1]:
            raise ReportError(f"{where}: {column} is {value!r:.80}, expected a whole number of at least 0")
        sweep[column] = int(value)
    for column in ("sweep", "started_at"):
        sweep[column] = str(sweep[column] or "")
    return sweep


def _checked_ablations(value: Any, where: str) -> list[dict[str, Any]]:
    """The column `ablations` of a sweep record; null is none.

    Raises:
        ReportError: it does not say which run is which cell.
    """
    kinds = {"arm": str, "design": str, "baseline": str, "factors": dict, "seeds": list, "cells": list, "note": str}
    found = [] if value is None else value
    for data in found if isinstance(found, list) else [found]:
        ok = isinstance(data, dict) and all(isinstance(data.get(name), kind) for name, kind in kinds.items())
        ok = ok and all(isinstance(levels, list) and levels for levels in data["factors"].values())
        ok = ok and all(isinstance(seed, int) for seed in data["seeds"])
        if not ok or not all(_is_cell(cell) for cell in data["cells"]):
            raise ReportError(f"{where}: ablations has {data!r:.80}, expected arm, design, factors, seeds and cells")
    return list(found)


def _is_cell(cell: Any) -> bool:
    return isinstance(cell, dict) and isinstance(cell.get("arm"), str) and isinstance(cell.get("levels"), dict)


def checked_numbers(name: str, values: Sequence[Any], where: Where, unknown: Counter[str]) -> NDArray[Any]:
    """A column of numbers; null is NaN, and so is what no measurement can give, which `unknown` counts.

    Args:
        values: as parsed.
        where: file and line of the value at an index.

    Returns:
        (n,) float64, or int64 where the column holds whole numbers.

    Raises:
        ReportError: a value is no number or outside of its range.
    """
    if not set(map(type, values)) <= _PLAIN:
        i = next(i for i, value in enumerate(values) if type(value) not in _PLAIN)
        raise ReportError(f"{where(i)}: {name} is {values[i]!r:.80}, expected a number or null")
    try:
        array = np.array(values, dtype=float)
    except OverflowError:
        array = np.array([_as_float(value) for value in values])
    if name in columns.WHOLE:
        odd = ~((array == np.floor(array)) & (array >= _WHOLE[0]) & (array <= _WHOLE[1]))
        _refuse(odd, array, name, "expected a whole number", where)
        return array.astype("int64")
    is_time = name.endswith("_seconds")
    absurd = np.abs(array) > (columns.MAX_SECONDS if is_time else columns.MAX_NUMBER)
    if absurd.any():
        unknown[name] += int(absurd.sum())
        array[absurd] = np.nan
    if name in columns.ACCURACIES:
        _refuse((array < 0) | (array > 1), array, name, "expected a fraction in [0, 1]", where)
    elif is_time:
        _refuse(array < 0, array, name, "expected a time of at least 0", where)
    return array


def _refuse(wrong: NDArray[np.bool_], array: NDArray[Any], name: str, expected: str, where: Where) -> None:
    if wrong.any():
        i = int(np.flatnonzero(wrong)[0])
        value = "null" if np.isnan(array[i]) else f"{array[i]:g}"
        raise ReportError(f"{where(i)}: {name} is {value}, {expected}")


def _as_float(value: float | int | None) -> float:
    try:
        return float("nan") if value is None else float(value)
    except OverflowError:
        return float("inf")
