"""Which code the runs of a group were made with: other code may take other times, so a reader is told."""

from __future__ import annotations

from collections import Counter

from analysis.frames import records
from analysis.measured import Group

SHOWN = 3


def code_warning(group: Group) -> str:
    """One sentence where measured runs come from different versions or commits of fastbp; else empty."""
    parts = [part for part in (group, group.ablated) if part]
    runs = [run for part in parts for arm in part.arms if not arm.tried.empty for run in records(arm.tried)]
    found = Counter(_code(run) for run in runs)
    if len(found) < 2:
        return ""
    named = [
        f"{code} ({n} run{'' if n == 1 else 's'})" for code, n in sorted(found.items(), key=lambda c: (-c[1], c[0]))
    ]
    more = f" and {len(named) - SHOWN} more" if len(named) > SHOWN else ""
    return (
        f"The measured runs were made by different code: {', '.join(named[:SHOWN])}{more}; a difference between them "
        "may be one of the code."
    )


def _code(run: dict) -> str:
    version = run["software"].get("fastbp")
    commit = f"commit {run['git_commit'][:10]}" if run["git_commit"] else "unknown commit"
    dirty = " with uncommitted changes" if run["git_commit"] and run["git_dirty"] else ""
    return f"fastbp {version if isinstance(version, str) and version else 'of unknown version'}, {commit}{dirty}"
