"""`ray job submit ... -- fastbp-sweep run FILE` on a real local head node that asks for a token, as the README says."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from fastbp.record import last_runs, read_records

BIN = Path(sys.executable).parent
SWEEP = """\
name: job
task: {data: digits, model: mlp, model_args: {depth: 2, width: 8}, data_args: {limit: 128}}
recipe: {epochs: 1, batch_size: 64, lr: 0.05}
arms:
  bp: {method: bp}
  bad: {method: "my_method:Raises"}
measure: {seeds: [0], threads: 1}
"""
METHOD = """\
from dataclasses import dataclass
from fastbp import Backprop, Method, WrappingEstimator

@dataclass(frozen=True)
class Raises(Method):
    def bind(self, model, loss_fn):
        return Estimator(self, Backprop().bind(model, loss_fn))
    def exact(self, model):
        return None

class Estimator(WrappingEstimator):
    def backward(self, x, y):
        raise RuntimeError("boom")
"""


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture
def head(tmp_path):
    """The address of a head node with token authentication, and the environment of its users."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment = clean | {
        "HOME": str(tmp_path / "home"),
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    (tmp_path / "home").mkdir()
    subprocess.run([BIN / "ray", "get-auth-token", "--generate"], env=environment, check=True, capture_output=True)
    port, dashboard = free_port(), free_port()
    command = [BIN / "ray", "start", "--head", "--block", "--num-cpus=2", f"--port={port}"]
    command += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", "--disable-usage-stats"]
    with (tmp_path / "head.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    address = f"http://127.0.0.1:{dashboard}"
    try:
        _wait_for(address, process, tmp_path / "head.log")
        yield address, environment
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=60)


def _wait_for(address, process, log):
    for _ in range(120):
        assert process.poll() is None, log.read_text()[-2000:]
        try:
            urllib.request.urlopen(address, timeout=2)
            return
        except urllib.error.HTTPError:
            return  # it answers: with 401, as no token was sent
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise AssertionError(f"no head node after 60 s: {log.read_text()[-2000:]}")


@pytest.mark.slow
def test_a_submitted_sweep_runs_on_the_cluster_and_its_failure_is_the_jobs(head, tmp_path):
    address, environment = head
    work, out = tmp_path / "work", tmp_path / "out"
    work.mkdir()
    (work / "job.yaml").write_text(SWEEP)
    (work / "my_method.py").write_text(METHOD)
    entry = ["fastbp-sweep", "run", "job.yaml", "--out", str(out), "--no-report"]
    submit = [str(BIN / "ray"), "job", "submit", "--address", address, "--working-dir", str(work), "--", *entry]

    refused = subprocess.run(
        submit,
        env=environment | {"HOME": str(tmp_path), "RAY_AUTH_MODE": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert refused.returncode != 0
    assert "authentication token" in refused.stderr, f"without a token: {refused.stderr[-500:]}"

    done = subprocess.run(submit, env=environment, capture_output=True, text=True, check=False, timeout=240)
    said = done.stdout + done.stderr
    assert done.returncode != 0, f"a failed cell did not fail the job: {said[-1500:]}"
    runs = last_runs(read_records(out / "records.jsonl")).values()
    status = {run.arm: run.status for run in runs}
    assert status == {"bp": "finished", "bad": "failed"}, f"{status}: {said[-1500:]}"
    assert "boom" in said, "the failing cell's reason is not in the job's log"
