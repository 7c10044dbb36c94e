"""Records out of an MLflow experiment: each tracked run carries its own record lines as an artifact."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from analysis.errors import ReportError

RUN_KEY_TAG = "fastbp.run_key"
LEVEL_TAG = "fastbp.level"
RUN_ARTIFACT = "records.jsonl"
SWEEP_ARTIFACT = "sweep.jsonl"


def tracking_uri() -> str:
    """`MLFLOW_TRACKING_URI`, or the sqlite store that a sweep makes in the current folder.

    Raises:
        ReportError: neither is there.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if uri:
        return uri
    path = Path.cwd() / "mlruns.db"
    if not path.exists():
        raise ReportError(f"{path}: no MLflow store; run in the folder of the sweep or set MLFLOW_TRACKING_URI")
    return f"sqlite:///{path}"


def downloaded_records(experiment: str, problems: list[str]) -> Iterator[tuple[Path, str]]:
    """Record files of an experiment and their names; the files live until the iterator is exhausted.

    Raises:
        ReportError: no mlflow, no store, no such experiment, or no run of ours in it.
    """
    try:
        import mlflow
        from mlflow.exceptions import MlflowException
    except ImportError as error:
        raise ReportError(f"mlflow:{experiment}: needs the package mlflow (pip install 'fastbp[sweep]')") from error
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    try:
        client = mlflow.MlflowClient(tracking_uri=tracking_uri())
        found = client.get_experiment_by_name(experiment)
        if found is None:
            known = ", ".join(sorted(e.name for e in client.search_experiments()))
            raise ReportError(f"mlflow:{experiment}: no such experiment; there are: {known}")
        wanted = [(run, artifact) for run in _runs(client, found.experiment_id) if (artifact := _artifact(run))]
        if not wanted:
            raise ReportError(f"mlflow:{experiment}: the experiment has no run written by a sweep of this project")
        with tempfile.TemporaryDirectory() as folder:
            for run, artifact in wanted:
                yield from _download(client, run, artifact, Path(folder), problems)
    except MlflowException as error:
        reason = str(error).splitlines()[0]
        raise ReportError(f"mlflow:{experiment}: the tracking store answers: {reason}") from error


def _runs(client: Any, experiment_id: str) -> list[Any]:
    """All active runs, by run id."""
    runs: list[Any] = []
    token = None
    while True:
        page = client.search_runs([experiment_id], max_results=1000, page_token=token)
        runs += page
        token = page.token
        if not token:
            return sorted(runs, key=lambda run: run.info.run_id)


def _artifact(run: Any) -> str | None:
    tags = run.data.tags
    if tags.get(RUN_KEY_TAG):
        return RUN_ARTIFACT
    return SWEEP_ARTIFACT if tags.get(LEVEL_TAG) == "sweep" else None


def _download(client: Any, run: Any, artifact: str, folder: Path, problems: list[str]) -> Iterator[tuple[Path, str]]:
    target = folder / run.info.run_id
    target.mkdir()
    name = run.data.tags.get(RUN_KEY_TAG) or run.info.run_name or run.info.run_id
    if all(item.path != artifact for item in client.list_artifacts(run.info.run_id)):
        problems.append(f"{name}: the tracked run has no artifact {artifact} and is left out")
        return
    yield Path(client.download_artifacts(run.info.run_id, artifact, str(target))), f"{name}/{artifact}"
