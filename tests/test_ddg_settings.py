"""DDG's further settings against slow truths: step size, shrinkage, phases, accumulation, autocast, cosine, devices."""

import copy
import io
from dataclasses import replace

import pytest
import torch
from torch import nn

from fastbp import DDG, Backprop, HighwayBP, LayerDropBack
from fastbp.config import RunConfig, Task
from fastbp.recipe import Recipe
from fastbp.run import Run
from reference import ddg as twin
from test_ddg import (
    MODES,
    OPTIMIZERS,
    adam,
    assert_models_equal,
    batches,
    bind,
    conv_net,
    cross_entropy,
    drain,
    linear_net,
    one,
    sgd,
)


def plain_sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05)


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def saved(value):
    """As it comes back from a file."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_a_drained_run_goes_on_with_another_number_of_modules():  # T12
    model = conv_net()
    estimator = bind(model, DDG(modules=2, drain="end"))
    optimizer = sgd(estimator.param_groups())
    for x, y in batches(6):
        one(estimator, optimizer, x, y)
    drain(estimator, optimizer)
    state = saved({"model": model.state_dict(), "optimizer": optimizer.state_dict()})

    plain = conv_net(seed=5)
    assert list(state["model"]) == list(plain.state_dict()), "names depend on the split"
    plain.load_state_dict(state["model"], strict=True)
    assert_models_equal(plain, model, "the plain model")

    fast, slow = conv_net(seed=6), plain
    fast.load_state_dict(state["model"], strict=True)
    data = batches(7, seed=2)
    want, _ = twin.train(slow, data, cross_entropy, sgd, 3, drain=True)
    three = bind(fast, DDG(modules=3, drain="end"))
    optimizer = sgd(three.param_groups())
    got = [one(three, optimizer, x, y) for x, y in data]
    drain(three, optimizer)
    assert got == want, f"losses with 3 modules {got}, the twin's {want}"
    assert_models_equal(fast, slow, "K = 3 after K = 2")
    sgd(three.param_groups()).load_state_dict(state["optimizer"])  # its order does not depend on the split either


class Scaled:
    """A loss that is 2, 4, 8, ... times too large in turn, as with a loss scale that moves."""

    def __init__(self):
        self.scales = []

    def __call__(self, out, y):
        self.scales.append(2.0 ** (1 + len(self.scales) % 5))
        return cross_entropy(out, y) * self.scales[-1]


@pytest.mark.parametrize("mode", MODES)
def test_the_loss_scale_of_a_batch_travels_with_it(mode):  # T15
    K, data = 3, batches(9)
    plain, scaled, loss_fn = conv_net(), conv_net(), Scaled()
    estimator = bind(plain, DDG(modules=K, weights=mode))
    optimizer = sgd(plain.parameters())
    for x, y in data:
        one(estimator, optimizer, x, y)
    estimator = bind(scaled, DDG(modules=K, weights=mode), loss_fn)
    optimizer = sgd(scaled.parameters())
    groups = [list(m.parameters()) for m in twin.split(scaled, K)]
    for t, (x, y) in enumerate(data):
        optimizer.zero_grad(set_to_none=True)
        estimator.backward(x, y)
        for k, parameters in enumerate(groups):
            for p in parameters:
                if p.grad is not None:
                    p.grad /= loss_fn.scales[t - (K - 1 - k)]
        optimizer.step()
    assert_models_equal(scaled, plain, "unscaled by the scale of its batch")


class Clipping:
    """An optimizer that clips its own parameters' gradients, as module k's does in the definition."""

    def __init__(self, parameters):
        self.parameters, self.inner = parameters, sgd(parameters)

    def step(self):
        nn.utils.clip_grad_norm_(self.parameters, 0.5)
        self.inner.step()


def test_clipping_is_per_module():  # T16
    K, data = 3, batches(7)
    slow, fast, loose = conv_net(), conv_net(), conv_net()
    twin.train(slow, data, cross_entropy, Clipping, K)
    for model, clips in ((fast, True), (loose, False)):
        estimator = bind(model, DDG(modules=K))
        optimizer = sgd(model.parameters())
        for x, y in data:
            optimizer.zero_grad(set_to_none=True)
            estimator.backward(x, y)
            for module in estimator.modules if clips else ():
                nn.utils.clip_grad_norm_(list(module.net.parameters()), 0.5)
            optimizer.step()
    assert_models_equal(fast, slow, "clipped per module")
    assert not torch.equal(loose.stem.weight, slow.stem.weight), "nothing was clipped"


@pytest.mark.parametrize("power", [0.0, 0.5])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_one_clock_for_the_learning_rate(kind, power):  # T17
    """The rate is that of the step in which a gradient is applied, in flight or not; a module may scale it."""
    K, data = 3, batches(9)
    rates = [0.05] * 4 + [0.005] * 5
    fast, slow, made, passed = conv_net(), conv_net(), [], []

    def make_optimizer(parameters):
        made.append(OPTIMIZERS[kind](parameters))
        return made[-1]

    def loss_fn(out, y):
        for k, optimizer in enumerate(made):
            for group in optimizer.param_groups:
                group["lr"] = rates[len(passed)] * (1.0 + K - 1 - k) ** -power
        passed.append(y)
        return cross_entropy(out, y)

    twin.train(slow, data, loss_fn, make_optimizer, K, drain=True)
    estimator = bind(fast, DDG(modules=K, drain="end", lr_power=power))
    optimizer = OPTIMIZERS[kind](estimator.param_groups())
    for rate, (x, y) in zip(rates, data, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        one(estimator, optimizer, x, y)
    drain(estimator, optimizer)
    assert_models_equal(fast, slow, f"lr_power = {power}")


def tiny(**settings):
    task = Task(model="mlp", model_args={"depth": 4, "width": 8}, data_args={"limit": 128})
    return RunConfig(task, Recipe(epochs=2, batch_size=32), DDG(**{"modules": 3, "cuts": (1, 2)} | settings))


def test_the_run_applies_a_modules_learning_rate():
    run = Run(tiny(lr_power=1.0), device="cpu")
    run.train_epoch()
    last = run.recipe.lr_at(3 / 4)
    rates = [group["lr"] / last for group in run.optimizer.param_groups]
    assert rates == pytest.approx([1 / 3, 1 / 2, 1.0]), f"rates over the recipe's: {rates}"


def test_shrinkage_is_the_hand_computed_chain():
    """y = w3 w2 w1 x: module k carries beta^(2-k), each gradient at the weights of its batch."""
    beta, lr = 0.5, 0.01
    model = nn.Sequential(*[nn.Linear(1, 1, bias=False) for _ in range(3)]).double()
    w = [1.0, 2.0, 0.5]
    for layer, value in zip(model, w, strict=True):
        layer.weight.data.fill_(value)
    estimator = bind(model, DDG(modules=3, shrink=beta), lambda y, _: y.square().sum() / 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    xs, seen = [1.0, 2.0, -1.0, 0.5, 1.5, -2.0], []
    for t, x in enumerate(xs):
        seen.append((list(w), x))
        batch = torch.tensor([[x]], dtype=torch.float64)
        one(estimator, optimizer, batch, batch)
        for k in range(3):
            delay = 2 - k
            if t >= delay:
                (a, b, c), past = seen[t - delay]
                y = a * b * c * past
                gradient = beta**delay * y * past * (b * c, a * c, a * b)[k]
                w[k] -= lr * gradient
        got = [layer.weight.item() for layer in model]
        assert got == pytest.approx(w, rel=1e-12), f"weights after step {t}: {got}, by hand {w}"


@pytest.mark.parametrize("mode", MODES)
def test_undelayed_epochs_are_backprop_and_the_rest_is_delayed(mode):
    data, later = batches(5), batches(6, seed=2)
    fast, slow = without_dropout(conv_net()), without_dropout(conv_net())
    estimator = bind(fast, DDG(modules=3, weights=mode, undelayed_epochs=2))
    backprop = Backprop().bind(slow, cross_entropy)
    ours, plain = plain_sgd(fast.parameters()), plain_sgd(slow.parameters())
    for epoch in range(2):
        assert estimator.start_epoch(epoch).kind == "undelayed"
        got = [one(estimator, ours, x, y) for x, y in data]
        want = [one(backprop, plain, x, y) for x, y in data]
        assert got == want, f"losses in epoch {epoch}: {got}, backprop's {want}"
    assert_models_equal(fast, slow, "undelayed epochs")

    assert estimator.start_epoch(2).kind == ""
    want, _ = twin.train(slow, later, cross_entropy, plain_sgd, 3, weights=mode)
    got = []
    for t, (x, y) in enumerate(later):
        got.append(one(estimator, ours, x, y))
        assert (fast.stem.weight.grad is not None) == (t >= 2), f"module 0 in step {t} of the delayed epoch"
    assert got == want, f"losses in the delayed epoch {got}, the twin's {want}"
    assert_models_equal(fast, slow, "delayed epoch")


@pytest.mark.parametrize("mode", MODES)
def test_accumulated_gradients_are_the_sum_over_micro_batches(mode):
    """Two backward calls per update: every call is an iteration of the definition, an update adds up two of them."""
    K, data = 3, batches(10)
    fast, slow = conv_net(), conv_net()
    record = {"stash": twin._Stash, "mixed": twin._Mixed, "replay": twin._Replay}[mode](
        modules := twin.split(slow, K), cross_entropy, 0
    )
    estimator = bind(fast, DDG(modules=K, weights=mode))
    ours, plain = sgd(fast.parameters()), sgd(slow.parameters())
    for t, (x, y) in enumerate(data):
        if t % 2 == 0:
            ours.zero_grad(set_to_none=True)
            plain.zero_grad(set_to_none=True)
        got, want = estimator.backward(x, y), record.forward(t, x, y)
        assert got == want, f"loss {got} of micro-batch {t}, by definition {want}"
        for k, module in enumerate(modules):
            past = t - (K - 1 - k)
            for p, grad in zip(module.parameters(), record.gradients(k, past) if past >= 0 else (), strict=past >= 0):
                p.grad = grad.clone() if p.grad is None else p.grad + grad
        if t % 2 == 1:
            ours.step()
            with torch.autograd._unsafe_preserve_version_counter(tuple(slow.parameters())):
                plain.step()
    assert_models_equal(fast, slow, f"accumulated, {mode}")


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("mode", ["stash", "replay"])
def test_bfloat16_autocast_equals_the_twin(mode, kind):
    fast, slow, data = conv_net(), conv_net(), batches(7)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        want, _ = twin.train(slow, data, cross_entropy, OPTIMIZERS[kind], 3, weights=mode, drain=True)
        estimator = bind(fast, DDG(modules=3, weights=mode, drain="end"))
        optimizer = OPTIMIZERS[kind](fast.parameters())
        got = [one(estimator, optimizer, x, y) for x, y in data]
        drain(estimator, optimizer)
    assert got == want, f"losses {got}, the twin's {want}"
    assert_models_equal(fast, slow, f"{mode} under autocast")
    assert not torch.equal(got[0], cross_entropy(without_dropout(conv_net())(data[0][0]), data[0][1])), "no autocast"


def test_the_cosine_is_one_while_the_weights_stand_still():
    model = linear_net()
    estimator = bind(model, DDG(modules=3, cosine_every=1), nn.functional.mse_loss)
    g = torch.Generator().manual_seed(0)
    for _ in range(4):
        model.zero_grad(set_to_none=True)
        x = torch.randn(5, 4, generator=g, dtype=torch.float64)
        estimator.backward(x, torch.ones_like(x))
    cosines = {k: v for k, v in estimator.metrics().items() if "cosine" in k}
    assert cosines == pytest.approx({"ddg/cosine_0": 1.0, "ddg/cosine_1": 1.0}, abs=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_the_cosine_equals_brute_force_and_changes_nothing(mode):
    K, every, data = 3, 2, batches(9)
    model, plain = conv_net(), conv_net()
    estimator = bind(model, DDG(modules=K, weights=mode, cosine_every=every))
    alone = bind(plain, DDG(modules=K, weights=mode))
    ours, others = adam(model.parameters()), adam(plain.parameters())
    want = {}
    for t, (x, y) in enumerate(data):
        before = copy.deepcopy(model)
        assert one(estimator, ours, x, y) == one(alone, others, x, y), f"measuring changed the loss of step {t}"
        for k, module in enumerate(twin.split(model, K)[:-1]):
            past = t - (K - 1 - k)
            if t % every == 0 and past >= 0:
                true = full_gradient(before, *data[past], K, past)[k]
                stale = torch.cat([p.grad.flatten() for p in module.parameters()])
                want[f"ddg/cosine_{k}"] = nn.functional.cosine_similarity(stale, true, dim=0).item()
        got = {name: value for name, value in estimator.metrics().items() if "cosine" in name}
        assert got == pytest.approx(want, abs=1e-6), f"after step {t}"
    assert len(want) == K - 1
    assert all(-1 <= value < 0.9999 for value in want.values()), f"{want}: the weights moved"
    assert_models_equal(model, plain, "with the cosine")


def full_gradient(model, x, y, K, step):
    """Of a batch at the model's present weights, with the masks of its step: one flat tensor per module."""
    modules = twin.split(model, K)
    model.zero_grad(set_to_none=True)
    with torch.random.fork_rng(devices=[]):
        for k, module in enumerate(modules):
            twin.seed_module(0, k, step)
            x = module(x)
    cross_entropy(x, y).backward()
    return [torch.cat([p.grad.flatten() for p in module.parameters()]) for module in modules]


@pytest.mark.parametrize("mode", MODES)
def test_named_devices_change_no_number(mode):
    """The executor for several devices, with the CPU as every one of them; a state moves between the executors."""
    data, stop = batches(9), 5
    settings = {"modules": 3, "weights": mode, "cuts": (1, 3), "drain": "end", "shrink": 0.5}
    placed, alone = DDG(devices=("cpu",) * 3, **settings), DDG(**settings)
    straight = conv_net()
    estimator, optimizer = bind(straight, alone), sgd(straight.parameters())
    want = [one(estimator, optimizer, x, y) for x, y in data]
    drain(estimator, optimizer)

    got, state = [], {}
    for method, items in ((placed, data[:stop]), (alone, data[stop:7]), (placed, data[7:])):
        model = conv_net(seed=9 if state else 0)
        estimator, optimizer = bind(model, method, seed=123 if state else 0), sgd(model.parameters())
        if state:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            estimator.load_state_dict(state["method"])
        got += [one(estimator, optimizer, x, y) for x, y in items]
        with estimator.whole() as whole:
            assert whole is model
            weights = whole.state_dict()
        state = saved({"model": weights, "optimizer": optimizer.state_dict(), "method": estimator.state_dict()})
    drain(estimator, optimizer)
    assert got == want, f"losses {got}, in place {want}"
    assert_models_equal(estimator.finalize(), straight, "on named devices")
    assert not any(module.queue for module in estimator.modules), "finalize left batches in flight"


def test_a_device_that_is_not_there_leaves_the_model_as_it_was():
    model = conv_net()
    with pytest.raises(ValueError, match=r"^DDG\.devices: there is no device 'cuda:64' here \(") as caught:
        DDG(modules=2, devices=("meta", "cuda:64")).bind(model, cross_entropy)
    assert "\n" not in str(caught.value)
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"cpu"}, "modules were moved before"


@pytest.mark.parametrize(
    "method", [DDG(modules=2, devices=("meta", "cpu")), HighwayBP(devices=("meta", "cpu"))], ids=str
)
def test_a_run_elsewhere_than_on_the_first_device_is_refused(method):
    """The whole model comes together there, and would be evaluated on data that are somewhere else."""
    config = replace(tiny(), method=LayerDropBack(inner=method))
    name = type(method).__name__
    with pytest.raises(
        ValueError, match=rf"^{name}\.devices: the first is meta, .* on cpu; name that one first, or give"
    ):
        Run(config, device="cpu")


@pytest.mark.parametrize("drained", ["never", "epoch"])
def test_a_run_on_named_devices_has_the_records_of_one_in_place(drained):
    ends = []
    for settings in ({}, {"devices": ("cpu",) * 3}):
        run = Run(tiny(drain=drained, **settings), device="cpu")
        epochs = [run.train_epoch(), run.train_epoch()]
        ends.append([(e.train_loss, e.val_accuracy, e.val_loss, e.test_accuracy, e.steps) for e in epochs])
    assert ends[0] == ends[1], f"in place {ends[0]}, on named devices {ends[1]}"


STABLE = {  # largest stable learning rate over the curvature, by K; K = 1 is 2 and 1.357
    0.0: {2: 1.0, 3: 0.618, 4: 0.445},
    0.9: {2: 0.253, 3: 0.0807, 4: 0.0463},
}


@pytest.mark.parametrize("momentum", STABLE)
@pytest.mark.parametrize("K", [2, 3, 4])
def test_the_stable_step_shrinks_with_the_number_of_modules(K, momentum):
    """With all other weights frozen at 1, the first follows 1/2 w^2 at delay K-1; Nesterov momentum."""
    x = torch.ones(1, 1, dtype=torch.float64)
    for factor, stable in ((0.93, True), (1.07, False)):
        model = nn.Sequential(*[nn.Linear(1, 1, bias=False) for _ in range(K)]).double()
        for layer in model:
            layer.weight.data.fill_(1)
            layer.weight.requires_grad_(layer is model[0])
        estimator = bind(model, DDG(modules=K), lambda y, _: y.square().sum() / 2)
        rate = STABLE[momentum][K] * factor
        optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=momentum, nesterov=momentum > 0)
        sizes = []
        for _ in range(250):
            one(estimator, optimizer, x, x)
            sizes.append(model[0].weight.abs().item())
        early, late = max(sizes[:100]), max(sizes[200:])
        assert (late < early) == stable, f"{factor} of the bound: |w| from {early:.3g} to {late:.3g}"
