"""Search, measure and ablate in one go on a real private Ray cluster; what the report and MLflow say of it."""

import csv
import os
from collections import Counter

import pytest
from mlflow import MlflowClient

from fastbp.record import RunRecord, SweepRecord, read_records
from sweep_files import invoke
from sweeps.cluster import ray_session

pytestmark = [pytest.mark.slow, pytest.mark.long]

SWEEP = """\
name: parts
task: {data: digits, model: mlp, model_args: {depth: 2, width: 8}, data_args: {limit: 128}}
recipe: {epochs: 2, batch_size: 64, lr: {log_uniform: [0.01, 0.5]}}
arms:
  bp: {method: bp}
  both: {method: dbp, inner: {method: ldb, drop_rate: search}}
search: {sampler: random, trials: 1, epochs: 1}
measure: {seeds: [0], controls: false, threads: 1}
ablate:
  - {arm: both, design: leave_one_out, seeds: [0, 1]}
  - {arm: both, design: dose_response, factors: {recipe.lr: [0.001, 0.1]}, seeds: [1]}
"""
CELLS = {"bp": 2, "both": 2, "both/without-dbp": 2, "both/without-ldb": 2,
         "both/recipe.lr=0.001": 1, "both/recipe.lr=0.1": 1}  # fmt: skip


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """The folder of a sweep that was run twice, its records after the first run, and what both runs said."""
    folder = tmp_path_factory.mktemp("parts")
    (folder / "parts.yaml").write_text(SWEEP)
    before = os.environ.pop("RAY_ADDRESS", None)
    with ray_session():
        first = invoke(folder, "run", "parts.yaml")
    records = list(read_records(folder / "fastbp-runs" / "parts" / "records.jsonl"))
    again = invoke(folder, "run", "parts.yaml", "--no-report")
    if before is not None:
        os.environ["RAY_ADDRESS"] = before
    return folder, records, first, again


def test_every_cell_runs_once_alone_at_the_chosen_setting(sweep):
    _, records, first, _ = sweep
    assert first.exit_code == 0, first.output
    runs = [r for r in records if isinstance(r, RunRecord) and r.phase == "ablate"]
    ended = [r for r in runs if r.status == "finished"]
    assert Counter(r.arm for r in ended) == CELLS, f"cells are {Counter(r.arm for r in ended)}"
    assert all(r.exclusive and r.device["threads"] == 1 for r in ended)
    assert [r.status for r in runs] == ["running", "finished"] * 10, "runs overlap"
    assert [r.block for r in ended] == [0] * 4 + [1] * 6, "blocks are mixed"
    chosen = next(r for r in records if isinstance(r, RunRecord) and (r.phase, r.arm) == ("measure", "both"))
    whole = next(r for r in ended if r.arm == "both")
    assert (whole.method, whole.recipe) == (chosen.method, chosen.recipe)
    only = next(r for r in ended if r.arm == "both/without-dbp")
    assert (only.method, only.recipe) == (chosen.method["inner"], chosen.recipe), "something else changed too"
    plan = [r for r in records if isinstance(r, SweepRecord)][-1]
    assert (plan.measure_cells, plan.ablate_cells, len(plan.ablations)) == (2, 10, 2)


def test_started_again_it_runs_nothing(sweep):
    folder, records, _, again = sweep
    assert again.exit_code == 0, again.output
    assert "ablate: 10 runs, 10 of them already done" in again.output
    assert list(read_records(folder / "fastbp-runs" / "parts" / "records.jsonl")) == records


def test_the_report_shows_the_effects(sweep):
    folder, records, _, _ = sweep
    report = folder / "fastbp-runs" / "parts" / "report"
    rows = list(csv.DictReader((report / "tables" / "ablate_components.csv").read_text().splitlines()))
    ended = {(r.arm, r.seed): r for r in records if isinstance(r, RunRecord) and r.phase == "ablate" and r.ended_at}
    found = {(r["component"], r["step"]): float(r["accuracy"]) for r in rows}
    gains = [ended["both/without-ldb", s].test_accuracy - ended["both", s].test_accuracy for s in (0, 1)]
    assert found["ldb", "removed from both"] == pytest.approx(sum(gains) / 2)
    levels = [r["level"] for r in csv.DictReader((report / "tables" / "ablate_dose.csv").read_text().splitlines())]
    assert len(levels) == 3, f"levels are {levels}"
    assert sum("chosen" in level for level in levels) == 1
    assert (report / "figures" / "doses-group1-1.png").exists()
    assert "10 of 10 planned ablation runs finished" in (report / "report.md").read_text()


def test_mlflow_and_status_show_the_cells(sweep):
    folder, _, _, _ = sweep
    synced = invoke(folder, "sync", "parts.yaml")
    assert synced.exit_code == 0, synced.output
    client = MlflowClient(f"sqlite:///{folder / 'mlruns.db'}")
    experiment = client.get_experiment_by_name("parts")
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    states = {r.info.run_name: r.info.status for r in runs}
    cells = {
        r.info.run_name for r in runs if r.data.tags["fastbp.level"] == "cell" and r.data.tags["phase"] == "ablate"
    }
    assert cells == {f"ablate {name}" for name in CELLS}, f"cells are {cells}"
    assert set(states.values()) == {"FINISHED"}, f"{states}"
    assert "ablate both/without-dbp seed 1" in states
    shown = invoke(folder, "status", "parts.yaml")
    assert shown.exit_code == 0
    assert shown.output.count("ablate") == len(CELLS), shown.output
