"""A whole sweep on a real private Ray cluster and a real sqlite store: failures, exit codes, continuing."""

from collections import Counter

import pytest
from mlflow import MlflowClient

from fastbp.record import EpochRecord, RunRecord, read_records
from sweep_files import invoke
from sweeps.ledger import Ledger

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray")]

SWEEP = """\
name: faults
task: {{data: digits, model: mlp, model_args: {{depth: 2, width: 8}}, data_args: {{limit: 128}}}}
recipe: {{epochs: 2, batch_size: 64, lr: {{log_uniform: [0.01, 0.5]}}}}
arms:
  bp: {{method: bp}}
  ldb: {{method: ldb, drop_rate: search}}
  broken: {{method: "broken_methods:Raises", recipe: {{lr: 0.1}}}}
  flaky: {{method: "broken_methods:Raises", flag: {flag}, recipe: {{lr: 0.1}}}}
  nan: {{method: "broken_methods:Nan", recipe: {{lr: 0.1}}}}
search: {{sampler: random, trials: 2, epochs: 1}}
measure: {{seeds: [0, 1], threads: 1}}
"""


@pytest.fixture(scope="module")
def sweep(ray, tmp_path_factory):
    """The folder of a sweep that has run once, and what the command said."""
    folder = tmp_path_factory.mktemp("faults")
    (folder / "faults.yaml").write_text(SWEEP.format(flag=folder / "flag"))
    return folder, invoke(folder, "run", "faults.yaml", "--no-report")


def records_of(folder):
    return list(read_records(folder / "fastbp-runs" / "faults" / "records.jsonl"))


def test_a_failing_arm_does_not_stop_the_others(sweep):
    folder, _ = sweep
    ends = Ledger.of(records_of(folder)).runs.values()
    found = Counter((r.phase, r.arm, r.role, r.status) for r in ends)
    assert found == {
        ("search", "bp", "baseline", "finished"): 2,
        ("search", "ldb", "method", "finished"): 2,
        ("search", "broken", "method", "failed"): 1,
        ("search", "flaky", "method", "finished"): 1,
        ("search", "nan", "method", "diverged"): 1,
        ("measure", "bp", "baseline", "finished"): 2,
        ("measure", "ldb", "method", "finished"): 2,
        ("measure", "ldb", "control", "finished"): 2,
        ("measure", "flaky", "method", "finished"): 2,
    }, f"runs ended as {found}"


def test_the_command_fails_and_says_which_run_and_why(sweep):
    _, result = sweep
    assert result.exit_code == 1, f"exit code {result.exit_code}\n{result.output}"
    assert "failed:  search broken method seed 1000: RuntimeError: boom in the backward pass" in result.output
    assert "missing: measure nan: no search trial finished" in result.output
    assert "mlflow ui --backend-store-uri sqlite:///" in result.output
    assert "Traceback" not in result.output, result.output
    assert len(result.output.splitlines()) < 50, f"the terminal was flooded:\n{result.output}"


def test_a_failed_run_was_tried_again_and_the_second_try_counts(sweep):
    folder, _ = sweep
    failed = [r for r in records_of(folder) if isinstance(r, RunRecord) and r.status == "failed"]
    tries = Counter((r.arm, r.attempt) for r in failed)
    assert tries == {("broken", 0): 1, ("broken", 1): 1, ("flaky", 0): 1}, f"failed attempts are {tries}"


def test_measured_runs_are_exclusive_complete_and_one_after_the_other(sweep):
    folder, _ = sweep
    records = records_of(folder)
    measured = [r for r in records if isinstance(r, RunRecord) and r.phase == "measure"]
    assert all(r.exclusive and not r.resumed for r in measured), "a measured run was not exclusive"
    assert {r.device["threads"] for r in measured} == {1}, "the thread count is not the file's"
    order = [(r.run_key, r.status) for r in measured]
    assert [status for _, status in order] == ["running", "finished"] * 8, f"runs overlap: {order}"
    epochs = Counter(r.run_key for r in records if isinstance(r, EpochRecord))
    assert all(epochs[key] == 2 for key, _ in order), f"measured epochs are {epochs}"
    searched = [r for r in records if isinstance(r, RunRecord) and r.phase == "search"]
    assert not any(r.exclusive for r in searched), "a search trial claims to be exclusive"
    assert {r.recipe["epochs"] for r in searched} == {1}, "a search trial has the wrong budget"


def test_mlflow_shows_the_failure_and_leaves_nothing_running(sweep):
    folder, _ = sweep
    client = MlflowClient(f"sqlite:///{folder / 'mlruns.db'}")
    experiment = client.get_experiment_by_name("faults")
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    states = {run.info.run_name: run.info.status for run in runs}
    assert states["faults"] == states["search broken"] == states["search broken #1"] == "FAILED", f"{states}"
    assert states["ldb"] == states["ldb control"] == states["ldb seed 1"] == "FINISHED", f"{states}"
    assert "RUNNING" not in states.values(), f"{states}"
    keys = Counter(run.data.tags.get("fastbp.run_key") for run in runs)
    assert keys.pop(None) == 1 + 5 + 4, "runs without a key: one sweep, five searches, four measured cells"
    assert set(keys) == set(Ledger.of(records_of(folder)).runs), "MLflow and the records hold different runs"
    assert set(keys.values()) == {1}, f"a run is there twice: {keys}"


def test_started_again_it_repeats_nothing_but_what_failed(sweep):
    folder, _ = sweep
    before = records_of(folder)
    result = invoke(folder, "run", "faults.yaml", "--no-report")
    assert result.exit_code == 1, f"exit code {result.exit_code}\n{result.output}"
    new = [r for r in records_of(folder)[len(before) :] if isinstance(r, RunRecord)]
    assert Counter((r.arm, r.attempt, r.status) for r in new) == {
        ("broken", 2, "failed"): 1,
        ("broken", 3, "failed"): 1,
    }, f"the second start ran {[(r.phase, r.arm, r.attempt, r.status) for r in new]}"


def test_status_and_sync_of_the_folder(sweep):
    folder, _ = sweep
    status = invoke(folder, "status", "fastbp-runs/faults")
    assert status.exit_code == 1, f"exit code {status.exit_code}: {status.output}"
    assert "RuntimeError: boom" in status.output, status.output
    sync = invoke(folder, "sync", "faults.yaml")
    assert sync.exit_code == 0, sync.output
    assert "MLflow agrees" in sync.output, sync.output


def test_a_sweep_without_failures_exits_with_zero_and_a_changed_file_is_refused(ray, tmp_path):
    text = SWEEP.format(flag=tmp_path / "flag")
    text = "".join(line for line in text.splitlines(True) if not line.startswith(("  broken", "  nan", "  flaky")))
    (tmp_path / "faults.yaml").write_text(text)
    result = invoke(tmp_path, "run", "faults.yaml", "--smoke", "--no-report", "--no-mlflow")
    assert result.exit_code == 0, result.output
    runs = Ledger.of(read_records(tmp_path / "fastbp-runs" / "faults-smoke" / "records.jsonl")).runs.values()
    found = Counter((r.phase, r.arm, r.recipe["epochs"]) for r in runs)
    expected = {("search", "bp", 1): 1, ("search", "ldb", 1): 1, ("measure", "bp", 1): 1, ("measure", "ldb", 1): 2}
    assert found == expected, f"a smoke run made {found}"
    assert not (tmp_path / "mlruns.db").exists(), "--no-mlflow made a store"
    (tmp_path / "changed.yaml").write_text(text.replace("[0.01, 0.5]", "[0.02, 0.5]"))
    result = invoke(tmp_path, "run", "changed.yaml", "--smoke", "--no-report", "--no-mlflow")
    assert result.exit_code != 0
    assert "another `name`, or another folder with --out" in str(result.exception), f"{result.exception!r}"


STUMBLES = """\
name: stumbles
task: {{data: digits, model: mlp, model_args: {{depth: 2, width: 8}}, data_args: {{limit: 128}}}}
recipe: {{epochs: 8, batch_size: 64, lr: 0.1}}
arms:
  stumbles: {{method: "broken_methods:Stumbles", flag: {folder}/flag}}
search: {{sampler: random, trials: 1, checkpoint_epochs: 1}}
storage_path: file://{folder}/shared
"""


@pytest.mark.long
def test_a_trial_continues_from_a_state_in_a_storage_that_is_a_uri(ray, tmp_path):
    (tmp_path / "stumbles.yaml").write_text(STUMBLES.format(folder=tmp_path))
    result = invoke(tmp_path, "run", "stumbles.yaml", "--no-report", "--no-mlflow")
    assert result.exit_code == 0, result.output
    records = list(read_records(tmp_path / "fastbp-runs" / "stumbles" / "records.jsonl"))
    (end,) = Ledger.of(records).runs.values()
    assert (end.status, end.attempt, end.resumed, end.reason) == ("finished", 1, True, ""), f"{end}"
    epochs = [(r.attempt, r.epoch) for r in records if isinstance(r, EpochRecord)]
    assert epochs == [(0, i) for i in range(5)] + [(1, i) for i in range(5, 8)], f"epochs are {epochs}"
    before = len(records)
    again = invoke(tmp_path, "run", "stumbles.yaml", "--no-report", "--no-mlflow")
    assert (again.exit_code, "1 of them already done" in again.output) == (0, True), again.output
    assert len(list(read_records(tmp_path / "fastbp-runs" / "stumbles" / "records.jsonl"))) == before


RETRIED = """\
name: retried
task: {{data: digits, model: mlp, model_args: {{depth: 2, width: 8}}, data_args: {{limit: 128}}}}
recipe: {{epochs: 1, batch_size: 64, lr: 0.1}}
arms:
  bp: {{method: bp}}
  flaky: {{method: "broken_methods:Raises", flag: {folder}/flag, recipe: {{batch_size: {{choice: [32, 64]}}}}}}
search: {{sampler: grid, trials: 2}}
measure: {{seeds: [0], threads: 1, controls: false}}
max_failures: 0
"""


@pytest.mark.long
def test_a_failed_trial_of_an_arm_that_is_measured_is_tried_again(ray, tmp_path):
    """The first of two trials fails; the arm is measured at the other's setting, which stands."""
    (tmp_path / "retried.yaml").write_text(RETRIED.format(folder=tmp_path))
    out = tmp_path / "fastbp-runs" / "retried" / "records.jsonl"
    first = invoke(tmp_path, "run", "retried.yaml", "--no-report", "--no-mlflow")
    assert first.exit_code == 1, first.output
    ledger = Ledger.of(read_records(out))
    states = Counter((r.phase, r.arm, r.status) for r in ledger.runs.values())
    assert states["search", "flaky", "failed"] == states["search", "flaky", "finished"] == 1, states
    assert states["measure", "flaky", "finished"] == 1, states
    again = invoke(tmp_path, "run", "retried.yaml", "--no-report", "--no-mlflow")
    assert again.exit_code == 0, again.output
    after = Ledger.of(read_records(out))
    assert {r.status for r in after.runs.values()} == {"finished"}
    assert sum(after.attempts.values()) == sum(ledger.attempts.values()) + 1, "more than the failed trial was run"
    assert after.of_phase("measure") == ledger.of_phase("measure"), "what was measured has changed"
