"""Measuring the cosine between stale and true gradient changes nothing, alone or inside other methods."""

import dataclasses
import io
import math

import pytest
import torch
from torch import nn

from fastbp import DDG, DecorrelatedBP, LayerDropBack, nest
from fastbp.method import parts
from test_ddg import assert_models_equal, batches, bind, conv_net, cross_entropy, one, sgd

MEASURED = DDG(modules=3, cosine_every=1)
ALL = [
    MEASURED,
    LayerDropBack(inner=MEASURED),
    LayerDropBack(unit="tensor", inner=MEASURED),
    DecorrelatedBP(decor_lr=1e-2, sample_fraction=1.0, inner=MEASURED),
    DecorrelatedBP(decor_lr=1e-2, inner=LayerDropBack(inner=dataclasses.replace(MEASURED, weights="replay"))),
]


def silent(method):
    """The same combination without the measurement."""
    return nest(dataclasses.replace(p, cosine_every=0) if isinstance(p, DDG) else p for p in parts(method))


def start(method):
    model = conv_net()
    estimator = bind(model, method)
    estimator.start_epoch(2)
    return model, estimator, sgd(model.parameters())


@pytest.mark.parametrize("method", ALL, ids=str)
def test_measuring_changes_no_weight(method):
    ours, others = start(method), start(silent(method))
    for t, (x, y) in enumerate(batches(8)):
        assert one(*ours[1:], x, y) == one(*others[1:], x, y), f"measuring changed the loss of step {t}"
    assert_models_equal(ours[0], others[0], "with the cosine")
    cosines = {k: v for k, v in ours[1].metrics().items() if "cosine" in k}
    assert list(cosines) == ["ddg/cosine_0", "ddg/cosine_1"]
    assert all(math.isfinite(v) and 0 < abs(v) <= 1.0001 for v in cosines.values()), cosines


@pytest.mark.parametrize("method", ALL[:4], ids=str)
def test_a_resumed_run_measures_the_same(method):
    """Measured in steps 4 and 6: after step 5 the state's cosines are reported, then its batches measured."""
    stop, data = 5, batches(7)
    method = nest(dataclasses.replace(p, cosine_every=2) if isinstance(p, DDG) else p for p in parts(method))
    model, estimator, optimizer = start(method)
    want, state = [], io.BytesIO()
    for t, (x, y) in enumerate(data):
        if t == stop:
            torch.save([model.state_dict(), estimator.state_dict(), optimizer.state_dict()], state)
        one(estimator, optimizer, x, y)
        want.append(estimator.metrics())
    again, resumed, its_optimizer = start(method)
    for thing, saved in zip((again, resumed, its_optimizer), torch.load(io.BytesIO(state.getvalue())), strict=True):
        thing.load_state_dict(saved)
    for t, (x, y) in enumerate(data[stop:], stop):
        one(resumed, its_optimizer, x, y)
        assert resumed.metrics() == want[t], f"after step {t}"
    assert_models_equal(again, model, "resumed")


def test_a_state_without_labels_is_not_measured_until_its_batches_are_done():
    model, estimator, optimizer = start(MEASURED)
    for x, y in (data := batches(6))[:3]:
        one(estimator, optimizer, x, y)
    state = {k: v for k, v in estimator.state_dict().items() if k not in ("labels", "cosines")}
    again, resumed, its_optimizer = start(MEASURED)
    again.load_state_dict(model.state_dict())
    resumed.load_state_dict(state)
    seen = []
    for x, y in data[3:]:
        one(resumed, its_optimizer, x, y)
        seen.append([k for k in resumed.metrics() if "cosine" in k])
    assert seen == [[], ["ddg/cosine_1"], ["ddg/cosine_0", "ddg/cosine_1"]]


def test_modules_without_a_gradient_have_no_cosine():
    """The stem frozen, a block without parameters, a bias frozen in the next: only module 2 of 0, 1, 2 has a cosine."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 3))
    for parameter in (*model[0].parameters(), model[2].bias):
        parameter.requires_grad_(False)
    estimator = bind(model, DDG(modules=4, cosine_every=1))
    x, y = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    for _ in range(5):
        one(estimator, sgd(model.parameters()), x, y)
    assert [k for k in estimator.metrics() if "cosine" in k] == ["ddg/cosine_2"]


def test_all_dropped_is_no_cosine():
    model, estimator, optimizer = start(LayerDropBack(drop_rate=0.95, unit="tensor", inner=DDG(cosine_every=1)))
    before = []
    for x, y in batches(10):
        one(estimator, optimizer, x, y)
        before.append(any(p.grad is not None for p in estimator.units[0].parameters))
    assert not all(before), "nothing was dropped"
    assert cross_entropy(model(x), y).isfinite()
