"""Tensors carried between the devices of one process, without ordering the devices' computations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Carried:
    """A tensor under way to another device; `arrive` before its use."""

    tensor: Tensor
    done: torch.cuda.Event | None = None

    def arrive(self) -> Tensor:
        """The tensor, once the current stream of its device may read it; the host does not wait."""
        if self.done is not None:
            stream = torch.cuda.current_stream(self.tensor.device)
            stream.wait_event(self.done)
            self.tensor.record_stream(stream)
        return self.tensor


class Carrier:
    """Carries tensors on streams of their own, one pair for every link and direction.

    A plain `.to(device)` queues behind what both devices compute at the moment, and makes them wait for each other: the
    delayed backward of one module would wait for the forward of the next. Here a copy waits for its source alone, and
    only the use of the copy waits for it.
    """

    def __init__(self) -> None:
        self._streams: dict[tuple[torch.device, torch.device], tuple[torch.cuda.Stream, torch.cuda.Stream]] = {}

    def carry(self, tensor: Tensor, device: torch.device | None) -> Carried:
        """Start to copy a tensor, ready on the current stream of its device, to another device."""
        if device is None or tensor.device == device:
            return Carried(tensor)
        if not (tensor.is_cuda and device.type == "cuda"):
            return Carried(tensor.to(device))
        out, into = self._link(tensor.device, device)
        ready = torch.cuda.Event()
        ready.record(torch.cuda.current_stream(tensor.device))
        out.wait_event(ready)
        with torch.cuda.stream(out), torch.cuda.stream(into):
            copy = tensor.to(device, non_blocking=True)
            done = torch.cuda.Event()
            done.record(into)
        tensor.record_stream(out)
        return Carried(copy, done)

    def _link(self, source: torch.device, target: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
        if (source, target) not in self._streams:
            self._streams[source, target] = (torch.cuda.Stream(source), torch.cuda.Stream(target))
        return self._streams[source, target]
