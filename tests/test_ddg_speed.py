"""The DDG benchmark at a small size: that it measures what it says; and that modules overlap as the formula has it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch is built without distributed")


@pytest.mark.long
@pytest.mark.slow
def test_the_benchmark_times_every_candidate_and_holds_schedule_and_memory_against_the_formulas(tmp_path, monkeypatch):
    out = tmp_path / "ddg_speed.json"
    command = [sys.executable, "benchmarks/ddg_speed.py", "--quick", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found["quick"] is True
    names = [row["name"] for row in found["rows"]]
    for words in ("DDG, K = 2", "backprop, one thread", "1F1B", "data parallel"):
        assert any(words in name for name in names), f"{words} is not among {names}"
    assert all(row["low"] <= row["ddg_throughput"] <= row["high"] for row in found["rows"]), found["rows"]
    assert found["rows"][0]["ddg_throughput"] == 1.0, "DDG over itself"
    assert all(row["cpu_seconds_per_batch"] > 0 for row in found["rows"]), found["rows"]
    for row in found["memory"]:
        assert 0.85 < row["ratio"] < 1.02, f"{row['name']}, module {row['module']}: {row['bytes']} bytes, {row}"

    (row,) = found["naps"]
    assert row["ratio"] > 0.99, f"faster than its slowest module: {row}"


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize(("which", "schedules"), [(0, [0.12, 0.16, 0.16]), (2, [0.14, 0.18, 0.21])], ids=["K=2", "K=3"])
def test_a_batch_takes_as_long_as_the_slowest_module(which, schedules, monkeypatch):  # T20
    """Receiving early, or a barrier, would take a third more; for three modules that differ, 29 % and half more."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from naps import NAPS, predicted, seconds_per_batch

    naps = NAPS[which][1]
    want = predicted(naps)
    assert [want[name] for name in ("lazy", "eager", "barrier")] == pytest.approx(schedules)
    ratios = []
    while len(ratios) < 3 and (not ratios or ratios[-1] >= 1.2):  # a busy machine wakes sleepers late
        ratios.append(seconds_per_batch(naps, 8) / want["lazy"])
    assert min(ratios) < 1.2, f"time per batch over that of the slowest module: {ratios}"
    assert min(ratios) > 0.99, f"faster than its slowest module: {ratios}"
