"""The `fastbp` command, as typed in a terminal 100 columns wide."""

import dataclasses
import json
import os
import re
import subprocess
import sys

import pytest
from rich.console import Console

from fastbp import METHODS, cli
from fastbp.cards import meanings
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


def test_train_prints_the_methods_own_numbers():
    out, _ = fastbp("train", "--method", "highway", "--set", "iterations=1", "--set", "cosine_every=1", *SMALL)
    assert re.search(r"highway/iterations\s+│ 1 ", out), out
    assert re.search(r"highway/cosine\s+│ 0\.[0-9]+ ", out), out


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


@pytest.mark.long
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


@pytest.fixture
def called(monkeypatch, capsys):
    """The same command inside of this process, which has imported torch already: its output and errors."""

    def call(*arguments, code=0):
        monkeypatch.setattr(sys, "argv", ["fastbp", *arguments])
        monkeypatch.setattr(sys, "path", [*sys.path])
        monkeypatch.setattr(cli, "console", Console(width=100))
        monkeypatch.setenv("COLUMNS", "100")
        with pytest.raises(SystemExit) as ended:
            cli.main()
        done = capsys.readouterr()
        assert ended.value.code == code, f"exit {ended.value.code}: {done.err[-1000:]}"
        assert max(map(len, done.out.splitlines()), default=0) <= 100
        return done

    return call


def test_methods_prints_cards_and_ranges():
    out, _ = fastbp("methods")
    for words in ("arXiv:2412.18027", "arXiv:2405.02385", "arXiv:2501.17086", "arXiv:1804.10574", "0.1 to 0.9"):
        assert words in out
    assert "Counted costs: fastbp methods ldb --model resnet20" in out


def test_methods_says_what_every_setting_means(called):
    for name, kind in METHODS.items():
        unexplained = [f.name for f in dataclasses.fields(kind) if len(meanings(kind).get(f.name, "")) < 20]
        assert not unexplained, f"{name}: no meaning for {unexplained}"
    out = called("methods", "ldb").out
    assert "DecorrelatedBP" not in out
    (row,) = [line for line in out.splitlines() if line.startswith("│ drop_rate")]
    assert [cell.strip() for cell in row.split("│")][1:4] == ["drop_rate", "0.5", "0.1 to 0.9"]
    assert "probability p in [0, 1)" in row


@pytest.mark.parametrize("name", METHODS)
def test_methods_wraps_a_card_under_its_headings(called, name):
    lines = called("methods", name).out.splitlines()
    starts = ("Idea ", "Exact when ", "Needs ", "Cost ", "Departs ", "Not for ", "Reference ")
    card = lines[next(i for i, line in enumerate(lines) if line.startswith(starts)) :]
    card = card[: card.index("")] if "" in card else card
    assert [line.split("  ")[0].strip() for line in card if line[:1] != " "] == [s.strip() for s in starts]
    assert all(line[:12].strip() == "" for line in card if line[:1] == " "), "text under a heading"


def costs(called, *arguments):
    """The rows of the table of costs: method to its cells; lines of one row together."""
    out = called("methods", *arguments, "--input", "1x8x8", "--batch-size", "16", "--set", "model.width=8").out
    rows, name = {}, ""
    for line in out[out.index("costs on ") :].splitlines():
        if line.startswith("│"):
            first, *cells = [cell.strip() for cell in line.strip("│").split("│")]
            name = first or name
            rows.setdefault(name, []).append(cells)
    return rows


def test_methods_counts_costs_on_a_model(called):
    """Against the methods' own cost models, on a net of 4 blocks."""
    rows = costs(called, "--model", "resnet_tiny")
    assert list(rows) == ["bp", "ldb", "dbp", "highway", "ddg"]
    assert rows["bp"] == [["1.000", "1.000", "0.000", ""]]
    (dropping, mean, state, kind), (full, *_) = sorted(rows["ldb"])
    assert (full, state, kind) == ("1.000", "0.000", "dropping epochs")
    assert 0.75 < float(dropping) < 0.90, f"half of the weight gradients are a sixth: {dropping}"
    assert float(mean) == pytest.approx((1 + float(dropping)) / 2, abs=1e-3)
    ((step, _, state, _),) = rows["dbp"]
    matrices = 9**2 + 8 * 72**2 + 8**2
    assert float(state) * 1e6 == pytest.approx(4 * matrices, rel=0.05), "D of every layer, float32"
    assert float(step) > 1.05
    assert 1.8 < float(rows["highway"][0][0]) < 7 / 3, "at most (k + 3) / 3 of backprop's"
    ((step, _, state, _),) = rows["ddg"]
    assert step == "1.000"
    assert float(state) * 1e6 > 4 * 16 * 8 * 64, "a batch in flight between the modules"


def test_methods_counts_a_combination_at_given_settings(called):
    arguments = ("dbp+ldb", "--model", "resnet_tiny", "--set", "inner.drop_rate=0.9", "--set", "decor_lr=0.001")
    kinds = {cells[-1]: float(cells[0]) for cells in costs(called, *arguments)["dbp+ldb"]}
    alone = float(costs(called, "dbp", "--model", "resnet_tiny")["dbp"][0][0])
    assert kinds["other epochs"] == pytest.approx(alone, abs=1e-3)
    assert kinds["dropping epochs"] < alone - 0.2


def test_methods_says_why_there_is_no_cost(called):
    out = called("methods", "ddg", "--model", "vit_tiny", "--input", "1x8x8", "--set", "modules=40").out
    assert "DDG.modules = 40: this Chain has 8 blocks" in " ".join(out.replace("│", " ").split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("lbd",), "no method 'lbd'; did you mean ldb?"),
        (("--model", "vit_tin"), "no model 'vit_tin'; did you mean vit_tiny?"),
        (("ldb", "--model", "mlp", "--input", "3x32"), "--input 3x32: expected a shape such as 3x32x32"),
        (("--set", "drop_rate=0.9"), "--set: say of which method"),
        (("ldb", "--set", "rate=1"), "LayerDropBack has no field 'rate'; did you mean drop_rate?"),
    ],
)
def test_methods_refuses_in_one_sentence(called, arguments, message):
    done = called("methods", *arguments, code=2)
    assert message in done.err
    assert not done.out, "the error would be lost behind the cards"
    assert len(done.err.strip().splitlines()) == 1, done.err


def test_bench_compares_with_backprop():
    out, _ = fastbp("bench", "--methods", "ldb", "--model", "mlp", "--rounds", "3")
    assert "times backprop" in out


def test_doctor_lists_the_parts():
    out, _ = fastbp("doctor")
    assert "torch" in out
