"""The first sentence names the fastest and the most accurate winner; numbers read evenly."""

import random

import pytest

from analysis.contaminated import contaminated_table
from analysis.load import load
from analysis.measured import left_out
from analysis.summary import answer
from analysis.table import Column, Table
from analysis_records import TASK, bp, dbp, groups_of, ldb, report_of, rows_of, run_line, sweep_line, write


def headline(tmp_path, ldb_truth, dbp_truth):
    rng, lines = random.Random(0), [sweep_line()]
    arms = (("bp", "baseline", bp(), (10.0, 0.90)), ("ldb", "method", ldb(), ldb_truth))
    for seed in range(5):
        for arm, role, method, (seconds, accuracy) in (*arms, ("dbp", "method", dbp(), dbp_truth)):
            seconds, accuracy = seconds * rng.gauss(1, 0.003), accuracy + rng.gauss(0, 0.0005)
            lines.append(
                run_line(arm=arm, role=role, method=method, seed=seed, train_seconds=seconds, test_accuracy=accuracy)
            )
    _, (group,) = groups_of(tmp_path, lines)
    return answer(group).headline


def test_two_winners_that_differ_are_both_named(tmp_path):
    found = headline(tmp_path, (7.0, 0.90), (9.0, 0.95))
    assert found.startswith("Use ldb (fastest) or dbp (most accurate). Against bp, ldb: faster (speed-up 1.4")
    assert "dbp: faster (speed-up 1.1" in found


def test_one_winner_that_is_both_is_named_once(tmp_path):
    assert headline(tmp_path, (7.0, 0.95), (9.0, 0.91)).startswith("Use ldb. Against bp: faster")


def test_what_is_more_accurate_at_a_price_is_said(tmp_path):
    found = headline(tmp_path, (7.0, 0.90), (14.0, 0.95))
    assert found.startswith("Use ldb. Against bp: faster")
    assert "More accurate, at a price: dbp (+4.98 points at a speed-up of 0.71×)." in found


def test_what_could_not_be_judged_is_said(tmp_path):
    rng, lines = random.Random(0), [sweep_line()]
    for seed in range(5):
        for arm, role, method in (("bp", "baseline", bp()), ("ldb", "method", ldb()), ("dbp", "method", dbp())):
            if arm != "dbp" or seed == 0:
                seconds = 10 * rng.gauss(1, 0.003)
                lines.append(run_line(arm=arm, role=role, method=method, seed=seed, train_seconds=seconds))
    _, (group,) = groups_of(tmp_path, lines)
    assert answer(group).headline.endswith("faster or more accurate. Not enough data to judge dbp.")


def test_a_baseline_of_fewer_seeds_says_so(tmp_path):
    lines = [run_line(seed=seed) for seed in range(3)]
    lines += [run_line(arm="ldb", role="method", method=ldb(), seed=seed) for seed in range(5)]
    _, (group,) = groups_of(tmp_path, [sweep_line(), *lines])
    assert answer(group).basis.endswith("s of training (with 3 of the seeds).")


def test_times_of_a_column_have_one_number_of_decimals():
    column, text = Column("s", "s", "seconds"), Column("s", "s", "seconds", shown=False)
    table = Table("t", "t", "", [column, text], [{"s": 101.234}, {"s": 82.61}, {"s": None}, {"s": float("inf")}])
    assert [table.cells(row) for row in table.rows] == [["101.2"], ["82.6"], ["–"], ["not reached"]]
    wide = Table("t", "t", "", [column], [{"s": 0.0123}, {"s": 5123.0}])
    assert [wide.cells(row) for row in wide.rows] == [["0.0123"], ["5123"]], "no number of decimals suits both"


REMARK = "the processor is shared: other programs kept 1.9 of 2 cores busy meanwhile"


@pytest.mark.parametrize("flag", [False, True], ids=["the flag says it", "only the remark, as in older records"])
def test_runs_beside_other_programs_are_left_out_and_said(tmp_path, flag):
    lines = [sweep_line()]
    for seed in range(3):
        beside = {"reason": REMARK, "exclusive": flag, "train_seconds": 1e6} if seed else {}
        lines.append(run_line(seed=seed, **beside))
        lines.append(run_line(arm="ldb", role="method", method=ldb(), seed=seed))
    results, (group,) = groups_of(tmp_path, lines)
    notes = " ".join(answer(group).notes)
    assert "beside 2 of 6 finished measured runs" in notes, notes
    assert [arm.n for arm in group.arms] == [1, 3], "a contaminated time is among the times"
    assert [arm.n for arm in group.arms if arm.timed["train_seconds"].max() > 1e5] == []
    (row,) = contaminated_table(results).rows
    assert (row["arm"], row["n"], row["seconds"].value) == ("bp", 2, 1e6)
    assert left_out(results, [group]) == {"shared their device with other work": 2}


def test_contaminated_runs_are_told_apart_by_sweep_task_and_part(tmp_path):
    places = [
        {"sweep": sweep, "task": TASK | {"data": data}, "phase": phase}
        for sweep in ("one", "two")
        for data in ("digits", "wine")
        for phase in ("measure", "ablate")
    ]
    lines = [run_line(seed=s, exclusive=False, **more) for more in places for s in range(2)]
    path = write(tmp_path / "records.jsonl", lines)
    table = contaminated_table(load([path]))
    found = [(row["sweep"], row["task"].partition(",")[0], row["part"], row["n"]) for row in table.rows]
    assert found == [(more["sweep"], more["task"]["data"], more["phase"], 2) for more in places]
    assert [column.key for column in table.shown][:4] == ["sweep", "task", "part", "arm"]
    one = contaminated_table(load([write(tmp_path / "one.jsonl", lines[:2])]))
    assert one.shown[0].key == "arm", "columns that say the same in every row"


def test_where_no_run_was_alone_the_report_says_nothing_but_that(tmp_path):
    """Numbers there are, under a label; no verdict, no front, no claim rests on them."""
    lines = [sweep_line()]
    for seed in range(5):
        lines.append(run_line(seed=seed, reason=REMARK, exclusive=False))
        more = {"exclusive": False, "reason": REMARK, "train_seconds": 0.1}
        lines.append(run_line(arm="ldb", role="method", method=ldb(), seed=seed, **more))
    contents = report_of(tmp_path, lines, figures=True)
    text = contents["report.md"].decode()
    assert "**Nothing can be said: other programs used the device beside every measured run" in text, text
    assert "### Contaminated times" in text
    assert "training time, contaminated (s)" in text
    assert [(row["arm"], row["n"]) for row in rows_of(contents, "pareto")] == [("bp", "0"), ("ldb", "0")]
    assert [(row["arm"], row["n"]) for row in rows_of(contents, "contaminated")] == [("bp", "5"), ("ldb", "5")]
    claims = rows_of(contents, "claims")
    assert {row["verdict"] for row in claims} == {"not enough data"}, "a claim is judged by contaminated times"
    assert "Contaminated times" in contents["report.html"].decode()
