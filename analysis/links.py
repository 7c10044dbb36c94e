"""Where a run can be looked up: its page in MLflow, or its key and the records file that tells it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import quote, urlsplit

SHOWN = 24  # runs that a point lists; the tables and records have all


@dataclass(frozen=True)
class Origin:
    """Where one run was read.

    Attributes:
        file: name of the records file in this report.
        run_id: MLflow's; empty where the run was not read from MLflow or is not tracked.
        url: its page on a tracking server; empty where there is none.
    """

    run_key: str
    file: str
    run_id: str = ""
    url: str = ""

    @property
    def text(self) -> str:
        """What names the run."""
        return f"MLflow run {self.run_id}" if self.run_id else f"run {self.run_key}"


def run_url(tracking_uri: str, experiment_id: str, run_id: str) -> str:
    """The page of a run on a tracking server, without a password; empty for a store that is no web server.

    >>> run_url("http://ann:secret@127.0.0.1:5000/", "3", "ab12")
    'http://127.0.0.1:5000/#/experiments/3/runs/ab12'
    >>> run_url("sqlite:///mlruns.db", "3", "ab12")
    ''
    """
    try:
        parts = urlsplit(tracking_uri)
        host = parts.hostname or ""
        port = "" if parts.port is None else f":{parts.port}"
    except ValueError:
        return ""
    if parts.scheme not in ("http", "https") or not re.fullmatch(r"[\w.:-]+", host):
        return ""
    host = f"[{host}]" if ":" in host else host
    path = quote(parts.path.rstrip("/"), safe="/%")
    place = f"experiments/{quote(experiment_id, safe='')}/runs/{quote(run_id, safe='')}"
    return f"{parts.scheme}://{host}{port}{path}/#/{place}"
