"""Front, membership and hypervolume against slow truths."""

import itertools
import math

import numpy as np
import pytest

from analysis.pareto import front_membership, fronts, hypervolume, hypervolumes, pareto_front, relative_volume


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


def test_membership_is_the_share_over_all_resamples():
    random = np.random.default_rng(0)
    seconds = 10 + random.normal(0, 1, (4, 3))
    accuracy = 0.9 + random.normal(0, 0.02, (4, 3))
    exact = np.zeros(3)
    for draw in itertools.product(range(4), repeat=4):
        rows = list(draw)
        exact += slow_front(np.median(seconds[rows], axis=0), accuracy[rows].mean(axis=0))
    exact /= 4**4
    found = front_membership(seconds, accuracy, np.random.default_rng(1), resamples=5000)
    assert found == pytest.approx(exact, abs=0.03), f"{found} against all {4**4} resamples' {exact}"


def test_membership_of_one_seed_is_unknown_and_a_missing_run_is_no_error():
    assert np.isnan(front_membership([[1.0, 2.0]], [[0.9, 0.8]], np.random.default_rng(0))).all()
    seconds = [[1.0, 2.0], [1.0, math.nan], [1.0, math.nan]]
    accuracy = [[0.5, 0.9], [0.5, math.nan], [0.5, math.nan]]
    found = front_membership(seconds, accuracy, np.random.default_rng(0))
    assert found[0] == 1.0
    assert found[1] == pytest.approx(19 / 27, abs=0.03), "on the front whenever its one seed is drawn"


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
    base = np.median(seconds[:, 0])
    truth = hypervolume(np.median(seconds, axis=0), accuracy.mean(axis=0), (2 * base, 0.0))
    assert found.value == pytest.approx(truth / (base * accuracy[:, 0].mean()))
    assert 1.0 <= found.low <= found.value <= found.high
    assert found.low < found.high
    one = relative_volume(seconds[:1], accuracy[:1], 0, np.random.default_rng(0))
    assert (one.low, one.high, one.n) == (None, None, 1)
