"""Is the device really a measured run's alone? Ray knows of its own trials only."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

BUSY_CORES = 0.5  # cores that other programs keep busy, from which a CPU measurement gets a remark
WAIT_SECONDS = 30.0  # for the process of the run before to give its memory back


def wait_until_free(device: torch.device, seconds: float = WAIT_SECONDS) -> None:
    """Wait for a GPU without other compute processes; nothing is known, and nothing checked, without NVML.

    To be called before this process touches the GPU: in a container NVML has other process ids than we have.

    Raises:
        RuntimeError: other processes still hold the device.
    """
    processes = _compute_processes(device)
    deadline = time.monotonic() + seconds
    while (found := [pid for pid in processes() if pid != os.getpid()]) and time.monotonic() < deadline:
        time.sleep(0.5)
    if found:
        raise RuntimeError(
            f"{device} is in use by {len(found)} other process(es), ids {', '.join(map(str, found))}: a measured run "
            "needs it alone; end them, or measure on another device"
        )


def check_alone(device: torch.device) -> None:
    """To be called after this process has used the GPU: it must be the only one there, whatever its id.

    Raises:
        RuntimeError: another process has come.
    """
    found = _compute_processes(device)()
    if len(found) > 1:
        raise RuntimeError(
            f"{device} came into use by {len(found) - 1} other process(es) during a measured run, ids with its own "
            f"{', '.join(map(str, found))}: its seconds are worth nothing; keep the device free"
        )


def _compute_processes(device: torch.device) -> Callable[[], list[int]]:
    """A function that lists the ids of the device's compute processes, this one's too."""
    if device.type != "cuda":
        return lambda: []
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
    except Exception:  # no library, no driver, or a slice of a device: unknown
        return lambda: []
    return lambda: [p.pid for p in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)]


def busy_remark(seconds: float = 0.2, stat: Path = Path("/proc/stat")) -> str:
    """A remark where other programs use the processor while this one sleeps; empty where they do not."""
    before = _busy_ticks(stat)
    time.sleep(seconds)
    after = _busy_ticks(stat)
    if before is None or after is None:
        return ""
    cores = (after - before) / os.sysconf("SC_CLK_TCK") / seconds
    if cores < BUSY_CORES:
        return ""
    return f"the processor is shared: other programs keep {cores:.1f} of {os.cpu_count()} cores busy"


def _busy_ticks(stat: Path) -> int | None:
    """Clock ticks that the machine has worked, summed over cores; None where that is not known."""
    try:
        fields: list[Any] = stat.read_text().splitlines()[0].split()
        user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields[1:9])
    except (OSError, ValueError, IndexError):
        return None
    return user + nice + system + irq + softirq + steal
