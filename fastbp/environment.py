"""Where a number was made: device, software and source fingerprints. Unlike ones must not be compared."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from functools import cache
from typing import Any

import torch


def device_fingerprint(device: torch.device) -> dict[str, Any]:
    """Type, name, memory and, on CPU, the number of threads torch computes with."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return {
            "type": "cuda",
            "name": properties.name,
            "uuid": str(properties.uuid),
            "memory_bytes": properties.total_memory,
            "threads": torch.get_num_threads(),
        }
    return {
        "type": device.type,
        "name": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def software_fingerprint() -> dict[str, Any]:
    """Versions and the settings of torch that move times or numbers."""
    from fastbp import __version__

    return {
        "fastbp": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "cudnn": torch.backends.cudnn.version() if torch.cuda.is_available() else None,
        "torchvision": _version("torchvision"),
        "timm": _version("timm"),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "cudnn_tf32": torch.backends.cudnn.allow_tf32,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


@cache
def git_state() -> tuple[str | None, bool | None]:
    """Commit and dirty flag of the repository in the working directory; (None, None) outside of one.

    A scheduler that runs trials elsewhere passes its own through `FASTBP_GIT_COMMIT` and `FASTBP_GIT_DIRTY`.
    """
    if "FASTBP_GIT_COMMIT" in os.environ:
        return os.environ["FASTBP_GIT_COMMIT"] or None, os.environ.get("FASTBP_GIT_DIRTY") == "1"
    commit = _git("rev-parse", "HEAD")
    if not commit:
        return None, None
    return commit, bool(_git("status", "--porcelain", "--untracked-files=no"))


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@cache
def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
