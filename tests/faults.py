"""A sweep as a user runs it: a process of its own, with everything it starts, to be hurt and started again.

`Victim` starts `fastbp-sweep run`, waits for a moment in its records, and checks after every fault what must hold:
no finished run is lost or doubled, and in the end nothing is left running, neither in the records nor in MLflow nor
among the processes.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from mlflow import MlflowClient

from fastbp.record import EpochRecord, Record, RunRecord, read_records
from sweeps.ledger import DONE, Ledger

ROOT = Path(__file__).parents[1]
MARK = "FASTBP_FAULT_TEST"


class Victim:
    """One sweep in a folder of its own.

    Args:
        folder: an empty folder.
        text: the sweep file; its name is `name`.
        environment: added to the environment of every start.
    """

    def __init__(self, folder: Path, text: str, **environment: str) -> None:
        self.folder, self.mark = folder, uuid.uuid4().hex
        (folder / "sweep.yaml").write_text(text)
        self.out = folder / "out"
        self.records_file = self.out / "records.jsonl"
        clean = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_AUTH_TOKEN")}
        self.environment = clean | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", MARK: self.mark} | environment
        self.said = ""
        self.process: subprocess.Popen[str] | None = None

    def start(self, *options: str, report: bool = False) -> subprocess.Popen[str]:
        """Start the sweep, or start it again, as the leader of a process group of its own."""
        command = [sys.executable, "-m", "sweeps.cli", "run", "sweep.yaml", "--out", "out", *options]
        command += [] if report else ["--no-report"]
        with (self.folder / "said.txt").open("w") as said:
            self.process = subprocess.Popen(
                command,
                cwd=self.folder,
                env=self.environment,
                stdout=said,
                stderr=said,
                text=True,
                start_new_session=True,
            )
        return self.process

    def wait(self, timeout: float = 240.0) -> int:
        """The exit code; what the command said is in `said`."""
        assert self.process is not None
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"still running after {timeout} s: {self._text()}") from None
        self.said = self._text()
        return code

    def run(self, *options: str, report: bool = False) -> int:
        self.start(*options, report=report)
        return self.wait()

    def sync(self) -> None:
        """`fastbp-sweep sync`."""
        command = [sys.executable, "-m", "sweeps.cli", "sync", "out"]
        subprocess.run(command, cwd=self.folder, env=self.environment, check=True, capture_output=True)

    def until(self, condition: Callable[[list[Record]], bool], timeout: float = 240.0) -> None:
        """Wait for a moment in the records."""
        assert self.process is not None
        deadline = time.monotonic() + timeout
        while not condition(self.records()):
            assert self.process.poll() is None, f"ended with {self.process.returncode} before the fault: {self._text()}"
            assert time.monotonic() < deadline, f"the moment never came; {self._states()}: {self._text()}"
            time.sleep(0.02)

    def kill(self, number: int = signal.SIGKILL) -> int:
        """Send the driver a signal; returns its exit code."""
        assert self.process is not None
        os.kill(self.process.pid, number)
        return self.wait()

    def records(self) -> list[Record]:
        return list(read_records(self.records_file)) if self.records_file.exists() else []

    def runs(self) -> dict[str, RunRecord]:
        return Ledger.of(self.records()).runs

    def pids(self, name: str = "") -> list[int]:
        """Processes of this sweep, whoever started them, whose command line contains `name`."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    if f"{MARK}={self.mark}".encode() in (entry / "environ").read_bytes():
                        command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                        if command and name in command:
                            found.append(int(entry.name))
        return found

    def close(self) -> None:
        """End whatever a failed test left running."""
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _text(self) -> str:
        return (self.folder / "said.txt").read_text(errors="replace")[-3000:]

    def _states(self) -> dict:
        return dict(Counter((r.phase, r.status) for r in self.runs().values()))

    # -- what must hold ------------------------------------------------------------------------------------------

    def check_kept(self, before: list[Record]) -> None:
        """Nothing on record before was rewritten, and no run that had ended was run again."""
        after = self.records()
        assert after[: len(before)] == before, "lines that were on disk have changed"
        done = {key for key, run in Ledger.of(before).runs.items() if run.status in DONE}
        again = [r for r in after[len(before) :] if isinstance(r, RunRecord | EpochRecord) and r.run_key in done]
        assert not again, f"finished runs were run again: {[(r.run_key, r.kind, r.attempt) for r in again]}"

    def check_ended(self, cells: dict[tuple[str, str], int], uri: str = "") -> None:
        """Every planned run has one end; MLflow holds the same runs, once each, none of them running.

        Args:
            cells: (phase, arm) to the number of planned runs.
            uri: of the MLflow store; empty where none was used.
        """
        records, runs = self.records(), self.runs()
        found = Counter((run.phase, run.arm) for run in runs.values() if run.status in (*DONE, "failed"))
        assert found == cells, f"runs with an end: {dict(found)}, planned: {cells}"
        assert len(runs) == sum(cells.values()), f"{len(runs)} runs for {sum(cells.values())} cells"
        ends = Counter(r.run_key for r in records if isinstance(r, RunRecord) and r.status in DONE)
        assert set(ends.values()) <= {1}, f"ended more than once: {[key for key, n in ends.items() if n > 1]}"
        for run in runs.values():
            epochs = {r.epoch for r in records if isinstance(r, EpochRecord) and r.run_key == run.run_key}
            assert run.status != "finished" or epochs == set(range(run.recipe["epochs"])), f"{run.run_key}: {epochs}"
            assert not (run.phase == "measure" and run.resumed), f"measured run {run.run_key} was resumed"
        if uri:
            self.check_mlflow(uri, runs)
        self.check_nothing_runs()

    def check_mlflow(self, uri: str, runs: dict[str, RunRecord]) -> None:
        check_mlflow(uri, "faults", runs)

    def check_nothing_runs(self, timeout: float = 60.0) -> None:
        """No process of the sweep is left, Ray's included, but for agents of its that look after minutes only."""
        deadline = time.monotonic() + timeout
        while (left := [p for p in self.pids() if p not in self.pids("Agent")]) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not left, f"left running: {[Path(f'/proc/{pid}/cmdline').read_bytes()[:120] for pid in left]}"


def check_mlflow(uri: str, sweep: str, runs: dict[str, RunRecord]) -> None:
    """MLflow holds the runs of a sweep once each, and none of them RUNNING."""
    client = MlflowClient(uri)
    experiments = client.search_experiments(filter_string=f"name = '{sweep}'")
    found = client.search_runs([e.experiment_id for e in experiments], max_results=5000)
    running = [run.info.run_name for run in found if run.info.status == "RUNNING"]
    assert not running, f"left RUNNING in MLflow: {running}"
    times = {run.info.run_name: (run.info.start_time, run.info.end_time) for run in found}
    assert all(start <= end for start, end in times.values()), f"ended before they started: {times}"
    keys = Counter(run.data.tags.get("fastbp.run_key") for run in found)
    keys.pop(None, None)
    once = Counter(list(runs))
    extra = keys - once
    assert keys == once, f"MLflow holds {len(keys)} runs, the records {len(runs)}; too often: {extra}"


def ended(records: list[Record], phase: str) -> int:
    return sum(run.phase == phase and run.status in DONE for run in Ledger.of(records).runs.values())


def under_way(records: list[Record], phase: str, epochs: int = 1) -> list[RunRecord]:
    """Runs of a phase that have started and trained at least so many epochs of this attempt."""
    trained = Counter((r.run_key, r.attempt) for r in records if isinstance(r, EpochRecord))
    runs = [run for run in Ledger.of(records).runs.values() if run.phase == phase and run.status == "running"]
    return [run for run in runs if trained[run.run_key, run.attempt] >= epochs]
