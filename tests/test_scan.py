"""The reverse diagonal scan against a plain loop: the chunked form, and the Triton kernels in Triton's interpreter."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from fastbp.scan import ReverseScan, forward_scan, reverse_scan
from reference.recurrent import scan

STEPS = (1, 2, 3, 7, 13, 64, 256, 1000)


def problem(steps, shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, k, q = (torch.randn(steps, *shape, generator=generator, dtype=torch.float64) for _ in range(3))
    k = (k / 2).clamp(-1.2, 1.2)
    k[torch.rand(k.shape, generator=generator) < 0.2] = 0  # a ReLU's mask: nothing may divide by products of factors
    return x.to(dtype), k.to(dtype), q.to(dtype)


def land(x, q):
    """x[t] + q[t+1]."""
    return x + torch.cat([q[1:], torch.zeros_like(q[:1])])


@pytest.mark.parametrize("steps", STEPS)
def test_equals_the_loop_for_every_chunk(steps):
    x, k, q = problem(steps, (2, 3))
    for chunk in {None, 1, 2, 3, 5, steps - 1 or None, steps, steps + 4}:
        prepared = ReverseScan(k, chunk=chunk)
        for given, want in ((None, scan(x, k)), (q, scan(land(x, q), k))):
            got = prepared(x, given)
            assert got.shape == x.shape
            worst = (got - want).abs().max().item()
            assert worst < 1e-12 * (1 + want.abs().max()), f"T={steps}, chunk={chunk}, q={given is not None}: {worst}"


def test_many_channels_walk_step_by_step():
    x, k, q = problem(5, (128, 64))
    prepared = ReverseScan(k)
    assert prepared.factors.shape[0] == 1, "on a CPU, 8192 channels are one chunk"
    torch.testing.assert_close(prepared(x, q), scan(land(x, q), k), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_accumulates_in_float32(dtype):
    x, k, q = problem(50, (4,), dtype)
    got = reverse_scan(x, k, q)
    assert got.dtype == torch.float32
    want = scan(land(x.double(), q.double()), k.double())
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("steps", STEPS[:6])
def test_forward_scan_is_the_adjoint(steps):
    x, k, c = problem(steps, (3,))
    y = [c[0]]
    for t in range(1, steps):
        y.append(c[t] + k[t] * y[-1])
    forward = forward_scan(c, k)
    torch.testing.assert_close(forward, torch.stack(y), rtol=1e-12, atol=1e-12)
    left, right = (c * reverse_scan(x, k)).sum(), (forward * x).sum()
    assert abs(left - right) < 1e-10 * (1 + abs(left)), f"<c, rscan x> = {left}, <fscan c, x> = {right}"


def test_the_factor_of_a_step_leads_to_it_from_the_next():
    """K[t] instead of K[t+1], as the paper's algorithm is printed, shows in every state but the last."""
    x, k, _ = problem(6, (1,))
    k = k + 3  # no zeros, no two alike
    shifted = reverse_scan(x, k.roll(1, 0))
    got = reverse_scan(x, k)
    different = [bool(a != b) for a, b in zip(got, shifted, strict=True)]
    assert different == [True] * 5 + [False], f"states that a shift of one changes: {different}"
    k[0] = torch.nan
    assert torch.equal(reverse_scan(x, k), got), "the factor before the first step is read"


def test_refusals():
    x, k, q = problem(3, (2,))
    with pytest.raises(ValueError, match=r"^reverse_scan: x has the shape \(2, 2\), k \(3, 2\)$"):
        reverse_scan(x[:2], k)
    with pytest.raises(ValueError, match=r"^reverse_scan: q has the shape \(3, 1\), k \(3, 2\)$"):
        reverse_scan(x, k, q[:, :1])
    with pytest.raises(ValueError, match="at least one step"):
        reverse_scan(x[:0], k[:0])


INTERPRETED = """
import torch
from fastbp.scan_triton import reverse_scan
from test_scan import land, problem
from reference.recurrent import scan

torch.set_num_threads(1)
for steps, channels, dtype in (
    (1, 3, torch.float32), (2, 128, torch.float64), (7, 1, torch.float32), (13, 130, torch.bfloat16),
    (35, 5, torch.float64),
):
    x, k, q = problem(steps, (channels,), dtype)
    for chunk in {None, 4, 12} if steps < 35 else (None, 8):
        for given, want in ((None, scan(x.double(), k.double())), (q, scan(land(x.double(), q.double()), k.double()))):
            got = reverse_scan(x, k, given, chunk=chunk)
            assert got.dtype == torch.promote_types(dtype, torch.float32), got.dtype
            limit = 1e-12 if dtype == torch.float64 else 2e-5
            worst = ((got.double() - want).abs() / (1 + want.abs())).max().item()
            assert worst < limit, f"T={steps}, N={channels}, {dtype}, chunk={chunk}, q={given is not None}: {worst}"
print("equal")
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_the_triton_kernels_in_the_interpreter():
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], capture_output=True, text=True, env=environment, check=False
    )
    assert (done.returncode, done.stdout) == (0, "equal\n"), done.stderr[-2000:]


COMPILED = r"""
import re
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fastbp import scan_triton

for kernel in (scan_triton._ends, scan_triton._scan):
    for storage, acc in (("bf16", tl.float32), ("fp64", tl.float64)):
        pointer = "*fp64" if acc == tl.float64 else "*fp32"
        types = {name: "i32" for name in kernel.arg_names}
        types |= {name: pointer for name in "XKEPY" if name in types}
        types |= {"Q": f"*{storage}", "HAS_Q": "constexpr", "ACC": "constexpr", "BLOCK": "constexpr"}
        source = ASTSource(kernel, types, constexprs={"HAS_Q": True, "ACC": acc, "BLOCK": 128})
        for capability in (80, 90):
            made = triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm
            assert made["cubin"]
        loop = made["ttir"].rpartition("scf.for")[2]
        loaded = set(re.findall(r"(%\w+) = tt\.load", loop))
        assert len(loaded) == 12, f"x, k and q of four steps are {len(loaded)} loads"
        for line in loop.splitlines():
            read = loaded & set(re.findall(r"%\w+", line.partition(" = ")[2]))
            assert not read, f"the loop waits for what it loads for the next four steps: {line.strip()}"
print("compiled")
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_the_triton_kernels_compile_for_gpus_that_are_not_here(tmp_path):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", COMPILED], capture_output=True, text=True, env=environment, check=False
    )
    assert (done.returncode, done.stdout) == (0, "compiled\n"), done.stderr[-2000:]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_kernel_and_chunks_agree_on_the_device():
    for steps, shape in ((1, (3,)), (100, (130,)), (256, (8, 64)), (300, (128, 512))):
        x, k, q = (t.float().cuda() for t in problem(steps, shape))
        prepared = ReverseScan(k)
        assert prepared.triton is not None, "the Triton kernel is not used"
        torch.testing.assert_close(prepared(x, q), ReverseScan(k, kernel=False)(x, q), rtol=1e-4, atol=1e-4)
