"""What a block is: timm's groups by name, a general rule for other models, and both through wrappers."""

import pytest
import torch
from torch import nn

from fastbp.chain import Chain
from fastbp.nets import resnet_tiny, vit_tiny
from fastbp.units import droppable_units, head_parameters

timm = pytest.importorskip("timm")


def tiny(name):
    settings = {
        "vit_tiny_patch16_224": dict(img_size=32, patch_size=8, embed_dim=12, depth=3, num_heads=2),
        "swin_tiny_patch4_window7_224": dict(
            img_size=32, window_size=4, embed_dim=8, depths=(1, 2, 1), num_heads=(1, 2, 2)
        ),
        "convnext_atto": dict(depths=(1, 2, 1, 1), dims=(8, 8, 16, 16)),
    }
    return timm.create_model(name, num_classes=5, **settings.get(name, {}))


def blocks_of(model):
    """Unit name to the layers in it."""
    layer_of = {id(p): name.rpartition(".")[0] or name for name, p in model.named_parameters()}
    return {u.name: sorted({layer_of[id(p)] for p in u.parameters}) for u in droppable_units(model, "block")}


EFFICIENTNET = [1, 2, 2, 3, 3, 4, 1]
REGNET = [1, 1, 4, 7]
EXPECTED = {
    "vit_tiny_patch16_224": [
        "cls_token + pos_embed + patch_embed.proj",
        "blocks.0",
        "blocks.1",
        "blocks.2 + norm",
    ],
    "swin_tiny_patch4_window7_224": [
        "patch_embed.proj + patch_embed.norm",
        "layers.0.blocks.0",
        "layers.1",
        "layers.1.blocks.1",
        "layers.2 + norm",
    ],
    "resnet18": ["conv1 + bn1", *[f"layer{stage}.{i}" for stage in range(1, 5) for i in range(2)]],
    "efficientnet_b0": [
        "conv_stem + bn1",
        *[f"blocks.{stage}.{i}" for stage, depth in enumerate(EFFICIENTNET[:-1]) for i in range(depth)],
        "blocks.6.0 + conv_head + bn2",
    ],
    "convnext_atto": [
        "stem.0 + stem.1",
        "stages.0.blocks.0",
        "stages.1",
        "stages.1.blocks.1",
        "stages.2",
        "stages.3",
        "head.norm",
    ],
    "regnetx_002": [
        "stem.conv + stem.bn",
        *[f"s{stage}.b{i}" for stage, depth in enumerate(REGNET, 1) for i in range(1, depth + 1)],
    ],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_blocks_of_timm_models(name):
    model = tiny(name)
    found = blocks_of(model)
    assert list(found) == EXPECTED[name], f"{name}: blocks {list(found)}"
    parameters = [id(p) for u in droppable_units(model, "block") for p in u.parameters]
    head = head_parameters(model)
    assert len(parameters) == len(set(parameters)), "a parameter is in two blocks"
    assert set(parameters) | head == {id(p) for p in model.parameters()}, "a parameter is in no block"
    model.eval()(torch.randn(1, 3, 32, 32))  # it is a net


def test_what_is_in_a_block():
    found = blocks_of(tiny("swin_tiny_patch4_window7_224"))
    block = found["layers.1"]
    assert {path.split(".")[2] for path in block} == {"downsample", "blocks"}, f"the second stage's first: {block}"
    assert {path.split(".")[3] for path in block if ".blocks." in path} == {"0"}, f"of its blocks the first: {block}"
    assert all(path.startswith("layers.1.blocks.1.") for path in found["layers.1.blocks.1"]), "not one block"
    assert any(".attn." in path for path in found["layers.1.blocks.1"]), "a block without its attention"


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "efficientnet_b0"])
def test_the_general_rule_finds_timms_blocks(name):
    model = tiny(name)
    model.group_matcher = None
    found = {u.name for u in droppable_units(model, "block")}
    start = {"vit_tiny_patch16_224": "blocks.", "efficientnet_b0": "blocks.", "swin_tiny_patch4_window7_224": "layers."}
    pieces = 2 if name.startswith("vit") else 4 if name.startswith("swin") else 3
    whole = {".".join(n.split(".")[:pieces]) for n, _ in model.named_parameters() if n.startswith(start[name])}
    blocks = {path for path in whole if "downsample" not in path}
    assert blocks <= found, f"{sorted(blocks - found)} are not among the blocks {sorted(found)}"
    inside = {f for f in found for block in blocks if f.startswith(f"{block}.")}
    assert not inside, f"{sorted(inside)} are parts of blocks"


def test_blocks_of_other_models():
    models = pytest.importorskip("torchvision").models
    mobile = list(blocks_of(models.mobilenet_v2(num_classes=5)))
    assert mobile[:3] == ["features.0.0", "features.0.1", "features.1"], f"stem's layers, then blocks: {mobile}"
    assert mobile[-3:] == ["features.17", "features.18.0", "features.18.1"], f"blocks, then layers: {mobile}"
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 3, enable_nested_tensor=False)
    assert list(blocks_of(nn.Sequential(encoder, nn.Linear(8, 2)))) == [f"0.layers.{i}" for i in range(3)]
    for net in (resnet_tiny((1, 8, 8), 3, blocks=3, width=4), vit_tiny((1, 8, 8), 3)):
        assert isinstance(net, Chain)
        inside = [name for name in blocks_of(net) if name.startswith("blocks.")]
        assert inside == [f"blocks.{i}" for i in range(len(net.blocks))], f"a Residual is a block: {inside}"
    assert list(blocks_of(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)))) == ["0"], "a layer is a block"


@pytest.mark.parametrize("unit", ["tensor", "layer", "block", "prefix"])
def test_compiled_models_have_the_same_units(unit):
    model = tiny("vit_tiny_patch16_224")
    want = [(u.index, u.name, [id(p) for p in u.parameters]) for u in droppable_units(model, unit)]
    head = head_parameters(model)
    whole = torch.compile(model)
    assert head_parameters(whole) == head, "the compiled model has another head"
    got = [(u.index, u.name, [id(p) for p in u.parameters]) for u in droppable_units(whole, unit)]
    assert got == want, "compiling the model changed its units"
    for i, block in enumerate(model.blocks):
        model.blocks[i] = torch.compile(block)
    got = [(u.index, u.name, [id(p) for p in u.parameters]) for u in droppable_units(model, unit)]
    assert got == want, "compiling the blocks changed the model's units"


def test_two_classifiers_are_both_the_head():
    model = timm.create_model(
        "deit_tiny_distilled_patch16_224", img_size=32, patch_size=8, embed_dim=12, depth=1, num_heads=2, num_classes=5
    )
    head = head_parameters(model)
    names = [name for name, p in model.named_parameters() if id(p) in head]
    assert names == ["head.weight", "head.bias", "head_dist.weight", "head_dist.bias"], f"the head is {names}"
