"""The head of LayerDropBack: which layers always learn, by rule and by name."""

import pytest
import torch
from torch import nn

from fastbp import LayerDropBack, method_from_dict
from fastbp.nets import resnet_tiny
from fastbp.units import droppable_units, head_parameters
from test_layerdropback import cross_entropy, dropping

timm = pytest.importorskip("timm")


def head_of(model, names=()):
    head = head_parameters(model, names)
    return [name for name, p in model.named_parameters() if id(p) in head]


class _Heads(nn.Module):
    """Two outputs: as a ModuleList, or as a ModuleDict of small nets."""

    def __init__(self, kind):
        super().__init__()
        if kind is nn.ModuleList:
            self.heads = nn.ModuleList([nn.Linear(4, 2), nn.Linear(4, 3)])
        else:
            nets = {name: nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)) for name in "ab"}
            self.heads = nn.ModuleDict(nets)
        self.body = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))

    def forward(self, x):
        x = self.body(x)
        heads = self.heads.values() if isinstance(self.heads, nn.ModuleDict) else self.heads
        return torch.cat([head(x) for head in heads], dim=1)


class _InputCalledFc(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.body, self.relu, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)

    def forward(self, x):
        return self.out(self.relu(self.body(self.fc(x))))


def always_learns(model, method, steps=25):
    """The parameters that every one of these steps gave a gradient."""
    estimator = dropping(model, method)
    got = {name for name, _ in model.named_parameters()}
    for _ in range(steps):
        model.zero_grad()
        estimator.backward(torch.randn(3, 4), torch.tensor([0, 1, 2]))
        got &= {name for name, p in model.named_parameters() if p.grad is not None}
    return sorted(got)


def test_every_member_of_a_list_of_heads_is_a_head():  # I12
    pair = [f"heads.{i}.{name}" for i in range(2) for name in ("weight", "bias")]
    assert head_of(_Heads(nn.ModuleList)) == pair
    assert always_learns(_Heads(nn.ModuleList), LayerDropBack(drop_rate=0.8)) == sorted(pair)
    last = [f"heads.{key}.2.{name}" for key in "ab" for name in ("weight", "bias")]
    assert head_of(_Heads(nn.ModuleDict)) == last, "of each its last layer"


def test_an_input_layer_called_fc_is_no_head():
    assert head_of(_InputCalledFc()) == ["out.weight", "out.bias"]
    assert always_learns(_InputCalledFc(), LayerDropBack(drop_rate=0.8)) == ["out.bias", "out.weight"]


def test_both_classifiers_of_repvit_are_the_head():
    """One module has both; `pretrained_cfg` alone names them."""
    model = timm.create_model("repvit_m0_9", num_classes=5)
    both = [f"head.{part}.l.{name}" for part in ("head", "head_dist") for name in ("weight", "bias")]
    assert head_of(model) == both
    names = {unit.name for unit in droppable_units(model, "layer")}
    assert {"head.head.bn", "head.head_dist.bn"} <= names, "norms before them are units like any other"
    without = head_of(timm.create_model("repvit_m0_9", num_classes=0))
    assert without, "a model without a classifier has a last layer"
    assert all(name.startswith("stages.") for name in without), without


def test_the_head_of_a_chain_wins_over_its_children():
    model = resnet_tiny((1, 8, 8), 3, blocks=2, width=4)
    assert {name.split(".")[0] for name in head_of(model)} == {"head"}


@pytest.mark.parametrize("unit", ["tensor", "layer", "block", "prefix"])
def test_named_submodules_always_learn_and_nothing_else(unit):
    method = LayerDropBack(drop_rate=0.8, unit=unit, head=("fc", "body"))
    want = ["body.bias", "body.weight", "fc.bias", "fc.weight"]
    assert sorted(head_of(_InputCalledFc(), method.head)) == want
    rest = always_learns(_InputCalledFc(), method, steps=60)
    assert rest == want, f"{unit}: {rest} always learnt"


def test_a_named_container_is_the_head_with_all_in_it_also_compiled():
    model = _Heads(nn.ModuleDict)
    all_of_b = ["heads.b.0.weight", "heads.b.0.bias", "heads.b.2.weight", "heads.b.2.bias"]
    assert head_of(model, ("heads.b",)) == all_of_b
    head = head_parameters(model, ("heads.b.2", "body"))
    model.body = torch.compile(model.body)
    model.heads["b"] = torch.compile(model.heads["b"])
    assert head_parameters(model, ("heads.b.2", "body")) == head, "compiling changed what a name means"
    assert head_parameters(torch.compile(model), ("heads.b.2", "body")) == head


def test_the_setting_travels():
    method = LayerDropBack(head=["fc", "out"])
    assert method.head == ("fc", "out")
    assert method.to_dict()["head"] == ["fc", "out"]
    assert method_from_dict(method.to_dict()) == method
    assert hash(method) == hash(LayerDropBack(head=("fc", "out")))
    assert method.exact(_InputCalledFc()).head == method.head


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (("boddy",), "_InputCalledFc has no submodule 'boddy' with parameters; did you mean body?"),
        (("out", "relu"), "_InputCalledFc has no submodule 'relu' with parameters"),
        (("out.weight",), "_InputCalledFc has no submodule 'out.weight' with parameters"),
        (("",), "_InputCalledFc has no submodule '' with parameters"),
    ],
)
def test_a_wrong_name_is_refused_and_the_model_untouched(head, message):
    model = _InputCalledFc()
    with pytest.raises(ValueError, match=r"^LayerDropBack\.head") as caught:
        LayerDropBack(head=head).bind(model, cross_entropy)
    assert str(caught.value) == f"LayerDropBack.head = {head!r}: {message}"
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("head", ["fc", (1,), None])
def test_the_setting_is_a_list_of_names(head):
    with pytest.raises(ValueError, match=r"^LayerDropBack\.head = .*: must be a list of submodules, such as \['fc'\]"):
        LayerDropBack(head=head)


def test_a_head_that_is_all_or_frozen_is_refused():
    with pytest.raises(ValueError, match=r"_InputCalledFc has nothing to drop outside its head"):
        LayerDropBack(head=("fc", "body", "out")).bind(_InputCalledFc(), cross_entropy)
    model = _InputCalledFc()
    model.fc.requires_grad_(False)
    LayerDropBack().bind(model, cross_entropy)
    with pytest.raises(ValueError, match=r"the head of this _InputCalledFc is frozen"):
        LayerDropBack(head=("fc",)).bind(model, cross_entropy)
