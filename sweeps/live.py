"""One live table while a sweep runs: a row per arm, what runs now, and when the phase will end.

It is drawn by the driver's own thread, on events only: there is no refresh thread that could take the processor from
a run that is being measured. While runs are measured alone it is drawn between them, and between their epochs at most
once a second.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fastbp.record import EpochRecord, RunRecord
from sweeps.cost_table import duration
from sweeps.ledger import Ledger
from sweeps.progress import Progress, failure_text, run_name

REFRESH_SECONDS = 1.0
_RUNNING_LINES = 4
_NARROW = 80  # columns; below, the bar and the seconds per run are left out


@dataclass
class _Running:
    """A run under way."""

    record: RunRecord
    began: float
    epochs_done: int = 0
    val_accuracy: float | None = None

    @property
    def epochs(self) -> int:
        return self.record.recipe["epochs"]


@dataclass
class _Row:
    """What is known of an arm in this phase."""

    planned: int
    ends: dict[str, str] = field(default_factory=dict)  # run_key to its newest status
    accuracies: list[float] = field(default_factory=list)  # of finished runs that are no controls
    seconds: list[float] = field(default_factory=list)  # of the runs that ended in this session

    def count(self, *statuses: str) -> int:
        return sum(status in statuses for status in self.ends.values())

    @property
    def left(self) -> int:
        return max(0, self.planned - len(self.ends))


class LiveProgress(Progress):
    """The live table; prints only failures and, at the end of a phase, its last state.

    Args:
        console: a terminal.
        now: a monotonic clock in seconds, for tests.
    """

    def __init__(self, console: Console, now: Callable[[], float] = time.monotonic) -> None:
        super().__init__(console)
        self._now = now
        self._live: Live | None = None
        self._name = ""
        self._rows: dict[str, _Row] = {}
        self._running: dict[str, _Running] = {}
        self._began: float | None = None  # when the phase's first run of this session started
        self._worked = 0.0  # seconds of the runs that ended in this session
        self._drawn = 0.0

    def phase(self, name: str, planned: dict[str, int], ledger: Ledger) -> None:
        self._close()
        self._name, self._running, self._began, self._worked = name, {}, None, 0.0
        self._rows = {arm: _Row(runs) for arm, runs in planned.items() if runs}
        for record in ledger.of_phase(name):
            if ledger.done(record.run_key) and record.arm in planned:
                self._keep(record)
        self._live = Live(console=self.console, auto_refresh=False, transient=True)
        self._live.start()
        self._draw()

    def started(self, record: RunRecord) -> None:
        self._began = self._now() if self._began is None else self._began
        self._running[record.run_key] = _Running(record, self._now())
        self._row(record.arm).ends.pop(record.run_key, None)  # another try
        self._event(between_runs=True)

    def epoch(self, record: EpochRecord) -> None:
        running = self._running.get(record.run_key)
        if running is not None:
            running.epochs_done = record.epoch + 1
            running.val_accuracy = record.val_accuracy if record.val_accuracy is not None else running.val_accuracy
            self._event(between_runs=False)

    def ended(self, record: RunRecord) -> None:
        running = self._running.pop(record.run_key, None)
        if running is not None:
            seconds = self._now() - running.began
            self._worked += seconds
            if record.status != "failed":
                self._row(record.arm).seconds.append(seconds)
        self._keep(record)
        if record.status == "failed":
            self.console.print(f"  {run_name(record)} {failure_text(record)}", highlight=False, soft_wrap=True)
        self._event(between_runs=True)

    def tick(self) -> None:
        """Draw once a second while trials share the machine; an exclusive run is left alone until its next event."""
        if self._name == "search" and self._now() - self._drawn >= REFRESH_SECONDS:
            self._draw()

    def close(self) -> None:
        self._close()

    def _keep(self, record: RunRecord) -> None:
        row = self._row(record.arm)
        row.ends[record.run_key] = record.status
        if record.status == "finished" and record.val_accuracy is not None and record.role != "control":
            row.accuracies.append(record.val_accuracy)

    def _row(self, arm: str) -> _Row:
        return self._rows.setdefault(arm, _Row(0))

    def _event(self, between_runs: bool) -> None:
        """Draw at most once a second, but let an exclusive run begin with a true table."""
        if self._now() - self._drawn >= REFRESH_SECONDS or (between_runs and self._name != "search"):
            self._draw()

    def _draw(self) -> None:
        self._drawn = self._now()
        if self._live is not None:
            self._live.update(self.table(max(3, self.console.height - _RUNNING_LINES - 6)), refresh=True)

    def _close(self) -> None:
        """Replace the live table by its last state, all arms in it."""
        if self._live is not None:
            self._live.stop()
            self._live = None
            self.console.print(self.table(len(self._rows)))

    def table(self, rows: int) -> RenderableType:
        """What is shown: a headline, at most `rows` arms, and the runs under way."""
        narrow = self.console.width < _NARROW
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
        table.add_column("arm", overflow="ellipsis", no_wrap=True, max_width=24)
        if not narrow:
            table.add_column("", width=20)
        for title in ("done", "running", "best val" if self._name == "search" else "mean val"):
            table.add_column(title, justify="right", no_wrap=True)
        if not narrow:
            table.add_column("a run", justify="right", no_wrap=True)
        table.add_column("", no_wrap=True, overflow="ellipsis")
        running = Counter(run.record.arm for run in self._running.values())
        shown = self._shown(rows, running)
        for arm in shown:
            row = self._rows[arm]
            table.add_row(*self._cells(escape(arm), row, running[arm], self._accuracy(row), narrow))
        hidden = [row for arm, row in self._rows.items() if arm not in shown]
        if hidden:
            rest = _Row(sum(row.planned for row in hidden))
            rest.ends = {f"{i}/{key}": status for i, row in enumerate(hidden) for key, status in row.ends.items()}
            others = sum(count for arm, count in running.items() if arm not in shown)
            table.add_row(*self._cells(f"… {len(hidden)} more", rest, others, "", narrow), style="dim")
        return Group(self._headline(), table, *self._now_running())

    def _shown(self, rows: int, running: Counter[str]) -> list[str]:
        """The arms that fit: those that run, then those that have something left, in the order of the file."""
        if len(self._rows) <= rows:
            return list(self._rows)
        ranked = sorted(self._rows, key=lambda arm: (not running[arm], not self._rows[arm].left))
        chosen = set(ranked[: rows - 1])
        return [arm for arm in self._rows if arm in chosen]

    def _cells(self, name: str, row: _Row, running: int, accuracy: str, narrow: bool) -> list[RenderableType]:
        done = len(row.ends) - row.count("failed")
        words = [
            f"[{style}]{row.count(status)} {status}[/{style}]"
            for status, style in (("failed", "red"), ("diverged", "yellow"), ("stopped", "yellow"))
            if row.count(status)
        ]
        cells: list[RenderableType] = [name, f"{done}/{row.planned}", str(running or ""), accuracy, ", ".join(words)]
        if not narrow:
            cells.insert(1, ProgressBar(max(1, row.planned), done, width=20))
            cells.insert(-1, duration(statistics.fmean(row.seconds)) if row.seconds else "")
        return cells

    def _accuracy(self, row: _Row) -> str:
        if not row.accuracies:
            return ""
        value = max(row.accuracies) if self._name == "search" else statistics.fmean(row.accuracies)
        return f"{value:.4f}"

    def _headline(self) -> Text:
        planned = sum(row.planned for row in self._rows.values())
        done = sum(len(row.ends) - row.count("failed") for row in self._rows.values())
        text = Text.assemble((self._name, "bold"), f"  {done}/{planned} runs", no_wrap=True, overflow="ellipsis")
        if self._began is not None:
            text.append(f"  {_whole(self._now() - self._began)}")
            left = self.seconds_left()
            if left is not None and left > 0:
                now = datetime.now()
                until = now + timedelta(seconds=left)
                day = "" if until.date() == now.date() else f"{until:%a} "
                text.append(f"  about {_whole(max(1.0, left))} left, until {day}{until:%H:%M}", style="cyan")
        return text

    def seconds_left(self) -> float | None:
        """Until the phase ends, from the pace of this session; None before the first epoch is known.

        Pace is wall seconds per second of runs: it holds how many run at once and what lies between them.
        """
        known = {arm: seconds for arm in self._rows if (seconds := self._run_seconds(arm)) is not None}
        if not known or self._began is None:
            return None
        other = statistics.fmean(known.values())  # of arms that have not begun
        now, left, worked = self._now(), 0.0, self._worked
        running = Counter(run.record.arm for run in self._running.values())
        for arm, row in self._rows.items():
            left += max(0, row.left - running[arm]) * known.get(arm, other)
        for run in self._running.values():
            spent = now - run.began
            worked += spent
            left += max(0.0, known.get(run.record.arm, other) - spent)
        return left * (now - self._began) / worked if worked > 0 else None

    def _run_seconds(self, arm: str) -> float | None:
        """Mean seconds of an arm's ended runs, or what the epochs of those under way promise."""
        row = self._rows[arm]
        if row.seconds:
            return statistics.fmean(row.seconds)
        now, runs = self._now(), [r for r in self._running.values() if r.record.arm == arm and r.epochs_done]
        return statistics.fmean((now - r.began) / r.epochs_done * r.epochs for r in runs) if runs else None

    def _now_running(self) -> list[Text]:
        """One line per run under way, as many as fit."""
        lines = []
        for run in list(self._running.values())[:_RUNNING_LINES]:
            val = "" if run.val_accuracy is None else f"  val {run.val_accuracy:.4f}"
            epoch = f"epoch {run.epochs_done}/{run.epochs}"
            lines.append(Text(f"  now: {run_name(run.record)}  {epoch}{val}", "dim", no_wrap=True, overflow="ellipsis"))
        more = len(self._running) - len(lines)
        return lines + ([Text(f"  … and {more} more", "dim")] if more else [])


def _whole(seconds: float) -> str:
    """A duration for a table that is drawn once a second: no part of the first one.

    >>> [_whole(seconds) for seconds in (0.00027, 0.9, 1.2, 95)]
    ['0 s', '0 s', '1.2 s', '95 s']
    """
    return duration(seconds) if seconds >= 1 else "0 s"


def progress_on(console: Console) -> Progress:
    """A live table on a terminal, else one line per ended run."""
    return LiveProgress(console) if console.is_terminal and not console.is_dumb_terminal else Progress(console)
