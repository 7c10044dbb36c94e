"""The tables and verdicts on synthetic sweeps with known truth."""

import pytest

from analysis.errors import ReportError
from analysis.measured import left_out
from analysis.summary import answer
from analysis.tables import control_table, front_volume, pareto_table
from analysis.targets import target_table
from analysis_records import (
    CPU,
    RECIPE,
    SOFTWARE,
    TASK,
    bp,
    cells,
    dbp,
    epoch_lines,
    groups_of,
    ldb,
    report_of,
    rows_of,
    run_line,
    search_lines,
    sweep_line,
    synthetic,
    with_run,
)

# --- known truth -------------------------------------------------------------------------------------------------


def test_pareto_table_finds_the_truth(tmp_path):
    _, (group,) = groups_of(tmp_path, synthetic(5))
    rows = {row["arm"]: row for row in pareto_table(group).rows}
    assert list(rows) == ["bp", "ldb", "ldb (control)", "dbp", "dbp (control)"], "order of the sweep file"
    for (arm, role, _, seconds, _), row in zip(cells(), rows.values(), strict=True):
        assert (row["role"], row["n"]) == (role, 5)
        assert row["seconds"].value == pytest.approx(seconds, rel=0.01)
        if arm != "bp":
            assert row["speed_up"].low <= row["speed_up"].value <= row["speed_up"].high
            assert row["speed_up"].value == pytest.approx(10 / seconds, rel=0.01)
    assert rows["bp"]["speed_up"].value is None, "the baseline has no speed-up over itself"
    assert (rows["ldb"]["on_front"], rows["dbp"]["on_front"]) == (True, False)
    assert rows["ldb"]["p_front"] == 1.0
    assert rows["dbp"]["p_front"] == 0.0
    assert rows["ldb (control)"]["on_front"] is None, "controls do not compete"
    gain = rows["dbp"]["accuracy_gain"]
    assert gain.high - gain.low < 0.012, f"the effect of seeds was not removed by pairing: {gain}"
    assert gain.low < -0.02 < gain.high


def test_control_split_finds_the_truth(tmp_path):
    _, (group,) = groups_of(tmp_path, synthetic(5))
    rows = {row["arm"]: row for row in control_table(group).rows}
    truth = {
        "ldb": {"accuracy_estimate": -0.005, "accuracy_plan": 0.005, "seconds_estimate": -1, "seconds_plan": -2},
        "dbp": {"accuracy_estimate": -0.02, "accuracy_plan": 0.0, "seconds_estimate": 1, "seconds_plan": 3},
    }
    for arm, effects in truth.items():
        assert rows[arm]["n"] == 5
        for key, value in effects.items():
            found = rows[arm][key]
            slack = 0.1 if key.startswith("seconds") else 0.004
            assert found.value == pytest.approx(value, abs=slack), f"{arm} {key}: {found} is not {value}"


def test_the_machinery_is_told_apart_where_the_plan_changes_no_work(tmp_path):
    lines = with_run(synthetic(5), lambda r: r["arm"] == "dbp" and r["role"] == "control", steps=32)
    _, (group,) = groups_of(tmp_path, lines)
    table = control_table(group)
    rows = {row["arm"]: row for row in table.rows}
    assert rows["ldb"]["overhead"].value == pytest.approx(-2, abs=0.1), "same recipe, steps and examples"
    assert rows["ldb"]["overhead_ratio"].value == pytest.approx(0.8, rel=0.01)
    assert rows["dbp"]["overhead"] is None, "half the steps are another plan, not machinery"
    assert "plan differs" in table.cells(rows["dbp"])
    others = with_run(synthetic(5), lambda r: r["role"] == "control", recipe=RECIPE | {"lr": 0.2})
    _, (group,) = groups_of(tmp_path, others)
    assert "overhead" not in [c.key for c in control_table(group).columns], "a column that says nothing"


def test_hypervolume_is_in_units_of_the_baseline(tmp_path):
    _, (group,) = groups_of(tmp_path, synthetic(5, noise=0.0))
    volume, reference = front_volume(group)
    assert reference == pytest.approx((20.0, 0.0))
    assert volume.value == pytest.approx(1.3), "ldb alone dominates (20 - 7) s of the baseline's (20 - 10) s"
    assert "Hypervolume of the front: 1.300" in pareto_table(group).caption
    assert "reference point 20.0 s (twice the baseline's geometric mean) and accuracy 0" in pareto_table(group).caption


def test_time_to_target_counts_misses(tmp_path):
    lines = [sweep_line(targets=[0.5, 0.9])]
    for seed, (slow, fast) in enumerate([([0.4, 0.6, 0.95], [0.6, 0.9, 0.9]), ([0.1, 0.5, 0.9], [0.5, 0.6, 0.7])]):
        for arm, role, method, curve in (("bp", "baseline", bp(), slow), ("ldb", "method", ldb(), fast)):
            run = run_line(arm=arm, role=role, method=method, seed=seed, train_seconds=3.0, val_accuracy=curve[-1])
            lines += [*epoch_lines(run, curve), run]
    diverged = run_line(arm="ldb", role="method", method=ldb(), seed=2, status="diverged", val_accuracy=None)
    baseline = run_line(seed=2, train_seconds=3.0)
    lines += [*epoch_lines(diverged, [0.6, None, None]), diverged, *epoch_lines(baseline, [0.5, 0.9, 0.9]), baseline]
    results, (group,) = groups_of(tmp_path, lines)
    table = target_table(group, results)
    found = {(row["target"], row["arm"]): (row["reached"], row["seconds"].value) for row in table.rows}
    assert found == {
        (0.5, "bp"): ("3 of 3", 2.0),
        (0.5, "ldb"): ("3 of 3", 1.0),
        (0.9, "bp"): ("3 of 3", 3.0),
        (0.9, "ldb"): ("1 of 3", float("inf")),
    }, "median over all three seeds, the diverged one included"
    shown = table.cells(table.rows[-1])
    assert any(cell.startswith("not reached") for cell in shown), f"a median that was not reached reads {shown}"
    assert "fixed in the sweep file" in table.caption


def test_targets_without_a_plan_come_from_the_baseline_and_say_so(tmp_path):
    results, (group,) = groups_of(tmp_path, synthetic(3, noise=0.0))
    table = target_table(group, results)
    assert sorted({row["target"] for row in table.rows}) == pytest.approx([0.95 * 0.9, 0.99 * 0.9])
    assert "chosen after measuring" in table.caption


def test_the_first_page_says_who_wins_and_who_loses(tmp_path):
    _, (group,) = groups_of(tmp_path, synthetic(5))
    page = answer(group)
    assert [(c.arm.name, c.verdict) for c in page.comparisons] == [("ldb", "wins"), ("dbp", "loses")]
    assert page.headline.startswith("Use ldb. Against bp: faster (speed-up 1.43×"), page.headline
    assert page.comparisons[1].sentence.startswith("slower (speed-up 0.72×"), page.comparisons[1].sentence
    assert "less accurate (−2" in page.comparisons[1].sentence
    assert any("against its own exact control" in note for note in page.notes)


def test_a_speed_that_the_control_has_too_is_not_credited_to_the_estimate(tmp_path):
    lines = with_run(synthetic(5), lambda r: r["arm"] == "ldb" and r["role"] == "control", train_seconds=6.0)
    _, (group,) = groups_of(tmp_path, lines)
    assert any("So its estimate is not what makes it faster" in note for note in answer(group).notes)


@pytest.mark.parametrize(
    ("seconds", "accuracy", "verdict", "headline"),
    [
        (7.0, 0.92, "wins", "Use ldb"),
        (7.0, 0.88, "trade-off", "Stay with bp unless the trade suits you"),
        (10.0, 0.90, "undecided", "Stay with bp: no method is shown to be faster or more accurate"),
        (13.0, 0.90, "loses", "Stay with bp: every method that could be judged is worse"),
    ],
)
def test_verdicts(tmp_path, seconds, accuracy, verdict, headline):
    lines = []
    for seed in range(5):
        wiggle = 0.001 * (-1) ** seed * (1 + seed % 3)
        lines.append(run_line(seed=seed, train_seconds=10 + wiggle, test_accuracy=0.9 + wiggle))
        lines.append(
            run_line(
                arm="ldb", role="method", method=ldb(), seed=seed,
                train_seconds=seconds - 2 * wiggle, test_accuracy=accuracy + wiggle / 3,
            )
        )  # fmt: skip
    _, (group,) = groups_of(tmp_path, lines)
    page = answer(group)
    assert page.comparisons[0].verdict == verdict, page.comparisons[0]
    assert page.headline.startswith(headline), page.headline


# --- counting ----------------------------------------------------------------------------------------------------


def test_every_run_is_counted(tmp_path):
    lines = synthetic(5)
    lines = with_run(lines, lambda r: r["arm"] == "ldb" and r["seed"] == 0, status="failed", reason="out of memory")
    lines = with_run(lines, lambda r: r["arm"] == "ldb" and r["seed"] == 1, status="diverged", reason="loss is NaN")
    lines = with_run(lines, lambda r: r["arm"] == "dbp" and r["seed"] == 2, status="stopped", reason="by hand")
    lines = with_run(lines, lambda r: r["arm"] == "bp" and r["seed"] == 4, status="running")
    lines = [line for line in lines if not (line.get("arm") == "dbp" and line.get("seed") == 3)]
    contents = report_of(tmp_path, lines)
    found = {
        (r["arm"], r["role"]): [int(r[k]) for k in ("planned", "finished", "stopped", "failed", "diverged")]
        + [int(r["running"]), int(r["missing"]), r["reasons"]]
        for r in rows_of(contents, "summary")
    }
    assert found == {
        ("bp", "baseline"): [5, 4, 0, 0, 0, 1, 0, ""],
        ("ldb", "method"): [5, 3, 0, 1, 1, 0, 0, "diverged: loss is NaN; failed: out of memory"],
        ("ldb", "control"): [5, 3, 0, 1, 1, 0, 0, "diverged: loss is NaN; failed: out of memory"],
        ("dbp", "method"): [5, 3, 1, 0, 0, 0, 1, "stopped: by hand"],
        ("dbp", "control"): [5, 3, 1, 0, 0, 0, 1, "stopped: by hand"],
    }
    assert {r["arm"]: r["n"] for r in rows_of(contents, "pareto")} == {
        "bp": "4", "ldb": "3", "ldb (control)": "3", "dbp": "3", "dbp (control)": "3"
    }  # fmt: skip
    assert "Of demo, 16 of 25 planned measured runs finished" in contents["report.md"].decode().replace("\\", "")


def test_the_code_is_named(tmp_path):
    runs = [
        run_line(git_commit="0123456789abcdef", git_dirty=False),
        run_line(seed=1, git_commit="fe" * 20, git_dirty=True),
    ]
    contents = report_of(tmp_path, runs)
    assert "Code: commit 0123456789, fefefefefe with uncommitted changes." in contents["report.md"].decode()


def test_an_arm_without_a_single_run_is_shown_as_missing(tmp_path):
    lines = [sweep_line(arms=["bp", "ghost"], seeds=[0, 1], search_trials=4), run_line()]
    found = {
        (r["phase"], r["arm"]): (r["planned"], r["missing"]) for r in rows_of(report_of(tmp_path, lines), "summary")
    }
    assert found[("measure", "ghost")] == ("2", "2")
    assert found[("search", "ghost")] == ("4", "4")
    assert found[("measure", "bp")] == ("2", "1")


def test_shared_resumed_timeless_and_repeated_runs_have_no_time(tmp_path):
    lines = synthetic(5)
    lines = with_run(lines, lambda r: r["arm"] == "ldb" and r["seed"] == 0, exclusive=False)
    lines = with_run(lines, lambda r: r["arm"] == "dbp" and r["seed"] == 1, resumed=True)
    lines = with_run(lines, lambda r: r["arm"] == "bp" and r["seed"] == 2, train_seconds=None)
    lines += [run_line(seed=0, run_key="again", train_seconds=1.0)]
    results, groups = groups_of(tmp_path, lines)
    assert left_out(results, groups) == {
        "shared their device with other work": 2,
        "were resumed from a checkpoint": 2,
        "have no training time": 1,
        "repeat a seed of the same arm": 1,
    }
    assert [arm.n for arm in groups[0].arms] == [4, 4, 4, 4, 4]


def test_search_only_is_a_report_that_says_so(tmp_path):
    contents = report_of(
        tmp_path, [*search_lines(), sweep_line(search_trials=3, seeds=[], measure_cells=0)], figures=True
    )
    assert "no run was measured alone" in contents["report.html"].decode()
    rows = rows_of(contents, "search")
    assert [(r["arm"], r["trials"], r["best"][:4], r["setting"]) for r in rows] == [
        ("bp", "3", "0.82", "bp lr=0.3"),
        ("ldb", "3", "0.82", "ldb(drop_rate=0.6) lr=0.3"),
    ]
    drawn = {name.rpartition("/")[2].partition("-")[0] for name in contents if name.startswith("figures/")}
    assert drawn == {"knobs"}, f"a search has no time axis, but the figures are {drawn}"


def test_unequal_search_budgets_are_named(tmp_path):
    contents = report_of(tmp_path, search_lines()[:-1])
    assert "The trial counts differ (2 to 3)" in contents["report.html"].decode()


# --- unlike hardware, several tasks and sweeps -------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"device": CPU | {"name": "Other CPU"}},
        {"device": CPU | {"threads": 2}},
        {"device": CPU | {"type": "cuda"}},
        {"software": SOFTWARE | {"torch": "2.13.0"}},
        {"software": SOFTWARE | {"cuda": "13.0"}},
    ],
)
def test_unlike_hardware_or_software_is_refused_unless_allowed(tmp_path, changes):
    lines = synthetic(3)
    other = [
        run_line(**(line | {"run_key": line["run_key"] + "x"} | changes)) for line in lines if line["kind"] == "run"
    ]
    with pytest.raises(ReportError, match=r"2 kinds of hardware or software .*--allow-mixed"):
        groups_of(tmp_path, lines + other)
    results, groups = groups_of(tmp_path, lines + other, allow_mixed=True)
    assert len(groups) == 2
    assert groups[0].title != groups[1].title, "sections of unlike hardware are not told apart"
    assert [arm.n for group in groups for arm in group.arms] == [3] * 10
    assert not left_out(results, groups)


def test_search_on_another_machine_is_not_refused(tmp_path):
    lines = [line | {"device": CPU | {"name": "Cluster"}} for line in search_lines()]
    _, groups = groups_of(tmp_path, synthetic(3) + lines)
    assert len(groups) == 1


def test_tasks_have_their_own_sections_and_names_that_differ(tmp_path):
    lines = synthetic(3)
    wide = [
        line
        | {"run_key": line["run_key"] + "w"}
        | ({"task": TASK | {"model_args": {"width": 2}}} if "task" in line else {})
        for line in lines[1:]
    ]
    _, groups = groups_of(tmp_path, lines + wide)
    assert sorted(g.title for g in groups) == ["digits, resnet-tiny", "digits, resnet-tiny (model_args.width=2)"]
    contents = report_of(tmp_path, lines + wide, figures=True)
    assert len(rows_of(contents, "pareto")) == 10
    assert "figures/pareto-group2.png" in contents


def test_two_settings_of_an_arm_and_two_sweeps_keep_their_names_apart(tmp_path):
    lines = [
        run_line(sweep=sweep, arm=arm, role=role, method=method, seed=seed)
        for seed in range(3)
        for sweep, arm, role, method in [
            ("a", "bp", "baseline", bp()), ("a", "ldb", "method", ldb(0.2)), ("a", "ldb", "method", ldb(0.8)),
            ("b", "bp", "baseline", bp()), ("b", "dbp", "method", dbp()),
        ]
    ]  # fmt: skip
    _, (group,) = groups_of(tmp_path, lines)
    assert [arm.name for arm in group.arms] == ["a/bp", "a/ldb(drop_rate=0.2)", "a/ldb(drop_rate=0.8)", "b/bp", "b/dbp"]
    assert group.baseline_of(group.arms[4]) is group.arms[3], "a method is paired with the baseline of its own sweep"


def test_combinations_read_as_such(tmp_path):
    method = dbp() | {"inner": ldb(0.3)}
    _, (group,) = groups_of(tmp_path, [run_line(), run_line(arm="both", role="method", method=method)])
    assert (group.arms[1].family, group.arms[1].setting) == ("dbp+ldb", "dbp+ldb")


def test_the_hypervolume_and_its_reference_are_columns_of_the_files(tmp_path):
    contents = report_of(tmp_path, synthetic(5, noise=0.0))
    for row in rows_of(contents, "pareto"):
        assert float(row["hypervolume"]) == pytest.approx(1.3)
        assert float(row["hypervolume_low"]) <= 1.3 <= float(row["hypervolume_high"])
        assert (float(row["reference_seconds"]), float(row["reference_accuracy"])) == pytest.approx((20.0, 0.0))
    assert "reference point, training time" not in contents["report.md"].decode(), "a column that repeats the caption"
    lines = [line for line in synthetic(3) if line.get("role") != "baseline"]
    assert {row["hypervolume"] for row in rows_of(report_of(tmp_path / "none", lines), "pareto")} == {""}
