"""`fastbp-sweep doctor`: every trouble it names is made for real, and its fix is in the line."""

import hashlib
import sqlite3
import subprocess
import sys
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from fastbp.data import load_dataset
from fastbp.installation import torchvision_mismatch
from mlflow_servers import mlflow_server
from sweep_files import TOY
from sweeps import doctor
from sweeps.cli import app
from sweeps.mlflow_errors import problem, sentence


def find(findings, what):
    found = [f for f in findings if f.what == what]
    assert len(found) == 1, f"{len(found)} lines about {what}"
    return found[0]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to be in, a home of its own, and no setting of the user's."""
    for name in ("MLFLOW_TRACKING_URI", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("FASTBP_DATA", str(tmp_path / "cache"))
    (tmp_path / "home" / ".ray").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_good_sweep_on_a_quiet_machine_is_all_ok(here, monkeypatch):
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 0.0, 0.0))
    monkeypatch.setattr(doctor, "unwatched", lambda device: "")
    (here / "toy.yaml").write_text(TOY)
    result = CliRunner().invoke(app, ["doctor", "toy.yaml"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    lines = [line for line in result.output.splitlines() if line.startswith("│")]
    assert all(line.startswith("│ ok ") for line in lines), result.output
    for what in (
        "python",
        "torch",
        "ray",
        "optuna",
        "mlflow",
        "sweep file",
        "arms",
        "CPU",
        "Ray token",
        "MLflow",
        "output",
    ):
        assert any(f"│ {what} " in line for line in lines), f"nothing about {what}: {result.output}"
    assert sorted(p.name for p in here.iterdir()) == ["home", "toy.yaml"], "the doctor left something behind"


def test_a_missing_data_folder_fails_with_the_place_it_was_looked_for(here):
    (here / "toy.yaml").write_text(
        TOY.replace("data: digits", "data: folder:pictures").replace(", data_args: {limit: 128}", "")
    )
    result = CliRunner().invoke(app, ["doctor", "toy.yaml"], env={"COLUMNS": "300"})
    assert result.exit_code == 1, result.output
    assert f"folder:pictures: {here}/pictures does not exist" in result.output
    assert f"relative paths start at {here}" in result.output


def test_a_wrong_sweep_file_is_named_with_its_line(here):
    (here / "toy.yaml").write_text(TOY.replace("trials", "trails"))
    finding = find(doctor.examine("toy.yaml", None, None), "sweep file")
    assert finding.state == "fail"
    assert "toy.yaml:7: unknown key 'trails' in search" in finding.said


def test_something_else_on_the_machine_is_a_warning(monkeypatch):
    monkeypatch.setattr("os.getloadavg", lambda: (99.0, 0.0, 0.0))
    finding = find(doctor.devices(), "CPU")
    assert (finding.state, "load 99.0" in finding.said) == ("warn", True), finding


@pytest.mark.parametrize(("threads", "load", "state"), [(1, 3.0, "ok"), (1, 14.5, "warn"), (None, 0.6, "warn")])
def test_a_load_that_leaves_a_run_its_cores_is_none(monkeypatch, threads, load, state):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.setattr("os.getloadavg", lambda: (load, 0.0, 0.0))
    assert find(doctor.devices(threads), "CPU").state == state


def test_a_gpu_that_nobody_can_watch_is_a_warning(monkeypatch):
    monkeypatch.setattr(doctor.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(doctor.torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(doctor.torch.cuda, "mem_get_info", lambda _: (9 << 30, 10 << 30))
    monkeypatch.setattr(doctor.torch.cuda, "get_device_name", lambda _: "A GPU")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    findings = list(doctor.devices())
    assert find(findings, "GPU 0").state == "ok"
    watch = find(findings, "GPU 0 watch")
    assert (watch.state, "fastbp[energy]" in watch.fix) == ("warn", True), watch


@pytest.mark.parametrize(
    ("torch", "vision", "expected"),
    [
        ("2.14.1+cu130", "0.29.1+cu130", ""),
        ("2.14.1", "0.29.0+cpu", ""),
        ("2.13.0", "0.29.1", "torchvision 0.29.1 is made for torch 2.14, and torch 2.13.0 is installed"),
        ("2.14.1+cpu", "0.29.1+cu130", "torch 2.14.1+cpu and torchvision 0.29.1+cu130 are different builds"),
    ],
)
def test_torch_and_torchvision_are_a_pair(torch, vision, expected):
    assert torchvision_mismatch(torch, vision) == expected


@pytest.mark.parametrize(
    ("env", "mode", "address", "state", "said"),
    [
        ({}, None, None, "ok", "none here; a sweep on this machine makes its own"),
        ({"RAY_AUTH_MODE": "token"}, None, "127.0.0.1:9", "fail", "RAY_AUTH_MODE=token, and there is no token"),
        ({"RAY_AUTH_MODE": "token"}, 0o600, "127.0.0.1:9", "ok", "from ~/.ray/auth_token, RAY_AUTH_MODE=token"),
        ({}, 0o644, None, "warn", "~/.ray/auth_token can be read by others"),
    ],
)
def test_the_token(here, monkeypatch, env, mode, address, state, said):
    monkeypatch.delenv("RAY_AUTH_MODE")
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    if mode is not None:
        token = here / "home" / ".ray" / "auth_token"
        token.write_text("0" * 64)
        token.chmod(mode)
    findings = list(doctor.cluster(address))
    finding = find(findings, "Ray token")
    assert (finding.state, finding.said) == (state, said), finding
    assert bool(finding.fix) == (state != "ok")
    heads = [(head.state, head.said) for head in findings if head.what == "Ray head"]
    assert heads == ([("fail", "no Ray head answers at http://127.0.0.1:9")] if mode == 0o600 else [])


def test_a_folder_that_cannot_be_written_and_a_full_disk(here, monkeypatch):
    (here / "file").write_text("")
    finding = find(doctor.folders(None, here / "file" / "out", far=False), "output")
    assert finding.state == "fail", finding
    usage = doctor.shutil.disk_usage(here)
    for free, state in ((100 << 20, "fail"), (1 << 30, "warn"), (9 << 30, "ok")):
        monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _, f=free: usage._replace(free=f))
        assert find(doctor.folders(None, here / "out", far=False), "output").state == state


def test_a_store_of_an_older_mlflow_must_be_upgraded(here):
    uri = f"sqlite:///{here}/mlruns.db"
    script = f"from mlflow import MlflowClient; MlflowClient({uri!r}).search_experiments()"
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    with sqlite3.connect(here / "mlruns.db") as store:
        store.execute("UPDATE alembic_version SET version_num = '0584bdc529eb'")
    store.close()
    finding = doctor.mlflow_store(None)
    assert finding.state == "fail", finding
    assert finding.said == f"{uri}: the store is of an older MLflow"
    assert finding.fix == f"back it up, then: mlflow db upgrade {uri}"


def test_stores_that_are_not_there(here, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    nobody = doctor.mlflow_store("http://127.0.0.1:9")
    assert nobody.said == "http://127.0.0.1:9: no MLflow server answers at 127.0.0.1"
    assert nobody.fix == "start it, or correct MLFLOW_TRACKING_URI"
    assert "MLflow no longer keeps runs in folders" in doctor.mlflow_store("file:///tmp/mlruns").said
    fresh = doctor.mlflow_store(None)
    assert fresh.state == "ok", fresh
    assert not (here / "mlruns.db").exists(), "looking at a store made it"


@pytest.mark.slow
def test_a_server_that_does_not_know_its_own_name(here):
    with mlflow_server(here / "server", "--allowed-hosts", "head.example") as uri:
        finding = doctor.mlflow_store(uri)
        assert finding.state == "fail", finding
        assert finding.said == f"{uri}: the MLflow server does not accept the name 127.0.0.1 (403)"
        assert finding.fix == "start it with --allowed-hosts '127.0.0.1,127.0.0.1:*' (mlflow server --help)"


@pytest.mark.parametrize(
    ("uri", "text", "said", "fix"),
    [
        ("http://h", "API request ... failed with error code 401 != 200", "(401)", "MLFLOW_TRACKING_PASSWORD"),
        ("http://h", "PERMISSION_DENIED: no", "(403)", "ask for the right to edit"),
        ("http://h", "too many 503 error responses", "error 503", "see its log"),
        ("http://me:p@h", "Read timed out.", "at h does not answer in time", ""),
        ("sqlite:///x", "Can't locate revision identified by 'abc'", "of a newer MLflow", "pip install -U mlflow"),
        ("sqlite:///x", "error code 401, says a file name", "", ""),
        ("http://h", "something else", "", ""),
    ],
)
def test_what_a_store_says_is_understood(uri, text, said, fix):
    """Refusals that need a server of their own; a sweep and the doctor read them alike."""
    found = problem(text, uri)
    assert said in found[0], found
    assert fix in found[1], found
    assert bool(said) == bool(found[0]), found
    one = sentence(RuntimeError(text), uri)
    assert one == (f"{found[0]}; {found[1]}".strip("; ") if said else f"RuntimeError: {text}")


@pytest.fixture
def cifar(here, monkeypatch):
    """The files of a CIFAR-10, as torchvision knows them, where a function is told to put them; no network."""
    datasets = pytest.importorskip("torchvision.datasets")

    def put(what, content=b"not really"):
        root = here / "cache"
        (root / datasets.CIFAR10.base_folder).mkdir(parents=True, exist_ok=True)
        md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
        if what == "archive":
            monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", md5)
            (root / datasets.CIFAR10.filename).write_bytes(content)
            return
        for name in ("train_list", "test_list"):
            files = [(file, md5) for file, _ in getattr(datasets.CIFAR10, name)]
            monkeypatch.setattr(datasets.CIFAR10, name, files)
            for file, _ in files:
                (root / datasets.CIFAR10.base_folder / file).write_bytes(content)

    def no_network(*args, **kwargs):
        pytest.fail("the doctor downloads")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    return put


CIFAR = TOY.replace("data: digits", "data: cifar10").replace(
    "model: mlp, model_args: {depth: 2, width: 8}", "model: vit_tiny"
)


def test_data_that_is_not_here_is_said_and_not_fetched(here, cifar, monkeypatch):
    monkeypatch.setattr("sweeps.plan.load_plan", lambda file: pytest.fail("the arms were bound"))
    (here / "toy.yaml").write_text(CIFAR)
    findings = list(doctor.examine("toy.yaml", None, None))
    data = find(findings, "data")
    assert (data.state, data.said) == ("warn", f"cifar10: would be downloaded into {here}/cache"), data
    assert (find(findings, "arms").said) == "not bound to the model: the data is not here yet"
    assert not (here / "cache").exists(), "the doctor made the cache"
    cifar("archive")
    assert find(doctor.examine("toy.yaml", None, None), "data").said.startswith("cifar10: would be unpacked into")


def test_data_that_is_here_is_used(here, cifar, monkeypatch):
    cifar("files")
    bound = []
    monkeypatch.setattr("sweeps.plan.load_plan", lambda file: bound.append(file) or SimpleNamespace(arms=[1, 2]))
    (here / "toy.yaml").write_text(CIFAR)
    findings = list(doctor.examine("toy.yaml", None, None))
    assert (find(findings, "data").state, find(findings, "arms").state, bound) == ("ok", "ok", ["toy.yaml"])
    (here / "toy.yaml").write_text(CIFAR.replace("model: vit_tiny", "model: timm:vit, model_args: {pretrained: true}"))
    finding = find(doctor.examine("toy.yaml", None, None), "arms")
    assert finding.said == "not bound to the model: task.model_args.pretrained may be downloaded"
    assert bound == ["toy.yaml"], "a model with weights was made"


def test_pictures_are_not_decoded_by_the_doctor(here):
    image = pytest.importorskip("PIL.Image")
    for name in ("a", "b"):
        (here / "pictures" / name).mkdir(parents=True)
        for i in range(12):
            image.new("RGB", (8, 8), (i, 9 * i, 200)).save(here / "pictures" / name / f"{i}.png")
    text = TOY.replace("data: digits", "data: folder:pictures").replace(", data_args: {limit: 128}", "")
    (here / "toy.yaml").write_text(text)
    data = find(doctor.examine("toy.yaml", None, None), "data")
    assert (data.state, "would be decoded, once, into" in data.said) == ("warn", True), data
    assert not (here / "cache").exists(), "the doctor made the cache"
    load_dataset("folder:pictures", device="cpu")
    findings = list(doctor.examine("toy.yaml", None, None))
    assert (find(findings, "data").state, find(findings, "arms").state) == ("ok", "ok"), findings
