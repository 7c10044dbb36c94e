"""MLflow agrees with the records: three levels, once each, whatever order and however often."""

import gzip
import math
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow import MlflowClient

from fastbp.record import RecordWriter, RunRecord, SweepRecord, read_records
from sweep_files import TOY, ended, history, plan_of, sweep_record
from sweeps import mlflow_view as view
from sweeps.mlflow_sync import MlflowMirror, try_sync
from sweeps.mlflow_tree import Tree
from sweeps.mlflow_view import MAX_METRICS, mean_interval, method_name
from sweeps.outcome import planned_trials


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    return f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlruns.db'}"


@pytest.fixture
def sweep(tmp_path, request):
    """A plan under a name of its own, so that tests share one store; search trials; measured runs."""
    plan = plan_of(tmp_path, TOY.replace("name: toy", f"name: {request.node.name[:60].strip('[]')}"))
    trials = [plan.search_run(arm, _values(arm, lr)) for lr in (0.1, 0.2, 0.3) for arm in plan.arms]
    from sweeps.ledger import Ledger

    ledger = Ledger.of([ended(t) for t in trials])
    return plan, trials, plan.measure_runs(ledger)


def _values(arm, lr):
    return {"recipe.lr": lr} | ({"method.drop_rate": lr} if "method.drop_rate" in arm.space else {})


def write(path, *records):
    RecordWriter(path).write(*records)
    return path


def whole(tmp_path, sweep, **end):
    plan, trials, runs = sweep
    lines = [line for run in (*trials, *runs) for line in history(run, **end)]
    return write(tmp_path / "records.jsonl", sweep_record(plan, len(runs)), *lines)


def runs_of(uri, name):
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name(name)
    return list(client.search_runs([experiment.experiment_id], max_results=1000)), client


def by_level(found, level):
    return [run for run in found if run.data.tags["fastbp.level"] == level]


def test_three_levels_with_names_a_person_can_read(tmp_path, uri, sweep):
    MlflowMirror(whole(tmp_path, sweep), uri).sync(final=True)
    found, _ = runs_of(uri, sweep[0].sweep.name)
    parents = by_level(found, "sweep")
    assert len(parents) == 1, f"{len(parents)} sweep runs"
    cells = {run.info.run_name: run for run in by_level(found, "cell")}
    assert set(cells) == {"search bp", "search ldb", "bp", "ldb", "ldb control"}, f"cells are {set(cells)}"
    assert {run.data.tags["mlflow.parentRunId"] for run in cells.values()} == {parents[0].info.run_id}
    names = {run.info.run_name: run for run in by_level(found, "run")}
    assert len(names) == 6 + 9, f"runs are {sorted(names)}"
    for name, cell in {"search ldb #3": "search ldb", "ldb control seed 2": "ldb control", "bp seed 0": "bp"}.items():
        assert names[name].data.tags["mlflow.parentRunId"] == cells[cell].info.run_id, f"{name} is not under {cell}"
    assert {run.info.status for run in found} == {"FINISHED"}, f"states are {[r.info.status for r in found]}"


def test_metrics_are_few_finite_and_have_the_values_of_the_records(tmp_path, uri, sweep):
    path = whole(tmp_path, sweep)
    MlflowMirror(path, uri).sync(final=True)
    found, client = runs_of(uri, sweep[0].sweep.name)
    records = {key: h.run for key, h in Tree.of(read_records(path)).runs.items()}
    for run in by_level(found, "run"):
        record, metrics, params = records[run.data.tags["fastbp.run_key"]], run.data.metrics, run.data.params
        assert len(metrics) <= MAX_METRICS, f"{len(metrics)} metrics: {sorted(metrics)}"
        assert all(math.isfinite(v) for v in metrics.values()), f"not finite: {metrics}"
        assert metrics["final/test_accuracy"] == record.test_accuracy
        assert metrics["hp/lr"] == record.recipe["lr"], f"hp/lr is {metrics['hp/lr']}"
        assert float(params["recipe.lr"]) == record.recipe["lr"]
        assert params["method.method"] == record.method["method"]
        curve = client.get_metric_history(run.info.run_id, "train_seconds")
        assert [(m.step, m.value) for m in curve] == [(i, i + 1.0) for i in range(record.epochs_done)], f"{curve}"
    cell = next(run for run in by_level(found, "cell") if run.info.run_name == "ldb")
    assert cell.data.metrics["final/test_accuracy"] == pytest.approx(0.8)
    assert cell.data.metrics["runs/finished"] == 3
    note = cell.data.tags["mlflow.note.content"]
    assert note == "test accuracy 80.00 (80.00 to 80.00) %, training 1.00 (1.00 to 1.00) s, n = 3", f"note is {note!r}"
    assert cell.data.params["method.drop_rate"] == str(0.1), f"the cell's setting is {cell.data.params}"


def test_a_server_that_dies_between_numbers_and_status_leaves_nothing_running(tmp_path, uri, sweep, monkeypatch):
    path, dead, real = whole(tmp_path, sweep), [], MlflowClient.set_terminated

    def dies(client, run_id, *rest):
        if run_id not in dead:
            dead.append(run_id)
            raise OSError("the server is gone")
        return real(client, run_id, *rest)

    monkeypatch.setattr(MlflowClient, "set_terminated", dies)
    mirror = MlflowMirror(path, uri)
    while try_sync(mirror, final=True):
        assert len(dead) < 100, "it never ends"
    found, _ = runs_of(uri, sweep[0].sweep.name)
    assert {run.info.status for run in found} == {"FINISHED"}, f"{[(r.info.run_name, r.info.status) for r in found]}"
    assert {run.info.run_id for run in found} == set(dead), "not every run's status was lost once"


def test_syncing_again_changes_nothing(tmp_path, uri, sweep):
    path = whole(tmp_path, sweep)
    mirror = MlflowMirror(path, uri)
    assert mirror.sync(final=True) > 0
    before, client = runs_of(uri, sweep[0].sweep.name)
    points = {run.info.run_id: len(client.get_metric_history(run.info.run_id, "train_seconds")) for run in before}
    assert mirror.sync(final=True) == 0, "the same mirror wrote again"
    assert MlflowMirror(path, uri).sync(final=True) == 0, "a new mirror wrote again"
    after, _ = runs_of(uri, sweep[0].sweep.name)
    assert {run.info.run_id for run in after} == set(points), "runs were added"
    now = {run.info.run_id: len(client.get_metric_history(run.info.run_id, "train_seconds")) for run in after}
    assert now == points, "points were added"


def test_syncing_line_by_line_ends_where_syncing_once_does(tmp_path, uri, sweep):
    plan, trials, _ = sweep
    lines = [line for run in trials[:2] for line in history(run)]
    lines = [lines[i] for i in (0, 3, 1, 4, 2, 5)]  # two runs at a time, as a search has them
    path = write(tmp_path / "records.jsonl", sweep_record(plan))
    for line in lines:
        write(path, line)
        MlflowMirror(path, uri).sync()
    MlflowMirror(path, uri).sync(final=True)
    found, client = runs_of(uri, plan.sweep.name)
    runs = by_level(found, "run")
    assert len(runs) == 2, f"{len(runs)} runs for two"
    for run in runs:
        steps = [m.step for m in client.get_metric_history(run.info.run_id, "train_seconds")]
        assert steps == [0], f"curve has steps {steps}"


def test_a_failed_run_is_failed_with_its_reason_up_to_the_sweep(tmp_path, uri, sweep):
    plan, trials, runs = sweep
    bad = next(run for run in runs if run.role == "control")
    lines = [line for run in (*trials, *runs) if run is not bad for line in history(run)]
    lines += history(bad, status="failed", reason="RuntimeError: boom", val=None)
    MlflowMirror(write(tmp_path / "records.jsonl", sweep_record(plan, len(runs)), *lines), uri).sync(final=True)
    found, _ = runs_of(uri, plan.sweep.name)
    failed = {run.info.run_name: run for run in found if run.info.status == "FAILED"}
    assert set(failed) == {f"ldb control seed {bad.seed}", "ldb control", plan.sweep.name}, f"failed: {set(failed)}"
    assert failed[f"ldb control seed {bad.seed}"].data.tags["reason"] == "RuntimeError: boom"


def test_an_interrupted_run_is_closed_and_opens_again_when_it_goes_on(tmp_path, uri, sweep):
    plan, trials, _ = sweep
    path = write(tmp_path / "records.jsonl", sweep_record(plan), *history(trials[0], status="running"))
    MlflowMirror(path, uri).sync()
    assert by_level(runs_of(uri, plan.sweep.name)[0], "run")[0].info.status == "RUNNING"
    MlflowMirror(path, uri).sync(final=True)
    found, _ = runs_of(uri, plan.sweep.name)
    assert "RUNNING" not in {run.info.status for run in found}, "a run nobody trains is left RUNNING"
    write(path, *history(trials[0], attempt=1))
    MlflowMirror(path, uri).sync(final=True)
    runs = by_level(runs_of(uri, plan.sweep.name)[0], "run")
    assert [run.info.status for run in runs] == ["FINISHED"], f"after the retry: {[r.info.status for r in runs]}"
    assert runs[0].data.tags["fastbp.attempt"] == "1"


def test_a_search_cut_short_between_two_trials_is_not_finished(tmp_path, uri):
    """No run is under way when the sweep ends, and yet trials are missing."""
    plan = plan_of(tmp_path, TOY.replace("measure: {seeds: [0, 1, 2]}\n", ""))
    bp, ldb = plan.arms
    trials = [plan.search_run(bp, {"recipe.lr": lr / 10}) for lr in (1, 2, 3)]
    trials += [plan.search_run(ldb, {"recipe.lr": lr / 10, "method.drop_rate": 0.3}) for lr in (1, 2, 3)]
    lines = [line for run in trials[:4] for line in history(run)]
    path = write(tmp_path / "records.jsonl", replace(sweep_record(plan), search_runs=planned_trials(plan)), *lines)

    def states(final):
        MlflowMirror(path, uri).sync(final=final)
        found, _ = runs_of(uri, plan.sweep.name)
        return {run.info.run_name: run.info.status for run in found if "#" not in run.info.run_name}

    assert states(final=False) == {plan.sweep.name: "RUNNING", "search bp": "FINISHED", "search ldb": "RUNNING"}
    assert states(final=True) == {plan.sweep.name: "KILLED", "search bp": "FINISHED", "search ldb": "KILLED"}
    write(path, *[line for run in trials[4:] for line in history(run)])
    assert set(states(final=True).values()) == {"FINISHED"}


def test_a_run_that_was_not_alone_says_so_in_its_tags(tmp_path, uri, sweep):
    plan, _, runs = sweep
    start, *epochs, end = history(runs[0])
    shared = replace(end, exclusive=False, reason="the processor is shared: other programs kept 2.0 of 2 cores busy")
    path = write(tmp_path / "records.jsonl", sweep_record(plan, 1), start, *epochs)
    for expected, lines in (("true", ()), ("false", (shared,))):
        MlflowMirror(write(path, *lines), uri).sync()
        found, _ = runs_of(uri, plan.sweep.name)
        assert by_level(found, "run")[0].data.tags["exclusive"] == expected
    assert not [key for key in by_level(found, "cell")[0].data.metrics if key.startswith("train_seconds")]


def test_the_curve_of_a_retried_run_has_every_epoch_once(tmp_path, uri, sweep):
    plan, _, runs = sweep
    first, second = history(runs[0], status="failed", reason="x", val=None), history(runs[0], attempt=1)
    assert [len(first), len(second)] == [4, 4], "start, two epochs, end"
    records = tmp_path / "records.jsonl"

    def curve():
        MlflowMirror(records, uri).sync()
        found, client = runs_of(uri, plan.sweep.name)
        run = by_level(found, "run")[0]
        return [m.step for m in client.get_metric_history(run.info.run_id, "train_seconds")]

    write(records, sweep_record(plan), *first)
    assert curve() == [0, 1]
    write(records, second[0])
    assert curve() == [], "the second attempt starts with the curve of the first"
    write(records, second[2])
    assert curve() == [0, 1], "an attempt that continues from a checkpoint lost the epochs before"


def test_the_artifacts_hold_every_line_of_the_records(tmp_path, uri, sweep):
    plan, trials, runs = sweep
    lines = [line for run in runs for line in history(run)]
    lines += [*history(trials[0], status="failed", reason="x", val=None), *history(trials[0], attempt=1)]
    path = write(tmp_path / "records.jsonl", sweep_record(plan, len(runs)), *lines)
    report = tmp_path / "report.html"
    report.write_text("<html></html>")
    MlflowMirror(path, uri).sync(final=True, report=report)
    found, client = runs_of(uri, plan.sweep.name)
    for run in found:
        names = {item.path for item in client.list_artifacts(run.info.run_id)}
        expected = {"records", "report.html"} if run.data.tags["fastbp.level"] == "sweep" else set()
        assert names == expected, f"{run.info.run_name} has artifacts {names}"
    assert uploaded(uri, plan) == [path.read_bytes()], "the artifact is not the records file"


def uploaded(uri, plan):
    """Contents of the record artifacts of the tracked sweep."""
    found, client = runs_of(uri, plan.sweep.name)
    (sweep_run,) = by_level(found, "sweep")
    items = client.list_artifacts(sweep_run.info.run_id, "records")
    return [gzip.decompress(Path(client.download_artifacts(sweep_run.info.run_id, i.path)).read_bytes()) for i in items]


def test_records_are_uploaded_while_small_then_when_they_grew_and_at_the_end(tmp_path, uri, sweep, monkeypatch):
    plan, trials, _ = sweep
    path = write(tmp_path / "records.jsonl", sweep_record(plan), *history(trials[0]))
    MlflowMirror(path, uri).sync()
    small = path.read_bytes()
    assert uploaded(uri, plan) == [small]
    monkeypatch.setattr("sweeps.mlflow_sync.SMALL_BYTES", 10)
    with path.open("ab") as file:
        file.write(b" " * (len(small) // 20))
    MlflowMirror(path, uri).sync()
    assert uploaded(uri, plan) == [small], "a twentieth more is uploaded again"
    MlflowMirror(path, uri).sync(final=True)
    assert uploaded(uri, plan) == [path.read_bytes()], "the end is not uploaded"
    write(path, *history(trials[1]), *history(trials[2]))
    MlflowMirror(path, uri).sync()
    assert uploaded(uri, plan) == [path.read_bytes()], "records that grew by more than a tenth are not uploaded"


def test_two_machines_that_share_a_sweep_have_a_file_each(tmp_path, uri, sweep):
    plan, trials, _ = sweep
    for i in range(2):
        path = write(tmp_path / f"machine{i}" / "records.jsonl", sweep_record(plan), *history(trials[i]))
        MlflowMirror(path, uri).sync(final=True)
    expected = {(tmp_path / f"machine{i}" / "records.jsonl").read_bytes() for i in range(2)}
    assert set(uploaded(uri, plan)) == expected, "one machine's records replaced the other's"


def test_an_absent_server_is_one_line_and_not_an_exception(tmp_path, sweep, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    error = try_sync(MlflowMirror(whole(tmp_path, sweep), "http://127.0.0.1:9"))
    assert error, "an absent server was not noticed"
    assert "\n" not in error, f"more than one line: {error!r}"


def test_mean_interval_is_students():
    from scipy import stats

    values = [0.5, 0.7, 0.9, 0.4]
    mean, low, high = mean_interval(values)
    expected = stats.t.interval(0.95, 3, loc=0.625, scale=stats.sem(values))
    assert (mean, low, high) == pytest.approx((0.625, *expected))
    assert mean_interval([]) == (None, None, None)


def test_method_names_show_the_combination():
    inner = {"method": "ldb", "inner": {"method": "bp"}}
    assert method_name({"method": "dbp", "inner": inner}) == "dbp+ldb"
    assert method_name({"method": "bp"}) == "bp"


def test_a_sweep_is_running_until_all_its_measure_cells_ended():
    def run(status, phase):
        return RunRecord(run_key=f"{status}{phase}", status=status, phase=phase)

    searching = SweepRecord(arms=["bp", "ldb"], seeds=[0, 1], search_trials=4)
    runs = [run("finished", "search")] * 8
    assert not view.is_complete(searching, runs, final=False), "the search is over, the measuring is still to come"
    assert view.end_of(["finished"] * 8, False, False) == "RUNNING"
    measuring = SweepRecord(arms=["bp", "ldb"], seeds=[0, 1], measure_cells=2)
    assert not view.is_complete(measuring, [run("finished", "measure")], final=False)
    assert view.is_complete(measuring, [run("finished", "measure")] * 2, final=False)
    search_only = SweepRecord(arms=["bp", "ldb"], search_trials=4)
    assert not view.is_complete(search_only, runs, final=False)
    assert view.is_complete(search_only, runs, final=True)
    assert not view.is_complete(search_only, [*runs, run("running", "search")], final=True)
