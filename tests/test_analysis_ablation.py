"""The `ablate` part as the report reads it: effects against least squares and known truth, and bad data."""

import io
import itertools

import numpy as np
import pytest
from rich.console import Console
from scipy.linalg import lstsq

from analysis.ablation import ablation_tables, doses
from analysis.cli import write_report
from analysis.contrasts import estimates, model
from analysis.designs import designs
from analysis.errors import ReportError
from analysis.statistics import mean_estimate
from analysis_records import RECIPE, bp, dbp, groups_of, ldb, report_of, rows_of, run_line, sweep_line, write

# ---- effects


def cells_of(levels):
    return np.array(list(itertools.product(*map(range, levels))))


def noise(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def test_two_level_effects_are_those_of_least_squares_on_the_coded_matrix():
    cells, y = cells_of([2, 2, 2]), noise(8, 6)
    sign = 2.0 * cells - 1
    pairs = list(itertools.combinations(range(3), 2))
    matrix = np.column_stack([np.ones(8), *sign.T, *(sign[:, i] * sign[:, j] for i, j in pairs)])
    fit = lstsq(matrix, y)[0]
    found = estimates(model(cells, [2, 2, 2]), y)
    for i in range(3):
        assert found[((i, 1),)] == pytest.approx(2 * fit[1 + i]), f"main effect of factor {i}"
    for k, (i, j) in enumerate(pairs):
        assert found[(i, 1), (j, 1)] == pytest.approx(4 * fit[4 + k]), f"interaction of factors {i} and {j}"
    assert len(found) == 6


def test_effects_of_more_levels_are_differences_of_means():
    levels, y = [2, 3, 4], noise(24, 3)
    cells = cells_of(levels)
    found = estimates(model(cells, levels), y)

    def mean(**fixed):
        return y[np.all([cells[:, int(f[1])] == v for f, v in fixed.items()], axis=0)].mean(axis=0)

    for factor, count in enumerate(levels):
        for level in range(1, count):
            expected = mean(**{f"f{factor}": level}) - mean(**{f"f{factor}": 0})
            assert found[((factor, level),)] == pytest.approx(expected), f"factor {factor}, level {level}"
    expected = mean(f1=2, f2=3) - mean(f1=0, f2=3) - mean(f1=2, f2=0) + mean(f1=0, f2=0)
    assert found[(1, 2), (2, 3)] == pytest.approx(expected)


def test_a_missing_cell_costs_what_it_alone_determines():
    cells, y = cells_of([2, 2, 2]), noise(8, 4)
    made = model(cells, [2, 2, 2])
    y[3, 1] = np.nan
    y[:4, 2] = np.nan
    y[:, 3] = np.nan
    found = estimates(made, y)
    kept = np.arange(8) != 3
    fit = lstsq(made.matrix[kept], y[kept, 1])[0]
    assert found[((1, 1),)][1] == pytest.approx(2 * fit[2]), "seven cells determine seven coefficients"
    assert np.isnan(found[((0, 1),)][2]), "the first factor never changes in what is left"
    assert np.isnan(list(found.values()))[:, 3].all()
    assert not np.isnan(list(found.values()))[:, :2].any()


def test_a_fraction_names_what_it_cannot_tell_apart():
    half = np.array([row for row in cells_of([2] * 4) if sum(row[:3] == 0) % 2 == (row[3] == 0)])
    made = model(half, [2] * 4)
    named = {tuple(f for f, _ in k): [tuple(f for f, _ in o) for o in v] for k, v in made.aliases.items()}
    assert named == {(0, 1): [(2, 3)], (0, 2): [(1, 3)], (0, 3): [(1, 2)]}, f"{named}"
    y = noise(8, 2)
    expected = y[half[:, 3] == 1].mean(axis=0) - y[half[:, 3] == 0].mean(axis=0)
    assert estimates(made, y)[((3, 1),)] == pytest.approx(expected)
    third = model(np.array([[0, 0, 1], [0, 1, 0], [1, 0, 0], [1, 1, 1]]), [2] * 3)
    assert third.aliases[((2, 1),)] == [((0, 1), (1, 1))], "resolution III mixes a main effect"


def test_intervals_of_effects_cover_the_truth():
    """2^3 cells, five seeds that share an effect each: 600 simulated ablations."""
    made, random = model(cells_of([2, 2, 2]), [2, 2, 2]), np.random.default_rng(0)
    truth = {((0, 1),): 1.0, ((0, 1), (1, 1)): 0.5}
    sign = 2.0 * cells_of([2, 2, 2]) - 1
    signal = 0.5 * sign[:, 0] + 0.125 * sign[:, 0] * sign[:, 1]
    hits = dict.fromkeys(truth, 0)
    for _ in range(600):
        y = signal[:, None] + random.normal(0, 3, 5) + random.normal(0, 0.7, (8, 5))
        found = estimates(made, y)
        for name, value in truth.items():
            e = mean_estimate(found[name])
            hits[name] += e.low <= value <= e.high
    shares = {name: n / 600 for name, n in hits.items()}
    assert all(0.93 <= share <= 0.97 for share in shares.values()), f"coverage is {shares}"


# ---- records

BOTH = dbp(1e-3) | {"inner": ldb(0.5)}
SWITCH = [False, True]


def cell(arm, **levels):
    return {"arm": arm, "levels": levels}


def ablation(design, factors, cells, seeds, note=""):
    return {
        "arm": "both", "design": design, "baseline": "bp", "factors": factors, "seeds": seeds, "note": note,
        "cells": [cell("bp"), cell("both"), *cells],
    }  # fmt: skip


def lines(seeds=5, spread=0.001, phase="ablate", keep=lambda arm, seed: True):
    """dbp: +1 point and 40 % more time; ldb: -2 points and 30 % less; together +1 point; dose: -4 points a unit."""
    random = np.random.default_rng(1)
    dose = {r: f"both/inner.drop_rate={r}" for r in (0.0, 0.25)}
    names = {(False, False): "both/plain", (True, False): "both/without-ldb", (False, True): "both/without-dbp",
             (True, True): "both"}  # fmt: skip
    n, crossed = list(range(seeds)), [cell(name, dbp=k[0], ldb=k[1]) for k, name in names.items()]
    planned = [
        ablation("leave_one_out", {"dbp": SWITCH, "ldb": SWITCH},
                 [cell(names[k], dbp=k[0], ldb=k[1]) for k in ((True, True), (False, True), (True, False))], n),
        ablation("add_one_in", {"dbp": SWITCH, "ldb": SWITCH}, crossed, n),
        ablation("factorial", {"dbp": SWITCH, "ldb": SWITCH}, crossed, n),
        ablation("dose_response", {"method.inner.drop_rate": [0.0, 0.25]},
                 [cell(v, **{"method.inner.drop_rate": k}) for k, v in dose.items()]
                 + [cell("both", **{"method.inner.drop_rate": 0.5})], n),
    ]  # fmt: skip
    arms = {"bp": (bp(), 8.0, 0.90)}
    methods = {(False, False): bp(), (True, False): dbp(1e-3), (False, True): ldb(0.5), (True, True): BOTH}
    for (d, k), name in names.items():
        arms[name] = (methods[d, k], 10 * 1.4**d * 0.7**k, 0.88 + 0.01 * d - 0.02 * k + 0.01 * (d and k))
    for rate, name in dose.items():
        arms[name] = (dbp(1e-3) | {"inner": ldb(rate)}, 12.0 - 4 * rate, arms["both"][2] + 0.04 * (0.5 - rate))
    out = [sweep_line(arms=["bp", "both"], seeds=[], measure_cells=0, ablate_cells=7 * seeds, ablations=planned)]
    for seed in n:
        common = random.normal(0, 0.02)
        for arm, (method, seconds, accuracy) in arms.items():
            run = run_line(
                arm=arm, phase=phase, role="baseline" if arm == "bp" else "method", method=method, seed=seed,
                recipe=RECIPE | {"lr": 0.1 if arm == "bp" else 0.2},
                train_seconds=seconds * np.exp(random.normal(0, spread)),
                test_accuracy=accuracy + common + random.normal(0, spread),
            )  # fmt: skip
            out += [run] if keep(arm, seed) else []
    return out


def tables_of(tmp_path, given):
    results, (group,) = groups_of(tmp_path, given)
    return {t.name: t.rows for t in ablation_tables(list(designs(group, results)))}


def test_tables_find_the_truth(tmp_path):
    found = tables_of(tmp_path, lines())
    steps = {(row["component"], row["step"]): row for row in found["ablate_components"]}
    added = "added to backprop with the arm’s recipe"
    truth = {
        ("all", "both against bp"): (-0.02, 9.8 / 8),
        ("dbp", "removed from both"): (-0.02, 1 / 1.4),
        ("ldb", "removed from both"): (0.01, 1 / 0.7),
        ("dbp", added): (0.01, 1.4),
        ("ldb", added): (-0.02, 0.7),
    }
    assert set(steps) == set(truth), f"steps are {set(steps)}"
    effects = {row["effect"]: row for row in found["ablate_factorial"]}
    truths = {"dbp": (0.015, 1.4), "ldb": (-0.015, 0.7), "dbp × ldb": (0.01, 1.0)}
    levels = {row["level"]: row for row in found["ablate_dose"]}
    curve = {"0": (0.0, 12 / 8), "0.25": (-0.01, 11 / 8), "0.5 (chosen)": (-0.02, 9.8 / 8)}
    assert list(levels) == list(curve)
    for rows, known in ((steps, truth), (effects, truths), (levels, curve)):
        for name, (accuracy, time) in known.items():
            row = rows[name]
            assert row["accuracy"].value == pytest.approx(accuracy, abs=0.002), f"{name}: {row['accuracy']}"
            assert row["time"].value == pytest.approx(time, rel=0.01), f"{name}: {row['time']}"
            assert row["accuracy"].high - row["accuracy"].low < 0.008, "the seeds' common effect was not removed"
            assert row["n"] == 5
    assert effects["dbp × ldb"]["time_p"] > 0.05 > effects["ldb"]["time_p"]


def test_the_command_prints_a_sweep_that_has_only_ablations(tmp_path):
    said = io.StringIO()
    source = write(tmp_path / "in" / "records.jsonl", lines(seeds=3))
    write_report([str(source)], tmp_path / "out", console=Console(file=said, width=100))
    assert "Only ablations were run: their tables show what each part brings." in said.getvalue(), said.getvalue()
    assert "train time" not in said.getvalue(), "a Pareto table without a measured run"


def test_the_report_has_tables_figures_and_counts_what_is_missing(tmp_path):
    given = lines(keep=lambda arm, seed: (arm, seed) != ("both/plain", 3))
    contents = report_of(tmp_path, given, figures=True)
    page = contents["report.html"].decode()
    assert page.count('<figure class="panel">') == 2, "accuracy and time against the drop rate"
    assert "Ablation: dose and response" in page
    assert "figures/doses-group1-1.svg" in contents["report.md"].decode()
    assert {"figures/doses-group1-1.png", "tables/ablate_components.tex"} <= set(contents)
    assert "34 of 35 planned ablation runs finished" in page
    rows = {r["arm"]: r for r in rows_of(contents, "summary") if r["phase"] == "ablate"}
    assert next(iter(rows)) == "bp", "the arms' order is not the file's"
    assert (rows["both/plain"]["planned"], rows["both/plain"]["missing"]) == ("5", "1")
    effects = {r["effect"]: r for r in rows_of(contents, "ablate_factorial")}
    assert effects["dbp"]["n"] == "4", "a missing run costs its seed"
    added = [r["n"] for r in rows_of(contents, "ablate_components") if r["step"].startswith("added")]
    assert added == ["4", "4"]


@pytest.mark.parametrize(
    "change",
    [
        lambda given: [line for line in given if line.get("seed", 0) == 0],
        lambda given: [line for line in given if line.get("arm") != "bp"],
        lambda given: [line for line in given if line.get("arm") != "both"],
        lambda given: [line | ({"status": "failed"} if "status" in line else {}) for line in given],
        lambda given: [line | ({"test_accuracy": None} if line.get("seed") == 1 else {}) for line in given],
        lambda given: [line | ({"train_seconds": 0.0} if "seed" in line else {}) for line in given],
        lambda given: [line | ({"test_accuracy": 0.5} if "seed" in line else {}) for line in given],
        lambda given: [line | ({"exclusive": False} if line.get("arm") == "both" else {}) for line in given],
        lambda given: given[1:],
    ],
    ids=[
        "one seed",
        "no baseline",
        "no whole arm",
        "all failed",
        "no test",
        "no time",
        "constant",
        "shared",
        "no plan",
    ],
)
def test_degenerate_ablations_make_a_report(tmp_path, change):
    contents = report_of(tmp_path, change(lines()), figures=True)
    assert "<h2>" in contents["report.html"].decode()
    for rows in (
        rows_of(contents, name) for name in ("ablate_components", "ablate_dose") if f"tables/{name}.csv" in contents
    ):
        assert all(row["accuracy_p"] == "" or 0 <= float(row["accuracy_p"]) <= 1 for row in rows)


def test_one_seed_has_effects_without_intervals_and_tests(tmp_path):
    rows = tables_of(tmp_path, lines(seeds=1))["ablate_factorial"]
    assert rows[0]["accuracy"].value == pytest.approx(0.015, abs=0.003)
    assert (rows[0]["accuracy"].low, rows[0]["n"]) == (None, 1)
    assert np.isnan(rows[0]["accuracy_p"])


def test_levels_that_are_no_numbers_stand_in_their_order(tmp_path):
    given = lines()
    own = given[0]["ablations"][3]
    own["factors"] = {"method.inner.unit": ["layer", "tensor"]}
    for item in own["cells"][2:]:
        item["levels"] = {
            "method.inner.unit": {"both": "block"}.get(item["arm"], "layer" if "0.0" in item["arm"] else "tensor")
        }
    results, (group,) = groups_of(tmp_path, given)
    (dose,) = doses(list(designs(group, results)))
    assert (dose.levels, dose.chosen) == (["layer", "tensor", "block"], 2)
    assert 'text-anchor="middle">tensor</text>' in report_of(tmp_path, given)["report.html"].decode()


def test_ablations_of_two_sweeps_are_told_apart(tmp_path):
    other = [line | {"sweep": "other"} for line in lines()]
    for line in other:
        line.update({"run_key": f"o{line['run_key']}"} if "run_key" in line else {})
    arms = {row["arm"] for row in tables_of(tmp_path, lines() + other)["ablate_dose"]}
    assert arms == {"demo/both", "other/both"}, f"{arms}"


@pytest.mark.parametrize(
    "bad", [3, [3], [{}], [{**ablation("factorial", {"a": []}, [], [0])}], [{**ablation("factorial", {}, [3], [0])}]]
)
def test_a_plan_that_says_nothing_is_refused(tmp_path, bad):
    given = lines()
    given[0]["ablations"] = bad
    with pytest.raises(ReportError, match=r"records.jsonl:1: ablations has .*expected arm, design, factors"):
        groups_of(tmp_path, given)
