"""Runs of different versions or commits of fastbp are compared, and the reader is told."""

import io

import pytest
from rich.console import Console

from analysis.cli import print_report
from analysis.code_versions import code_warning
from analysis.report import build, text_files
from analysis_records import SOFTWARE, bp, groups_of, ldb, run_line, write

OLD = {"software": SOFTWARE | {"fastbp": "0.1.0"}, "git_commit": "a" * 40, "git_dirty": False}


def runs(other, phase="measure"):
    """Three seeds of a baseline from the old code, and of ldb from the other."""
    for seed in range(3):
        yield run_line(seed=seed, **OLD)
        yield run_line(arm="ldb", role="method", method=ldb(), seed=seed, phase=phase, **(OLD | other))


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"software": SOFTWARE | {"fastbp": "0.2.0"}}, "fastbp 0.2.0, commit aaaaaaaaaa (3 runs)"),
        ({"git_commit": "b" * 40}, "fastbp 0.1.0, commit bbbbbbbbbb (3 runs)"),
        ({"git_dirty": True}, "commit aaaaaaaaaa with uncommitted changes (3 runs)"),
        ({"git_commit": None}, "fastbp 0.1.0, unknown commit (3 runs)"),
        ({"software": SOFTWARE}, "fastbp of unknown version, commit aaaaaaaaaa (3 runs)"),
    ],
)
@pytest.mark.parametrize("phase", ["measure", "ablate"])
def test_different_code_is_compared_with_a_warning(tmp_path, other, words, phase):
    _, (group,) = groups_of(tmp_path, list(runs(other, phase)))
    assert group.arms[0].n == 3, "another version of the code is refused"
    found = code_warning(group)
    assert words in found, found
    assert "fastbp 0.1.0, commit aaaaaaaaaa (3 runs)" in found, found


def test_the_warning_stands_on_the_page_and_on_the_screen(tmp_path):
    made = build([write(tmp_path / "records.jsonl", list(runs({"git_commit": "b" * 40})))])
    contents, screen = dict(text_files(made)), io.StringIO()
    print_report(made, Console(file=screen, width=300))
    for text in (contents["report.html"].decode(), contents["report.md"].decode(), screen.getvalue()):
        assert "were made by different code: " in text


def test_the_same_code_is_not_remarked(tmp_path):
    lines = [*runs({}), run_line(phase="search", method=bp(), seed=9, git_commit="c" * 40)]
    _, (group,) = groups_of(tmp_path, lines)
    assert code_warning(group) == "", "search runs have no times to compare"


def test_many_versions_are_counted(tmp_path):
    lines = [run_line(seed=seed, git_commit=f"{seed}" * 40) for seed in range(9)]
    _, (group,) = groups_of(tmp_path, lines)
    assert code_warning(group).count("commit ") == 3
    assert "and 6 more; " in code_warning(group)
