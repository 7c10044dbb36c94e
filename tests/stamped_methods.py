"""A method that leaves a line for every step it takes, so that a test can see which runs shared a node when."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import ray

from fastbp import Method, WrappingEstimator
from fastbp.methods import Backprop


@dataclass(frozen=True)
class Stamps(Method):
    """Every step sleeps for `seconds` and appends `time node process` to a file."""

    file: str = ""
    seconds: float = 0.05
    inner: Method = Backprop()

    def bind(self, model, loss_fn):
        return _Stamps(self, self.inner.bind(model, loss_fn))

    def exact(self, model):
        return None


class _Stamps(WrappingEstimator):
    def backward(self, x, y):
        time.sleep(self.method.seconds)
        if ray.is_initialized():  # not while a plan is checked
            with open(self.method.file, "a") as file:
                file.write(f"{time.time()} {ray.get_runtime_context().get_node_id()[:8]} {os.getpid()}\n")
        return super().backward(x, y)
