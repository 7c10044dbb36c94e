"""When MLflow is written to: beside the search, between measured trials, and at the end.

Nothing waits in memory: a slow store makes the next sync larger, and what it has to write is in the records.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sweeps.mlflow_sync import MlflowMirror, try_sync

JOIN_SECONDS = 5.0  # the driver waits no longer for a request that is under way when the search ends
BETWEEN_SECONDS = 5.0  # after which no request is begun between two measured trials
REST = 20  # times what a sync took: so long the measuring goes on before the next, which is a twentieth of its time
QUIET_SECONDS = 2.0  # a last sync that takes longer says so


class BackgroundSync:
    """Syncs every few seconds from a thread of its own while a block runs; for the search phase only.

    Attributes:
        error: the newest failure, or empty.
    """

    def __init__(self, mirror: MlflowMirror | None, every_seconds: float = 5.0) -> None:
        self.mirror, self.every_seconds, self.error = mirror, every_seconds, ""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="mlflow-sync", daemon=True)

    def __enter__(self) -> BackgroundSync:
        if self.mirror is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        """End the thread: nothing may run beside a measured trial. One that waits for an answer makes no further
        request when it comes.
        """
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(JOIN_SECONDS)

    def _loop(self) -> None:
        while not self._stop.wait(self.every_seconds):
            began = time.monotonic()
            self.error = try_sync(self.mirror, stop=self._stop)
            if self.error:
                self._stop.wait(min(60.0, 5 * (time.monotonic() - began) + 10.0))


class BetweenTrials:
    """Syncs while no trial trains, and so seldom that a slow store costs a twentieth of the time at most."""

    def __init__(self, mirror: MlflowMirror | None) -> None:
        self._mirror, self._next = mirror, 0.0

    def sync(self) -> str:
        """The error, or empty; also where it is too early for another sync."""
        began = time.monotonic()
        if began < self._next:
            return ""
        error = try_sync(self._mirror, seconds=BETWEEN_SECONDS)
        now = time.monotonic()
        self._next = now + REST * (now - began)
        return error


def final_sync(mirror: MlflowMirror | None, say: Callable[[str], Any], report: Path | None = None) -> str:
    """The last sync of a sweep, as `try_sync`; it may be interrupted, and says so where it takes a while.

    Args:
        say: prints a line.
    """
    waiting = threading.Timer(
        QUIET_SECONDS, say, ["writing to MLflow ... (Ctrl-C leaves the rest to fastbp-sweep sync)"]
    )
    waiting.daemon = True
    if mirror is not None:
        waiting.start()
    try:
        return try_sync(mirror, final=True, report=report)
    except KeyboardInterrupt:
        return "interrupted"
    finally:
        waiting.cancel()
