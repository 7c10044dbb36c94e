"""Records out of an MLflow experiment: every tracked sweep carries the records of all its runs as artifacts."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from analysis.errors import ReportError
from analysis.sources import File

LEVEL_TAG, KEY_TAG = "fastbp.level", "fastbp.run_key"
FOLDER = "records"  # of a sweep's artifacts: one file per machine that synced it


def split_uri(experiment: str, tracking_uri: str | None) -> tuple[str, str]:
    """Name and tracking URI of `NAME` or `NAME@URI`.

    >>> split_uri("demo@http://127.0.0.1:5000", None)
    ('demo', 'http://127.0.0.1:5000')

    Raises:
        ReportError: there is no URI, and no store where one would be expected.
    """
    found = re.fullmatch(r"(.*?)@([A-Za-z][\w+.-]*:/.*)", experiment, re.DOTALL)
    name, uri = found.groups() if found else (experiment, tracking_uri or os.environ.get("MLFLOW_TRACKING_URI"))
    if not uri:
        uri = f"sqlite:///{Path.cwd() / 'mlruns.db'}"
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///").partition("?")[0]).is_file():
        raise ReportError(
            f"{uri.removeprefix('sqlite:///')}: no MLflow store; run in the folder of the sweep, "
            "or name the store with --tracking-uri"
        )
    return name, uri


@contextlib.contextmanager
def downloaded_records(experiment: str, tracking_uri: str | None, problems: list[str]) -> Iterator[list[File]]:
    """Record files of an experiment; they live as long as the context.

    Args:
        experiment: `NAME` or `NAME@URI`.

    Raises:
        ReportError: no mlflow, no store, no such experiment, or no sweep of ours in it.
    """
    with tempfile.TemporaryDirectory() as folder:
        yield list(_downloaded(experiment, tracking_uri, Path(folder), problems))


def _downloaded(experiment: str, tracking_uri: str | None, folder: Path, problems: list[str]) -> Iterator[File]:
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    name, uri = split_uri(experiment, tracking_uri)
    try:
        import mlflow
    except ImportError as error:
        raise ReportError(f"mlflow:{name}: needs the package mlflow (pip install 'fastbp[sweep]')") from error
    try:
        client = mlflow.MlflowClient(tracking_uri=uri)
        found = client.get_experiment_by_name(name)
        if found is None:
            known = ", ".join(sorted(e.name for e in client.search_experiments(max_results=50)))
            raise ReportError(f"mlflow:{name}: no such experiment; there are: {known}")
        sweeps = _sweeps(client, found.experiment_id)
        if not sweeps:
            raise ReportError(f"mlflow:{name}: the experiment has no sweep of this project")
        for i, sweep in enumerate(sweeps):
            target = folder / str(i)
            target.mkdir()
            for path, file in _records(client, sweep, target, problems):
                yield File(path, file, (uri, found.experiment_id))
    except ReportError:
        raise
    except Exception as error:  # whatever a store, a database driver or a network may raise
        raise ReportError(f"mlflow:{name}: the tracking store answers: {_reason(error)}") from error


_SETTINGS = {
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # an absent server: seconds, not minutes
}


def _sweeps(client: Any, experiment_id: str) -> list[Any]:
    """The tracked sweeps of an experiment, by run id."""
    return sorted(_found(client, experiment_id, f"tags.`{LEVEL_TAG}` = 'sweep'"), key=lambda sweep: sweep.info.run_id)


def _found(client: Any, experiment_id: str, condition: str) -> Iterator[Any]:
    """All runs of an experiment that meet a condition."""
    token = None
    while True:
        page = client.search_runs([experiment_id], condition, max_results=1000, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def measured_run_ids(uri: str, experiment_id: str, problems: list[str]) -> dict[str, str]:
    """Run key to MLflow's run id for the runs of an experiment outside the search; of several, the last attempt's.

    A store that does not answer costs the links, not the report.
    """
    import mlflow

    condition = f"tags.`{LEVEL_TAG}` = 'run' and tags.phase != 'search'"
    try:
        runs = list(_found(mlflow.MlflowClient(tracking_uri=uri), experiment_id, condition))
        runs.sort(key=lambda run: (int(run.data.tags.get("fastbp.attempt", "0")), run.info.run_id))
    except Exception as error:  # as above
        problems.append(f"the tracking store does not name its runs, so they have no links: {_reason(error)}")
        return {}
    return {run.data.tags.get(KEY_TAG, ""): run.info.run_id for run in runs}


def _records(client: Any, sweep: Any, folder: Path, problems: list[str]) -> Iterator[tuple[Path, str]]:
    """The record files of one sweep."""
    run_id = sweep.info.run_id
    name = sweep.info.run_name or run_id
    files = [item.path for item in client.list_artifacts(run_id, FOLDER) if not item.is_dir]
    if not files:
        problems.append(f"{name}: the tracked sweep has no records and is left out; mend it with fastbp-sweep sync")
    for file in sorted(files):
        yield Path(client.download_artifacts(run_id, file, str(folder))), f"{name}/{file}"


def _reason(error: Exception) -> str:
    """The first line of what an error says, without a password."""
    return _without_password((str(error).strip().splitlines() or [type(error).__name__])[0])


_USER = re.compile(
    r"://(?!/)(?:[^\s/:@'\"]*:(?!\d{1,5}(?=[/?#]))[^\s'\"]*|[^\s/:@'\"]*:[^\s?#'\"]*|[^\s/'\"]*)@"
)  # user:password@, unescaped ones too; host:port/path@; user@
_SECRET = re.compile(r"([?&;][\w.-]*(?:passw(?:or)?d|pwd|token|secret|api_?key)[\w.-]*=)[^&;#\s'\"]+", re.IGNORECASE)


def _without_password(text: str) -> str:
    """As `sweeps.source.without_password`, which this package does not import; a test holds them together."""
    return _SECRET.sub(r"\1***", _USER.sub("://", text))
