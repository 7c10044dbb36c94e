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
    assert resnet["p_eff"] is None, "nothing runs as one"
    for net in found["nets"]:
        for state, choices in net["cosines"].items():
            assert set(choices) == {"gamma 0", "gamma .1", "min_residual"}, state
            for choice, by_k in choices.items():
                rising = list(by_k.values())
                assert rising == sorted(rising), f"{net['name']}, {state}, {choice}: more rounds, less the gradient"
            assert choices["min_residual"]["0"] == pytest.approx(choices["gamma 0"]["0"]), "nothing to combine"
        assert net["cosines"]["initial"] != net["cosines"]["trained"]
        backprop = [name for name in net["seconds"] if name.startswith("backprop")]
        assert net["strongest"] == min(backprop, key=net["seconds"].get)
        for row in net["rows"]:
            assert row["low"] <= row["speed_up"] <= row["high"], row
            middle, low, high = row["over_strongest"]
            assert 0 < low <= middle <= high, row
            rounds = row["iterations"] + 2 if row["form"] == "loop" else (row["iterations"] + 3) / net["p_eff"]
            assert row["model"] == pytest.approx(3 / (1 + rounds)), row
    exact = gpt["cosines"]["trained"]["gamma 0"]["5"]
    assert exact == pytest.approx(1.0, abs=1e-5), "four blocks, five rounds"
