"""What a person sees while a sweep runs: one line per ended run, and a table for `plan` and `status`."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from fastbp.record import RunRecord
from sweeps.ledger import Ledger
from sweeps.plan import Plan


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

    def ended(self, record: RunRecord) -> None:
        self._count(record)
        done = f"{len(self._done[record.arm])}/{self._planned[record.arm]}"
        what = f"{record.arm} control" if record.role == "control" else record.arm
        seed = f" seed {record.seed}" if record.phase == "measure" else ""
        line = f"  {what + seed:<28} {done:>7}  "
        if record.status == "failed":
            self.console.print(f"{line}[red]failed[/red] (attempt {record.attempt + 1}): ", end="")
            self.console.print(record.reason, markup=False, highlight=False)
            return
        accuracy = "   -  " if record.val_accuracy is None else f"{record.val_accuracy:.4f}"
        best = self._best.get(record.arm)
        note = f"  best {best:.4f}" if record.phase == "search" and best is not None else ""
        ending = "" if record.status == "finished" else f"  [yellow]{record.status}[/yellow]: {record.reason}"
        text = f"{line}val {accuracy}{note}  train {record.train_seconds:.2f} s{ending}"
        self.console.print(text, highlight=False)

    def _count(self, record: RunRecord) -> None:
        self._done.setdefault(record.arm, set()).add(record.run_key)
        if record.status == "finished" and record.val_accuracy is not None:
            self._best[record.arm] = max(self._best.get(record.arm, 0.0), record.val_accuracy)


def plan_table(plan: Plan) -> Table:
    """Arms, what each of them searches, and how many runs that makes."""
    table = Table("arm", "method", "searched", "search trials", "measured runs", title=f"sweep {plan.sweep.name}")
    measure = plan.sweep.measure
    for arm in plan.arms:
        searched = ", ".join(f"{path} in {_domain_text(domain)}" for path, domain in arm.space.items()) or "nothing"
        seeds = len(measure.seeds) if measure else 0
        control = " (+ control)" if measure and measure.controls and not arm.plain else ""
        table.add_row(arm.name, repr(arm.method), searched, str(plan.trials(arm)), f"{seeds}{control}")
    return table


def status_table(plan: Plan, ledger: Ledger) -> Table:
    """Per arm and phase: ended, failed and best or mean accuracy."""
    table = Table(
        "phase",
        "arm",
        "finished",
        "diverged",
        "failed",
        "unfinished",
        "best val",
        title=f"sweep {plan.sweep.name}",
    )
    for phase in ("search", "measure"):
        for arm in plan.arms:
            runs = ledger.of_phase(phase, arm.name)
            count = {s: sum(r.status == s for r in runs) for s in ("finished", "diverged", "failed", "running")}
            best = max((r.val_accuracy for r in runs if r.val_accuracy is not None), default=None)
            if runs:
                shown = "" if best is None else f"{best:.4f}"
                table.add_row(phase, arm.name, *(str(n) if n else "" for n in count.values()), shown)
    return table


def _domain_text(domain: object) -> str:
    return (
        str(domain)
        .removeprefix("Log")
        .replace("Uniform", "")
        .replace("values=", "")
        .replace("low=", "")
        .replace("high=", "")
    )
