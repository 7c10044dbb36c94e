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


def node_cpus(gpus: int) -> int:
    """CPUs of the largest live node that has this many GPUs; 1 where an autoscaler has yet to start one."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return max((int(r.get("CPU", 0)) for r in nodes if r.get("GPU", 0) >= gpus), default=1) or 1


def gpus_or_default(gpus: float | None) -> float:
    """GPUs per run: as asked, else one where the cluster has any."""
    import ray

    return gpus if gpus is not None else float(ray.cluster_resources().get("GPU", 0.0) >= 1)


def check_resources(part: str, cpus: float, gpus: float) -> None:
    """Refuse what a private cluster can never give; Ray itself would wait for it for ever.

    Raises:
        SweepError: a run of this part needs more than the machine has.
    """
    import ray

    if in_cluster():
        return  # an autoscaler may bring it
    has = ray.cluster_resources()
    for name, key, need in (("CPU", "cpus", cpus), ("GPU", "gpus", gpus)):
        if need > has.get(name, 0.0):
            raise SweepError(
                f"{part}.{key}: a run needs {need:g} {name}, this machine has {has.get(name, 0.0):g}; "
                f"lower {part}.{key}, or submit the sweep to a cluster that has them"
            )


def concurrent_trials(cpus: float, gpus: float) -> int:
    """How many trials of this size the cluster holds now."""
    import ray

    total = ray.cluster_resources()
    fits = [total.get(name, 0.0) // need for name, need in (("CPU", cpus), ("GPU", gpus)) if need > 0]
    return max(1, int(min(fits)))
