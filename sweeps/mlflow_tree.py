"""The records of one sweep as the tree that MLflow shows: sweep -> cell -> run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from fastbp.record import EpochRecord, Record, RunRecord, SweepRecord, config_key
from sweeps import mlflow_view as view
from sweeps.ledger import DONE


class Forgotten(Exception):
    """Something is needed of a run that was let go; the records have it."""


@dataclass
class History:
    """One run as the records tell it.

    Attributes:
        run: the newest state of its newest attempt; of a forgotten run only what means and counts need.
        epochs: of that attempt; where it continued from a checkpoint, with the epochs before.
        cell: name of its cell.
        number: among the search trials of its arm, from 0.
        earlier: the epochs of the attempt before.
        forgotten: how many epochs there were when the run was let go; null as long as it is known in full.
    """

    run: RunRecord
    epochs: list[EpochRecord] = field(default_factory=list)
    cell: str = ""
    number: int = 0
    earlier: list[EpochRecord] = field(default_factory=list)
    forgotten: int | None = None

    @property
    def epoch_count(self) -> int:
        return len(self.epochs) if self.forgotten is None else self.forgotten

    def add_epoch(self, record: EpochRecord) -> None:
        if not self.epochs:
            self.epochs = list(self.earlier)
        while self.epochs and self.epochs[-1].epoch >= record.epoch:
            self.epochs.pop()
        self.epochs.append(record)

    def forget(self) -> None:
        """Let go of what a written result needs no more; a run that may be tried again stays whole."""
        if self.run.status in DONE and self.forgotten is None:
            self.forgotten, self.epochs, self.earlier = len(self.epochs), [], []
            self.run = replace(self.run, task={}, recipe={}, method={}, device={}, software={})


@dataclass
class Tree:
    """The records of one sweep.

    Attributes:
        runs: by run_key, in order of first appearance.
        cells: cell name (`search ldb`, `ldb`, `ldb control`) to its runs.
        changed: run_keys about which something was added since `changed` was last emptied, in order.
        settings: arm and role, as a name, to the keys of the settings it was measured at, numbered from 1.
    """

    sweep: SweepRecord
    runs: dict[str, History] = field(default_factory=dict)
    cells: dict[str, list[History]] = field(default_factory=dict)
    changed: dict[str, None] = field(default_factory=dict)
    settings: dict[str, dict[str, int]] = field(default_factory=dict)

    @classmethod
    def of(cls, records: Iterable[Record]) -> Tree:
        tree = cls(SweepRecord())
        for record in records:
            tree.add(record)
        return tree

    def add(self, record: Record) -> None:
        """Take in the next record.

        Raises:
            Forgotten: it goes on with a run that was let go.
        """
        if isinstance(record, SweepRecord):
            self.sweep = record
            return
        known = self.runs.get(record.run_key)
        if known is not None and known.forgotten is not None:
            raise Forgotten
        if isinstance(record, RunRecord):
            self._add_run(record, known)
        elif known is not None and known.run.attempt == record.attempt:
            known.add_epoch(record)
        else:
            return
        self.changed[record.run_key] = None

    def _add_run(self, record: RunRecord, known: History | None) -> None:
        if known is None:
            name = self._cell_name(record)
            cell = self.cells.setdefault(name, [])
            known = self.runs[record.run_key] = History(record, cell=name, number=len(cell))
            cell.append(known)
        elif known.run.attempt != record.attempt:
            known.earlier, known.epochs = known.epochs or known.earlier, []
        known.run = record

    def changed_cells(self) -> dict[str, list[History]]:
        """Cell name to those of its runs that changed, in order of first appearance."""
        cells: dict[str, list[History]] = {}
        for key in self.changed:
            cells.setdefault(self.runs[key].cell, []).append(self.runs[key])
        return cells

    def _cell_name(self, run: RunRecord) -> str:
        """An arm that is measured at several settings has a cell for each, numbered from the second on."""
        name = view.cell_name(run)
        if run.phase == "search":
            return name
        places = self.settings.setdefault(name, {})
        place = places.setdefault(config_key({"method": run.method, "recipe": run.recipe}), len(places) + 1)
        return name if place == 1 else f"{name} {place}"
