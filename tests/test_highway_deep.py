"""The benchmark of Highway-BP on deep nets at a small size: that it measures what it says."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.long
@pytest.mark.slow
def test_the_benchmark_sets_every_step_beside_backprop_and_the_cost_model(tmp_path):
    out = tmp_path / "highway_deep.json"
    command = [sys.executable, "benchmarks/highway_deep.py", "--quick", "--cpu", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "not measured: a GPU" in done.stdout
    found = json.loads(out.read_text(encoding="utf-8"))
    gpt, resnet = found["nets"]
    assert {row["form"] for row in gpt["rows"]} == {"loop", "batched"}
    assert {row["form"] for row in resnet["rows"]} == {"loop"}, "convolutions do not run as one"
    assert resnet["p_eff"] == 1.0
    for net in found["nets"]:
        cosines = [row["cosine"] for row in net["rows"] if row["form"] == "loop"]
        assert cosines == sorted(cosines), f"{net['name']}: more rounds, less like the gradient: {cosines}"
        for row in net["rows"]:
            assert row["low"] <= row["speed_up"] <= row["high"], row
            extra = 2 if row["form"] == "loop" else 3
            p_eff = 1.0 if row["form"] == "loop" else net["p_eff"]
            assert row["model"] == pytest.approx(3 / (1 + (row["iterations"] + extra) / p_eff)), row
    batched = {row["iterations"]: row["cosine"] for row in gpt["rows"] if row["form"] == "batched"}
    for row in gpt["rows"]:
        assert row["cosine"] == pytest.approx(batched[row["iterations"]], abs=1e-5), row
    assert batched[5] == pytest.approx(1.0, abs=1e-5), "four blocks, five rounds"
