"""Bad input ends in one sentence with file and line, or in a correct degenerate report; never in a traceback."""

import io
import json
import random
import re

import pytest
from rich.console import Console
from typer.testing import CliRunner

from analysis import cli
from analysis.errors import ReportError
from analysis.load import load
from analysis.report import build, figure_files, text_files
from analysis_records import (
    CPU,
    bp,
    epoch_lines,
    ldb,
    report_of,
    rows_of,
    run_line,
    search_lines,
    sweep_line,
    synthetic,
    write,
)  # fmt: skip
from hostile_records import DEGENERATE, LONG, REFUSED, SPECIALS, degenerate_file, refused_file


def everything(path, *, figures):
    """All files of the report and what the terminal shows."""
    report = build([path], allow_mixed=True)
    screen = io.StringIO()
    cli.print_report(report, Console(file=screen, width=80))
    return dict([*text_files(report), *(figure_files(report) if figures else ())]), screen.getvalue()


@pytest.mark.parametrize("case", DEGENERATE)
def test_degenerate_records_make_a_report(tmp_path, case):
    path = degenerate_file(tmp_path / "records.jsonl", case)
    contents, screen = everything(path, figures=True)
    assert screen.strip(), "nothing is printed"
    text = contents["report.md"].decode()
    assert not re.search(r"\bnan\b|\binf\b|\bNone\b|NaN", text), (
        f"raw unknowns: {re.findall('.*(?:nan|inf|None).*', text)}"
    )
    for name, content in contents.items():
        if name.endswith(".json"):
            json.loads(content, parse_constant=pytest.fail)
    assert "\x1b" not in screen, "a name reaches the terminal with its control characters"


def test_a_report_of_nothing_but_failures_counts_them_all(tmp_path):
    contents = report_of(tmp_path, DEGENERATE["all failed"])
    rows = rows_of(contents, "summary")
    assert sum(int(row["failed"]) for row in rows) == 15
    assert "out of memory" in contents["report.md"].decode()


def test_unknown_times_leave_the_arm_out_of_the_times_and_say_so(tmp_path):
    path = write(tmp_path / "records.jsonl", DEGENERATE["infinite times"])
    _, screen = everything(path, figures=False)
    assert "Left out of the times: 6 finished runs that have no training time." in screen
    assert "train_seconds is infinite or absurdly large in 6 records" in screen


def test_duplicated_lines_change_nothing(tmp_path):
    once = load([write(tmp_path / "a" / "records.jsonl", synthetic(3))])
    twice = load([write(tmp_path / "b" / "records.jsonl", DEGENERATE["duplicated lines"])])
    assert once.runs.equals(twice.runs)
    assert once.epochs.equals(twice.epochs)
    assert not twice.problems


def test_epochs_without_runs_are_reported(tmp_path):
    lines = [*synthetic(2), *epoch_lines(run_line(run_key="lost"))]
    results = load([write(tmp_path / "records.jsonl", lines)])
    assert results.problems == ["4 epochs belong to no run in the records and are left out"]
    assert "lost" not in set(results.epochs["run_key"])


@pytest.mark.long
@pytest.mark.slow
def test_a_million_epochs(tmp_path):
    """Drawn curves are thinned: neither time nor size of the report follows the number of epochs."""
    runs = [run_line(), run_line(arm="ldb", role="method", method=ldb())]
    template = json.dumps(epoch_lines(runs[0])[0] | {"epoch": -1, "train_seconds": -2}) + "\n"
    lines = [template.replace('": -1', f'": {e}').replace('": -2', f'": {e / 1e5}') for e in range(1_000_000)]
    path = write(tmp_path / "records.jsonl", [*runs, *lines])
    contents, _ = everything(path, figures=True)
    sizes = {name: len(content) for name, content in contents.items() if len(content) > 1_000_000}
    assert not sizes, f"files of megabytes: {sizes}"


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_one_sentence_and_exit_code_2(tmp_path, case):
    path, message = refused_file(tmp_path / "records.jsonl", case)
    result = CliRunner().invoke(cli.app, [str(path), "--out", str(tmp_path / "out")])
    assert result.exit_code == 2, result.output
    assert message in result.stderr, result.stderr
    assert str(path) in result.stderr, "the message does not name the file"
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert len(result.stderr) < 400 + len(str(path)), "the sentence is too long"
    assert not (tmp_path / "out").exists(), "a report was begun"


@pytest.mark.parametrize("source", ["", "\x00", "a" * 5000, "mlflow:", "nowhere@x"])
def test_sources_that_are_no_path(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ReportError):
        load([source])


# --- fuzz --------------------------------------------------------------------------------------------------------

VALUES = (
    None, True, False, 0, -0.0, 1, -1, 2**53, 10**400, -(10**400), 1e308, -1e308, 5e-324, 0.5, 1.0000001,
    float("nan"), float("inf"), -float("inf"), "", " ", "x", LONG, SPECIALS, "\ud800", "\x00\x1b", "é😀", "1e5", "nan",
    [], {}, [[]], ["x"], {"": None}, {"a": {"b": [1, float("nan")]}},
    "running", "finished", "failed", "control", "baseline", "search",
)  # fmt: skip


def fuzz_base():
    """A small sweep of two arms with a control, a failure and a search."""
    lines = [sweep_line(arms=["bp", "ldb"], seeds=[0, 1, 2], targets=[0.5])]
    for seed in range(3):
        for arm, role, method in (("bp", "baseline", bp()), ("ldb", "method", ldb()), ("ldb", "control", ldb(0.0))):
            run = run_line(arm=arm, role=role, method=method, seed=seed, train_seconds=10.0 + seed + len(role))
            lines += [run | {"status": "running"}, *epoch_lines(run), run]
    return lines + search_lines(2)


def mutated(lines, rng):
    """Bytes of the records after one to four random accidents."""
    lines = [dict(line) for line in lines]
    for _ in range(rng.randint(1, 4)):
        kind = rng.choice(("one", "all", "nested", "delete", "swap", "twice", "drop"))
        i, value = rng.randrange(len(lines)), rng.choice(VALUES)
        key = rng.choice(sorted(lines[i]))
        if kind == "one":
            lines[i][key] = value
        elif kind == "all":
            same = [line for line in lines if line.get("kind") == lines[i].get("kind")]
            for line in same:
                line[key] = value
        elif kind == "nested":
            holders = [name for name, item in lines[i].items() if isinstance(item, dict) and item]
            if holders:
                name = rng.choice(holders)
                lines[i][name] = lines[i][name] | {rng.choice(sorted(lines[i][name])): value}
        elif kind == "delete":
            del lines[i][key]
        elif kind == "swap":
            j = rng.randrange(len(lines))
            lines[i], lines[j] = lines[j], lines[i]
        elif kind == "twice":
            lines.insert(i, dict(lines[i]))
        elif len(lines) > 2:
            del lines[i]
        lines = [line for line in lines if line]
    raw = bytearray("".join(json.dumps(line) + "\n" for line in lines).encode())
    if rng.random() < 0.2:
        place = rng.randrange(len(raw))
        raw[place : place + rng.randint(0, 3)] = rng.randbytes(rng.randint(0, 3))
    if rng.random() < 0.1:
        del raw[rng.randrange(len(raw)) :]
    return bytes(raw)


@pytest.mark.long
def test_fuzz(tmp_path):
    """Every case ends in a report or in one sentence; a warning of numpy or pandas is an error here."""
    base, path, refused = fuzz_base(), tmp_path / "records.jsonl", 0
    for case in range(200):
        path.write_bytes(mutated(base, random.Random(case)))
        try:
            everything(path, figures=case % 20 == 0)
        except ReportError as error:
            refused += 1
            sentence = str(error)
        except Exception as error:
            raise AssertionError(f"case {case} ends in {error!r}") from error
        else:
            continue
        assert len(sentence.splitlines()) == 1, f"case {case}: {sentence}"
    assert 20 < refused < 180, f"{refused} of 200 cases were refused: the accidents are too harsh or too mild"


def test_unlike_machines_are_refused_in_one_sentence(tmp_path):
    lines = [run_line(), run_line(seed=1, device=CPU | {"name": "Other\nCPU"})]
    result = CliRunner().invoke(cli.app, [str(write(tmp_path / "records.jsonl", lines)), "--out", str(tmp_path / "o")])
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1, result.stderr
