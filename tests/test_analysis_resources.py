"""Memory, work and energy: paired ratios to the baseline against a slow truth, and what was not measured."""

import math
import re

import numpy as np
import pytest
from scipy import stats

from analysis.resources import resource_plots, resource_ratio, resource_table
from analysis_records import groups_of, report_of, rows_of, synthetic, with_run


def measured(seeds=5):
    """The synthetic sweep with memory on every run, FLOPs on the baseline and ldb, and no energy."""
    rng, lines = np.random.default_rng(0), synthetic(seeds)
    factors = {("bp", "baseline"): 1.0, ("ldb", "method"): 0.8, ("dbp", "method"): 1.5}
    common = np.exp(rng.normal(0, 0.2, seeds))
    for line in lines:
        if line["kind"] == "run":
            factor = factors.get((line["arm"], line["role"]), 1.0)
            line["peak_memory_bytes"] = int(2**30 * factor * common[line["seed"]] * math.exp(rng.normal(0, 0.01)))
            line["flops_executed"] = 1e12 * factor if line["arm"] != "dbp" else None
    return lines


def test_ratios_are_paired_geometric_means_with_students_interval(tmp_path):
    _, (group,) = groups_of(tmp_path, measured())
    rows = {row["arm"]: row for row in resource_table(group).rows}
    base, arm = (group.arms[i].timed["peak_memory_bytes"].to_numpy(float) for i in (0, 1))
    logs = np.log(arm / base)
    low, high = stats.t.interval(0.95, 4, logs.mean(), stats.sem(logs))
    found = rows["ldb"]["peak_memory_bytes_ratio"]
    assert (found.value, found.low, found.high, found.n) == pytest.approx((*np.exp([logs.mean(), low, high]), 5))
    assert found.high - found.low < 0.1, "what a seed does to all arms was not taken out"
    assert rows["ldb"]["peak_memory_bytes"] == pytest.approx(arm.mean())
    flops = rows["ldb"]["flops_executed_ratio"]
    assert (flops.value, flops.low, flops.high) == pytest.approx((0.8, 0.8, 0.8))
    assert (rows["bp"]["flops_executed_ratio"].value, rows["bp"]["flops_executed_ratio"].low) == (1.0, None)


def test_what_was_not_measured_says_so(tmp_path):
    _, (group,) = groups_of(tmp_path, measured())
    table = resource_table(group)
    titles = [column.title for column in table.shown]
    cells = {row["arm"]: dict(zip(titles, table.cells(row), strict=True)) for row in table.rows}
    assert cells["dbp"]["FLOPs executed"] == cells["dbp"]["FLOPs executed / baseline"] == "not measured"
    assert {row["energy (J)"] for row in cells.values()} == {"not measured"}
    assert "energy / baseline" not in titles, "a column of ratios that says nothing"
    assert re.fullmatch(r"1\.[45]\d× \[1\.4\d×, 1\.5\d×\]", cells["dbp"]["peak memory / baseline"]), cells["dbp"]
    _, (bare,) = groups_of(tmp_path / "bare", synthetic(3))
    assert {cell for row in resource_table(bare).rows for cell in resource_table(bare).cells(row)} >= {"not measured"}
    assert not resource_plots(bare)


def test_a_run_without_its_partner_or_a_value_is_no_pair(tmp_path):
    lines = with_run(measured(), lambda r: r["arm"] == "bp" and r["seed"] == 0, peak_memory_bytes=None)
    lines = with_run(lines, lambda r: r["arm"] == "ldb" and r["seed"] == 1, status="failed")
    _, (group,) = groups_of(tmp_path, lines)
    assert resource_ratio(group, group.arms[1], "peak_memory_bytes").n == 3
    assert resource_ratio(group, group.arms[1], "energy_joules").value is None


def test_the_report_has_the_table_and_a_small_plot_of_each(tmp_path):
    contents = report_of(tmp_path, measured())
    rows = {row["arm"]: row for row in rows_of(contents, "resources")}
    assert float(rows["ldb"]["flops_executed_ratio"]) == pytest.approx(0.8)
    assert float(rows["ldb"]["peak_memory_bytes_ratio_low"]) < 0.8 < float(rows["ldb"]["peak_memory_bytes_ratio_high"])
    page = contents["report.html"].decode()
    assert page.count('<figure class="panel"><figcaption>peak memory / baseline') == 1
    assert page.count('<figure class="panel"><figcaption>FLOPs executed / baseline') == 1
    assert "energy / baseline" not in page
    assert "not measured" in contents["report.md"].decode()


@pytest.mark.parametrize("value", [0, 1e-300, 1e29, 10**400])
def test_absurd_resources_make_a_report(tmp_path, value):
    lines = with_run(
        measured(3), lambda r: r["arm"] == "ldb" and r["seed"], peak_memory_bytes=value, energy_joules=value
    )
    contents = report_of(tmp_path, lines)
    assert "nan" not in contents["tables/resources.csv"].decode()
