"""The protocol: methods are values that nest, travel as dictionaries, and anyone can write one more."""

import json
import pickle
from dataclasses import FrozenInstanceError, dataclass, replace
from typing import Annotated

import pytest
import torch
from torch import nn

from fastbp import (
    DDG,
    METHODS,
    Backprop,
    DecorrelatedBP,
    EpochPlan,
    HighwayBP,
    LayerDropBack,
    Method,
    WrappingEstimator,
    ablations,
    method_from_dict,
    nest,
    parts,
)
from fastbp.knobs import LogUniform, search_space
from fastbp.method import method_class


@dataclass(frozen=True)
class SignGrad(Method):
    """Somebody else's method, in one file: the gradient, drawn towards its sign."""

    amount: Annotated[float, LogUniform(1e-3, 1e-1)] = 0.01
    inner: Method = Backprop()

    def bind(self, model, loss_fn):
        return _SignGrad(self, self.inner.bind(model, loss_fn))

    def exact(self, model):
        return (inner := self.inner.exact(model)) and replace(self, amount=0.0, inner=inner)


class _SignGrad(WrappingEstimator):
    def backward(self, x, y):
        loss = super().backward(x, y)
        for p in self.model.parameters():
            if p.grad is not None:
                p.grad.lerp_(p.grad.sign(), self.method.amount)
        return loss


@dataclass(frozen=True)
class Stubborn(Method):
    """A leaf without an exact setting."""

    def bind(self, model, loss_fn):
        return Backprop().bind(model, loss_fn)

    def exact(self, model):
        return None


VALUES = [
    Backprop(),
    DDG(modules=3, weights="replay", drain="epoch"),
    HighwayBP(iterations=2, gamma=0.1),
    LayerDropBack(drop_rate=0.25, unit="tensor", seed=3),
    DecorrelatedBP(decor_lr=1e-3, inner=LayerDropBack(inner=HighwayBP(iterations=2))),
    SignGrad(amount=0.1, inner=LayerDropBack(mask=False)),
]


@pytest.mark.parametrize("method", VALUES, ids=lambda m: type(m).__name__)
def test_a_method_is_a_value(method):
    data = json.loads(json.dumps(method.to_dict()))
    again = method_from_dict(data)
    assert again == method, f"through JSON: {again}"
    assert hash(again) == hash(method), "equal methods hash differently"
    assert type(method).from_dict(data) == method
    assert pickle.loads(pickle.dumps(method)) == method, "through pickle"
    assert eval(repr(method)) == method, f"repr is {method!r}"
    assert method_class(method.name) is type(method), f"name {method.name!r}"
    with pytest.raises(FrozenInstanceError):
        method.inner = None


def test_names():
    assert {name: kind().name for name, kind in METHODS.items()} == {name: name for name in METHODS}
    assert list(METHODS) == ["bp", "ldb", "dbp", "highway", "ddg"]
    assert SignGrad().name == "test_method:SignGrad"


def test_from_dict_fills_defaults_and_short_inner():
    assert method_from_dict({"method": "ldb"}) == LayerDropBack()
    assert method_from_dict({"method": "dbp", "inner": "highway"}) == DecorrelatedBP(inner=HighwayBP())
    nested = {"method": "ldb", "drop_rate": 0.2, "inner": {"method": "ddg", "modules": 4}}
    assert method_from_dict(nested) == LayerDropBack(drop_rate=0.2, inner=DDG(modules=4))
    assert nested["inner"] == {"method": "ddg", "modules": 4}, "the caller's dictionary was changed"


KNOWN = "bp, ldb, dbp, highway, ddg"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"method": "lbd"}, f"no method 'lbd'; did you mean ldb?; known: {KNOWN}, or package.module:Class"),
        ({}, f"method: expected a name, got None; one of {KNOWN}, or package.module:Class"),
        ({"method": "ldb", "droprate": 0.1}, "LayerDropBack has no field 'droprate'; did you mean drop_rate?"),
        ({"method": "ldb", "inner": {"method": "ddg", "k": 1}}, "DDG has no field 'k'"),
        ({"method": "ddg", "weights": "old"}, "DDG.weights = 'old': must be one of stash, mixed, replay"),
        (
            {"method": "no_such_module:Thing"},
            "method 'no_such_module:Thing' cannot be imported: No module named 'no_such_module'",
        ),
        (
            {"method": "fastbp.nets:mlp"},
            "'fastbp.nets:mlp' is not a frozen dataclass derived from fastbp.Method",
        ),
    ],
)
def test_from_dict_refuses(data, message):
    with pytest.raises(ValueError, match=r".") as caught:
        method_from_dict(data)
    assert str(caught.value) == message


def test_wrong_class_and_wrong_inner():
    with pytest.raises(TypeError, match=r"^'ddg' is a DDG, not a HighwayBP$"):
        HighwayBP.from_dict(DDG().to_dict())
    for inner in ("bp", Backprop, None):
        with pytest.raises(TypeError, match=r"^LayerDropBack\.inner = .*: expected a method, such as Backprop\(\)$"):
            LayerDropBack(inner=inner)


def test_parts_and_nest_are_inverse():
    whole = DecorrelatedBP(kappa=0.1, inner=LayerDropBack(drop_rate=0.2, inner=HighwayBP(iterations=2)))
    assert [type(p) for p in parts(whole)] == [DecorrelatedBP, LayerDropBack, HighwayBP]
    assert parts(Backprop()) == []
    assert nest([]) == Backprop()
    for method in VALUES:
        assert nest(parts(method)) == method, f"nest(parts) of {method} is {nest(parts(method))}"
    assert nest([LayerDropBack(inner=DDG())]) == LayerDropBack(), "an old inner method survives nest"
    with pytest.raises(TypeError, match=r"^HighwayBP is a leaf: it cannot wrap LayerDropBack$"):
        nest([HighwayBP(), LayerDropBack()])


def test_ablations():
    whole = DecorrelatedBP(inner=LayerDropBack(inner=DDG()))
    got = ablations(whole)
    assert got == [
        whole,
        DecorrelatedBP(inner=LayerDropBack()),
        DecorrelatedBP(inner=DDG()),
        DecorrelatedBP(),
        LayerDropBack(inner=DDG()),
        LayerDropBack(),
        DDG(),
        Backprop(),
    ]
    assert ablations(Backprop()) == [Backprop()]


def test_plans_multiply():
    plan = EpochPlan(2.0, 0.5) * EpochPlan(3.0, 4.0)
    assert plan == EpochPlan(6.0, 2.0), f"product {plan}"
    kinds = [(EpochPlan(kind=a) * EpochPlan(kind=b)).kind for a in ("", "a") for b in ("", "b")]
    assert kinds == ["", "b", "a", "a+b"], f"kinds {kinds}"
    method = SignGrad(inner=LayerDropBack(drop_rate=0.75, batch_scale=2.0))
    estimator = method.bind(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)), nn.functional.cross_entropy)
    plans = [(plan.lr_scale, plan.batch_scale) for plan in map(estimator.start_epoch, range(3))]
    assert plans == [(1.0, 1.0), (1.0, 1.0), (4.0, 2.0)], f"plans {plans}"


def test_exact_settings():
    from fastbp.nets import mlp

    model = mlp((4,), 2, depth=3, width=4)
    assert Backprop().exact(model) == Backprop()
    assert LayerDropBack(inner=DDG()).exact(model) == LayerDropBack(mask=False, inner=DDG(modules=1))
    assert DecorrelatedBP(inner=HighwayBP()).exact(model) == DecorrelatedBP(decor_lr=0.0, inner=HighwayBP(iterations=3))
    for wrapper in (LayerDropBack, DecorrelatedBP, SignGrad):
        assert wrapper(inner=Stubborn()).exact(model) is None, f"{wrapper.__name__} hides that its inner has none"


def small(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double()


def test_a_third_party_method_trains_nests_and_is_searchable():
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.tensor([0, 1, 1, 0, 1, 0])
    ours, plain = small(), small()
    SignGrad(amount=0.5).bind(ours, nn.functional.cross_entropy).backward(x, y)
    loss = Backprop().bind(plain, nn.functional.cross_entropy).backward(x, y)
    assert not loss.requires_grad, "the returned loss holds the graph"
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, 0.5 * b.grad + 0.5 * b.grad.sign())
    model = small()
    estimator = DecorrelatedBP(inner=SignGrad(inner=LayerDropBack(every_epochs=1))).bind(
        model, nn.functional.cross_entropy
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for epoch in range(20):
        estimator.start_epoch(epoch)
        optimizer.zero_grad()
        losses.append(estimator.backward(x, y).item())
        optimizer.step()
    assert losses[-1] < losses[0], f"losses {losses}"
    assert list(search_space(SignGrad())) == ["amount"]
    state = estimator.state_dict()
    assert set(state["inner"]) == {"inner"}, f"state nests under inner: {state}"
    estimator.load_state_dict(state)
    assert estimator.metrics().keys() >= {"ldb/dropping", "dbp/rms_D_mean"}
    assert estimator.finalize() is model
    assert [type(m) for m in model] == [nn.Linear, nn.Tanh, nn.Linear], "a trace is left in the model"


def test_a_stateless_estimator_refuses_foreign_state():
    estimator = Backprop().bind(small(), nn.functional.cross_entropy)
    estimator.load_state_dict({})
    assert list(estimator.drain(final=True)) == []
    with pytest.raises(ValueError, match=r"^_Backprop keeps no state, but was given \['step'\]$"):
        estimator.load_state_dict({"step": 1})
