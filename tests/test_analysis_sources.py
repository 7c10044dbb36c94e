"""Where records come from: files, torn ones, copies of one run, older schemas, unlike machines, MLflow."""

import gzip
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

from analysis import migrations
from analysis.errors import ReportError
from analysis.load import load
from analysis.measured import measured_groups
from analysis.mlflow_source import split_uri
from analysis_records import CPU, SOFTWARE, epoch_lines, run_line, sweep_line, synthetic, write


def packed(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data, mtime=0))
    return path


def same(one, two):
    """Whether two results have equal frames and sweeps; says what differs."""
    assert one.runs.equals(two.runs), "the runs differ"
    assert one.epochs.equals(two.epochs), "the epochs differ"
    assert one.sweeps == two.sweeps
    return True


# --- files -------------------------------------------------------------------------------------------------------


def test_gzipped_records_are_the_same_records(tmp_path):
    plain = write(tmp_path / "a" / "records.jsonl", synthetic(2))
    packed(tmp_path / "b" / "deep" / "records-1.jsonl.gz", plain.read_bytes())
    assert same(load([plain]), load([tmp_path / "b"]))


def test_gzip_files_one_behind_the_other_are_one_file(tmp_path):
    lines = [json.dumps(run_line(seed=i)) + "\n" for i in range(3)]
    path = tmp_path / "records.jsonl.gz"
    path.write_bytes(b"".join(gzip.compress(line.encode()) for line in lines))
    assert load([path]).runs["seed"].tolist() == [0, 1, 2]


def test_a_gzip_that_was_cut_short_gives_what_can_be_unpacked(tmp_path):
    rng = random.Random(0)  # noise keeps the compressed file long enough to cut
    lines = [run_line(seed=i, reason=rng.randbytes(50).hex()) for i in range(200)]
    data = gzip.compress("".join(json.dumps(line) + "\n" for line in lines).encode())
    path = tmp_path / "records.jsonl.gz"
    path.write_bytes(data[: len(data) // 2])
    results = load([path])
    assert 10 < len(results.runs) < 190, f"{len(results.runs)} of 200 runs out of half the file"
    assert results.problems[0] == "records.jsonl.gz: the compressed file was cut short; what can be unpacked is used"


def test_lines_longer_than_a_block_and_blocks_of_any_size(tmp_path, monkeypatch):
    path = write(tmp_path / "records.jsonl", synthetic(2))
    whole = load([path])
    for size in (1, 7, 100, 5000):
        monkeypatch.setattr("analysis.sources.BLOCK_BYTES", size)
        assert same(whole, load([path])), f"blocks of {size} bytes"


def test_line_numbers_are_right_behind_blank_lines_and_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("analysis.sources.BLOCK_BYTES", 1000)
    path = write(tmp_path / "records.jsonl", [*synthetic(2), "\n", "  \n", *synthetic(2)[1:4], run_line(arm=3)])
    bad = path.read_text(encoding="utf-8").split("\n").index(json.dumps(run_line(arm=3))) + 1
    with pytest.raises(ReportError, match=f"records.jsonl:{bad}: arm is 3, expected str"):
        load([path])


def test_thousands_of_files(tmp_path):
    runs = [run_line(seed=i, run_key=f"{i:016x}") for i in range(2000)]
    for i, run in enumerate(runs):
        write(tmp_path / f"{i % 40}" / f"records-{i}.jsonl", [run])
    results = load([tmp_path])
    assert len(results.runs) == 2000, f"{len(results.runs)} runs in 2000 files"


def test_mixed_sources_in_any_order_are_the_same(tmp_path):
    lines = synthetic(3)
    whole = load([write(tmp_path / "whole" / "records.jsonl", lines)])
    a = write(tmp_path / "a" / "records.jsonl", lines[:40])
    b = packed(tmp_path / "b" / "records.jsonl.gz", "".join(json.dumps(line) + "\n" for line in lines[30:]).encode())
    for sources in ([a, b], [b, a], [b.parent, a, a.parent, b]):
        assert same(whole, load(sources))


# --- the same run twice ------------------------------------------------------------------------------------------


def conflicting(tmp_path):
    """Two files that end one run differently; the second ended later."""
    early = run_line(train_seconds=1.0, ended_at="2026-01-01T00:01:00+00:00")
    late = early | {"train_seconds": 2.0, "ended_at": "2026-01-02T00:01:00+00:00"}
    one = write(tmp_path / "z" / "records.jsonl", [late, *epoch_lines(late)])
    two = write(tmp_path / "a" / "records.jsonl", [early, *epoch_lines(early)])
    return one, two


def test_of_two_ends_the_later_holds_with_its_epochs_in_any_order_and_it_is_said(tmp_path):
    one, two = conflicting(tmp_path)
    for sources in ([one, two], [two, one], [tmp_path]):
        results = load(sources)
        assert results.runs["train_seconds"].tolist() == [2.0]
        assert results.epochs["train_seconds"].tolist() == [0.5, 1.0, 1.5, 2.0]
        (problem,) = results.problems
        assert "1 runs end differently in several files (such as" in problem


def test_of_equal_ends_the_values_decide_and_not_the_names_of_the_files(tmp_path):
    run = run_line(train_seconds=1.0)
    found = []
    for names in (("a", "b"), ("b", "a")):
        folder = tmp_path / names[0] / "in"
        for name, seconds in zip(names, (1.0, 2.0), strict=True):
            write(folder / name / "records.jsonl", [run | {"train_seconds": seconds}])
        found.append(load([folder]).runs["train_seconds"].tolist())
    assert found[0] == found[1], f"the names decide: {found}"


def test_a_retry_elsewhere_holds_over_an_end(tmp_path):
    first = run_line(status="failed", reason="x")
    write(tmp_path / "a" / "records.jsonl", [first | {"attempt": 1, "status": "finished"}])
    write(tmp_path / "b" / "records.jsonl", [first])
    results = load([tmp_path])
    assert results.runs["attempt"].tolist() == [1]
    assert not results.problems, "attempts of one run are no conflict"


# --- schemas -----------------------------------------------------------------------------------------------------


def test_an_older_schema_is_migrated_by_its_function(tmp_path, monkeypatch):
    """Version 0, made up here, had milliseconds and no role."""

    def from_0(data):
        data = dict(data)
        if "train_ms" in data:
            data["train_seconds"] = data.pop("train_ms") / 1000
        return data | ({"role": "baseline"} if data["kind"] == "run" else {})

    old = []
    for line in [run_line(seed=s) for s in range(2)]:
        line = line | {"schema_version": 0, "train_ms": 1000 * line["train_seconds"]}
        old.append({k: v for k, v in line.items() if k not in ("train_seconds", "role")})
    path = write(tmp_path / "old" / "records.jsonl", [sweep_line(schema_version=0), *old])
    with pytest.raises(
        ReportError, match=r"schema_version is 0, which is older than what this version .* can bring to 1"
    ):
        load([path])
    monkeypatch.setitem(migrations.MIGRATIONS, 0, from_0)
    new = write(tmp_path / "new" / "records.jsonl", [sweep_line(), *[run_line(seed=s) for s in range(2)]])
    assert same(load([path]), load([new]))


def test_migrations_go_one_version_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setitem(migrations.MIGRATIONS, -1, lambda data: data | {"reason": data["reason"] + "a"})
    monkeypatch.setitem(migrations.MIGRATIONS, 0, lambda data: data | {"reason": data["reason"] + "b"})
    path = write(tmp_path / "records.jsonl", [run_line(schema_version=v, seed=v + 1) for v in (-1, 0, 1)])
    assert load([path]).runs["reason"].tolist() == ["ab", "b", ""]


@pytest.mark.parametrize("version", [2, 10**400, None, "1", True, -1], ids=lambda v: f"{v!r:.8}")
def test_other_schemas_are_refused(tmp_path, version):
    with pytest.raises(ReportError, match=r"records.jsonl:1: schema_version is "):
        load([write(tmp_path / "records.jsonl", [run_line(schema_version=version)])])


# --- unlike machines ---------------------------------------------------------------------------------------------

GPU = {"type": "cuda", "name": "NVIDIA H200", "memory_bytes": 1, "threads": 8, "uuid": "a"}
TF32 = SOFTWARE | {"cuda": "13.0", "matmul_precision": "highest", "deterministic": False}


@pytest.mark.parametrize(
    ("one", "two", "words"),
    [
        ((CPU, SOFTWARE), (CPU, SOFTWARE | {"torch": "2.13.0"}), "torch 2.13.0"),
        ((CPU, SOFTWARE), (CPU | {"threads": 2}, SOFTWARE), "2 threads"),
        ((CPU, SOFTWARE), (CPU | {"name": "Other CPU"}, SOFTWARE), "Other CPU"),
        ((GPU, TF32), (GPU | {"name": "NVIDIA A100"}, TF32), "NVIDIA A100"),
        ((GPU, TF32), (GPU, TF32 | {"cuda": "12.8"}), "CUDA 12.8"),
        ((GPU, TF32), (GPU, TF32 | {"matmul_precision": "high"}), "high matmul precision"),
        ((GPU, TF32), (GPU, TF32 | {"deterministic": True}), "deterministic"),
        ((GPU, TF32), (GPU, TF32 | {"cudnn_benchmark": True}), "cuDNN benchmark"),
        ((GPU, TF32), (GPU, TF32 | {"cudnn_tf32": False}), "no TF32 in cuDNN"),
        ((GPU, TF32 | {"cudnn": 91002}), (GPU, TF32 | {"cudnn": 90100}), "cuDNN 9.10.2"),
        ((GPU, TF32 | {"cudnn": 8902}), (GPU, TF32 | {"cudnn": 90100}), "cuDNN 8.9.2"),
        ((GPU, TF32), (CPU, TF32), "Test CPU"),
    ],
)
def test_unlike_hardware_and_software_are_refused_or_kept_apart(tmp_path, one, two, words):
    lines = [run_line(seed=s, device=d, software=w) for s in range(2) for d, w in (one, two)]
    results = load([write(tmp_path / "records.jsonl", lines)])
    with pytest.raises(ReportError, match="2 kinds of hardware or software") as refused:
        measured_groups(results)
    assert words in str(refused.value)
    groups = measured_groups(results, allow_mixed=True)
    assert [[arm.n for arm in group.arms] for group in groups] == [[2], [2]], "strata are mixed"


@pytest.mark.parametrize(
    "two",
    [
        (GPU | {"uuid": "b"}, TF32),
        (GPU, TF32 | {"cudnn_tf32": True}),
        (GPU, TF32 | {"fastbp": "9.9", "timm": "1.0"}),
        (GPU, {k: v for k, v in TF32.items() if k not in ("matmul_precision", "deterministic")}),
    ],
)
def test_alike_machines_are_compared(tmp_path, two):
    """Another card of the same kind, and records from before a setting was recorded."""
    lines = [run_line(seed=s, device=d, software=w) for s, (d, w) in enumerate([(GPU, TF32), two])]
    (group,) = measured_groups(load([write(tmp_path / "records.jsonl", lines)]))
    assert group.arms[0].n == 2


# --- MLflow ------------------------------------------------------------------------------------------------------


def test_names_and_uris():
    assert split_uri("demo@http://h:5000/x", None) == ("demo", "http://h:5000/x")
    assert split_uri("a@b@http://h", "http://other") == ("a@b", "http://h")
    assert split_uri("a@b", "http://other") == ("a@b", "http://other")


def test_a_store_that_is_not_there_is_not_made(tmp_path):
    with pytest.raises(ReportError, match="no MLflow store"):
        load([f"mlflow:demo@sqlite:///{tmp_path}/none.db"])
    assert not list(tmp_path.iterdir()), "a store was created"


def test_what_a_store_says_is_repeated_without_the_password(monkeypatch):
    mlflow = pytest.importorskip("mlflow")

    def refuse(**_):
        raise OSError("no route to http://me:secret@host/x\nmore")

    monkeypatch.setattr(mlflow, "MlflowClient", refuse)
    with pytest.raises(ReportError, match=r"answers: no route to http://host/x$"):
        load(["mlflow:demo@http://me:secret@host/x"])


def test_an_absent_server_is_one_sentence_without_the_password(monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(ReportError, match="mlflow:demo: the tracking store answers: ") as error:
        load(["mlflow:demo@http://me:secret@127.0.0.1:9"])
    assert "secret" not in str(error.value)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory):
    """An sqlite store with its tables, which take MLflow seconds to make."""
    mlflow = pytest.importorskip("mlflow")
    path = tmp_path_factory.mktemp("store") / "mlruns.db"
    mlflow.MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def tracked(tmp_path, monkeypatch, empty_store):
    """Records, and a function that syncs them to a store and loads them from there."""
    shutil.copy(empty_store, tmp_path / "mlruns.db")
    shutil.copy(empty_store, tmp_path / "server.db")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    from fastbp.record import RecordWriter
    from sweep_files import ended, history, plan_of, sweep_record
    from sweeps.ledger import Ledger

    plan = plan_of(tmp_path)
    trials = [
        plan.search_run(arm, {"recipe.lr": lr} | ({"method.drop_rate": lr} if "method.drop_rate" in arm.space else {}))
        for lr in (0.1, 0.2) for arm in plan.arms
    ]  # fmt: skip
    runs = plan.measure_runs(Ledger.of([ended(t) for t in trials]))
    lines = [line for run in trials for line in history(run)]
    lines += [*history(runs[0], status="failed", reason="x", val=None), *history(runs[0], attempt=1)]
    lines += [line for run in runs[1:] for line in history(run)]
    records = tmp_path / "sweep" / "records.jsonl"
    RecordWriter(records).write(sweep_record(plan, len(runs)), *lines)
    return records


def synced(records, uri):
    from sweeps.mlflow_sync import MlflowMirror

    MlflowMirror(records, uri, "demo").sync(final=True)


def test_an_sqlite_store_gives_what_the_records_give(tracked, tmp_path):
    uri = f"sqlite:///{tmp_path}/mlruns.db"
    synced(tracked, uri)
    local = load([tracked])
    assert len(local.runs) == 13, f"{len(local.runs)} runs"
    assert len(local.epochs) == 4 + 9 * 2, f"{len(local.epochs)} epochs"
    assert not local.problems
    for results in (load(["mlflow:demo"]), load([f"mlflow:demo@{uri}"]), load(["mlflow:demo"], tracking_uri=uri)):
        assert same(local, results)
        assert not results.problems
        assert all(len(o.run_id) == 32 and not o.url for o in results.origins.values()), "sqlite has ids, no pages"
    assert {o.text for o in local.origins.values()} == {f"run {key}" for key in local.origins}
    both = load(["mlflow:demo", tracked])
    assert same(local, both)
    assert not both.problems, "the same runs found twice are no problem"
    assert all(o.run_id for o in both.origins.values()), "what MLflow knows is not lost beside the records"


def test_two_machines_that_synced_one_sweep_are_read_together(tracked, tmp_path):
    uri = f"sqlite:///{tmp_path}/mlruns.db"
    lines = tracked.read_bytes().splitlines(keepends=True)
    half = len(lines) // 2
    for name, own in (("one", lines[:half]), ("two", [lines[0], *lines[half:]])):
        path = tmp_path / name / "records.jsonl"
        path.parent.mkdir()
        path.write_bytes(b"".join(own))
        synced(path, uri)
    assert same(load([tracked]), load(["mlflow:demo"]))


def test_what_is_missing_in_a_store_is_said(tracked, tmp_path):
    import mlflow

    uri = f"sqlite:///{tmp_path}/mlruns.db"
    synced(tracked, uri)
    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name("demo").experiment_id
    client.create_run(experiment, tags={"fastbp.level": "sweep"}, run_name="lost")
    client.create_run(experiment, run_name="somebody else's")
    client.create_experiment("empty")
    assert load(["mlflow:demo"]).problems == [
        "lost: the tracked sweep has no records and is left out; mend it with fastbp-sweep sync"
    ]
    with pytest.raises(ReportError, match="no such experiment; there are: Default, demo, empty"):
        load(["mlflow:other"])
    with pytest.raises(ReportError, match="has no sweep of this project"):
        load(["mlflow:empty"])


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def server(tmp_path, tracked):
    """URI of an MLflow server on this machine, ended with the test."""
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{tmp_path}/server.db",
        "--artifacts-destination",
        str(tmp_path / "files"),
    ]
    with (tmp_path / "server.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        uri, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 120
        while not answers(f"{uri}/health"):
            assert process.poll() is None, (tmp_path / "server.log").read_text()[-2000:]
            assert time.monotonic() < deadline, "the server does not answer"
            time.sleep(0.3)
        yield uri
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def answers(url):
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return reply.status == 200
    except (urllib.error.URLError, OSError):
        return False


@pytest.mark.slow
def test_a_server_gives_what_the_records_give(tracked, server):
    synced(tracked, server)
    results = load([f"mlflow:demo@{server}"])
    assert same(load([tracked]), results)
    pages = {origin.url for origin in results.origins.values()}
    assert len(pages) == len(results.origins) == 9, "every measured run has a page of its own"
    for key, origin in results.origins.items():
        place = re.fullmatch(rf"{server}/#/experiments/(\d+)/runs/([0-9a-f]+)", origin.url)
        assert place, f"no page of a run: {origin.url}"
        with urllib.request.urlopen(f"{server}/api/2.0/mlflow/runs/get?run_id={place[2]}") as reply:
            run = json.load(reply)["run"]
        assert run["info"]["experiment_id"] == place[1]
        assert {"key": "fastbp.run_key", "value": key} in run["data"]["tags"], "the link leads to another run"
