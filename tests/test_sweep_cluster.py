"""The private cluster: a stranger is refused, and what the machine has not is refused instead of waited for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import ray
from typer.testing import CliRunner

from sweeps.cli import app
from sweeps.cluster import check_resources, ray_session
from sweeps.source import SweepError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def session():
    before = os.environ.pop("RAY_ADDRESS", None)
    with ray_session():
        yield
    if before is not None:
        os.environ["RAY_ADDRESS"] = before


def test_a_process_without_the_token_is_refused(tmp_path):
    address = ray.get_runtime_context().gcs_address
    clean = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"HOME": str(tmp_path)}
    script = f"import ray; ray.init({address!r}, log_to_driver=False); print('let in')"
    stranger = subprocess.run(
        [sys.executable, "-c", script],
        env=clean | {"RAY_AUTH_MODE": "disabled"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "let in" not in stranger.stdout, "a process without the token joined the cluster"
    assert stranger.returncode != 0


@pytest.mark.long
def test_a_sweep_leaves_no_token_behind(tmp_path):
    clean = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"HOME": str(tmp_path)}
    (tmp_path / "one.yaml").write_text(
        "name: one\ntask: {data: digits, model: mlp, data_args: {limit: 64}}\nrecipe: {epochs: 1}\n"
        "arms: {bp: {method: bp}}\nmeasure: {seeds: [0], threads: 1, gpus: 0}\n"
    )
    command = [sys.executable, "-m", "sweeps.cli", "run", "one.yaml", "--no-report", "--no-mlflow"]
    clean["PYTHONPATH"] = str(Path(__file__).parents[1])
    done = subprocess.run(command, env=clean, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-1500:]
    assert not (tmp_path / ".ray").exists(), f"left in the user's home: {list((tmp_path / '.ray').iterdir())}"


def test_resources_that_are_not_there_are_a_sentence():
    check_resources("search", 1, 0)
    with pytest.raises(SweepError, match=r"search\.cpus: a run needs 64 CPU, this machine has \d+"):
        check_resources("search", 64, 0)
    if not ray.cluster_resources().get("GPU"):
        with pytest.raises(SweepError, match=r"measure\.gpus: a run needs 1 GPU, this machine has 0"):
            check_resources("measure", 1, 1)


def test_a_sweep_for_a_device_that_is_not_there_ends_at_once(tmp_path, monkeypatch):
    if ray.cluster_resources().get("GPU"):
        pytest.skip("this machine has a GPU")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpu.yaml").write_text(
        "name: gpu\ntask: {data: digits, model: mlp}\nrecipe: {epochs: 1}\narms: {bp: {method: bp}}\n"
        "measure: {seeds: [0], gpus: 1}\n"
    )
    result = CliRunner().invoke(app, ["run", "gpu.yaml", "--no-report", "--no-mlflow"])
    assert isinstance(result.exception, SweepError), result.output
    assert "submit the sweep to a cluster" in str(result.exception)
