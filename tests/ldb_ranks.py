"""What the ranks of tests/test_layerdropback_ddp.py run: LayerDropBack in DistributedDataParallel, over gloo."""

import sys
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastbp import LayerDropBack

RANKS = 2
STEPS = 6


def net():
    """Without batch norm, whose statistics would be those of a rank."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.GELU(), nn.Conv2d(4, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(64, 3)
    ).double()


def cases():
    """Name to (method, micro-batches per step)."""
    return {
        "layer": (LayerDropBack(seed=1), 1),
        "tensor, pool": (LayerDropBack(seed=2, unit="tensor", pool=4), 1),
        "prefix": (LayerDropBack(seed=3, unit="prefix"), 1),
        "layer, accumulated": (LayerDropBack(seed=1), 2),
        "prefix, accumulated": (LayerDropBack(seed=3, unit="prefix"), 2),
    }


def data():
    g = torch.Generator().manual_seed(5)
    x = torch.randn(STEPS, 8, 2, 6, 6, generator=g, dtype=torch.float64)
    return list(zip(x, torch.randint(0, 3, (STEPS, 8), generator=g), strict=True))


def train(model, method, micro, share, accumulating=nullcontext):
    """Gradients (None: dropped) and masks of every step, and the weights in the end.

    Args:
        share: takes this rank's part of a batch.
        accumulating: context of all but a step's last micro-batch.
    """
    estimator = method.bind(model, lambda output, y: nn.functional.cross_entropy(output, y) / micro)
    estimator.start_epoch(2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    gradients, masks = [], []
    for x, y in data():
        optimizer.zero_grad(set_to_none=True)
        pieces = list(zip(share(x).chunk(micro), share(y).chunk(micro), strict=True))
        for i, piece in enumerate(pieces):
            with accumulating() if i < len(pieces) - 1 else nullcontext():
                estimator.backward(*piece)
        gradients.append([None if p.grad is None else p.grad.clone() for p in model.parameters()])
        masks.append(list(estimator.dropped))
        optimizer.step()
    return gradients, masks, [p.detach().clone() for p in model.parameters()]


def refusals(method):
    """What binding says to DistributedDataParallel as it is, and with a static graph."""
    out = []
    for settings in ({}, {"find_unused_parameters": True, "static_graph": True}):
        try:
            method.bind(DistributedDataParallel(net(), **settings), nn.functional.cross_entropy)
        except ValueError as error:
            out.append(str(error))
    return out


def main(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'group'}", rank=rank, world_size=RANKS, timeout=timedelta(seconds=120)
    )
    results = {}
    for name, (method, micro) in cases().items():
        model = DistributedDataParallel(net(), find_unused_parameters=True)
        results[name] = train(model, method, micro, lambda t: t.chunk(RANKS)[rank], model.no_sync)
    results["refused"] = refusals(LayerDropBack())
    results["control"] = refusals(LayerDropBack(mask=False))
    wrapped = DistributedDataParallel(net(), find_unused_parameters=True)
    for unit in ("tensor", "layer", "block"):
        results[f"units {unit}"] = [u.name for u in LayerDropBack(unit=unit).bind(wrapped, None).units]
    torch.save(results, folder / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
