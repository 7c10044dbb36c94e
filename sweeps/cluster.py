"""Attach to the Ray cluster at hand, or start a quiet private one."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shlex
import sys
from collections.abc import Iterator

from sweeps.source import SweepError

_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # records are ours; Tune writes no JSON, CSV or TensorBoard
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # the new reporter prints a banner even at verbose=0
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # signals are ours, see sweeps/stopping.py
    "TUNE_WARN_THRESHOLD_S": "60",
    "TUNE_GLOBAL_CHECKPOINT_S": "600",  # a sweep resumes from its records, not from Tune's state
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


def in_job() -> bool:
    """Whether `ray job submit` started this process."""
    return bool(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR"))


def in_cluster() -> bool:
    """Whether we were submitted to, or told to use, a running cluster."""
    return in_job() or bool(os.environ.get("RAY_ADDRESS"))


def prepare_environment() -> None:
    """Set what Ray reads from the environment; before Ray is imported, which is when it reads how to authenticate."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    if not in_cluster() and "ray" not in sys.modules:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


@contextlib.contextmanager
def ray_session() -> Iterator[None]:
    """Ray, ready to use; a cluster started here ends with the block, any other stays.

    Ray's servers listen on every interface, so a private cluster asks for a token: a random one, in this process's
    environment only, so that none is left in the user's home. A cluster that is attached to keeps its own
    authentication.
    """
    prepare_environment()
    private = not in_cluster()
    import ray

    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    if ray.is_initialized():
        yield
        return
    if private:
        cpus = len(os.sched_getaffinity(0))
        ray.init(
            address="local",
            num_cpus=cpus,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=128 * 2**20,  # results are small dictionaries
            runtime_env=_quoted_python(),
        )
    else:
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()


def _quoted_python() -> dict[str, str]:
    """Ray hands the interpreter's path to a shell as it is; quote one that has a space in it."""
    quoted = shlex.quote(sys.executable)
    return {} if quoted == sys.executable else {"py_executable": quoted}


def gpus_or_default(gpus: float | None) -> float:
    """GPUs per run: as asked, else one where the cluster has any."""
    import ray

    return gpus if gpus is not None else float(ray.cluster_resources().get("GPU", 0.0) >= 1)


def check_resources(part: str, cpus: float, gpus: float) -> str:
    """Refuse what a private cluster can never give; Ray itself would wait for it for ever.

    Returns:
        on any other cluster, where an autoscaler may bring it, a sentence about what the sweep waits for; else empty.

    Raises:
        SweepError: a run of this part needs more than the machine has.
    """
    nodes = _live_resources()
    if any(_runs_on(node, cpus, gpus) for node in nodes):
        return ""
    for name, key, need in (("CPU", "cpus", cpus), ("GPU", "gpus", gpus)):
        most = max((node.get(name, 0.0) for node in nodes), default=0.0)
        if need > most and not in_cluster():
            raise SweepError(
                f"{part}.{key}: a run needs {need:g} {name}, this machine has {most:g}; "
                f"lower {part}.{key}, or submit the sweep to a cluster that has them"
            )
    return (
        f"{part}: a run needs {cpus:g} CPU and {gpus:g} GPU on one node, and none of the {len(nodes)} live nodes has "
        f"them; waiting for the cluster to grow (if nothing makes it grow: stop, and lower {part}.cpus or {part}.gpus)"
    )


def concurrent_trials(cpus: float, gpus: float) -> int:
    """How many trials of this size the cluster holds now: a trial needs its CPUs and GPUs on one node."""
    return max(1, sum(_runs_on(node, cpus, gpus) for node in _live_resources()))


def _live_resources() -> list[dict[str, float]]:
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _runs_on(node: dict[str, float], cpus: float, gpus: float) -> int:
    """How many trials of this size an empty node holds; a fraction of a GPU is never spread over two of them."""
    fits = [_times(node.get("CPU", 0.0), cpus)] if cpus > 0 else []
    if 0 < gpus < 1:
        fits.append(int(node.get("GPU", 0.0)) * _times(1.0, gpus))
    elif gpus:
        fits.append(_times(node.get("GPU", 0.0), gpus))
    return min(fits)


def _times(total: float, need: float) -> int:
    """How often `need` fits, in Ray's own units of 1/10 000: in floats ten times 0.1 does not fit into 1."""
    return round(total * 10_000) // max(1, round(need * 10_000))
