"""The live table: what it counts, when it is drawn, and that it fits its terminal."""

import contextlib
import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
from dataclasses import replace

import pytest
from rich.console import Console

from fastbp.record import EpochRecord
from sweep_files import TOY, ended, plan_of
from sweeps.ledger import Ledger
from sweeps.live import LiveProgress, progress_on
from sweeps.progress import Progress


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self):
        self.seconds = 1000.0

    def __call__(self):
        return self.seconds


def terminal(width=100, height=40):
    return Console(file=io.StringIO(), force_terminal=True, width=width, height=height, color_system=None)


@pytest.fixture
def stage(tmp_path):
    """A live table of the toy's search (three trials of two arms) on a standing clock, and its runs."""
    plan, clock = plan_of(tmp_path), Clock()
    live = LiveProgress(terminal(), clock)
    live.draws = 0
    draw = live._draw

    def counted():
        live.draws += 1
        draw()

    live._draw = counted
    runs = {
        arm.name: [
            plan.search_run(arm, {"recipe.lr": lr} | ({"method.drop_rate": 0.3} if arm.name == "ldb" else {}))
            for lr in (0.1, 0.2, 0.3)
        ]
        for arm in plan.arms
    }
    runs = {arm: [replace(run, recipe=replace(run.recipe, epochs=4)) for run in of_arm] for arm, of_arm in runs.items()}
    yield live, clock, runs
    live.close()


def start(live, run):
    live.started(ended(run, status="running", val=None))


def lines_of(live, rows=99):
    console = terminal(live.console.width)
    console.print(live.table(rows))
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def row_of(live, arm, rows=99):
    return next(line for line in lines_of(live, rows) if line.startswith(arm))


BOTH = {"bp": 3, "ldb": 3}


def test_it_counts_how_runs_ended_and_keeps_the_best_accuracy(stage):
    live, clock, runs = stage
    live.phase("search", BOTH, Ledger())
    ends = [("bp", 0, {"val": 0.7}), ("bp", 1, {"val": 0.9}), ("bp", 2, {"status": "stopped", "val": 0.99})]
    ends += [("ldb", 0, {"status": "failed", "val": None, "reason": "boom"})]
    ends += [("ldb", 1, {"status": "diverged", "val": None})]
    for arm, i, end in ends:
        start(live, runs[arm][i])
        clock.seconds += 2
        live.ended(ended(runs[arm][i], **end))
    assert row_of(live, "bp").split()[-6:] == ["3/3", "0.9000", "2.0", "s", "1", "stopped"]
    assert "1/3" in row_of(live, "ldb"), "a failed attempt is not a done run"
    assert row_of(live, "ldb").endswith("1 failed, 1 diverged")
    assert lines_of(live)[0].startswith("search  4/6 runs  10.0 s")
    said = live.console.file.getvalue()
    assert said.count("ldb failed (attempt 1): boom") == 1, "a failure is said once, above the table"


def test_no_part_of_the_first_second_is_shown(stage):
    live, clock, runs = stage
    live.phase("search", BOTH, Ledger())
    start(live, runs["bp"][0])
    clock.seconds += 0.00027
    assert lines_of(live)[0] == "search  0/6 runs  0 s"
    live.epoch(EpochRecord(run_key=runs["bp"][0].key, epoch=0))
    assert lines_of(live)[0].startswith("search  0/6 runs  0 s  about 1.0 s left, until "), lines_of(live)[0]


def test_a_second_attempt_takes_the_failure_back(stage):
    live, _, runs = stage
    live.phase("search", BOTH, Ledger())
    start(live, runs["bp"][0])
    live.ended(ended(runs["bp"][0], status="failed", val=None))
    start(live, runs["bp"][0])
    assert "failed" not in row_of(live, "bp")
    live.ended(ended(runs["bp"][0], val=0.5))
    assert "1/3" in row_of(live, "bp")


def test_the_time_left_comes_from_the_pace_of_ended_runs_and_what_is_left(stage):
    live, clock, runs = stage
    live.phase("search", BOTH, Ledger())
    assert live.seconds_left() is None, "nothing is known before the first epoch"
    start(live, runs["bp"][0])
    clock.seconds += 5
    live.epoch(EpochRecord(run_key=runs["bp"][0].key, epoch=0))
    assert live.seconds_left() == pytest.approx(15 + 5 * 20), "5 s are a quarter of a run; five more are to come"
    clock.seconds += 5
    live.ended(ended(runs["bp"][0]))
    start(live, runs["ldb"][0])
    start(live, runs["bp"][1])
    clock.seconds += 30
    live.ended(ended(runs["ldb"][0]))
    # bp takes 10 s, ldb 30 s; one more bp and two more ldb, while the bp under way is late. 70 run seconds took 40.
    assert live.seconds_left() == pytest.approx((10 + 2 * 30 + 0) * 40 / 70)


def test_what_earlier_starts_did_counts_as_done_but_not_for_the_pace(stage):
    live, _, runs = stage
    failed = ended(runs["ldb"][0], status="failed", val=None)
    live.phase("search", BOTH, Ledger.of([ended(runs["bp"][0], val=0.8), failed]))
    assert "1/3" in row_of(live, "bp")
    assert "0.8000" in row_of(live, "bp")
    assert "failed" not in row_of(live, "ldb"), "it is tried again"
    assert live.seconds_left() is None


def test_searching_draws_at_most_once_a_second(stage):
    live, clock, runs = stage
    live.phase("search", BOTH, Ledger())
    start(live, runs["bp"][0])
    clock.seconds, live.draws = 2000.0, 0
    for i in range(100):  # 10 s
        live.epoch(EpochRecord(run_key=runs["bp"][0].key, epoch=i))
        live.tick()
        clock.seconds += 0.1
    assert 9 <= live.draws <= 11, f"drawn {live.draws} times in 10 s"


def test_a_run_that_is_measured_is_never_interrupted_by_a_drawing(stage):
    live, clock, runs = stage
    before = threading.active_count()
    live.phase("measure", {"bp": 3}, Ledger())
    assert threading.active_count() == before, "the table has a thread of its own"
    start(live, runs["bp"][0])
    live.draws = 0
    for _ in range(100):  # 10 s in which nothing happens
        clock.seconds += 0.1
        live.tick()
    assert live.draws == 0, "drawn in the middle of an epoch"
    live.epoch(EpochRecord(run_key=runs["bp"][0].key, epoch=0))
    live.epoch(EpochRecord(run_key=runs["bp"][0].key, epoch=1))
    assert live.draws == 1, "once a second is enough"
    live.ended(ended(runs["bp"][0]))
    start(live, runs["bp"][1])
    assert live.draws == 3, "the next run does not begin with a stale table"


@pytest.mark.parametrize("width", [60, 100])
def test_it_fits_its_terminal_however_many_arms_there_are(tmp_path, width):
    arms = [f"an_arm_with_a_rather_long_name_{i}" for i in range(200)]
    (tmp_path / "toy").mkdir()
    run = plan_of(tmp_path / "toy", TOY).search_run
    plan = plan_of(tmp_path / "toy", TOY)
    live = LiveProgress(terminal(width, 24), Clock())
    live.phase("ablate", dict.fromkeys(arms, 5), Ledger())
    for i in range(150, 160):
        start(live, replace(run(plan.arms[0], {"recipe.lr": 0.1}), arm=arms[i], phase="ablate", seed=i))
    frame = live.console.file.getvalue().split("\x1b[2K")[-1].splitlines()
    assert len(frame) <= 24, f"{len(frame)} lines"
    assert max(map(len, frame)) <= width, frame
    assert sum("now: " in line for line in frame) == 4, f"what runs now was cropped away: {frame}"
    text = "\n".join(lines_of(live, rows=14))
    assert "… 187 more" in text, text
    assert text.count("0/5") == 13, "arms that run come first"
    assert "… and 6 more" in text, "of ten runs under way four are named"
    live.close()
    assert live.console.file.getvalue().count("0/5") >= 200, "the last state has all arms"


def test_controls_do_not_count_for_the_accuracy_of_an_arm(stage):
    live, _, runs = stage
    live.phase("measure", {"ldb": 4}, Ledger())
    for seed, role, val in ((0, "method", 0.8), (1, "method", 0.9), (2, "control", 0.1)):
        live.ended(ended(replace(runs["ldb"][0], phase="measure", seed=seed, role=role), val=val))
    assert "0.8500" in row_of(live, "ldb"), "measured runs show their mean"


def test_a_pipe_gets_lines_and_a_terminal_the_table(stage):
    _, _, runs = stage
    pipe = Console(file=io.StringIO(), force_terminal=False, width=100)
    plain = progress_on(pipe)
    assert type(plain) is Progress
    assert isinstance(progress_on(terminal()), LiveProgress)
    plain.phase("search", BOTH, Ledger())
    for run in runs["bp"]:
        start(plain, run)
        plain.epoch(EpochRecord(run_key=run.key))
        plain.tick()
        plain.ended(ended(run, val=0.5))
    plain.close()
    lines = pipe.file.getvalue().splitlines()
    assert len(lines) == 1 + 3, lines


@pytest.mark.long
@pytest.mark.slow
def test_on_a_real_terminal_the_table_lives_and_its_last_state_stays(tmp_path):
    (tmp_path / "toy.yaml").write_text(TOY)
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    command = [sys.executable, "-m", "sweeps.cli", "run", "toy.yaml", "--smoke", "--no-report", "--no-mlflow"]
    environ = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen(
        command, cwd=tmp_path, stdin=slave, stdout=slave, stderr=slave, env=environ | {"TERM": "xterm-256color"}
    )
    os.close(slave)
    said = b""
    with contextlib.suppress(OSError):  # the terminal's end, on Linux
        while chunk := os.read(master, 65536):
            said += chunk
    os.close(master)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", said.decode())
    assert process.wait() == 0, text
    assert re.search(r"now: (bp|ldb)  epoch 0/1", text), f"no run was ever shown under way:\n{text}"
    search, measure = text.rindex("search  2/2 runs"), text.rindex("measure  3/3 runs")
    assert search < measure < text.index("records: "), text
    for part, counts in ((text[search:measure], ("1/1", "1/1")), (text[measure:], ("1/1", "2/2"))):
        for arm, count in zip(("bp", "ldb"), counts, strict=True):
            assert re.search(rf"^{arm} .* {count} ", part, re.MULTILINE), f"{arm} {count} is not in:\n{part}"
    assert said.count(b"\x1b[?25l") == said.count(b"\x1b[?25h"), "the cursor stayed hidden"
