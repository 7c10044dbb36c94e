"""The ablations that a sweep planned: which of its runs is which cell of which design."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis.load import Results
from analysis.measured import Arm, Group


@dataclass(frozen=True, eq=False)
class Design:
    """One ablation of one arm, and the group in which its cells were run.

    Attributes:
        kind: leave_one_out, add_one_in, dose_response or factorial.
        factors: to their levels; a component has false (out) and true (in).
        cells: (name of the run's arm, levels); anchor and whole arm first, without levels.
    """

    group: Group
    sweep: str
    arm: str
    kind: str
    baseline: str
    factors: dict[str, list[Any]]
    cells: list[tuple[str, dict[str, Any]]]
    note: str

    @property
    def title(self) -> str:
        """The arm's name, with the sweep's where the group has several."""
        several = len({arm.sweep for arm in self.group.arms}) > 1
        return f"{self.sweep}/{self.arm}" if several else self.arm

    def runs(self, name: str) -> Arm | None:
        """The runs of a cell; None where none was started."""
        return next((arm for arm in self.group.arms if (arm.sweep, arm.arm) == (self.sweep, name)), None)

    @property
    def family(self) -> str:
        """What the whole arm is drawn as."""
        found = self.runs(self.arm)
        return next((arm.family for arm in (found, *self.group.arms) if arm is not None), "unknown")

    def outcomes(self, name: str) -> NDArray[np.float64]:
        """(2, seeds) accuracy and log seconds of a cell, NaN for a seed without a finished run."""
        seeds, arm = self.group.seeds, self.runs(name)
        if arm is None:
            return np.full((2, len(seeds)), np.nan)
        with np.errstate(divide="ignore", invalid="ignore"):
            found = np.stack([arm.at(self.group.accuracy_column, seeds), np.log(arm.at("train_seconds", seeds))])
        return np.where(np.isfinite(found), found, np.nan)

    def difference(self, after: str, before: str) -> NDArray[np.float64]:
        """(2, seeds) what changes from one cell to another."""
        return self.outcomes(after) - self.outcomes(before)


def designs(group: Group, results: Results) -> Iterator[Design]:
    """The ablations of which the group has runs."""
    if group.ablated is None:
        return
    sweeps = {arm.sweep for arm in group.ablated.arms}
    for sweep in results.sweeps:
        for data in sweep["ablations"] if sweep["sweep"] in sweeps else ():
            cells = [(cell["arm"], cell["levels"]) for cell in data["cells"]]
            own = (data["arm"], data["design"], data["baseline"], data["factors"], cells, data["note"])
            yield Design(group.ablated, sweep["sweep"], *own)
