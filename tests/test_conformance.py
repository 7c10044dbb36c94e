"""Every method and every supported combination keeps the protocol; refused pairs say why."""

import itertools

import pytest
import torch
from torch import nn

from fastbp import DDG, METHODS, Backprop, DecorrelatedBP, HighwayBP, LayerDropBack, nest
from fastbp.testing import check_method

LEAVES = [
    Backprop(),
    HighwayBP(iterations=2),
    HighwayBP(iterations=1, gamma=0.2),
    DDG(modules=3),
    DDG(modules=3, weights="mixed"),
    DDG(modules=2, weights="replay", drain="epoch"),
    DDG(modules=4, drain="end"),
    DDG(modules=2, cosine_every=1),
]
WRAPPERS = [
    LayerDropBack(),
    LayerDropBack(unit="tensor", lr_policy="double", batch_scale=1.0),
    LayerDropBack(unit="block"),
    LayerDropBack(unit="prefix"),
    LayerDropBack(unit="block", pool=2),
    DecorrelatedBP(decor_lr=1e-2, kappa=0.3),
    DecorrelatedBP(decor_lr=1e-2, sample_fraction=1.0, interval=3),
]
PAIRS = [
    nest(pair)
    for pair in itertools.product([LayerDropBack(), DecorrelatedBP(decor_lr=1e-2)], LEAVES[1:])
    if not (isinstance(pair[0], DecorrelatedBP) and isinstance(pair[1], DDG) and pair[1].weights == "mixed")
]
COMBINED = [
    *PAIRS,
    nest([LayerDropBack(), DecorrelatedBP(decor_lr=1e-2)]),
    nest([DecorrelatedBP(decor_lr=1e-2), LayerDropBack()]),
    nest([DecorrelatedBP(decor_lr=1e-2), LayerDropBack(), HighwayBP(iterations=2)]),
    nest([LayerDropBack(), DecorrelatedBP(decor_lr=1e-2), DDG(modules=3)]),
]


@pytest.mark.parametrize("method", [*LEAVES, *WRAPPERS, *COMBINED], ids=str)
def test_method_conforms(method):
    assert len(check_method(method)) == 8


def test_adamw_conforms():
    for method in (LayerDropBack(), DecorrelatedBP(decor_lr=1e-2), HighwayBP(iterations=2), DDG(modules=3)):
        check_method(method, recipe=lambda parameters: torch.optim.AdamW(parameters, lr=3e-3))


REFUSED = {
    LayerDropBack(inner=LayerDropBack()): "two masks are one mask",
    LayerDropBack(inner=DecorrelatedBP(inner=LayerDropBack())): "two masks are one mask",
    LayerDropBack(unit="prefix", inner=DDG(modules=2)): "use another unit",
    DecorrelatedBP(inner=DecorrelatedBP()): "the weights already are W R",
    DecorrelatedBP(inner=DDG(modules=2, weights="mixed")): "use weights='stash' or 'replay'",
    DecorrelatedBP(inner=LayerDropBack(inner=DDG(modules=2, weights="mixed"))): "use weights='stash' or 'replay'",
}


@pytest.mark.parametrize("method", REFUSED, ids=str)
def test_refused_pair_says_why(method):
    from fastbp.testing import small_net

    model = small_net()
    keys = list(model.state_dict())
    with pytest.raises(TypeError, match=REFUSED[method]):
        method.bind(model, nn.functional.cross_entropy)
    assert list(model.state_dict()) == keys, "a refused bind changed the model"


def test_a_frozen_head_is_refused():
    from fastbp.testing import small_net

    model = small_net()
    for parameter in model.head.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="leave the head trainable"):
        LayerDropBack().bind(model, nn.functional.cross_entropy)


def test_every_ordered_pair_is_supported_or_refused():
    """The compatibility table: wrappers on anything; leaves on nothing."""
    for outer, inner in itertools.product(METHODS.values(), repeat=2):
        if outer in (LayerDropBack, DecorrelatedBP):
            combined = outer(inner=inner())
            supported = outer is not inner
            try:
                from fastbp.testing import small_net

                combined.bind(small_net(), nn.functional.cross_entropy)
                assert supported, f"{combined} was bound, but should be refused"
            except TypeError:
                assert not supported, f"{combined} was refused, but should be supported"
        else:
            with pytest.raises(TypeError, match="inner"):
                outer(inner=inner())


CARD = ("Idea", "Exact when", "Needs", "Cost", "Departs", "Not for", "Reference")


@pytest.mark.parametrize("name", METHODS)
def test_card_has_the_fixed_headings(name):
    import importlib

    card = importlib.import_module(METHODS[name].__module__).__doc__
    positions = [card.find(f"\n{heading} ") for heading in CARD]
    assert all(p > 0 for p in positions), f"{name}: a heading of {CARD} is missing"
    assert positions == sorted(positions), f"{name}: headings are out of order"
