"""The one clock: wall-clock seconds by segment, synchronised with the device at the edges of a segment only.

`train_seconds` counts what every method must do: batch assembly, forward, backward, optimizer. Evaluation,
checkpoints, warm-up and waiting for others have segments of their own, so that none of them can move it.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch

from fastbp.record import Seconds

SEGMENTS = ("train", "setup", "warmup", "compile", "eval", "checkpoint", "report_blocked")


class Clock:
    """Accumulates seconds per segment.

    Args:
        device: is waited for at both edges of a segment.
        now: a monotonic clock in seconds; replaceable in tests.
        synchronize: waits until the device is idle; by default torch's for `device`, nothing on CPU.

    Attributes:
        seconds: the totals, cumulative; part of a run's state.
    """

    def __init__(
        self,
        device: torch.device | str = "cpu",
        now: Callable[[], float] = time.perf_counter,
        synchronize: Callable[[], None] | None = None,
    ) -> None:
        self.now = now
        self.synchronize = synchronize or _synchronizer(torch.device(device))
        self.seconds = Seconds()
        self._open: str | None = None

    def wait_for(self, devices: Iterable[torch.device | str]) -> None:
        """Synchronise with all of these from now on."""
        waits = [_synchronizer(torch.device(device)) for device in devices]
        self.synchronize = lambda: [wait() for wait in waits] and None

    @contextmanager
    def segment(self, name: str) -> Iterator[None]:
        """Time what is inside as `name`; segments do not nest.

        Raises:
            ValueError: unknown segment.
            RuntimeError: another segment is open: its time would be counted twice.
        """
        if self._open is not None:
            raise RuntimeError(f"clock segment {name!r} opened inside {self._open!r}")
        self.add(name, 0.0)
        self._open = name
        self.synchronize()
        start = self.now()
        try:
            yield
        finally:
            self.synchronize()
            self._open = None
            self.add(name, self.now() - start)

    def add(self, name: str, seconds: float) -> None:
        """Add seconds that were measured elsewhere.

        Raises:
            ValueError: unknown segment, or a negative time.
        """
        if name not in SEGMENTS:
            raise ValueError(f"unknown clock segment {name!r}; one of {', '.join(SEGMENTS)}")
        if seconds < 0:
            raise ValueError(f"clock segment {name!r} got {seconds} s: the clock is not monotonic")
        field = f"{name}_seconds"
        setattr(self.seconds, field, (getattr(self.seconds, field) or 0.0) + seconds)

    def totals(self) -> dict[str, float | None]:
        """The totals by column name, `train_seconds` and so on."""
        return dataclasses.asdict(self.seconds)

    def load(self, totals: dict[str, float | None]) -> None:
        """Continue from saved totals."""
        self.seconds = Seconds(**totals)  # type: ignore[arg-type]


def _synchronizer(device: torch.device) -> Callable[[], None]:
    if device.type == "cpu":
        return lambda: None
    return lambda: torch.accelerator.synchronize(device)
