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
class Nan(Method):
    """Its loss is not a number."""

    def bind(self, model, loss_fn):
        return _Nan(self, Backprop().bind(model, loss_fn))

    def exact(self, model):
        return None


class _Nan(WrappingEstimator):
    def backward(self, x, y):
        return super().backward(x, y) * torch.nan
