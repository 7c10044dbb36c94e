"""Device energy from NVML's counter; None wherever that is not known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def energy_reader(*devices: torch.device) -> Callable[[], float | None]:
    """A function that returns the devices' energy counters in joules, summed, or None where one of them has none.

    Needs NVIDIA devices and `nvidia-ml-py`. A device is found by its UUID, as NVML does not follow
    `CUDA_VISIBLE_DEVICES`. The counter covers the whole device: differences are a run's own only when it is alone.
    """
    readers = [_reader(device) for device in dict.fromkeys(devices)]

    def total() -> float | None:
        joules = [read() for read in readers]
        return None if None in joules else sum(j for j in joules if j is not None)

    return total


def _reader(device: torch.device) -> Callable[[], float | None]:
    if device.type != "cuda":
        return lambda: None
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception:  # no library, no driver, or a device without the counter: unknown, not an error
        return lambda: None
    return lambda: _joules(pynvml, handle)


def _joules(pynvml: Any, handle: Any) -> float | None:
    try:
        return pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000.0
    except pynvml.NVMLError:
        return None
