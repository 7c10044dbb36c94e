"""Diagonal linear recurrences over time, `y[t] = x[t] + k[t+1] y[t+1]`, faster than one step after another.

The factors `k` are given once per training step, the scan then runs for many `x`: `ReverseScan(k)`. On CUDA the work
is a Triton kernel, elsewhere (and where Triton is missing) a two-level form of about 2 sqrt(T) tensor operations. All
of it works without autograd. Triton's own `associative_scan` and torch's prototype are not used: both have returned
wrong values for `reverse=True` (triton issue 4362, pytorch issue 137943).
"""

from __future__ import annotations

import functools
import math
import warnings
from types import ModuleType

import torch
from torch import Tensor

_SERIAL_FROM = 8192  # channels from which a CPU gains nothing from fewer, larger operations
_INDEXABLE = 2**31


def reverse_scan(x: Tensor, k: Tensor, q: Tensor | None = None) -> Tensor:
    """`y[t] = x[t] + q[t+1] + k[t+1] y[t+1]`, from the last step to the first; what is past the end is zero.

    Args:
        x: (T, ...), of any floating type; steps first.
        k: the factors, of the same shape. `k[0]` is not used: it would lead to the state before the first.
        q: of the same shape, added one step earlier than it stands; `q[0]` is not used.

    Returns:
        (T, ...) in float32, or float64 where `k` is.

    Raises:
        ValueError: shapes differ, or there is no step.

    >>> reverse_scan(torch.ones(3), torch.tensor([9.0, 0.5, 0.5])).tolist()
    [1.75, 1.5, 1.0]
    """
    return ReverseScan(k)(x, q)


def forward_scan(x: Tensor, k: Tensor) -> Tensor:
    """`y[t] = x[t] + k[t] y[t-1]`, from the first step to the last: the adjoint of `reverse_scan`.

    Args:
        x: (T, ...).
        k: the factors, of the same shape; `k[0]` is not used.

    Returns:
        (T, ...) in float32, or float64 where `k` is.
    """
    factors = k.flip(0).roll(1, 0)  # at place j the factor that leads from j to j - 1 of the reversed sequence
    return ReverseScan(factors)(x.flip(0)).flip(0)


class ReverseScan:
    """`reverse_scan` for factors that stay: what depends on them alone is prepared here.

    Args:
        k: (T, ...); taken in float32, or float64 where it is.
        kernel: False: not the Triton kernel, on no device.
        chunk: steps per chunk of the form without Triton; None chooses.
    """

    def __init__(self, k: Tensor, *, kernel: bool = True, chunk: int | None = None) -> None:
        if k.dim() < 1 or not len(k):
            raise ValueError(
                f"reverse_scan: k has the shape {tuple(k.shape)}; expected (T, ...) with at least one step"
            )
        self.shape, self.dtype = k.shape, torch.promote_types(k.dtype, torch.float32)
        k = k.to(self.dtype).reshape(len(k), -1).contiguous()
        self.triton = _kernels(k.device) if kernel and k.numel() < _INDEXABLE else None
        if self.triton is not None:
            self.k = k
        else:
            self._prepare(k, chunk)

    def _prepare(self, k: Tensor, chunk: int | None) -> None:
        """The factors in chunks of `size` steps, and within each the products of all that follow."""
        steps, channels = k.shape
        serial = k.device.type == "cpu" and channels >= _SERIAL_FROM
        size = chunk or (steps if serial else max(1, math.isqrt(steps)))
        count = -(-steps // size)
        factors = k.new_zeros(count * size, channels)
        factors[: steps - 1] = k[1:]
        self.factors = factors.view(count, size, channels)
        self.products = self.factors
        if count > 1:
            self.products = self.factors.clone()
            for s in range(size - 2, -1, -1):
                self.products[:, s] *= self.products[:, s + 1]

    def __call__(self, x: Tensor, q: Tensor | None = None) -> Tensor:
        for name, given in (("x", x), ("q", q)):
            if given is not None and given.shape != self.shape:
                raise ValueError(f"reverse_scan: {name} has the shape {tuple(given.shape)}, k {tuple(self.shape)}")
        x = x.reshape(len(x), -1)
        q = None if q is None else q.reshape(len(q), -1)
        y = self._chunked(x, q) if self.triton is None else self.triton.reverse_scan(x, self.k, q)
        return y.view(self.shape)

    def _chunked(self, x: Tensor, q: Tensor | None) -> Tensor:
        """Every chunk from zero, all chunks at once; then what enters each from the one after it."""
        steps = len(x)
        count, size, channels = self.factors.shape
        padded = self.factors.new_empty(count * size, channels)
        padded[steps:] = 0
        if q is None:
            padded[:steps] = x
        else:
            torch.add(x[:-1].to(self.dtype), q[1:], out=padded[: steps - 1])
            padded[steps - 1] = x[-1]
        y = padded.view(count, size, channels)
        for s in range(size - 2, -1, -1):
            y[:, s].addcmul_(self.factors[:, s], y[:, s + 1])
        for c in range(count - 2, -1, -1):
            y[c].addcmul_(self.products[c], y[c + 1, 0])
        return padded[:steps]


@functools.cache
def _kernels(device: torch.device) -> ModuleType | None:
    """The Triton kernels where they work on this device, tried once; None elsewhere."""
    if device.type != "cuda":
        return None
    try:
        from fastbp import scan_triton

        one = torch.ones(3, 2, device=device)
        if scan_triton.reverse_scan(one, one, one).tolist() != [[8.0, 8.0], [5.0, 5.0], [1.0, 1.0]]:
            raise RuntimeError("it gives wrong numbers")
    except Exception as error:  # no Triton, no compiler for it, a device that it does not know
        warnings.warn(
            f"the Triton scan does not work on {device} ({type(error).__name__}: {error}); HighwayBP over time uses a "
            "slower form",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    return scan_triton
