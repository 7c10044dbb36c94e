"""Interleaved timing: what two things cost relative to each other on a machine that does not hold still.

All candidates run in turn, in an order that reverses every round; the figure is the median over rounds of the ratio
within a round, so that slow drifts cancel.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from fastbp.clock import Clock
from fastbp.data import load_dataset
from fastbp.method import Method
from fastbp.models import make_model
from fastbp.recipe import Recipe


def interleaved(
    candidates: dict[str, Callable[[], Any]], rounds: int, device: torch.device | str = "cpu"
) -> dict[str, list[float]]:
    """Wall-clock seconds of every candidate in every round, device-synchronised.

    Args:
        candidates: name to a function without arguments; each is called once untimed first.
        rounds: timed calls of each.
        device: waited for at both ends.
    """
    synchronize = Clock(device).synchronize
    for run in candidates.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    names = list(candidates)
    for i in range(rounds):
        for name in names if i % 2 == 0 else reversed(names):
            synchronize()
            start = time.perf_counter()
            candidates[name]()
            synchronize()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def ratios(seconds: dict[str, list[float]], baseline: str) -> dict[str, tuple[float, float, float]]:
    """Lower quartile, median and upper quartile of each candidate's time over the baseline's of the same round."""
    out = {}
    for name, times in seconds.items():
        values = [a / b for a, b in zip(times, seconds[baseline], strict=True)]
        low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
        out[name] = (low, middle, high)
    return out


def step_seconds(
    methods: dict[str, Method],
    *,
    data: str,
    model: str,
    recipe: Recipe,
    device: torch.device,
    steps: int = 5,
    rounds: int = 15,
    model_args: dict[str, Any] | None = None,
) -> dict[str, list[float]]:
    """Seconds of `steps` training steps (forward, estimate, optimizer) of each method, interleaved.

    Methods with a plan are timed in the epoch after the first, at the recipe's batch size.
    """
    dataset = load_dataset(data, device=device, dtype=recipe.dtype)
    x, y = dataset.dummy_batch(recipe.batch_size)
    candidates = {}
    for name, method in methods.items():
        net = make_model(model, dataset.input_shape, dataset.classes, model_args).to(device, recipe.dtype).train()
        estimator = method.bind(net, recipe.make_loss())
        estimator.start_epoch(2)
        candidates[name] = _stepper(estimator, recipe.make_optimizer(net.parameters()), x, y, steps)
    with recipe.precision_context(device):
        return interleaved(candidates, rounds, device)


def _stepper(estimator: Any, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor, steps: int):
    def run() -> None:
        for _ in range(steps):
            optimizer.zero_grad(set_to_none=True)
            estimator.backward(x, y)
            optimizer.step()

    return run
