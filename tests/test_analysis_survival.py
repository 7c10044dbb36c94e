"""Kaplan-Meier against scipy, and against plain statistics where no run was cut short."""

import math

import numpy as np
import pytest
from scipy import stats

from analysis.statistics import mean_estimate, median_estimate
from analysis.survival import kaplan_meier, median_time, restricted_mean
from analysis.targets import target_table
from analysis_records import epoch_lines, groups_of, ldb, run_line, sweep_line


def sample(case, n=20):
    """Times, rounded so that some are equal, and whether they are events; the rest was cut short."""
    random = np.random.default_rng(case)
    events, cuts = random.exponential(10, n).round(), random.exponential(15, n).round()
    return np.minimum(events, cuts), events <= cuts


@pytest.mark.parametrize("case", range(10))
def test_curve_is_scipys(case):
    times, seen = sample(case)
    data = stats.CensoredData.right_censored(times, ~seen)
    truth = stats.ecdf(data).sf
    curve = kaplan_meier(times, seen)
    for at, survival in zip(curve.times, curve.survival, strict=True):
        assert survival == pytest.approx(truth.evaluate(at)), f"survival at {at}"


@pytest.mark.filterwarnings("ignore:The confidence interval is undefined:RuntimeWarning")
def test_median_interval_is_where_scipys_pointwise_interval_contains_one_half():
    for case in range(10):
        times, seen = sample(case)
        found = median_time(times, seen)
        truth = stats.ecdf(stats.CensoredData.right_censored(times, ~seen)).sf
        ends = truth.confidence_interval(0.95, method="log-log")
        at = np.unique(times[seen])
        low = next(t for t in at if ends.low.evaluate(t) <= 0.5)
        high = next((t for t in at if ends.high.evaluate(t) < 0.5), math.inf)
        value = next((t for t in at if truth.evaluate(t) <= 0.5), math.inf)
        assert (found.low, found.high) == (low, high), f"case {case}"
        assert found.low <= found.value <= found.high
        assert found.value == value or truth.evaluate(value) == pytest.approx(0.5)


def test_without_cuts_it_is_the_plain_median_and_mean():
    times = np.array([3.0, 1.0, 7.0, math.inf, 5.0, 9.0])
    seen = np.isfinite(times)
    assert median_time(times, seen) == median_estimate(times)
    found, truth = restricted_mean(times, seen, 8.0), mean_estimate(np.minimum(times, 8.0))
    assert (found.value, found.low) == pytest.approx((truth.value, truth.low)), "Greenwood's variance is the sample's"
    assert found.high == min(truth.high, 8.0)
    halves = median_time([1.0, 2.0, 4.0, 8.0, 9.0], [True, True, True, True, False])
    assert halves.value == 4.0, "as the runs before the cut say"
    assert median_time([1.0, 2.0, 4.0, 9.0], [True, True, True, False]).value == 3.0, "flat at one half: the middle"


def test_a_cut_run_counts_until_it_was_cut():
    assert median_time([1.0, 2.0, 3.0], [False, True, True]).value == 2.5
    assert median_time([1.0, 2.0, math.inf], [False, True, False]).value == math.inf
    area = restricted_mean([1.0, 2.0, 4.0], [False, True, True], 4.0)
    assert area.value == pytest.approx(2 + 0.5 * 2)


def test_degenerate_times():
    assert median_time([], []).value is None
    assert median_time([5.0], [False]).value == math.inf, "one run that was stopped says nothing of the median"
    assert restricted_mean([], [], 3.0).value is None
    assert restricted_mean([1.0], [True], 3.0).low is None
    assert restricted_mean([1.0], [True], math.nan).value is None


def test_the_table_tells_missed_from_stopped(tmp_path):
    lines = [sweep_line(targets=[0.8])]
    for seed, (status, curve) in enumerate(
        [("finished", [0.5, 0.9]), ("finished", [0.5, 0.6]), ("stopped", [0.5, None]), ("diverged", [0.2, None])]
    ):
        base = run_line(seed=seed, train_seconds=4.0, val_accuracy=0.9)
        run = run_line(
            arm="ldb", role="method", method=ldb(), seed=seed, status=status, train_seconds=2.0, val_accuracy=curve[-1]
        )
        lines += [*epoch_lines(base, [0.9, 0.9]), base, *epoch_lines(run, curve), run]
    results, (group,) = groups_of(tmp_path, lines)
    row = next(r for r in target_table(group, results).rows if r["arm"] == "ldb")
    assert row["reached"] == "1 of 4, 1 stopped before"
    assert row["seconds"].value == math.inf
    assert row["speed_up"].value == 0.0, "median of 2/2, 0 and 0 over the pairs that say something"
    assert row["speed_up"].n == 3
    assert row["restricted"].value == pytest.approx(0.25 * 2 + 0.75 * 4), "of the first four seconds"
