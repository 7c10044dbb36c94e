"""The sweep's benchmark at its smallest: that it runs what it compares, not how long it takes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.long
@pytest.mark.slow
def test_the_benchmark_runs_every_variant_and_counts_its_trials(tmp_path):
    out = tmp_path / "sweep_overhead.json"
    command = [sys.executable, "benchmarks/sweep_overhead.py", "--quick", "--out", str(out)]
    environ = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environ, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(out.read_text(encoding="utf-8"))
    assert set(found["rows"]) == {"bare Tune", "sweep", "bare Tune, reused actors", "sweep, reused actors"}
    assert all(row["seconds"] > 0 for row in found["rows"].values())
    assert found["memory"]["trials"] == 20, "a trial of the long sweep was lost or told twice"
    assert len(found["memory"]["mib"]) == 10
    assert set(found["figures"]) == set(found["limits"]) == {"fresh", "reused", "mib_per_1000"}
