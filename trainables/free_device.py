"""Is the device really a measured run's alone? Ray knows of its own trials only."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

BUSY_CORES = 0.5  # that other programs keep busy, from which a CPU measurement that needs all cores is worth nothing
SAMPLE_SECONDS = 0.2  # the shortest time that says how busy they are
_IDLE, _IOWAIT = 3, 4  # columns of the counters in which nobody worked
WAIT_SECONDS = 30.0  # for the process of the run before to give its memory back


def wait_until_free(device: torch.device, seconds: float = WAIT_SECONDS) -> None:
    """Wait for a GPU without other compute processes; nothing is known, and nothing checked, without NVML.

    To be called before this process touches the GPU: in a container NVML has other process ids than we have.

    Raises:
        RuntimeError: other processes still hold the device.
    """
    processes, _ = _compute_processes(device)
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
    processes, _ = _compute_processes(device)
    found = processes()
    if len(found) > 1:
        raise RuntimeError(
            f"{device} came into use by {len(found) - 1} other process(es) during a measured run, ids with its own "
            f"{', '.join(map(str, found))}: its seconds are worth nothing; keep the device free"
        )


def unwatched(device: torch.device) -> str:
    """Why nobody can say who else uses a GPU; empty where that is known, and for other devices."""
    return _compute_processes(device)[1]


def spare_cores(threads: int) -> float:
    """Cores that other programs may keep busy before a run of so many threads on the processor suffers.

    All cores that this process may use but the run's own and one more; half a core where none are left.
    """
    return max(BUSY_CORES, len(_cores()) - threads - 1.0)


def _compute_processes(device: torch.device) -> tuple[Callable[[], list[int]], str]:
    """A function that lists the ids of the device's compute processes, this one's too; why it knows none."""
    if device.type != "cuda":
        return lambda: [], ""
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
    except ImportError:
        return lambda: [], "the GPU was not watched: nvidia-ml-py is not installed"
    except Exception:  # no driver, or a slice of a device
        return lambda: [], "the GPU was not watched: its driver does not list its processes"
    return lambda: [p.pid for p in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)], ""


class OtherPrograms:
    """How much of the processor other programs took while a run worked, over everything that was watched.

    Args:
        stat: Linux's counters of processor time; nothing is known, and nothing remarked, where there are none.
        threads: of the run, which says how many cores others may have: `spare_cores`.
        own: processor seconds of the run so far, None where they are not known; default: of this process.

    Attributes:
        seconds: watched so far.
        busy_seconds: of processor time that others spent meanwhile, on the cores that this process may use.
    """

    def __init__(
        self, stat: Path = Path("/proc/stat"), threads: int = 1, own: Callable[[], float | None] | None = None
    ) -> None:
        self.stat, self.threads, self.own = stat, threads, own or (lambda: time.process_time())
        self.seconds, self.busy_seconds = 0.0, 0.0

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Watch what is inside."""
        before = self._reading()
        try:
            yield
        finally:
            after = self._reading()
            if before is not None and after is not None:
                wall, busy, own = (b - a for a, b in zip(before, after, strict=True))
                self.seconds, self.busy_seconds = self.seconds + wall, self.busy_seconds + busy - own

    def remark(self) -> str:
        """What to say of a run that was watched; empty where it had the processor to itself.

        Counters go in hundredths of a second, so that what was watched too shortly is watched a little longer. With
        FASTBP_FAKE_QUIET=1 in the environment nobody else is ever busy: for tests on machines that are.
        """
        if os.environ.get("FASTBP_FAKE_QUIET") == "1":
            return ""
        if self.seconds < SAMPLE_SECONDS:
            with self.watched():
                time.sleep(SAMPLE_SECONDS - self.seconds)
        cores = self.busy_seconds / self.seconds if self.seconds else 0.0
        if cores < spare_cores(self.threads):
            return ""
        return f"the processor is shared: other programs kept {cores:.1f} of {len(_cores())} cores busy meanwhile"

    def _reading(self) -> tuple[float, float, float] | None:
        """Wall seconds, processor seconds of everybody, and of the run; None where they are not known."""
        try:
            lines = [line.split() for line in self.stat.read_text().splitlines()]
            counts = {name: [int(f) for f in fields[:8]] for name, *fields in lines if name.startswith("cpu")}
            ours = [counts[f"cpu{i}"] for i in _cores() if f"cpu{i}" in counts] or [counts["cpu"]]
            ticks = sum(sum(core) - core[_IDLE] - core[_IOWAIT] for core in ours)
        except (OSError, ValueError, KeyError, IndexError):
            return None
        wall, own = time.monotonic(), self.own()
        return None if own is None else (wall, ticks / os.sysconf("SC_CLK_TCK"), own)


def _cores() -> set[int]:
    return os.sched_getaffinity(0)
