"""Records of older schemas, brought to the one that the report reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from analysis import columns
from analysis.errors import ReportError

MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}
"""Schema version to the function that makes a record of the next version from one of this version."""


def migrated(data: dict[str, Any], where: str) -> dict[str, Any]:
    """A record of another schema as one of `columns.SCHEMA_VERSION`.

    Raises:
        ReportError: it is newer, or so old that nothing reads it, or has no version.
    """
    version, reads = data.get("schema_version"), columns.SCHEMA_VERSION
    if not isinstance(version, int) or isinstance(version, bool):
        raise ReportError(f"{where}: schema_version is {version!r:.80}, expected a whole number; the line is no record")
    if version > reads:
        raise ReportError(
            f"{where}: schema_version is {version!r:.20}, but this version of fastbp-report reads {reads}; "
            "install the version that wrote the records"
        )
    while version < reads:
        step = MIGRATIONS.get(version)
        if step is None:
            raise ReportError(
                f"{where}: schema_version is {version}, which is older than what this version of fastbp-report can "
                f"bring to {reads}; report with the version that wrote the records"
            )
        data = step(data) | {"schema_version": version + 1}
        version += 1
    return data
