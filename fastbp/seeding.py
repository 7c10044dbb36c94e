"""Random numbers that are a pure function of a seed inside a block, and untouched outside of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch


@contextmanager
def seeded(device: torch.device | Sequence[torch.device], seed: int) -> Iterator[None]:
    """Seed torch's CPU generator, and the device's where it has one, for the duration of a block.

    Several devices get seeds of their own, the first one the seed itself: equal layers have unequal dropout.

    The generators are seeded directly: `torch.manual_seed` also queues a call, with a stack trace, for every CUDA
    device that is not initialised yet, which costs a millisecond and is never freed on a machine without one.
    """
    places = [device] if isinstance(device, torch.device) else dict.fromkeys(device)
    cuda = [place for place in places if place.type == "cuda"]
    with torch.random.fork_rng(cuda):
        torch.default_generator.manual_seed(seed)
        for n, place in enumerate(cuda):
            index = torch.cuda.current_device() if place.index is None else place.index
            torch.cuda.default_generators[index].manual_seed(seed + 1_000_003 * n)
        yield


def mixed(*seed: int) -> int:
    """One seed from several numbers."""
    out = 0
    for value in seed:
        out = (out * 1_000_003 + value + 1) % 2**63
    return out
