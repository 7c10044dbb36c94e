"""Effects of components against known truth and least squares."""

import itertools

import numpy as np
import pytest

from analysis.factorial import ablation_table, factorial_table, interaction, main_effect, studies
from analysis_records import bp, dbp, groups_of, ldb, report_of, run_line, sweep_line, synthetic


def design(names, noise=0.0, seeds=4):
    """All combinations of components with the effects 1, 2, ... and an interaction of the first two of 0.5."""
    random = np.random.default_rng(0)
    out = {}
    for k in range(len(names) + 1):
        for on in itertools.combinations(names, k):
            value = sum(names.index(c) + 1 for c in on) + 0.5 * (set(names[:2]) <= set(on))
            out[frozenset(on)] = value + random.normal(0, noise, seeds)
    return out


def test_full_factorial_effects_are_those_of_least_squares():
    names = ["a", "b", "c"]
    made = design(names, noise=0.3)
    code = np.array([[1 if c in on else -1 for c in names] for on in made], dtype=float)
    pairs = list(itertools.combinations(range(3), 2))
    columns = [np.ones(len(code)), *code.T, *(code[:, i] * code[:, j] for i, j in pairs), code.prod(axis=1)]
    fit = np.linalg.lstsq(np.column_stack(columns), np.array(list(made.values())), rcond=None)[0]
    for i, name in enumerate(names):
        assert main_effect(made, name) == pytest.approx(2 * fit[1 + i]), f"main effect of {name}"
    for at, (i, j) in enumerate(pairs):
        found = interaction(made, names[i], names[j])
        assert found == pytest.approx(4 * fit[4 + at]), f"interaction of {names[i]} and {names[j]}"


def test_incomplete_designs_use_the_contexts_they_have():
    made = design(["a", "b", "c"])
    assert main_effect(made, "c") == pytest.approx([3.0] * 4)
    del made[frozenset("ab")]
    assert main_effect(made, "a") == pytest.approx([(1 + 1 + 1.5) / 3] * 4), "alone, beside c, and beside b and c"
    only = {on: x for on, x in made.items() if on in (frozenset(), frozenset("a"), frozenset("abc"))}
    assert main_effect(only, "a") == pytest.approx([1.0] * 4)
    assert main_effect(only, "b").size == 0, "no two arms differ by b alone"
    assert interaction(only, "a", "b").size == 0


def lines(seeds=5, combine=True, noise=0.001):
    """ldb saves 30 % and costs a point, dbp adds a point and 40 %; together one more point than the sum."""
    random = np.random.default_rng(1)
    arms = [
        ("bp", "baseline", bp(), 10.0, 0.90),
        ("ldb", "method", ldb(), 7.0, 0.89),
        ("dbp", "method", dbp(), 14.0, 0.91),
    ]
    if combine:
        arms.append(("both", "method", dbp() | {"inner": ldb()}, 9.8, 0.91))
    out = [sweep_line(arms=[a[0] for a in arms], seeds=list(range(seeds)))]
    for seed in range(seeds):
        common = random.normal(0, 0.02)
        for arm, role, method, seconds, accuracy in arms:
            out.append(
                run_line(
                    arm=arm, role=role, method=method, seed=seed,
                    train_seconds=seconds * np.exp(random.normal(0, noise)),
                    test_accuracy=accuracy + common + random.normal(0, noise),
                )
            )  # fmt: skip
    return out


def test_tables_find_the_truth(tmp_path):
    _, (group,) = groups_of(tmp_path, lines())
    rows = {row["effect"]: row for row in factorial_table(group).rows}
    assert list(rows) == ["ldb", "dbp", "ldb × dbp"]
    truth = {"ldb": (-0.005, 0.7), "dbp": (0.015, 1.4), "ldb × dbp": (0.01, 1.0)}
    for effect, (accuracy, time) in truth.items():
        row = rows[effect]
        assert row["accuracy"].value == pytest.approx(accuracy, abs=0.002), f"{effect}: {row['accuracy']}"
        assert row["time"].value == pytest.approx(time, rel=0.01), f"{effect}: {row['time']}"
        assert row["accuracy"].high - row["accuracy"].low < 0.008, "the seeds' common effect was not removed"
        assert row["n"] == 5
    assert rows["ldb"]["contexts"] == 2
    assert rows["ldb × dbp"]["time_p"] > 0.05 > rows["ldb"]["time_p"]
    steps = {(row["component"], row["step"]): row for row in ablation_table(group).rows}
    assert set(steps) == {(c, w) for c in ("ldb", "dbp") for w in ("added to the baseline", "removed from both")}
    assert steps["dbp", "removed from both"]["accuracy"].value == pytest.approx(-0.02, abs=0.002)
    assert steps["ldb", "removed from both"]["time"].value == pytest.approx(14 / 9.8, rel=0.01)
    assert steps["ldb", "added to the baseline"]["accuracy"].value == pytest.approx(-0.01, abs=0.002)


def test_without_a_combination_there_is_no_table(tmp_path):
    _, (group,) = groups_of(tmp_path, lines(combine=False))
    assert not list(studies(group))
    contents = report_of(tmp_path, synthetic(3))
    assert "tables/factorial.csv" not in contents
    assert "tables/ablation.csv" not in contents


def test_with_a_combination_the_report_has_both(tmp_path):
    contents = report_of(tmp_path, lines())
    assert {"tables/factorial.csv", "tables/ablation.tex"} <= set(contents)
    assert "ldb × dbp" in contents["report.html"].decode()


def test_a_combination_at_two_settings_is_left_out(tmp_path):
    extra = [
        run_line(arm="more", role="method", method=dbp() | {"inner": ldb(0.1)}, seed=s, test_accuracy=0.5)
        for s in range(5)
    ]
    _, (group,) = groups_of(tmp_path, lines() + extra)
    assert not list(studies(group)), "which of two combinations to compare would be a choice"


def test_a_missing_run_costs_its_pair_alone(tmp_path):
    kept = [line for line in lines() if not (line.get("arm") == "both" and line.get("seed") == 2)]
    _, (group,) = groups_of(tmp_path, kept)
    rows = {row["effect"]: row for row in factorial_table(group).rows}
    assert rows["ldb × dbp"]["n"] == 4
    added = [row for row in ablation_table(group).rows if row["step"] == "added to the baseline"]
    assert [row["n"] for row in added] == [5, 5]
