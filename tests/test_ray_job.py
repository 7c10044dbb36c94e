"""A sweep as a job, by `fastbp-sweep submit` and by `ray job submit`, on a real head node that asks for a token."""

import json
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


PASSWORD = "not-to-be-seen-4711"


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    """The address of a head node with token authentication, and the environment of its users."""
    folder = tmp_path_factory.mktemp("head")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))}
    environment = clean | {
        "HOME": str(folder / "home"),
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_USAGE_STATS_ENABLED": "0",
        "MLFLOW_TRACKING_PASSWORD": PASSWORD,  # of the head node's own: jobs inherit it
    }
    (folder / "home").mkdir()
    subprocess.run([BIN / "ray", "get-auth-token", "--generate"], env=environment, check=True, capture_output=True)
    port, dashboard = free_port(), free_port()
    command = [BIN / "ray", "start", "--head", "--block", "--num-cpus=2", f"--port={port}"]
    command += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", "--disable-usage-stats"]
    command += [f"--dashboard-agent-listen-port={free_port()}"]  # its default is one port for all of a machine's Rays
    with (folder / "head.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    address = f"http://127.0.0.1:{dashboard}"
    try:
        _wait_for(address, process, folder / "head.log")
        yield address, environment
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=8)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
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
    assert (out / "records.jsonl").exists(), f"nothing was run: {said[-3000:]}"
    runs = last_runs(read_records(out / "records.jsonl")).values()
    status = {run.arm: run.status for run in runs}
    assert status == {"bp": "finished", "bad": "failed"}, f"{status}: {said[-1500:]}"
    assert "boom" in said, "the failing cell's reason is not in the job's log"


SLOW_SWEEP = """\
name: slow
task: {data: digits, model: mlp, model_args: {depth: 2, width: 8}, data_args: {limit: 128}}
recipe: {epochs: 2, batch_size: 64, lr: 0.05}
arms:
  bp: {method: bp}
  slow: {method: "slow_method:Slow"}
measure: {seeds: [0], threads: 1}
"""
SLOW_METHOD = """\
import os, time
from dataclasses import dataclass
from fastbp import Backprop, Method, WrappingEstimator

@dataclass(frozen=True)
class Slow(Method):
    def bind(self, model, loss_fn):
        assert os.environ["MLFLOW_TRACKING_PASSWORD"] and os.environ["CODE"] == "a=b", "the environment did not arrive"
        return Estimator(self, Backprop().bind(model, loss_fn))
    def exact(self, model):
        return None

class Estimator(WrappingEstimator):
    def backward(self, x, y):
        time.sleep(1)
        return super().backward(x, y)
"""


def submit(head, *arguments, **environment):
    """`fastbp-sweep submit`, started; the head's token is in the home folder of its users."""
    address, its = head
    command = [str(BIN / "fastbp-sweep"), "submit", *arguments, "--address", address]
    its = {k: v for k, v in its.items() if k != "RAY_AUTH_MODE"} | environment
    return subprocess.Popen(command, env=its, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def ended(process):
    """Its exit code, and what it said."""
    said, _ = process.communicate(timeout=240)
    return process.returncode, said


def session_logs(head):
    """Ray's logs of this head node."""
    port = head[0].rpartition(":")[2]
    sessions = Path("/tmp/ray").glob("session_*/logs")
    mine = [s for s in sessions if any(port in log.read_text(errors="replace") for log in s.glob("dashboard.log"))]
    assert mine, "the head node's logs were not found"
    return [log for session in mine for log in session.iterdir() if log.is_file()]


def jobs(head):
    """How many jobs the head node knows."""
    address, environment = head
    token = (Path(environment["HOME"]) / ".ray" / "auth_token").read_text().strip()
    request = urllib.request.Request(f"{address}/api/jobs/", headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return sum(job["type"] == "SUBMISSION" for job in json.load(answer))


@pytest.mark.long
@pytest.mark.slow
def test_submit_follows_a_job_through_an_interruption_and_ends_with_its_exit_code(head, tmp_path):
    work, out = tmp_path / "work", tmp_path / "out"
    work.mkdir()
    (work / "slow.yaml").write_text(SLOW_SWEEP)
    (work / "slow_method.py").write_text(SLOW_METHOD)
    (work / "fastbp-runs").mkdir()
    with (work / "fastbp-runs" / "old").open("wb") as file:
        file.truncate(120 * 2**20)  # too large to upload: it must not be
    before = jobs(head)
    call = [str(work / "slow.yaml"), "--working-dir", str(work), "--out", str(out), "--env", "CODE"]
    secret = {
        "CODE": "a=b",
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlruns.db",
        "MLFLOW_TRACKING_USERNAME": "me",
    }
    first = submit(head, *call, **secret)
    said = ""
    for line in first.stdout:
        said += line
        if "measure" in line:  # the job's own words: its log is followed
            break
    first.send_signal(signal.SIGINT)
    code, rest = ended(first)
    said += rest
    assert code == 130, said
    assert "goes on; follow it: the same command again; stop it: ray job stop" in said, said
    code, again = ended(submit(head, *call, **secret))
    assert code == 0, again
    assert "is running this sweep already; nothing was submitted" in again, again
    assert jobs(head) == before + 1, "the sweep was submitted twice"
    assert again.count("measure: ") == 1, f"the log was not shown from its beginning, once: {again}"
    runs = last_runs(read_records(out / "records.jsonl")).values()
    assert {run.arm: run.status for run in runs} == {"bp": "finished", "slow": "finished"}
    shown = said + again + (out / "records.jsonl").read_text()
    assert PASSWORD not in shown, "a password is in the log or in the records"
    logs = [log for log in session_logs(head) if PASSWORD in log.read_text(errors="replace")]
    assert not logs, f"a password is in Ray's own logs: {logs}"

    (work / "slow.yaml").write_text(SLOW_SWEEP.replace("lr: 0.05", "lr: 0.06"))
    code, said = ended(submit(head, *call, **secret))
    assert code == 2, f"the entry point ended with 2, submit with {code}: {said}"
    assert "give the changed sweep another `name`" in said, said


@pytest.mark.long
@pytest.mark.slow
def test_what_cannot_be_submitted_is_a_sentence_and_no_job(head, tmp_path):
    environment = head[1]
    work = tmp_path / "work"
    work.mkdir()
    (work / "good.yaml").write_text(SWEEP.split("  bad:")[0] + "measure: {seeds: [0], threads: 1}\n")
    token = (Path(environment["HOME"]) / ".ray" / "auth_token").read_text().strip()
    before = jobs(head)
    good = ["--working-dir", str(work), "--out", str(tmp_path / "out"), "--no-wait", "good.yaml"]
    refused = {
        "asks for a token and none was found here: copy the head node's ~/.ray/auth_token": {"HOME": str(tmp_path)},
        "refuses the token of RAY_AUTH_TOKEN: replace it": {"RAY_AUTH_TOKEN": "0" * len(token)},
    }
    for sentence, variables in refused.items():
        code, said = ended(submit(head, *good, **variables))
        assert code == 2, f"ended with {code}: {said}"
        assert sentence in said, f"{sentence!r} is not what was said: {said}"
        assert "Traceback" not in said, said
        assert token not in said, "the token was printed"
    with (work / "weights.bin").open("wb") as file:
        file.truncate(120 * 2**20)
    code, said = ended(submit(head, *good))
    assert code == 2, said
    assert "is too large to upload (largest: weights.bin 120 MiB" in said, said
    assert jobs(head) == before, "a job was made of what was refused"
