"""A method whose training time is known: every step sleeps."""

from __future__ import annotations

import time
from dataclasses import dataclass

from fastbp import Method, WrappingEstimator
from fastbp.methods import Backprop


@dataclass(frozen=True)
class Sleeps(Method):
    """Backprop that takes `seconds` longer in every step."""

    seconds: float = 0.1

    def bind(self, model, loss_fn):
        return _Sleeps(self, Backprop().bind(model, loss_fn))

    def exact(self, model):
        return None


class _Sleeps(WrappingEstimator):
    slept = 0.0  # seconds, as they were: a busy machine wakes a sleeper late

    def backward(self, x, y):
        before = time.perf_counter()
        time.sleep(self.method.seconds)
        self.slept += time.perf_counter() - before
        return super().backward(x, y)
