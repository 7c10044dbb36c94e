"""The files of the report and the command, on good, degenerate and hostile input."""

import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from analysis.cli import app, write_report
from analysis.embed import BEGIN, END, embed, summary
from analysis.errors import ReportError
from analysis.rendering import WORTH_A_PROCESS, rendered
from analysis.report import _drawings, build
from analysis.summary import answer
from analysis.table import Column, Table, latex, markdown, text, to_csv, to_json, to_latex
from analysis.tables import pareto_table
from analysis_records import (
    CPU,
    groups_of,
    report_of,
    rows_of,
    run_line,
    search_lines,
    synthetic,
    with_run,
    write,
)

# --- degenerate input --------------------------------------------------------------------------------------------


def test_one_seed_gives_values_without_intervals(tmp_path):
    contents = report_of(tmp_path, synthetic(1))
    row = rows_of(contents, "pareto")[1]
    assert row["seconds"]
    assert not row["seconds_low"], "one seed has no interval"
    assert not row["p_front"]
    page = contents["report.html"].decode()
    assert "Not enough data: no method has 3 seeds paired with the baseline." in page
    assert "1 finished measured run; at least 3 are needed" in page


@pytest.mark.parametrize("status", ["failed", "diverged", "stopped", "running"])
def test_nothing_finished(tmp_path, status):
    contents = report_of(tmp_path, with_run(synthetic(2), lambda r: True, status=status, val_accuracy=None))
    assert "No measured run finished, so there is nothing to recommend." in contents["report.html"].decode()


@pytest.mark.parametrize(
    "changes",
    [
        {"val_accuracy": None, "test_accuracy": None},
        {"test_accuracy": 0.5, "val_accuracy": 0.5},
        {"train_seconds": 0.0},
        {"train_seconds": 1e-9},
        {"train_seconds": 1e12},
        {"test_accuracy": None},
        {"test_accuracy": 0.0, "val_accuracy": 0.0},
        {"task": {}, "recipe": {}, "method": {}, "device": {}, "software": {}},
    ],
)
def test_degenerate_values_make_a_correct_report(tmp_path, changes):
    contents = report_of(tmp_path, with_run(synthetic(3), lambda r: True, **changes), figures=True)
    assert not re.search(r"\bnan\b|\binf\b|\bNone\b", contents["report.md"].decode()), "raw unknowns in the text"
    for name, content in contents.items():
        if name.endswith(".json"):
            json.loads(content)


def test_only_methods_or_only_a_baseline(tmp_path):
    lines = [line for line in synthetic(3) if line.get("role") != "baseline"]
    _, (group,) = groups_of(tmp_path, lines)
    assert answer(group).headline.startswith("There is no finished baseline run")
    report_of(tmp_path, lines, figures=True)
    lines = [run_line(seed=s) for s in range(3)]
    _, (group,) = groups_of(tmp_path, lines)
    assert answer(group).headline.startswith("Only the baseline was measured")
    report_of(tmp_path, lines, figures=True)


def test_missing_test_accuracy_is_replaced_by_validation_accuracy_and_said(tmp_path):
    lines = with_run(synthetic(3), lambda r: r["seed"] == 0, test_accuracy=None)
    _, (group,) = groups_of(tmp_path, lines)
    assert group.accuracy_name == "validation accuracy"
    assert "no test accuracy" in pareto_table(group).caption


# --- the files ---------------------------------------------------------------------------------------------------


def test_identical_input_gives_identical_bytes(tmp_path):
    lines = synthetic(3) + search_lines()
    (tmp_path / "moved").mkdir()
    first, second = report_of(tmp_path, lines, figures=True), report_of(tmp_path / "moved", lines, figures=True)
    assert list(first) == list(second)
    for name in first:
        assert first[name] == second[name], f"{name} differs between two builds"
    assert {"report.html", "report.md", "tables/pareto.csv", "tables/pareto.tex", "figures/curves-group1.svg"} <= set(
        first
    )
    assert not any(str(tmp_path).encode() in content for content in first.values()), "a path of this machine leaked"


def test_identical_bytes_in_another_process(tmp_path):
    source = write(tmp_path / "in" / "records.jsonl", synthetic(3) + search_lines())
    write_report([str(source)], tmp_path / "one", console=Console(file=io.StringIO()))
    command = [sys.executable, "-m", "analysis", str(source), "--out", str(tmp_path / "two")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for path in sorted((tmp_path / "one").rglob("*.*")):
        twin = tmp_path / "two" / path.relative_to(tmp_path / "one")
        assert path.read_bytes() == twin.read_bytes(), f"{twin.name} depends on the process"


class _Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.links = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for key, value in attrs if key in ("src", "href", "xlink:href", "onload", "onerror")]


HOSTILE = '<script>alert("x")</script>'


def test_hostile_names_are_text_everywhere(tmp_path):
    lines = []
    for line in synthetic(3):
        if line.get("arm") == "ldb":
            line = line | {"arm": HOSTILE, "reason": HOSTILE}
        if "task" in line:
            line = line | {"task": {"data": "a|b $x$ \\n", "model": "<img src=x onerror=alert(1)>"}}
        lines.append(line)
    lines = with_run(lines, lambda r: r["arm"] == "dbp" and r["seed"] == 0, status="failed", reason=HOSTILE + "\n| x |")
    contents = report_of(tmp_path, lines, figures=True)
    parser = _Tags()
    parser.feed(contents["report.html"].decode())
    assert parser.tags.count("script") == 1, "only the report's own script"
    assert "img" not in parser.tags
    assert not parser.links, f"the page refers to {parser.links}"
    assert HOSTILE not in contents["report.md"].decode()
    rows = [line for line in contents["report.md"].decode().splitlines() if line.startswith("| dbp |")]
    assert rows, "the dbp arm is not in the Markdown tables"
    assert HOSTILE not in contents["tables/pareto.tex"].decode()
    assert b"<script" not in contents["figures/pareto-group1.svg"]


def test_unicode_names(tmp_path):
    lines = [line | {"arm": "模型 é😀"} if line.get("arm") == "ldb" else line for line in synthetic(3)]
    contents = report_of(tmp_path, lines, figures=True)
    assert "模型 é😀" in contents["report.html"].decode()
    assert rows_of(contents, "pareto")[-1]["arm"].startswith("模型")


@pytest.mark.long
@pytest.mark.slow
def test_several_processes_draw_the_same_bytes(tmp_path):
    made = build([write(tmp_path / "records.jsonl", synthetic(3) + search_lines())])
    drawings = list(_drawings(made)) * WORTH_A_PROCESS
    assert [d.name for d in drawings[:3]] == ["pareto-group1", "curves-group1", "knobs-1"]
    alone, crowd = list(rendered(drawings)), list(rendered(drawings, processes=3))
    assert [name for name, _ in crowd] == [name for name, _ in alone]
    assert crowd == alone


def test_the_page_needs_no_network_and_the_figures_carry_no_date(tmp_path):
    contents = report_of(tmp_path, synthetic(3), figures=True)
    page = contents["report.html"].decode()
    assert not re.search(r"https?:|@import|url\(", page), "the page refers to the network"
    assert b"dc:date" not in contents["figures/pareto-group1.svg"]


def test_cells_read_well():
    column = {kind: Column("", "", kind) for kind in ("percent", "points", "seconds", "difference", "ratio", "flag")}
    from analysis.statistics import Estimate

    assert text(Estimate(0.9712, 0.968, 0.974, 5), column["percent"]) == "97.12 [96.80, 97.40]"
    assert text(Estimate(9.997, 9.99, 10.004, 5), column["seconds"]) == "10.0 [10.0, 10.0]"
    assert text(Estimate(-0.00712, -0.01, 0.002, 5), column["points"]) == "−0.71 [−1.00, +0.20]"
    assert text(Estimate(-1e-9), column["points"]) == "0.00"
    assert text(Estimate(1.5, n=1), column["ratio"]) == "1.50×"
    assert text(Estimate(float("inf"), 3.0, float("inf"), 3), column["seconds"]) == "not reached [3.00, not reached]"
    assert text(Estimate(), column["seconds"]) == "–"
    assert text(float("nan"), Column("", "", "number", "not measured")) == "not measured"
    assert text(True, column["flag"]) == "yes"


def test_writers_escape():
    table = Table("t", "A_b", "100 %", [Column("a", "x & y"), Column("n", "n", "count")], [{"a": "r|[1]_\n2", "n": 3}])
    assert to_csv(table) == 'a,n\n"r|[1]_\n2",3\n'
    assert json.loads(to_json(table))["rows"] == [{"a": "r|[1]_\n2", "n": 3}]
    assert r"x \& y & n \\" in to_latex(table)
    assert r"r\textbar{}{[}1{]}\_ 2 & 3 \\" in to_latex(table)
    assert markdown("a|b*<c>") == r"a\|b\*&lt;c&gt;"
    assert latex("50 % → ½") == r"50 \% → ½"


# --- the command -------------------------------------------------------------------------------------------------


def test_command_prints_the_table_in_80_columns_and_where_the_report_is(tmp_path):
    source = write(tmp_path / "in" / "records.jsonl", synthetic(3) + search_lines())
    out = io.StringIO()
    page = write_report([str(source.parent)], tmp_path / "out", console=Console(file=out, width=80))
    lines = out.getvalue().splitlines()
    assert lines[-1] == f"report: {page}"
    assert page.exists()
    assert max(map(len, lines[:-1])) <= 80
    assert any(re.match(r"\s*ldb \(control\)\s+3\s", line) for line in lines), "names are broken over lines"
    assert not list((tmp_path / "out").rglob("*.tmp"))


def test_markup_in_names_is_printed_and_not_obeyed(tmp_path):
    lines = [line | {"arm": "[red]x[/]"} if line.get("arm") == "ldb" else line for line in synthetic(3)]
    out = io.StringIO()
    write_report(
        [str(write(tmp_path / "records.jsonl", lines))], tmp_path / "out", console=Console(file=out, width=100)
    )
    assert "[red]x[/]" in out.getvalue()


@pytest.mark.parametrize("make", ["nowhere", "empty", "broken", "mixed"])
def test_bad_input_is_one_sentence_and_exit_code_2(tmp_path, make):
    source = tmp_path / make
    if make == "empty":
        source.mkdir()
    elif make == "broken":
        write(source / "records.jsonl", ["{\n", run_line()])
    elif make == "mixed":
        write(source / "records.jsonl", [run_line(), run_line(seed=1, device=CPU | {"threads": 2})])
    result = CliRunner().invoke(app, [str(source), "--out", str(tmp_path / "out")])
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("fastbp-report: ")
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert not (tmp_path / "out").exists(), "a report was begun"


def test_an_output_folder_that_cannot_be_made_is_bad_input(tmp_path):
    source = write(tmp_path / "records.jsonl", [run_line()])
    result = CliRunner().invoke(app, [str(source), "--out", str(source)])
    assert result.exit_code == 2, result.output
    assert "cannot write the report there" in result.stderr


def test_the_answer_goes_between_the_marks_of_another_file(tmp_path):
    page = tmp_path / "README.md"
    page.write_text(f"above\n{BEGIN}\nold\n{END}\nbelow\n", encoding="utf-8")
    report = build([Path(__file__).parents[1] / "results" / "2026-11-20_quickstart_cpu"])
    embed(report, page)
    once = page.read_text(encoding="utf-8")
    assert once.startswith(f"above\n{BEGIN}\n**")
    assert once.endswith(f"{END}\nbelow\n")
    assert "old" not in once
    embed(report, page)
    assert page.read_text(encoding="utf-8") == once, "embedding twice changes the file"
    page.write_text("no marks", encoding="utf-8")
    with pytest.raises(ReportError, match="has no place for the table"):
        embed(report, page)


def test_the_readmes_table_is_the_committed_records():
    """Every figure of the README's table comes from the records beside it."""
    root = Path(__file__).parents[1]
    report = build([root / "results" / "2026-11-20_quickstart_cpu"])
    assert summary(report) in (root / "README.md").read_text(encoding="utf-8")
