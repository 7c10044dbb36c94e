"""What a run does before it trains: steps of every kind to come on a copy of its model, to warm up and count FLOPs.

The run's own weights, buffers and random numbers are not touched. Batches come through the same gather and
augmentation as in training, in both sizes of an epoch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fastbp.config import RunConfig
from fastbp.data import Dataset
from fastbp.flops import step_flops
from fastbp.method import EpochPlan, GradientEstimator, reseed, start_again, uncompared
from fastbp.seeding import mixed, seeded

_STEPS = 3  # per kind of epoch


class Rehearsal:
    """Steps on copies of a run's model.

    Attributes:
        plans: of every epoch as an estimator that has not trained makes them; empty before `every_kind`.
        flops: per example, by kind of epoch; None where they are unknown.

    Args:
        config: of the run.
        devices: where it trains, the first being the model's.
        make_model: the model as it is before training.
    """

    def __init__(self, config: RunConfig, devices: list[torch.device], make_model: Callable[[], nn.Module]) -> None:
        self.config, self.devices, self.make_model = config, devices, make_model
        self.plans: list[EpochPlan] = []
        self.flops: dict[str, float | None] = {}

    @property
    def kinds(self) -> list[str]:
        """Of every planned epoch."""
        return [self.kind(plan) for plan in self.plans]

    def kind(self, plan: EpochPlan) -> str:
        """Names the work of a step in an epoch of this plan."""
        return f"{self.config.recipe.batch_size_at(plan.batch_scale)} {plan.kind}".strip()

    def every_kind(self, data: Dataset) -> None:
        """Rehearse all kinds of step that the method plans."""
        with self._copy(data) as (estimator, optimizer):
            fresh = copy.deepcopy(estimator.state_dict())
            self.plans = [estimator.start_epoch(epoch) for epoch in range(self.config.recipe.epochs)]
            kinds = self.kinds
            for kind in dict.fromkeys(kinds):  # those counted before a resume too: the process is new
                epoch = kinds.index(kind)
                self._rehearse(data, estimator, optimizer, epoch, self.plans[epoch], fresh)

    def one_kind(self, data: Dataset, epoch: int, plan: EpochPlan, state: dict[str, Any]) -> None:
        """Rehearse the kind of step of this epoch's plan, which an estimator in this state makes."""
        with self._copy(data) as (estimator, optimizer):
            self._rehearse(data, estimator, optimizer, epoch, plan, state)

    def untrained_state(self, data: Dataset) -> dict[str, Any]:
        """The state of an estimator that has not trained."""
        with self._copy(data) as (estimator, _):
            return copy.deepcopy(estimator.state_dict())

    @contextmanager
    def _copy(self, data: Dataset) -> Iterator[tuple[GradientEstimator, torch.optim.Optimizer]]:
        recipe, seed = self.config.recipe, self.config.seed
        with seeded(self.devices, mixed(seed)):
            estimator = uncompared(reseed(self.config.method, seed)).bind(self.make_model(), recipe.make_loss())
            with recipe.precision_context(self.devices[0]):
                estimator.prepare(*data.dummy_batch(recipe.batch_size))
            optimizer = recipe.make_optimizer(estimator.param_groups())
            with recipe.precision_context(self.devices[0]):
                yield estimator, optimizer
            estimator.finalize()

    def _rehearse(
        self,
        data: Dataset,
        estimator: GradientEstimator,
        optimizer: torch.optim.Optimizer,
        epoch: int,
        plan: EpochPlan,
        state: dict[str, Any],
    ) -> None:
        """Steps in the epoch that had this plan in this state, and their FLOPs per example."""
        recipe = self.config.recipe
        batch_size = recipe.batch_size_at(plan.batch_scale)
        x, y = next(iter(data.batches(batch_size, seed=0, epoch=0, augment=recipe.augment)))
        short = len(data.train) - (data.steps(batch_size) - 1) * batch_size
        again = start_again(estimator, epoch, plan, state)
        for size in [*[len(y)] * (_STEPS + estimator.latency), min(short, len(y))]:
            optimizer.zero_grad(set_to_none=True)
            estimator.backward(x[:size], y[:size])
            optimizer.step()
        for _ in range(estimator.latency):  # no short batch is left in flight
            estimator.backward(x, y)
        flops = step_flops(estimator, x, y)
        self.flops[self.kind(plan)] = flops / len(y) if again and flops is not None else None
