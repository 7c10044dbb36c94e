"""What the search found per knob."""

import numpy as np
import pytest
from scipy import stats

from analysis.knobs import knob_table, knobs, running_median
from analysis.response import responses
from analysis_records import RECIPE, bp, groups_of, ldb, report_of, rows_of, run_line, search_lines, synthetic


def searched(trials=12):
    """Accuracy peaks at a rate of 0.5 and rises with lr; `mask` is a word."""
    random = np.random.default_rng(0)
    lines = []
    for i in range(trials):
        rate, lr = i / trials, float(10 ** random.uniform(-3, -0.5))
        accuracy = 0.9 - (rate - 0.5) ** 2 + 0.001 * np.log10(lr)
        method = ldb(rate) | {"mask": "prefix" if i % 2 else "random"}
        lines.append(
            run_line(
                arm="ldb", phase="search", role="method", method=method, exclusive=False,
                recipe=RECIPE | {"lr": lr}, val_accuracy=accuracy, test_accuracy=None,
            )
        )  # fmt: skip
    lines.append(lines[3] | {"run_key": "failed", "status": "diverged", "val_accuracy": 0.99})
    lines.append(run_line(arm="ldb", role="method", method=ldb(0.5), recipe=RECIPE | {"epochs": 40}))
    return lines


def test_knobs_are_what_the_search_varied(tmp_path):
    results, _ = groups_of(tmp_path, searched())
    found = {knob.name: knob for knob in knobs(results)}
    assert list(found) == ["drop_rate", "mask", "recipe.lr"], "the epochs of the measured run were not searched"
    rate = found["drop_rate"]
    assert rate.values.tolist() == sorted(i / 12 for i in range(12)), "finished trials in order of the value"
    assert (rate.measured.tolist(), rate.measured_accuracy.tolist()) == ([0.5], [0.9])
    assert (rate.is_log, found["recipe.lr"].is_log, found["mask"].is_number) == (False, True, False)


def test_table_finds_the_shape(tmp_path):
    results, _ = groups_of(tmp_path, searched())
    rows = {row["knob"]: row for row in knob_table(knobs(results)).rows}
    rate = rows["drop_rate"]
    assert (rate["trials"], rate["tried"], rate["best"]) == (12, "0 to 0.9167", "0.5")
    assert rate["lower"] < rate["middle"] > rate["upper"], "a peak in the middle"
    knob = next(k for k in knobs(results) if k.name == "recipe.lr")
    assert rows["lr"]["spearman"] == pytest.approx(stats.spearmanr(knob.values, knob.accuracy).statistic)
    assert rows["mask"]["tried"] == "prefix, random"
    assert "lower" not in rows["mask"]


def test_running_median_is_that_of_the_neighbours():
    x = np.random.default_rng(1).random(9)
    found = running_median(x, 5)
    for i in range(9):
        near = [x[j] for j in range(9) if abs(i - j) <= 2]
        assert found[i] == pytest.approx(np.median(near)), f"at {i}"


def test_constant_accuracy_and_measured_settings_without_a_search(tmp_path):
    lines = [run_line(arm="ldb", role="method", method=ldb(r), seed=0) for r in (0.1, 0.2, 0.3)]
    results, _ = groups_of(tmp_path, [*lines, run_line(method=bp())])
    (row,) = knob_table(knobs(results)).rows
    assert (row["arm"], row["knob"], row["trials"]) == ("ldb", "drop_rate", 3)
    assert "spearman" not in row, "a constant has no trend"


def test_small_plots_keep_every_point_inside(tmp_path):
    results, _ = groups_of(tmp_path, searched())
    made = responses(knobs(results))
    assert [one.plot.title for one in made] == ["demo/ldb: drop_rate", "demo/ldb: lr"], "a word has no axis"
    for one in made:
        assert (len(one.trials), len(one.measured)) == (12, 1)
        for x, y in (*one.trials, *one.measured):
            assert one.plot.x.start <= x <= one.plot.x.end, f"{one.plot.title}: {x} is off the axis"
            assert one.plot.y.end <= y <= one.plot.y.start
    ticks = [label for _, label in made[1].plot.x.ticks]
    assert ticks == ["0.001", "0.01", "0.1"], "a log axis for values that are spread widely"
    first, last = made[1].trials[0], made[1].trials[-1]
    assert first[0] < last[0]


def test_the_report_draws_searched_knobs(tmp_path):
    contents = report_of(tmp_path, searched(), figures=True)
    assert {"figures/knobs-1.png", "figures/knobs-1.svg"} <= set(contents)
    assert len(rows_of(contents, "knobs")) == 3
    assert "figures/knobs-1.svg" in contents["report.md"].decode()
    assert contents["report.html"].decode().count('<figure class="panel">') == 2
    none = report_of(tmp_path / "none", synthetic(3))
    assert "tables/knobs.csv" not in none
    few = report_of(tmp_path / "few", search_lines(2))
    assert "tables/knobs.csv" not in few, "two trials show nothing"
