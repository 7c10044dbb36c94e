"""Ending early without Ray: signals, a full disk, and what Ray says of the dead in one sentence."""

import errno
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastbp.record import EpochRecord, RecordError, RecordWriter, RunRecord, read_records
from sweeps import mlflow_view as view
from sweeps.recorder import reason_of
from sweeps.stopping import AGAIN_SECONDS, Interrupted, Stop

LISTENS = """\
import sys, time
from sweeps.stopping import Interrupted, Stop
stop = Stop()
with stop:
    stop.tuning = sys.argv[1] == "tuning"
    stop.closing = sys.argv[1] == "closing"
    try:
        print("ready", flush=True)
        time.sleep(0.2 if sys.argv[1] == "once" else 60)
        stop.check()
    except KeyboardInterrupt:
        print("KeyboardInterrupt", stop.signal)
    except Interrupted:
        print("Interrupted", stop.signal)
"""


def listening(state):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    process = subprocess.Popen(
        [sys.executable, "-c", LISTENS, state], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_the_process_at_once(number):
    with listening("tuning") as process:
        process.send_signal(number)
        process.send_signal(number)  # at once: from one who signals a process and its group
        time.sleep(AGAIN_SECONDS + 0.1)
        assert process.poll() is None, f"the first signal ended the process with {process.returncode}"
        process.send_signal(number)
        assert process.wait(timeout=120) == 128 + number


@pytest.mark.parametrize(("state", "said"), [("planning", "KeyboardInterrupt 15"), ("closing", "KeyboardInterrupt 0")])
def test_where_tune_does_not_run_a_signal_interrupts(state, said):
    with listening(state) as process:
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=120)[0].strip() == said


def test_a_signal_while_tuning_waits_for_the_end_of_the_step():
    before = signal.getsignal(signal.SIGTERM)
    with Stop() as stop:
        stop.tuning = True
        stop.check()
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Interrupted):
            stop.check()
    assert stop.signal == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before, "the handler of before was not put back"


def test_a_write_that_does_not_fit_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "records.jsonl"
    writer = RecordWriter(path)
    writer.write(RunRecord(run_key="a"))
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 40, limits[1]))
    try:
        with pytest.raises(
            RecordError, match=r"records\.jsonl: a record cannot be written \(File too large\): free space"
        ):
            writer.write(EpochRecord(run_key="a"), RunRecord(run_key="a", status="finished"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before, "half a record is in the file"
    writer.write(RunRecord(run_key="a", status="finished"))
    assert [r.status for r in read_records(path)] == ["running", "finished"]


def test_a_record_that_is_not_surely_on_disk_is_not_in_the_file(tmp_path, monkeypatch):
    path = tmp_path / "records.jsonl"
    RecordWriter(path).write(RunRecord(run_key="a"))
    before = path.read_bytes()

    def fails(_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(RecordError, match=r"cannot be written \(Input/output error\)$"):
        RecordWriter(path).write(RunRecord(run_key="a", status="finished"))
    assert path.read_bytes() == before


def test_what_ends_a_sweep_is_found_under_what_tune_makes_of_it():
    stop = Stop()
    try:
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/disk/run.pt")
        except OSError:
            raise RuntimeError("TuneError: Traceback ...")  # noqa: B904 - as Tune does it
    except RuntimeError as error:
        said = stop.why(error)
    assert (
        said == "/disk/run.pt cannot be written (No space left on device): free space, then run the same command again"
    )
    assert stop.why(RuntimeError("a bug")) == ""


DIED = """\
Failure # 1 (occurred at 2026-11-20_13-06-52)
The actor died unexpectedly before finishing this task.
\tclass_name: ResourceTrainable
The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker \
unexpectedly exits with a connection error code 2. End of file. Some common causes include: (1) the process was \
killed by the OOM killer due to high memory usage"""
MONITOR = """\
Failure # 1 (occurred at 2026-11-20_13-06-52)
Task was killed due to the node running low on memory.
Memory on the node (IP: 192.0.2.1) was 3.2GB / 4GB (0.8), which exceeds the memory usage threshold of 0.75."""
NODE = """\
Failure # 1 (occurred at 2026-11-20_13-06-52)
The actor died unexpectedly before finishing this task.
The actor died because its node has died. Node Id: 4f3f0ceacc2d"""


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (DIED, "the run's process died: it was killed, ran out of memory, or crashed"),
        (MONITOR, "out of memory: Ray killed the run's process before its node ran out"),
        (NODE, "the node that trained the run died"),
        ("ray.exceptions.RayTaskError(MemoryError): ray::train()\n  File ...\nMemoryError", "MemoryError"),
        ("Traceback\nRuntimeError: the node has died of boredom", "RuntimeError: the node has died of boredom"),
    ],
)
def test_the_reason_of_a_failure_is_one_plain_sentence(text, sentence):
    assert reason_of(text).startswith(sentence), reason_of(text)


def test_a_diverged_run_is_not_counted_as_failed():
    runs = [RunRecord(run_key=s, phase="measure", status=s) for s in ("finished", "failed", "diverged", "stopped")]
    runs.append(RunRecord(run_key="again", phase="measure", status="diverged"))
    counts = {m.key: m.value for m in view.cell_metrics(runs) if m.key.startswith("runs/")}
    one = dict.fromkeys(("runs/finished", "runs/failed", "runs/stopped"), 1)
    assert counts == one | {"runs/diverged": 2, "runs/measured": 0}


def test_a_measured_cell_means_the_runs_that_were_alone():
    def run(accuracy, **how):
        told = {"test_accuracy": accuracy, "val_accuracy": accuracy, "train_seconds": 10 * accuracy}
        return RunRecord(run_key=str(how), phase="measure", status="finished", **told, **how)

    runs = [run(0.5, exclusive=True), run(0.9), run(0.2, exclusive=True, resumed=True)]
    metrics = view.cell_metrics(runs)
    found = {m.key: m.value for m in metrics}
    means = {"final/test_accuracy": 0.5, "final/val_accuracy": 0.5, "train_seconds": 5.0}
    assert found.items() >= (means | {"runs/finished": 3, "runs/measured": 1}).items(), found
    assert view.cell_note(metrics) == "test accuracy 50.00 %, training 5.00 s, n = 1"


def test_a_run_never_ends_before_its_start_in_mlflow():
    run = RunRecord(started_at="2026-01-01T10:00:00+00:00", ended_at="2026-01-01T08:00:00+00:00", status="finished")
    assert view.end_millis(run) == view.millis(run.started_at)
