"""What the benchmark scripts share: an interval for a median, and where a number was made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from fastbp.environment import device_fingerprint, git_state, software_fingerprint


def median_interval(values: list[float]) -> tuple[float, float, float]:
    """The median and its distribution-free 95 % interval from order statistics (normal approximation of ranks)."""
    ordered = sorted(values)
    n = len(ordered)
    half = round(0.98 * n**0.5)
    return ordered[n // 2], ordered[max(0, n // 2 - half)], ordered[min(n - 1, n // 2 + half)]


def environment() -> dict[str, Any]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    commit, dirty = git_state()
    return {
        "device": device_fingerprint(device),
        "software": software_fingerprint(),
        "git_commit": commit,
        "git_dirty": dirty,
    }


def write_json(path: str, content: dict[str, Any]) -> None:
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print(f"written to {path}")
