"""The report's benchmark at a small size: that it counts what it made, not how long it takes."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.long
@pytest.mark.slow
def test_the_benchmark_counts_every_run_from_records_and_from_mlflow(tmp_path):
    pytest.importorskip("mlflow")
    out = tmp_path / "report_speed.json"
    sizes = ["--runs", "300", "--times", "2", "--epochs", "5", "--mlflow-runs", "150"]
    command = [sys.executable, "benchmarks/report_speed.py", *sizes, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(out.read_text(encoding="utf-8"))
    assert {name: row["runs"] for name, row in found["rows"].items()} == {
        "records": 300,
        "records, large": 600,
        "mlflow": 150,
    }
    assert set(found["figures"]) == set(found["limits"]) == {"seconds", "gib", "ratio", "mlflow_seconds"}
    assert all(value > 0 for value in found["figures"].values())


@pytest.fixture
def benchmark(monkeypatch, tmp_path):
    """The script, with what takes time replaced by figures that keep every claim."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    script = importlib.import_module("report_speed")
    figures = {"seconds": 2.0, "gib": 0.5, "report_mib": 1.0}
    monkeypatch.setattr(script, "measure", lambda *_: dict(figures))
    monkeypatch.setattr(script, "write_records", lambda folder, *_: folder)
    monkeypatch.setattr(script, "write_store", lambda folder, *_: "sqlite://")
    monkeypatch.setattr(sys, "argv", ["report_speed.py", "--out", str(tmp_path / "out.json")])
    return script, figures


def test_claims_that_hold_end_in_silence(benchmark, capsys):
    script, _ = benchmark
    script.main()
    assert capsys.readouterr().out.count(": holds, ") == 4


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seconds": 21.0}, "1 of 4 claims do not hold: seconds is 21.00, at most 20 is claimed"),
        ({"gib": 2.5}, "1 of 4 claims do not hold: gib is 2.50, at most 2 is claimed"),
        (
            {"seconds": 40.0},
            "2 of 4 claims do not hold: seconds is 40.00, at most 20 is claimed, mlflow_seconds is 40.00",
        ),
        ({"gib": float("nan")}, "1 of 4 claims do not hold: gib is nan"),
    ],
)
def test_a_claim_that_does_not_hold_is_one_sentence_and_a_failure(benchmark, tmp_path, changes, said):
    script, figures = benchmark
    figures |= changes
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert isinstance(ended.value.code, str), "a code of None or 0 is success"
    assert said in ended.value.code
    assert len(ended.value.code.splitlines()) == 1
    assert json.loads((tmp_path / "out.json").read_text())["figures"], "the figures are kept all the same"
