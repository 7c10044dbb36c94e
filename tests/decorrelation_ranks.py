"""What the ranks of tests/test_decorrelated_layers.py run: a DistributedDataParallel model with its batch in parts."""

import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastbp import DecorrelatedBP

METHOD = DecorrelatedBP(decor_lr=0.05, kappa=0.2, sample_fraction=1.0, structure="full")


class Counter(nn.Module):
    """Has a buffer, as batch norm has: DistributedDataParallel then broadcasts buffers with every forward."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return x


def model():
    torch.manual_seed(0)
    body = [nn.Conv2d(2, 4, 3, padding=1), Counter(), nn.Tanh(), nn.Conv2d(4, 3, 2, groups=1), nn.Flatten()]
    return nn.Sequential(*body, nn.Linear(27, 3)).double()


def data():
    g = torch.Generator().manual_seed(1)
    return [
        (torch.randn(8, 2, 4, 4, generator=g, dtype=torch.float64), torch.randint(3, (8,), generator=g))
        for _ in range(4)
    ]


def train(net, part=slice(None)):
    """The plain state after four steps, of the rank's part of every batch."""
    estimator = METHOD.bind(net, nn.functional.cross_entropy)
    optimizer = torch.optim.SGD(estimator.model.parameters(), lr=0.1, momentum=0.9)
    for x, y in data():
        optimizer.zero_grad()
        estimator.backward(x[part], y[part])
        optimizer.step()
    if isinstance(net, DistributedDataParallel):
        sent = [name for name, buffer in net.module.named_buffers() if any(buffer is b for b in net.modules_buffers)]
        assert sent == ["1.calls"], f"broadcast with every forward: {sent}"
    return {key.removeprefix("module."): value for key, value in estimator.finalize().state_dict().items()}


if __name__ == "__main__":
    rank, store, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=60))
    torch.save(train(DistributedDataParallel(model()), slice(4 * rank, 4 * rank + 4)), f"{out}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
