"""Front, membership and hypervolume against slow truths."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
from pymoo.indicators.hv import HV
from pymoo.util.nds.non_dominated_sorting import NonDominatedSorting
from scipy import stats

from analysis.pareto import (
    front_membership,
    fronts,
    hypervolume,
    hypervolumes,
    pareto_front,
    plausible_points,
    relative_volume,
)


def slow_front(seconds, accuracy):
    """A known point is on the front unless another known one is as good in both and better in one."""
    points = list(zip(seconds, accuracy, strict=True))
    known = [math.isfinite(s) and math.isfinite(a) for s, a in points]
    out = []
    for i, (s, a) in enumerate(points):
        beaten = any(known[j] and t <= s and b >= a and (t < s or b > a) for j, (t, b) in enumerate(points) if j != i)
        out.append(known[i] and not beaten)
    return out


def slow_hypervolume(seconds, accuracy, reference):
    """Sum over the cells of the grid through all coordinates."""
    points = [(s, a) for s, a in zip(seconds, accuracy, strict=True) if s < reference[0] and a > reference[1]]
    xs = sorted({s for s, _ in points} | {reference[0]})
    ys = sorted({a for _, a in points} | {reference[1]})
    return sum(
        (x1 - x0) * (y1 - y0)
        for x0, x1 in itertools.pairwise(xs)
        for y0, y1 in itertools.pairwise(ys)
        if any(s <= x0 and a >= y1 for s, a in points)
    )


def test_front_is_the_slow_one():
    for case in range(300):
        random = np.random.default_rng(case)
        k = int(random.integers(1, 9))
        seconds, accuracy = random.integers(1, 5, (2, k)).astype(float)  # few values: many ties
        seconds[random.random(k) < 0.1] = math.nan
        accuracy[random.random(k) < 0.1] = math.nan
        seconds[random.random(k) < 0.1] = math.inf
        found = pareto_front(seconds, accuracy).tolist()
        assert found == slow_front(seconds, accuracy), f"front of {seconds}, {accuracy} is not {found}"


def test_front_and_hypervolume_are_pymoos():
    """pymoo sorts by its own code and measures with its own interface; half of the fronts are full of ties."""
    sorting = NonDominatedSorting(method="fast_non_dominated_sort")
    for case in range(200):
        random = np.random.default_rng(case)
        k = int(random.integers(1, 40))
        seconds, accuracy = random.integers(1, 6, (2, k)) / 5 if case % 2 else random.random((2, k))
        minimised = np.column_stack([seconds, -accuracy])
        first = sorting.do(minimised, only_non_dominated_front=True)
        found = np.flatnonzero(pareto_front(seconds, accuracy))
        assert found.tolist() == sorted(first.tolist()), f"front of {seconds}, {accuracy}"
        assert np.flatnonzero(fronts(seconds[None], accuracy[None])[0]).tolist() == found.tolist()
        truth = HV(ref_point=np.array([0.9, 0.0]))(minimised)
        assert hypervolume(seconds, accuracy, (0.9, 0.0)) == pytest.approx(truth)
        assert hypervolumes(seconds[None], accuracy[None], np.array([0.9]))[0] == pytest.approx(truth)


def test_equal_points_share_their_fate():
    assert pareto_front([1, 1, 2], [0.9, 0.9, 0.8]).tolist() == [True, True, False]
    assert pareto_front([1, 1], [0.9, 0.8]).tolist() == [True, False], "as fast, less accurate: beaten"
    assert pareto_front([], []).tolist() == []


def test_hypervolume_is_the_slow_one():
    for case in range(50):
        random = np.random.default_rng(case)
        seconds, accuracy = random.random((2, 6)) * 2
        reference = (1.5, 0.3)
        found = hypervolume(seconds, accuracy, reference)
        assert found == pytest.approx(slow_hypervolume(seconds, accuracy, reference))


def test_membership_of_two_arms_is_the_p_value_of_the_paired_t_test():
    """Where one outcome decides, the other being equal, P is the one-sided p value."""
    random = np.random.default_rng(0)
    for n in (2, 3, 5, 10):
        clock = random.normal(0, 0.2, (n, 1))
        seconds = np.exp(clock + random.normal([0.0, 0.02], 0.03, (n, 2)))
        found = front_membership(seconds, np.full((n, 2), 0.9), np.random.default_rng(1), resamples=40_000)
        logs = np.log(seconds)
        wanted: Any = stats.ttest_rel(logs[:, 0], logs[:, 1], alternative="less")
        assert found == pytest.approx([1 - wanted.pvalue, wanted.pvalue], abs=0.01), f"{n} seeds"
        accuracy = 0.9 + random.normal([0.01, 0.0], 0.02, (n, 2))
        found = front_membership(np.full((n, 2), 7.0), accuracy, np.random.default_rng(1), resamples=40_000)
        wanted = stats.ttest_rel(accuracy[:, 0], accuracy[:, 1], alternative="greater")
        assert found == pytest.approx([1 - wanted.pvalue, wanted.pvalue], abs=0.01), f"{n} seeds"


def test_membership_with_missing_runs_is_each_arms_own_t():
    random = np.random.default_rng(3)
    seconds = np.exp(random.normal(0, 0.05, (6, 2)))
    seconds[3:, 1] = math.nan
    times, _ = plausible_points(seconds, np.full((6, 2), 0.9), np.random.default_rng(0), 200_000)
    for j, n in enumerate((6, 3)):
        logs = np.log(seconds[:n, j])
        truth = stats.t.interval(0.95, n - 1, logs.mean(), logs.std(ddof=1) / math.sqrt(n))
        assert np.quantile(np.log(times[:, j]), (0.025, 0.975)) == pytest.approx(truth, abs=0.003), f"arm of {n} runs"


def test_membership_of_one_seed_is_unknown_and_a_missing_run_is_no_error():
    assert np.isnan(front_membership([[1.0, 2.0]], [[0.9, 0.8]], np.random.default_rng(0))).all()
    seconds = [[1.0, 2.0], [1.0, math.nan], [1.0, math.nan]]
    accuracy = [[0.5, 0.9], [0.5, math.nan], [0.5, math.nan]]
    found = front_membership(seconds, accuracy, np.random.default_rng(0))
    assert found[0] == 1.0
    assert np.isnan(found[1]), "one run says nothing about its spread"
    known = front_membership([[1.0, 2.0], [1.0, 2.0]], [[0.9, 0.8], [0.9, 0.8]], np.random.default_rng(0))
    assert known.tolist() == [1.0, 0.0], "runs without any spread"
    assert front_membership([[0.0, 2.0]] * 2, [[0.9, 0.8]] * 2, np.random.default_rng(0))[1] == 0.0, "0 s are fastest"


def test_fronts_and_volumes_of_many_rows_are_those_of_one():
    random = np.random.default_rng(0)
    seconds, accuracy = random.integers(1, 5, (2, 200, 5)).astype(float)
    seconds[random.random(seconds.shape) < 0.1] = math.nan
    accuracy[random.random(accuracy.shape) < 0.1] = math.nan
    worst = random.uniform(2, 5, 200)
    masks, volumes = fronts(seconds, accuracy), hypervolumes(seconds, accuracy, worst)
    for s, a, w, mask, volume in zip(seconds, accuracy, worst, masks, volumes, strict=True):
        assert mask.tolist() == pareto_front(s, a).tolist(), f"front of {s}, {a}"
        assert volume == pytest.approx(hypervolume(s, a, (w, 0.0))), f"moocore's hypervolume of {s}, {a} up to {w}"


def test_relative_volume():
    random = np.random.default_rng(0)
    seconds, accuracy = 10 + random.normal(0, 0.1, (5, 2)), 0.9 + random.normal(0, 0.01, (5, 2))
    found = relative_volume(seconds, accuracy, 0, np.random.default_rng(0))
    times = stats.gmean(seconds, axis=0)
    base = times[0]
    truth = hypervolume(times, accuracy.mean(axis=0), (2 * base, 0.0))
    assert found.value == pytest.approx(truth / (base * accuracy[:, 0].mean()))
    assert 1.0 <= found.low <= found.value <= found.high
    assert found.low < found.high
    one = relative_volume(seconds[:1], accuracy[:1], 0, np.random.default_rng(0))
    assert (one.low, one.high, one.n) == (None, None, 1)
