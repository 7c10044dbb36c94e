"""What `fastbp-sweep submit` hands to a Ray cluster, checked before a byte is sent.

Credentials come from this machine's environment, travel in the job's runtime environment and are printed nowhere;
whoever holds the cluster's token can read them in Ray's dashboard.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from urllib.parse import urlsplit

from fastbp.environment import git_state
from sweeps.plan import find_sweep, load_plan
from sweeps.source import SweepError, without_password

PASSED_ON = ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_INSECURE_TLS")
SECRETS = ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")  # Ray writes a job's environment into its logs
FIXED = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "RAY_JOB_STOP_WAIT_TIME_S": "60",  # `ray job stop` gives a sweep this long to close its runs; Ray's own: 3
}
NOT_UPLOADED = [
    *(".git", ".venv", "venv", "node_modules", "__pycache__", ".pytest_cache", ".ruff_cache", ".cache"),
    *("fastbp-runs", "mlruns", "mlruns.db*", "mlartifacts"),
]


@dataclass(frozen=True)
class Submission:
    """What is handed to the cluster.

    Attributes:
        address: of the head node's dashboard.
        folder: uploaded, and the job's working directory.
        command: the entry point.
        env: of the job; may hold credentials.
        metadata: by which a later submission recognises the job.
        tracking_uri: of MLflow, as the job will see it; empty: none.
    """

    address: str
    folder: Path
    command: list[str]
    env: dict[str, str]
    metadata: dict[str, str]
    tracking_uri: str = ""


def prepare(
    file: str,
    *,
    address: str,
    out: str | None,
    working_dir: Path,
    env: list[str],
    smoke: bool = False,
    remeasure: bool = False,
) -> Submission:
    """Check everything that can be checked before a byte is sent.

    Args:
        file: the sweep file, inside `working_dir`, or the name of a packaged one.
        address: of the head node's dashboard.
        out: output folder as the cluster's nodes see it.
        working_dir: uploaded, and the job's working directory.
        env: NAME (its value here) or NAME=VALUE each.
        smoke: the sweep at its smallest.
        remeasure: whether measured runs that shared their device run again, with all of their block.

    Raises:
        SweepError: the sweep, the address, the folder or the environment cannot be used; nothing was sent.
    """
    if not working_dir.is_dir():
        raise SweepError(f"--working-dir {working_dir}: no such folder")
    folder = working_dir.resolve()
    inside = _inside(file, folder)
    variables = _environment(env)
    with contextlib.chdir(folder):
        sys.path += [str(folder)] if str(folder) not in sys.path else []
        sweep = load_plan(inside, smoke=smoke).sweep
        commit, dirty = git_state()
    uri = sweep.mlflow.tracking_uri or variables.get("MLFLOW_TRACKING_URI", "")
    _check_kept(out, uri)
    if commit:
        variables |= {"FASTBP_GIT_COMMIT": commit, "FASTBP_GIT_DIRTY": str(int(bool(dirty)))}
    command = ["fastbp-sweep", "run", inside, *(["--out", out] if out else [])]
    command += ["--smoke"] * smoke + ["--remeasure"] * remeasure
    metadata = {"fastbp.sweep": sweep.name, "fastbp.hash": sweep.hash, "fastbp.out": out or ""}
    return Submission(_address(address), folder, command, FIXED | variables, metadata, uri)


def warnings(request: Submission) -> list[str]:
    """What is allowed and yet seldom meant."""
    return [*_secrets(request), *_tracking(request)]


def _secrets(request: Submission) -> list[str]:
    """What stays here, or had better."""
    sent = [name for name in SECRETS if name in request.env]
    kept = [name for name in SECRETS if os.environ.get(name) and name not in request.env]
    return [
        f"warning: {name} goes with --env into the job's environment, which Ray writes into its logs" for name in sent
    ] + [f"{name} is not sent, as Ray logs a job's environment: set it where the head node is started" for name in kept]


def _tracking(request: Submission) -> list[str]:
    uri = request.tracking_uri
    host = urlsplit(uri).hostname if uri.startswith(("http://", "https://")) else None
    if host in ("localhost", "127.0.0.1", "::1") and urlsplit(request.address).hostname != host:
        return [f"warning: MLflow at {without_password(uri)} is this machine's own; the job looks for one on its own"]
    if not uri:
        return ["no MLFLOW_TRACKING_URI: MLflow gets nothing; later: fastbp-sweep sync on a copy of the --out folder"]
    return []


def _address(text: str) -> str:
    address = text if "://" in text else f"http://{text}"
    if not address.startswith(("http://", "https://")):
        raise SweepError(f"--address {without_password(text)}: expected the dashboard's, such as http://HEAD:8265")
    return address.rstrip("/")


def _inside(file: str, folder: Path) -> str:
    """The sweep file as the job will name it."""
    path = Path(file)
    if not path.exists() and (folder / file).is_file():
        path = folder / file
    if not path.is_file():
        find_sweep(file)
        return file  # a packaged one
    if not path.resolve().is_relative_to(folder):
        raise SweepError(
            f"{file} is outside {folder}, which is what the job sees: move it there, or give --working-dir"
        )
    inside = path.resolve().relative_to(folder)
    if any(fnmatch(part, pattern) for part in inside.parts for pattern in NOT_UPLOADED):
        raise SweepError(f"{file} is not uploaded, as nothing in {', '.join(inside.parts[:-1])} is: put it elsewhere")
    git = ["git", "-C", str(folder), "check-ignore", "--no-index", "-q", str(inside)]
    if shutil.which("git") and subprocess.run(git, check=False, capture_output=True).returncode == 0:
        raise SweepError(f"{file} is ignored by git, and Ray uploads nothing that is: take it out of .gitignore")
    return str(inside)


def _environment(settings: list[str]) -> dict[str, str]:
    """What the job's environment gets from here; a value may be secret, so none is in any message.

    A password in the URL stays here too.
    """
    out = {name: without_password(os.environ[name]) for name in PASSED_ON if os.environ.get(name)}
    for name, value in out.items():
        if value.count("=***") > os.environ[name].count("=***"):
            raise SweepError(
                f"{name} has a password as a parameter, and Ray writes a job's environment into its logs: set it where "
                "the head node is started, and unset it here"
            )
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise SweepError(f"--env {name}: expected NAME or NAME=VALUE")
        if not equals and name not in os.environ:
            raise SweepError(f"--env {name}: it is not set here; set it, or give --env {name}=VALUE")
        out[name] = value if equals else os.environ[name]
    return out


def _check_kept(out: str | None, uri: str) -> None:
    """A job's working directory is thrown away: something has to stay."""
    if out and not out.startswith("/"):
        raise SweepError(f"--out {out}: give an absolute path; a relative one is inside the job's temporary folder")
    if not out and not uri.startswith(("http://", "https://")):
        raise SweepError(
            "nothing of this sweep would stay, as the job's folder is temporary: give --out FOLDER (an absolute path "
            "that every node sees), or set MLFLOW_TRACKING_URI to a server"
        )


def excludes(folder: Path) -> list[str]:
    """Patterns, as in .gitignore, of what a job never needs."""
    data = Path(os.environ.get("FASTBP_DATA", "")).expanduser()
    inside = data.is_absolute() and data != folder and data.is_relative_to(folder)
    return NOT_UPLOADED + ([f"/{data.relative_to(folder)}"] if inside else [])
