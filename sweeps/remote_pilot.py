"""A pilot on the cluster: on the kind of device that a phase will use, and with nothing of this sweep beside it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from fastbp.config import RunConfig
from sweeps.pilot import Pilot, pilot
from trainables.method_trainable import device_for


def remote_pilot(
    cpus: float, gpus: float, common: dict[str, Any], say: Callable[[str], Any]
) -> Callable[[RunConfig], Pilot | None]:
    """How to pilot a run in a Ray worker of its own; None where the run fails, as its trials may.

    Args:
        cpus, gpus: what a trial gets; a fraction of a GPU becomes a whole one, to be alone on it.
        common: `device`, `threads`, `cwd` and `sys_path`, as `MethodTrainable` takes them.
        say: hears one sentence before the first pilot, and one of every pilot that fails.
    """
    task = ray.remote(num_cpus=cpus, num_gpus=max(1.0, gpus) if gpus else 0, max_calls=1, max_retries=0)(_pilot)
    piloted: list[str] = []

    def measure(run: RunConfig) -> Pilot | None:
        if not piloted:
            say("pilot: timing a few steps of every arm, alone, to place the rungs")
        piloted.append(run.arm)
        try:
            found = ray.get(task.remote(run.to_dict(), common))
        except RayError as error:
            found = f"its process died ({type(error).__name__})"
        if isinstance(found, Pilot):
            return found
        say(f"pilot: arm {run.arm} could not be timed, so its trials are never stopped early: {found}")
        return None

    return measure


def _pilot(run: dict[str, Any], common: dict[str, Any]) -> Pilot | str:
    """The pilot, or why there is none."""
    if Path(common["cwd"]).is_dir():
        os.chdir(common["cwd"])
    sys.path += [folder for folder in common["sys_path"] if folder not in sys.path]
    try:
        return pilot(RunConfig.from_dict(run), device=device_for(common["device"]), threads=common["threads"])
    except Exception as error:
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
