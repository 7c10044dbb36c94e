"""A sweep as one job of a Ray cluster: handed over, its log followed, its exit code ours.

Ray's client says 1 for every failure; the entry point's own code is in the job's details. Submitted again, a sweep that
is still running is followed, not doubled.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from sweeps.source import SweepError, without_password
from sweeps.submit import NOT_UPLOADED, Submission, excludes

Say = Callable[[str], None]
UPLOAD_MIB = 100  # what a head node takes at most (Ray's DASHBOARD_CLIENT_MAX_SIZE)
RECONNECTS = 30  # tries, 2 s apart, before a head that stopped answering is given up
NO_AGENT = "No available agent"  # what a head node says that cannot start jobs, yet or at all
HOME_TOKEN = Path("~/.ray/auth_token")


def submit(request: Submission, *, wait: bool, say: Say) -> int:
    """Start the job, or find it running, and follow it to its end.

    Returns:
        the entry point's exit code; 0 at once without `wait`; 130 where following was interrupted or the job stopped.

    Raises:
        SweepError: the cluster cannot be reached or refuses.
    """
    client = connect(request.address)
    with _refusals(request):
        job = _running(client, request.metadata)
        if job:
            later = "; submit --remeasure once it has ended" if "--remeasure" in request.command else ""
            say(f"job {job} is running this sweep already; nothing was submitted{later}")
        else:
            say(f"uploading {request.folder} to {without_password(request.address)}")
            job = _submitted(client, request, say)
            say(f"job {job}: {shlex.join(request.command)}")
    if not wait:
        say(_goes_on(request.address, job))
        return 0
    return follow(client, job, request.address, say)


def _submitted(client: Any, request: Submission, say: Say) -> str:
    """The id of a new job; a head that has just started may not have its agent yet, which is waited for."""
    for left in reversed(range(RECONNECTS)):
        try:
            return client.submit_job(
                entrypoint=shlex.join(request.command),
                submission_id=f"{request.metadata['fastbp.sweep']}-{secrets.token_hex(4)}",
                runtime_env={
                    "working_dir": str(request.folder),
                    "excludes": excludes(request.folder),
                    "env_vars": request.env,
                },
                metadata=request.metadata,
            )
        except RuntimeError as error:
            if NO_AGENT not in str(error) or not left:
                raise
            if left == RECONNECTS - 1:
                say("the head node is still starting; trying again")
            time.sleep(2.0)
    raise AssertionError("the last try returns or raises")


def connect(address: str) -> Any:
    """A client of the job server, which has answered.

    Raises:
        SweepError: nobody answers, or the token is missing or wrong.
    """
    use_token()
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):  # Ray would let them overrule the address
        os.environ.pop(name, None)
    import logging

    import requests
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    for name in ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("ray._private.runtime_env.packaging").setLevel(logging.ERROR)
    shown = without_password(address)
    try:
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        raise SweepError(token_sentence(shown, str(error))) from error
    except (ConnectionError, requests.exceptions.RequestException) as error:
        raise SweepError(
            f"no Ray head answers at {shown}: is it running, and is this its dashboard's address (port 8265)? "
            f"From afar: ssh -N -L 8265:127.0.0.1:8265 HEAD, then --address http://127.0.0.1:8265"
        ) from error
    except (RuntimeError, ValueError, KeyError) as error:
        raise SweepError(f"{shown} is not the dashboard of a Ray head ({_first_line(error)})") from error


def use_token() -> None:
    """Send Ray's token wherever there is one; before Ray is imported, which is when it reads how to authenticate."""
    if not os.environ.get("RAY_AUTH_MODE") and token_source():
        os.environ["RAY_AUTH_MODE"] = "token"


def token_source() -> str:
    """Where Ray will find a token: a name or path for messages, or empty."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return "RAY_AUTH_TOKEN"
    path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    if path:
        return path if Path(path).is_file() else ""
    return str(HOME_TOKEN) if HOME_TOKEN.expanduser().is_file() else ""


def token_sentence(address: str, error: str) -> str:
    """The fix for a missing or a wrong token."""
    source = token_source()
    if os.environ.get("RAY_AUTH_MODE", "").lower() == "disabled":
        return f"{address} asks for a token, and RAY_AUTH_MODE=disabled keeps it back: unset RAY_AUTH_MODE"
    if not source and os.environ.get("RAY_AUTH_MODE", "").lower() == "token":  # Ray did not even ask
        return "RAY_AUTH_MODE=token, and there is no token: copy the head node's ~/.ray/auth_token to this machine's"
    if not source or ("403" not in error and "invalid" not in error.lower()):
        return (
            f"{address} asks for a token and none was found here: copy the head node's ~/.ray/auth_token to this "
            f"machine's ~/.ray/auth_token, or set RAY_AUTH_TOKEN_PATH to a copy of it"
        )
    return (
        f"{address} refuses the token of {source}: replace it by the head node's ~/.ray/auth_token "
        f"(`ray get-auth-token` prints it there)"
    )


def follow(client: Any, job: str, address: str, say: Say) -> int:
    """Print the job's log until it ends; through interruptions of the connection, each line once.

    Returns:
        its entry point's exit code; 130 where Ctrl-C ended the following (the job goes on) or somebody stopped the job.
    """
    shown = _Shown()
    failures = 0
    try:
        while True:
            try:
                asyncio.run(_print_log(client, job, shown))
                info = client.get_job_info(job)
                failures = 0
                if info.status.is_terminal():
                    return _end(info, job, say)
            except Exception as error:  # of the connection, in whatever library; the job itself has a status
                failures += 1
                if failures > RECONNECTS:
                    say(f"{without_password(address)} stopped answering ({_first_line(error)})")
                    say(_goes_on(address, job))
                    return 1
            time.sleep(2.0 if failures else 0.5)
    except KeyboardInterrupt:
        say(_goes_on(address, job))
        return 130


@dataclass
class _Shown:
    characters: int = 0


async def _print_log(client: Any, job: str, shown: _Shown) -> None:
    """Print what the log has beyond the characters already shown; it is always sent from its beginning."""
    skip = shown.characters
    async for text in client.tail_job_logs(job):
        new, skip = text[skip:], max(0, skip - len(text))
        shown.characters += len(new)
        sys.stdout.write(new)
        sys.stdout.flush()


def _end(info: Any, job: str, say: Say) -> int:
    """The exit code of a job that ended, and a word where its log does not say why."""
    status, code = str(info.status.value), info.driver_exit_code
    if status == "SUCCEEDED":
        return 0
    if status == "STOPPED":
        say(f"job {job} was stopped; submitted again, it continues where --out is a folder that stayed")
        return 130
    if code is None:
        reason = without_password(_first_line(info.message or "no reason given"))
        say(f"job {job} failed before the sweep began: {reason}")
        return 1
    if code == 127:
        say("fastbp-sweep is not installed on the cluster, or not on the PATH that `ray start` had there")
    elif code < 0:
        say(f"job {job} was killed by signal {-code}")
        return 128 - code
    return code


def _running(client: Any, metadata: dict[str, str]) -> str:
    """The id of a job that does this very sweep at the moment, or empty."""
    for job in client.list_jobs():
        if job.submission_id and not job.status.is_terminal() and (job.metadata or {}).items() >= metadata.items():
            return job.submission_id
    return ""


def _goes_on(address: str, job: str) -> str:
    return (
        f"job {job} goes on; follow it: the same command again; "
        f"stop it: ray job stop --address {without_password(address)} {job}"
    )


@contextlib.contextmanager
def _refusals(request: Submission) -> Iterator[None]:
    """What goes wrong while the job is handed over, as one sentence."""
    import requests
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError as error:
        raise SweepError(token_sentence(without_password(request.address), str(error))) from error
    except (RuntimeError, ValueError, ConnectionError, requests.exceptions.RequestException) as error:
        sizes = _sizes(request.folder)
        if sum(sizes.values()) > UPLOAD_MIB * 2**20 or "maximum size" in str(error):
            largest = sorted(sizes, key=lambda name: -sizes[name])[:3]
            listed = ", ".join(f"{name} {sizes[name] / 2**20:.0f} MiB" for name in largest)
            raise SweepError(
                f"{request.folder} is too large to upload (largest: {listed}; a head node takes {UPLOAD_MIB} MiB): "
                f"list what the job does not need in .rayignore there, or give a smaller --working-dir"
            ) from error
        reason = without_password(_first_line(error))
        if NO_AGENT in reason:
            reason += (
                " (another Ray on that machine may hold its agent's port: ray start --dashboard-agent-listen-port=0)"
            )
        raise SweepError(f"{without_password(request.address)} refused the job: {reason}") from error


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of everything in a folder that may be uploaded, by name."""
    out: dict[str, int] = {}
    for entry in folder.iterdir():
        if any(fnmatch(entry.name, pattern) for pattern in NOT_UPLOADED):
            continue
        files = entry.rglob("*") if entry.is_dir() else [entry]
        out[entry.name] = sum(f.lstat().st_size for f in files if f.is_file())
    return out


def _first_line(error: object) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[-1][:300] if "Traceback" in str(error) else (lines or ["?"])[0][:300]
