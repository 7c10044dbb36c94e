"""`fastbp-report diff` and `merge`: known changes are found, merged records load as their sources do."""

import gzip
import json
import random

import pytest
from typer.testing import CliRunner

from analysis.cli import app
from analysis.diff import diff, to_json, to_text
from analysis.errors import ReportError
from analysis.load import load
from analysis.merge import merge
from analysis.table import plain_rows
from analysis_records import CPU, SOFTWARE, dbp, ldb, run_line, search_lines, synthetic, with_run, write


def run(*arguments, **environment):
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "100", **environment})


def rows(made, name):
    return next((plain_rows(table) for table in made.tables if table.name == name), [])


def two(tmp_path, before, after):
    return str(write(tmp_path / "a" / "records.jsonl", before)), str(write(tmp_path / "b" / "records.jsonl", after))


# --- diff --------------------------------------------------------------------------------------------------------


def test_a_known_change_is_found_and_only_it(tmp_path):
    before = synthetic(5)
    after = with_run(before, lambda r: False)
    for line in after:
        if line["kind"] == "run" and (line["arm"], line["role"]) == ("ldb", "method"):
            uneven = 1e-5 * line["seed"]  # a difference without any spread is no proof
            line["train_seconds"] *= 0.8 + uneven
            line["test_accuracy"] -= 0.02 + uneven
    before = synthetic(5)
    made = diff(*two(tmp_path, before, after))
    found = {(row["arm"], row["role"]): row for row in rows(made, "differences")}
    assert len(found) == 5
    changed = found.pop(("ldb", "method"))
    assert changed["ratio"] == pytest.approx(0.8, abs=1e-4)
    assert changed["gain"] == pytest.approx(-0.02, abs=1e-4)
    assert changed["gain_high"] < -0.019, "an all but exact change has no narrow interval"
    assert changed["verdict"] == "faster, less accurate"
    assert {row["verdict"] for row in found.values()} == {"not clearly different"}
    assert all(row["rests_on"] == "5 shared seeds, the same runs" for row in found.values())
    assert [table.name for table in made.tables] == ["differences"], "differences of something that is the same"


def test_settings_plans_machines_and_counts_that_changed(tmp_path):
    before = synthetic(3) + search_lines()
    after = [line | {"software": SOFTWARE | {"fastbp": "2"}} if "software" in line else line for line in synthetic(4)]
    after = [
        line | {"method": line["method"] | {"drop_rate": 0.25}} if line.get("arm") == "ldb" else line for line in after
    ]
    after = [line | {"recipe": line["recipe"] | {"lr": 0.2}} if "recipe" in line else line for line in after]
    made = diff(*two(tmp_path, before, [line for line in after if line.get("arm") != "dbp"]))
    settings = {(row["arm"], row["setting"], row["a"], row["b"]) for row in rows(made, "settings")}
    assert settings == {
        ("every arm", "recipe.lr", "0.1", "0.2"),
        ("ldb", "drop_rate", "0.5", "0.25"),
        ("ldb (control)", "drop_rate", "0", "0.25"),
        ("the sweep", "seeds", "[0,1,2]", "[0,1,2,3]"),
    }, f"{settings}"
    assert [(row["side"], row["arm"]) for row in rows(made, "only")] == [("A", "dbp"), ("A", "dbp (control)")]
    assert rows(made, "environment") == [{"name": "software.fastbp", "a": "–", "b": "2"}]
    counts = {(row["phase"], row["status"]): (row["a"], row["b"]) for row in rows(made, "runs")}
    assert counts == {("measure", "finished"): (15, 12), ("search", "finished"): (6, 0)}


def test_times_of_unlike_machines_are_left_out_unless_wanted(tmp_path):
    after = [line | {"device": CPU | {"threads": 4}} if "device" in line else line for line in synthetic(3)]
    sources = two(tmp_path, synthetic(3), after)
    made = diff(*sources)
    assert all(row.get("ratio") is None for row in rows(made, "differences"))
    assert all(row["gain"] is not None for row in rows(made, "differences"))
    assert any("The times of 5 of 5 arms are left out" in note for note in made.notes)
    assert rows(made, "environment") == [{"name": "device.threads", "a": "1", "b": "4"}]
    assert rows(diff(*sources, allow_mixed=True), "differences")[0]["ratio"] == pytest.approx(1.0)


def test_arms_with_several_settings_are_matched_by_setting(tmp_path):
    def swept(rates):
        return [
            run_line(arm="ldb", role="method", method=ldb(rate), seed=s, train_seconds=100 * rate + s)
            for rate in rates
            for s in range(3)
        ]

    made = diff(*two(tmp_path, swept([0.1, 0.2, 0.3]), swept([0.3, 0.4, 0.1])))
    found = {row["arm"]: row["ratio"] for row in rows(made, "differences")}
    assert found["ldb(drop_rate=0.1)"] == pytest.approx(1.0)
    assert found["ldb(drop_rate=0.3)"] == pytest.approx(1.0)
    assert [row["setting"] for row in rows(made, "settings")] == ["drop_rate"], "0.2 became 0.4"


def test_arms_whose_runs_were_all_contaminated_are_matched_and_said(tmp_path):
    made = diff(*two(tmp_path, synthetic(3), with_run(synthetic(3), lambda r: True, exclusive=False)))
    assert not rows(made, "only"), "an arm whose runs cannot be used is taken for another"
    assert {row["verdict"] for row in rows(made, "differences")} == {"not enough data"}
    assert len(rows(made, "differences")) == 5
    assert made.notes == ["B: 15 of 15 finished measured runs were contaminated and are left out."]


def test_nothing_in_common(tmp_path):
    one, other = [run_line()], [run_line(arm="dbp", role="method", method=dbp())]
    made = diff(*two(tmp_path, one, other))
    assert "No arm was measured in both." in made.notes
    assert [row["side"] for row in rows(made, "only")] == ["A", "B"]
    json.loads(to_json(made))


def test_the_command_fits_100_columns_and_writes_what_the_suffix_says(tmp_path):
    sources = two(tmp_path, synthetic(3), with_run(synthetic(3), lambda r: r["arm"] == "ldb", train_seconds=5.0))
    result = run("diff", *sources, "--out", tmp_path / "d.md")
    assert result.exit_code == 0, result.output
    lines = [line for line in result.stdout.splitlines() if not line.startswith(("A:", "B:", "note:"))]
    assert max(map(len, lines)) <= 100, f"{max(lines, key=len)!r}"
    assert any("ldb" in line and "faster" in line for line in lines), result.stdout
    text = (tmp_path / "d.md").read_text(encoding="utf-8")
    assert text == to_text(diff(*sources))
    assert run("diff", *sources, "--out", tmp_path / "d.json").exit_code == 0
    data = json.loads((tmp_path / "d.json").read_text(encoding="utf-8"))
    assert len(data["differences"]) == 5
    refused = run("diff", *sources, "--out", tmp_path / "d.xlsx")
    assert refused.exit_code == 2
    assert "written as .md or .json" in refused.stderr


@pytest.mark.parametrize(
    "arguments", [("diff", "a"), ("merge", "a"), (), ("diff", "a", "nowhere"), ("merge", "nowhere")]
)
def test_wrong_calls_exit_with_2(tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a" / "records.jsonl", [run_line()])
    extra = ("--out", "m.jsonl") if arguments[-1:] == ("nowhere",) and arguments[0] == "merge" else ()
    result = run(*arguments, *extra)
    assert result.exit_code == 2, result.output
    assert not (tmp_path / "m.jsonl").exists()


def test_the_bare_command_is_the_report_and_folders_may_be_called_like_commands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("report", "diff"):
        write(tmp_path / name / "records.jsonl", [run_line()])
    for arguments in (("report", "--out", "one"), ("--out", "two", "./diff"), ("./diff", "report", "--out", "three")):
        result = run(*arguments)
        assert result.exit_code == 0, result.output
        assert (tmp_path / {"report": "one", "--out": "two"}.get(arguments[0], "three") / "report.html").exists()
    assert "merge" in run("--help").stdout
    assert "--into" in run("x", "--help").stdout


def test_a_report_folder_is_no_source(tmp_path):
    (tmp_path / "report.html").write_text("")
    with pytest.raises(ReportError, match="give the records that the report was made from"):
        load([tmp_path])


# --- merge -------------------------------------------------------------------------------------------------------


def scattered(tmp_path, *, conflicts):
    """Records over four files: split, copied, torn, with a retry and, if wanted, with copies that differ."""
    rng = random.Random(0)
    lines = synthetic(3) + search_lines()
    lines += [line | {"attempt": 1, "train_seconds": 3.0} for line in lines[1:7]]
    write(tmp_path / "in" / "a" / "records.jsonl", lines[: len(lines) // 2])
    write(tmp_path / "in" / "b" / "records.jsonl", [*lines[len(lines) // 3 :], "{torn"])
    copies = [dict(line) for line in rng.sample(lines, len(lines) // 2)]
    if conflicts:
        for line in copies[::3]:
            if "train_seconds" in line:
                line |= {"train_seconds": line["train_seconds"] + 1, "ended_at": "2027" if rng.random() < 0.5 else ""}
    data = "".join(json.dumps(line) + "\n" for line in copies * 2).encode()
    (tmp_path / "in" / "records-copy.jsonl.gz").write_bytes(gzip.compress(data))
    return tmp_path / "in"


@pytest.mark.parametrize("conflicts", [False, True])
@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.gz"])
def test_merged_records_load_as_their_sources_do(tmp_path, conflicts, name):
    folder = scattered(tmp_path, conflicts=conflicts)
    merged = merge([folder], tmp_path / name)
    one, other = load([folder]), load([tmp_path / name])
    assert one.runs.equals(other.runs)
    assert one.epochs.equals(other.epochs)
    assert one.sweeps == other.sweeps
    assert not other.problems, f"{other.problems}"
    assert any("cut short" in problem for problem in merged.problems)
    assert any("end differently" in problem for problem in merged.problems) == conflicts
    raw = (tmp_path / name).read_bytes()
    written = (gzip.decompress(raw) if name.endswith("gz") else raw).splitlines()
    assert len(written) == len(set(written)) == merged.kept.total()
    assert merged.kept.total() < merged.read, "nothing was told twice"


def test_merging_keeps_all_attempts_and_every_column(tmp_path):
    first = run_line(status="failed", reason="x")
    lines = [first | {"extra": [1]}, first | {"attempt": 1, "status": "finished"}]
    merge([write(tmp_path / "records.jsonl", lines * 3)], tmp_path / "out.jsonl")
    assert [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()] == [lines[0], lines[1]] or [
        json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()
    ] == [lines[1], lines[0]]


def test_merging_gives_the_same_bytes_in_any_order_and_again(tmp_path):
    folder = scattered(tmp_path, conflicts=True)
    parts = [folder / "a", folder / "b", folder / "records-copy.jsonl.gz"]
    found = []
    for i, sources in enumerate([parts, parts[::-1], [*parts, parts[0]]]):
        merge(sources, tmp_path / f"{i}.jsonl.gz")
        found.append((tmp_path / f"{i}.jsonl.gz").read_bytes())
    assert found[0] == found[1] == found[2]
    merge([tmp_path / "0.jsonl.gz"], tmp_path / "again.jsonl.gz")
    once, again = (gzip.decompress((tmp_path / n).read_bytes()) for n in ("0.jsonl.gz", "again.jsonl.gz"))
    assert once == again, "merging what is merged changes it"


def test_merged_records_are_read_by_the_sweeps_too(tmp_path):
    record = pytest.importorskip("fastbp.record")
    folder = scattered(tmp_path, conflicts=False)
    merge([folder], tmp_path / "out.jsonl")
    found = list(record.read_records(tmp_path / "out.jsonl"))
    starts = {}
    for i, one in enumerate(found):
        if one.kind == "run":
            starts.setdefault(one.run_key, i)
    late = [one for i, one in enumerate(found) if one.kind == "epoch" and i < starts[one.run_key]]
    assert not late, f"{len(late)} epochs stand before their run"


def test_the_merge_command(tmp_path):
    folder = scattered(tmp_path, conflicts=False)
    result = run("merge", folder, "--out", tmp_path / "deep" / "out.jsonl.gz")
    assert result.exit_code == 0, result.output
    assert "1 sweep lines" in result.stdout
    assert not list(tmp_path.rglob("*.tmp"))
    blocked = run("merge", folder, "--out", folder)
    assert blocked.exit_code == 2
    assert "cannot be written" in blocked.stderr
