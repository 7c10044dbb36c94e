"""A whole sweep on a machine that somebody else keeps busy: its times are shown under a warning, and judge nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastbp.record import RunRecord
from faults import Victim

pytestmark = [
    pytest.mark.slow,
    pytest.mark.long,
    pytest.mark.skipif(not Path("/proc/stat").exists(), reason="the machine does not count processor time"),
]

SWEEP = """\
name: beside
task: {data: digits, model: mlp, model_args: {depth: 2, width: 8}, data_args: {limit: 128}}
recipe: {epochs: 2, batch_size: 64, lr: 0.1}
arms:
  bp: {method: bp}
  ldb: {method: ldb, drop_rate: 0.5}
measure: {seeds: [0, 1], threads: 1, gpus: 0, controls: false}
"""


@pytest.fixture
def spinning():
    """A program that never rests, on every core twice."""
    spin = [sys.executable, "-c", "while True: pass"]
    others = [subprocess.Popen(spin) for _ in range(2 * len(os.sched_getaffinity(0)))]
    yield others
    _stop(others)


def _stop(others):
    for other in others:
        other.kill()
        other.wait()


def test_times_beside_a_busy_program_are_contaminated_and_conclude_nothing(tmp_path, spinning):
    sweep = Victim(tmp_path, SWEEP, FASTBP_FAKE_QUIET="0", COLUMNS="100")
    try:
        assert sweep.run("--no-mlflow", report=True) == 0, sweep.said
    finally:
        sweep.close()
    ends = [r for r in sweep.runs().values() if isinstance(r, RunRecord)]
    assert [(r.status, r.exclusive) for r in ends] == [("finished", False)] * 4, ends
    assert all(r.reason.startswith("the processor is shared: other programs kept ") for r in ends), ends[0].reason
    assert sweep.said.count("the processor is shared") == 1, f"said once, when it is seen: {sweep.said}"
    assert "Contaminated times" in sweep.said, sweep.said
    assert "Nothing can be said: other programs used the device beside every measured run" in sweep.said, sweep.said
    assert "Left out of the times: 4 finished runs that shared their device with other work." in sweep.said
    rows = json.loads((sweep.out / "report" / "tables" / "pareto.json").read_text())["rows"]
    assert [(row["arm"], row["n"]) for row in rows] == [("bp", 0), ("ldb", 0)], rows
    assert "warning: 4 measured runs shared the device with other work" in sweep.said, sweep.said

    _stop(spinning)
    sweep.environment["FASTBP_FAKE_QUIET"] = "1"
    try:
        assert sweep.run("--no-mlflow", "--remeasure") == 0, sweep.said
    finally:
        sweep.close()
    again = sweep.runs()
    assert len(again) == 4, "the same runs, no new ones"
    assert [(r.attempt, r.exclusive) for r in again.values()] == [(1, True)] * 4, again
    assert "shared the device" not in sweep.said, sweep.said
