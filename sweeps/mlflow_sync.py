"""MLflow made to agree with the local records: sweep -> cell -> run.

The only writer to MLflow. It reads what the records gained and can be repeated at any time: what is already there is
not written again, so a slow, absent or restarted server costs nothing but a later `fastbp-sweep sync`. MLflow is a
mirror: what somebody deletes there comes back, what the records do not hold is not touched.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import os
import platform
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from sweeps import mlflow_view as view
from sweeps.mlflow_errors import sentence
from sweeps.mlflow_store import STALE, UPLOADED, OutOfTime, Store
from sweeps.mlflow_tree import Forgotten, History, Tree
from sweeps.records_tail import RecordTail

RECORDS_FOLDER = "records"  # of the sweep's artifacts
SMALL_BYTES = 1 << 20  # records up to this size are uploaded whenever they changed
ENDS = {"finished": "FINISHED", "diverged": "FAILED", "failed": "FAILED", "stopped": "KILLED"}


class MlflowMirror:
    """Keeps one sweep in one MLflow store; a sync costs in proportion to what the records gained since the last.

    Args:
        records: the sweep's records.jsonl.
        uri: of the tracking store.
        experiment: name; default the sweep's.
    """

    def __init__(self, records: Path, uri: str, experiment: str | None = None) -> None:
        self.records, self.uri = Path(records), uri
        self.store = Store(uri, experiment)
        self.tail = RecordTail(self.records)
        self._lock = threading.Lock()
        self._start_over()

    def sync(
        self,
        *,
        final: bool = False,
        report: Path | None = None,
        seconds: float = math.inf,
        stop: threading.Event | None = None,
    ) -> int:
        """Write what MLflow lacks.

        Args:
            final: nobody trains any more: runs without an end are closed as KILLED, and what MLflow holds is looked
                at anew, so that runs that were deleted there come back.
            report: an HTML file to attach to the sweep.
            seconds: make no request after so long; one that is under way is waited for.
            stop: make no request once this is set.

        Returns:
            the number of MLflow runs that were created or changed.

        Raises:
            OutOfTime: the seconds were not enough; a later call continues.
            MlflowException, OSError: the store cannot be reached or refuses; a later call continues.
            ValueError: a line of the records is no record.
        """
        until = time.monotonic() + seconds
        if not self._lock.acquire(timeout=min(seconds, threading.TIMEOUT_MAX)):
            raise OutOfTime("MLflow has not answered an earlier request yet")
        try:
            with self.store.limited(until, stop or threading.Event()):
                if final:
                    self.store.forget()
                return self._repaired(final, report)
        except OutOfTime:
            raise
        except Exception:
            self.store.forget()  # a request that seemed to fail may have been carried out
            raise
        finally:
            self._lock.release()

    def _repaired(self, final: bool, report: Path | None) -> int:
        """Sync, from the beginning where something is gone that was thought to be known."""
        was_open = self.store.is_open
        try:
            return self._sync(final, report)
        except Forgotten:
            self._start_over()
        except Exception as error:
            if not was_open or getattr(error, "error_code", "") not in STALE:
                raise
            self._start_over()
        return self._sync(final, report)

    def _start_over(self) -> None:
        self.tail.rewind()
        self._tree = Tree.of(())
        self.store.forget()

    def _sync(self, final: bool, report: Path | None) -> int:
        if self.tail.replaced():
            self._start_over()
        tree = self._tree
        for record in self.tail.news():
            tree.add(record)
        if not tree.sweep.sweep:
            return 0
        size = self.records.stat().st_size
        if not self.store.is_open:
            self.store.open(tree.sweep)
            tree.changed = dict.fromkeys(tree.runs)  # compare all: what agrees costs no request
        changed, parent = self._sweep(final, report)
        for name, runs in tree.changed_cells().items():
            cell_changed, cell = self._cell(name, parent, final)
            changed += cell_changed + sum(self._run(history, cell, final) for history in runs)
            for history in runs:
                del tree.changed[history.run.run_key]
                history.forget()
        return changed + self._upload_records(size, final)

    def _sweep(self, final: bool, report: Path | None) -> tuple[int, str]:
        sweep, runs = self._tree.sweep, [history.run for history in self._tree.runs.values()]
        known = self.store.ensure("sweep", sweep.sweep, view.sweep_tags(sweep), "", view.millis(sweep.started_at))
        statuses = [run.status for run in runs]
        status = view.end_of(statuses, final, view.is_complete(sweep, runs, final))
        counts = ",".join(f"{name}={count}" for name, count in sorted(Counter(statuses).items()))
        digest = f"{status} {counts}{f' {report.stat().st_mtime_ns}' if report else ''}"
        written = known.state == digest or (report is None and known.state.startswith(f"{digest} "))
        if written and known.status == status:
            return 0, known.run_id
        if report is not None:
            self.store.attach(known, report)
        metrics, params = view.sweep_metrics(sweep, statuses, view.progress(runs)), view.sweep_params(sweep)
        self.store.write(known, digest, metrics, params)
        self.store.close(known, status, max([view.millis(sweep.started_at), *map(view.end_millis, runs)]))
        return 1, known.run_id

    def _cell(self, name: str, parent: str, final: bool) -> tuple[int, str]:
        key, sweep, runs = f"cell/{name}", self._tree.sweep, self._tree.cells[name]
        first = runs[0].run
        if runs[0].forgotten is not None and key not in self.store.known:
            raise Forgotten
        known = self.store.ensure(key, name, view.cell_tags(first), parent, view.millis(first.started_at))
        ended = [h.run for h in runs if h.run.status != "running"]
        old = first.phase == "search" and not sweep.search_runs  # a record that does not say how many there were to be
        complete = len(ended) >= view.planned_runs(sweep, first) or (final and old)
        status = view.end_of([h.run.status for h in runs], final, complete)
        digest = f"{status} {len(ended)} {sum(r.attempt for r in ended)}"
        if known.state == digest and known.status == status:
            return 0, known.run_id
        metrics = view.cell_metrics([h.run for h in runs])
        note = {"mlflow.note.content": view.cell_note(metrics)}
        self.store.write(known, digest, metrics, view.cell_params(first, sweep), note)
        self.store.close(known, status, max(view.end_millis(h.run) for h in runs))
        return 1, known.run_id

    def _run(self, history: History, parent: str, final: bool) -> int:
        run, key = history.run, f"run/{history.run.run_key}"
        status = ENDS.get(run.status, "KILLED" if final else "RUNNING")
        digest = f"{status} {history.epoch_count}"
        known = self.store.known.get(key)
        if history.forgotten is not None and (known is None or (known.state, known.status) != (digest, status)):
            raise Forgotten
        if known is not None and known.attempt != run.attempt:  # an earlier attempt: its numbers are not this one's
            self.store.delete(key)
        name, tags = view.run_name(run, history.number), view.run_tags(run)
        known = self.store.ensure(key, name, tags, parent, view.millis(run.started_at))
        if known.state == digest and known.status == status:  # the server may die between the two
            return 0
        metrics = view.epoch_metrics(run, history.epochs[known.epochs :])
        if run.status != "running":
            metrics += view.final_metrics(run)
        tags = view.end_tags(run) | {"fastbp.epochs": str(len(history.epochs))}
        self.store.write(known, digest, metrics, view.run_params(run), tags)
        known.epochs = len(history.epochs)
        self.store.close(known, status, view.end_millis(run))
        return 1

    def _upload_records(self, size: int, final: bool) -> int:
        """Attach the records as one file, from which the report can be made without this folder.

        One artifact per run would take a request each to write and to read. The file is replaced where it changed:
        always at the end and while it is small, otherwise when it grew by a tenth, so that all uploads together cost
        ten of the last. Folders that share a sweep, as a copy does with its original, have a file each.

        Args:
            size: bytes of the records to upload; what is appended meanwhile waits for the next time.
        """
        known = self.store.known["sweep"]
        place = f"{platform.node()}:{self.records.resolve()}"
        name = f"records-{hashlib.sha256(place.encode()).hexdigest()[:8]}.jsonl.gz"
        before = self.store.uploaded.get(UPLOADED + name, -1)
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
            self.store.attach(known, packed, RECORDS_FOLDER)
        self.store.attached(known, UPLOADED + name, size)
        return 1


def default_uri(configured: str | None) -> str:
    """The tracking store: the sweep file's, else MLFLOW_TRACKING_URI, else mlruns.db in this folder."""
    return configured or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path.cwd() / 'mlruns.db'}"


def try_sync(mirror: MlflowMirror | None, **how: Any) -> str:
    """`MlflowMirror.sync`; whatever goes wrong comes back as one line instead of an exception, no record is lost."""
    if mirror is None:
        return ""
    try:
        mirror.sync(**how)
    except Exception as error:  # the sweep must outlive anything its tracker does
        return sentence(error, mirror.uri)
    return ""
