"""Where to cut a chain of blocks into modules: by what each block costs, under a memory cap.

A cut stands before a block. The stem belongs to the first block's module and the head to the last one's. The best cuts
minimise the most expensive module, by an exact dynamic programme over contiguous cuts.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from fastbp.chain import Chain
from fastbp.clock import Clock
from fastbp.delayed import last_layer
from fastbp.flops import Counter
from fastbp.views import as_chain

SPLITS = ("auto", "time", "flops", "parameters", "blocks")
TOLERANCE = 0.05  # costs this close count as equal; then the numbers of blocks decide, and noise does not
_TIMED_RUNS = 20
_TIMED_SECONDS = 5.0  # the limit for all of them together


@dataclass(frozen=True)
class BlockCost:
    """What one block costs, with stem or head where it has them; 0 where it was not measured.

    Attributes:
        forward_seconds, backward_seconds: medians over synchronised runs.
        flops: of forward and backward.
        parameter_bytes: of its weights.
        activation_bytes: what autograd keeps for its backward, weights left out.
        input_bytes: of its input.
    """

    forward_seconds: float = 0.0
    backward_seconds: float = 0.0
    flops: float = 0.0
    parameter_bytes: int = 0
    activation_bytes: int = 0
    input_bytes: int = 0

    @property
    def seconds(self) -> float:
        return self.forward_seconds + self.backward_seconds


def pieces(chain: Chain) -> list[nn.Sequential]:
    """The chain as one Sequential per block, stem and head included."""
    groups: list[list[nn.Module]] = [[block] for block in chain.blocks]
    groups[0].insert(0, chain.stem)
    groups[-1].append(chain.head)
    return [nn.Sequential(*group) for group in groups]


def even_cuts(blocks: int, modules: int) -> tuple[int, ...]:
    """Cuts into equal numbers of blocks, the remainder to the later modules.

    >>> even_cuts(5, 3)
    (1, 3)
    """
    return tuple(k * blocks // modules for k in range(1, modules))


def best_cuts(
    costs: Sequence[float], modules: int, fits: Callable[[int, int, int], bool] | None = None
) -> tuple[int, ...]:
    """Cuts that minimise the most expensive module; of nearly equal ones, those with the most even numbers of blocks.

    Args:
        costs: of the blocks, (L,), not negative.
        modules: K, at most L.
        fits: `fits(k, start, stop)`: whether blocks start..stop-1 may be module k.

    Raises:
        ValueError: no cuts fit.
    """
    total = [0.0, *accumulate(costs)]
    allowed = fits or (lambda k, start, stop: True)

    def cost(start: int, stop: int) -> float:
        return total[stop] - total[start]

    first = _partition(len(costs), modules, cost, max, allowed)
    if first is None:
        raise ValueError(f"no cut of {len(costs)} blocks into {modules} modules fits the memory cap")
    limit = first[0] * (1 + TOLERANCE)
    even = _partition(
        len(costs),
        modules,
        lambda start, stop: (stop - start) ** 2,
        lambda a, b: a + b,
        lambda k, start, stop: allowed(k, start, stop) and cost(start, stop) <= limit,
    )
    return (even or first)[1]


def _partition(
    blocks: int,
    modules: int,
    value: Callable[[int, int], float],
    join: Callable[[float, float], float],
    allowed: Callable[[int, int, int], bool],
) -> tuple[float, tuple[int, ...]] | None:
    """The smallest joined value over all contiguous cuts, and its cuts; None where none is allowed."""
    row: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}  # blocks used: value, starts of the modules so far
    for k in range(modules):
        following = {}
        for stop in range(k + 1, blocks - (modules - 1 - k) + 1):
            found = [
                (join(so_far, value(start, stop)), (*starts, start))
                for start, (so_far, starts) in row.items()
                if start < stop and allowed(k, start, stop)
            ]
            if found:
                following[stop] = min(found)
        row = following
    best = row.get(blocks)
    return None if best is None else (best[0], best[1][1:])


def tied_cuts(parts: Sequence[nn.Module]) -> dict[int, str]:
    """Cuts that would part the users of a shared weight: position to the weight's name."""
    first: dict[int, int] = {}
    out: dict[int, str] = {}
    for i, part in enumerate(parts):
        for name, parameter in part.named_parameters():
            for cut in range(first.setdefault(id(parameter), i) + 1, i + 1):
                out[cut] = name
    return out


def module_bytes(costs: Sequence[BlockCost], modules: int, weights: str, k: int, start: int, stop: int) -> int:
    """Device memory of module k made of blocks start..stop-1: of a late one d+1 batches' activations and weight copies.

    `replay` keeps d+1 inputs and one batch of activations. Gradient and one momentum per weight are counted too.
    """
    delay = modules - 1 - k
    activations = sum(c.activation_bytes for c in costs[start:stop])
    parameters = sum(c.parameter_bytes for c in costs[start:stop])
    if weights == "replay" and delay:
        return (delay + 1) * costs[start].input_bytes + activations + 3 * parameters
    copies = delay + 1 if weights == "stash" and delay else 0
    return (delay + 1) * activations + (3 + copies) * parameters


def measure(
    model: nn.Module, loss_fn: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor, *, timed: bool
) -> list[BlockCost]:
    """Cost of every block of a model on one batch, on a copy that leaves no trace.

    Args:
        model: anything `as_chain` can see into.
        loss_fn: as in `Method.bind`.
        x: one batch, on the model's device.
        y: its labels.
        timed: whether to take times: medians of up to 20 synchronised forward and backward runs, 5 seconds for all.

    Raises:
        TypeError: a block but the last returns something else than one tensor.
    """
    with torch.random.fork_rng([x.device] if x.is_cuda else []):
        parts = pieces(as_chain(copy.deepcopy(model).train()))
        costs, h = [], x
        deadline = time.perf_counter() + _TIMED_SECONDS
        for i, part in enumerate(parts):
            head = i == len(parts) - 1
            block = _Block(i, part, (lambda out: loss_fn(out, y)) if head else None, h.detach())
            flops, kept = block.count()
            left = (deadline - time.perf_counter()) / (len(parts) - i)
            forward, backward = block.time(left) if timed else (0.0, 0.0)
            weights = sum(p.numel() * p.element_size() for p in part.parameters())
            costs.append(BlockCost(forward, backward, flops, weights, kept, h.numel() * h.element_size()))
            h = block.output
        return costs


class _Block:
    """One block on one input, run forward and backward by itself."""

    def __init__(self, index: int, part: nn.Module, loss: Callable[[Tensor], Tensor] | None, x: Tensor) -> None:
        first = index == 0
        self.index, self.part, self.loss = index, part, loss
        self.x = x if first else x.requires_grad_()
        self.leaves = [p for p in part.parameters() if p.requires_grad] + ([] if first else [self.x])
        self.clock = Clock(x.device)
        self.output = x

    def forward(self) -> Tensor:
        out = self.part(self.x)
        if self.loss is not None:  # of the last block, whose output is its own business
            return self.loss(out)
        if not isinstance(out, Tensor):
            raise TypeError(
                f"DDG: block {self.index}, which ends in {last_layer(self.part)}, returned a {type(out).__name__}, but "
                "only one tensor can cross a cut; return a tensor, or give `cuts` elsewhere"
            )
        self.output = out.detach()
        return out

    def backward(self, out: Tensor) -> None:
        if out.requires_grad:
            torch.autograd.grad(out, self.leaves, torch.ones_like(out), allow_unused=True)

    def count(self) -> tuple[float, int]:
        """FLOPs of forward and backward, and the bytes that autograd keeps in between, weights left out."""
        own = {p.untyped_storage().data_ptr() for p in self.part.parameters()}
        kept: dict[int, int] = {}

        def note(z: Tensor) -> Tensor:
            storage = z.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return z.detach()

        with Counter() as counter:
            with saved_tensors_hooks(note, lambda z: z):
                out = self.forward()
            self.backward(out)
        return float(counter.total), sum(kept.values())

    def time(self, limit: float) -> tuple[float, float]:
        """Median seconds of forward and of backward over up to 20 runs that end within the limit; at least 3 runs."""
        forward, backward = [], []
        end = time.perf_counter() + limit
        while len(forward) < 3 or (len(forward) < _TIMED_RUNS and time.perf_counter() < end):
            self.clock.synchronize()
            began = time.perf_counter()
            out = self.forward()
            self.clock.synchronize()
            between = time.perf_counter()
            self.backward(out)
            self.clock.synchronize()
            forward.append(between - began)
            backward.append(time.perf_counter() - between)
        return statistics.median(forward), statistics.median(backward)


def table(costs: Sequence[BlockCost], cuts: Sequence[int], weights: str) -> list[dict[str, float]]:
    """One row per module: its blocks, share of time and FLOPs, weights and memory; 0 where it was not measured."""
    edges = [0, *cuts, len(costs)]
    seconds, flops = sum(c.seconds for c in costs), sum(c.flops for c in costs)
    rows = []
    for k, (start, stop) in enumerate(pairwise(edges)):
        group = costs[start:stop]
        rows.append(
            {
                "module": k,
                "delay": len(edges) - 2 - k,
                "first_block": start,
                "blocks": stop - start,
                "seconds": sum(c.seconds for c in group),
                "time_share": sum(c.seconds for c in group) / seconds if seconds else 0.0,
                "flops_share": sum(c.flops for c in group) / flops if flops else 0.0,
                "parameter_bytes": sum(c.parameter_bytes for c in group),
                "memory_bytes": module_bytes(costs, len(edges) - 1, weights, k, start, stop) if flops else 0,
            }
        )
    return rows
