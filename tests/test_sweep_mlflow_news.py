"""A sync costs in proportion to the news, and MLflow agrees with the records whatever happened to either."""

import random
import subprocess
import sys
import threading
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

from fastbp.record import EpochRecord, RecordWriter, RunRecord, SweepRecord, read_records, to_line
from sweeps.mlflow_pace import BetweenTrials
from sweeps.mlflow_store import OutOfTime, Store
from sweeps.mlflow_sync import MlflowMirror, try_sync
from sweeps.mlflow_tree import Tree
from sweeps.records_tail import RecordTail

WHEN = "2026-01-01T00:00:00+00:00"


def sweep_line(name="news", runs=100, started=WHEN):
    return SweepRecord(sweep=name, file_hash=f"{name}-hash", arms=["bp", "ldb"], search_trials=runs, started_at=started)


def lines_of(i, epochs=3, status="finished", attempt=0, first=0, name="news"):
    """All lines of search trial i; from epoch `first` on, where it continues from a checkpoint."""
    start = RunRecord(
        run_key=f"{name}-{i}", attempt=attempt, sweep=name, phase="search", arm=("bp", "ldb")[i % 2],
        task={"data": "digits"}, recipe={"lr": 0.1 + i}, method={"method": "bp"}, started_at=WHEN,
    )  # fmt: skip
    middle = [
        EpochRecord(run_key=start.run_key, attempt=attempt, epoch=e, examples=100 * (e + 1), train_loss=i + e / 10)
        for e in range(first, epochs)
    ]
    end = replace(start, status=status, epochs_done=epochs, val_accuracy=i / 1000, train_seconds=2.0, ended_at=WHEN)
    return [start, *middle, end]


def write(path, *records):
    RecordWriter(path).write(*records)
    return path


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    return f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlruns.db'}"


def contents(uri, name="news"):
    """What MLflow shows: per run its name, parent's name, status, params, last metrics and one curve."""
    client = MlflowClient(uri)
    found = list(client.search_runs([client.get_experiment_by_name(name).experiment_id], max_results=1000))
    names = {run.info.run_id: run.info.run_name for run in found}
    return sorted(
        (
            run.info.run_name,
            names.get(run.data.tags.get("mlflow.parentRunId"), "-"),
            run.info.status,
            tuple(sorted(run.data.params.items())),
            tuple(sorted(run.data.metrics.items())),
            tuple((m.step, m.value) for m in client.get_metric_history(run.info.run_id, "train/loss")),
        )
        for run in found
    )


def test_a_tail_read_in_pieces_is_the_file_read_once(tmp_path):
    rng = random.Random(0)
    records = [sweep_line(), *(line for i in range(6) for line in lines_of(i))]
    data = "".join(map(to_line, records)).replace("digits", "zïffern").encode()
    for _ in range(20):
        path = tmp_path / "records.jsonl"
        path.write_bytes(b"")
        tail, found = RecordTail(path), []
        cuts = sorted(rng.sample(range(1, len(data)), 12))  # anywhere, also within a line and within a character
        for begin, end in zip([0, *cuts], [*cuts, len(data)], strict=True):
            with path.open("ab") as file:
                file.write(data[begin:end])
            assert not tail.replaced(), f"the same file, grown to {end} bytes, counts as another"
            found += tail.news()
        assert found == list(read_records(path)), "records were lost, doubled or changed"
        assert tail.bytes_read == len(data), f"{tail.bytes_read} bytes were parsed of {len(data)}"


@pytest.mark.parametrize("change", ["cut", "other", "longer", "empty"])
def test_a_file_that_is_not_the_one_read_is_read_anew(tmp_path, change):
    path = write(tmp_path / "records.jsonl", sweep_line(), *lines_of(0), *lines_of(1))
    tail = RecordTail(path)
    assert len(list(tail.news())) == 11
    new = {
        "cut": [sweep_line(), *lines_of(0)],
        "other": [sweep_line(), *lines_of(0), *lines_of(3)],
        "longer": [sweep_line(), *(line for i in range(2, 9) for line in lines_of(i))],
        "empty": [],
    }[change]
    path.write_text("".join(map(to_line, new)))
    assert tail.replaced(), "nobody noticed"
    tail.rewind()
    assert list(tail.news()) == new


def test_a_line_that_is_no_record_is_named_each_time_until_it_is_mended(tmp_path):
    path = write(tmp_path / "records.jsonl", sweep_line())
    tail = RecordTail(path)
    with path.open("a") as file:
        file.write("{broken}\n" + to_line(lines_of(0)[0]))
    found = []
    for _ in range(2):
        with pytest.raises(ValueError, match=r"records\.jsonl:2: not JSON"):
            found += tail.news()
    path.write_text(path.read_text().replace("{broken}\n", ""))
    assert list(tail.news()) == [lines_of(0)[0]]


def test_a_sync_parses_and_asks_for_the_news_only(tmp_path, uri):
    path = write(tmp_path / "records.jsonl", sweep_line("few"))
    mirror = MlflowMirror(path, uri)
    mirror.sync()
    requests = []
    for i in range(12):
        before = mirror.store.requests
        write(path, *lines_of(i, name="few"))
        mirror.sync()
        requests.append(mirror.store.requests - before)
    assert mirror.tail.bytes_read == path.stat().st_size, "bytes were parsed twice"
    # create, log, end the run; log the cell and the sweep; upload the records and note their size
    assert requests[2:] == [7] * 10, f"requests per new run are {requests}"
    before = mirror.store.requests
    assert mirror.sync() == 0
    assert mirror.store.requests == before, "a sync without news asked the store"


def test_syncing_in_pieces_with_retries_ends_where_one_sync_of_everything_does(tmp_path, uri):
    rng = random.Random(1)
    failed = lines_of(2, status="failed")
    late = [*failed[:3], failed[-1], *lines_of(2, attempt=1, epochs=5, first=2)]  # continued from a checkpoint
    again = [*lines_of(3, status="failed"), *lines_of(3, attempt=1)]  # from the beginning
    double = [*lines_of(4, status="failed")[:4], lines_of(4, attempt=1)[0], *lines_of(4, attempt=2, epochs=5, first=3)]
    queues = [lines_of(0), lines_of(1, status="diverged"), late, again, double]
    path = write(tmp_path / "pieces" / "records.jsonl", sweep_line())
    mirror = MlflowMirror(path, uri, "in pieces")
    while queues:
        queue = rng.choice(queues)
        write(path, queue.pop(0))
        if not queue:
            queues.remove(queue)
        if rng.random() < 0.5:
            mirror.sync()
    mirror.sync(final=True)
    MlflowMirror(path, uri, "at once").sync(final=True)
    whole = contents(uri, "at once")
    assert contents(uri, "in pieces") == whole
    curves = {dict(row[3]).get("recipe.lr"): [step for step, _ in row[5]] for row in whole if "#" in row[0]}
    five, three = [0, 1, 2, 3, 4], [0, 1, 2]
    assert curves == {"0.1": three, "1.1": three, "2.1": five, "3.1": three, "4.1": five}, f"steps are {curves}"


def test_more_of_a_run_that_was_let_go_is_read_anew(tmp_path, uri):
    path = write(tmp_path / "records.jsonl", sweep_line("gone"), *lines_of(0, name="gone"))
    mirror = MlflowMirror(path, uri)
    mirror.sync()
    write(path, *lines_of(0, attempt=1, epochs=5, first=3, name="gone"))
    mirror.sync(final=True)
    (row,) = [row for row in contents(uri, "gone") if row[0] == "search bp #1"]
    assert [step for step, _ in row[5]] == [0, 1, 2, 3, 4], f"the curve is {row[5]}"


def test_what_was_deleted_in_mlflow_comes_back(tmp_path, uri):
    lines = [line for i in range(4) for line in lines_of(i, name="deleted")]
    path = write(tmp_path / "records.jsonl", sweep_line("deleted"), *lines)
    mirror = MlflowMirror(path, uri)
    mirror.sync(final=True)
    expected, client = contents(uri, "deleted"), MlflowClient(uri)
    for victims in (["search bp #1"], ["search ldb"], ["deleted"], ["deleted", "search bp", "search ldb #2"]):
        experiment = client.get_experiment_by_name("deleted").experiment_id
        for run in client.search_runs([experiment]):
            if run.info.run_name in victims:
                client.delete_run(run.info.run_id)
        assert contents(uri, "deleted") != expected
        mirror.sync(final=True)
        assert contents(uri, "deleted") == expected, f"after {victims} was deleted and synced"
    client.delete_run(next(r.info.run_id for r in client.search_runs([experiment]) if r.info.run_name == "search bp"))
    write(path, *lines_of(4, name="deleted"))
    mirror.sync()
    names = {row[0]: row[1] for row in contents(uri, "deleted")}
    assert names["search bp #3"] == "search bp", "a sync during the sweep does not mend a deleted cell"


def test_a_run_that_a_repeated_request_made_twice_is_there_once(tmp_path, uri):
    path = write(tmp_path / "records.jsonl", sweep_line("twice"), *lines_of(0, name="twice"))
    mirror = MlflowMirror(path, uri)
    mirror.sync(final=True)
    expected, client = contents(uri, "twice"), MlflowClient(uri)
    experiment = client.get_experiment_by_name("twice").experiment_id
    for run in client.search_runs([experiment]):
        tags = {k: v for k, v in run.data.tags.items() if k not in ("fastbp.state", "fastbp.epochs")}
        client.create_run(experiment, tags=tags, run_name=run.info.run_name)
    mirror.sync(final=True)
    assert contents(uri, "twice") == expected, "a double stayed, or the original lost something"


def test_the_same_file_started_in_two_folders_is_two_sweeps_and_a_copied_folder_is_one(tmp_path, uri):
    for i, started in enumerate((WHEN, "2026-01-02T00:00:00+00:00", WHEN)):
        lines = lines_of(0, name="same") if i != 1 else lines_of(0, name="same", status="diverged")
        path = write(tmp_path / str(i) / "records.jsonl", sweep_line("same", started=started), *lines)
        MlflowMirror(path, uri).sync(final=True)
    rows = [(row[0], row[1], row[2]) for row in contents(uri, "same")]
    assert [row[2] for row in rows if row[0] == "search bp #1"] == ["FAILED", "FINISHED"], f"runs are {rows}"
    assert len([row for row in rows if row[1] == "-"]) == 2, f"sweeps are {rows}"


def test_a_mirror_keeps_little_of_runs_that_ended(tmp_path, monkeypatch):
    empty = type("Page", (list,), {"token": None})()
    answer = SimpleNamespace(info=SimpleNamespace(run_id="0"), experiment_id="0", lifecycle_stage="active")
    monkeypatch.setattr(Store, "_call", lambda self, name, *a, **k: empty if name == "search_runs" else answer)
    path = write(tmp_path / "records.jsonl", sweep_line(runs=1000))
    mirror, held = MlflowMirror(path, f"sqlite:///{tmp_path / 'none.db'}"), []
    tracemalloc.start()
    for block in range(4):
        write(path, *(line for i in range(40) for line in lines_of(40 * block + i, epochs=30)))
        mirror.sync()
        held.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    per_run = (held[-1] - held[0]) / 120
    whole = len(path.read_bytes()) / 160
    assert per_run < whole / 4, f"{per_run:.0f} bytes are kept per run, whose records are {whole:.0f} bytes"
    assert all(not h.epochs for h in mirror._tree.runs.values()), "epochs that were written are kept"


SYNC = """
import pathlib, sys, time
from sweeps.mlflow_sync import MlflowMirror, try_sync
mirror = MlflowMirror(pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3])
pathlib.Path(sys.argv[1] + ".ready").touch()
while not pathlib.Path(sys.argv[4]).exists():
    time.sleep(0.001)
sys.exit(try_sync(mirror, final=True))
"""


def sync_at_once(folder: Path, uri: str, experiment: str, processes: int = 2):
    """Sync as many sweeps, from as many processes that begin together; the errors they report."""
    paths = [folder / str(i) / "records.jsonl" for i in range(processes)]
    for i, path in enumerate(paths):
        name = f"sweep{i}"
        write(path, sweep_line(name), *(line for k in range(6) for line in lines_of(k, name=name)))
    arguments = [[str(path), uri, experiment, str(folder / "go")] for path in paths]
    started = [subprocess.Popen([sys.executable, "-c", SYNC, *a], stderr=subprocess.PIPE, text=True) for a in arguments]
    while not all(Path(f"{path}.ready").exists() for path in paths):
        assert all(process.poll() is None for process in started)
        time.sleep(0.01)
    (folder / "go").touch()
    return [process.communicate()[1].strip() for process in started]


def check_all_there(uri, experiment, processes=2):
    rows = contents(uri, experiment)
    names = sorted(row[0] for row in rows if row[1] == "-")
    assert names == [f"sweep{i}" for i in range(processes)], f"sweeps are {names}"
    assert len(rows) == processes * (1 + 2 + 6), f"{len(rows)} runs: {[row[0] for row in rows]}"


@pytest.mark.long
@pytest.mark.slow
def test_sweeps_at_once_on_a_fresh_sqlite_store(tmp_path):
    uri = f"sqlite:///{tmp_path / 'fresh.db'}"
    errors = sync_at_once(tmp_path, uri, "shared")
    assert errors == [""] * 2, f"errors: {errors}"
    check_all_there(uri, "shared")


def test_a_store_that_another_process_writes_to_is_waited_for_no_longer_than_allowed(tmp_path, uri):
    path = write(tmp_path / "records.jsonl", sweep_line("busy"))
    holder = Store(uri)
    with holder.limited(float("inf"), threading.Event()):
        with pytest.raises(OutOfTime, match="another sweep is writing to"):
            MlflowMirror(path, uri).sync(seconds=0.1)
        assert "another sweep" in try_sync(MlflowMirror(path, uri), seconds=0.1)
    assert try_sync(MlflowMirror(path, uri)) == ""


def test_a_store_in_no_folder_is_one_sentence(tmp_path):
    path = write(tmp_path / "records.jsonl", sweep_line())
    error = try_sync(MlflowMirror(path, f"sqlite:///{tmp_path / 'absent' / 'mlruns.db'}"))
    assert "no such folder" in error, f"it says {error!r}"
    assert "\n" not in error


def test_a_slow_store_is_asked_between_trials_for_a_twentieth_of_the_time(monkeypatch):
    asked, clock = [], [0.0]

    def slow(mirror, seconds):
        asked.append(clock[0])
        clock[0] += 3.0
        return "slow"

    monkeypatch.setattr("sweeps.mlflow_pace.try_sync", slow)
    monkeypatch.setattr("sweeps.mlflow_pace.time.monotonic", lambda: clock[0])
    between = BetweenTrials(None)
    for _ in range(200):
        between.sync()
        clock[0] += 1.0
    assert len(asked) * 3 <= clock[0] / 20 + 3, f"asked {len(asked)} times in {clock[0]} s"
    assert len(asked) >= 3, "never asked again"


def test_an_unknown_error_of_the_store_is_not_retried_for_ever(tmp_path, uri, monkeypatch):
    path = write(tmp_path / "records.jsonl", sweep_line("bad"), *lines_of(0, name="bad"))
    mirror, calls = MlflowMirror(path, uri), []
    mirror.sync()

    def refuse(self, *args, **kwargs):
        calls.append(args)
        raise MlflowException("no", error_code=INVALID_PARAMETER_VALUE)

    monkeypatch.setattr(Store, "write", refuse)
    write(path, *lines_of(1, name="bad"))
    assert "no" in try_sync(mirror)
    assert len(calls) == 2, f"{len(calls)} tries"
    monkeypatch.undo()
    assert try_sync(mirror) == ""
    assert len(contents(uri, "bad")) == 1 + 2 + 2


def test_the_tree_of_a_growing_file_is_the_tree_of_the_whole(tmp_path):
    path = write(tmp_path / "records.jsonl", sweep_line(), *lines_of(0), *lines_of(1)[:2])
    tree, tail = Tree.of(()), RecordTail(path)
    for more in ([], lines_of(1)[2:], lines_of(2)):
        write(path, *more)
        for record in tail.news():
            tree.add(record)
        whole = Tree.of(read_records(path))
        assert (tree.runs, tree.cells, tree.sweep) == (whole.runs, whole.cells, whole.sweep)
