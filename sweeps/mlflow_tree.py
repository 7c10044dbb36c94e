"""The records of one sweep as the tree that MLflow shows: sweep -> cell -> run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from fastbp.record import EpochRecord, Record, RunRecord, SweepRecord
from sweeps import mlflow_view as view


@dataclass
class History:
    """One run as the records tell it.

    Attributes:
        run: the newest state of its newest attempt.
        epochs: of that attempt; where it continued from a checkpoint, with the epochs before.
        number: among the search trials of its arm, from 0.
        earlier: the epochs of the attempt before.
    """

    run: RunRecord
    epochs: list[EpochRecord] = field(default_factory=list)
    number: int = 0
    earlier: list[EpochRecord] = field(default_factory=list)

    def add_epoch(self, record: EpochRecord) -> None:
        before = self.epochs or self.earlier
        self.epochs = [epoch for epoch in before if epoch.epoch < record.epoch] + [record]


@dataclass
class Tree:
    """The records of one sweep, by run_key in order of first appearance."""

    sweep: SweepRecord
    runs: dict[str, History] = field(default_factory=dict)

    @classmethod
    def of(cls, records: Iterable[Record]) -> Tree:
        tree = cls(SweepRecord())
        for record in records:
            if isinstance(record, SweepRecord):
                tree.sweep = record
            elif isinstance(record, RunRecord):
                tree._add_run(record)
            elif (known := tree.runs.get(record.run_key)) is not None and known.run.attempt == record.attempt:
                known.add_epoch(record)
        return tree

    def _add_run(self, record: RunRecord) -> None:
        known = self.runs.get(record.run_key)
        if known is None:
            number = sum(h.run.phase == record.phase and h.run.arm == record.arm for h in self.runs.values())
            known = self.runs[record.run_key] = History(record, number=number)
        elif known.run.attempt != record.attempt:
            known.earlier, known.epochs = known.epochs, []
        known.run = record

    def cells(self) -> dict[str, list[History]]:
        """Cell name to its runs: `search ldb`, `ldb`, `ldb control`."""
        cells: dict[str, list[History]] = {}
        for history in self.runs.values():
            cells.setdefault(view.cell_name(history.run), []).append(history)
        return cells
