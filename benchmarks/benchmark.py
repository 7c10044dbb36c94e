"""What the benchmark scripts share: an interval for a median, a verdict, and where a number was made."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from fastbp.environment import device_fingerprint, git_state, software_fingerprint


def median_interval(values: list[float]) -> tuple[float, float, float]:
    """The median and its distribution-free 95 % interval from order statistics (normal approximation of ranks)."""
    ordered = sorted(values)
    n = len(ordered)
    half = round(0.98 * n**0.5)
    return statistics.median(ordered), ordered[max(0, n // 2 - half)], ordered[min(n - 1, n // 2 + half)]


def environment() -> dict[str, Any]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    commit, dirty = git_state()
    return {
        "device": device_fingerprint(device),
        "software": software_fingerprint(),
        "git_commit": commit,
        "git_dirty": dirty,
    }


def judge(
    script: str, figures: dict[str, float], limits: dict[str, float], out: str, *, least: bool = False, places: int = 2
) -> None:
    """Print of every claim whether it holds; where one does not, end the process with a sentence and exit code 1.

    Args:
        script: the benchmark's name.
        figures, limits: by claim; a figure that is no number keeps no limit.
        out: where the figures are.
        least: whether the limits are those that figures must reach, and not those that they must not pass.
    """
    bound, failed = "at least" if least else "at most", []
    for name, value in figures.items():
        holds = value >= limits[name] if least else value <= limits[name]
        print(f"claim ({name} {bound} {limits[name]:g}): {'holds' if holds else 'does not hold'}, {value:.{places}f}")
        if not holds:
            failed.append(f"{name} is {value:.{places}f}, {bound} {limits[name]:g} is claimed")
    if failed:
        some = f"{len(failed)} of {len(figures)} claims do not hold"
        sys.exit(f"{script}: {some}: {', '.join(failed)}; see {out}")


def write_json(path: str, content: dict[str, Any]) -> None:
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print(f"written to {path}")
