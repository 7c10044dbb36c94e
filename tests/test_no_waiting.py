"""No training step of a method waits for the device: nothing is read from a tensor on it."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastbp import DDG, DecorrelatedBP, HighwayBP, LayerDropBack
from fastbp.nets import resnet_tiny

aten = torch.ops.aten
READS = {aten._local_scalar_dense, aten.item, aten.is_nonzero, aten.nonzero, aten.masked_select, aten.equal}
DBP = DecorrelatedBP(decor_lr=1e-3, kappa=0.2)
METHODS = [
    LayerDropBack(),
    LayerDropBack(unit="tensor"),
    LayerDropBack(unit="prefix"),
    LayerDropBack(pool=2),
    DBP,
    DecorrelatedBP(interval=2, structure="block", block_size=20, center=True, rule="normalized"),
    DecorrelatedBP(structure="channel", gain=True),
    DecorrelatedBP(preserve_function=True, layers="conv"),
    LayerDropBack(inner=DBP),
    DecorrelatedBP(inner=LayerDropBack(inner=HighwayBP(iterations=1))),
]

DELAYED = [
    *[DDG(modules=2, weights=weights, shrink=0.5) for weights in ("stash", "mixed", "replay")],
    *[DDG(modules=2, weights=weights, cuts=(1,), devices=("cpu", "cpu")) for weights in ("stash", "mixed", "replay")],
    DDG(modules=2, undelayed_epochs=3),
    LayerDropBack(unit="tensor", inner=DDG(modules=2)),
    DecorrelatedBP(decor_lr=1e-3, inner=DDG(modules=2)),
]


class _Reading(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func._overloadpacket not in READS, f"{func} reads a tensor: the host would wait for the device"
        return func(*args, **(kwargs or {}))


def started(method):
    """A bound net in a dropping epoch, after the first looks at its graph and its statistics."""
    torch.manual_seed(0)
    model = resnet_tiny((2, 8, 8), 3, blocks=2, width=4)
    estimator = method.bind(model, nn.functional.cross_entropy)
    estimator.start_epoch(2)
    x, y = torch.randn(4, 2, 8, 8), torch.tensor([0, 1, 2, 0])
    for _ in range(3):
        model.zero_grad()
        estimator.backward(x, y)
    return estimator, x, y


@pytest.mark.parametrize("method", METHODS + DELAYED, ids=str)
def test_a_step_reads_no_tensor(method):
    estimator, x, y = started(method)
    with _Reading():
        for _ in range(70 if method == LayerDropBack() else 4):  # past the masks that are drawn at once
            estimator.model.zero_grad()
            estimator.backward(x, y)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_step_runs_where_tensors_have_no_values(method, monkeypatch):
    """Tensors without storage: `tolist` or a copy to the host raises as well."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())  # knows no such device
    estimator, x, y = started(method)
    estimator.model.to("meta")
    for _ in range(4):
        for parameter in estimator.model.parameters():
            parameter.grad = None
        assert estimator.backward(x.to("meta"), y.to("meta")).is_meta


@pytest.mark.parametrize("devices", [None, ("meta", "meta")])
@pytest.mark.parametrize("weights", ["stash", "mixed", "replay"])
def test_a_delayed_step_runs_where_tensors_have_no_values(weights, devices):
    """As above; what is in flight cannot be moved, so the net is without values from the start."""
    model = resnet_tiny((2, 8, 8), 3, blocks=2, width=4).to("meta")
    method = DDG(modules=2, weights=weights, cuts=(1,), devices=devices, shrink=0.5)
    estimator = method.bind(model, nn.functional.cross_entropy)
    x, y = torch.randn(4, 2, 8, 8, device="meta"), torch.tensor([0, 1, 2, 0], device="meta")
    for _ in range(4):
        model.zero_grad()
        assert estimator.backward(x, y).is_meta
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_reading_is_noticed():
    x = torch.ones(3)
    for read in (lambda: x[0].item(), lambda: bool(x.sum() > 0), lambda: x.nonzero(), lambda: torch.equal(x, x)):
        with pytest.raises(AssertionError, match="reads a tensor"), _Reading():
            read()
