"""DDG of modules that sleep: the schedule alone, without computing, on however few cores."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from crew import Crew
from fastbp import DDG

# Milliseconds (forward, backward) of every module; at least 100 together, so that what does not sleep stays small.
NAPS = (
    ("K = 2", [(40, 80)] * 2),
    ("K = 3", [(40, 80)] * 3),
    ("K = 3, uneven", [(40, 60), (50, 90), (30, 70)]),
    ("K = 4", [(40, 80)] * 4),
)


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: float, backward: float) -> Tensor:
        ctx.backward_seconds = backward
        time.sleep(forward)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        time.sleep(ctx.backward_seconds)
        return grad, None, None


class Nap(nn.Module):
    """The identity, taking its time in both directions."""

    def __init__(self, forward_seconds: float, backward_seconds: float) -> None:
        super().__init__()
        self.seconds = (forward_seconds, backward_seconds)

    def forward(self, x: Tensor) -> Tensor:
        return _Sleep.apply(x, *self.seconds)  # type: ignore[return-value]


def napping(
    rank: int, ranks: int, device: torch.device, milliseconds: Sequence[tuple[int, int]]
) -> tuple[Callable[[], Any], Any]:
    """One module of a net whose every module is a small layer and a nap."""
    torch.manual_seed(0)
    modules = [nn.Sequential(nn.Linear(4, 4), Nap(f / 1e3, b / 1e3)) for f, b in milliseconds]
    model = nn.Sequential(*modules).to(device)
    estimator = DDG(modules=ranks, processes=True, cuts=tuple(range(1, ranks))).bind(model, lambda out, y: out.sum())
    optimizer = torch.optim.SGD(estimator.param_groups(), lr=1e-4)
    x, y = torch.randn(8, 4, device=device), torch.zeros(8, device=device)
    estimator.start_epoch(0)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        estimator.backward(x, y)
        optimizer.step()

    return step, None


def seconds_per_batch(milliseconds: Sequence[tuple[int, int]], steps: int) -> float:
    """Of the last module in the steady state: the pipeline fills during the first steps."""
    ranks = len(milliseconds)
    crew = Crew(napping, ranks, 1, milliseconds=milliseconds)
    try:
        ends = crew(ranks + 1 + steps)[-1]
    finally:
        crew.close()
    return (ends[-1] - ends[ranks]) / steps


def predicted(milliseconds: Sequence[tuple[int, int]]) -> dict[str, float]:
    """Seconds per batch of three schedules with the same numbers, messages free.

    `lazy`: a module asks for its error signal when it needs it; `eager`: at the end of the step before (the authors'
    loop); `barrier`: all forwards, then all backwards (the paper's picture).
    """
    times = [(f / 1e3, b / 1e3) for f, b in milliseconds]
    lazy = max(f + b for f, b in times)
    eager = max([lazy, *(f + f_next + b_next for (f, _), (f_next, b_next) in pairwise(times))])
    return {"lazy": lazy, "eager": eager, "barrier": sum(f for f, _ in times) + max(b for _, b in times)}


def nap_rows(naps: Sequence[tuple[str, list[tuple[int, int]]]], steps: int) -> list[dict[str, Any]]:
    rows = []
    for name, milliseconds in naps:
        want, got = predicted(milliseconds), seconds_per_batch(milliseconds, steps)
        rows.append({"name": name, "measured": got, "ratio": got / want["lazy"], **want})
    return rows
