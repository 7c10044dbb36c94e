"""One training run as a Ray Tune trial: an epoch is a step, its record the result."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import ray
import torch
from ray import tune
from ray.util import get_current_placement_group

from fastbp.config import RunConfig
from fastbp.record import RunRecord
from fastbp.run import Run
from fastbp.staged import StagedRun, stages
from trainables.free_device import OtherPrograms, check_alone, unwatched, wait_until_free
from trainables.given_device import device_for
from trainables.stage_actors import RayWorkers

STATE_FILE = "run.pt"
NOT_WATCHED = "not watched: the run has several processes"


class MethodTrainable(tune.Trainable):
    """Trains `config["run"]`, a `RunConfig` dictionary.

    Further keys: `exclusive` (alone on its device), `threads` (of torch on CPU), `device`, `attempt`, `checkpoints`
    (saved states to continue from, paths or URIs, the first that can be used), `cwd` (where relative data paths start),
    `sys_path` (where the driver finds modules), `cluster` (whether records name Ray's node beside the host),
    `git_commit`, `git_dirty`. Every result has `record` (an EpochRecord), the first one also `start` and the last one
    `end` (RunRecords). What Tune does between two steps is counted as report_blocked.
    Beside them stand the few values that a searcher wants to see.
    """

    def setup(self, config: dict[str, Any]) -> None:
        if config.get("cwd") and Path(config["cwd"]).is_dir():
            os.chdir(config["cwd"])
        sys.path += [folder for folder in config.get("sys_path", ()) if folder not in sys.path]
        if config.get("git_commit"):  # of the driver: workers may run from a copy without history
            os.environ["FASTBP_GIT_COMMIT"] = config["git_commit"]
            os.environ["FASTBP_GIT_DIRTY"] = str(int(config["git_dirty"]))
        self._alone_on, self._others, self._unwatched = None, None, ""
        if config.get("exclusive"):
            self._look_after(config)
        self.run = self._new_run(config)
        self._node = node_name(cluster=bool(config.get("cluster")))
        self._first = True
        self._returned: float | None = None  # when the last step ended; checkpoints push it on
        self._remark = self._continue_from(config)

    def _look_after(self, config: dict[str, Any]) -> None:
        """Wait until the device of a measured run is free, and see how it can be watched from here.

        The GPUs of stages belong to other processes, and nobody watches them.
        """
        wanted = config.get("device") or "cpu"
        staged = stages(RunConfig.from_dict(config["run"]).method) > 1
        device = torch.device(wanted if staged else device_for(wanted))
        if device.type == "cpu":
            threads = config.get("threads") or torch.get_num_threads()
            self._others = OtherPrograms(threads=threads, own=self._process_seconds)
        if staged:
            self._unwatched = f"the {'processor was' if self._others else 'GPUs were'} {NOT_WATCHED}"
        else:
            self._alone_on, self._unwatched = device, unwatched(device)
            wait_until_free(device)

    def _process_seconds(self) -> float | None:
        """Processor seconds of the run so far; None where those of its stages are not known."""
        if not isinstance(self.run, StagedRun):
            return time.process_time()
        assert isinstance(self.run.workers, RayWorkers)
        of_stages = self.run.workers.process_seconds()
        return None if of_stages is None else of_stages + time.process_time()

    @staticmethod
    def _new_run(config: dict[str, Any]) -> Run | StagedRun:
        """The run in this process, or where the method says so its modules in actors of the trial's placement group."""
        run = RunConfig.from_dict(config["run"])
        options = {name: config[name] for name in ("threads", "exclusive", "attempt") if name in config}
        count = stages(run.method)
        if count == 1:
            return Run(run, device=device_for(config["device"]) if config.get("device") else None, **options)
        if options.get("threads"):
            options["threads"] = max(1, options["threads"] // count)
        workers = RayWorkers(run, options | {"device": config.get("device")}, get_current_placement_group())
        return StagedRun(run, workers, config.get("threads"))

    def _continue_from(self, config: dict[str, Any]) -> str:
        """Load the first saved state that can be used; returns what to say about those that cannot.

        A killed process leaves torn files, and a file may hold anything: nothing but tensors and plain values is read.
        """
        unusable = []
        for path in config.get("checkpoints", ()):
            try:
                self._load(path)
                break
            except Exception as error:
                first = str(error).strip().partition("\n")[0].partition(". ")[0]
                unusable.append(f"{path} ({type(error).__name__}: {first[:120]})")
                self.cleanup()
                self.run = self._new_run(config)
        if not unusable:
            return ""
        then = f"it continues from epoch {self.run.epoch}" if self.run.epoch else "it starts anew"
        return f"saved state unusable: {'; '.join(unusable)}; {then}"

    def step(self) -> dict[str, Any]:
        if self._returned is not None:
            self.run.clock.add("report_blocked", time.perf_counter() - self._returned)
        start = self._as_dict(self.run.start_record()) | {"reason": self._remark} if self._first else None
        with self._others.watched() if self._others else contextlib.nullcontext():
            record = self.run.train_epoch()
        if self._alone_on is not None:
            check_alone(self._alone_on)
        result: dict[str, Any] = {
            "record": dataclasses.asdict(record),
            "record/flops_executed": record.flops_executed,
            "val_accuracy": record.val_accuracy,
            "train_seconds": record.train_seconds,
            "done": self.run.done,
        }
        if start:
            result["start"] = start
        if self.run.done:
            result["end"] = self._end()
            result["end/status"] = self.run.status
        self._first = False
        self._returned = time.perf_counter()
        return result

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        began = time.perf_counter()
        with self.run.clock.segment("checkpoint"):
            torch.save(self.run.state_dict(), Path(checkpoint_dir) / STATE_FILE)
        self._exclude(began)

    def load_checkpoint(self, checkpoint_dir: str) -> None:  # type: ignore[override]
        self._load(str(Path(checkpoint_dir) / STATE_FILE))

    def _load(self, place: str) -> None:
        """Continue from a saved state at a path, or at a URI that pyarrow reads, as Tune's storage has them."""
        began = time.perf_counter()
        with self.run.clock.segment("checkpoint"):
            file = io.BytesIO(_content(place)) if "://" in place else place
            state = torch.load(file, weights_only=True, map_location=self.run.device)
        self.run.load_state_dict(state)
        self._exclude(began)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Start another run in the same process, once the memory of the last one is free."""
        self.cleanup()
        del self.run
        self.setup(new_config)
        return True

    def cleanup(self) -> None:
        """End the actors of a staged run."""
        run = getattr(self, "run", None)
        if isinstance(run, StagedRun):
            run.close()

    def _end(self) -> dict[str, Any]:
        """The run's last record; beside busy programs it was not alone on its device, and has that as its reason.

        Where nobody could watch the device, that is the reason, and the run is taken at its word.
        """
        end = self._as_dict(self.run.end())
        remark = self._others.remark() if self._others else ""
        if remark:
            end["exclusive"] = False
        elif not (self._others and self._others.seconds):
            remark = self._unwatched
        return end | {"reason": end["reason"] or remark}

    def _as_dict(self, record: RunRecord) -> dict[str, Any]:
        out = dataclasses.asdict(record)
        out["device"]["node"] = self._node
        return out

    def _exclude(self, began: float) -> None:
        if self._returned is not None:
            self._returned += time.perf_counter() - began


def _content(uri: str) -> bytes:
    from pyarrow.fs import FileSystem

    system, path = FileSystem.from_uri(uri)
    with system.open_input_file(path) as file:
        return file.read()


def node_name(*, cluster: bool) -> str:
    """The host name; on a cluster with the start of Ray's node id, which tells two nodes of one host apart."""
    if not cluster:
        return platform.node()
    return f"{platform.node()}/{ray.get_runtime_context().get_node_id()[:8]}"
