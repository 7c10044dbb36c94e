"""Passes through a net that only measure, and what a method's gradient is worth beside backprop's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")

_measuring = False


@contextmanager
def measurement() -> Iterator[None]:
    """Forward passes in this block only measure: hooks that learn from them ask `measuring` and leave them out."""
    global _measuring
    before, _measuring = _measuring, True
    try:
        yield
    finally:
        _measuring = before


def measuring() -> bool:
    """Whether a `measurement` is under way."""
    return _measuring


def beside_backprop(
    model: nn.Module, devices: Sequence[torch.device], step: Callable[[], T], loss: Callable[[], Tensor]
) -> tuple[T, Tensor]:
    """Take a step, and compare what it adds to the gradients with what backprop adds on the same batch.

    Buffers, random numbers and gradients are in the end those that the step alone leaves. Nothing waits for the device.

    Args:
        model: whose parameters with `requires_grad` are compared; no gradient counts as zero.
        devices: whose random numbers the step may draw.
        step: adds to `p.grad`.
        loss: the same loss with the graph of backprop.

    Returns:
        what the step returned; (2,), cosine and relative error ‖ours - exact‖ / ‖exact‖, in float64.

    Raises:
        ValueError: hooks take the gradients away before they can be compared.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    before, start = [p.grad for p in parameters], _random_numbers(devices)
    if any(p._post_accumulate_grad_hooks for p in parameters):
        raise ValueError(
            "comparing a gradient with backprop's needs it in p.grad, but parameters have hooks that take it away as "
            "it comes, such as an optimizer that runs in the backward; set cosine_every to 0"
        )
    for p in parameters:
        p.grad = None
    out = step()
    ours = [p.grad for p in parameters]
    kept = [buffer.clone() for buffer in model.buffers()]
    cuda = [place for place in devices if place.type == "cuda"]
    with measurement(), torch.random.fork_rng(cuda):
        _set_random_numbers(start)
        exact = torch.autograd.grad(loss(), parameters, allow_unused=True)
    with torch.no_grad():
        for buffer, value in zip(model.buffers(), kept, strict=True):
            buffer.copy_(value)
        for p, old, new in zip(parameters, before, ours, strict=True):
            p.grad = new if old is None else old if new is None else old.add_(new)
        return out, agreement(ours, exact)


def agreement(ours: Sequence[Tensor | None], exact: Sequence[Tensor | None]) -> Tensor:
    """(2,), cosine and relative error of one gradient to another, tensor by tensor; None is zero.

    >>> agreement([torch.tensor([3.0, 4.0]), None], [torch.tensor([3.0, 0.0]), torch.tensor([4.0])]).tolist()
    [0.36, 1.1313708498984762]
    """
    terms = []
    for a, b in zip(ours, exact, strict=True):
        if a is None and b is None:
            continue
        a = (torch.zeros_like(b) if a is None else a).double()  # type: ignore[arg-type]
        b = torch.zeros_like(a) if b is None else b.double()
        terms.append(torch.stack([(a * b).sum(), a.square().sum(), b.square().sum(), (a - b).square().sum()]))
    if not terms:
        return torch.full((2,), float("nan"), dtype=torch.float64)
    product, aa, bb, difference = torch.stack([term.to(terms[0].device) for term in terms]).sum(0)
    return torch.stack([product / (aa * bb).sqrt(), (difference / bb).sqrt()])


def _random_numbers(devices: Sequence[torch.device]) -> dict[torch.device, Tensor]:
    cuda = {place: torch.cuda.get_rng_state(place) for place in devices if place.type == "cuda"}
    return {torch.device("cpu"): torch.get_rng_state()} | cuda


def _set_random_numbers(states: dict[torch.device, Tensor]) -> None:
    for place, state in states.items():
        if place.type == "cuda":
            torch.cuda.set_rng_state(state, place)
        else:
            torch.set_rng_state(state)
