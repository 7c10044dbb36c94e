"""One sweep's runs in an MLflow store: what it holds of them, and how they are changed."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import math
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")  # an absent server: seconds, not minutes
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # two lines per ended run

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException

from fastbp.record import SweepRecord
from sweeps import mlflow_view as view

logging.getLogger("mlflow").setLevel(logging.WARNING)  # "Creating initial MLflow database tables..."
logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # errors are one sentence of ours
UPLOADED = "fastbp.uploaded."  # tag of a sweep: bytes of records in the file of that name
STALE = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST")  # a run of ours that somebody deleted
BATCH = 900  # metrics in a request; MLflow takes 1000 entities, of which 100 params and 100 tags


class OutOfTime(Exception):
    """The time for MLflow is over; a later sync continues."""


@dataclass
class Known:
    """What MLflow holds of one of our runs."""

    run_id: str
    state: str = ""  # tag fastbp.state: the newest thing written
    epochs: int = 0
    attempt: int = 0
    parent: str = ""
    status: str = "RUNNING"


class Store:
    """The MLflow runs of one sweep; every request can be refused by the clock.

    Args:
        uri: of the tracking store.
        experiment: name; default the sweep's.

    Attributes:
        known: the runs MLflow holds, by key (`sweep`, `cell/NAME`, `run/RUN_KEY`).
        uploaded: bytes of records in each uploaded file, by tag.
        requests: how many were made.
    """

    def __init__(self, uri: str, experiment: str | None = None) -> None:
        self.uri, self.experiment = uri, experiment
        self.requests = 0
        self._client: MlflowClient | None = None
        self._until, self._stop = math.inf, threading.Event()
        self.forget()

    def forget(self) -> None:
        """Look again, next time, at what MLflow holds."""
        self.known: dict[str, Known] = {}
        self.uploaded: dict[str, int] = {}
        self._experiment_id = ""
        self._common: dict[str, str] = {}

    @property
    def is_open(self) -> bool:
        return bool(self._experiment_id)

    @contextlib.contextmanager
    def limited(self, until: float, stop: threading.Event) -> Iterator[None]:
        """Make no request after the time `until` of `time.monotonic` or once `stop` is set, and be the only writer.

        Raises:
            OutOfTime: then, in the block.
        """
        self._until, self._stop = until, stop
        with self._sole_writer():
            yield

    def open(self, sweep: SweepRecord) -> None:
        """Find or create the experiment, and read what it holds of this sweep; of a run that is there twice, as a
        request that was repeated leaves it, one stays.

        A sweep is known by its file and by when it was first started: the same file started in two folders is two
        sweeps, and a folder that was moved is still the same.
        """
        name = self.experiment or sweep.sweep
        self._common = {
            "fastbp.sweep": sweep.sweep,
            "fastbp.sweep_hash": sweep.file_hash,
            "fastbp.started": sweep.started_at,
        }
        experiment_id = self._experiment(name)
        wanted = f"tags.`fastbp.sweep_hash` = '{sweep.file_hash}'"
        known: dict[str, Known] = {}
        token = None
        while True:
            page = self._call("search_runs", [experiment_id], wanted, max_results=1000, page_token=token)
            for run in page:
                tags = run.data.tags
                if tags.get("fastbp.started") != sweep.started_at:
                    continue
                key, found = tags.get("fastbp.key", ""), _known(run)
                first = known.setdefault(key, found)
                if first is not found:
                    known[key], extra = sorted((first, found), key=lambda k: (not k.state, k.run_id))
                    self._call("delete_run", extra.run_id)
                if key == "sweep":
                    self.uploaded = {tag: int(size) for tag, size in tags.items() if tag.startswith(UPLOADED)}
            token = page.token
            if not token:
                break
        self.known, self._experiment_id = known, experiment_id

    def _experiment(self, name: str) -> str:
        for last in (False, True):
            found = self._call("get_experiment_by_name", name)
            if found is not None and found.lifecycle_stage != "active":
                raise MlflowException(
                    f"experiment {name!r} is in MLflow's trash; restore it, or name another in the sweep file"
                )
            if found is not None:
                return found.experiment_id
            try:
                return self._call("create_experiment", name, artifact_root(self.uri), view.EXPERIMENT_TAGS)
            except MlflowException as error:  # another sweep was quicker
                if last or error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
        raise AssertionError("unreachable")

    def ensure(self, key: str, name: str, tags: dict[str, str], parent: str, start: int) -> Known:
        """The MLflow run with this key, created where it is missing.

        Args:
            parent: run_id of the run above, or empty.
            start: milliseconds since 1970.
        """
        known = self.known.get(key)
        if known is None:
            attempt = int(tags.get("fastbp.attempt", 0))
            tags = tags | self._common | {"fastbp.key": key}
            if parent:
                tags["mlflow.parentRunId"] = parent
            run = self._call("create_run", self._experiment_id, start_time=start or None, tags=tags, run_name=name)
            known = self.known[key] = Known(run.info.run_id, attempt=attempt, parent=parent)
        elif known.parent != parent:
            self._call("set_tag", known.run_id, "mlflow.parentRunId", parent)
            known.parent = parent
        return known

    def write(
        self,
        known: Known,
        digest: str,
        metrics: list[Metric],
        params: dict[str, str],
        tags: dict[str, str] | None = None,
    ) -> None:
        """Log in as few requests as the store allows; the state tag goes last: a torn write is repeated."""
        some = [Param(key, value) for key, value in params.items()] if not known.state else []
        for i in range(100, len(some), 100):
            self._call("log_batch", known.run_id, params=some[i : i + 100])
        for i in range(BATCH - 200, len(metrics), BATCH):
            self._call("log_batch", known.run_id, metrics=metrics[i : i + BATCH])
        last = [RunTag(key, value) for key, value in ((tags or {}) | {"fastbp.state": digest}).items()]
        self._call("log_batch", known.run_id, metrics=metrics[: BATCH - 200], params=some[:100], tags=last)
        known.state = digest

    def close(self, known: Known, status: str, end: int) -> None:
        """Give a run its MLflow status and, unless it is RUNNING, its end in milliseconds since 1970."""
        if status == known.status:
            return
        if status == "RUNNING":
            self._call("update_run", known.run_id, status="RUNNING")
        else:
            self._call("set_terminated", known.run_id, status, end or None)
        known.status = status

    def delete(self, key: str) -> None:
        self._call("delete_run", self.known[key].run_id)
        del self.known[key]

    def attach(self, known: Known, file: Path, folder: str | None = None) -> None:
        self._call("log_artifact", known.run_id, str(file), folder)

    def attached(self, known: Known, tag: str, size: int) -> None:
        """Note how many bytes of records the uploaded file holds."""
        self._call("set_tag", known.run_id, tag, str(size))
        self.uploaded[tag] = size

    def _call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        if self._stop.is_set() or time.monotonic() > self._until:
            raise OutOfTime("MLflow is slow and was left for later")
        if self._client is None:
            self._client = MlflowClient(tracking_uri=self.uri)
        self.requests += 1
        return getattr(self._client, name)(*args, **kwargs)

    @contextlib.contextmanager
    def _sole_writer(self) -> Iterator[None]:
        """An sqlite store is written by one sweep at a time: its tables are not made twice, and nobody finds it locked.

        The lock is a file beside the database, held for one sync, and freed by the system when its holder dies.
        """
        database = database_file(self.uri)
        if database is None:
            yield
            return
        if not database.parent.is_dir():
            raise MlflowException(f"{database.parent}: no such folder, so there can be no MLflow store in it")
        with Path(f"{database}.lock").open("w") as file:
            while not _taken(file):
                if time.monotonic() > self._until:
                    raise OutOfTime(f"another sweep is writing to {database}")
                if self._stop.wait(0.05):
                    raise OutOfTime("MLflow was left for later")
            yield


def _known(run: Any) -> Known:
    tags = run.data.tags
    return Known(
        run.info.run_id,
        tags.get("fastbp.state", ""),
        int(tags.get("fastbp.epochs", 0)),
        int(tags.get("fastbp.attempt", 0)),
        tags.get("mlflow.parentRunId", ""),
        run.info.status,
    )


def _taken(file: Any) -> bool:
    """Whether the lock is ours now; a file system without locks has no second machine's protection to offer."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def database_file(uri: str) -> Path | None:
    """The file of an sqlite store."""
    if not uri.startswith("sqlite:///"):
        return None
    return Path(uri.removeprefix("sqlite:///").partition("?")[0]).resolve()


def artifact_root(uri: str) -> str | None:
    """Where artifacts of a local store go: beside the database; a server decides for itself."""
    database = database_file(uri)
    return None if database is None else (database.parent / "mlartifacts").as_uri()
