"""Reading records: what holds, what is tolerated, what is refused and how that reads."""

import dataclasses
import json
import random

import pytest

from analysis import columns
from analysis.errors import ReportError
from analysis.load import load
from analysis_records import epoch_lines, run_line, sweep_line, synthetic, write


def test_columns_are_fields_of_the_records():
    record = pytest.importorskip("fastbp.record")
    for kind, read in columns.READ.items():
        fields = {f.name for f in dataclasses.fields(record.KINDS[kind])}
        assert set(read) <= fields, f"analysis reads {sorted(set(read) - fields)}, which {kind} records do not have"
    assert record.SCHEMA_VERSION == columns.SCHEMA_VERSION


def test_records_as_fastbp_writes_them_load(tmp_path):
    record = pytest.importorskip("fastbp.record")
    run = record.RunRecord(run_key="k", phase="measure", status="finished", train_seconds=float("inf"))
    record.RecordWriter(tmp_path / "records.jsonl").write(
        record.SweepRecord(sweep="s"), run, record.EpochRecord(run_key="k")
    )
    results = load([tmp_path])
    assert (len(results.runs), len(results.epochs), len(results.sweeps)) == (1, 1, 1)
    assert results.runs["train_seconds"].isna().all()


def test_last_line_of_the_highest_attempt_holds(tmp_path):
    first = run_line(status="failed", reason="out of memory", train_seconds=1.0)
    second = first | {"attempt": 1, "status": "finished", "train_seconds": 2.0, "reason": ""}
    lines = [
        first | {"status": "running"}, *epoch_lines(first), first,
        second | {"status": "running"}, *epoch_lines(second), second,
    ]  # fmt: skip
    results = load([write(tmp_path / "records.jsonl", lines)])
    assert results.runs[["attempt", "status", "train_seconds"]].values.tolist() == [[1, "finished", 2.0]]
    assert results.epochs["attempt"].unique().tolist() == [1], "epochs of the attempt that failed were kept"
    assert results.epochs["train_seconds"].tolist() == [0.5, 1.0, 1.5, 2.0]


def test_of_two_ends_of_one_attempt_the_last_line_holds(tmp_path):
    first = run_line(train_seconds=1.0)
    results = load([write(tmp_path / "records.jsonl", [first, first | {"train_seconds": 2.0}])])
    assert results.runs["train_seconds"].tolist() == [2.0]


def test_epochs_that_only_the_failed_attempt_reached_are_left_out(tmp_path):
    first = run_line(status="failed", reason="out of memory")
    second = first | {"attempt": 1, "status": "running"}
    path = write(tmp_path / "records.jsonl", [first, *epoch_lines(first), second, *epoch_lines(second)[:2]])
    assert load([path]).epochs["epoch"].tolist() == [0, 1]


def test_a_stale_copy_in_another_file_does_not_win(tmp_path):
    run = run_line()
    write(tmp_path / "a" / "records.jsonl", [run | {"status": "running"}, run])
    write(tmp_path / "b" / "records-old.jsonl", [run | {"status": "running"}])
    results = load([tmp_path, tmp_path / "a"])
    assert results.runs["status"].tolist() == ["finished"]


def test_order_and_files_do_not_matter(tmp_path):
    lines = synthetic(3)
    ends = [line for line in lines if line.get("status") != "running"]
    shuffled = random.Random(0).sample(ends, len(ends))
    one = load([write(tmp_path / "one" / "records.jsonl", lines)])
    write(tmp_path / "two" / "records-1.jsonl", shuffled[::2])
    write(tmp_path / "two" / "deep" / "records-2.jsonl", shuffled[1::2])
    two = load([tmp_path / "two"])
    assert one.runs.equals(two.runs)
    assert one.epochs.equals(two.epochs)
    assert one.sweeps == two.sweeps


def test_a_torn_tail_is_reported_and_left_out(tmp_path):
    torn = json.dumps(run_line(seed=1))[:100]
    path = write(tmp_path / "records.jsonl", [run_line(), torn])
    path.write_bytes(path.read_bytes() + b"\xc3")  # half a character
    results = load([path])
    assert len(results.runs) == 1
    assert results.problems == ["records.jsonl:2: the last line was cut short and is left out"]


def test_line_separators_inside_names_do_not_split_lines(tmp_path):
    results = load([write(tmp_path / "records.jsonl", [run_line(arm="a\u2028b\x85c")])])
    assert results.runs["arm"].tolist() == ["a\u2028b\x85c"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"kind": "run", \n', run_line()], r"records.jsonl:1: not a line of JSON"),
        ([run_line(), "[" * 100_000 + "\n", run_line(seed=1)], r"records.jsonl:2: not a line of JSON"),
        ([run_line(), "7\n"], r"records.jsonl:2: record of kind None"),
        ([run_line(schema_version=2)], r"records.jsonl:1: schema_version is 2, but .* reads 1; install"),
        ([run_line(val_accuracy="high")], r":1: val_accuracy is 'high', expected a number or null"),
        ([run_line(exclusive="yes")], r":1: exclusive is 'yes', expected bool"),
        ([run_line(train_seconds=True)], r":1: train_seconds is True, expected a number or null"),
        (
            [run_line(), run_line(seed=1, test_accuracy=97.5)],
            r":2: test_accuracy is 97.5, expected a fraction",
        ),
        ([run_line(train_seconds=-1.0)], r":1: train_seconds is -1, expected a time of at least 0"),
        ([run_line(method="ldb")], r":1: method is 'ldb', expected dict"),
        ([run_line(seed=None, run_key="k")], r":1: seed is null, expected a whole number"),
        ([run_line(attempt=0.5)], r":1: attempt is 0.5, expected a whole number"),
        ([run_line(status="done")], r":1: status is 'done', expected one of finished"),
        ([run_line(run_key="")], r":1: run_key is empty"),
        ([sweep_line(arms="bp")], r":1: arms is 'bp', expected a list of str"),
        ([sweep_line()], r"no run in the records"),
        ([], r"no run in the records"),
    ],
)
def test_what_is_refused_names_file_line_and_value(tmp_path, lines, message):
    path = write(tmp_path / "records.jsonl", lines)
    with pytest.raises(ReportError, match=message):
        load([path])


def test_missing_sources(tmp_path):
    with pytest.raises(ReportError, match="no such file or folder"):
        load([tmp_path / "nowhere"])
    with pytest.raises(ReportError, match=r"no file records\*\.jsonl"):
        load([tmp_path])


def test_infinite_and_null_numbers_become_unknown(tmp_path):
    text = json.dumps(run_line(train_seconds=None)).replace('"eval_seconds": 1.0', '"eval_seconds": 1e999')
    results = load([write(tmp_path / "records.jsonl", [text + "\n"])])
    assert results.runs[["train_seconds", "eval_seconds"]].isna().all(axis=None)
    assert results.problems == ["eval_seconds is infinite or absurdly large in 1 records and is read as unknown"]


def test_the_last_sweep_record_holds(tmp_path):
    lines = [sweep_line(seeds=[0]), sweep_line(seeds=[0, 1]), run_line()]
    assert [s["seeds"] for s in load([write(tmp_path / "records.jsonl", lines)]).sweeps] == [[0, 1]]


@pytest.mark.parametrize("later", ["running", "failed"])
def test_a_result_stands_until_a_later_attempt_has_one(tmp_path, later):
    """A contaminated run that is measured again, and is not through or fails, keeps its accuracy."""
    first = run_line(run_key="k", exclusive=False, test_accuracy=0.9)
    second = run_line(run_key="k", attempt=1, status=later, test_accuracy=None)
    third = run_line(run_key="k", attempt=2, test_accuracy=0.8)
    for lines, status, accuracy, attempt in (
        ([first, second], "finished", 0.9, 0),
        ([first, second, third], "finished", 0.8, 2),
    ):
        epochs = [line for run in lines for line in epoch_lines(run)]
        (row,) = load([write(tmp_path / "records.jsonl", [*lines, *epochs])]).runs.to_dict("records")
        assert (row["status"], row["test_accuracy"], row["attempt"]) == (status, accuracy, attempt)
