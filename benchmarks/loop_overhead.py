"""Claim: our loop costs at most 2 % over a hand-written torch loop that does the same work.

Both train the same net on the same resident data with the same optimizer, one epoch each in turn, in one process; the
figure is the median over rounds of the ratio of their times within a round, with its 95 % interval.

    python benchmarks/loop_overhead.py --rounds 40
"""

from __future__ import annotations

import argparse
import math
import statistics
from typing import Any

import torch
from torch.nn import functional

from benchmark import environment, judge, median_interval, write_json
from fastbp.bench import interleaved
from fastbp.config import RunConfig, Task
from fastbp.recipe import Recipe
from fastbp.run import Run

LIMIT = 1.02


def hand_written(run: Run) -> Any:
    """The loop that a careful person would write for this one net and data set, without any of our classes."""
    data, recipe = run.data, run.recipe
    x_all, y_all = data.train.x, data.train.y
    mean, std = (torch.tensor(v, device=run.device)[:, None, None] for v in (data.mean, data.std))
    model, optimizer = run.estimator.model.train(), run.optimizer
    state = {"epoch": 0}

    def epoch() -> None:
        order = torch.randperm(len(x_all)).to(run.device)
        total = torch.zeros((), device=run.device, dtype=torch.float64)
        steps = math.ceil(len(x_all) / recipe.batch_size)
        for i in range(steps):
            index = order[i * recipe.batch_size : (i + 1) * recipe.batch_size]
            x, y = (x_all[index] - mean) / std, y_all[index]
            progress = (state["epoch"] + i / steps) / recipe.epochs
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr * 0.5 * (1 + math.cos(math.pi * progress))
            optimizer.zero_grad(set_to_none=True)
            loss = functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            total += loss.detach() * len(y)
        total.item()
        state["epoch"] += 1

    return epoch


def ours(run: Run) -> Any:
    """One epoch of `Run` without its evaluation, which has a clock segment of its own."""
    run.warm_up()

    def epoch() -> None:
        run.estimator.start_epoch(run.epoch)
        run._train(run.recipe.batch_size, 1.0)
        run.epoch += 1

    return epoch


def measure(model: str, model_args: dict[str, Any], rounds: int, threads: int) -> dict[str, Any]:
    recipe = Recipe(epochs=rounds + 2, lr=0.01)
    runs = [Run(RunConfig(Task("digits", model, model_args=model_args), recipe), threads=threads) for _ in range(2)]
    seconds = interleaved({"hand-written": hand_written(runs[0]), "fastbp": ours(runs[1])}, rounds, runs[0].device)
    pairs = [a / b for a, b in zip(seconds["fastbp"], seconds["hand-written"], strict=True)]
    ratio, low, high = median_interval(pairs)
    per_step = statistics.median(seconds["hand-written"]) / runs[0].data.steps(recipe.batch_size)
    return {"model": model, **model_args, "step_ms": per_step * 1e3, "ratio": ratio, "low": low, "high": high}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", default="results/benchmarks/loop_overhead.json")
    arguments = parser.parse_args()
    rows = []
    print(f"{'net':24s} {'step ms':>8s} {'fastbp / hand-written':>22s} {'95 % interval':>20s}")
    for model, model_args in (("resnet_tiny", {"width": 16}), ("mlp", {"width": 256}), ("vit_tiny", {})):
        row = measure(model, model_args, arguments.rounds, arguments.threads)
        rows.append(row)
        interval = f"{row['low']:.4f} to {row['high']:.4f}"
        print(f"{model:24s} {row['step_ms']:8.2f} {row['ratio']:22.4f} {interval:>20s}", flush=True)
    write_json(arguments.out, {"limit": LIMIT, "rounds": arguments.rounds, "rows": rows, **environment()})
    figures = {row["model"]: row["ratio"] for row in rows}
    judge("loop_overhead", figures, dict.fromkeys(figures, LIMIT), arguments.out, places=4)


if __name__ == "__main__":
    main()
