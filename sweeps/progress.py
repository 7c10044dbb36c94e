"""What a log sees while a sweep runs, one line per ended run; and the tables of `plan` and `status`.

A terminal gets the live table of `sweeps.live` instead, through the same calls.
"""

from __future__ import annotations

from dataclasses import fields

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastbp.knobs import Choice, Domain
from fastbp.method import Method
from fastbp.record import EpochRecord, RunRecord
from sweeps.arms import Arm
from sweeps.ledger import Ledger
from sweeps.plan import Plan
from sweeps.spec import MeasurePart


class Progress:
    """Prints one line per ended run: phase, arm, how many of how many, accuracy, training time."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._planned: dict[str, int] = {}
        self._done: dict[str, set[str]] = {}
        self._best: dict[str, float] = {}

    def phase(self, name: str, planned: dict[str, int], ledger: Ledger) -> None:
        """A phase begins, in which every arm has `planned` runs, some of which may be done."""
        self._planned, self._done, self._best = planned, {arm: set() for arm in planned}, {}
        known = 0
        for record in ledger.of_phase(name):
            if ledger.done(record.run_key) and record.arm in planned:
                known += 1
                self._count(record)
        done = f", {known} of them already done" if known else ""
        self.console.print(f"[bold]{name}[/bold]: {sum(planned.values())} runs{done}")

    def started(self, record: RunRecord) -> None:
        """A run starts, or is tried again."""

    def epoch(self, record: EpochRecord) -> None:
        """A run ended an epoch."""

    def tick(self) -> None:
        """Called several times a second, whatever happens."""

    def close(self) -> None:
        """Nothing more will be shown."""

    def ended(self, record: RunRecord) -> None:
        """A run ended, or an attempt at it failed."""
        self._count(record)
        done = f"{sum(map(len, self._done.values()))}/{sum(self._planned.values())}"
        of_arm = f"{len(self._done[record.arm])}/{self._planned[record.arm]}"
        line = f"  {done:>7}  {run_name(record):<28} {of_arm:>5}  "
        if record.status == "failed":
            line += failure_text(record)
        else:
            line += "val    -   " if record.val_accuracy is None else f"val {record.val_accuracy:.4f} "
            if record.phase == "search" and record.arm in self._best:
                line += f" best {self._best[record.arm]:.4f} "
            line += f" train {record.train_seconds:.2f} s"
            if record.status != "finished":
                line += f"  [yellow]{record.status}[/yellow]: {escape(record.reason)}"
        self.console.print(line, highlight=False, soft_wrap=True)

    def _count(self, record: RunRecord) -> None:
        self._done.setdefault(record.arm, set()).add(record.run_key)
        if record.status == "finished" and record.val_accuracy is not None:
            self._best[record.arm] = max(self._best.get(record.arm, 0.0), record.val_accuracy)


def run_name(record: RunRecord) -> str:
    """A run in a few words: its arm, whether it is a control, and its seed where seeds differ."""
    control = " control" if record.role == "control" else ""
    return f"{record.arm}{control}" + (f" seed {record.seed}" if record.phase != "search" else "")


def failure_text(record: RunRecord) -> str:
    """That an attempt failed, and why, as markup."""
    return f"[red]failed[/red] (attempt {record.attempt + 1}): {escape(record.reason)}"


def plan_table(plan: Plan) -> Table:
    """Arms, what each of them searches, and how many runs that makes in the parts that the sweep has."""
    measure, search = plan.sweep.measure, plan.sweep.search
    columns = ["arm", "method", *(["searched", "trials"] if search else []), *(["measured"] if measure else [])]
    table = Table(*columns, title=f"sweep {plan.sweep.name}")
    for arm in plan.arms:
        cells = [arm.name, _method_text(arm.method)]
        if search:
            domains = (f"{path} {_domain_text(domain)}" for path, domain in arm.space.items())
            cells += ["\n".join(domains) or "nothing", str(plan.trials(arm))]
        if measure:
            cells.append(_measured_text(arm, measure, arm.name == plan.anchor))
        table.add_row(*cells)
    return table


def _measured_text(arm: Arm, measure: MeasurePart, anchor: bool) -> str:
    """`5 + control`; `up to 3 × 5 + control` where up to three settings of the arm may be measured."""
    settings = 1 if anchor or not arm.space else measure.settings
    control = " + control" if measure.controls and not arm.plain else ""
    return f"{f'up to {settings} × ' if settings > 1 else ''}{len(measure.seeds)}{control}"


def ablation_table(plan: Plan) -> Table:
    """The cells of every ablation, by name; searched fields stand at their defaults until the search has chosen."""
    table = Table("ablate", "design", "cells", "seeds", "runs", title="ablations")
    seen: set[tuple[str, int]] = set()
    for ablation in plan.ablations():
        names = list(dict.fromkeys(cell.name for cell in ablation.cells))
        runs = {(name, seed) for name in names for seed in ablation.seeds} - seen
        seen |= runs
        note = f"\n{ablation.note}" if ablation.note else ""
        cells = escape(f"{len(names)}: {', '.join(names)}{note}")
        table.add_row(ablation.arm, ablation.design, cells, str(len(ablation.seeds)), str(len(runs)))
    return table


def status_table(plan: Plan, ledger: Ledger) -> Table:
    """Per arm and phase: how its runs ended, and the best validation accuracy."""
    columns = ("phase", "arm", "finished", "stopped", "diverged", "failed", "unfinished", "best val")
    ends = ("finished", "stopped", "diverged", "failed", "running")
    table = Table(*columns, title=f"sweep {plan.sweep.name}")
    table.columns[1].overflow = "fold"  # an ablation's cells differ at the end of their names
    for phase in ("search", "measure", "ablate"):
        for arm in dict.fromkeys([*(arm.name for arm in plan.arms), *(r.arm for r in ledger.of_phase(phase))]):
            runs = ledger.of_phase(phase, arm)
            count = {s: sum(r.status == s for r in runs) for s in ends}
            full = [r.val_accuracy for r in runs if r.status == "finished" and r.val_accuracy is not None]
            best = max(full, default=None)
            if runs:
                shown = "" if best is None else f"{best:.4f}"
                table.add_row(phase, arm, *(str(n) if n else "" for n in count.values()), shown)
    return table


def _method_text(method: Method) -> str:
    """A method with the fields that differ from their defaults."""
    changed = [
        f"{f.name}={_method_text(value) if isinstance(value, Method) else repr(value)}"
        for f in fields(method)
        if (value := getattr(method, f.name)) != f.default
    ]
    return f"{type(method).__name__}({', '.join(changed)})"


def _domain_text(domain: Domain) -> str:
    if isinstance(domain, Choice):
        return f"in {list(domain.values)}"
    kind = {"LogUniform": " (log)", "IntRange": " (whole)"}.get(type(domain).__name__, "")
    return f"in [{domain.low:g}, {domain.high:g}]{kind}"
