"""The plan of a sweep: chosen settings and measured blocks."""

import errno
import io
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fastbp import LayerDropBack
from fastbp.models import make_model
from sweep_files import TOY, ended, plan_of
from sweeps import output_folder
from sweeps.drive import run_sweep
from sweeps.experiments import Experiments
from sweeps.ledger import Ledger, config_of
from sweeps.outcome import planned_trials, unsearched
from sweeps.output_folder import keep_copy, locked, open_ledger
from sweeps.progress import Progress, plan_table
from sweeps.saved_states import saved_states
from sweeps.source import SweepError, SweepStopped


def searched(plan, arm, rows):
    """A ledger of search trials of one arm: (lr, drop_rate, fields of the end)."""
    arm = next(a for a in plan.arms if a.name == arm)
    records = []
    for lr, drop_rate, end in rows:
        values = {"recipe.lr": lr} | ({"method.drop_rate": drop_rate} if "method.drop_rate" in arm.space else {})
        records.append(ended(plan.search_run(arm, values), **end))
    return records


def full_ledger(plan):
    rows = [(0.1, 0.3, {"val": 0.7}), (0.2, 0.4, {"val": 0.9})]
    return Ledger.of([*searched(plan, "bp", rows), *searched(plan, "ldb", rows)])


def test_every_block_has_every_arm_and_control_once_with_the_anchor_and_its_own_order(tmp_path):
    plan = plan_of(tmp_path)
    runs = plan.measure_runs(full_ledger(plan))
    blocks = [[r for r in runs if r.block == b] for b in range(3)]
    assert [r for block in blocks for r in block] == runs, "blocks are not run one after the other"
    for block, seed in zip(blocks, plan.sweep.measure.seeds, strict=True):
        cells = Counter((r.arm, r.role) for r in block)
        expected = {("bp", "baseline"): 1, ("ldb", "method"): 1, ("ldb", "control"): 1}
        assert cells == expected, f"block of seed {seed} holds {cells}"
        assert {r.seed for r in block} == {seed}, f"block mixes seeds {[r.seed for r in block]}"
    orders = {tuple((r.arm, r.role) for r in block) for block in blocks}
    assert len(orders) > 1, "all blocks have the same order"
    again = plan_of(tmp_path).measure_runs(full_ledger(plan))
    assert again == runs, "the order is not a function of the file"


def test_measured_runs_take_the_best_setting_and_the_full_recipe(tmp_path):
    plan = plan_of(tmp_path)
    runs = plan.measure_runs(full_ledger(plan))
    method = next(r for r in runs if r.arm == "ldb" and r.role == "method")
    control = next(r for r in runs if r.arm == "ldb" and r.role == "control")
    assert method.method == LayerDropBack(drop_rate=0.4), f"measured {method.method}"
    model = make_model("mlp", (1, 8, 8), 10, {"depth": 2, "width": 8}, 0)
    assert control.method == LayerDropBack(drop_rate=0.4).exact(model), f"control is {control.method}"
    assert control.method != method.method, "the control is the method itself"
    assert control.recipe == method.recipe, "the control has another recipe"
    assert (method.recipe.lr, method.recipe.epochs) == (0.2, 2), f"recipe is {method.recipe}"


@pytest.mark.parametrize(
    ("rows", "lr"),
    [
        ([(0.1, 0.3, {"val": 0.9}), (0.2, 0.4, {"val": 0.9})], 0.1),
        ([(0.1, 0.3, {"val": 0.9}), (0.2, 0.4, {"val": 0.9, "examples": 64})], 0.2),
        ([(0.1, 0.3, {"val": 0.8}), (0.2, 0.4, {"val": 0.99, "status": "diverged"})], 0.1),
        ([(0.1, 0.3, {"val": 0.8}), (0.2, 0.4, {"val": 0.99, "status": "stopped"})], 0.1),
        ([(0.1, 0.3, {"val": 0.8}), (0.2, 0.4, {"val": None})], 0.1),
    ],
    ids=["tie: earlier", "tie: fewer examples", "diverged", "stopped", "never evaluated"],
)
def test_the_choice_is_the_best_finished_trial(tmp_path, rows, lr):
    plan = plan_of(tmp_path)
    chosen = plan.chosen(plan.arms[1], Ledger.of(searched(plan, "ldb", rows)))
    assert chosen is not None
    assert chosen["recipe.lr"] == lr, f"chose {chosen}"


def test_once_measured_a_setting_stands(tmp_path):
    plan = plan_of(tmp_path)
    ledger = full_ledger(plan)
    ledger.add(ended(next(r for r in plan.measure_runs(ledger) if r.arm == "ldb" and r.role == "method")))
    for record in searched(plan, "ldb", [(0.4, 0.5, {"val": 0.95})]):
        ledger.add(record)
    chosen = plan.chosen(plan.arms[1], ledger)
    assert chosen == {"recipe.lr": 0.2, "method.drop_rate": 0.4}, f"a later trial changed the choice to {chosen}"


def test_an_arm_without_a_finished_trial_is_left_out(tmp_path):
    plan = plan_of(tmp_path)
    rows = [(0.1, 0.3, {"status": "failed", "val": None})]
    ledger = Ledger.of([*searched(plan, "bp", [(0.1, 0, {})]), *searched(plan, "ldb", rows)])
    assert {r.arm for r in plan.measure_runs(ledger)} == {"bp"}, "an arm without a setting was planned"


def test_without_controls_there_are_none(tmp_path):
    plan = plan_of(tmp_path, TOY.replace("seeds: [0, 1, 2]", "seeds: [0, 1, 2], controls: false"))
    roles = {r.role for r in plan.measure_runs(full_ledger(plan))}
    assert roles == {"baseline", "method"}, f"roles are {roles}"


def test_a_recorded_run_gives_its_configuration_back(tmp_path):
    plan = plan_of(tmp_path)
    for run in plan.measure_runs(full_ledger(plan)):
        again = config_of(ended(run))
        assert again == run, f"{run} came back as {again}"
        assert again.key == replace(run, block=None).key, "the key depends on the block"


def test_a_folder_of_another_sweep_is_refused_with_the_way_out(tmp_path):
    from sweep_files import sweep_record

    plan = plan_of(tmp_path)
    _, writer = open_ledger(plan, tmp_path / "out")
    writer.write(sweep_record(plan))
    open_ledger(plan, tmp_path / "out")
    changed = plan_of(tmp_path, TOY.replace("trials: 3", "trials: 4"))
    with pytest.raises(SweepError, match="another `name`, or another folder with --out"):
        open_ledger(changed, tmp_path / "out")


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "out"
    with pytest.raises(SweepError, match=r"cannot be written .* give another folder with --out"), locked(out):
        pass


def test_a_folder_without_locks_is_not_taken_for_a_running_sweep(tmp_path, monkeypatch):
    with locked(tmp_path) as first, locked(tmp_path) as second:
        assert (first, second) == (True, False)

    def nothing(file, how):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(output_folder.fcntl, "flock", nothing)
    with pytest.raises(SweepError, match=r"cannot lock files \(Function not .* --out"), locked(tmp_path):
        pass


def test_a_full_disk_leaves_the_copy_of_the_sweep_file_as_it_was(tmp_path, monkeypatch):
    file, copy = tmp_path / "mine.yaml", tmp_path / "sweep.yaml"
    file.write_text("name: one")
    keep_copy(file, copy)
    file.write_text("name: two")

    def full(path, data):
        path.open("w").close()
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(SweepStopped, match=r"No space left on device.*: free space, then run the same command again"):
        keep_copy(file, copy)
    assert copy.read_text() == "name: one"


def test_whatever_ends_a_sweep_that_has_begun_mlflow_is_told(tmp_path, monkeypatch):
    plan, synced = plan_of(tmp_path), []
    monkeypatch.setattr("sweeps.mlflow_pace.final_sync", lambda mirror, say: synced.append(1) or "")

    def no_node(self):
        raise SweepStopped("no node has that device")

    monkeypatch.setattr("sweeps.drive._Driver._search", no_node)
    _, writer = open_ledger(plan, tmp_path / "out")
    for expected in ([], [1]):
        with pytest.raises(SweepStopped, match="no node has that device"):
            run_sweep(plan, tmp_path / "toy.yaml", tmp_path / "out", Progress(Console(quiet=True)), mlflow=False)
        assert synced == expected, "MLflow is told of a sweep that has runs, and of no other"
        writer.write(ended(plan.search_run(plan.arms[0], {"recipe.lr": 0.1}), status="running"))


@pytest.mark.parametrize("scheme", ["", "file://"], ids=["folder", "URI"])
def test_the_saved_states_of_a_run_are_found_newest_first_whatever_the_clock_said(tmp_path, scheme):
    storage = f"{scheme}{tmp_path / 'tune'}"
    assert saved_states(storage, "abc") == []
    names = ["abc-1/checkpoint_000000", "abc-0/checkpoint_000010", "abc-0/checkpoint_000009"]
    for age, name in enumerate([*names, "abcd-2/checkpoint_000020"]):
        (tmp_path / "tune" / "toy-search" / name).mkdir(parents=True)
        file = tmp_path / "tune" / "toy-search" / name / "run.pt"
        file.write_text("")
        os.utime(file, (age, age))  # the newest has the oldest date
    (tmp_path / "tune" / "toy-search" / "abc-3" / "checkpoint_000000").mkdir(parents=True)  # cut short
    (tmp_path / "tune" / "toy-search" / "tuner.pkl").write_text("")
    assert saved_states(storage, "abc") == [f"{storage}/toy-search/{name}/run.pt" for name in names]
    assert saved_states(f"{storage}/", "abc") == saved_states(storage, "abc")


def test_a_storage_that_cannot_be_read_costs_the_epochs_and_is_said(tmp_path):
    said, plan = [], plan_of(tmp_path)
    run = plan.search_run(plan.arms[0], {"recipe.lr": 0.1})
    parts: Any = (plan.sweep, "nowhere://bucket", None, Ledger(), None, None, said.append)
    trial = Experiments(*parts).trial(exclusive=False, threads=1, gpus=0)
    assert trial(run, 0)["checkpoints"] == []
    assert not said, "a first attempt has no state to look for"
    assert trial(run, 1)["checkpoints"] == []
    assert said[0].startswith("search bp: starts anew, as its saved states cannot be looked up ("), said


def plan_text(plan):
    console = Console(file=io.StringIO(), width=100)
    console.print(plan_table(plan))
    return console.file.getvalue()


def test_the_plan_shows_the_parts_that_the_file_has_and_how_many_settings(tmp_path):
    text = plan_text(plan_of(tmp_path))
    assert all(f" {name} " in text for name in ("searched", "trials", "measured")), text
    assert "│ 3 + control" in text, text
    several = TOY.replace("epochs: 1}", "epochs: 1, objectives: [val_accuracy, flops]}")
    text = plan_text(plan_of(tmp_path, several.replace("{seeds", "{settings: 2, seeds")))
    assert "│ up to 2 × 3 + control" in text, text
    assert "│ 3  " in text, "the anchor has one setting"
    alone = TOY[: TOY.index("search:")].replace("drop_rate: search", "drop_rate: 0.5")
    alone = alone.replace("{log_uniform: [0.01, 0.5]}", "0.1")
    text = plan_text(plan_of(tmp_path, alone + "ablate: {arm: ldb, design: leave_one_out, seeds: [0]}\n"))
    assert not any(f" {name} " in text for name in ("searched", "trials", "measured")), text


def test_only_what_is_left_of_a_search_is_searched(tmp_path):
    """Nothing once all trials ended, the failed ones even of an arm that is measured; its settings stand meanwhile."""
    plan = plan_of(tmp_path)
    assert planned_trials(plan) == {"bp": 3, "ldb": 3}
    rows = [(0.1, 0.3, {}), (0.2, 0.4, {"status": "diverged", "val": None}), (0.3, 0.5, {"status": "stopped"})]
    left = [[], rows[:2], rows]
    for done, arms in zip(left, (["bp", "ldb"], ["bp", "ldb"], ["ldb"]), strict=True):
        ledger = Ledger.of([*searched(plan, "bp", done), *searched(plan, "ldb", rows[:1])])
        assert [arm.name for arm in unsearched(plan, ledger)] == arms
    ledger = full_ledger(plan)
    assert [arm.name for arm in unsearched(plan, ledger)] == ["bp", "ldb"], "a trial is missing"
    for run in plan.measure_runs(ledger)[:3]:
        ledger.add(ended(run))
    assert unsearched(plan, ledger) == [], "the settings of a measured arm stand"
    for record in searched(plan, "ldb", [(0.4, 0.6, {"status": "failed", "val": None})]):
        ledger.add(record)
    assert [arm.name for arm in unsearched(plan, ledger)] == ["ldb"], "a failed trial was given up"
    chosen = plan.chosen(plan.arms[1], ledger)
    for record in searched(plan, "ldb", [(0.4, 0.6, {"val": 0.99})]):
        ledger.add(record)
    assert unsearched(plan, ledger) == []
    assert plan.chosen(plan.arms[1], ledger) == chosen, "what was measured is not what is chosen"


def test_an_arm_with_fewer_settings_than_trials_has_so_many_runs(tmp_path):
    text = TOY.replace("drop_rate: search", "recipe: {lr: {choice: [0.1, 0.2]}}")
    text = text.replace("trials: 3", "trials: 5").replace("bp: {method: bp}", "bp: {method: bp, recipe: {lr: 0.1}}")
    plan = plan_of(tmp_path, text)
    assert planned_trials(plan) == {"bp": 1, "ldb": 2}
