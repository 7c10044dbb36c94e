"""Processes that stand by for a benchmark, blocked on a pipe until called: they take no time from each other."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

GROUP_SECONDS = 120.0  # how long a rank waits for another before it gives up

# Builds what a rank does: make(rank, ranks, device, **arguments) returns one step, and what to tell the driver.
Make = Callable[..., tuple[Callable[[], Any], Any]]


class Crew:
    """Equal processes, with a `torch.distributed` group where there is more than one.

    Attributes:
        told: by every rank at its start.
        steps: taken so far.
        cpu_seconds: that every rank computed in them, whatever else the machine did.

    Args:
        make: builds a rank's step; a function of a module.
        ranks: processes; each has a CUDA device of its own where there are enough, else the CPU.
        threads: of torch in each.
        arguments: of `make`.
    """

    def __init__(self, make: Make, ranks: int, threads: int, **arguments: Any) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="crew-")
        address = f"file://{Path(self._folder.name) / 'group'}"
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(ranks):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, make, rank, ranks, threads, address, arguments), daemon=True
            )
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        self.told = [pipe.recv() for pipe in self._pipes]
        self.steps, self.cpu_seconds = 0, [0.0] * ranks

    def __call__(self, steps: int) -> list[list[float]]:
        """Take so many steps in every process; returns, for every rank, when each of its steps ended, in seconds."""
        for pipe in self._pipes:
            pipe.send(steps)
        answers = [pipe.recv() for pipe in self._pipes]
        self.steps += steps
        self.cpu_seconds = [total + cpu for total, (_, cpu) in zip(self.cpu_seconds, answers, strict=True)]
        return [ends for ends, _ in answers]

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.send(0)
        for process in self._processes:
            process.join(10)
            if process.is_alive():
                process.kill()
        self._folder.cleanup()


def devices_suffice(ranks: int) -> bool:
    """Whether every rank can have a CUDA device of its own."""
    return torch.cuda.device_count() >= ranks


def _serve(
    pipe: Connection, make: Make, rank: int, ranks: int, threads: int, address: str, arguments: dict[str, Any]
) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(threads)
    device = torch.device("cuda", rank) if devices_suffice(max(2, ranks)) else torch.device("cpu")
    wait: Callable[[], Any] = lambda: None  # noqa: E731
    if device.type == "cuda":
        torch.cuda.set_device(device)
        wait = torch.cuda.synchronize
    if ranks > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        limit = timedelta(seconds=GROUP_SECONDS)
        dist.init_process_group(backend, init_method=address, rank=rank, world_size=ranks, timeout=limit)
    step, told = make(rank, ranks, device, **arguments)
    pipe.send(told)
    while steps := pipe.recv():
        ends, began = [], time.process_time()
        for _ in range(steps):
            step()
            ends.append(time.perf_counter())
        wait()
        pipe.send((ends, time.process_time() - began))
    if ranks > 1:
        dist.destroy_process_group()
