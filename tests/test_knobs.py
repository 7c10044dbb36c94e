"""Knobs: read from the fields, written back by dotted name, and refused in one exact sentence."""

from dataclasses import dataclass, replace
from typing import Annotated

import pytest

from fastbp import DDG, Backprop, DecorrelatedBP, HighwayBP, LayerDropBack
from fastbp.knobs import (
    Choice,
    IntRange,
    LogUniform,
    Uniform,
    coerce_fields,
    domains,
    nearest,
    require,
    search_space,
    set_knobs,
)
from fastbp.recipe import Recipe


@dataclass(frozen=True)
class Plain:
    rate: Annotated[float, LogUniform(1e-3, 1.0)] = 0.1
    count: Annotated[int, "a note", IntRange(1, 8)] = 2
    name: Annotated[str, "only a note"] = "a"
    on: bool = True

    def __post_init__(self):
        coerce_fields(self)
        require(self, "count", self.count > 0, "must be positive")


def test_domains_are_the_annotated_fields_in_order():
    assert domains(Plain) == {"rate": LogUniform(1e-3, 1.0), "count": IntRange(1, 8)}
    assert list(domains(Plain)) == ["rate", "count"]


def test_search_space_goes_through_inner_with_dotted_names():
    method = DecorrelatedBP(inner=LayerDropBack(inner=HighwayBP()))
    space = search_space(method)
    assert list(space) == [
        *("decor_lr", "kappa", "sample_fraction", "interval"),
        *("inner.drop_rate", "inner.every_epochs", "inner.unit", "inner.lr_policy", "inner.batch_scale"),
        *(f"inner.inner.{name}" for name in ("iterations", "gamma", "growing_epochs", "gamma_epochs")),
        *(f"inner.inner.{name}" for name in ("tolerance", "combination", "lstm_state")),
    ]
    assert space["inner.drop_rate"] == Uniform(0.1, 0.9)
    assert space["inner.inner.iterations"] == IntRange(0, 8)
    assert search_space(Backprop()) == {}


@pytest.mark.parametrize("value", [DDG(), HighwayBP(), LayerDropBack(), DecorrelatedBP(inner=DDG()), Recipe()])
def test_every_domain_is_legal_and_every_knob_settable(value):
    """The ends of every range construct: a search never draws what the class refuses."""
    for name, domain in search_space(value).items():
        ends = domain.values if isinstance(domain, Choice) else (domain.low, domain.high)
        for end in ends:
            changed = set_knobs(value, {name: end})
            for part in name.split("."):
                changed = getattr(changed, part)
            assert changed == end, f"{name} set to {end!r} reads {changed!r}"


def test_set_knobs_copies_and_reaches_inside():
    method = LayerDropBack(inner=DDG(modules=2))
    changed = set_knobs(method, {"drop_rate": 0.25, "inner.modules": 4})
    assert changed == LayerDropBack(drop_rate=0.25, inner=DDG(modules=4))
    assert method == LayerDropBack(inner=DDG(modules=2)), "the original changed"
    swapped = set_knobs(method, {"inner": HighwayBP(), "inner.iterations": 1})
    assert swapped == LayerDropBack(inner=HighwayBP(iterations=1)), f"inner replaced, then set: {swapped}"
    assert set_knobs(method, {}) == method


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"drop_rat": 0.1}, "LayerDropBack has no field 'drop_rat'; did you mean drop_rate?"),
        ({"inner.module": 3}, "DDG has no field 'module'; did you mean modules?"),
        ({"xyz": 0}, "LayerDropBack has no field 'xyz'"),
        ({"drop_rate": 1.0}, "LayerDropBack.drop_rate = 1.0: must be in [0, 1): at 1 nothing would learn"),
    ],
)
def test_set_knobs_refuses(settings, message):
    with pytest.raises(ValueError, match=r"^(LayerDropBack|DDG)") as caught:
        set_knobs(LayerDropBack(inner=DDG()), settings)
    assert str(caught.value) == message


def test_whole_numbers_become_float_where_asked():
    value = Plain(rate=1)
    assert type(value.rate) is float, f"rate is {value.rate!r}"
    assert value == Plain(rate=1.0)
    assert hash(value) == hash(Plain(rate=1.0))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"rate": "0.1"}, TypeError, "Plain.rate = '0.1': expected a number"),
        ({"rate": True}, TypeError, "Plain.rate = True: expected a number"),
        ({"rate": None}, TypeError, "Plain.rate = None: expected a number"),
        ({"rate": float("nan")}, ValueError, "Plain.rate = nan: must be finite"),
        ({"rate": float("inf")}, ValueError, "Plain.rate = inf: must be finite"),
        ({"count": 2.0}, TypeError, "Plain.count = 2.0: expected a whole number"),
        ({"count": False}, TypeError, "Plain.count = False: expected a whole number"),
        ({"count": 0}, ValueError, "Plain.count = 0: must be positive"),
        ({"on": 1}, TypeError, "Plain.on = 1: expected true or false"),
        ({"name": 3}, TypeError, "Plain.name = 3: expected a string"),
    ],
)
def test_wrong_values_are_named_in_one_sentence(settings, error, message):
    with pytest.raises(error) as caught:
        replace(Plain(), **settings)
    assert str(caught.value) == message


def test_nearest():
    assert nearest("drop_rat", ["drop_rate", "seed"]) == "; did you mean drop_rate?"
    assert nearest("zzz", ["drop_rate"]) == ""
    assert nearest(7, ["7a"]) == "; did you mean 7a?"
