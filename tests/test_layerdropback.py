"""LayerDropBack: the trajectory of its slow twin, and the invariants of a mask that is only a mask."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastbp import Backprop, DecorrelatedBP, HighwayBP, LayerDropBack
from fastbp.masks import dropped_mask, prefix_mask, prefix_top
from fastbp.units import droppable_units, head_parameters
from reference import layerdropback as twin

cross_entropy = nn.functional.cross_entropy


def conv_net(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    body = [nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, bias=False)]
    return nn.Sequential(*body, nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 3)).to(dtype)


def batches(count, dtype=torch.float32, seed=1, size=5):
    g = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, 2, 6, 6, generator=g).to(dtype), torch.randint(0, 3, (size,), generator=g))
        for _ in range(count)
    ]


def sgd(model, lr=0.05, **args):
    return torch.optim.SGD(model.parameters(), lr=lr, **({"momentum": 0.9, "nesterov": True} | args))


def train(estimator, optimizer, epochs):
    """Epochs are lists of batches; the plan's learning-rate factor is applied, its batch factor is not."""
    losses, base = [], [group["lr"] for group in optimizer.param_groups]
    for epoch, items in enumerate(epochs):
        scale = estimator.start_epoch(epoch).lr_scale
        for group, lr in zip(optimizer.param_groups, base, strict=True):
            group["lr"] = lr * scale
        for x, y in items:
            optimizer.zero_grad(set_to_none=True)
            losses.append(estimator.backward(x, y).item())
            optimizer.step()
    return losses


def everything(model, optimizer):
    """All tensors of model and optimizer, in a fixed order."""
    state = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    return [t.detach() for t in [*model.state_dict().values(), *state]]


def assert_equal(got, want, what):
    assert len(got) == len(want), f"{what}: {len(got)} tensors instead of {len(want)}"
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert torch.equal(a, b), f"{what}: tensor {i} differs by {(a.double() - b.double()).abs().max():.3g}"


def dropping(model, method, epoch=2):
    estimator = method.bind(model, cross_entropy)
    estimator.start_epoch(epoch)
    return estimator


UNITS = {
    "tensor": [["0.weight"], ["0.bias"], ["1.weight"], ["1.bias"], ["3.weight"], ["4.weight"], ["4.bias"]],
    "layer": [["0.weight", "0.bias"], ["1.weight", "1.bias"], ["3.weight"], ["4.weight", "4.bias"]],
}
HEAD = {"tensor": [["6.weight"], ["6.bias"]], "layer": [["6.weight", "6.bias"]]}


@pytest.mark.parametrize("unit", ["tensor", "layer"])
def test_trajectory_is_the_twins(unit):
    fast, slow = conv_net(torch.float64), conv_net(torch.float64)
    epochs = [batches(4, torch.float64, seed=e) for e in range(5)]
    units = UNITS[unit] + HEAD[unit]
    method = LayerDropBack(drop_rate=0.4, unit=unit, seed=7)
    got = train(method.bind(fast, cross_entropy), sgd(fast, weight_decay=0.01), epochs)
    settings = dict(p=0.4, s=2, seed=7, lr=0.05, mult=1 / 0.6, momentum=0.9, weight_decay=0.01)
    droppable = [True] * len(UNITS[unit]) + [False] * len(HEAD[unit])
    want = twin.train(slow, epochs, cross_entropy, units, droppable, **settings)
    worst = max(abs(a - b) for a, b in zip(got, want, strict=True))
    assert worst < 1e-12, f"losses differ by {worst:.3g}"
    for name, value in fast.state_dict().items():
        torch.testing.assert_close(value, slow.state_dict()[name], rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("method", [LayerDropBack(drop_rate=0.0, batch_scale=1.0), LayerDropBack(every_epochs=9)])
def test_nothing_to_drop_is_backprop_to_the_bit(method):  # I1, I2
    ours, plain = conv_net(), conv_net()
    epochs = [batches(3, seed=e) for e in range(3)]
    opt_ours, opt_plain = sgd(ours), sgd(plain)
    train(method.bind(ours, cross_entropy), opt_ours, epochs)
    train(Backprop().bind(plain, cross_entropy), opt_plain, epochs)
    assert method.lr_scale == 1.0 or method.every_epochs == 9, f"lr scale is {method.lr_scale}"
    assert_equal(everything(ours, opt_ours), everything(plain, opt_plain), "p = 0")


def test_control_arm_is_backprop_on_the_same_plan():
    ours, plain = conv_net(), conv_net()
    method = LayerDropBack().exact(ours)
    assert method == LayerDropBack(mask=False), f"exact is {method}"
    estimator = dropping(ours, method)
    plan = estimator.start_epoch(2)
    assert (plan.lr_scale, plan.batch_scale) == (2.0, 2.0), f"the control's plan is {plan}"
    opt_ours, opt_plain = sgd(ours), sgd(plain)
    train(estimator, opt_ours, [[], [], batches(4)])
    reference = Backprop().bind(plain, cross_entropy)
    for group in opt_plain.param_groups:
        group["lr"] *= 2
    train(reference, opt_plain, [batches(4)])
    assert_equal(everything(ours, opt_ours), everything(plain, opt_plain), "mask = False")


def test_drop_epochs():  # I2
    drops = [e for e in range(202) if LayerDropBack().is_dropping(e)]
    assert drops == list(range(2, 201, 2)), f"s=2: {drops[:5]} ... {len(drops)} of them"
    assert len(drops) == 100
    every = [e for e in range(10) if LayerDropBack(every_epochs=1).is_dropping(e)]
    assert every == list(range(1, 10)), f"s=1 drops in {every}"
    third = [e for e in range(10) if LayerDropBack(every_epochs=3).is_dropping(e)]
    assert third == [3, 6, 9], f"s=3 drops in {third}"


def test_learning_rate_policies_do_not_compound():  # I9
    policies = {"inverse": 1 / (1 - 0.7), "double": 2.0, "none": 1.0}
    for policy, want in policies.items():
        method = LayerDropBack(drop_rate=0.7, lr_policy=policy, every_epochs=1)
        estimator = method.bind(conv_net(), cross_entropy)
        scales = [estimator.start_epoch(e).lr_scale for e in range(5)]
        assert scales == [1.0, want, want, want, want], f"{policy}: learning-rate factors {scales}"


@pytest.mark.parametrize("unit", ["tensor", "layer", "block"])
@pytest.mark.parametrize("p", [0.3, 0.8])
def test_forward_and_kept_gradients_are_backprops(unit, p):  # I3, I4, I5, I7
    ours, plain = conv_net(), conv_net()
    estimator = dropping(ours, LayerDropBack(drop_rate=p, unit=unit))
    dropped = 0
    for x, y in batches(6):
        for a in ours.parameters():
            a.grad = torch.full_like(a, 1e6)  # stale; a kept one is cleared as the loop does
        units = droppable_units(ours, unit)
        mask = dropped_mask(0, 2, range(estimator.step, estimator.step + 1), torch.tensor([u.index for u in units]), p)
        expected = {id(q) for u, drop in zip(units, mask[0], strict=True) if drop for q in u.parameters}
        for a in ours.parameters():
            a.grad = a.grad if id(a) in expected else None
        plain.zero_grad()
        loss = estimator.backward(x, y)
        want = nn.functional.cross_entropy(plain(x), y)
        want.backward()
        assert torch.equal(loss, want.detach()), f"loss {loss} instead of {want}"
        for (name, a), b in zip(ours.named_parameters(), plain.parameters(), strict=True):
            if id(a) in expected:
                dropped += 1
                assert a.grad is None, f"dropped {name} has a gradient"
            else:
                assert a.grad is not None, f"kept {name} has no gradient"
                assert torch.equal(a.grad, b.grad), f"{name}: off by {(a.grad - b.grad).abs().max():.3g}"
        for (name, a), b in zip(ours.named_buffers(), plain.buffers(), strict=True):
            assert torch.equal(a, b), f"buffer {name} differs"
    assert dropped > 0, "the mask never dropped anything"


OPTIMIZERS = {
    "sgd": lambda ps: torch.optim.SGD(ps, 0.1, momentum=0.9, nesterov=True, weight_decay=0.1, foreach=False),
    "sgd foreach": lambda ps: torch.optim.SGD(ps, 0.1, momentum=0.9, nesterov=True, weight_decay=0.1, foreach=True),
    "sgd fused": lambda ps: torch.optim.SGD(ps, 0.1, momentum=0.9, nesterov=True, weight_decay=0.1, fused=True),
    "adam": lambda ps: torch.optim.Adam(ps, 0.1, weight_decay=0.1),
    "adam fused": lambda ps: torch.optim.Adam(ps, 0.1, weight_decay=0.1, fused=True),
    "adamw": lambda ps: torch.optim.AdamW(ps, 0.1, weight_decay=0.1),
    "adam foreach": lambda ps: torch.optim.Adam(ps, 0.1, weight_decay=0.1, foreach=True),
    "adamw foreach": lambda ps: torch.optim.AdamW(ps, 0.1, weight_decay=0.1, foreach=True),
    "adamw fused": lambda ps: torch.optim.AdamW(ps, 0.1, weight_decay=0.1, fused=True),
    "rmsprop": lambda ps: torch.optim.RMSprop(ps, 0.01, momentum=0.9, weight_decay=0.1),
    "nadam": lambda ps: torch.optim.NAdam(ps, 0.01, weight_decay=0.1),
}


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_dropped_unit_does_not_move(kind, set_to_none):  # I6
    model = conv_net()
    optimizer = OPTIMIZERS[kind](list(model.parameters()))
    estimator = LayerDropBack(unit="layer").bind(model, cross_entropy)
    data = batches(9)
    train(estimator, optimizer, [data[:3]])
    estimator.start_epoch(2)
    moved = still = 0
    for x, y in data[3:]:
        optimizer.zero_grad(set_to_none=set_to_none)
        estimator.backward(x, y)
        before = {p: (p.detach().clone(), copy.deepcopy(optimizer.state[p])) for p in model.parameters()}
        optimizer.step()
        for name, p in model.named_parameters():
            weight, state = before[p]
            if p.grad is not None:
                moved += 1
                assert not torch.equal(p, weight), f"{kind}: kept {name} did not move"
                continue
            still += 1
            assert torch.equal(p, weight), f"{kind}: dropped {name} moved by {(p - weight).abs().max():.3g}"
            for key, value in state.items():
                same = value == optimizer.state[p][key]
                assert bool(torch.as_tensor(same).all()), f"{kind}: {key} of dropped {name} changed"
    assert moved > 10, f"only {moved} updates"
    assert still > 10, f"only {still} dropped tensors"


class _Convolutions(TorchDispatchMode):
    """Collects the output mask of every convolution's backward."""

    def __init__(self):
        super().__init__()
        self.masks = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution_backward.default:
            self.masks.append(tuple(args[-1]))
        return func(*args, **(kwargs or {}))


def test_weight_gradient_work_is_skipped():  # I8
    model = conv_net()
    estimator = dropping(model, LayerDropBack(unit="tensor"))
    first, last, seen = model[0], model[3], set()
    for x, y in batches(12):
        model.zero_grad()
        with _Convolutions() as count:
            estimator.backward(x.requires_grad_(), y)  # so that the first layer has an input gradient too
        kept = [q.grad is not None for q in (first.weight, first.bias, last.weight)]
        want = [(True, kept[2], False), (True, kept[0], kept[1])]
        assert count.masks == want, f"kept {kept}, but convolution_backward ran with {count.masks}"
        seen.add(want[1])
    assert (True, False, True) in seen, f"no step with a dropped weight and a kept bias among {seen}"


def test_mask_is_pure_and_the_twins():  # I11
    units = torch.arange(7)
    want = dropped_mask(3, 4, range(10), units, 0.5)
    torch.manual_seed(99)
    torch.rand(5)
    assert torch.equal(want, dropped_mask(3, 4, range(10), units, 0.5)), "the global generator changed the mask"
    alone = torch.stack([dropped_mask(3, 4, range(t, t + 1), units, 0.5)[0] for t in range(10)])
    assert torch.equal(want, alone), "the mask depends on how many steps are drawn at once"
    for p in (0.1, 0.5, 0.9):
        mask = dropped_mask(3, 4, range(10), units, p)
        slow = [[twin.uniform(3, 4, t, u) < p for u in range(7)] for t in range(10)]
        assert mask.tolist() == slow, f"p = {p}: not the mask of Python's integers"
    for other in (dropped_mask(4, 4, range(10), units, 0.5), dropped_mask(3, 6, range(10), units, 0.5)):
        assert not torch.equal(want, other), "another seed or epoch gives the same mask"


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
def test_mask_statistics(p):  # I11
    draws, units = 10_000, 6
    mask = dropped_mask(0, 2, range(draws), torch.arange(units), p).double()
    sigma = (p * (1 - p) / draws) ** 0.5
    rates = mask.mean(0)
    worst = ((rates - p).abs() / sigma).max()
    assert worst < 4, f"drop rates {rates.tolist()} are {worst:.1f} sigma from {p}"
    centred = mask - p
    pairs = (centred.T @ centred / draws / (p * (1 - p)))[~torch.eye(units, dtype=torch.bool)]
    assert pairs.abs().max() < 4.5 / draws**0.5, f"units correlate by {pairs.abs().max():.3g}"
    lag = (centred[1:] * centred[:-1]).mean(0) / (p * (1 - p))
    assert lag.abs().max() < 4.5 / draws**0.5, f"steps correlate by {lag.abs().max():.3g}"


def test_resume_in_the_middle_of_an_epoch():  # I11
    data = batches(150, size=2)
    straight, stopped = conv_net(), conv_net()
    method = LayerDropBack(seed=5)
    opt_a, opt_b = sgd(straight), sgd(stopped)
    one, two = dropping(straight, method), dropping(stopped, method)

    def run(estimator, optimizer, items):
        for x, y in items:
            optimizer.zero_grad()
            estimator.backward(x, y)
            optimizer.step()

    run(one, opt_a, data)
    run(two, opt_b, data[:70])
    again = conv_net(seed=8)
    again.load_state_dict(stopped.state_dict())
    opt_c = sgd(again)
    opt_c.load_state_dict(opt_b.state_dict())
    three = method.bind(again, cross_entropy)
    three.load_state_dict(two.state_dict())
    run(three, opt_c, data[70:])
    assert_equal(everything(again, opt_c), everything(straight, opt_a), "resumed at step 70")


def names_of(model, ids):
    return [name for name, p in model.named_parameters() if id(p) in ids]


def test_head_rule_on_known_models():  # I12
    timm = pytest.importorskip("timm")
    models = pytest.importorskip("torchvision").models
    for model in (
        timm.create_model("resnet18", num_classes=5),
        timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=5),
        models.resnet18(num_classes=5),
        models.alexnet(num_classes=5),
    ):
        names = [name for name, _ in model.named_parameters()]
        head = names_of(model, head_parameters(model))
        assert head == names[-2:], f"{type(model).__name__}: the head is {head}, not the last two {names[-2:]}"
        units = droppable_units(model, "tensor")
        assert [u.name for u in units] == names[:-2], "units are not the other tensors in order"
        assert [u.index for u in units] == list(range(len(names) - 2)), "indices are not positions"


class _Tied(nn.Module):
    """A language model's shape: the head uses the embedding's weight and has no bias."""

    def __init__(self):
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight


def test_tied_head_and_headless():
    model = _Tied()
    got = [[id(p) for p in u.parameters] for u in droppable_units(model, "layer")]
    assert got == [[id(model.body.weight), id(model.body.bias)]], "the tied weight is not part of the head"
    with pytest.raises(ValueError, match=r"^LayerDropBack\.unit = 'layer': Linear has nothing to drop outside"):
        LayerDropBack().bind(nn.Linear(2, 2), cross_entropy)


def test_user_frozen_stays_frozen_and_flags_come_back():  # I13
    model = conv_net()
    model[1].weight.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    estimator = dropping(model, LayerDropBack(drop_rate=0.9, unit="tensor"))
    for x, y in batches(4):
        estimator.backward(x, y)
        assert [p.requires_grad for p in model.parameters()] == flags, "flags changed after a step"
        assert model[1].weight.grad is None, "a frozen parameter got a gradient"
    with pytest.raises(RuntimeError):
        estimator.backward(torch.randn(3, 9, 6, 6), torch.zeros(3, dtype=torch.int64))
    assert [p.requires_grad for p in model.parameters()] == flags, "flags changed after an exception"
    assert estimator.finalize() is model
    kept = [u.index for u in droppable_units(model, "tensor")]
    assert kept == [u.index for u in droppable_units(conv_net(), "tensor")], "freezing shifted the unit indices"


@pytest.mark.parametrize("inner", [HighwayBP(iterations=1), Backprop()])
def test_mask_on_top_of_another_method(inner):
    from fastbp.nets import resnet_tiny

    torch.manual_seed(0)
    ours = resnet_tiny((1, 6, 6), 3, blocks=2, width=4)
    alone = copy.deepcopy(ours)
    x, y = torch.randn(4, 1, 6, 6), torch.tensor([0, 1, 2, 0])
    dropping(ours, LayerDropBack(inner=inner)).backward(x, y)
    inner.bind(alone, cross_entropy).backward(x, y)
    dropped = 0
    for (name, a), b in zip(ours.named_parameters(), alone.parameters(), strict=True):
        dropped += a.grad is None
        assert a.grad is None or torch.equal(a.grad, b.grad), f"kept {name} differs from {inner}"
    assert dropped > 0, "nothing was dropped"


@pytest.mark.parametrize(("p", "units"), [(0.25, 8), (0.5, 8), (0.1, 30)])
def test_prefix_rates(p, units):
    draws, top = 20_000, prefix_top(units, p)
    mask = prefix_mask(0, 2, range(draws), units, p).double()
    assert bool((mask[:, 1:] <= mask[:, :-1]).all()), "a dropped unit lies above a kept one"
    want = torch.tensor([max(0.0, (top - u) / (top + 1)) for u in range(units)], dtype=torch.float64)
    sigma = (want * (1 - want) / draws).sqrt() + 1e-9
    worst = ((mask.mean(0) - want).abs() / sigma).max()
    assert worst < 4.5, f"unit rates are {worst:.1f} sigma off {want.tolist()}"
    assert abs(want.mean() - p) < 1 / units, f"the mean rate is {want.mean():.3f}, not {p}"


def test_prefix_compensates_per_unit():
    ours, plain = conv_net(), conv_net()
    method = LayerDropBack(unit="prefix", drop_rate=0.5)
    assert method.lr_scale == 1.0, "prefix scales gradients, not the learning rate"
    estimator = dropping(ours, method)
    top, seen = prefix_top(4, 0.5), set()
    for x, y in batches(12):
        ours.zero_grad()
        plain.zero_grad()
        estimator.backward(x, y)
        cross_entropy(plain(x), y).backward()
        for u, names in enumerate(UNITS["layer"] + HEAD["layer"]):
            for name in names:
                got, full = ours.get_parameter(name).grad, plain.get_parameter(name).grad
                if got is not None:
                    scale = min(4.0, (top + 1) / (u + 1)) if u < min(top, 4) else 1.0
                    seen.add(scale)
                    torch.testing.assert_close(got, scale * full, msg=f"{name}: not {scale} x the gradient")
    assert {1.0, 4.0} <= seen, f"scales seen: {seen}"


def test_commutes_with_decorrelation_to_the_bit():
    outside, inside = conv_net(torch.float64), conv_net(torch.float64)
    epochs = [batches(3, torch.float64, seed=e) for e in range(3)]
    decorrelated = dict(decor_lr=1e-2, kappa=0.3, sample_fraction=0.5)
    runs = []
    for model, method in (
        (outside, DecorrelatedBP(inner=LayerDropBack(), **decorrelated)),
        (inside, LayerDropBack(inner=DecorrelatedBP(**decorrelated))),
    ):
        torch.manual_seed(0)
        estimator = method.bind(model, cross_entropy)
        optimizer = sgd(model)
        losses = train(estimator, optimizer, epochs)
        runs.append((losses, everything(model, optimizer)))
        estimator.finalize()
    assert runs[0][0] == runs[1][0], "losses differ"
    assert_equal(runs[0][1], runs[1][1], "DBP(LDB) against LDB(DBP)")


def test_refusals():
    with pytest.raises(
        TypeError, match=r"^LayerDropBack in LayerDropBack: two masks are one mask at another drop_rate$"
    ):
        LayerDropBack(inner=DecorrelatedBP(inner=LayerDropBack())).bind(conv_net(), cross_entropy)
    for settings, message in (
        ({"drop_rate": 1.0}, "LayerDropBack.drop_rate = 1.0: must be in [0, 1): at 1 nothing would learn"),
        ({"every_epochs": 0}, "LayerDropBack.every_epochs = 0: must be at least 1"),
        ({"unit": "stage"}, "LayerDropBack.unit = 'stage': must be one of tensor, layer, block, prefix"),
        ({"batch_scale": 0}, "LayerDropBack.batch_scale = 0.0: must be positive; 1 keeps the batch size"),
    ):
        with pytest.raises(ValueError, match=r"^LayerDropBack") as caught:
            LayerDropBack(**settings)
        assert str(caught.value) == message
