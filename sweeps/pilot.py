"""Pilot steps: what a run of a configuration costs on this machine, from a few timed steps of every kind of epoch."""

from __future__ import annotations

import dataclasses
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from fastbp.config import RunConfig
from fastbp.data import Dataset
from fastbp.method import uncompared
from fastbp.recipe import Recipe
from fastbp.run import Run
from fastbp.staged import StagedRun, open_run, stages

_ROUNDS = 3  # timed passes over the steps of a kind; the median counts


@dataclass(frozen=True)
class EpochCost:
    """What one example costs in one kind of epoch.

    Attributes:
        seconds_per_example: of training, in an epoch of this kind.
        flops_per_example: forward and backward; None where the counter is blind.
    """

    seconds_per_example: float
    flops_per_example: float | None


@dataclass(frozen=True)
class Pilot:
    """What a run costs, alone in this process.

    Attributes:
        kinds: cost by kind of epoch.
        order: the kind of every epoch of the run.
        examples: training examples of an epoch.
        setup_seconds: once per run: data, model, binding and warm-up.
        eval_seconds: of one evaluation of the validation split.
        test_seconds: of the test split, once per run.
        eval_every_epochs: the recipe's.
        device, threads: where it was measured.
    """

    kinds: dict[str, EpochCost]
    order: tuple[str, ...]
    examples: int
    setup_seconds: float
    eval_seconds: float
    test_seconds: float
    eval_every_epochs: int
    device: str
    threads: int

    @property
    def seconds_per_example(self) -> float:
        """Mean training seconds per example over the epochs of the run."""
        return statistics.fmean(self.kinds[kind].seconds_per_example for kind in self.order)

    @property
    def flops_per_example(self) -> float | None:
        """Mean FLOPs per example over the epochs of the run; None where any kind's are unknown."""
        flops = [self.kinds[kind].flops_per_example for kind in self.order]
        return None if None in flops else statistics.fmean(f for f in flops if f is not None)

    def train_seconds(self, epochs: int | None = None) -> float:
        """Training seconds of the first `epochs` epochs; default: of all.

        Raises:
            ValueError: the piloted run has fewer epochs.
        """
        epochs = len(self.order) if epochs is None else epochs
        if epochs > len(self.order):
            raise ValueError(f"epochs = {epochs}: the pilot knows the {len(self.order)} epochs of its run")
        return self.examples * sum(self.kinds[kind].seconds_per_example for kind in self.order[:epochs])

    def run_seconds(self, epochs: int | None = None) -> float:
        """Seconds of a whole run of `epochs` epochs: set-up, warm-up, training and evaluation."""
        epochs = len(self.order) if epochs is None else epochs
        evaluations = math.ceil(epochs / self.eval_every_epochs)
        return self.setup_seconds + self.train_seconds(epochs) + evaluations * self.eval_seconds + self.test_seconds


def pilot(
    config: RunConfig,
    *,
    device: torch.device | str | None = None,
    threads: int | None = None,
    steps: int = 4,
    limit_seconds: float = 5.0,
    data: Dataset | None = None,
) -> Pilot:
    """Time a few steps of every kind of epoch of a run, in the run's own loop, and one batch of evaluation.

    Nothing is recorded; torch's number of threads is as before afterwards.

    Args:
        config: of the run; its number of epochs says which kinds there are, and how often.
        device: torch device; default the first CUDA device, else the CPU.
        threads: of torch on the CPU; default: as it is.
        steps: at least, per pass, rounded up to the estimator's period.
        limit_seconds: after so much timing no further pass is begun; every kind gets one.
        data: the task's data set, loaded already; its loading is then not in `setup_seconds`.

    Raises:
        TypeError, ValueError, RuntimeError: what a `Run` of this configuration would raise.
    """
    before, rng = torch.get_num_threads(), torch.get_rng_state()
    try:
        return _pilot(config, device, threads, steps, limit_seconds, data)
    finally:
        torch.set_num_threads(before)
        torch.set_rng_state(rng)
        gc.collect()  # hooks hold the model in cycles
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def _pilot(
    config: RunConfig,
    device: torch.device | str | None,
    threads: int | None,
    steps: int,
    limit_seconds: float,
    data: Dataset | None,
) -> Pilot:
    recipe = config.recipe
    longer = replace(recipe, epochs=recipe.epochs + 1, eval_every_epochs=1)  # no epoch is the last
    piloted = replace(config, recipe=longer, method=uncompared(config.method))  # in few steps it would weigh too much
    if stages(config.method) == 1:
        run: Run | StagedRun = Run(piloted, device=device, threads=threads, data=data)
    else:
        run = open_run(piloted, device=device, threads=threads)
    try:
        return _timed(run, recipe, steps, limit_seconds)
    finally:
        run.close()


def _timed(run: Run | StagedRun, recipe: Recipe, steps: int, limit_seconds: float) -> Pilot:
    begun = _on_every_rank(run, _begin)
    first, order = begun[0], tuple(begun[0].order[: recipe.epochs])
    passes: dict[str, list[_Pass]] = {kind: [] for kind in order}
    began = time.perf_counter()
    for i in range(1 + _ROUNDS):  # the first pass fills pipelines and caches
        if i > 1 and time.perf_counter() - began > limit_seconds:
            break
        for kind, done in passes.items():
            batch_size = done[-1].batch_size if done else recipe.batch_size
            examples = batch_size * _whole_periods(steps, first.period)
            ranks = _on_every_rank(run, _timed_epoch, order.index(kind), examples, recipe.eval_batch_size)
            done.append(
                _Pass(
                    ranks[0].batch_size,
                    max(rank.seconds_per_example for rank in ranks),
                    max(rank.eval_seconds_per_example for rank in ranks),
                )
            )
    timed = {kind: done[1:] for kind, done in passes.items()}
    kinds = {
        kind: EpochCost(statistics.median(p.seconds_per_example for p in done), _sum(b.flops[kind] for b in begun))
        for kind, done in timed.items()
    }
    eval_seconds = statistics.median(p.eval_seconds_per_example for done in timed.values() for p in done)
    return Pilot(
        kinds=kinds,
        order=order,
        examples=first.train,
        setup_seconds=max(b.setup_seconds for b in begun),
        eval_seconds=eval_seconds * first.val,
        test_seconds=eval_seconds * first.test,
        eval_every_epochs=recipe.eval_every_epochs,
        device=first.device,
        threads=first.threads,
    )


def _on_every_rank(run: Run | StagedRun, function: Callable[..., Any], *args: Any) -> list[Any]:
    """`function(run, *args)` in this process, or in every process of a staged run at once."""
    if isinstance(run, Run):
        return [function(run, *args)]
    return run.workers.call("apply", [function] * run.ranks, *([arg] * run.ranks for arg in args))


def _sum(values: Iterable[float | None]) -> float | None:
    known = list(values)
    return None if None in known else sum(value for value in known if value is not None)


@dataclass(frozen=True)
class _Begun:
    """A run that is set up and warm."""

    setup_seconds: float
    order: list[str]
    flops: dict[str, float | None]
    period: int
    train: int
    val: int
    test: int
    device: str
    threads: int


def _begin(run: Run) -> _Begun:
    run.warm_up()
    setup = (run.clock.seconds.setup_seconds or 0.0) + (run.clock.seconds.warmup_seconds or 0.0)
    data = run.data
    sizes = len(data.train), len(data.val), len(data.test)
    order = run.rehearsal.kinds
    return _Begun(
        setup, order, run.rehearsal.flops, run.estimator.period, *sizes, run.device.type, torch.get_num_threads()
    )


@dataclass(frozen=True)
class _Pass:
    batch_size: int
    seconds_per_example: float
    eval_seconds_per_example: float


def _timed_epoch(run: Run, epoch: int, examples: int, eval_examples: int) -> _Pass:
    """One epoch over so many of the run's examples, as if it were number `epoch`; a NaN loss costs the same time."""
    full, before, steps = run.data, dataclasses.replace(run.clock.seconds), run.steps
    run.data = replace(full, train=full.train.first(examples), val=full.val.first(eval_examples))
    run.rewind(epoch)
    record = run.train_epoch()
    # Steps that empty a pipeline would weigh too much in so short an epoch.
    share = run.data.steps(record.batch_size) / (record.steps - steps)
    train = (record.train_seconds or 0.0) - (before.train_seconds or 0.0)
    evaluation = (record.eval_seconds or 0.0) - (before.eval_seconds or 0.0)
    out = _Pass(record.batch_size, share * train / len(run.data.train), evaluation / len(run.data.val))
    run.data = full
    return out


def _whole_periods(steps: int, period: int) -> int:
    return math.ceil(steps / period) * period
