"""The LayerDropBack benchmark at a small size: that it compares what it says."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.long
@pytest.mark.slow
def test_the_benchmark_counts_and_times_every_arm(tmp_path):
    pytest.importorskip("timm")
    out = tmp_path / "ldb_saving.json"
    command = [sys.executable, "benchmarks/ldb_saving.py", "--quick", "--cpu", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found["quick"] is True
    assert (found["gpu"], found["device"]["threads"]) == ("not measured", 1)
    arms = [(row["model"], row["unit"], row["drop_rate"]) for row in found["rows"]]
    nets, dropping = ("resnet18", "vit_tiny_patch16_224"), (("layer", 0.5), ("layer", 0.8), ("prefix", 0.5))
    assert arms == [(net, *pair) for net in nets for pair in dropping]
    for row in found["rows"]:
        assert 0 < row["predicted"] < 0.67, f"a backward is two thirds of the FLOPs: {row}"
        assert row["unit"] == "prefix" or row["predicted"] < 0.4, f"weight gradients are a third: {row}"
        assert row["realised"] == pytest.approx(row["saved"] / row["predicted"])
        assert row["full_ms"] > 0
        assert row["drop_ms"] > 0


def test_a_claim_that_does_not_hold_is_one_sentence(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    script = importlib.import_module("ldb_saving")
    row = {"model": "net", "unit": "layer", "drop_rate": 0.5, "realised": 0.9}
    assert script.verdict([row]) is None
    for low in (0.5, float("nan")):
        said = script.verdict([row, row | {"realised": low}])
        assert said.startswith("the claim does not hold: 1 of 2 rows realise less than 85%"), said
        assert len(said.splitlines()) == 1
