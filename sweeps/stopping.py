"""Ending a sweep early: what the user asks with SIGINT or SIGTERM, and what Ray does not survive.

The first signal is obeyed between two steps of Tune: search trials are saved as they end their epoch, actors end,
MLflow runs are closed, and the command exits with 128 + signal. A second one ends the process at once; a private
cluster dies with it, and the next start cleans up.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from typing import Any

from fastbp.record import DISK_FULL, RecordError

SAVE_SECONDS = 15.0  # for running search trials to end their epoch and be saved, after the first signal
AGAIN_SECONDS = 0.5  # what sends a signal to a process and to its group sends it twice
NODE_SECONDS = 5.0  # between two looks at the driver's own node
GRACE_SECONDS = 20.0  # for an orderly end without the node; then the process ends as it is
EXIT_STOPPED = 3  # ended from outside, neither by the user nor by a failed run; the same command continues


class Interrupted(Exception):
    """Raised between two steps of Tune, which then ends its actors."""


class Stop:
    """Why a sweep has to end before it is done; a context that listens to signals.

    Attributes:
        signal: the first SIGINT or SIGTERM; 0 where there was none.
        cause: a sentence where the sweep cannot go on; empty otherwise.
        tuning: whether Tune's loop runs, which asks for `check`; elsewhere the first signal is a KeyboardInterrupt.
        closing: whether only MLflow is left to be written, which any signal cuts short with a KeyboardInterrupt.
    """

    def __init__(self) -> None:
        self.signal, self.cause = 0, ""
        self.tuning = self.closing = False
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        self.listen()
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def listen(self) -> None:
        """Take SIGINT and SIGTERM; again once Ray has started, which takes SIGTERM to abort with a stack trace."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGINT, signal.SIGTERM):
            before = signal.signal(number, self._on_signal)
            self._before.setdefault(number, before if before is not None else signal.SIG_DFL)

    def check(self, *, saving: bool = False) -> None:
        """Between two steps of Tune.

        Args:
            saving: whether trials are still to be saved; a signal waits `SAVE_SECONDS` for that.

        Raises:
            Interrupted: the sweep has to end.
        """
        saving = saving and time.monotonic() - self._since < SAVE_SECONDS
        if self.cause or (self.signal and not saving):
            raise Interrupted

    def lose(self, cause: str) -> None:
        """The sweep cannot go on. Where the main thread hangs in Ray, the process ends without it."""
        self.cause = cause
        last = threading.Timer(GRACE_SECONDS, _end_now, [cause])
        last.daemon = True
        last.start()

    def why(self, error: BaseException) -> str:
        """The sentence for the user where an error means that the sweep cannot go on; empty for any other error."""
        chain: BaseException | None = error
        while chain is not None:
            if isinstance(chain, RecordError):
                return f"{chain}; then run the same command again"
            if isinstance(chain, OSError) and chain.errno in DISK_FULL:
                where = chain.filename or "a file of the sweep"
                return f"{where} cannot be written ({chain.strerror}): free space, then run the same command again"
            chain = chain.__cause__ or chain.__context__
        return self.cause

    def _on_signal(self, number: int, frame: Any) -> None:
        if self.closing:
            raise KeyboardInterrupt
        if self.signal:
            if time.monotonic() - self._since > AGAIN_SECONDS:
                os._exit(128 + number)
            return
        self.signal, self._since = number, time.monotonic()
        if not self.tuning:
            raise KeyboardInterrupt


RAY_DIED = (
    "Ray died on this machine (its raylet was killed or crashed); finished runs are on disk: run the same command again"
)


class NodeWatch:
    """A thread that looks whether Ray still runs on the driver's own machine; a context.

    When the raylet of the driver's node dies, Tune waits for ever for the actors that died with it. (Without Ray's GCS,
    Ray itself ends the process after a minute.)
    """

    def __init__(self, stop: Stop, every_seconds: float = NODE_SECONDS) -> None:
        self._stop, self._every_seconds = stop, every_seconds
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="node-watch", daemon=True)

    def __enter__(self) -> NodeWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._done.set()

    def _loop(self) -> None:
        import ray

        own = ray.get_runtime_context().get_node_id()
        while not self._done.wait(self._every_seconds):
            try:
                alive = any(node["NodeID"] == own and node["Alive"] for node in ray.nodes())
            except Exception:  # the GCS does not answer: it restarts, or Ray ends the process
                continue
            if not alive and not self._done.is_set():
                self._stop.lose(RAY_DIED)
                return


def _end_now(cause: str) -> None:
    print(cause, file=sys.stderr, flush=True)
    os._exit(EXIT_STOPPED)
