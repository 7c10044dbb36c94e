"""The first sentence names the fastest and the most accurate winner; numbers read evenly."""

import random

from analysis.summary import answer
from analysis.table import Column, Table
from analysis_records import bp, dbp, groups_of, ldb, run_line, sweep_line


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


def test_times_of_a_column_have_one_number_of_decimals():
    column, text = Column("s", "s", "seconds"), Column("s", "s", "seconds", shown=False)
    table = Table("t", "t", "", [column, text], [{"s": 101.234}, {"s": 82.61}, {"s": None}, {"s": float("inf")}])
    assert [table.cells(row) for row in table.rows] == [["101.2"], ["82.6"], ["–"], ["not reached"]]
    wide = Table("t", "t", "", [column], [{"s": 0.0123}, {"s": 5123.0}])
    assert [wide.cells(row) for row in wide.rows] == [["0.0123"], ["5123"]], "no number of decimals suits both"


def test_runs_beside_other_programs_are_said(tmp_path):
    remark = "the processor is shared: other programs keep 1.9 of 2 cores busy"
    lines = [sweep_line()]
    for seed in range(3):
        lines.append(run_line(seed=seed, reason=remark if seed else ""))
        lines.append(run_line(arm="ldb", role="method", method=ldb(), seed=seed))
    _, (group,) = groups_of(tmp_path, lines)
    notes = " ".join(answer(group).notes)
    assert "beside 2 of 6 measured runs" in notes, notes
