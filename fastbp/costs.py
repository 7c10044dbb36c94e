"""What a step of a method costs beside backprop's: counted FLOPs, and the state it keeps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastbp.flops import step_flops
from fastbp.method import GradientEstimator, LossFn, Method, start_again, uncompared
from fastbp.methods import Backprop

_LATE = 100  # epochs of this many periods on are as all later ones


@dataclass(frozen=True)
class Cost:
    """The cost of a method on one model and batch.

    Attributes:
        step_flops: FLOPs of a step over those of backprop's, by kind of epoch (`EpochPlan.kind`); empty where the
            counter is blind.
        mean_flops: the same over all kinds of epochs, each example weighing the same; None where it is blind.
        state_bytes: what a checkpoint has more than backprop's.
    """

    step_flops: dict[str, float]
    mean_flops: float | None
    state_bytes: int


def measure_costs(
    methods: Mapping[str, Method], make_model: Callable[[], nn.Module], loss_fn: LossFn, x: Tensor, y: Tensor
) -> Iterator[tuple[str, Cost | str]]:
    """Run a few steps of backprop and of each method on models of their own, without an optimizer.

    Args:
        methods: by name.
        make_model: makes the model, on the device of `x`.
        loss_fn: as for `Method.bind`.
        x: inputs of one full batch.
        y: its labels.

    Yields:
        name and cost of each method; for one that refuses the model its sentence.
    """
    plain = Backprop().bind(make_model().train(), loss_fn)
    _warm_up(plain, x, y)
    backprop, plain_bytes = step_flops(plain, x, y), _bytes(dict(plain.model.state_dict()))
    for name, method in methods.items():
        try:
            estimator = uncompared(method).bind(make_model().train(), loss_fn)
            estimator.prepare(x, y)
        except (TypeError, ValueError) as refusal:
            yield name, str(refusal)
        else:
            yield name, _cost(method, estimator, x, y, backprop, plain_bytes)


def _cost(
    method: Method, estimator: GradientEstimator, x: Tensor, y: Tensor, backprop: float | None, plain_bytes: int
) -> Cost:
    period = method.epoch_period
    flops: dict[str, float | None] = {}
    fresh = copy.deepcopy(estimator.state_dict())
    plans = {epoch: estimator.start_epoch(epoch) for epoch in range(_LATE * period, (_LATE + 1) * period)}
    for epoch, plan in plans.items():
        if plan.kind not in flops:
            again = start_again(estimator, epoch, plan, fresh)
            _warm_up(estimator, x, y)
            flops[plan.kind] = step_flops(estimator, x, y) if again else None
    state_bytes = _bytes([dict(estimator.model.state_dict()), estimator.state_dict()]) - plain_bytes
    ratios = {kind: count / backprop for kind, count in flops.items() if count is not None and backprop}
    if len(ratios) < len(flops):
        return Cost({}, None, state_bytes)
    return Cost(ratios, sum(ratios[plan.kind] for plan in plans.values()) / len(plans), state_bytes)


def _warm_up(estimator: GradientEstimator, x: Tensor, y: Tensor) -> None:
    for _ in range(1 + estimator.latency):
        for parameter in estimator.model.parameters():
            parameter.grad = None
        estimator.backward(x, y)


def _bytes(state: Any) -> int:
    """Of all tensors in nested containers."""
    if isinstance(state, torch.Tensor):
        return state.numel() * state.element_size()
    inside = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
    return sum(_bytes(item) for item in inside)


def random_batch(shape: tuple[int, ...], classes: int, batch_size: int) -> tuple[Tensor, Tensor]:
    """A batch for counting: images x (N, C, H, W) and y (N,), or tokens x and y (N, T) for a shape (T,)."""
    generator = torch.Generator().manual_seed(0)
    if len(shape) == 1:
        x, y = (torch.randint(classes, (batch_size, *shape), generator=generator) for _ in range(2))
        return x, y
    x = torch.randn(batch_size, *shape, generator=generator)
    return x, torch.randint(classes, (batch_size,), generator=generator)


def shape_of(text: str) -> tuple[int, ...]:
    """The shape that a user wrote.

    >>> shape_of("3x32x32"), shape_of("64")
    ((3, 32, 32), (64,))

    Raises:
        ValueError: it is no shape.
    """
    sizes = text.split("x")
    if len(sizes) not in (1, 3) or not all(size.isdecimal() and int(size) for size in sizes):
        raise ValueError(f"--input {text}: expected a shape such as 3x32x32, or a number of tokens such as 64")
    return tuple(map(int, sizes))
