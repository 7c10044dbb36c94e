"""What `fastbp-report diff` calls a difference: scipy's tests, corrected over the table, judged on simulated sweeps."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from analysis.changes import change, difference_table, welch
from analysis.diff import diff
from analysis.matching import Place
from analysis.paired import holm
from analysis.table import plain_rows
from analysis_records import bp, ldb, run_line, sweep_line, synthetic, write
from simulated_sweeps import aa_group

UNDECIDED = "not clearly different"

# --- one outcome -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 1e-9, 1e-140])
def test_welch_is_scipys(scale):
    rng = np.random.default_rng(0)
    x, y = scale * rng.normal(0, 1, 5), scale * rng.normal(1, 3, 8)
    made, p = welch(x, y)
    assert made.value == pytest.approx(y.mean() - x.mean())
    expected = stats.ttest_ind(y / scale, x / scale, equal_var=False)
    interval = expected.confidence_interval()
    assert (made.low, made.high) == pytest.approx((scale * interval.low, scale * interval.high))
    assert p == pytest.approx(expected.pvalue)
    assert welch(x[:1], y)[0].low is None, "one value has no interval"
    assert welch(x[:1], y)[1] is None, "one value has no spread to test against"
    assert welch(x[:0], y)[0].value is None


@pytest.mark.parametrize(("n", "least"), [(3, 0.25), (5, 0.0625)])
def test_samples_without_spread_are_not_certain(n, least):
    x = np.full(n, 0.1 + 0.2)
    made, p = welch(x, np.full(n + 1, 0.31))
    assert p == least
    assert made.low == made.value == made.high == pytest.approx(0.01), "the interval is a point"
    assert welch(x, np.full(n, 0.3))[1] == 1.0, "rounding is a difference"


def test_the_paired_p_is_scipys():
    rng = np.random.default_rng(1)
    x, y = rng.normal(0, 1, 6), rng.normal(0.5, 1, 6)
    made = change(dict(enumerate(x)), dict(enumerate(y)))
    expected = stats.ttest_rel(y, x)
    assert made.p == pytest.approx(expected.pvalue)
    assert (made.estimate.low, made.estimate.high) == pytest.approx(tuple(expected.confidence_interval()))


def test_change_is_paired_where_enough_seeds_are_shared():
    noise = {0: 0.0, 1: 10.0, 2: 20.0, 3: 30.0}
    later = {0: 1.0, 1: 11.1, 2: 20.9, 3: 31.0}
    made = change(noise, later)
    assert made.rests_on == "4 shared seeds"
    assert made.estimate.low == pytest.approx(0.87, abs=0.01), "the noise that seeds share is not taken out"
    assert made.p < 0.001
    apart = change(noise, {seed + 4: value for seed, value in later.items()})
    assert apart.rests_on == "4 and 4 seeds, unpaired"
    assert apart.estimate.low < 0 < apart.estimate.high
    assert apart.p > 0.5
    assert change(noise, {seed + 2: value for seed, value in later.items()}).rests_on == "4 and 4 seeds, unpaired"
    assert change(noise, later | {3: np.nan}).rests_on == "3 shared seeds", "an unknown value is paired"


@pytest.mark.parametrize("first", [{}, {0: 1.0}, {0: 1.0, 1: 1.1}])
def test_below_three_seeds_nothing_is_tested(first):
    assert math.isnan(change(first, {0: 2.0, 1: 2.1, 2: 2.2}).p)


# --- the whole table ---------------------------------------------------------------------------------------------


def table_of(before, after):
    pairs = [[Place(arm, group, "task", "task") for arm in group.arms] for group in (before, after)]
    return difference_table(list(zip(*pairs, strict=True)), allow_mixed=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n", "methods", "shared"),
    [(5, 4, True), pytest.param(3, 4, True, marks=pytest.mark.long), pytest.param(5, 4, False, marks=pytest.mark.long)],
)
def test_two_equal_sweeps_differ_in_at_most_7_percent(n, methods, shared):
    random, declared, single = np.random.default_rng(n), 0, []
    for _ in range(400):
        before = aa_group(random, n, methods)
        after = aa_group(random, n, methods, seeds=None if shared else range(n, 2 * n))
        rows = table_of(before, after).rows
        declared += any(row["verdict"] != UNDECIDED for row in rows)
        single += [min(row["gain_p"], row["ratio_p"]) < 0.05 for row in rows]
        assert ("shared" in rows[0]["rests_on"]) == shared
    assert declared <= 0.07 * 400, f"{declared} of 400 pairs of equal sweeps are said to differ"
    assert any(single), "nothing was ever tested"


@pytest.mark.slow
@pytest.mark.parametrize("shared", [True, False])
def test_a_real_difference_between_two_sweeps_is_found(shared):
    """The same sweeps with one method that got 15 % faster: the correction does not make `diff` blind."""
    random, found = np.random.default_rng(0), 0
    for _ in range(100):
        before, after = aa_group(random, 5, 4), aa_group(random, 5, 4, seeds=None if shared else range(5, 10))
        after.arms[2].timed["train_seconds"] /= 1.15
        found += table_of(before, after).rows[2]["verdict"] == "faster"
    assert found >= 60, f"a change of 1.15× with a spread of 3 % is found in {found} of 100 pairs of five seeds"


def test_p_is_holms_over_both_outcomes_of_all_rows():
    random = np.random.default_rng(7)
    before, after = aa_group(random, 5, 4), aa_group(random, 5, 4)
    raw = []
    for a, b in zip(before.arms, after.arms, strict=True):
        raw.append(stats.ttest_rel(b.timed["test_accuracy"], a.timed["test_accuracy"]).pvalue)
        raw.append(stats.ttest_rel(np.log(b.timed["train_seconds"]), np.log(a.timed["train_seconds"])).pvalue)
    rows = table_of(before, after).rows
    assert [row[p] for row in rows for p in ("gain_p", "ratio_p")] == pytest.approx(holm(raw).tolist())


def test_an_interval_that_excludes_no_effect_is_not_yet_a_verdict():
    """Of ten tests one p of 2 % is no finding, whatever its own interval says."""
    for case in range(200):
        random = np.random.default_rng(case)
        before, after = aa_group(random, 5, 4), aa_group(random, 5, 4)
        rows = table_of(before, after).rows
        outside = [row for row in rows if not row["gain"].low <= 0 <= row["gain"].high]
        if outside and min(row["gain_p"] for row in rows) > 0.05:
            assert outside[0]["verdict"] in (UNDECIDED, "faster", "slower")
            return
    pytest.fail("no simulated sweep has such an interval")


def test_times_of_unlike_hardware_cost_the_accuracies_nothing():
    random = np.random.default_rng(3)
    before, after = aa_group(random, 5, 2), replace(aa_group(random, 5, 2), hardware="other")
    rows = table_of(before, after).rows
    assert all(math.isnan(row["ratio_p"]) for row in rows)
    raw = [
        change(*(dict(a.timed["test_accuracy"]) for a in pair)).p for pair in zip(before.arms, after.arms, strict=True)
    ]
    assert [row["gain_p"] for row in rows] == pytest.approx(holm(raw).tolist())


# --- ablations ---------------------------------------------------------------------------------------------------


def ablated(rates, seconds, seeds=4):
    """A measured sweep and an ablation of its ldb arm, one cell per rate."""
    lines = synthetic(seeds)
    for seed in range(seeds):
        lines.append(run_line(phase="ablate", seed=seed, run_key=f"bp{seed}", train_seconds=10 + 0.01 * seed))
        for rate in rates:
            lines.append(
                run_line(
                    phase="ablate", arm=f"ldb/{rate}", role="method", method=ldb(rate), seed=seed,
                    run_key=f"{rate}-{seed}", train_seconds=seconds + 0.01 * seed + 0.001 * (seed % 2),
                )
            )  # fmt: skip
    return lines


def two(tmp_path, before, after):
    return [str(write(tmp_path / name / "records.jsonl", lines)) for name, lines in (("a", before), ("b", after))]


def test_cells_of_ablations_are_compared_too(tmp_path):
    after = ablated([0.1, 0.2, 0.4], 6.0)
    for line in after:
        if line.get("arm") == "ldb/0.2":
            line["test_accuracy"] = 0.5 + 0.001 * line["seed"]
    made = {
        table.name: plain_rows(table) for table in diff(*two(tmp_path, ablated([0.1, 0.2, 0.3], 8.0), after)).tables
    }
    cells = {row["arm"]: row for row in made["differences"] if row["part"] == "ablate"}
    assert set(cells) == {"bp", "ldb/0.1", "ldb/0.2"}
    assert cells["ldb/0.1"]["verdict"] == "faster"
    assert cells["ldb/0.1"]["ratio"] == pytest.approx(6 / 8, abs=0.01)
    assert cells["ldb/0.2"]["verdict"] == "faster, less accurate"
    assert cells["bp"]["verdict"] == UNDECIDED
    measured = [row for row in made["differences"] if row["part"] == "measure"]
    assert len(measured) == 5, "a measured arm is taken for the ablation's"
    assert {row["verdict"] for row in measured} == {UNDECIDED}
    assert {(row["side"], row["arm"], row["part"]) for row in made["only"]} == {
        ("A", "ldb/0.3", "ablate"), ("B", "ldb/0.4", "ablate"),
    }  # fmt: skip


def test_equal_arms_on_several_kinds_of_hardware_are_told_apart(tmp_path):
    def on(*names):
        devices = ({"type": "cpu", "name": name, "threads": 1} for name in names)
        return [sweep_line(), *(run_line(seed=seed, device=device) for device in devices for seed in range(3))]

    def differences(before, after):
        made = diff(*two(tmp_path, before, after), allow_mixed=True)
        (found,) = (table for table in made.tables if table.name == "differences")
        return found

    one = differences(on("old"), on("old"))
    assert not next(c for c in one.columns if c.key == "hardware").shown, "a column that says the same in every row"
    several = differences(on("old", "new"), on("old", "new"))
    assert next(c for c in several.columns if c.key == "hardware").shown
    kinds = [row["hardware"] for row in several.rows]
    assert len(set(kinds)) == 2, kinds
    assert {kind.partition(" ")[0] for kind in kinds} == {"old", "new"}, kinds


def test_the_environment_of_an_ablation_alone_is_compared(tmp_path):
    def alone(**changes):
        lines = [sweep_line()]
        for seed in range(3):
            lines.append(run_line(phase="ablate", method=bp(), seed=seed, **changes))
            lines.append(run_line(phase="search", seed=seed, exclusive=False, device={"name": "search"}))
        return lines

    made = {t.name: plain_rows(t) for t in diff(*two(tmp_path, alone(), alone(git_commit="f" * 40))).tables}
    assert made["environment"] == [{"name": "git_commit", "a": "unknown", "b": "f" * 40}]
    assert [row["part"] for row in made["differences"]] == ["ablate"]
