"""What a sweep has already done, read back from its records."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from fastbp.config import RunConfig
from fastbp.record import Record, RunRecord, SweepRecord
from sweeps.choose import chosen_trials

DONE = (
    "finished",
    "diverged",
    "stopped",
)  # ends that are results; failed and interrupted runs are tried again


@dataclass
class Ledger:
    """The newest state of every run of a sweep.

    Attributes:
        runs: by run_key, in the order of their first line.
        attempts: by run_key, the number of attempts on record.
        sweep: the newest sweep record, if any.
        again: keys of runs that are to run once more although they have a result.
    """

    runs: dict[str, RunRecord] = field(default_factory=dict)
    attempts: dict[str, int] = field(default_factory=dict)
    sweep: SweepRecord | None = None
    again: set[str] = field(default_factory=set)
    _mappings: dict[str, dict[str, Any]] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, records: Iterable[Record]) -> Ledger:
        ledger = cls()
        for record in records:
            ledger.add(record)
        return ledger

    def add(self, record: Record) -> None:
        if isinstance(record, RunRecord):
            for name in ("task", "device", "software"):  # one object for the thousands of runs that are equal there
                value = getattr(record, name)
                setattr(record, name, self._mappings.setdefault(json.dumps(value, sort_keys=True), value))
            self.again.discard(record.run_key)
            self.runs[record.run_key] = record
            self.attempts[record.run_key] = max(self.attempts.get(record.run_key, 0), record.attempt + 1)
        elif isinstance(record, SweepRecord):
            self.sweep = record

    def done(self, key: str) -> RunRecord | None:
        """The result of a run that need not run again."""
        record = self.runs.get(key)
        return record if record and record.status in DONE and key not in self.again else None

    @property
    def contaminated(self) -> list[RunRecord]:
        """Results of measured cells that shared their device, whose times say nothing."""
        timed = (r for r in self.runs.values() if r.phase in ("measure", "ablate"))
        return [r for r in timed if r.status == "finished" and not r.exclusive]

    @property
    def spoiled(self) -> set[str]:
        """Keys of all results in blocks with a contaminated one: what is compared is timed together."""
        blocks = {(record.phase, record.block) for record in self.contaminated}
        return {key for key, r in self.runs.items() if (r.phase, r.block) in blocks and r.status in DONE}

    def of_phase(self, phase: str, arm: str | None = None) -> list[RunRecord]:
        return [r for r in self.runs.values() if r.phase == phase and arm in (None, r.arm)]

    def best_trial(self, arm: str) -> RunRecord | None:
        """The arm's chosen search trial: best final validation accuracy, then fewer examples, then first."""
        return next(iter(self.best_trials(arm, 1)), None)

    def best_trials(self, arm: str, most: int) -> list[RunRecord]:
        """The arm's chosen search trials, the most accurate first; see `chosen_trials`."""
        return chosen_trials(self.of_phase("search", arm), most)


def config_of(record: RunRecord) -> RunConfig:
    """The configuration of a recorded run."""
    names = ("task", "recipe", "method", "seed", "sweep", "phase", "arm", "role", "block")
    return RunConfig.from_dict({name: getattr(record, name) for name in names})
