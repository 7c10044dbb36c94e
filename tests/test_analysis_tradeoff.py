"""Seconds to equal accuracy against a slow truth, and the table from settings and from learning curves."""

import math

import numpy as np
import pytest

from analysis.equal import equal_accuracy_table
from analysis.tradeoff import LONGEST, equal_accuracy_speed_up, reaching_log_seconds
from analysis_records import RECIPE, bp, groups_of, ldb, run_line, sweep_line, synthetic


def slow_reaching(log_seconds, accuracy, level):
    """Walk the records of accuracy in order of time."""
    points = sorted(
        (t, -a) for t, a in zip(log_seconds, accuracy, strict=True) if math.isfinite(t) and math.isfinite(a)
    )
    record = None
    for t, negative in points:
        a = -negative
        if record is not None and a <= record[1]:
            continue
        if a >= level:
            return t if record is None else record[0] + (t - record[0]) * (level - record[1]) / (a - record[1])
        record = (t, a)
    return math.inf


def test_reaching_is_the_slow_walk():
    random = np.random.default_rng(0)
    for _ in range(300):
        k = int(random.integers(1, 8))
        times, scores = random.normal(0, 1, k), random.integers(0, 6, k) / 5
        scores[random.random(k) < 0.1] = math.nan
        level = random.choice([0.1, 0.2, 0.5, 0.8, 1.0])
        found = reaching_log_seconds(times[None], scores[None], level)[0]
        truth = slow_reaching(times, scores, level)
        assert found == pytest.approx(truth), f"{times}, {scores} reach {level} at {truth}, not {found}"


def curve(times, scores, n=5, spread=0.0, seed=0):
    random = np.random.default_rng(seed)
    shape = (n, len(times))
    return np.array(times) * np.exp(random.normal(0, spread, shape)), np.array(scores) + random.normal(0, spread, shape)


def rng():
    return np.random.default_rng(0)


def test_speed_up_at_equal_accuracy():
    base, arm = curve([10, 20, 40], [0.8, 0.9, 0.95]), curve([8, 32], [0.85, 0.95])
    found, level, slow, fast = equal_accuracy_speed_up(base, arm, None, rng(), point=1)
    assert (level, slow, fast) == pytest.approx((0.9, 20.0, 16.0)), "half way between 8 and 32 on a log scale"
    assert (found.value, found.low, found.high, found.n) == pytest.approx((1.25, 1.25, 1.25, 5))
    fixed = equal_accuracy_speed_up(base, arm, 0.8, rng())
    assert fixed[3] == pytest.approx(8.0), "already more accurate at its fastest: that is what was measured"
    missed = equal_accuracy_speed_up(base, curve([8, 32], [0.7, 0.8]), None, rng(), point=1)
    assert missed[0].value == 0.0
    assert missed[3] == math.inf
    assert equal_accuracy_speed_up(base, arm, 0.99, rng())[0].value is None, "neither reaches it"


def test_an_accuracy_that_some_samples_do_not_reach_has_an_open_interval():
    base, arm = curve([10, 20], [0.8, 0.9], spread=0.002), curve([8, 16], [0.8, 0.9005], spread=0.002, seed=1)
    found = equal_accuracy_speed_up(base, arm, None, rng(), point=1)[0]
    assert found.low == 0.0, f"some samples of the seeds do not reach it, but the interval is {found}"
    assert found.value is not None


def test_one_seed_has_no_interval_and_a_long_curve_is_thinned():
    base, arm = curve([10, 20], [0.8, 0.9], n=1), curve([5, 10], [0.8, 0.9], n=1)
    found = equal_accuracy_speed_up(base, arm, None, rng(), point=1)[0]
    assert (found.value, found.low) == (pytest.approx(2.0), None)
    many = np.linspace(1, 100, 20 * LONGEST)
    long = np.tile(many, (3, 1)), np.tile(many / 100, (3, 1))
    found = equal_accuracy_speed_up(long, (long[0] / 2, long[1]), 0.5, rng(), resamples=50)[0]
    assert found.value == pytest.approx(2.0, rel=1e-3)


# --- the table ---------------------------------------------------------------------------------------------------


def budgets(seeds=4):
    """Backprop and ldb at two budgets each; ldb is as accurate at half the time."""
    lines = [sweep_line(arms=["bp", "ldb"], seeds=list(range(seeds)))]
    for seed in range(seeds):
        noise = 1 + 0.001 * seed
        for arm, role, method, factor in (("bp", "baseline", bp(), 1.0), ("ldb", "method", ldb(), 0.5)):
            for epochs, accuracy in ((4, 0.8), (8, 0.9)):
                lines.append(
                    run_line(
                        arm=arm, role=role, method=method, seed=seed, recipe=RECIPE | {"epochs": epochs},
                        train_seconds=epochs * factor * noise, test_accuracy=accuracy + 0.001 * seed,
                    )
                )  # fmt: skip
    return lines


def test_settings_make_a_curve(tmp_path):
    results, (group,) = groups_of(tmp_path, budgets())
    table = equal_accuracy_table(group, results)
    found = [(row["arm"], row["source"], row["speed_up"].value, row["n"]) for row in table.rows]
    assert found == [("ldb", "2 settings, baseline 2", pytest.approx(2.0), 4)] * 2
    assert [row["accuracy"] for row in table.rows] == pytest.approx([0.8015, 0.9015])
    assert "Settings: the curve joins" in table.caption
    assert "Learning curves" not in table.caption


def test_one_budget_uses_learning_curves_and_says_what_they_are(tmp_path):
    results, (group,) = groups_of(tmp_path, synthetic(4, targets=[0.7, 0.95]))
    table = equal_accuracy_table(group, results)
    rows = {(row["arm"], row["accuracy"]): row for row in table.rows}
    assert rows["ldb", 0.7]["source"] == "learning curves"
    assert rows["ldb", 0.7]["speed_up"].value == pytest.approx(10 / 7, rel=0.01), "same curve in 7 s instead of 10 s"
    found = rows["ldb", 0.7]["speed_up"]
    assert found.low < found.value < found.high, f"no interval over the seeds: {found}"
    between = (0.7 - 0.48) / (0.72 - 0.48)
    assert rows["ldb", 0.7]["base_seconds"] == pytest.approx(2.5 * 2**between, rel=0.03), "between 2.5 s and 5 s"
    assert ("ldb", 0.95) not in rows, "nobody gets there, and the times to target say so"
    assert "is not what a shorter run would reach" in table.caption


def test_a_group_without_pairs_has_no_rows(tmp_path):
    results, (group,) = groups_of(tmp_path, synthetic(1))
    assert equal_accuracy_table(group, results).rows == []


def test_a_method_that_never_gets_there_is_shown_as_such(tmp_path):
    lines = budgets()
    lines = [x | {"test_accuracy": x["test_accuracy"] - 0.05} if x.get("arm") == "ldb" else x for x in lines]
    results, (group,) = groups_of(tmp_path, lines)
    table = equal_accuracy_table(group, results)
    last = table.rows[-1]
    assert (last["speed_up"].value, last["seconds"]) == (0.0, math.inf)
    shown = dict(zip([c.key for c in table.shown], table.cells(last), strict=True))
    assert shown["seconds"] == "not reached"
    assert shown["speed_up"].startswith("not reached"), shown
