"""One training run as a Ray Tune trial: an epoch is a step, its record the result."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from ray import tune

from fastbp.run import Run, RunConfig

STATE_FILE = "run.pt"


class MethodTrainable(tune.Trainable):
    """Trains `config["run"]`, a `RunConfig` dictionary.

    Further keys: `exclusive` (alone on its device), `threads` (of torch on CPU), `device`, `attempt`, `checkpoint` (a
    saved state to continue from), `cwd` (the folder that relative data paths start from), `sys_path` (where the driver
    finds modules), `git_commit`, `git_dirty`. Every result has `record` (an EpochRecord), the first one also `start`
    and the last one `end` (RunRecords). What Tune does between two steps is counted as report_blocked.
    """

    def setup(self, config: dict[str, Any]) -> None:
        if config.get("cwd") and Path(config["cwd"]).is_dir():
            os.chdir(config["cwd"])
        sys.path += [folder for folder in config.get("sys_path", ()) if folder not in sys.path]
        if config.get("git_commit"):  # of the driver: workers may run from a copy without history
            os.environ["FASTBP_GIT_COMMIT"] = config["git_commit"]
            os.environ["FASTBP_GIT_DIRTY"] = str(int(config["git_dirty"]))
        self.run = self._new_run(config)
        self._first = True
        self._returned: float | None = None  # when the last step ended; checkpoints push it on
        if config.get("checkpoint"):
            try:
                self.load_checkpoint(str(Path(config["checkpoint"]).parent))
            except Exception as error:  # a torn file, as a killed driver leaves it: from the beginning instead
                print(f"checkpoint {config['checkpoint']} cannot be used ({error}); the run starts anew")
                self.run = self._new_run(config)

    @staticmethod
    def _new_run(config: dict[str, Any]) -> Run:
        return Run(
            RunConfig.from_dict(config["run"]),
            device=config.get("device"),
            threads=config.get("threads"),
            exclusive=config.get("exclusive", False),
            attempt=config.get("attempt", 0),
        )

    def step(self) -> dict[str, Any]:
        if self._returned is not None:
            self.run.clock.add("report_blocked", time.perf_counter() - self._returned)
        start = dataclasses.asdict(self.run.start_record()) if self._first else None
        record = self.run.train_epoch()
        result: dict[str, Any] = {
            "record": dataclasses.asdict(record),
            "val_accuracy": record.val_accuracy,
            "train_seconds": record.train_seconds,
            "done": self.run.done,
        }
        if start:
            result["start"] = start
        if self.run.done:
            result["end"] = dataclasses.asdict(self.run.end())
        self._first = False
        self._returned = time.perf_counter()
        return result

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        began = time.perf_counter()
        with self.run.clock.segment("checkpoint"):
            torch.save(self.run.state_dict(), Path(checkpoint_dir) / STATE_FILE)
        self._exclude(began)

    def load_checkpoint(self, checkpoint_dir: str) -> None:  # type: ignore[override]
        began = time.perf_counter()
        with self.run.clock.segment("checkpoint"):
            state = torch.load(Path(checkpoint_dir) / STATE_FILE, weights_only=True, map_location=self.run.device)
        self.run.load_state_dict(state)
        self._exclude(began)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Start another run in the same process, once the memory of the last one is free."""
        del self.run
        self.setup(new_config)
        return True

    def _exclude(self, began: float) -> None:
        if self._returned is not None:
            self._returned += time.perf_counter() - began
