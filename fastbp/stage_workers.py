"""The processes of a staged run: what each of them does, and K of them on this machine."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fastbp.config import RunConfig, load_task_data
from fastbp.record import EpochRecord, RunRecord
from fastbp.run import Run

TIMEOUT_SECONDS = 300.0  # how long a rank waits for a neighbour's tensor before it gives up
ANSWER_SECONDS = 86_400.0  # how long a stage may take to start or to train an epoch: one that hangs ends the run
STATE_SECONDS = 1_800.0  # and to save its state, or to load one


def seconds_for(name: str) -> float:
    """How long a call of this `StageWorker` method may take."""
    if name == "close":
        return TIMEOUT_SECONDS
    return STATE_SECONDS if "state_dict" in name else ANSWER_SECONDS


class StageError(RuntimeError):
    """A process of a staged run failed, died or fell silent."""


class StageWorker:
    """One rank: a process group's member with a `Run`.

    Args:
        rank, ranks: of this process in the group.
        init_method: a `file://` or `tcp://` address that all ranks share.
        config: as `RunConfig.to_dict`.
        options: of `Run`.
        timeout: seconds to wait for a neighbour, once all have their data.

    Raises:
        ValueError: a GPU is wanted, and torch sees none here.
    """

    def __init__(
        self, rank: int, ranks: int, init_method: str, config: dict[str, Any], options: dict[str, Any], timeout: float
    ) -> None:
        from torch.distributed.rendezvous import rendezvous  # not in every build of torch

        device = options["device"] = _device(rank, options.get("device"))
        if options.get("threads"):
            torch.set_num_threads(options["threads"])
        store, _, _ = next(rendezvous(init_method, rank, ranks, timeout=timedelta(seconds=ANSWER_SECONDS)))
        parsed, began = RunConfig.from_dict(config), time.perf_counter()
        if options.get("data") is None:
            options["data"] = load_task_data(parsed.task, parsed.recipe, device)
        loading = time.perf_counter() - began
        store.set(f"ready {rank}", "")  # a neighbour may still download what this one has
        store.wait([f"ready {other}" for other in range(ranks)], timedelta(seconds=ANSWER_SECONDS))
        patience = timedelta(seconds=timeout)
        store.set_timeout(patience)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=patience)
        self.run = Run(parsed, **options)
        self.run.clock.add("setup", loading)

    def start_record(self) -> RunRecord:
        return self.run.start_record()

    def train_epoch(self) -> tuple[EpochRecord, bool]:
        """The record of the next epoch, and whether it was the last."""
        return self.run.train_epoch(), self.run.done

    def end(self, status: Any, reason: str) -> RunRecord:
        return self.run.end(status, reason)

    def apply(self, function: Callable[..., Any], *args: Any) -> Any:
        """`function(run, *args)` in this process."""
        return function(self.run, *args)

    def state_dict(self) -> bytes:
        """As a file's bytes: tensors that travel as such would share memory with those that are trained."""
        with self.run.clock.segment("checkpoint"):
            return saved_bytes(self.run.state_dict())

    def load_state_dict(self, state: bytes) -> tuple[int, bool]:
        """Returns the epochs done, and whether that is all."""
        with self.run.clock.segment("checkpoint"):
            self.run.load_state_dict(loaded_bytes(state, self.run.device))
        return self.run.epoch, self.run.done

    def add_seconds(self, segment: str, seconds: float) -> None:
        self.run.clock.add(segment, seconds)

    def table(self) -> list[dict[str, float]]:
        return self.run.split_table()

    def close(self) -> None:
        dist.destroy_process_group()


def _device(rank: int, wanted: torch.device | str | None) -> torch.device:
    """A stage's device: the one it is given, of several GPUs the one of its rank."""
    device = torch.device(wanted or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type != "cuda":
        return device
    if not torch.cuda.is_available():
        raise ValueError(
            f"DDG.processes = True: its stages are to use {device}, but torch {torch.__version__} sees no GPU here; "
            "set the device to cpu, or install a CUDA build of torch and a driver that fits it"
        )
    device = torch.device("cuda", rank % torch.cuda.device_count() if device.index is None else device.index)
    torch.cuda.set_device(device)
    return device


def saved_bytes(state: dict[str, Any]) -> bytes:
    """A state as `torch.save` writes it."""
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def loaded_bytes(state: bytes, device: torch.device) -> dict[str, Any]:
    """The inverse of `saved_bytes`; reads nothing but tensors and plain values."""
    return torch.load(io.BytesIO(state), weights_only=True, map_location=device)


class LocalWorkers:
    """One process per rank on this machine, bound to the loopback interface.

    Args:
        ranks: how many.
        config: of the run.
        options: of `Run`.
        timeout: seconds a rank waits for a neighbour.
    """

    def __init__(
        self, ranks: int, config: RunConfig, options: dict[str, Any], timeout: float = TIMEOUT_SECONDS
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="fastbp-")
        address = f"file://{Path(self._folder.name) / 'group'}"
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Any] = []
        self._senders: list[threading.Thread] = []
        self._processes = []
        for rank in range(ranks):
            ours, theirs = context.Pipe()
            args = (theirs, rank, ranks, address, config.to_dict(), options, timeout)
            process = context.Process(target=_serve, args=args, daemon=True, name=f"fastbp-stage-{rank}")
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        self._gather(ANSWER_SECONDS)  # all are up, or one says why not

    def call(self, name: str, *args: Sequence[Any]) -> list[Any]:
        gone = next((rank for rank, pipe in enumerate(self._pipes) if pipe.closed), None)
        if gone is not None:
            self._fail(f"stage {gone} is gone (exit code {self._processes[gone].exitcode})")
        for rank, pipe in enumerate(self._pipes):  # in threads: a stage that hangs reads nothing, and a state is long
            request = ForkingPickler.dumps((name, [arg[rank] for arg in args]))
            sender = threading.Thread(target=_send, args=(pipe, request), daemon=True, name=f"to-stage-{rank}")
            sender.start()
            self._senders.append(sender)
        answers = self._gather(seconds_for(name))
        self._senders = []  # who has answered has read it all
        return answers

    def _gather(self, seconds: float) -> list[Any]:
        """One answer of every rank; the first failure ends them all."""
        answers: dict[int, Any] = {}
        while len(answers) < len(self._pipes):
            waiting: dict[Any, int] = {self._pipes[r]: r for r in range(len(self._pipes)) if r not in answers}
            ends: dict[Any, int] = {self._processes[r].sentinel: r for r in waiting.values()}
            ready = wait([*waiting, *ends], timeout=seconds)
            if not ready:
                self._fail(f"stage {min(waiting.values())} did not answer within {seconds:g} s")
            for item in [i for i in ready if i in waiting] or ready:
                rank = waiting[item] if item in waiting else ends[item]
                try:
                    ok, answer = self._pipes[rank].recv() if item in waiting else (False, None)
                except (EOFError, OSError):
                    ok, answer = False, None
                if not ok:
                    code = self._processes[rank].exitcode
                    self._fail(f"stage {rank} failed: {answer}" if answer else f"stage {rank} died (exit code {code})")
                answers[rank] = answer
        return [answers[rank] for rank in range(len(self._pipes))]

    def _fail(self, sentence: str) -> None:
        self.close(gracefully=False)
        raise StageError(f"{sentence}; all stages were ended, start again from the last checkpoint")

    def close(self, *, gracefully: bool = True) -> None:
        """End all processes."""
        if gracefully and all(process.is_alive() for process in self._processes):
            with contextlib.suppress(StageError):
                self.call("close")
        for process in self._processes:
            process.join(0.2 if not gracefully else 5.0)
            if process.is_alive():
                process.kill()
                process.join()
        for sender in self._senders:
            sender.join(5.0)
        for pipe in self._pipes:
            pipe.close()
        self._folder.cleanup()


def _send(pipe: Connection, request: Any) -> None:
    with contextlib.suppress(OSError):  # a stage that is gone gives no answer
        pipe.send_bytes(request)


def _serve(pipe: Connection, *args: Any) -> None:
    """What a local worker runs: answers calls until the pipe closes."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    answer: Callable[[bool, Any], None] = lambda ok, value: pipe.send((ok, value))  # noqa: E731
    try:
        worker = StageWorker(*args)
        answer(True, None)
        while True:
            name, arguments = pipe.recv()
            answer(True, getattr(worker, name)(*arguments))
            if name == "close":
                return
    except (EOFError, KeyboardInterrupt, BrokenPipeError):
        return
    except BaseException as error:
        with contextlib.suppress(OSError):
            answer(False, f"{type(error).__name__}: {error}")
