"""Methods that go wrong, importable from a sweep file as `broken_methods:Raises` and so on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from fastbp import Method, WrappingEstimator
from fastbp.methods import Backprop


@dataclass(frozen=True)
class Raises(Method):
    """Raises in the backward pass; with a `flag` file, only until that file exists."""

    flag: str = ""

    def bind(self, model, loss_fn):
        return _Raises(self, Backprop().bind(model, loss_fn))

    def exact(self, model):
        return None


class _Raises(WrappingEstimator):
    def backward(self, x, y):
        flag = Path(self.method.flag) if self.method.flag else None
        if flag is None or not flag.exists():
            if flag is not None:
                flag.touch()
            raise RuntimeError("boom in the backward pass")
        return super().backward(x, y)


@dataclass(frozen=True)
class Stumbles(Method):
    """Raises in its twelfth step, once: until the file `flag` exists; warm-up has fewer steps."""

    flag: str = ""

    def bind(self, model, loss_fn):
        return _Stumbles(self, Backprop().bind(model, loss_fn))

    def exact(self, model):
        return None


class _Stumbles(WrappingEstimator):
    def __init__(self, method, inner):
        super().__init__(method, inner)
        self.steps = 0

    def backward(self, x, y):
        self.steps += 1
        flag = Path(self.method.flag)
        if self.steps == 12 and not flag.exists():
            flag.touch()
            raise RuntimeError("stumbled in step 12")
        return super().backward(x, y)


@dataclass(frozen=True)
class Nan(Method):
    """Its loss is not a number."""

    def bind(self, model, loss_fn):
        return _Nan(self, Backprop().bind(model, loss_fn))

    def exact(self, model):
        return None


class _Nan(WrappingEstimator):
    def backward(self, x, y):
        return super().backward(x, y) * torch.nan
