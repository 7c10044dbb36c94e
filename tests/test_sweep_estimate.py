"""What a sweep will cost: runs and seconds per part and arm, and what `fastbp-sweep plan` says of them."""

import os
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from sweep_files import TOY, plan_of
from sweeps import estimate as estimates
from sweeps.cli import app
from sweeps.estimate import estimate, middle, works_of
from sweeps.pilot import EpochCost, Pilot

WIDE = TOY.replace("drop_rate: search", "drop_rate: {uniform: [0.2, 0.4]}, every_epochs: {int: [2, 5]}")


def test_searched_fields_stand_at_the_middle_of_their_ranges(tmp_path):
    bp, ldb = plan_of(tmp_path, WIDE).arms
    assert middle(bp) == {"recipe.lr": pytest.approx((0.01 * 0.5) ** 0.5)}, "a logarithmic range has a geometric middle"
    assert middle(ldb)["method.drop_rate"] == pytest.approx(0.3)
    assert middle(ldb)["method.every_epochs"] == 3


def test_a_choice_stands_at_its_default_or_else_in_its_middle(tmp_path):
    text = TOY.replace("drop_rate: search", "unit: {choice: [block, layer]}, every_epochs: {choice: [3, 4, 5]}")
    values = middle(plan_of(tmp_path, text).arms[1])
    assert (values["method.unit"], values["method.every_epochs"]) == ("layer", 4)


def test_every_run_of_the_sweep_is_counted_once(tmp_path):
    works = works_of(plan_of(tmp_path))
    counts = {(w.part, w.arm, w.config.role): w.runs for w in works}
    assert counts == {
        ("search", "bp", "baseline"): 3,
        ("search", "ldb", "method"): 3,
        ("measure", "bp", "baseline"): 3,
        ("measure", "ldb", "method"): 3,
        ("measure", "ldb", "control"): 3,
    }
    assert {w.part: w.config.recipe.epochs for w in works} == {"search": 1, "measure": 2}


def test_seconds_add_up(tmp_path, monkeypatch):
    """Pilots of known cost: 1 s per epoch, 2 s in a control; set-up 10 s; evaluation 0.1 s, test 0.2 s."""
    piloted = []

    def known(config, *, device, threads, data):
        piloted.append((config.arm, config.role, threads))
        cost = EpochCost((2 if config.role == "control" else 1) / 128, None)
        return Pilot({"64": cost}, ("64",) * config.recipe.epochs, 128, 10.0, 0.1, 0.2, 1, device, threads)

    monkeypatch.setattr(estimates, "pilot", known)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(6))
    monkeypatch.setattr(estimates.torch.cuda, "is_available", lambda: False)
    text = TOY.replace("epochs: 1}", "epochs: 1, cpus: 2}").replace("seeds:", "threads: 2, seeds:")
    found = estimate(plan_of(tmp_path, text))
    loaded = found.costs["search"]["bp"].seconds - 3 * 11.3 / 3
    assert 0 < loaded < 5, "the data's loading is counted once per run"
    run = loaded  # three runs at a time: each third of a machine costs a third
    assert found.costs["search"]["ldb"].seconds == pytest.approx(3 * 11.3 / 3 + run)
    assert found.costs["measure"]["bp"].seconds == pytest.approx(3 * 12.4 + 3 * run)
    assert found.costs["measure"]["ldb"].seconds == pytest.approx(3 * (12.4 + 14.4) + 6 * run)
    assert found.seconds == pytest.approx(found.wall_seconds), "one device: wall is device time"
    assert found.epoch_seconds == {"bp": pytest.approx(1), "ldb": pytest.approx(1)}, "an arm's epoch, not its control's"
    assert piloted[1:] == [("bp", "baseline", 2), ("ldb", "method", 2), ("ldb", "control", 2)], "piloted once each"


def plan_output(folder, text, *options):
    file = folder / "toy.yaml"
    file.write_text(text)
    return CliRunner().invoke(app, ["plan", str(file), *options], env={"COLUMNS": "100"})


def test_plan_ends_with_device_hours_within_100_columns(tmp_path):
    found = plan_output(tmp_path, WIDE)
    assert found.exit_code == 0, found.output
    assert "device-hours (search" in found.output, found.output
    assert "measured here and now on" in found.output, found.output
    assert "cpu, 1 thread" in found.output, found.output
    assert max(map(len, found.output.splitlines())) <= 100, found.output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["toy.yaml"], "planning left files behind"


def test_without_pilots_plan_times_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(estimates, "pilot", lambda *a, **k: pytest.fail("a pilot ran"))
    found = plan_output(tmp_path, TOY, "--no-pilot")
    assert found.exit_code == 0, found.output
    assert "device" not in found.output, found.output


def test_an_illegal_cell_is_refused_before_any_pilot(tmp_path, monkeypatch):
    monkeypatch.setattr(estimates, "pilot", lambda *a, **k: pytest.fail("a pilot ran"))
    found = plan_output(tmp_path, TOY.replace("method: ldb, drop_rate: search", "method: ddg, modules: 9"))
    assert found.exit_code != 0, found.output
    assert "arm ldb" in str(found.exception), f"{found.exception!r}"


def test_an_arm_that_cannot_be_timed_is_named_and_not_counted(tmp_path):
    text = TOY.replace("{method: ldb, drop_rate: search}", '{method: "broken_methods:Raises", recipe: {lr: 0.1}}')
    found = plan_output(tmp_path, text)
    assert found.exit_code == 0, found.output
    assert "not timed, and not counted: search ldb: boom in the backward pass" in found.output, found.output


def test_a_sweep_that_asks_for_gpus_hears_that_there_are_none(tmp_path, monkeypatch):
    monkeypatch.setattr(estimates.torch.cuda, "is_available", lambda: False)
    plan = plan_of(tmp_path, TOY.replace("epochs: 1}", "epochs: 1, gpus: 0.25}"))
    assert estimates._foreign(plan)
    plan = replace(plan, sweep=plan.sweep.model_copy(update={"search": None}))
    assert not estimates._foreign(plan)
