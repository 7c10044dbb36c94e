"""Bad input to `diff` and `merge`: a correct answer or one sentence, and the same bytes for the same records."""

import io
import json
import re
import subprocess
import sys

import pytest
from rich.console import Console
from typer.testing import CliRunner

from analysis import cli
from analysis.diff import diff, to_json, to_text
from analysis.errors import ReportError
from analysis.load import load
from analysis.merge import merge
from analysis_records import CPU, search_lines, synthetic, write
from hostile_records import DEGENERATE, REFUSED, degenerate_file, refused_file

SAME = {"not clearly different", "not enough data"}


def shown(made):
    """What the terminal shows of a difference."""
    screen = io.StringIO()
    cli.print_diff(made, Console(file=screen, width=100))
    return screen.getvalue()


@pytest.mark.parametrize("case", DEGENERATE)
def test_degenerate_records_are_compared(tmp_path, case):
    odd = str(degenerate_file(tmp_path / "odd" / "records.jsonl", case))
    plain = str(write(tmp_path / "plain" / "records.jsonl", synthetic(3)))
    for a, b in ((odd, odd), (plain, odd), (odd, plain)):
        made = diff(a, b, allow_mixed=True)
        text, screen = to_text(made), shown(made)
        assert not re.search(r"\bnan\b|\binf\b|\bNone\b|NaN", text), re.findall(".*(?:nan|inf|None).*", text)
        assert "\x1b" not in screen, "a name reaches the terminal with its control characters"
        data = json.loads(to_json(made), parse_constant=pytest.fail)
        if a == b:
            said = {row["verdict"] for row in data.get("differences", ())}
            assert said <= SAME, f"a sweep differs from itself: {said}"
            assert not {"only", "settings", "environment", "runs"} & set(data), f"from itself: {list(data)}"
        assert to_text(diff(a, b, allow_mixed=True)) == text


@pytest.mark.parametrize("case", DEGENERATE)
def test_degenerate_records_merge_and_load_as_before(tmp_path, case):
    odd = degenerate_file(tmp_path / "in" / "records.jsonl", case)
    merge([odd], tmp_path / "out.jsonl")
    one, other = load([odd]), load([tmp_path / "out.jsonl"])
    assert one.runs.equals(other.runs)
    assert one.epochs.equals(other.epochs)
    assert one.sweeps == other.sweeps
    merge([tmp_path / "out.jsonl"], tmp_path / "again.jsonl")
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "again.jsonl").read_bytes()


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_refused_by_diff_and_merge(tmp_path, case):
    path, message = refused_file(tmp_path / "odd" / "records.jsonl", case)
    plain = write(tmp_path / "plain" / "records.jsonl", synthetic(2))
    for pair in ((path, plain), (plain, path)):
        _is_refused(["diff", *pair, "--out", tmp_path / "d.md"], message, path)
    assert not (tmp_path / "d.md").exists()
    out = tmp_path / "out.jsonl"
    if message != "no run in the records":
        _is_refused(["merge", plain, path, "--out", out], message, path)
        assert not out.exists()
        assert not list(tmp_path.rglob("*.tmp"))
    elif case in ("an empty file", "blank lines"):
        _is_refused(["merge", path, "--out", out], "no record in the sources, so there is nothing to merge")
    else:  # records without a run may be one of several parts
        merge([path], out)
        with pytest.raises(ReportError, match=message):
            load([out])


def _is_refused(arguments, message, path=""):
    result = CliRunner().invoke(cli.app, list(map(str, arguments)))
    assert result.exit_code == 2, result.output
    assert message in result.stderr, result.stderr
    assert str(path) in result.stderr, "the message does not name the file"
    assert len(result.stderr.splitlines()) == 1, result.stderr


def test_a_difference_has_the_same_bytes_in_another_process(tmp_path):
    unlike = [line | {"device": CPU | {"name": "Other", "b": 1, "a": 2}} if "device" in line else line
              for line in synthetic(4)]  # fmt: skip
    a = write(tmp_path / "a" / "records.jsonl", synthetic(3) + search_lines())
    b = write(tmp_path / "b" / "records.jsonl", unlike)
    made = diff(str(a), str(b))
    assert {table.name for table in made.tables} == {"differences", "environment", "runs", "settings"}
    for seed, form in (("1", to_text), ("2", to_json)):
        out = tmp_path / f"d.{'md' if form is to_text else 'json'}"
        command = [sys.executable, "-m", "analysis", "diff", str(a), str(b), "--out", str(out)]
        environment = {"PYTHONHASHSEED": seed, "PATH": "", "HOME": str(tmp_path)}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, done.stderr
        assert out.read_text(encoding="utf-8") == form(made), f"{out.name} depends on the process"
