"""What the benchmark scripts share: an interval for a median, a verdict, and where a number was made."""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from fastbp.environment import device_fingerprint, git_state, software_fingerprint


def median_interval(values: list[float]) -> tuple[float, float, float]:
    """The median and its distribution-free interval from order statistics, of at least 95 %.

    Fewer than six values say less: their whole range, three of them 75 %.
    """
    ordered = sorted(values)
    n = len(ordered)
    outside, left_out = 1, 0  # of 2^n orders, those with at most so many values on one side of the median
    while 2 * (outside + math.comb(n, left_out + 1)) <= 0.05 * 2**n:
        left_out += 1
        outside += math.comb(n, left_out)
    return statistics.median(ordered), ordered[left_out], ordered[n - 1 - left_out]


def environment(device: torch.device | None = None) -> dict[str, Any]:
    """Of what was measured: on this device, or on what the machine trains on."""
    commit, dirty = git_state()
    return {
        "device": device_fingerprint(device or torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "software": software_fingerprint(),
        "git_commit": commit,
        "git_dirty": dirty,
    }


def judge(
    script: str,
    figures: dict[str, float],
    limits: dict[str, float],
    out: str,
    *,
    least: Collection[str] = (),
    places: int = 2,
) -> None:
    """Print of every claim whether it holds; where one does not, end the process with a sentence and exit code 1.

    Args:
        script: the benchmark's name.
        figures, limits: by claim; a figure that is no number keeps no limit.
        out: where the figures are.
        least: claims of which the limit must be reached; that of the others must not be passed.
    """
    failed = []
    for name, value in figures.items():
        bound = "at least" if name in least else "at most"
        holds = value >= limits[name] if name in least else value <= limits[name]
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
