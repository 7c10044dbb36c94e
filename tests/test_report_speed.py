"""The report's benchmark at a small size: that it counts what it made, not how long it takes."""

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
