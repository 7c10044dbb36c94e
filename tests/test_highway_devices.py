"""Highway-BP over several devices of one process: the numbers of one device, and what is refused.

The CPU is every one of the devices; that tensors are where they belong is in `test_highway_placement.py`.
"""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fastbp import Chain, DecorrelatedBP, HighwayBP, LayerDropBack, Residual
from fastbp.chain import Add, AddNorm, AddReLU, Replace, ShortcutAdd
from fastbp.config import RunConfig, Task, check_bind
from fastbp.models import make_model
from fastbp.nets import gpt_tiny, mlp
from fastbp.recipe import Recipe
from fastbp.run import Run
from fastbp.testing import check_method, small_batch, small_net
from test_chain import torchvision_vit
from test_exact import timm_resnet, wide_batch

TWO, THREE = ("cpu",) * 2, ("cpu",) * 3


def varied():
    """Every kind of merge, batch norm, dropout, a block without residual path."""

    def branch(a, b, stride=1):
        conv = nn.Conv2d(a, b, 3, stride=stride, padding=1, bias=False)
        return nn.Sequential(nn.BatchNorm2d(a), nn.ReLU(), conv, nn.Dropout(0.3), nn.Conv2d(b, b, 1))

    torch.manual_seed(0)
    shortcut = nn.Sequential(nn.Conv2d(3, 4, 1, stride=2), nn.BatchNorm2d(4))
    blocks = [
        Residual(branch(3, 3), Add()),
        Residual(branch(3, 3), AddReLU()),
        Residual(branch(3, 4, 2), ShortcutAdd(shortcut, relu=True)),
        Residual(nn.Conv2d(4, 4, 1), Replace()),
        Residual(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), AddNorm(nn.LayerNorm(4))),
        Residual(branch(4, 4), Add()),
    ]
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    return Chain(nn.Conv2d(1, 3, 3, padding=1), blocks, head).double()


def resnet():
    model = timm_resnet()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)  # timm starts the last ones at zero: nothing would flow
    return model


def vit():
    torch.manual_seed(0)
    return torchvision_vit(dropout=0.1).double()


def vit_batch(index, size):
    x, y = small_batch(index, size)
    return nn.functional.interpolate(x, scale_factor=4).expand(-1, 3, -1, -1), y


def deep_mlp():
    torch.manual_seed(0)
    return mlp((1, 8, 8), 4, depth=5, width=6).double()


NETS = {
    "chain": (varied, small_batch),
    "mlp": (deep_mlp, small_batch),
    "timm resnet": (resnet, wide_batch),
    "torchvision vit": (vit, vit_batch),
}
SETTINGS = [
    HighwayBP(iterations=0),
    HighwayBP(iterations=2, tolerance=0.01),
    HighwayBP(iterations=9),
    HighwayBP(iterations=2, gamma=0.2, combination="min_residual", tolerance=0.01),
    HighwayBP(iterations=9, combination="min_residual"),
    HighwayBP(iterations=2, gamma=0.1, batched=True),
    HighwayBP(iterations=1, exact_from=1),
]


def trained(method, make, batch, epoch=1):
    """All numbers of three steps of an epoch: losses, gradients, in the end weights and buffers; and the estimator."""
    model = make().train()
    estimator = method.bind(model, cross_entropy)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    estimator.start_epoch(epoch)
    torch.manual_seed(5)
    seen = []
    for index in range(3):
        optimizer.zero_grad(set_to_none=True)
        seen.append(estimator.backward(*batch(index, 4)))
        seen += [p.grad for p in model.parameters() if p.grad is not None]
        optimizer.step()
    return [*seen, *model.state_dict().values()], estimator


@pytest.mark.parametrize("method", SETTINGS, ids=str)
@pytest.mark.parametrize("name", NETS)
def test_named_devices_change_no_number(name, method):
    """Losses, gradients, buffers and weights of steps with momentum, bit for bit; and what was measured on the way."""
    if method.batched and name != "mlp":
        pytest.skip("no equal blocks: refused")
    make, batch = NETS[name]
    want, plain = trained(method, make, batch)
    for devices in (TWO, THREE):
        got, placed = trained(replace(method, devices=devices), make, batch)
        assert len(got) == len(want)
        assert all(map(torch.equal, got, want)), f"{name} on {devices}"
        assert placed.metrics() == plain.metrics()
        assert placed.devices == tuple(map(torch.device, devices))


PLACED = HighwayBP(iterations=2, devices=TWO)


@pytest.mark.parametrize(
    "method",
    [
        PLACED,
        replace(PLACED, gamma=0.2, exact_from=3, tolerance=0.05, devices=THREE),
        LayerDropBack(unit="prefix", inner=PLACED),
        DecorrelatedBP(decor_lr=1e-2, inner=PLACED),
        pytest.param(LayerDropBack(inner=DecorrelatedBP(decor_lr=1e-2, inner=PLACED)), marks=pytest.mark.long),
    ],
    ids=str,
)
def test_method_conforms(method):
    check_method(method)


@pytest.mark.parametrize("wrapper", [LayerDropBack(), DecorrelatedBP(decor_lr=1e-2)], ids=str)
def test_a_wrapper_sees_the_devices_and_the_same_numbers(wrapper):
    want, _ = trained(replace(wrapper, inner=replace(PLACED, devices=None)), small_net, small_batch, epoch=2)
    got, estimator = trained(replace(wrapper, inner=PLACED), small_net, small_batch, epoch=2)
    assert all(map(torch.equal, got, want))
    assert len(estimator.devices) == 2


def test_a_state_moves_between_one_device_and_several():
    """Stopped after every second step and continued by the other form, in another process."""
    methods = [replace(PLACED, tolerance=0.05), replace(PLACED, tolerance=0.05, devices=None)]
    batches = [small_batch(i, 8) for i in range(6)]

    def steps(state, method, items):
        model = small_net().train()
        estimator = method.bind(model, cross_entropy)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
        if state:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            estimator.load_state_dict(state["estimator"])
        estimator.start_epoch(1)
        torch.manual_seed(3)
        losses = []
        for x, y in items:
            optimizer.zero_grad(set_to_none=True)
            losses.append(estimator.backward(x, y).item())
            optimizer.step()
        with estimator.whole() as whole:
            weights = copy.deepcopy(whole.state_dict())
        return losses, {
            "model": weights,
            "optimizer": copy.deepcopy(optimizer.state_dict()),
            "estimator": estimator.state_dict(),
        }

    ends = []
    for order in ((1, 1, 1), (0, 1, 0)):
        losses, state = [], {}
        for part, which in enumerate(order):
            new, state = steps(state, methods[which], batches[2 * part : 2 * part + 2])
            losses += new
        ends.append(losses)
    assert ends[0] == ends[1], f"on one device {ends[0]}, in turns {ends[1]}"


def test_a_run_on_named_devices_has_the_records_of_one_in_place():
    task = Task(model="mlp", model_args={"depth": 4, "width": 8}, data_args={"limit": 128})
    ends = []
    for devices in (None, TWO):
        method = HighwayBP(iterations=2, exact_from=1, devices=devices)
        run = Run(RunConfig(task, Recipe(epochs=2, batch_size=32), method), device="cpu")
        epochs = [run.train_epoch(), run.train_epoch()]
        ends.append([(e.train_loss, e.val_accuracy, e.val_loss, e.test_accuracy, e.flops_executed) for e in epochs])
        assert run.end().workers == 1, "all of them are one CPU"
    assert ends[0] == ends[1], f"in place {ends[0]}, on named devices {ends[1]}"
    assert run.devices == [torch.device("cpu")] * 2, "what the clock waits for, and memory and energy are read from"
    run.devices = [torch.device("cuda:0"), torch.device("cuda:1")]
    assert run.start_record().workers == 2, "an arm on two GPUs must not pass for one on one"


@pytest.mark.gpu
@pytest.mark.parametrize("devices", [("cuda:0", "cuda:1"), ("cuda:0", "cpu"), ("cpu", "cuda:0")], ids=str)
@pytest.mark.parametrize("method", SETTINGS, ids=str)
def test_real_devices_give_the_numbers_of_one(devices, method):
    if torch.cuda.device_count() < sum(name != "cpu" for name in devices):
        pytest.skip("not enough CUDA devices")

    def there(index, size):
        return tuple(t.to(devices[0]) for t in small_batch(index, size))

    want, _ = trained(method, deep_mlp, small_batch)
    got, estimator = trained(replace(method, devices=devices), deep_mlp, there)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-9, atol=1e-11)
    assert {str(p.device) for p in estimator.model.parameters()} == set(devices)
    assert all(p.grad.device == p.device for p in estimator.model.parameters())


# Refusals


@pytest.mark.parametrize("given", [(), [], "cuda:0", ("cuda:0", 1), 2], ids=str)
def test_devices_are_names(given):
    with pytest.raises(ValueError, match=r"HighwayBP\.devices = .*: must be names of torch devices, at least one"):
        HighwayBP(devices=given)


def test_a_list_becomes_a_value():
    method = HighwayBP(devices=["cpu", "cpu"])
    assert method == HighwayBP(devices=("cpu", "cpu"))
    assert hash(method) == hash(HighwayBP(devices=("cpu", "cpu")))
    assert HighwayBP.from_dict(method.to_dict()) == method
    assert method.exact(small_net()).devices == ("cpu", "cpu"), "the control is on the same hardware"


def tied():
    model = deep_mlp()
    model.blocks[3].branch[1].weight = model.blocks[0].branch[1].weight
    return model


@pytest.mark.parametrize(
    ("make", "devices", "error", "message"),
    [
        (deep_mlp, ("cpu",) * 6, ValueError, "6 devices, but only 5 blocks; name at most as many devices as blocks"),
        (tied, TWO, TypeError, "weight 0.branch.1.weight is shared across the cut before block 2, .*; untie it or"),
        (deep_mlp, ("cpu", "nowhere:0"), ValueError, "there is no device 'nowhere:0' here"),
        (deep_mlp, ("cpu", "cuda:99"), ValueError, "there is no device 'cuda:99' here"),
        (lambda: make_model("gru", (8,), 3, {"width": 4}), TWO, ValueError, "a Recurrent share their weights"),
    ],
    ids=["more than blocks", "tied", "no such type", "no such device", "over time"],
)
def test_bind_refuses_in_a_sentence_and_touches_nothing(make, devices, error, message):
    model = make()
    before = [(t.device, t.data_ptr()) for t in model.state_dict().values()]
    with pytest.raises(error, match=message):
        HighwayBP(devices=devices).bind(model, cross_entropy)
    assert [(t.device, t.data_ptr()) for t in model.state_dict().values()] == before


def test_weights_shared_within_a_device_are_fine():
    model = tied()
    assert len(HighwayBP(devices=("cpu",)).bind(model, cross_entropy).devices) == 1
    model.blocks[3].branch[1].weight = nn.Parameter(model.blocks[4].branch[1].weight.detach().clone())
    model.blocks[4].branch[1].weight = model.blocks[3].branch[1].weight
    HighwayBP(devices=TWO).bind(model, cross_entropy).backward(*small_batch(0, 4))


def test_a_sweep_is_checked_where_its_devices_are_not():
    method = LayerDropBack(inner=HighwayBP(devices=("cuda:98", "cuda:99")))
    exact = check_bind(RunConfig(Task(model="mlp"), Recipe(epochs=1), method))
    assert exact.inner.devices == ("cuda:98", "cuda:99")


def test_gpt_with_a_loss_per_token():
    torch.manual_seed(0)
    model = gpt_tiny((6,), 7, dim=8, depth=2, heads=2, norm="post").double()
    x = torch.randint(7, (3, 6))
    loss_fn = lambda out, y: cross_entropy(out.flatten(0, 1), y.flatten())  # noqa: E731
    grads = []
    for devices in (None, THREE):
        twin = copy.deepcopy(model)
        HighwayBP(iterations=2, gamma=0.1, devices=devices).bind(twin, loss_fn).backward(x, x.roll(1))
        grads.append([p.grad for p in twin.parameters()])
    assert all(map(torch.equal, *grads))
