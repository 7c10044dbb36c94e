"""Every method on one device that is not the CPU: in a step nothing is mixed, read, or copied from one to the other.

The device is torch's fake one, whose tensors have no values: an error or a wait on a GPU is an error here. A fake
"cuda" cannot run backward where torch is built for GPUs and finds none, so it is "meta:0", which has no generator.
"""

from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, unset_fake_temporarily
from torch.nn.functional import cross_entropy

from fastbp import DDG, Backprop, Chain, DecorrelatedBP, HighwayBP, LayerDropBack, Residual
from fastbp.methods import layerdropback
from fastbp.methods.decorrelated import _DecorrelatedBP
from fastbp.models import make_model
from test_highway_placement import A, Hops, fake_devices

METHODS = [
    Backprop(),
    *[LayerDropBack(unit=unit) for unit in ("tensor", "layer", "block", "prefix")],
    LayerDropBack(pool=4),
    *[DecorrelatedBP(structure=structure, rule="normalized") for structure in ("full", "block", "channel")],
    DecorrelatedBP(structure="block", block_size=20, center=True, gain=True, sample_fraction=1.0),
    DecorrelatedBP(interval=2, preserve_function=True),
    *[HighwayBP(iterations=k, combination=c) for k in (0, 2) for c in ("sum", "min_residual")],
    HighwayBP(iterations=2, gamma=0.2, batched=True),
    HighwayBP(iterations=9, gamma=0.2, batched=True, combination="min_residual"),
    HighwayBP(iterations=3, tolerance=0.1, gamma_epochs=3, gamma=0.5, exact_from=2),
    *[DDG(modules=3, weights=weights, shrink=0.5) for weights in ("stash", "mixed", "replay")],
    DDG(modules=2, undelayed_epochs=1, lr_power=0.5, cuts=(1,), cosine_every=1),
    LayerDropBack(inner=DecorrelatedBP()),
    DecorrelatedBP(inner=LayerDropBack(inner=HighwayBP(iterations=2))),
    DecorrelatedBP(inner=LayerDropBack(inner=DDG(modules=2))),
]
OVER_TIME = [HighwayBP(iterations=3), HighwayBP(iterations=3, gamma=0.3, combination="min_residual")]


@contextmanager
def one_device():
    """Where there are A and the CPU; what has no values on A, such as masks, is drawn on the CPU for real."""

    def real(function):
        def call(*args):
            with unset_fake_temporarily():
                return function(*args)

        return call

    def choose(estimator, total):
        return torch.arange(max(1, int(total * estimator.method.sample_fraction)), device=A)

    with fake_devices(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
        patch.setattr(torch, "is_autocast_enabled", lambda *_: False)
        patch.setattr(torch, "Generator", lambda device=None, make=torch.Generator: make())
        patch.setattr(_DecorrelatedBP, "_draw", choose)
        patch.setattr(layerdropback, "pool_masks", real(layerdropback.pool_masks))
        masks = layerdropback._LayerDropBack._masks_of_step
        patch.setattr(layerdropback._LayerDropBack, "_masks_of_step", real(masks))
        patch.setattr("fastbp.highway_schedule.Schedule._ratios", lambda _: [])  # read once an epoch
        patch.setattr("fastbp.delayed.DelayedModule._saved_state", lambda _, tensor: tensor)  # by address
        yield


def convolutions():
    def branch():
        conv = nn.Conv2d(6, 6, 3, padding=1, groups=2, bias=False)
        return nn.Sequential(nn.BatchNorm2d(6), nn.ReLU(), conv, nn.Dropout(0.1), nn.Conv2d(6, 6, 1))

    blocks, head = [Residual(branch()) for _ in range(4)], [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)]
    return Chain(nn.Conv2d(3, 6, 3, padding=1), blocks, nn.Sequential(*head))


def there(model):
    for part in model.to(A).modules():
        for name, buffer in part._buffers.items():
            part._buffers[name] = None if buffer is None else buffer.to(A)
    return model.train()


def bound(method, make):
    estimator = method.bind(there(make()), cross_entropy)
    return estimator, torch.optim.SGD(estimator.param_groups(), 0.1, momentum=0.9, nesterov=True, foreach=True)


def train(estimator, optimizer, epoch, rows=(4, 4, 3)):
    estimator.start_epoch(epoch)
    for n in rows:
        x, y = torch.randn(n, 3, 8, 8, device=A), torch.zeros(n, dtype=torch.int64, device=A)
        with Hops() as hops:
            optimizer.zero_grad()
            loss = estimator.backward(x, y)
            optimizer.step()
        assert not hops.seen, f"copies between CPU and device: {hops.seen}"
        assert loss.device == torch.device(A)


def trained(method, make):
    estimator, optimizer = bound(method, make)
    for epoch in (0, 2):
        train(estimator, optimizer, epoch)
    state = estimator.state_dict()
    again, optimizer = bound(method, make)
    again.load_state_dict(state)
    train(again, optimizer, 4, rows=(3, 4))
    assert all(p.grad is None or p.grad.device == p.device for p in again.model.parameters())
    model = again.finalize().eval()
    model(torch.randn(2, 3, 8, 8, device=A))
    assert {str(tensor.device) for tensor in (*model.parameters(), *model.buffers())} == {A}


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_method_trains_on_a_device_of_its_own(method):
    alike = getattr(method, "batched", False)
    with one_device():
        trained(method, (lambda: make_model("mlp", (3, 8, 8), 4, {"width": 6})) if alike else convolutions)


@pytest.mark.parametrize("method", OVER_TIME, ids=str)
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_so_does_highway_bp_over_time(cell, method):
    with one_device():
        trained(method, lambda: make_model(cell, (3, 8, 8), 4, {"width": 5, "layers": 2, "step": 8}))


class Careless(nn.Module):
    def __init__(self, mistake):
        super().__init__()
        self.layer, self.mistake = nn.Linear(192, 4), mistake

    def forward(self, x):
        return self.mistake(self.layer(x.flatten(1)))


@pytest.mark.parametrize(
    ("mistake", "error"),
    [
        (lambda h: h + torch.zeros(4), RuntimeError),
        (lambda h: h @ torch.zeros(4, 4), RuntimeError),
        (lambda h: h + torch.zeros(4).to(h.device), AssertionError),
        (lambda h: h * (1 if h.sum() > 0 else 2), DataDependentOutputException),
    ],
)
def test_mistakes_are_noticed(mistake, error):
    with one_device(), pytest.raises(error):
        train(*bound(Backprop(), lambda: Careless(mistake)), 0)
