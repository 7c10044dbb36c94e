"""Profiles across tasks against slow truths and known times."""

import math
import re

import numpy as np
import pytest
from scipy import stats

from analysis.profiles import MAX_FACTOR, geometric_mean, profile, profile_table, profiled, ratios_to_best
from analysis.report import build
from analysis.statistics import Estimate, ratio_estimate
from analysis_records import TASK, bp, dbp, epoch_lines, groups_of, ldb, report_of, rows_of, run_line, sweep_line, write


def test_ratios_and_profile_by_hand():
    seconds = np.array([[10.0, 5.0, math.inf], [4.0, 4.0, 6.0], [math.inf] * 3])
    found = ratios_to_best(seconds)
    inf = math.inf
    assert found[:2].tolist() == [[2.0, 1.0, inf], [1.0, 1.0, 1.5]]
    assert np.isinf(found[2]).all(), "nobody is best where nobody got there"
    assert profile(found, 1.0) == pytest.approx([1 / 3, 2 / 3, 0])
    assert profile(found, 2.0) == pytest.approx([2 / 3, 2 / 3, 1 / 3])
    assert np.isinf(ratios_to_best([[1.0, math.nan]])[0, 1])


def test_geometric_mean_of_two_tasks_is_welchs_interval():
    random = np.random.default_rng(0)
    logs = [random.normal(0.4, 0.1, 5), random.normal(0.1, 0.3, 7)]
    found = geometric_mean([ratio_estimate(np.exp(x), np.ones(len(x))) for x in logs])
    truth = stats.ttest_ind(logs[0], -logs[1], equal_var=False).confidence_interval(0.95)
    assert (math.log(found.low), math.log(found.high)) == pytest.approx((truth.low / 2, truth.high / 2))
    assert math.log(found.value) == pytest.approx((logs[0].mean() + logs[1].mean()) / 2)


def test_geometric_mean_needs_every_task():
    known = Estimate(2.0, 1.9, 2.1, 5)
    assert geometric_mean([known, Estimate()]).value is None
    assert geometric_mean([known, Estimate(0.0, 0.0, 0.5, 5)]).value is None, "a task that was not reached"
    alone = geometric_mean([known, Estimate(2.0, n=1)])
    assert (alone.value, alone.low) == (pytest.approx(2.0), None)
    assert geometric_mean([Estimate(2.0, 2.0, 2.0, 3)] * 2).low == pytest.approx(2.0)


def two_tasks(seeds=4, missing=()):
    """ldb is 2 and 1.5 times as fast as bp; dbp 0.5 times; on the second task ldb misses it in some seeds."""
    random = np.random.default_rng(0)
    lines = [sweep_line(targets=[0.8], seeds=list(range(seeds)))]
    for data, factor, missed in (("digits", 2.0, ()), ("cifar10", 1.5, missing)):
        for seed in range(seeds):
            arms = [
                ("bp", "baseline", bp(), 1.0, True),
                ("ldb", "method", ldb(), factor, seed not in missed),
                ("dbp", "method", dbp(), 0.5, True),
            ]
            for arm, role, method, speed, good in arms:
                final = 0.9 if good else 0.7
                run = run_line(
                    arm=arm, role=role, method=method, seed=seed, task=TASK | {"data": data},
                    train_seconds=10 / speed * np.exp(random.normal(0, 0.01)), val_accuracy=final,
                )  # fmt: skip
                lines += [*epoch_lines(run, [0.3, 0.6, final - 0.05, final]), run]
    return lines


def test_table_finds_the_truth(tmp_path):
    results, groups = groups_of(tmp_path, two_tasks())
    rows = {row["arm"]: row for row in profile_table(profiled(groups, results)).rows}
    assert list(rows) == ["bp", "ldb", "dbp"]
    assert (rows["ldb"]["within_1"].value, rows["bp"]["within_1"].value) == (1.0, 0.0)
    assert rows["bp"]["within_1.25"].value == 0.0, "it takes 1.5 and 2 times the best"
    assert rows["dbp"]["within_2"].value == 0.0
    assert rows["ldb"]["speed_up"].value == pytest.approx(math.sqrt(3), rel=0.02)
    assert rows["ldb"]["target_speed_up"].low < math.sqrt(3) < rows["ldb"]["target_speed_up"].high
    assert rows["bp"]["speed_up"].value is None, "the baseline over itself"
    assert rows["ldb"]["reached"] == "2 of 2"


def test_a_task_that_was_missed_is_shown_and_not_dropped(tmp_path):
    results, groups = groups_of(tmp_path, two_tasks(missing=range(4)))
    row = next(r for r in profile_table(profiled(groups, results)).rows if r["arm"] == "ldb")
    assert row["reached"] == "1 of 2"
    assert row["within_2"].value == 0.5
    assert row["target_speed_up"].value is None
    assert row["speed_up"].value == pytest.approx(math.sqrt(3), rel=0.02), "training time is known all the same"


def test_one_missed_run_leaves_the_median_and_takes_the_mean(tmp_path):
    results, groups = groups_of(tmp_path, two_tasks(missing=[2]))
    row = next(r for r in profile_table(profiled(groups, results)).rows if r["arm"] == "ldb")
    assert row["reached"] == "2 of 2", "three of four seeds reach it"
    assert row["target_speed_up"].value is None, "a mean over the pairs that happened to reach it would flatter"


def test_the_report_of_one_task_has_no_profile_and_that_of_two_has(tmp_path):
    both = report_of(tmp_path, two_tasks(), figures=True)
    assert {"figures/profiles.png", "figures/profiles.svg"} <= set(both)
    assert "## Across tasks" in both["report.md"].decode()
    assert len(rows_of(both, "profiles")) == 3
    one = report_of(tmp_path / "one", [x for x in two_tasks() if x.get("task", TASK) == TASK])
    assert "tables/profiles.csv" not in one
    assert "Across tasks" not in one["report.html"].decode()


def test_the_drawn_profile_is_the_table(tmp_path):
    """A step of the line stands where the table says so; the marker where nothing more comes."""
    report = build([write(tmp_path / "records.jsonl", two_tasks())])
    wide, narrow = report.profile_plots
    assert (wide.width, narrow.width) == (860, 380)
    shares = {row["arm"]: row for row in report.across[0].rows}
    for mark in wide.marks:
        own = shares[mark.arm.name]
        assert f"fastest in {own['within_1'].value:.2f} of 2 tasks" in mark.tip
        assert f"within 2×: {own['within_2'].value:.2f}" in mark.tip
        top = min(float(y) for y in re.findall(r"[ML][\d.]+,([\d.]+)", mark.path))
        assert mark.y == top
        assert mark.y == wide.y(report.profile.share(MAX_FACTOR)[mark.index].value)
