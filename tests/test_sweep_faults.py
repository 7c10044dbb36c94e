"""Real sweeps, really hurt: after every fault the same command continues, and no finished run is lost or doubled."""

import os
import pickle
import resource
import signal
from datetime import datetime
from pathlib import Path

import pytest

import mlflow_servers
from fastbp.record import RunRecord
from faults import Victim, ended, under_way
from sweeps.saved_states import saved_states

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

TASK = """\
name: faults
task: {data: digits, model: mlp, model_args: {depth: 2, width: 8}, data_args: {limit: 128}}
recipe: {epochs: 5, batch_size: 64, lr: 0.1}
"""
TWO_PHASES = (
    TASK
    + """\
arms:
  bp: {method: bp, recipe: {lr: {log_uniform: [0.01, 0.5]}}}
  slow: {method: "fault_methods:Slow", seconds: 0.2, recipe: {lr: {log_uniform: [0.01, 0.5]}}}
search: {sampler: tpe, trials: 2, checkpoint_epochs: 1}
measure: {seeds: [0, 1], threads: 1, gpus: 0}
"""
)
CELLS = {("search", "bp"): 2, ("search", "slow"): 2, ("measure", "bp"): 2, ("measure", "slow"): 2}


@pytest.fixture
def victim(tmp_path):
    """Makes a sweep in the test's folder; whatever is left of it in the end is killed."""
    made = []

    def make(text, **environment):
        made.append(Victim(tmp_path, text, **environment))
        return made[-1]

    yield make
    for one in made:
        one.close()


class Poison:
    """What a stranger could put in the place of a checkpoint: unpickled, it writes a file."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_a_driver_killed_twice_a_torn_line_and_a_poisoned_checkpoint(victim, tmp_path):
    sweep, uri = victim(TWO_PHASES), f"sqlite:///{tmp_path / 'mlruns.db'}"
    sweep.start()
    sweep.until(lambda records: under_way(records, "search", epochs=3))
    assert sweep.kill() == -signal.SIGKILL
    sweep.check_nothing_runs()
    before = sweep.records()
    (hurt, *_) = under_way(before, "search", epochs=3)
    newest = Path(saved_states(str(sweep.out / "tune"), hurt.run_key)[0])
    newest.write_bytes(pickle.dumps({"model": Poison(tmp_path / "poisoned")}, protocol=2))
    with sweep.records_file.open("a") as file:
        file.write('{"kind": "epoch", "run_key": "' + hurt.run_key[:7])

    sweep.start()
    sweep.until(lambda records: ended(records, "measure") and under_way(records, "measure"))
    sweep.check_kept(before)
    before = sweep.records()
    assert sweep.kill() == -signal.SIGKILL

    assert sweep.run() == 0, sweep.said
    sweep.check_kept(before)
    sweep.check_ended(CELLS, uri)
    assert not (tmp_path / "poisoned").exists(), "a pickle from a checkpoint was executed"
    starts = [r for r in sweep.records() if isinstance(r, RunRecord) and r.run_key == hurt.run_key]
    again = next(r for r in starts if r.attempt == 1)
    assert again.reason.startswith(f"saved state unusable: {newest} (UnpicklingError"), again.reason
    older = int(newest.parent.name.rpartition("_")[2])  # checkpoint_000002 holds the state after epoch 3
    assert again.reason.endswith(f"it continues from epoch {older}"), again.reason
    assert sweep.runs()[hurt.run_key].resumed, "the run did not continue from the older checkpoint"


@pytest.mark.long
def test_a_signal_saves_the_trials_under_way(victim, tmp_path):
    text = (
        TASK + "arms: {slow: {method: 'fault_methods:Slow', seconds: 0.2, recipe: {lr: {log_uniform: [0.01, 0.5]}}}}\n"
    )
    sweep = victim(text + "search: {sampler: random, trials: 2}\n")
    sweep.start()
    sweep.until(lambda records: under_way(records, "search"))
    assert sweep.kill(signal.SIGTERM) == 128 + signal.SIGTERM, sweep.said
    before = sweep.records()
    hurt = under_way(before, "search")
    assert hurt
    assert all(saved_states(str(sweep.out / "tune"), run.run_key) for run in hurt), sweep.said
    assert sweep.run() == 0, sweep.said
    for run in hurt:
        assert sweep.runs()[run.run_key].resumed, "it did not continue from what was saved"
        epochs = [r.epoch for r in sweep.records() if r.kind == "epoch" and r.run_key == run.run_key]
        assert epochs == list(range(5)), f"every epoch once, in two attempts: {epochs}"


@pytest.mark.long
def test_sigterm_ctrl_c_a_clock_set_back_and_a_full_disk(victim, tmp_path):
    sweep = victim(TWO_PHASES, FAULT_CLOCK=str(tmp_path / "back"))
    uri = f"sqlite:///{tmp_path / 'mlruns.db'}"
    sweep.start()
    sweep.until(lambda records: under_way(records, "search"))
    assert sweep.kill(signal.SIGTERM) == 128 + signal.SIGTERM, sweep.said
    assert "interrupted; the same command continues" in sweep.said, sweep.said
    sweep.check_mlflow(uri, sweep.runs())
    sweep.check_nothing_runs()
    before = sweep.records()

    process = sweep.start()
    sweep.until(lambda records: under_way(records[len(before) :], "search"))
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    assert sweep.wait() == 128 + signal.SIGINT, sweep.said
    sweep.check_kept(before)
    sweep.check_mlflow(uri, sweep.runs())
    sweep.check_nothing_runs()
    before = sweep.records()

    process = sweep.start()
    sweep.until(lambda records: under_way(records, "measure"))
    (tmp_path / "back").touch()
    sweep.until(lambda records: ended(records, "measure") >= 1 and under_way(records, "measure"))
    limit = sweep.records_file.stat().st_size + 100  # in the middle of a line
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, limit))
    assert sweep.wait() == 3, sweep.said
    assert "records.jsonl: a record cannot be written (File too large): free space" in sweep.said, sweep.said
    assert "Traceback" not in sweep.said, sweep.said
    assert sweep.records_file.read_bytes().endswith(b"}\n"), "a torn line was left behind"
    sweep.check_nothing_runs()
    sweep.check_kept(before)
    before = sweep.records()

    assert sweep.run(report=True) == 0, sweep.said
    sweep.check_kept(before)
    sweep.check_ended(CELLS, uri)
    assert (sweep.out / "report" / "report.html").exists(), sweep.said
    late = [
        r for r in sweep.runs().values() if datetime.fromisoformat(r.ended_at) < datetime.fromisoformat(r.started_at)
    ]
    assert not late, f"ended before they started: {[(r.started_at, r.ended_at) for r in late]}"


HURT_RUNS = (
    TASK.replace("{", "{{").replace("}", "}}")
    + """\
arms:
  bp: {{method: bp}}
  slow: {{method: "fault_methods:Slow", seconds: 0.2}}
  python: {{method: "fault_methods:Hungry", kind: python, flag: {folder}/python}}
  device: {{method: "fault_methods:Hungry", kind: device, flag: {folder}/device}}
  nan: {{method: "broken_methods:Nan"}}
measure: {{seeds: [0, 1, 2], threads: 1, gpus: 0}}
mlflow: {{tracking_uri: {uri}}}
"""
)


@pytest.mark.long
def test_a_killed_worker_two_kinds_of_out_of_memory_nan_and_an_absent_mlflow(victim, tmp_path, monkeypatch):
    port = mlflow_servers.free_port()
    monkeypatch.setattr(mlflow_servers, "free_port", lambda: port)
    uri = f"http://127.0.0.1:{port}"
    sweep = victim(HURT_RUNS.format(folder=tmp_path, uri=uri))
    cells = {("measure", arm): 3 for arm in ("bp", "slow", "python", "device", "nan")}
    with mlflow_servers.mlflow_server(tmp_path / "server"):
        sweep.start()
        sweep.until(lambda records: ended(records, "measure") >= 5)
    sweep.until(lambda records: any(run.arm == "slow" for run in under_way(records, "measure")))
    for pid in sweep.pids("Trainable"):
        os.kill(pid, signal.SIGKILL)
    sweep.until(lambda records: ended(records, "measure") >= 10)
    with mlflow_servers.mlflow_server(tmp_path / "server"):
        code = sweep.wait()
        if "MLflow is behind" in sweep.said:  # the server was slower than the rest of the sweep
            sweep.sync()
        assert code == 0, sweep.said
        sweep.check_ended(cells, uri)
    assert {r.status for r in sweep.runs().values() if r.arm == "nan"} == {"diverged"}
    failed = {r.arm: r.reason for r in sweep.records() if isinstance(r, RunRecord) and r.status == "failed"}
    assert set(failed) == {"slow", "python", "device"}, f"failed attempts: {failed}"
    assert failed["slow"] == "the run's process died: it was killed, ran out of memory, or crashed"
    assert failed["python"].startswith("MemoryError"), failed
    assert failed["device"].startswith("torch.OutOfMemoryError: CUDA out of memory"), failed


@pytest.mark.long
def test_the_machines_own_raylet_killed(victim, tmp_path):
    arms = 'arms:\n  bp: {method: bp}\n  slow: {method: "fault_methods:Slow", seconds: 0.2}\n'
    brake = tmp_path / "brake"  # the actor of a dead raylet may finish a short run, and then nothing is lost
    brake.touch()
    sweep = victim(TASK + arms + "measure: {seeds: [0, 1, 2], threads: 1, gpus: 0}\n", FAULT_BRAKE=str(brake))
    sweep.start("--no-mlflow")
    sweep.until(lambda records: ended(records, "measure") and under_way(records, "measure"))
    before = sweep.records()
    os.kill(sweep.pids("raylet/raylet")[0], signal.SIGKILL)
    assert sweep.wait() == 3, sweep.said
    assert "Ray died on this machine" in sweep.said.splitlines()[-1], sweep.said
    brake.unlink()
    sweep.check_nothing_runs()
    assert sweep.run("--no-mlflow") == 0, sweep.said
    sweep.check_kept(before)
    sweep.check_ended({("measure", "bp"): 3, ("measure", "slow"): 3})
