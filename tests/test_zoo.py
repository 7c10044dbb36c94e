"""LayerDropBack and DecorrelatedBP, alone and combined, on timm models of every family."""

import copy
import warnings
from functools import lru_cache

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrize

from fastbp import DDG, Backprop, DecorrelatedBP, HighwayBP, LayerDropBack
from fastbp.layer_inputs import input_rows
from fastbp.units import head_parameters

timm = pytest.importorskip("timm")

from zoo_models import ZOO, zoo_batch, zoo_model  # noqa: E402 (needs timm)

pytestmark = pytest.mark.filterwarnings("ignore:DecorrelatedBP leaves")  # layers too wide for the zoo

UNITS = ("tensor", "layer", "block", "prefix")
DROPPING = 2  # an epoch in which LayerDropBack drops
LATE = [pytest.mark.slow, pytest.mark.long]
MODELS = [pytest.param(name, marks=[] if entry.ci else LATE) for name, entry in ZOO.items()]


def methods(name):
    """The three methods of a model; the unit of LayerDropBack goes round from model to model."""
    unit = UNITS[list(ZOO).index(name) % len(UNITS)]
    decorrelated = DecorrelatedBP(decor_lr=1e-5, sample_fraction=1.0, max_features=512)
    return {
        "ldb": LayerDropBack(unit=unit),
        "dbp": decorrelated,
        "both": LayerDropBack(unit=unit, inner=decorrelated),
    }


EACH = pytest.mark.parametrize("which", ["ldb", "dbp", "both"])
ALL = pytest.mark.parametrize("name", MODELS)


class Training:
    """Steps in a dropping epoch, with the random numbers of a step depending on its index alone."""

    def __init__(self, name, method, plan=None):
        self.name, self.model = name, zoo_model(name)
        self.parameters = dict(self.model.named_parameters())  # by the names of the plain model
        torch.manual_seed(5)
        self.estimator = method.bind(self.model, cross_entropy)
        self.plan = self.estimator.start_epoch(DROPPING) if plan is None else plan
        lr = 0.001 * self.plan.lr_scale
        self.optimizer = torch.optim.SGD(self.parameters.values(), lr, 0.9, weight_decay=1e-3, nesterov=True)
        self.losses = []

    def step(self):
        index = len(self.losses)
        x, y = zoo_batch(self.name, index, round(4 * self.plan.batch_scale))
        self.optimizer.zero_grad(set_to_none=True)
        torch.manual_seed(100 + index)
        self.losses.append(self.estimator.backward(x, y))
        self.optimizer.step()

    def run(self, steps):
        for _ in range(steps):
            self.step()
        return self


@lru_cache(maxsize=4)
def backprop(name, lr_scale, batch_scale):
    """Two steps of plain backprop by a plan: losses, parameters, buffers."""
    from fastbp import EpochPlan

    run = Training(name, Backprop(), EpochPlan(lr_scale, batch_scale)).run(2)
    return torch.stack(run.losses), dict(run.model.state_dict())


@ALL
@EACH
def test_the_exact_setting_is_backprop(name, which):
    run = Training(name, methods(name)[which].exact(zoo_model(name))).run(2)
    losses, want = backprop(name, run.plan.lr_scale, run.plan.batch_scale)
    torch.testing.assert_close(torch.stack(run.losses), losses, rtol=1e-6, atol=0)
    state = dict(run.estimator.finalize().state_dict())
    worst = {key: relative(state[key], value) for key, value in want.items()}
    far = {key: value for key, value in worst.items() if value > 1e-6}
    assert not far, f"{name}, {which}: not backprop's after two steps, relative distance {far}"


@ALL
@EACH
def test_three_steps_train_and_finalize_leaves_the_plain_model(name, which):
    before = zoo_model(name)
    run = Training(name, methods(name)[which])
    start = {key: p.detach().clone() for key, p in run.parameters.items()}
    head = head_parameters(run.model)
    steps = [gradients_of(run) for _ in range(3)]
    losses = torch.stack(run.losses)
    assert losses.isfinite().all(), f"{name}, {which}: losses {losses.tolist()}"

    skipped = {key for key, p in run.parameters.items() if all(step[key] is None for step in steps)}
    moved = {key for key, p in run.parameters.items() if not torch.equal(p, start[key])}
    assert not skipped & moved, f"{name}, {which}: moved without a gradient: {skipped & moved}"
    still = {key for key in start if key not in moved and any((step[key] or 0) > 1e-6 for step in steps)}
    assert not still, f"{name}, {which}: had a gradient, but did not move: {still}"
    for key, p in run.parameters.items():
        if id(p) in head:
            assert all(step[key] is not None for step in steps), f"{name}, {which}: {key} of the head was dropped"
    if which != "dbp":
        trained = {key for key, p in zoo_model(name).named_parameters() if p.requires_grad}
        dropped = sum(step[key] is None for step in steps for key in trained)
        assert 0 < dropped < 3 * len(trained), f"{name}, {which}: dropped {dropped} of {3 * len(trained)}"
    if which != "ldb":
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            rms = run.estimator.metrics()["dbp/rms_D_mean"]
        assert rms > 0, f"{name}, {which}: R stayed the identity"
        silent = [str(w.message) for w in caught if "never called as modules" in str(w.message)]
        assert bool(silent) == ZOO[name].reads, f"{name}, {which}: {[str(w.message) for w in caught]}"

    run.model.eval()
    x, _ = zoo_batch(name, 9, 2)
    with torch.no_grad():
        expected = run.model(x)
        plain = run.estimator.finalize()
        assert plain is run.model
        torch.testing.assert_close(plain(x), expected, rtol=1e-4, atol=1e-5)
    assert_plain(plain, before)
    before.load_state_dict(plain.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(before.eval()(x), plain(x), rtol=0, atol=0)


@ALL
def test_rows_are_what_the_weight_of_a_bound_layer_multiplies(name):
    """Of every layer that the model calls: weight times rows is its output, in the order of the positions."""
    run = Training(name, methods(name)["dbp"])
    checked = 0

    def check(layer, args, out):
        nonlocal checked
        checked += 1
        rows = input_rows(layer, args[0])
        if "Std" in type(layer).__name__:  # it multiplies by a standardised weight: the number of rows tells
            assert rows.shape[1] == out[:, 0].numel(), f"{layer}: {rows.shape[1]} rows for {tuple(out.shape)}"
            return
        got = rows @ layer.weight.reshape(len(rows), -1, rows.shape[-1]).mT  # (G, n, outputs of a group)
        want = out.flatten(0, -2) if isinstance(layer, nn.Linear) else out.movedim(1, -1).flatten(0, -2)
        want = want if layer.bias is None else want - layer.bias
        torch.testing.assert_close(got.transpose(0, 1).flatten(1), want, rtol=1e-3, atol=1e-4, msg=str(layer))

    bound = [m for m in run.model.modules() if isinstance(m, nn.Linear | nn.Conv2d) and parametrize.is_parametrized(m)]
    for layer in bound:
        layer.register_forward_hook(check)
    with torch.no_grad():
        run.model(zoo_batch(name, 0, 4)[0])
    assert checked >= len(bound) // 2 > 0, f"{name}: {checked} of {len(bound)} layers were called"


def gradients_of(run):
    """A step's gradient by parameter: its largest entry, or None where it got none."""
    run.step()
    return {key: None if p.grad is None else p.grad.abs().max().item() for key, p in run.parameters.items()}


def assert_plain(model, before):
    assert list(model.state_dict()) == list(before.state_dict()), "other keys, or another order"
    names = [key for key, _ in before.named_parameters()]
    assert [key for key, _ in model.named_parameters()] == names, "parameters in another order"
    assert [type(m) for m in model.modules()] == [type(m) for m in before.modules()], "other classes"
    assert not any(parametrize.is_parametrized(m) for m in model.modules()), "a parametrization is left"
    assert hooks(model) == hooks(before), "a hook is left"
    flags = [p.requires_grad for p in before.parameters()]
    assert [p.requires_grad for p in model.parameters()] == flags, "requires_grad differs"


def hooks(model):
    """How many hooks of each kind every module and parameter has."""
    kinds = [kind for kind in vars(nn.Module()) if kind.endswith("_hooks")]
    found = {(key, kind): len(getattr(m, kind)) for key, m in model.named_modules() for kind in kinds}
    for key, p in model.named_parameters():
        for kind in ("_backward_hooks", "_post_accumulate_grad_hooks"):
            found[key, kind] = len(getattr(p, kind, None) or ())
    return {key: count for key, count in found.items() if count}


def relative(a, b):
    """The largest distance of two tensors over the largest entry of the second."""
    if not b.is_floating_point():
        return 0.0 if torch.equal(a, b) else float("inf")
    return ((a - b).abs().max() / b.abs().max().clamp_min(1e-30)).item() if b.numel() else 0.0


def test_the_zoo_has_25_families_and_ci_ten():
    families = {timm.model_entrypoint(name.partition(" ")[0]).__module__ for name, e in ZOO.items() if e.make is None}
    assert len(families) >= 25, sorted(families)
    assert sum(entry.ci for entry in ZOO.values()) >= 10


REFUSED = {
    ("swinv2_tiny_window8_256", HighwayBP()): "cannot see into a timm.models.swin_transformer_v2.SwinTransformerV2: "
    "pass a fastbp.Chain",
    ("densenet121", LayerDropBack(inner=DDG())): "cannot see into a timm.models.densenet.DenseNet: pass a fastbp.Chain",
    ("test_vit", DDG()): "dynamic_img_size is on; make it with dynamic_img_size=False",
    ("test_resnet", DecorrelatedBP(max_features=1)): "raise max_features or use another model",
    ("test_resnet", DecorrelatedBP(inner=DecorrelatedBP())): "the weights already are W R",
}


@pytest.mark.parametrize(("name", "method"), REFUSED, ids=lambda value: str(value)[:60])
def test_a_refusal_says_why_and_leaves_the_model_alone(name, method):
    model, before = zoo_model(name), zoo_model(name)
    with pytest.raises(TypeError, match=REFUSED[name, method]) as refusal:
        method.bind(model, cross_entropy)
    assert len(str(refusal.value).splitlines()) == 1, refusal.value
    assert_plain(model, before)


def test_a_model_without_a_body_has_nothing_to_drop():
    model = copy.deepcopy(zoo_model("test_resnet").get_classifier())
    with pytest.raises(ValueError, match="nothing to drop outside its head"):
        LayerDropBack().bind(model, cross_entropy)
