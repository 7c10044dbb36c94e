"""The reverse diagonal scan as Triton kernels: serial in time, parallel over channels and over chunks of time.

Where there are channels enough to fill the device one kernel walks through time. Where there are few, time is cut into
chunks: a first kernel finds for every chunk what it makes of a carry (`y = end + product * carry`), a second one
composes these for its own carry and walks through its chunk. Accumulation is in float32, or float64 for float64.

Imported by `fastbp.scan` alone, and only where there is CUDA; with TRITON_INTERPRET=1 it runs on the CPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 128  # channels per program
_PROGRAMS = 512  # enough of them to hide the latency of memory
_LEAST_CHUNK = 32
_UNROLL = 4  # as the kernels are written


def reverse_scan(x: Tensor, k: Tensor, q: Tensor | None = None, chunk: int | None = None) -> Tensor:
    """`y[t] = x[t] + q[t+1] + k[t+1] y[t+1]` of matrices (T, N) with fewer than 2^31 elements; see `fastbp.scan`.

    Args:
        x, k, q: of any floating type.
        chunk: steps per chunk, rounded up to a multiple of four; None chooses.
    """
    steps, channels = x.shape
    x, k = x.contiguous(), k.contiguous()
    y = torch.empty(steps, channels, device=x.device, dtype=torch.promote_types(k.dtype, torch.float32))
    if not y.numel():
        return y
    blocks = triton.cdiv(channels, _BLOCK)
    size = -(-chunk // _UNROLL) * _UNROLL if chunk else _chunk(steps, blocks)
    count = triton.cdiv(steps, size)
    settings = {
        "HAS_Q": q is not None,
        "ACC": tl.float64 if y.dtype == torch.float64 else tl.float32,
        "BLOCK": _BLOCK,
        "num_warps": 4,
    }
    q = k if q is None else q.contiguous()
    ends, products = (y.new_empty(count, channels) for _ in range(2))
    with torch.cuda.device_of(x):  # Triton launches on the current device
        if count > 1:
            _ends[(blocks, count)](x, k, q, ends, products, steps, channels, size, **settings)
        _scan[(blocks, count)](x, k, q, ends, products, y, steps, channels, size, **settings)
    return y


def _chunk(steps: int, blocks: int) -> int:
    """Steps per chunk, a multiple of the unrolling: all where the channels alone fill the device."""
    count = max(1, min(_PROGRAMS // blocks, steps // _LEAST_CHUNK))
    return -(-steps // count // _UNROLL) * _UNROLL


@triton.jit
def _load(X, K, Q, s, n, steps, channels, HAS_Q: tl.constexpr):
    """What enters at step s, counted from the end, and the factor on what came before it; 0 and 0 past the start.

    As it is stored: arithmetic here would wait for the memory, and all that is loaded after it would wait too.
    """
    t = steps - 1 - s
    here = (n < channels) & (t >= 0)
    later = here & (s > 0)
    x = tl.load(X + t * channels + n, mask=here, other=0.0)
    k = tl.load(K + (t + 1) * channels + n, mask=later, other=0.0)
    q = x
    if HAS_Q:
        q = tl.load(Q + (t + 1) * channels + n, mask=later, other=0.0)
    return x, q, k


@triton.jit
def _step(x, q, k, y, HAS_Q: tl.constexpr, ACC: tl.constexpr):
    """The scan one step further."""
    x = x.to(ACC)
    if HAS_Q:
        x += q.to(ACC)
    return x + k.to(ACC) * y


@triton.jit
def _ends(X, K, Q, E, P, steps, channels, size, HAS_Q: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """Of every chunk the scan's last value from a zero carry, and the product of its factors."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    chunk = tl.program_id(1)
    start = chunk * size
    y = tl.zeros([BLOCK], ACC)
    product = tl.full([BLOCK], 1.0, ACC)
    x0, q0, k0 = _load(X, K, Q, start, n, steps, channels, HAS_Q)
    x1, q1, k1 = _load(X, K, Q, start + 1, n, steps, channels, HAS_Q)
    x2, q2, k2 = _load(X, K, Q, start + 2, n, steps, channels, HAS_Q)
    x3, q3, k3 = _load(X, K, Q, start + 3, n, steps, channels, HAS_Q)
    for s in range(start, start + size, 4):
        y = _step(x0, q0, k0, y, HAS_Q, ACC)
        y = _step(x1, q1, k1, y, HAS_Q, ACC)
        y = _step(x2, q2, k2, y, HAS_Q, ACC)
        y = _step(x3, q3, k3, y, HAS_Q, ACC)
        product = product * k0 * k1 * k2 * k3
        x0, q0, k0 = _load(X, K, Q, s + 4, n, steps, channels, HAS_Q)
        x1, q1, k1 = _load(X, K, Q, s + 5, n, steps, channels, HAS_Q)
        x2, q2, k2 = _load(X, K, Q, s + 6, n, steps, channels, HAS_Q)
        x3, q3, k3 = _load(X, K, Q, s + 7, n, steps, channels, HAS_Q)
    tl.store(E + chunk * channels + n, y, mask=n < channels)
    tl.store(P + chunk * channels + n, product, mask=n < channels)


@triton.jit
def _scan(X, K, Q, E, P, Y, steps, channels, size, HAS_Q: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """The scan of one chunk; loads run four steps ahead of the arithmetic and do not wait for it."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    chunk = tl.program_id(1)
    inside = n < channels
    start = chunk * size
    x0, q0, k0 = _load(X, K, Q, start, n, steps, channels, HAS_Q)
    x1, q1, k1 = _load(X, K, Q, start + 1, n, steps, channels, HAS_Q)
    x2, q2, k2 = _load(X, K, Q, start + 2, n, steps, channels, HAS_Q)
    x3, q3, k3 = _load(X, K, Q, start + 3, n, steps, channels, HAS_Q)
    y = tl.zeros([BLOCK], ACC)
    for c in range(0, chunk):
        end = tl.load(E + c * channels + n, mask=inside, other=0.0)
        y = end + tl.load(P + c * channels + n, mask=inside, other=0.0) * y
    for s in range(start, start + size, 4):
        y0 = _step(x0, q0, k0, y, HAS_Q, ACC)
        y1 = _step(x1, q1, k1, y0, HAS_Q, ACC)
        y2 = _step(x2, q2, k2, y1, HAS_Q, ACC)
        y = _step(x3, q3, k3, y2, HAS_Q, ACC)
        x0, q0, k0 = _load(X, K, Q, s + 4, n, steps, channels, HAS_Q)
        x1, q1, k1 = _load(X, K, Q, s + 5, n, steps, channels, HAS_Q)
        x2, q2, k2 = _load(X, K, Q, s + 6, n, steps, channels, HAS_Q)
        x3, q3, k3 = _load(X, K, Q, s + 7, n, steps, channels, HAS_Q)
        t = steps - 1 - s
        tl.store(Y + t * channels + n, y0, mask=inside & (t >= 0))
        tl.store(Y + (t - 1) * channels + n, y1, mask=inside & (t >= 1))
        tl.store(Y + (t - 2) * channels + n, y2, mask=inside & (t >= 2))
        tl.store(Y + (t - 3) * channels + n, y, mask=inside & (t >= 3))
