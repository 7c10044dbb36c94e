"""What a person sees while a sweep runs: one line per ended run, and a table for `plan` and `status`."""

from __future__ import annotations

from dataclasses import fields

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastbp.knobs import Choice, Domain
from fastbp.method import Method
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
        what = f"{record.arm} control" if record.role == "control" else record.arm
        seed = f" seed {record.seed}" if record.phase == "measure" else ""
        done = f"{sum(map(len, self._done.values()))}/{sum(self._planned.values())}"
        of_arm = f"{len(self._done[record.arm])}/{self._planned[record.arm]}"
        line = f"  {done:>7}  {what + seed:<28} {of_arm:>5}  "
        if record.status == "failed":
            line += f"[red]failed[/red] (attempt {record.attempt + 1}): {escape(record.reason)}"
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


def plan_table(plan: Plan) -> Table:
    """Arms, what each of them searches, and how many runs that makes."""
    table = Table("arm", "method", "searched", "trials", "measured", title=f"sweep {plan.sweep.name}")
    measure = plan.sweep.measure
    for arm in plan.arms:
        searched = "\n".join(f"{path} {_domain_text(domain)}" for path, domain in arm.space.items()) or "nothing"
        seeds = len(measure.seeds) if measure else 0
        control = " + control" if measure and measure.controls and not arm.plain else ""
        table.add_row(arm.name, _method_text(arm.method), searched, str(plan.trials(arm)), f"{seeds}{control}")
    return table


def status_table(plan: Plan, ledger: Ledger) -> Table:
    """Per arm and phase: how its runs ended, and the best validation accuracy."""
    columns = ("phase", "arm", "finished", "diverged", "failed", "unfinished", "best val")
    table = Table(*columns, title=f"sweep {plan.sweep.name}")
    for phase in ("search", "measure"):
        for arm in plan.arms:
            runs = ledger.of_phase(phase, arm.name)
            count = {s: sum(r.status == s for r in runs) for s in ("finished", "diverged", "failed", "running")}
            best = max((r.val_accuracy for r in runs if r.val_accuracy is not None), default=None)
            if runs:
                shown = "" if best is None else f"{best:.4f}"
                table.add_row(phase, arm.name, *(str(n) if n else "" for n in count.values()), shown)
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
