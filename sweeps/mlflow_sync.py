"""MLflow made to agree with the local records: sweep -> cell -> run.

The only writer to MLflow. It reads records and can be repeated at any time: what is already there is not
written again, so a slow, absent or restarted server costs nothing but a later `fastbp-sweep sync`.
"""

from __future__ import annotations

import gzip
import hashlib
import logging
import os
import platform
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")  # an absent server: seconds, not minutes
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException

from fastbp.record import SweepRecord, read_records
from sweeps import mlflow_view as view
from sweeps.mlflow_tree import History, Tree
from sweeps.source import without_password

logging.getLogger("mlflow").setLevel(logging.WARNING)  # "Creating initial MLflow database tables..."
RECORDS_FOLDER = "records"  # of the sweep's artifacts
SMALL_BYTES = 1 << 20  # records up to this size are uploaded whenever they changed
ENDS = {"finished": "FINISHED", "diverged": "FAILED", "failed": "FAILED", "stopped": "KILLED"}


@dataclass
class _Known:
    """What MLflow already holds of one of its runs."""

    run_id: str
    state: str = ""  # tag fastbp.state: the newest thing written
    epochs: int = 0
    attempt: int = 0


class MlflowMirror:
    """Keeps one sweep in one MLflow store.

    Args:
        records: the sweep's records.jsonl.
        uri: of the tracking store.
        experiment: name; default the sweep's.
    """

    def __init__(self, records: Path, uri: str, experiment: str | None = None) -> None:
        self.records, self.uri, self.experiment = Path(records), uri, experiment
        self._client = MlflowClient(tracking_uri=uri)
        self._experiment_id = ""
        self._known: dict[str, _Known] = {}
        self._uploaded: dict[str, int] = {}  # tag of an uploaded file to the bytes of records in it
        self._lock = threading.Lock()

    def sync(self, *, final: bool = False, report: Path | None = None) -> int:
        """Write what MLflow lacks.

        Args:
            final: nobody trains any more: runs without an end are closed as KILLED.
            report: an HTML file to attach to the sweep.

        Returns:
            the number of MLflow runs that were created or changed.

        Raises:
            MlflowException, OSError: the store cannot be reached or refuses; a later call continues.
        """
        with self._lock:
            tree = Tree.of(read_records(self.records))
            if not tree.sweep.sweep:
                return 0
            self._open(tree.sweep)
            size = self.records.stat().st_size
            changed, parent = self._sweep(tree, final, report)
            for name, runs in tree.cells().items():
                cell_changed, cell = self._cell(name, runs, parent, tree.sweep, final)
                changed += cell_changed + sum(self._run(h, cell, tree.sweep, final) for h in runs)
            return changed + self._upload_records(self._known[f"sweep/{tree.sweep.file_hash}"], size, final)

    def _open(self, sweep: SweepRecord) -> None:
        """Find the experiment and what it already holds of this sweep."""
        if self._experiment_id:
            return
        name = self.experiment or sweep.sweep
        found = self._client.get_experiment_by_name(name)
        if found is not None and found.lifecycle_stage != "active":
            raise MlflowException(
                f"experiment {name!r} is in MLflow's trash; restore it, or name another in the sweep file"
            )
        experiment_id = (
            found.experiment_id
            if found
            else self._client.create_experiment(name, artifact_root(self.uri), view.EXPERIMENT_TAGS)
        )
        token = None
        while True:
            page = self._client.search_runs(
                [experiment_id],
                f"tags.`fastbp.sweep_hash` = '{sweep.file_hash}'",
                max_results=1000,
                page_token=token,
            )
            for run in page:
                tags = run.data.tags
                self._known[tags.get("fastbp.key", "")] = _Known(
                    run.info.run_id,
                    tags.get("fastbp.state", ""),
                    int(tags.get("fastbp.epochs", 0)),
                    int(tags.get("fastbp.attempt", 0)),
                )
            token = page.token
            if not token:
                break
        self._experiment_id = experiment_id

    def _sweep(self, tree: Tree, final: bool, report: Path | None) -> tuple[int, str]:
        sweep = tree.sweep
        key = f"sweep/{sweep.file_hash}"
        known = self._ensure(key, sweep.sweep, sweep, view.sweep_tags(sweep), view.millis(sweep.started_at))
        statuses = [h.run.status for h in tree.runs.values()]
        complete = view.is_complete(sweep, [h.run for h in tree.runs.values()], final)
        status = view.end_of(statuses, final, complete)
        counts = ",".join(f"{name}={count}" for name, count in sorted(Counter(statuses).items()))
        digest = f"{status} {counts}{f' {report.stat().st_mtime_ns}' if report else ''}"
        if known.state == digest or (report is None and known.state.startswith(f"{digest} ")):
            return 0, known.run_id
        if report is not None:
            self._client.log_artifact(known.run_id, str(report))
        self._write(known, digest, view.sweep_metrics(tree.sweep, statuses, len(statuses)), view.sweep_params(sweep))
        self._close(known, status, max((view.end_millis(h.run) for h in tree.runs.values()), default=0))
        return 1, known.run_id

    def _cell(self, name: str, runs: list[History], parent: str, sweep: SweepRecord, final: bool) -> tuple[int, str]:
        first = runs[0].run
        tags = view.cell_tags(first) | {"mlflow.parentRunId": parent}
        known = self._ensure(f"cell/{name}", name, sweep, tags, view.millis(first.started_at))
        ended = [h.run for h in runs if h.run.status != "running"]
        complete = len(ended) >= view.planned_runs(sweep, first) or (final and first.phase == "search")
        status = view.end_of([h.run.status for h in runs], final, complete)
        digest = f"{status} {len(ended)} {sum(r.attempt for r in ended)}"
        if known.state == digest:
            return 0, known.run_id
        metrics = view.cell_metrics(ended)
        note = [RunTag("mlflow.note.content", view.cell_note(metrics))]
        self._write(known, digest, metrics, view.cell_params(first, sweep), note)
        self._close(known, status, max((view.end_millis(run) for run in ended), default=0))
        return 1, known.run_id

    def _run(self, history: History, parent: str, sweep: SweepRecord, final: bool) -> int:
        run, key = history.run, f"run/{history.run.run_key}"
        known = self._known.get(key)
        if known is not None and known.attempt != run.attempt:  # an earlier attempt: its numbers are not this one's
            self._client.delete_run(known.run_id)
            del self._known[key]
        tags = view.run_tags(run) | {"mlflow.parentRunId": parent}
        known = self._ensure(key, view.run_name(run, history.number), sweep, tags, view.millis(run.started_at))
        status = ENDS.get(run.status, "KILLED" if final else "RUNNING")
        digest = f"{status} {len(history.epochs)}"
        if known.state == digest:
            return 0
        metrics = view.epoch_metrics(run, history.epochs[known.epochs :])
        if run.status != "running":
            metrics += view.final_metrics(run)
        extra = [RunTag(k, v) for k, v in view.end_tags(run).items()] + [
            RunTag("fastbp.epochs", str(len(history.epochs)))
        ]
        self._write(known, digest, metrics, view.run_params(run), extra)
        known.epochs = len(history.epochs)
        self._close(known, status, view.end_millis(run))
        return 1

    def _upload_records(self, known: _Known, size: int, final: bool) -> int:
        """Attach the records as one file, from which the report can be made without this folder.

        One artifact per run would take a request each to write and to read. The file is replaced where it changed:
        always at the end and while it is small, otherwise when it grew by a tenth, so that all uploads together cost
        ten of the last. Machines that share a sweep have a file each.

        Args:
            size: bytes of the records to upload; what is appended meanwhile waits for the next time.
        """
        place = f"{platform.node()}:{self.records.resolve()}"
        name = f"records-{hashlib.sha256(place.encode()).hexdigest()[:8]}.jsonl.gz"
        tag = f"fastbp.uploaded.{name}"
        if tag not in self._uploaded:
            self._uploaded[tag] = int(self._client.get_run(known.run_id).data.tags.get(tag, -1))
        before = self._uploaded[tag]
        if size == before or (not final and SMALL_BYTES < size < 1.1 * before):
            return 0
        with tempfile.TemporaryDirectory() as folder:
            packed = Path(folder) / name
            with (
                self.records.open("rb") as source,
                packed.open("wb") as target,
                gzip.GzipFile("", "wb", compresslevel=3, fileobj=target, mtime=0) as stream,
            ):
                while (left := size - source.tell()) > 0 and (block := source.read(min(left, 1 << 20))):
                    stream.write(block)
            self._client.log_artifact(known.run_id, str(packed), RECORDS_FOLDER)
        self._client.set_tag(known.run_id, tag, str(size))
        self._uploaded[tag] = size
        return 1

    def _ensure(self, key: str, name: str, sweep: SweepRecord, tags: dict[str, str], start: int) -> _Known:
        """The MLflow run with this key, created where it is missing."""
        if key not in self._known:
            tags = tags | {
                "fastbp.key": key,
                "fastbp.sweep": sweep.sweep,
                "fastbp.sweep_hash": sweep.file_hash,
            }
            run = self._client.create_run(self._experiment_id, start_time=start or None, tags=tags, run_name=name)
            self._known[key] = _Known(run.info.run_id, attempt=int(tags.get("fastbp.attempt", 0)))
        return self._known[key]

    def _write(
        self,
        known: _Known,
        digest: str,
        metrics: list[Metric],
        params: dict[str, str],
        tags: Iterable[RunTag] = (),
    ) -> None:
        """Log in as few calls as the store allows; the state tag goes last: a torn write is repeated."""
        log = self._client.log_batch
        some = [Param(key, value) for key, value in params.items()] if not known.state else []
        for i in range(0, max(len(some), 1), 100):
            if some:
                log(known.run_id, params=some[i : i + 100])
        for i in range(0, len(metrics), 900):
            log(known.run_id, metrics=metrics[i : i + 900])
        log(known.run_id, tags=[*tags, RunTag("fastbp.state", digest)])
        known.state = digest

    def _close(self, known: _Known, status: str, end: int) -> None:
        if status == "RUNNING":
            self._client.update_run(known.run_id, status="RUNNING")
        else:
            self._client.set_terminated(known.run_id, status, end or None)


def artifact_root(uri: str) -> str | None:
    """Where artifacts of a local store go: beside the database; a server decides for itself."""
    if not uri.startswith("sqlite:///"):
        return None
    return (Path(uri.removeprefix("sqlite:///")).resolve().parent / "mlartifacts").as_uri()


def default_uri(configured: str | None) -> str:
    """The tracking store: the sweep file's, else MLFLOW_TRACKING_URI, else mlruns.db in this folder."""
    return configured or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path.cwd() / 'mlruns.db'}"


class BackgroundSync:
    """Syncs every few seconds from a thread of its own while a block runs; for the search phase only.

    Attributes:
        error: the newest failure, or empty.
    """

    def __init__(self, mirror: MlflowMirror | None, every_seconds: float = 5.0) -> None:
        self.mirror, self.every_seconds, self.error = mirror, every_seconds, ""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="mlflow-sync", daemon=True)

    def __enter__(self) -> BackgroundSync:
        if self.mirror is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        """Ends the thread for good: nothing may run beside a measured trial."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _loop(self) -> None:
        while not self._stop.wait(self.every_seconds):
            began = time.monotonic()
            self.error = try_sync(self.mirror)
            if self.error:
                self._stop.wait(min(60.0, 5 * (time.monotonic() - began) + 10.0))


def try_sync(mirror: MlflowMirror | None, *, final: bool = False, report: Path | None = None) -> str:
    """Sync; whatever goes wrong comes back as one line instead of an exception, and no record is lost."""
    if mirror is None:
        return ""
    try:
        mirror.sync(final=final, report=report)
    except Exception as error:  # the sweep must outlive anything its tracker does
        first = (str(error).strip().splitlines() or [""])[0]
        return without_password(f"{type(error).__name__}: {first}")[:300]
    return ""
