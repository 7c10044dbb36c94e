"""Intervals against scipy, closed forms and simulations with known truth."""

import math

import numpy as np
import pytest
from scipy import stats

from analysis.statistics import (
    Estimate,
    bootstrap_interval,
    bootstrap_t_estimate,
    censored_ratio,
    difference_estimate,
    generator,
    mean_estimate,
    median_estimate,
    ratio_estimate,
    time_to_target,
)


def rng():
    return np.random.default_rng(0)


def test_mean_interval_is_scipys():
    values = np.random.default_rng(1).normal(3, 2, 7)
    found = mean_estimate(values)
    truth = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((truth.low, truth.high)), f"{found} is not scipy's {truth}"
    assert (found.value, found.n) == (pytest.approx(values.mean()), 7)


def test_difference_interval_is_scipys_paired_one():
    a, b = np.random.default_rng(2).normal(0, 1, (2, 6))
    found = difference_estimate(a, b)
    truth = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((truth.low, truth.high)), f"{found} is not scipy's {truth}"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], Estimate()),
        ([math.nan], Estimate()),
        ([2.0], Estimate(2.0, n=1)),
        ([2.0, math.nan], Estimate(2.0, n=1)),
        ([2.0, 2.0, 2.0], Estimate(2.0, 2.0, 2.0, 3)),
    ],
)
def test_degenerate_samples(values, expected):
    assert mean_estimate(values) == expected
    assert median_estimate(values) == expected


def test_bounds_cut_the_interval_and_not_the_mean():
    found = mean_estimate([0.99, 1.0, 0.9], bounds=(0.0, 1.0))
    assert found.high == 1.0, f"upper end {found.high} beyond what an accuracy can be"
    assert found.value == pytest.approx(0.9633333)


@pytest.mark.parametrize("n", [3, 5, 10])
def test_mean_interval_covers_the_truth_in_95_percent(n):
    draws = np.random.default_rng(n).normal(1.0, 0.3, (2000, n))
    covered = np.mean([e.low <= 1.0 <= e.high for e in map(mean_estimate, draws)])
    assert 0.93 <= covered <= 0.97, f"a nominal 95 % interval covered {covered:.1%} at n = {n}"


def test_ratio_interval_covers_the_truth_and_pairing_removes_what_seeds_share():
    random, covered, widths = np.random.default_rng(3), [], []
    for _ in range(1000):
        shared = random.normal(0, 0.5, 5)
        slow = np.exp(shared + random.normal(0, 0.02, 5))
        fast = np.exp(shared - math.log(1.5) + random.normal(0, 0.02, 5))
        found = ratio_estimate(slow, fast)
        covered.append(found.low <= 1.5 <= found.high)
        widths.append(found.high - found.low)
    assert 0.93 <= np.mean(covered) <= 0.97, f"coverage {np.mean(covered):.1%}"
    assert np.median(widths) < 0.2, f"intervals are {np.median(widths):.2f} wide: the pairs were not used"


def test_ratio_of_pairs_is_their_geometric_mean_and_its_inverse_is_inverse():
    a, b = [2.0, 8.0, 4.0], [1.0, 2.0, 4.0]
    found, inverse = ratio_estimate(a, b), ratio_estimate(b, a)
    assert found.value == pytest.approx(2.0), f"geometric mean of 2, 4, 1 is 2, not {found.value}"
    assert inverse.low == pytest.approx(1 / found.high)
    assert ratio_estimate([1.0, math.inf, 0.0], [1.0, 1.0, 1.0]).n == 1


def test_baseline_against_itself_is_significant_in_about_5_percent():
    random = np.random.default_rng(4)
    draws = np.exp(random.normal(0, 0.1, (2000, 2, 5)))
    wrong = np.mean([not e.low <= 1 <= e.high for e in (ratio_estimate(a, b) for a, b in draws)])
    assert wrong <= 0.07, f"equal arms were called different in {wrong:.1%} of sweeps"


def test_bootstrap_agrees_with_scipy():
    values = np.random.default_rng(5).exponential(1, 40)
    found = bootstrap_interval(values, np.median, rng(), resamples=20000)
    n = len(values)  # Hesterberg's expanded percentiles
    level = 1 - 2 * stats.norm.cdf(-math.sqrt(n / (n - 1)) * stats.t.ppf(0.975, n - 1))
    truth = stats.bootstrap(
        (values,), np.median, confidence_level=level, method="percentile", n_resamples=20000, rng=rng()
    )
    truth = truth.confidence_interval
    assert found == pytest.approx((truth.low, truth.high), abs=0.06), f"{found} against scipy's {truth}"


def test_median_with_misses_keeps_them():
    found = median_estimate([1.0, 2.0, 3.0, math.inf, math.inf])
    assert (found.value, found.low, found.high) == (3.0, 1.0, math.inf)
    most = median_estimate([1.0, math.inf, math.inf])
    assert most.value == math.inf, f"two misses of three give the median {most.value}"


def test_median_interval_is_that_of_the_order_statistics():
    """Hettmansperger and Sheather: between the ranks whose binomial coverage surrounds 95 %."""
    found = median_estimate(np.arange(1.0, 11.0))
    outer, inner = (stats.binom.cdf(10 - r, 10, 0.5) - stats.binom.cdf(r - 1, 10, 0.5) for r in (2, 3))
    share = (outer - 0.95) / (outer - inner)
    weight = (10 - 2) * share / (2 + (10 - 4) * share)
    assert (found.value, found.low, found.high) == pytest.approx((5.5, 2 + weight, 9 - weight))
    assert median_estimate([3.0, 1.0, 2.0]) == Estimate(2.0, 1.0, 3.0, 3), "up to five values: the range"
    missed = median_estimate([*range(1, 9), math.inf, math.inf])
    assert missed.high == math.inf, "an end between a time and a miss is a miss"


def test_bootstrap_t_of_a_mean_is_students_interval():
    values = np.random.default_rng(7).normal(0, 1, 6)
    drawn = values[np.random.default_rng(8).integers(6, size=(200_000, 6))].mean(axis=1)
    found, truth = bootstrap_t_estimate(values.mean(), drawn, 6), mean_estimate(values)
    assert (found.low, found.high) == pytest.approx((truth.low, truth.high), abs=0.01)
    assert bootstrap_t_estimate(1.0, drawn, 1) == Estimate(1.0, n=1)
    missed = bootstrap_t_estimate(0.0, [0.0, 0.1, -0.1, -math.inf], 4)
    assert missed.low == -math.inf, "a quarter of the samples missed, but the interval does not say so"
    assert math.isfinite(missed.high)


def test_time_to_target_against_a_loop():
    random = np.random.default_rng(6)
    for _ in range(200):
        accuracy = random.random(6)
        accuracy[random.random(6) < 0.3] = math.nan
        seconds, target = np.cumsum(random.random(6)), random.random()
        truth = math.inf
        for s, a in zip(seconds, accuracy, strict=True):
            if a >= target:
                truth = s
                break
        assert time_to_target(seconds, accuracy, target) == truth
    assert time_to_target([], [], 0.5) == math.inf


def test_censored_ratio():
    inf = math.inf
    assert censored_ratio([4.0, 4.0, 4.0], [2.0, 2.0, inf]).value == 2.0
    assert censored_ratio([4.0], [inf]).value == 0.0, "the arm alone missed: it is infinitely slower"
    assert censored_ratio([inf], [4.0]).value == inf
    both = censored_ratio([inf, 4.0], [inf, 2.0])
    assert both == Estimate(n=2), f"a pair in which both missed says nothing, but {both} was claimed"


def test_generator_depends_on_its_names_alone():
    first, again, other = (generator("a", n).random() for n in (1, 1, 2))
    assert first == again != other
