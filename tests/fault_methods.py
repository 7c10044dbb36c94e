"""Methods for fault tests: training slow enough to be hit in the middle, and failures that happen once."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import torch

from fastbp import Method, WrappingEstimator
from fastbp.methods import Backprop


@dataclass(frozen=True)
class Slow(Method):
    """Backprop that waits in every step, twenty times as long while the file FAULT_BRAKE exists."""

    seconds: float = 0.1

    def bind(self, model, loss_fn):
        if "FAULT_CLOCK" in os.environ:
            set_back_clocks()
        return _Slow(self, Backprop().bind(model, loss_fn))

    def exact(self, model):
        return None


class _Slow(WrappingEstimator):
    def backward(self, x, y):
        brake = os.environ.get("FAULT_BRAKE")
        time.sleep(self.method.seconds * (20 if brake and Path(brake).exists() else 1))
        return super().backward(x, y)


class _SetBack(datetime):
    """Two hours ago, once the file FAULT_CLOCK exists."""

    @classmethod
    def now(cls, tz=None):
        return datetime.now(tz) - timedelta(hours=2 if Path(os.environ["FAULT_CLOCK"]).exists() else 0)


def set_back_clocks():
    """Let every module of ours in this process read such a clock."""
    import sweeps.drive
    import sweeps.recorder  # noqa: F401 - imported here so that it is among the modules

    for name, module in list(sys.modules.items()):
        if name.startswith(("fastbp.", "sweeps.", "trainables.")) and vars(module).get("datetime") is datetime:
            module.datetime = _SetBack


@dataclass(frozen=True)
class Hungry(Method):
    """Runs out of memory in its first try; `kind` is python or device, `flag` the file that remembers the try."""

    kind: str = "python"
    flag: str = ""

    def bind(self, model, loss_fn):
        return _Hungry(self, Backprop().bind(model, loss_fn))

    def exact(self, model):
        return None


class _Hungry(WrappingEstimator):
    def backward(self, x, y):
        flag = Path(self.method.flag)
        if not flag.exists():
            flag.touch()
            if self.method.kind == "python":
                return torch.zeros(len(bytearray(1 << 62)))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return super().backward(x, y)
