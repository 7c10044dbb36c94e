"""Paired tests against scipy and slow truths; the comparisons and verdicts that rest on them."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from analysis.comparisons import comparison_table, comparisons
from analysis.paired import detectable_effect, holm, sign_flip_test, t_test, wilcoxon_test
from analysis.summary import answer
from analysis_records import bp, dbp, groups_of, ldb, run_line, synthetic


def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize("n", [2, 3, 5, 9, 14])
def test_sign_flips_are_scipys_exact_permutation_test(n):
    x = np.random.default_rng(n).normal(0.5, 1, n)
    truth = stats.permutation_test((x,), np.mean, permutation_type="samples", n_resamples=np.inf).pvalue
    assert sign_flip_test(x, rng()) == pytest.approx(truth), f"exact p of {n} pairs"


def test_sign_flips_with_ties_and_zeros_are_the_count_over_all_signs():
    x = np.array([1.0, 1.0, -1.0, 0.0, 2.0])
    sums = [abs(np.dot(signs, x)) for signs in itertools.product((-1, 1), repeat=5)]
    assert sign_flip_test(x, rng()) == np.mean([s >= 3 for s in sums])
    assert sign_flip_test([0.0, 0.0], rng()) == 1.0


def test_sign_flips_of_many_pairs_are_sampled_close_to_the_t_test():
    x = np.random.default_rng(1).normal(0.35, 1, 30)
    assert sign_flip_test(x, rng()) == pytest.approx(t_test(x), abs=0.02)


def test_t_and_wilcoxon_are_scipys():
    a, b = np.random.default_rng(2).normal(0, 1, (2, 8))
    assert t_test(a - b) == pytest.approx(stats.ttest_rel(a, b).pvalue)
    assert wilcoxon_test(a - b) == pytest.approx(stats.wilcoxon(a, b).pvalue)


@pytest.mark.parametrize("test", [t_test, wilcoxon_test, lambda x: sign_flip_test(x, rng())])
def test_degenerate_pairs(test):
    assert test([]) is None
    assert test([1.0]) is None
    assert test([1.0, math.nan, math.inf]) is None, "one known pair is no test"
    assert test([0.0, 0.0, 0.0]) == 1.0
    assert 0 <= test([1.0, 1.0, 1.0, 2.0, 2.0]) <= 1, "ties"


def test_equal_differences_are_not_certain():
    """Accuracies are multiples of one over the images: three equal differences are no proof of a fourth."""
    rounded = np.array([0.11, 0.51, 0.91]) - np.array([0.1, 0.5, 0.9])
    assert rounded.std() > 0, "rounding is what this is about"
    assert t_test(rounded) == t_test([0.01] * 3) == sign_flip_test([0.01] * 3, rng()) == 0.25
    assert t_test([0.01] * 5) == 0.0625
    assert t_test(1e-12 * np.array([1.0, 1.1, 0.9])) < 0.05, "a small spread is one"


@pytest.mark.parametrize("n", [3, 5])
def test_equal_arms_of_quantised_accuracy_differ_in_at_most_7_percent(n):
    """Hits among 360 images; the noise of the times is continuous."""
    random, declared = np.random.default_rng(n), 0
    for _ in range(400):
        hits, logs = random.binomial(360, 0.995, (5, n)) / 360, random.normal(0, 0.02, (5, n))
        p = [t_test(values[i] - values[0]) for i in range(1, 5) for values in (hits, logs)]
        declared += holm(p).min() < 0.05
    assert declared <= 0.07 * 400, f"{declared} of 400 sweeps of equal arms declare a difference"


def test_holm_rejects_as_the_step_down_procedure():
    for case in range(200):
        p = np.round(np.random.default_rng(case).random(5) ** 3, 2)
        rejected, order = np.zeros(5, bool), np.argsort(p, kind="stable")
        for k, i in enumerate(order):  # stop at the first that is not below its share
            if p[i] * (5 - k) >= 0.05:
                break
            rejected[i] = True
        assert ((holm(p) < 0.05) == rejected).all(), f"Holm over {p} rejects {holm(p) < 0.05}, not {rejected}"
    assert holm([0.01, math.nan, 0.04])[[0, 2]].tolist() == [0.02, 0.04], "an unknown p does not count"
    assert math.isnan(holm([0.01, math.nan])[1])


@pytest.mark.parametrize(("n", "alpha"), [(3, 0.05), (5, 0.05), (5, 0.05 / 8), (12, 0.01)])
def test_detectable_effect_is_found_in_80_percent(n, alpha):
    effect = detectable_effect(n, alpha)
    x = np.random.default_rng(n).normal(effect, 1, (40_000, n))
    t = x.mean(axis=1) / (x.std(axis=1, ddof=1) / math.sqrt(n))
    found = np.mean(t > stats.t.ppf(1 - alpha / 2, n - 1))
    assert found == pytest.approx(0.8, abs=0.01), f"an effect of {effect:.2f} sd is found in {found:.1%} of sweeps"


def test_no_detectable_effect_below_three_pairs():
    assert detectable_effect(2) is None


# --- in the report -----------------------------------------------------------------------------------------------


def test_comparisons_are_corrected_over_methods_and_outcomes(tmp_path):
    _, (group,) = groups_of(tmp_path, synthetic(5))
    found = comparisons(group)
    assert list(found) == ["ldb", "dbp"], "controls explain and are not compared"
    raw = [effect.p for effects in found.values() for effect in effects]
    adjusted = [effect.p_holm for effects in found.values() for effect in effects]
    assert adjusted == pytest.approx(holm(raw).tolist())
    baseline, arm = group.arms[0].timed, next(a for a in group.arms if a.name == "dbp").timed
    truth = stats.ttest_rel(np.log(baseline["train_seconds"]), np.log(arm["train_seconds"])).pvalue
    assert found["dbp"][0].p == pytest.approx(truth)
    assert found["dbp"][1].p == pytest.approx(stats.ttest_rel(arm["test_accuracy"], baseline["test_accuracy"]).pvalue)
    assert (found["ldb"][0].direction, found["dbp"][0].direction, found["dbp"][1].direction) == (1, -1, -1)


def _arms(effects, seeds=6):
    """Baseline and methods of equal time with given paired accuracy differences, by seed."""
    lines = []
    for seed in range(seeds):
        lines.append(run_line(seed=seed, train_seconds=10 + 0.1 * (seed % 2), test_accuracy=0.9))
        for arm, method, gains in effects:
            lines.append(
                run_line(
                    arm=arm, role="method", method=method, seed=seed,
                    train_seconds=10 + 0.1 * (seed // 2 % 2), test_accuracy=0.9 + gains[seed],
                )
            )  # fmt: skip
    return lines


def test_a_difference_that_is_lost_in_the_correction_is_undecided_and_says_what_was_detectable(tmp_path):
    gains = np.array([0.001, 0.004, 0.002, 0.005, 0.0, 0.003])
    p = t_test(gains)
    assert 0.01 < p < 0.05, p
    noise = np.array([0.001, -0.001, 0.002, -0.002, 0.001, -0.0013])
    _, (group,) = groups_of(tmp_path, _arms([("ldb", ldb(), gains), ("dbp", dbp(), noise)]))
    gain = comparisons(group)["ldb"][1]
    assert gain.estimate.low > 0, "the uncorrected interval excludes no effect"
    assert gain.p_holm == pytest.approx(4 * p)
    page = answer(group)
    assert [c.verdict for c in page.comparisons] == ["undecided", "undecided"]
    assert "would mostly go unseen" in page.comparisons[0].sentence, page.comparisons[0].sentence
    assert any("corrected for comparing 2 methods" in note for note in page.notes), page.notes
    row = next(r for r in comparison_table(group).rows if r["arm"] == "ldb" and "gain" in r)
    expected = detectable_effect(6, 0.05 / 4) * gains.std(ddof=1)
    assert row["detectable_gain"] == pytest.approx(expected), "in accuracy, after the strictest correction"
    assert row["found"] == "undecided"


def test_a_difference_alone_that_survives_its_correction_is_called(tmp_path):
    gains = np.array([0.004, 0.006, 0.005, 0.007, 0.003, 0.005])
    _, (group,) = groups_of(tmp_path, _arms([("ldb", ldb(), gains)]))
    assert answer(group).comparisons[0].verdict == "wins", comparisons(group)["ldb"][1]


def test_equal_steps_at_three_seeds_win_nothing(tmp_path):
    lines = []
    for seed, accuracy in enumerate((0.97, 0.98, 0.99)):
        lines.append(run_line(seed=seed, train_seconds=10 + 0.1 * seed, test_accuracy=accuracy))
        more = {"train_seconds": 10.1 - 0.1 * seed, "test_accuracy": accuracy + 0.01}
        lines.append(run_line(arm="ldb", role="method", method=ldb(), seed=seed, **more))
    _, (group,) = groups_of(tmp_path, lines)
    (found,) = answer(group).comparisons
    assert found.verdict == "undecided", found.sentence
    assert comparisons(group)["ldb"][1].detectable is None, "without a spread it would be 0"
    assert "unseen" not in found.sentence


def test_two_pairs_are_no_comparison(tmp_path):
    _, (group,) = groups_of(tmp_path, synthetic(2))
    assert comparisons(group) == {}
    assert comparison_table(group).rows == []


def test_a_baseline_alone_has_no_comparison(tmp_path):
    _, (group,) = groups_of(tmp_path, [run_line(seed=s, method=bp()) for s in range(4)])
    assert comparisons(group) == {}
