"""Attainment surfaces against a slow truth, and the band that is drawn."""

import numpy as np
import pytest

from analysis.attainment import attainment_surfaces, attainment_table, band, group_surfaces, staircase
from analysis.plot import pareto_plot
from analysis_records import groups_of, report_of, rows_of, synthetic, with_run


def attained_by(seconds, accuracy, at_seconds, at_accuracy):
    """In how many seeds some arm is at least as fast and as accurate."""
    return sum(
        any(t <= at_seconds and a >= at_accuracy for t, a in zip(times, scores, strict=True))
        for times, scores in zip(seconds, accuracy, strict=True)
    )


def below(corners, seconds, accuracy):
    """Whether a point lies on or below a surface."""
    return any(s <= seconds and a >= accuracy for s, a in corners)


@pytest.mark.parametrize("n", [2, 3, 4, 7])
def test_surfaces_divide_the_plane_by_how_many_seeds_attain_a_point(n):
    random = np.random.default_rng(n)
    seconds, accuracy = random.integers(1, 12, (n, 4)).astype(float), random.integers(1, 12, (n, 4)) / 12
    surfaces = attainment_surfaces(seconds, accuracy)
    needed = (1, -(-n // 2), n)
    for s in np.arange(0.5, 13):
        for a in np.arange(0.5, 13) / 12:
            count = attained_by(seconds, accuracy, s, a)
            for surface, least in zip(surfaces, needed, strict=True):
                found = below(surface.corners, s, a)
                assert found == (count >= least), f"{surface.name}: ({s}, {a}) is attained by {count} of {n}"


def test_seeds_without_all_arms_are_left_out(tmp_path):
    lines = with_run(synthetic(3), lambda r: r["arm"] == "ldb" and r["seed"] == 0, status="failed")
    _, (group,) = groups_of(tmp_path, lines)
    arms = group.candidates
    seconds, accuracy = (
        np.column_stack([arm.at(c, [1, 2]) for arm in arms]) for c in ("train_seconds", "test_accuracy")
    )
    for found, truth in zip(group_surfaces(group), attainment_surfaces(seconds, accuracy), strict=True):
        assert found.corners.tolist() == truth.corners.tolist(), f"{found.name} over the two complete seeds"


def test_one_seed_has_no_surface(tmp_path):
    _, (group,) = groups_of(tmp_path, synthetic(1))
    assert group_surfaces(group) is None
    assert band(group, 20.0, 0.5) == ([], [])
    assert attainment_table(group).rows == []
    assert pareto_plot(group, 400, 300).band == ""


def test_the_band_encloses_every_seeds_front(tmp_path):
    _, (group,) = groups_of(tmp_path, synthetic(5))
    best, _, worst = group_surfaces(group)
    ldb = next(arm for arm in group.arms if arm.name == "ldb")
    for seed in ldb.timed.index:
        point = float(ldb.timed.loc[seed, "train_seconds"]), float(ldb.timed.loc[seed, "test_accuracy"])
        assert below(best.corners, *point)
    assert below(worst.corners, ldb.timed["train_seconds"].max(), ldb.timed["test_accuracy"].min())
    plot = pareto_plot(group, 400, 300)
    assert plot.band.startswith("M")
    assert plot.band_line.startswith("M")
    for corner in best.corners:
        assert plot.x.low <= corner[0] <= plot.x.high, "the band leaves the drawing"
        assert plot.y.low <= 100 * corner[1] <= plot.y.high


def test_staircase():
    line = staircase(np.array([[1.0, 0.5], [2.0, 0.7]]), 3.0, 0.2)
    assert line == [(1.0, 0.2), (1.0, 0.5), (2.0, 0.5), (2.0, 0.7), (3.0, 0.7)]


def test_the_report_has_the_corners_and_draws_them(tmp_path):
    contents = report_of(tmp_path, synthetic(3), figures=True)
    names = {row["attained_by"] for row in rows_of(contents, "attainment")}
    assert names == {"some seed", "half of the seeds", "every seed"}
    assert b'class="band"' in contents["report.html"]
    assert "<details><summary>Attainment surfaces" in contents["report.html"].decode()
