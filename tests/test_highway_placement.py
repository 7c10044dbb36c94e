"""Highway-BP over several devices of one process: where every tensor is, and what crosses from one to the next.

Seen on fake devices, whose tensors have no values and are never mixed by an operation: a missing hop is an error
without a GPU. The numbers are compared in `test_highway_devices.py`.
"""

import importlib
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from fastbp import DDG, Chain, HighwayBP, Residual
from fastbp.alike import alike_blocks
from fastbp.chain import Add, AddNorm, AddReLU, Replace, ShortcutAdd
from fastbp.nets import mlp, vit_tiny
from fastbp.placed import Placement, gathered
from fastbp.seeding import seeded
from fastbp.testing import small_batch, small_net
from test_no_waiting import _Reading

A, B, C = "meta:0", "meta:1", "meta:2"


@contextmanager
def fake_devices():
    """Where any device exists; modules move by getting new parameters, as fake ones cannot be changed."""

    def move(module, place):
        for part in module.modules():
            for name, parameter in part._parameters.items():
                part._parameters[name] = None if parameter is None else nn.Parameter(parameter.detach().to(place))
        return module

    with FakeTensorMode(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "to", move)
        yield


class Hops(TorchDispatchMode):
    """What is copied from one device to another: source, target, shape."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_):
            source = args[1] if func._overloadpacket is torch.ops.aten.copy_ else args[0]
            if source.device != out.device:
                self.seen.append((str(source.device), str(out.device), tuple(source.shape)))
        return out


def linears(count=6):
    return Chain(nn.Linear(5, 6), [Residual(nn.Linear(6, 6)) for _ in range(count)], nn.Linear(6, 3))


def fake_step(method, make=linears, epoch=1, steps=1, data=A):
    """The net, the loss and the copies between devices of the last step."""
    with fake_devices():
        model = make()
        model.to(A)
        estimator = method.bind(model, cross_entropy)
        estimator.start_epoch(epoch)
        x, y = torch.randn(4, 5, device=data), torch.zeros(4, dtype=torch.int64, device=data)
        for _ in range(steps):
            for p in model.parameters():
                p.grad = None
            with Hops() as hops:
                loss = estimator.backward(x, y)
        return model, loss, hops.seen


STATE = (4, 6)
UP = [(A, B, STATE), (B, C, STATE)]
DOWN = [(C, B, STATE), (B, A, STATE)]
LABELS = (A, C, (4,))


@pytest.mark.parametrize("k", [0, 1, 2])
def test_one_tensor_crosses_a_cut_in_the_forward_and_in_every_scan(k):
    method = HighwayBP(iterations=k, devices=(A, B, C))
    _, loss, hops = fake_step(method, steps=2)  # the first step measures too
    assert loss.device == torch.device(C)
    assert hops == [LABELS, *UP, *DOWN * (k + 1)]


def test_a_batch_may_come_from_anywhere():
    _, _, hops = fake_step(HighwayBP(iterations=0, devices=(A, B)), data=C)
    assert hops == [(C, A, (4, 5)), (C, B, (4,)), UP[0], DOWN[1]]


def test_signals_that_are_final_cross_no_more():
    """Blocks 0 and 1 are on A, 2 and 3 on B, 4 and 5 on C: w_4 is final after 2 rounds, w_2 after 4."""
    _, _, hops = fake_step(HighwayBP(iterations=6, devices=(A, B, C)), steps=2)
    assert hops == [LABELS, *UP, *DOWN * 3, DOWN[1], DOWN[1]]


def test_min_residual_sums_its_products_on_the_first_device():
    """Of w_3 .. w_6, of which 3, 3, 2 and 1 increments are not zero; the coefficients go to the other devices once."""
    method = HighwayBP(iterations=2, combination="min_residual", devices=(A, B, C))
    _, _, hops = fake_step(method, steps=2)
    products = [(B, A, (3, 3)), (B, A, (3, 3)), (C, A, (2, 2)), (C, A, (1, 1))]
    assert hops[:-2] == [LABELS, *UP, *DOWN * 3, *products]
    assert sorted(hops[-2:]) == [(A, B, (2,)), (A, C, (2,))]


def test_the_remainder_goes_to_the_later_devices():
    model, _, _ = fake_step(HighwayBP(iterations=1, devices=(A, B, C)), lambda: linears(7))
    places = [str(p.device) for p in model.parameters() if p.dim() > 1]
    assert places == [A] * 3 + [B] * 2 + [C] * 4, "stem and 2 blocks, 2 blocks, 3 blocks and head"


@pytest.mark.parametrize(
    "method",
    [
        HighwayBP(iterations=2),
        HighwayBP(iterations=2, gamma=0.2),
        HighwayBP(iterations=9, gamma=0.2, combination="min_residual"),
        HighwayBP(iterations=2, batched=True),
        HighwayBP(iterations=2, batched=True, combination="min_residual"),
        HighwayBP(iterations=2, exact_from=1),
    ],
    ids=str,
)
def test_gradients_are_where_the_weights_are(method):
    """With all merges, in rounds and in plain backprop: nothing mixes devices, and nothing is left behind."""

    def merges():
        branches = [nn.Sequential(nn.Linear(6, 6), nn.ReLU()) for _ in range(9)]
        kinds = [Add(), Add(), AddReLU(), AddNorm(nn.LayerNorm(6)), ShortcutAdd(nn.Linear(6, 6), relu=True), Replace()]
        blocks = [Residual(*pair) for pair in zip(branches, [*kinds, Add(), Add(), AddReLU()], strict=True)]
        return Chain(nn.Linear(5, 6), blocks, nn.Linear(6, 3))

    model, _, hops = fake_step(replace(method, devices=(A, B, C)), merges)
    assert len({p.device for p in model.parameters()}) == 3
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.device == p.device, name
    assert all(move in hops for move in UP + DOWN), hops


def test_an_exact_epoch_hops_forward_and_back():
    _, _, hops = fake_step(HighwayBP(exact_from=1, devices=(A, B, C)))
    assert hops == [LABELS, *UP, *DOWN]


def test_blocks_run_as_one_on_one_device_alone():
    """Attention and MLP of a ViT's two layers per device: four calls, where one device has two."""
    with fake_devices():
        model = vit_tiny((3, 4, 4), 5, patch=2, dim=8, depth=4, heads=2)
        members = [[together.members for together in alike_blocks(model.residuals())]]
        Placement(model, (A, B))
        members.append([together.members for together in alike_blocks(model.residuals())])
    assert members == [[(0, 2, 4, 6), (1, 3, 5, 7)], [(0, 2), (1, 3), (4, 6), (5, 7)]]


@pytest.mark.parametrize("combination", ["sum", "min_residual"])
def test_no_step_waits_for_a_device(combination):
    """Neither on the CPU nor where tensors have no values, in steps that measure and in others."""
    for devices, watch in ((("cpu", "cpu"), _Reading), (("meta", "meta"), nullcontext)):
        method = HighwayBP(iterations=2, combination=combination, tolerance=0.1, devices=devices)
        model = mlp((1, 8, 8), 4, depth=5, width=6).double()
        estimator = method.bind(model, cross_entropy)
        estimator.start_epoch(0)
        x, y = (t.to(devices[0]) for t in small_batch(0, 4))
        with watch():
            for _ in range(3):
                estimator.backward(x, y)
        assert {p.grad.device.type for p in model.parameters()} == {devices[0]}


class Held:
    """As much of a tensor as `gathered` needs, on devices that a CPU cannot move parameters to."""

    def __init__(self, place):
        self.data, self.device = self, torch.device(place)

    def to(self, place):
        return Held(place)


class Weight:
    def __init__(self, place):
        self.data = Held(place)

    device = property(lambda self: self.data.device)


def test_the_whole_model_is_on_the_first_device_and_its_storages_come_back():
    weights = [Weight(A), Weight(B), Weight(C)]
    before = [weight.data for weight in weights]
    model = SimpleNamespace(parameters=lambda: weights[:2], buffers=lambda: weights[2:])
    places = [torch.device(place) for place in (A, B, C)]
    with gathered(model, places) as whole:
        assert whole is model
        assert {weight.device for weight in weights} == {places[0]}
        assert weights[0].data is before[0]
    assert [weight.data for weight in weights] == before
    with gathered(model, ()):
        assert [weight.data for weight in weights] == before, "no device was named: all stay"


@pytest.mark.parametrize("method", [HighwayBP(devices=("cpu", "cpu")), DDG(devices=("cpu", "cpu"), cuts=(1,))], ids=str)
def test_the_whole_model_is_that_of_the_estimators_devices(method, monkeypatch):
    monkeypatch.setattr(importlib.import_module(type(method).__module__), "gathered", lambda *given: given)
    model = small_net()
    assert method.bind(model, cross_entropy).whole() == (model, (torch.device("cpu"),) * 2)


def test_the_weights_stay_the_optimizers_and_end_on_the_first_device():
    model = small_net()
    parameters = list(model.parameters())
    estimator = HighwayBP(devices=("cpu", "cpu")).bind(model, cross_entropy)
    assert all(p is q for p, q in zip(parameters, model.parameters(), strict=True))
    assert estimator.finalize() is model
    with fake_devices():
        model = linears()
        assert HighwayBP(devices=(B, C)).bind(model, cross_entropy).finalize() is model
        assert {str(p.device) for p in model.parameters()} == {B}


def test_every_device_has_random_numbers_of_its_own(monkeypatch):
    generators = (torch.Generator(), torch.Generator())
    monkeypatch.setattr(torch.cuda, "default_generators", generators)
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: nullcontext())
    zero, one = torch.device("cuda:0"), torch.device("cuda:1")
    with seeded([zero, one, zero, torch.device("cpu")], 5):
        seeds = [generator.initial_seed() for generator in generators]
    assert seeds[0] == torch.initial_seed() == 5, "the first is as it would be alone"
    assert seeds[1] != seeds[0], "equal layers would have equal dropout masks"
