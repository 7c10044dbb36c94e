"""`fastbp-sweep doctor`: what would stop a sweep, or spoil its times, before it is started. Changes nothing."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from fastbp.installation import part, torchvision_mismatch
from fastbp.sources import data_root, first_load
from sweeps.job import HOME_TOKEN, connect, token_source, use_token
from sweeps.source import SweepError, without_password
from sweeps.spec import Sweep, load_sweep
from trainables.free_device import spare_cores, unwatched

NEEDED = ("ray", "optuna", "mlflow")  # by a sweep; the others by some models, or by the report
LOW_BYTES, LEAST_BYTES = 2 << 30, 200 << 20  # of free disk: a warning, a failure
BUSY_MEMORY = 0.25  # share of a GPU's memory in use, from which measured times suffer


@dataclass(frozen=True)
class Finding:
    """One line of the table.

    Attributes:
        what: was looked at.
        state: fail: a sweep will not run; warn: it runs, and something will be missing or spoilt.
        said: what was found.
        fix: what to do about it; empty where nothing is.
    """

    what: str
    state: Literal["ok", "warn", "fail"]
    said: str
    fix: str = ""


def examine(file: str | None, address: str | None, out: Path | None) -> Iterator[Finding]:
    """Look at everything a sweep needs; quick things first.

    Args:
        file: a sweep file, or None.
        address: of a cluster's dashboard; None: sweeps run on this machine.
        out: output folder, where not the sweep's own.
    """
    use_token()  # before Ray is imported
    yield from versions()
    sweep: Sweep | None = None
    if file is not None:
        sweep, finding = _sweep(file)
        yield finding
        if sweep is not None:
            yield (data := _data(sweep))
            yield _arms(file, sweep, data)
    if address is None:
        yield from devices(sweep.exclusive.threads if sweep and sweep.exclusive else None)
    yield from cluster(address)
    yield mlflow_store(sweep.mlflow.tracking_uri if sweep else None)
    yield from folders(sweep, out, far=address is not None)


def versions() -> Iterator[Finding]:
    """Python, torch and what comes with the extras."""
    yield Finding("python", "ok", platform.python_version())
    vision = part("torchvision")
    mismatch = torchvision_mismatch(torch.__version__, vision.version) if vision.version else ""
    fix = "install a matching pair from the same index, for example: pip install -U torch torchvision"
    if vision.error or mismatch:
        yield Finding("torch", "fail", mismatch or f"torchvision fails to import: {vision.error}", fix)
    else:
        with_vision = f", torchvision {vision.version}" if vision.version else ""
        yield Finding("torch", "ok", torch.__version__ + with_vision)
    for name in (*NEEDED, "timm", "pandas", "moocore"):
        found = part(name)
        install = f"pip install 'fastbp[{found.extra}]'"
        state = "fail" if name in NEEDED else "warn"
        if found.error:
            yield Finding(name, state, f"does not import: {found.error}", f"pip install --force-reinstall {name}")
        elif found.version is None:
            use = {"sweep": "sweeps", "report": "fastbp-report", "vision": "models timm:NAME"}[found.extra]
            yield Finding(name, state, f"not installed; {use} need it", install)
        else:
            yield Finding(name, "ok", found.version)


def devices(threads: int | None = None) -> Iterator[Finding]:
    """What runs will train on, and whether something else computes there now.

    Args:
        threads: of a measured run on the CPU; None: all.
    """
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            name = f"{torch.cuda.get_device_name(index)}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
            used = (total - free) / total > BUSY_MEMORY
            fix = "measured runs need the device to themselves: see nvidia-smi, and wait" if used else ""
            yield Finding(f"GPU {index}", "warn" if used else "ok", name, fix)
            if unwatched(torch.device("cuda", index)):
                said = "nobody sees whether others use it during a measured run"
                yield Finding(f"GPU {index} watch", "warn", said, "pip install 'fastbp[energy]', and see nvidia-smi")
    else:
        yield Finding("GPU", "ok", f"torch {torch.__version__} sees none: runs train on the CPU")
    cores = len(os.sched_getaffinity(0))
    load = os.getloadavg()[0]
    busy = load >= spare_cores(threads or cores)
    fix = "measured runs need their cores to themselves: see top, and wait" if busy else ""
    yield Finding("CPU", "warn" if busy else "ok", f"{cores} cores, load {load:.1f} over the last minute", fix)
    shared = Path("/dev/shm")
    if shared.is_dir() and shutil.disk_usage(shared).free < 128 << 20:
        yield Finding("/dev/shm", "warn", "less than 128 MiB free: Ray is slow without it", "docker run --shm-size=1g")


def cluster(address: str | None) -> Iterator[Finding]:
    """Ray: its token here, and the head node where there is one."""
    mode, source = os.environ.get("RAY_AUTH_MODE", ""), token_source()
    token = HOME_TOKEN.expanduser()
    if token.is_file() and token.stat().st_mode & 0o077:
        yield Finding("Ray token", "warn", f"{HOME_TOKEN} can be read by others", f"chmod 600 {HOME_TOKEN}")
    elif mode == "token" and not source and address is not None:
        fix = "copy the head node's ~/.ray/auth_token to the same place here, or set RAY_AUTH_TOKEN_PATH"
        yield Finding("Ray token", "fail", "RAY_AUTH_MODE=token, and there is no token", fix)
        return
    else:
        said = f"from {source}" if source else "none here; a sweep on this machine makes its own"
        yield Finding("Ray token", "ok", said + (f", RAY_AUTH_MODE={mode}" if mode else ""))
    if address is None:
        return
    try:
        client = connect(address if "://" in address else f"http://{address}")
    except SweepError as error:
        yield Finding("Ray head", "fail", *_halves(str(error)))
        return
    import ray

    theirs = getattr(client, "_server_ray_version", None) or "unknown"
    if theirs == ray.__version__:
        yield Finding("Ray head", "ok", f"{without_password(address)} answers, Ray {theirs}")
    else:
        said = f"runs Ray {theirs}, this is {ray.__version__}"
        yield Finding("Ray head", "warn", said, f"pip install 'ray[default,tune]=={theirs}' here")


def mlflow_store(configured: str | None) -> Finding:
    """Whether MLflow's store answers, to us, and is of this version."""
    from mlflow import MlflowClient

    from sweeps.mlflow_errors import cleaned, problem
    from sweeps.mlflow_sync import default_uri

    uri = default_uri(configured)
    shown = without_password(uri)
    database = Path(uri.removeprefix("sqlite:///"))
    if uri.startswith("sqlite:///") and not database.exists():
        return _writable("MLflow", database.parent, f"{shown}, which the first sweep makes")
    try:
        MlflowClient(tracking_uri=uri).search_experiments(max_results=1)
    except Exception as error:  # the finding is what kind
        text = cleaned(str(error).strip())
        said, fix = problem(text, uri)
        first = (text.splitlines() or [type(error).__name__])[0][:200]
        return Finding("MLflow", "fail", f"{shown}: {said or first}", fix or "see the server's log")
    return Finding("MLflow", "ok", f"{shown} answers")


def folders(sweep: Sweep | None, out: Path | None, *, far: bool) -> Iterator[Finding]:
    """Where results and caches go: writable, with space left."""
    name = sweep.name if sweep else ""
    if far:
        where = out or "not given"
        yield Finding("output", "ok", f"{where}: not looked at from here; every node must see the same folder")
    else:
        yield _writable("output", (out or Path("fastbp-runs") / name).absolute())
        yield _writable("Ray files", Path(os.environ.get("RAY_TMPDIR", tempfile.gettempdir())) / "ray")
    storage = sweep.storage_path if sweep else None
    if storage and "://" not in storage and not far:
        yield _writable("storage_path", Path(storage).absolute())
    elif storage:
        yield Finding("storage_path", "ok", f"{storage}: not looked at from here")
    if not far:
        yield _writable("data cache", data_root())


def _writable(what: str, folder: Path, said: str = "") -> Finding:
    """Whether files can be made in a folder, which may not exist yet, and how much space is left there."""
    there = folder
    while not there.exists():
        there = there.parent
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        fix = "give another folder, or make it writable"
        return Finding(what, "fail", f"{folder}: cannot be written ({error.strerror})", fix)
    free = shutil.disk_usage(there).free
    text = f"{said or folder}, {free / 2**30:.1f} GiB free"
    if free < LOW_BYTES:
        return Finding(what, "fail" if free < LEAST_BYTES else "warn", text, "make space, or give another disk")
    return Finding(what, "ok", text)


def _sweep(file: str) -> tuple[Sweep | None, Finding]:
    from sweeps.plan import find_sweep

    try:
        sweep = load_sweep(*find_sweep(file))[0]
    except SweepError as error:
        return None, Finding("sweep file", "fail", str(error), "correct the file")
    parts = [name for name in ("search", "measure", "ablate") if getattr(sweep, name, None)]
    return sweep, Finding("sweep file", "ok", f"{file}: sweep {sweep.name}, {len(sweep.arms)} arms, {', '.join(parts)}")


def _data(sweep: Sweep) -> Finding:
    """The data set: its path, where it has one, and what its first load would do."""
    kind, colon, path = sweep.task.data.partition(":")
    found = Path(path).expanduser()
    if colon and kind in ("folder", "text") and not found.exists():
        fix = f"correct task.data; relative paths start at {Path.cwd()}, and on a cluster every node needs the {kind}"
        return Finding("data", "fail", f"{sweep.task.data}: {found.absolute()} does not exist", fix)
    try:
        first = first_load(kind, path, sweep.task.data_args.get("size"))
    except (ValueError, ImportError) as error:
        return Finding("data", "fail", str(error), "correct the folder, or task.data and its arguments")
    shown = str(found.absolute()) if colon else kind
    if first:
        return Finding("data", "warn", f"{shown}: would be {first}", "the first run does it; or load it once before")
    return Finding("data", "ok", shown)


def _arms(file: str, sweep: Sweep, data: Finding) -> Finding:
    """Whether the arms bind to the model; binding loads data and model, which must not fetch anything here."""
    from sweeps.plan import load_plan

    weights = [name for name in ("pretrained", "weights", "checkpoint_path") if sweep.task.model_args.get(name)]
    if data.state != "ok" or weights:
        lacks = f"task.model_args.{weights[0]} may be downloaded" if weights else "the data is not here yet"
        return Finding(
            "arms", "warn", f"not bound to the model: {lacks}", "fastbp-sweep plan does it, and fetches them"
        )
    try:
        plan = load_plan(file)
    except SweepError as error:
        return Finding("arms", "fail", str(error), "correct the file, or what it names")
    return Finding("arms", "ok", f"data loads, and {len(plan.arms)} arms bind to the model")


def _halves(sentence: str) -> tuple[str, str]:
    """A sentence `what is wrong: what to do` as its two parts."""
    said, _, fix = sentence.partition(": ")
    return said, fix
