"""The `fastbp` command, as typed in a terminal 100 columns wide."""

import json
import os
import subprocess
import sys

import pytest

from fastbp.record import last_runs, read_records


def fastbp(*arguments, code=0):
    environment = os.environ | {"COLUMNS": "100", "NO_COLOR": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", "from fastbp.cli import main; main()", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == code, f"exit {done.returncode}: {done.stderr[-1000:]}"
    assert max(map(len, done.stdout.splitlines()), default=0) <= 100 or "--json" in arguments
    return done.stdout, done.stderr


SMALL = ("--model", "mlp", "--epochs", "2", "--lr", "0.02", "--set", "data.limit=200", "--set", "model.width=16")


def test_train_prints_and_writes_its_record(tmp_path):
    path = tmp_path / "records.jsonl"
    out, _ = fastbp("train", "--method", "dbp+ldb", "--set", "inner.drop_rate=0.3", *SMALL, "--out", str(path))
    assert "epoch 2/2" in out
    assert "finished" in out
    (run,) = last_runs(read_records(path)).values()
    assert run.method["inner"]["drop_rate"] == 0.3
    assert f"run {run.run_key}" in out


def test_train_json_is_the_record_alone():
    out, _ = fastbp("train", "--method", "ddg", *SMALL, "--json")
    assert json.loads(out)["status"] == "finished"


def test_train_shows_where_the_net_was_cut():
    out, _ = fastbp("train", "--method", "ddg", "--set", "split=flops", *SMALL)
    lines = out[: out.index("epoch 1/2")].splitlines()
    assert lines[0].startswith("modules, as measured on one batch"), out
    rows = [line.replace("│", " ").split() for line in lines if line.startswith("│")]
    assert [row[:2] for row in rows] == [["0", "1"], ["1", "0"]], f"module and steps late: {rows}"
    shares = [float(word.rstrip("%")) for row in rows for word in row if word.endswith("%")]
    assert sum(shares) == pytest.approx(100, abs=1), f"shares of the FLOPs: {shares}"


@pytest.mark.slow
def test_train_with_a_process_per_module(tmp_path):
    path = tmp_path / "records.jsonl"
    out, _ = fastbp("train", "--method", "ddg", "--set", "processes=true", *SMALL, "--out", str(path))
    assert out.index("modules, as measured on one batch") < out.index("epoch 1/2"), out
    (run,) = last_runs(read_records(path)).values()
    assert (run.status, run.workers, run.epochs_done) == ("finished", 2, 2), f"{run}"
    quiet = fastbp("train", "--method", "ddg", "--set", "processes=true", *SMALL, "--json")[0]
    assert json.loads(quiet)["workers"] == 2
    _, error = fastbp("train", "--method", "ddg", "--set", "processes=true", "--data", "folder:/nowhere", code=2)
    assert error.startswith("error: stage "), error
    assert "/nowhere" in error, error
    assert "Traceback" not in error, error
    assert len(error.strip().splitlines()) == 1, error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--method", "lbd"), "no method 'lbd'; did you mean ldb?"),
        (("--set", "drop_rat=1", "--method", "ldb"), "LayerDropBack has no field 'drop_rat'; did you mean drop_rate?"),
        (("--method", "ldb", "--set", "drop_rate=1"), "LayerDropBack.drop_rate = 1.0: must be in [0, 1)"),
        (("--method", "ddg", "--set", "modules=40"), "DDG.modules = 40: this Chain has 4 blocks"),
        (("--data", "folder:/nowhere"), "/nowhere"),
        (("--set", "lr"), "--set lr: expected NAME=VALUE"),
    ],
)
def test_bad_input_is_one_sentence(arguments, message):
    _, error = fastbp("train", *arguments, code=2)
    assert message in error
    assert "Traceback" not in error
    assert len(error.strip().splitlines()) == 1, error


def test_methods_prints_cards_and_ranges():
    out, _ = fastbp("methods")
    for words in ("arXiv:2412.18027", "arXiv:2405.02385", "arXiv:2501.17086", "arXiv:1804.10574", "0.1 to 0.9"):
        assert words in out


def test_bench_compares_with_backprop():
    out, _ = fastbp("bench", "--methods", "ldb", "--model", "mlp", "--rounds", "3")
    assert "times backprop" in out


def test_doctor_lists_the_parts():
    out, _ = fastbp("doctor")
    assert "torch" in out
