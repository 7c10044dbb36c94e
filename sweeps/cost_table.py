"""How `fastbp-sweep plan` shows what a sweep will cost."""

from __future__ import annotations

import math

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sweeps.estimate import Cost, Estimate


def show_estimate(console: Console, found: Estimate) -> None:
    """Print device time per part and arm, its total in device-hours, and what the numbers rest on."""
    console.print(cost_table(found))
    hours = " + ".join(f"{part} {_seconds(costs) / 3600:.3g}" for part, costs in found.costs.items())
    parts = f" ({hours})" if len(found.costs) > 1 else ""
    lines = [
        f"estimate: {found.seconds / 3600:.3g} device-hours{parts}; {duration(found.wall_seconds)} on this machine"
    ]
    lines.append(f"measured here and now on {' and '.join(found.devices)}: a few steps of each arm and control, alone.")
    if found.foreign:
        lines.append("The sweep asks for GPUs and this machine has none: other hardware takes another time.")
    lines.append("Searched fields stand at mid-range; other settings, retries and Ray's own start change it.")
    if found.stops:
        lines.append("Early stopping is not counted: the search may take less.")
    lines += [f"not timed, and not counted: {sentence}" for sentence in found.failed]
    for line in lines:
        console.print(escape(line), highlight=False)


def cost_table(found: Estimate) -> Table:
    """Arms by parts: runs and device time."""
    table = Table(title="device time, estimated")
    table.add_column("arm")
    table.add_column("train an epoch", justify="right")
    for part in found.costs:
        table.add_column(f"{part} runs", justify="right")
        table.add_column("time", justify="right")
    table.add_column("total", justify="right")
    arms = list(dict.fromkeys(arm for costs in found.costs.values() for arm in costs))
    for arm in arms:
        costs = [of.get(arm, Cost()) for of in found.costs.values()]
        epoch = duration(found.epoch_seconds[arm]) if arm in found.epoch_seconds else ""
        table.add_row(escape(arm), epoch, *_cells(costs), duration(sum(c.seconds for c in costs)))
    table.add_section()
    sums = [Cost(sum(c.runs for c in of.values()), _seconds(of)) for of in found.costs.values()]
    table.add_row("all", "", *_cells(sums), duration(found.seconds), style="bold")
    return table


def duration(seconds: float) -> str:
    """Three figures in the unit a person would use.

    >>> [duration(s) for s in (0.0421, 7.2, 95, 400, 30000, 900000)]
    ['42 ms', '7.2 s', '95 s', '6.7 min', '8.3 h', '250 h']
    """
    if seconds < 0.1:
        return f"{seconds * 1e3:.2g} ms"
    for unit, size, limit in (("s", 1, 120), ("min", 60, 120 * 60), ("h", 3600, math.inf)):
        if seconds < limit:
            value = seconds / size
            return f"{value:.0f} {unit}" if value >= 20 else f"{value:.1f} {unit}"
    raise AssertionError(seconds)


def _cells(costs: list[Cost]) -> list[str]:
    return [text for cost in costs for text in ((str(cost.runs), duration(cost.seconds)) if cost.runs else ("", ""))]


def _seconds(costs: dict[str, Cost]) -> float:
    return sum(cost.seconds for cost in costs.values())
