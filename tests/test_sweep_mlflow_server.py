"""MLflow over HTTP: a real server, slow, shut behind a password, under a name it does not know, and shared."""

import base64
import re
import threading
import time

import pytest
import requests
from mlflow import MlflowClient

from mlflow_servers import Door, mlflow_server
from sweeps.mlflow_pace import BackgroundSync, final_sync
from sweeps.mlflow_sync import MlflowMirror, try_sync
from test_sweep_mlflow_news import check_all_there, contents, lines_of, sweep_line, sync_at_once, write

pytestmark = pytest.mark.slow
PASSWORD = "correct-horse-battery"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with mlflow_server(tmp_path_factory.mktemp("server")) as url:
        yield url


@pytest.fixture
def door(server):
    door = Door(server)
    yield door
    door.close()


@pytest.fixture(autouse=True)
def _no_retries(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    for name in ("USERNAME", "PASSWORD", "TOKEN"):
        monkeypatch.delenv(f"MLFLOW_TRACKING_{name}", raising=False)


def sweep_of(tmp_path, name, runs=2):
    return write(
        tmp_path / "records.jsonl", sweep_line(name), *(x for i in range(runs) for x in lines_of(i, name=name))
    )


@pytest.mark.long
def test_two_sweeps_at_once_on_a_fresh_server_share_one_experiment(tmp_path, server):
    errors = sync_at_once(tmp_path, server, "shared")
    assert errors == [""] * 2, f"errors: {errors}"
    check_all_there(server, "shared")


def test_a_server_holds_what_sqlite_holds_for_few_requests_per_run(tmp_path, door, capfd):
    path = sweep_of(tmp_path, "both", runs=4)
    mirror = MlflowMirror(path, door.url)
    mirror.sync()
    made = []
    for i in range(4, 9):
        before = len(door.seen)
        write(path, *lines_of(i, epochs=50, name="both"))
        mirror.sync()
        made.append(len(door.seen) - before)
    assert max(made) <= 10, f"HTTP requests per new run of 50 epochs: {made}"
    assert len(set(made[1:])) == 1, f"requests grow with the sweep: {made}"
    mirror.sync(final=True)
    assert capfd.readouterr().out == "", "MLflow writes into the sweep's table"
    store = f"sqlite:///{tmp_path / 'mlruns.db'}"
    MlflowMirror(path, store).sync(final=True)
    assert contents(door.url, "both") == contents(store, "both")


@pytest.mark.long
def test_a_slow_server_holds_up_neither_the_writer_nor_the_end_of_the_search(tmp_path, door, monkeypatch):
    monkeypatch.setattr("sweeps.mlflow_pace.JOIN_SECONDS", 0.1)
    path = sweep_of(tmp_path, "slow", runs=1)
    MlflowMirror(path, door.url).sync()
    door.latency, door.seen[:] = 2.0, []
    mirror = MlflowMirror(path, door.url)
    with BackgroundSync(mirror, every_seconds=0.05):
        while not door.seen:
            time.sleep(0.01)
        began = time.perf_counter()
        for i in range(1, 50):
            write(path, *lines_of(i, name="slow"))
        wrote = time.perf_counter() - began
    ended = time.perf_counter() - began - wrote
    assert len(door.seen) < 49, "the writer was held up until everything was sent"
    assert ended < door.latency, f"the driver waited {ended:.1f} s for a request under way"
    under_way = len(door.seen)
    assert try_sync(mirror, seconds=0.1), "a second writer works beside the first"
    door.latency = 0.0
    for thread in threading.enumerate():
        if thread.name == "mlflow-sync":
            thread.join(60)
            assert not thread.is_alive(), "the thread outlives its request"
    assert len(door.seen) == under_way, "requests are made after the search"
    assert try_sync(mirror, final=True) == ""
    assert len([row for row in contents(door.url, "slow") if row[0].startswith("search") and "#" in row[0]]) == 50


def test_a_long_last_sync_says_so_and_a_short_one_does_not(tmp_path, door, monkeypatch):
    path, said = sweep_of(tmp_path, "last", runs=1), []
    assert final_sync(MlflowMirror(path, door.url), said.append) == ""
    monkeypatch.setattr("sweeps.mlflow_pace.QUIET_SECONDS", 0.01)
    door.latency = 0.1
    assert final_sync(MlflowMirror(path, door.url), said.append) == ""
    assert len(said) == 1, f"it said {said}"
    assert said[0].startswith("writing to MLflow"), f"it said {said}"


@pytest.mark.parametrize("kind", ["basic", "token"])
def test_a_password_opens_the_door_and_is_written_nowhere(tmp_path, door, monkeypatch, kind):
    basic = base64.b64encode(f"me:{PASSWORD}".encode()).decode()
    door.credential = f"Basic {basic}" if kind == "basic" else f"Bearer {PASSWORD}"
    path = sweep_of(tmp_path, f"secret-{kind}")
    error = try_sync(MlflowMirror(path, door.url))
    assert re.search(r"refuses the user or password.*MLFLOW_TRACKING_USERNAME", error), f"no password: {error!r}"

    def set_password(value):
        if kind == "basic":
            monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
            monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", value)
        else:
            monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", value)

    set_password("wrong-horse")
    wrong = try_sync(MlflowMirror(path, door.url))
    assert "refuses the user or password" in wrong, f"wrong password: {wrong!r}"
    set_password(PASSWORD)
    assert try_sync(MlflowMirror(path, door.url), final=True) == ""
    runs = MlflowClient(door.url).search_runs(
        [MlflowClient(door.url).get_experiment_by_name(f"secret-{kind}").experiment_id]
    )
    everywhere = path.read_text() + error + wrong + "".join(str(run.to_dictionary()) for run in runs)
    for secret in (PASSWORD, basic, "wrong-horse"):
        assert secret not in everywhere, f"{secret} is written down"


def test_an_address_with_a_password_is_never_shown(tmp_path, door):
    path = sweep_of(tmp_path, "address")
    door.credential = "Basic nobody"
    errors = [try_sync(MlflowMirror(path, door.url.replace("://", f"://me:{PASSWORD}@")))]
    errors.append(try_sync(MlflowMirror(path, f"http://me:{PASSWORD}@127.0.0.1:9")))
    assert PASSWORD not in "".join(errors), f"errors are {errors}"
    assert "no MLflow server answers at 127.0.0.1" in errors[1], f"it says {errors[1]!r}"


def test_a_name_that_the_server_does_not_know_is_answered_with_the_remedy(tmp_path, door):
    door.host = "head.cluster:5000"
    error = try_sync(MlflowMirror(sweep_of(tmp_path, "host"), door.url))
    assert "--allowed-hosts '127.0.0.1,127.0.0.1:*'" in error, f"it says {error!r}"


@pytest.mark.long
def test_the_servers_own_accounts(tmp_path, monkeypatch):
    pytest.importorskip("flask_wtf", reason="MLflow's own accounts need mlflow[auth]")
    settings = tmp_path / "accounts.ini"
    settings.write_text(
        f"[mlflow]\ndefault_permission = READ\ndatabase_uri = sqlite:///{tmp_path / 'accounts.db'}\n"
        f"admin_username = admin\nadmin_password = {PASSWORD}\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )
    environment = {"MLFLOW_AUTH_CONFIG_PATH": str(settings), "MLFLOW_FLASK_SERVER_SECRET_KEY": "for this test"}
    path = sweep_of(tmp_path, "accounts")
    with mlflow_server(tmp_path / "server", "--app-name", "basic-auth", **environment) as url:
        assert "refuses the user or password" in try_sync(MlflowMirror(path, url))
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong")
        assert "refuses the user or password" in try_sync(MlflowMirror(path, url))
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
        assert try_sync(MlflowMirror(path, url), final=True) == ""
        assert len(contents(url, "accounts")) == 1 + 2 + 2
        body = {"username": "reader", "password": f"{PASSWORD}2"}
        users = f"{url}/api/2.0/mlflow/users/create"
        requests.post(users, json=body, auth=("admin", PASSWORD), timeout=60).raise_for_status()
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "reader")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", f"{PASSWORD}2")
        write(path, *lines_of(2, name="accounts"))
        assert "does not let it write" in try_sync(MlflowMirror(path, url))
