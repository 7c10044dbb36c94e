"""The MLflow benchmark at its smallest: that it measures what it says and checks the store, not how long it takes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.long
@pytest.mark.slow
def test_the_benchmark_compares_the_same_numbers_on_the_same_store(tmp_path):
    out = tmp_path / "mlflow_overhead.json"
    command = [sys.executable, "benchmarks/mlflow_overhead.py", "--quick", "--stores", "sqlite", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found["sizes"]["ours"] == {"trials": 4, "results": 5}, f"sizes are {found['sizes']}"
    (row,) = found["rows"]
    blocked = {kind: values["blocked_mean_s"] for kind, values in row["per_result"].items()}
    assert set(blocked) == {"bare", "ray", "ours"}
    assert 0 < blocked["ours"] < blocked["ray"], f"blocked seconds per result: {blocked}"
    assert row["ratio"] == pytest.approx(blocked["ray"] / blocked["ours"]), "the ratio is not that of the rows"
