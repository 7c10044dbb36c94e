"""DDG against backprop of the batch and weights of t-d: bit for bit, in flight, stopped, resumed and drained."""

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn

from fastbp import DDG, Backprop, Chain, LayerDropBack, Residual, as_chain
from fastbp.chain import Add, AddReLU, Replace, ShortcutAdd
from fastbp.masks import dropped_mask
from fastbp.nets import vit_tiny
from reference import ddg as twin

cross_entropy = nn.functional.cross_entropy
MODES = ["stash", "mixed", "replay"]


def conv_net(seed=0):
    """Batch norm, dropout, a downsampling shortcut and a block without one; 5 blocks."""

    def branch(a, b, stride=1):
        conv = nn.Conv2d(a, b, 3, stride=stride, padding=1, bias=False)
        return nn.Sequential(nn.BatchNorm2d(a), nn.ReLU(), conv, nn.Dropout(0.3), nn.Conv2d(b, b, 1))

    torch.manual_seed(seed)
    shortcut = nn.Sequential(nn.Conv2d(3, 4, 1, stride=2), nn.BatchNorm2d(4))
    blocks = [
        Residual(branch(3, 3), Add()),
        Residual(branch(3, 3), AddReLU()),
        Residual(branch(3, 4, 2), ShortcutAdd(shortcut, relu=True)),
        Residual(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)), Replace()),
        Residual(branch(4, 4), Add()),
    ]
    return Chain(nn.Conv2d(2, 3, 1), blocks, nn.Sequential(nn.Flatten(), nn.Linear(36, 3)))


def transformer(seed=0):
    torch.manual_seed(seed)
    return vit_tiny((2, 6, 6), 3, patch=3, dim=8, depth=2, heads=2)


def linear_net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(*[nn.Linear(4, 4, bias=False) for _ in range(6)]).double()


def batches(count, size=4, seed=1):
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(size, 2, 6, 6, generator=g), torch.randint(0, 3, (size,), generator=g)) for _ in range(count)]


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-3)


def adam(parameters):
    return torch.optim.Adam(parameters, lr=3e-3)


OPTIMIZERS = {"sgd": sgd, "adam": adam}


def bind(model, method, loss_fn=cross_entropy, seed=0):
    """The method bound with dropout seed `seed`, the caller's generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return method.bind(model, loss_fn)


def one(estimator, optimizer, x, y):
    optimizer.zero_grad(set_to_none=True)
    loss = estimator.backward(x, y)
    optimizer.step()
    return loss


def drain(estimator, optimizer, final=True):
    count = 0
    for _ in estimator.drain(final=final):
        optimizer.step()
        count += 1
    return count


def assert_models_equal(got, want, what):
    for (name, a), b in zip(got.state_dict().items(), want.state_dict().values(), strict=True):
        assert torch.equal(a, b), f"{what}: {name} differs by {(a.double() - b.double()).abs().max():.3g}"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("K", [2, 3, 4])
@pytest.mark.parametrize("make", [conv_net, transformer])
def test_equals_the_twin_to_the_bit(make, K, kind, mode):  # T2, T6, T8, T13, T14
    fast, slow = make(), make()
    data = batches(8)
    want_losses, applied = twin.train(slow, data, cross_entropy, OPTIMIZERS[kind], K, weights=mode, drain=True, seed=0)
    estimator = bind(fast, DDG(modules=K, weights=mode, drain="end"))
    optimizer = OPTIMIZERS[kind](fast.parameters())
    groups = [list(m.parameters()) for m in twin.split(fast, K)]

    def check(t):
        for k, parameters in enumerate(groups):
            for i, p in enumerate(parameters):
                want = None if applied[t][k] is None else applied[t][k][i]
                same = p.grad is None if want is None else p.grad is not None and torch.equal(p.grad, want)
                assert same, f"{mode}: gradient {i} of module {k} in iteration {t} is not that of t-{K - 1 - k}"

    for t, (x, y) in enumerate(data):
        optimizer.zero_grad(set_to_none=True)
        loss = estimator.backward(x, y)
        check(t)
        optimizer.step()
        assert torch.equal(loss, want_losses[t]), f"loss {loss} in iteration {t}, the twin's {want_losses[t]}"
    for t, _ in enumerate(estimator.drain(final=True), start=len(data)):
        check(t)
        optimizer.step()
    assert_models_equal(fast, slow, f"{mode}, K={K}")


VIT = dict(img_size=32, patch_size=8, depth=3, proj_drop_rate=0.1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("name", "args"), [("resnet18", {"drop_rate": 0.2}), ("vit_tiny_patch16_224", VIT)])
def test_equals_the_twin_on_models_of_others(name, args, mode):
    timm = pytest.importorskip("timm")
    fast = timm.create_model(name, num_classes=5, **args)
    slow = copy.deepcopy(fast)
    g = torch.Generator().manual_seed(0)
    data = [(torch.randn(2, 3, 32, 32, generator=g), torch.tensor([1, 4])) for _ in range(3)]
    want, _ = twin.train(as_chain(slow), data, cross_entropy, sgd, 3, weights=mode, drain=True)
    estimator = bind(fast, DDG(modules=3, weights=mode, drain="end"))
    optimizer = sgd(fast.parameters())
    got = [one(estimator, optimizer, x, y) for x, y in data]
    drain(estimator, optimizer)
    assert got == want, f"losses {got}, the twin's {want}"
    assert_models_equal(fast, slow, f"{name}, {mode}")


@pytest.mark.parametrize("mode", ["mixed", "replay"])
def test_only_stash_is_the_gradient_of_its_batch(mode):  # T2
    data, finals = batches(8), []
    for weights in ("stash", mode):
        model = conv_net()
        estimator = bind(model, DDG(modules=3, weights=weights))
        optimizer = sgd(model.parameters())
        for x, y in data:
            one(estimator, optimizer, x, y)
        finals.append(model.state_dict())
    same = [torch.equal(finals[0][n], finals[1][n]) for n in ("stem.weight", "blocks.1.branch.2.weight")]
    assert not any(same), f"{mode} equals stash in {same}"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_one_module_is_backprop_to_the_bit(kind, mode):  # T1
    ours, plain = conv_net(), conv_net()
    data = batches(20)
    exact = DDG(modules=3, weights=mode).exact(ours)
    assert exact == DDG(modules=1, weights=mode), f"exact is {exact}"
    opt_ours, opt_plain = OPTIMIZERS[kind](ours.parameters()), OPTIMIZERS[kind](plain.parameters())
    one_module, backprop = exact.bind(ours, cross_entropy), Backprop().bind(plain, cross_entropy)
    torch.manual_seed(4)
    got = [one(one_module, opt_ours, x, y) for x, y in data]
    torch.manual_seed(4)
    want = [one(backprop, opt_plain, x, y) for x, y in data]
    assert got == want, "losses differ"
    assert_models_equal(ours, plain, "K=1")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("K", [2, 4])
def test_delay_shape(K, mode):  # T4
    s, T = 2, 9
    data = batches(T)
    noisy = list(data)
    noisy[s] = (data[s][0] + torch.randn_like(data[s][0]), data[s][1])
    histories = []
    for items in (data, noisy):
        model = conv_net()
        estimator = bind(model, DDG(modules=K, weights=mode))
        optimizer = sgd(model.parameters())
        history = []
        for x, y in items:
            one(estimator, optimizer, x, y)
            history.append(copy.deepcopy([[p.detach() for p in m.parameters()] for m in twin.split(model, K)]))
        histories.append(history)
    for k in range(K):
        differs = [
            any(not torch.equal(a, b) for a, b in zip(histories[0][t][k], histories[1][t][k], strict=True))
            for t in range(T)
        ]
        first = differs.index(True)
        assert first == s + K - 1 - k, f"module {k} first feels batch {s} in iteration {first}"


LAYERS = {
    "linear": lambda: (nn.Linear(4, 4), nn.Linear(4, 4, bias=False), (3, 4)),
    "conv": lambda: (nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1), (3, 4, 3, 3)),
    "norm": lambda: (nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), (3, 4, 3, 3)),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("mode", ["stash", "mixed"])
def test_semantics_canary(mode, layer):  # T5
    """The input-gradient of a layer inside a stale module: at the old weight for stash, at the new one for mixed."""
    torch.manual_seed(0)
    first, second, shape = LAYERS[layer]()
    model = nn.Sequential(first, second, nn.Identity(), nn.Flatten()).double()
    x = torch.randn(shape, dtype=torch.float64)
    target = torch.randn_like(x).flatten(1)
    estimator = bind(model, DDG(modules=2, weights=mode), nn.functional.mse_loss)

    def gradient(delta):
        """Of the first weight for this error signal after the second layer, at the second layer's present weight."""
        out = copy.deepcopy(second)(first(x))
        return torch.autograd.grad(out, first.weight, delta)[0]

    out = copy.deepcopy(second)(first(x)).detach().requires_grad_()
    (delta,) = torch.autograd.grad(nn.functional.mse_loss(out.flatten(1), target), out)
    old = gradient(delta)
    estimator.backward(x, target)
    with torch.no_grad():
        second.weight.add_(torch.rand_like(second.weight))
    new = gradient(delta)
    estimator.backward(x, target)
    want, other = (old, new) if mode == "stash" else (new, old)
    torch.testing.assert_close(first.weight.grad, want, rtol=1e-12, atol=1e-14)
    assert not torch.allclose(first.weight.grad, other, rtol=1e-3), "old and new weight give the same gradient"


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_warm_up_takes_no_step_at_all(kind):  # T6, T8
    K, T = 4, 7
    model = conv_net()
    start = copy.deepcopy(model.state_dict())
    estimator = bind(model, DDG(modules=K, drain="end"))
    optimizer = OPTIMIZERS[kind](model.parameters())
    groups = [
        {n for n, p in model.named_parameters() if any(p is q for q in m.parameters())} for m in twin.split(model, K)
    ]
    for t, (x, y) in enumerate(batches(T)):
        one(estimator, optimizer, x, y)
        for k, names in enumerate(groups):
            for name in names:
                p = model.get_parameter(name)
                still = torch.equal(p, start[name])
                assert still == (t < K - 1 - k), f"{name} of module {k} unmoved after iteration {t}: {still}"
                if t < K - 1 - k:
                    assert not optimizer.state[p], f"{name} has optimizer state after iteration {t}"
    if kind == "adam":
        counts = [{int(optimizer.state[model.get_parameter(n)]["step"]) for n in names} for names in groups]
        assert counts == [{T - 3}, {T - 2}, {T - 1}, {T}], f"updates per module before the drain: {counts}"
    assert drain(estimator, optimizer) == K - 1, "a drain takes K-1 ticks"
    if kind == "adam":
        counts = {int(optimizer.state[p]["step"]) for p in model.parameters()}
        assert counts == {T}, f"updates per module after the drain: {counts}"
    left = [len(m.queue) for m in estimator.modules], [d for d in estimator.inbox if d is not None]
    assert left == ([0] * K, []), f"in flight after the drain: {left}"


@pytest.mark.parametrize("mode", MODES)
def test_queue_lengths(mode):  # T7
    K = 4
    model = conv_net()
    estimator = bind(model, DDG(modules=K, weights=mode))
    optimizer = sgd(model.parameters())
    for t, (x, y) in enumerate(batches(6)):
        one(estimator, optimizer, x, y)
        lengths = [len(m.queue) for m in estimator.modules]
        want = [min(t + 1, K - 1 - k) for k in range(K)]
        assert lengths == want, f"queues after iteration {t}: {lengths}, expected {want}"
        assert estimator.metrics() == {"ddg/batches_in_flight": float(want[0])}


@pytest.mark.parametrize("when", ["never", "epoch", "end"])
def test_drain_settings(when):  # T8
    model = conv_net()
    estimator = bind(model, DDG(modules=3, drain=when))
    optimizer = sgd(model.parameters())
    ticks = []
    for final in (False, True):
        for x, y in batches(4):
            one(estimator, optimizer, x, y)
        ticks.append(drain(estimator, optimizer, final=final))
    assert ticks == {"never": [0, 0], "epoch": [2, 2], "end": [0, 2]}[when], f"drain = {when}: ticks {ticks}"


def test_after_a_drain_the_warm_up_repeats():
    model = conv_net()
    estimator = bind(model, DDG(modules=3, drain="epoch"))
    optimizer = sgd(model.parameters())
    for _ in range(2):
        for t, (x, y) in enumerate(batches(3)):
            one(estimator, optimizer, x, y)
            moved = model.stem.weight.grad is not None
            assert moved == (t >= 2), f"module 0 has a gradient in iteration {t} of the epoch: {moved}"
        drain(estimator, optimizer, final=False)


@pytest.mark.parametrize("mode", MODES)
def test_evaluation_between_iterations_leaves_no_trace(mode):  # T9
    data, runs = batches(7), []
    for evaluate in (False, True):
        model = conv_net()
        torch.manual_seed(3)
        estimator = bind(model, DDG(modules=3, weights=mode))
        optimizer = sgd(model.parameters())
        losses = []
        for x, y in data:
            losses.append(one(estimator, optimizer, x, y))
            if evaluate:
                model.eval()
                with torch.no_grad():
                    model(data[0][0])
                model.train()
        runs.append((losses, model, torch.get_rng_state()))
    assert runs[0][0] == runs[1][0], "evaluation changed the losses"
    assert_models_equal(runs[0][1], runs[1][1], "with evaluation")
    assert torch.equal(runs[0][2], runs[1][2]), "DDG used the caller's generator"


def test_short_last_batch():  # T10
    data = batches(3) + batches(1, size=2) + batches(3, seed=2)
    fast, slow = conv_net(), conv_net()
    want, _ = twin.train(slow, data, cross_entropy, sgd, 3)
    estimator = bind(fast, DDG(modules=3))
    optimizer = sgd(fast.parameters())
    got = [one(estimator, optimizer, x, y) for x, y in data]
    assert got == want, f"losses {got}, the twin's {want}"


@pytest.mark.parametrize("stop", [1, 2, 5])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("K", "kind"), [(2, "sgd"), (3, "adam"), (4, "sgd")])
def test_interrupted_equals_uninterrupted(K, kind, mode, stop, tmp_path):  # T11
    data = batches(9)
    method = DDG(modules=K, weights=mode, drain="end")

    def run(model, optimizer, estimator, items, last):
        losses = [one(estimator, optimizer, x, y).item() for x, y in items]
        if last:
            drain(estimator, optimizer)
        return losses

    straight = conv_net()
    optimizer = OPTIMIZERS[kind](straight.parameters())
    want = run(straight, optimizer, bind(straight, method), data, True)

    stopped = conv_net()
    optimizer = OPTIMIZERS[kind](stopped.parameters())
    estimator = bind(stopped, method)
    got = run(stopped, optimizer, estimator, data[:stop], False)
    saved = {"model": stopped.state_dict(), "optimizer": optimizer.state_dict(), "method": estimator.state_dict()}
    torch.save(saved, tmp_path / "state.pt")
    run(stopped, optimizer, estimator, data[stop:], True)  # the original may go on
    assert_models_equal(stopped, straight, "saving changed the run")

    state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed = conv_net(seed=9)
    optimizer = OPTIMIZERS[kind](resumed.parameters())
    estimator = bind(resumed, method, seed=123)
    resumed.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    rng = torch.get_rng_state()
    estimator.load_state_dict(state["method"])
    assert torch.equal(torch.get_rng_state(), rng), "loading used the caller's generator"
    assert torch.equal(resumed.blocks[0].branch[0].running_mean, state["model"]["blocks.0.branch.0.running_mean"])
    got += run(resumed, optimizer, estimator, data[stop:], True)
    assert got == want, f"losses {got}, uninterrupted {want}"
    assert_models_equal(resumed, straight, f"{mode}, stopped after {stop}")


def test_state_of_another_K_is_refused():
    saved = bind(conv_net(), DDG(modules=3)).state_dict()
    with pytest.raises(ValueError, match=r"^DDG\.modules = 2, but the state was saved with 3; resume with that"):
        bind(conv_net(), DDG(modules=2)).load_state_dict(saved)


@pytest.mark.parametrize("mode", MODES)
def test_running_statistics_move_once_per_batch(mode):  # T13
    model, plain = conv_net(), conv_net()
    estimator = bind(model, DDG(modules=3, weights=mode))
    for t, (x, y) in enumerate(batches(5)):  # no optimizer: the weights stand still
        estimator.backward(x, y)
        h = x
        with torch.random.fork_rng(devices=[]):
            for k, module in enumerate(twin.split(plain, 3)):
                twin.seed_module(0, k, t)
                h = module(h)
        for (name, a), b in zip(model.named_buffers(), plain.buffers(), strict=True):
            assert torch.equal(a, b), f"{name} after batch {t} is not the plain forward's"


def test_dropout_depends_on_module_and_step_only():  # T14
    masks = []
    for noise in (0, 7):
        model = conv_net()
        seen = []
        model.blocks[4].branch[3].register_forward_hook(lambda m, a, out, seen=seen: seen.append(out == 0))
        estimator = bind(model, DDG(modules=2))
        for x, y in batches(3):
            torch.rand(noise + 1)
            estimator.backward(x, y)
        masks.append(seen)
    same = [torch.equal(a, b) for a, b in zip(*masks, strict=True)]
    assert all(same), "the caller's random draws changed a dropout mask"
    assert not torch.equal(masks[0][0], masks[0][1]), "two steps have the same dropout mask"


@pytest.mark.parametrize("mode", MODES)
def test_frozen_and_parameter_free_modules(mode):  # T18
    torch.manual_seed(0)
    layers = [nn.Linear(4, 4), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)]
    model = nn.Sequential(*layers)
    for p in [*model[0].parameters(), model[3].bias]:
        p.requires_grad_(False)
    estimator = bind(model, DDG(modules=4, weights=mode))
    optimizer = sgd(model.parameters())
    g = torch.Generator().manual_seed(0)
    start = copy.deepcopy(model.state_dict())
    for t in range(5):
        x, y = torch.randn(6, 4, generator=g), torch.tensor([0, 1, 2, 0, 1, 2])
        one(estimator, optimizer, x, y)
        got = [p.grad is not None for p in model.parameters()]
        assert got == [False, False, t >= 2, t >= 2, True, False], f"gradients in iteration {t}: {got}"
    frozen = [torch.equal(model.state_dict()[n], start[n]) for n in ("0.weight", "0.bias", "3.bias")]
    assert all(frozen), "a frozen parameter moved"


@pytest.mark.parametrize("mode", MODES)
def test_mask_belongs_to_the_batch_of_its_forward(mode):
    """LayerDropBack over DDG: what is dropped in step t has no gradient from batch t, in step t+d."""
    model = conv_net()
    method = LayerDropBack(unit="tensor", inner=DDG(modules=2, weights=mode))
    estimator = bind(model, method)
    estimator.start_epoch(2)
    stem, masks, seen = model.stem.weight, [], []
    model.stem.register_forward_pre_hook(lambda *_: masks.append(stem.requires_grad))
    for x, y in batches(12):
        model.zero_grad(set_to_none=True)
        estimator.backward(x, y)
        seen.append(stem.grad is not None)
        assert stem.requires_grad, "the flag was not restored"
    forwards = estimator.units[0].parameters[0] is stem
    assert forwards, "unit 0 is not the stem's weight"
    dropped = dropped_mask(0, 2, range(12), torch.tensor([0]), 0.5)[:, 0].tolist()
    assert seen == [False] + [not d for d in dropped[:-1]], f"gradients {seen}, dropped {dropped}"


def test_refusals():
    model = conv_net()
    with pytest.raises(ValueError, match=r"^DDG\.modules = 6: this Chain has 5 blocks; use at most that many$"):
        DDG(modules=6).bind(model, cross_entropy)
    tied = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    tied[2].weight = tied[0].weight
    with pytest.raises(TypeError, match=r"^DDG: weight .*weight is shared across the cut before block 1; its gra"):
        DDG(modules=2).bind(tied, cross_entropy)  # T19
    DDG(modules=1).bind(tied, cross_entropy)
    for settings, message in (
        ({"modules": 0}, "DDG.modules = 0: must be at least 1, which is backprop"),
        ({"weights": "old"}, "DDG.weights = 'old': must be one of stash, mixed, replay"),
        ({"drain": "always"}, "DDG.drain = 'always': must be one of never, epoch, end"),
    ):
        with pytest.raises(ValueError, match=r"^DDG") as caught:
            DDG(**settings)
        assert str(caught.value) == message


TABLE = """
0  2              -               2              1              1.8
1  6.48           4               7.2            0.6            1.08
2  0.209952       12.96           0.3888         -0.696         1.04112
3  1.05014689753  0.69984         2.01734074368  -0.765984      0.839385925632
4  0.20669633040  -3.01766349865  0.49249415337  -0.46421765013 0.79013651030
"""


def test_section_12_table():
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)).double()
    model[0].weight.data.fill_(1)
    model[1].weight.data.fill_(2)
    estimator = bind(model, DDG(modules=2), lambda y, _: y.square().sum() / 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for line, x in zip(TABLE.split("\n")[1:-1], [1, 2, 1, 2, 1], strict=True):
        t, *printed = line.split()
        batch = torch.tensor([[float(x)]], dtype=torch.float64)
        loss = one(estimator, optimizer, batch, batch)
        grads = [None if p.grad is None else p.grad.item() for p in model.parameters()]
        values = [loss.item(), *grads, *[p.item() for p in model.parameters()]]
        for what, value, text in zip(("loss", "g1", "g2", "w1", "w2"), values, printed, strict=True):
            if text == "-":
                assert value is None, f"t={t}: {what} = {value} in the warm-up"
                continue
            last_digit = 10.0 ** -len(text.partition(".")[2])  # one entry is cut off, not rounded
            assert abs(value - float(text)) < 0.6 * last_digit, f"t={t}: {what} = {value!r}, printed {text}"


STABLE = {"none": 1.0, "heavy": 0.1, "nesterov": 0.253}


@pytest.mark.parametrize("kind", STABLE)
@pytest.mark.parametrize(("factor", "stable"), [(0.93, True), (1.07, False)])
def test_stability_oracle(kind, factor, stable):
    """With w2 frozen at 1, w1 follows 1/2 w^2 at delay 1: its largest stable step is known."""
    momentum = {} if kind == "none" else {"momentum": 0.9, "nesterov": kind == "nesterov"}
    one_by_one = torch.ones(1, 1, dtype=torch.float64)
    model = nn.Sequential(*[nn.Linear(1, 1, bias=False) for _ in range(2)]).double()
    for layer in model:
        layer.weight.data.fill_(1)
    model[1].weight.requires_grad_(False)
    estimator = bind(model, DDG(modules=2), lambda y, _: y.square().sum() / 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=STABLE[kind] * factor, **momentum)
    sizes = []
    for _ in range(300):
        one(estimator, optimizer, one_by_one, one_by_one)
        sizes.append(model[0].weight.abs().item())
    early, late = max(sizes[:100]), max(sizes[200:])
    assert (late < early) == stable, f"{kind}, {factor} of the bound: |w| from {early:.3g} to {late:.3g}"


def momentum_step(optimizer, estimator, x, y, none):
    optimizer.zero_grad(set_to_none=none)
    estimator.backward(x, y)
    optimizer.step()


RESTING = [
    LayerDropBack(unit="tensor", inner=DDG(modules=3)),
    LayerDropBack(unit="block", inner=DDG(modules=3)),  # drops all of module 0 at once
    DDG(modules=3, drain="epoch"),
]


@pytest.mark.parametrize("method", RESTING, ids=str)
def test_gradients_cleared_to_zero_move_nothing_that_rests(method):
    """What was dropped d steps ago, or has nothing to apply yet after a drain, has no gradient instead of a zero."""
    models = {}
    for none in (True, False):
        models[none] = conv_net()
        estimator, optimizer = bind(models[none], method), sgd(models[none].parameters())
        for epoch in (2, 3):
            estimator.start_epoch(epoch)
            for x, y in batches(6):
                momentum_step(optimizer, estimator, x, y, none)
            drain(estimator, optimizer, final=False)
    assert_models_equal(models[False], models[True], "cleared to zero")


def test_the_gradient_of_another_batch_of_the_same_step_stays():
    """Two micro-batches a step, one late: the first brings the gradient of the step before, with its mask."""
    model, dropped = conv_net(), dropped_mask(0, 2, range(6), torch.tensor([0]), 0.5)[:, 0].tolist()
    estimator = bind(model, LayerDropBack(unit="tensor", inner=DDG(modules=2)))
    estimator.start_epoch(2)
    seen, data = [], batches(12)
    for step in range(6):
        model.zero_grad(set_to_none=True)
        for x, y in data[2 * step : 2 * step + 2]:
            estimator.backward(x, y)
        seen.append(model.stem.weight.grad is not None)
    want = [not all(dropped[max(0, step - 1) : step + 1]) for step in range(6)]
    assert seen == want, f"gradients {seen}, dropped {dropped}"
    assert any(b and not a for a, b in pairwise(dropped)), "nothing is dropped right after it was kept"


@pytest.mark.parametrize("mode", MODES)
def test_a_module_that_returns_two_tensors_is_named(mode):
    class Twice(nn.Module):
        def forward(self, x):
            return x, x

    model = nn.Sequential(nn.Linear(3, 3), Twice(), nn.Linear(3, 3))
    estimator = DDG(modules=2, cuts=(2,), weights=mode).bind(model, cross_entropy)
    with pytest.raises(
        TypeError, match=r"^DDG: module 0, which ends in Twice, returned a tuple, but only one tensor .*; cut elsewhere"
    ):
        estimator.backward(torch.randn(2, 3), torch.tensor([0, 1]))
