"""Views must be the model: the same numbers, gradients and buffers, and nothing left behind on the model."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastbp.chain import (
    Add,
    AddNorm,
    AddReLU,
    Chain,
    Replace,
    Residual,
    ShortcutAdd,
    Through,
    has_residual_path,
    transition,
)
from fastbp.layers import MeanTokens, PatchEmbedding
from fastbp.views import as_chain


def timm_model(name, **args):
    timm = pytest.importorskip("timm")
    return timm.create_model(name, num_classes=5, **args)


def torchvision_vit(**args):
    models = pytest.importorskip("torchvision").models
    sizes = dict(image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32)
    model = models.VisionTransformer(**sizes | args, num_classes=5)
    nn.init.normal_(model.heads[-1].weight)  # torchvision's zero start would hide the gradients below the head
    return model


def torchvision_resnet(make):
    pytest.importorskip("torchvision")
    from torchvision.models import resnet

    return make(resnet)


VIT = dict(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2)
NARROW = dict(channels=(16, 32, 32, 64), stem_chs=16)
WINDOWS = dict(img_size=32, embed_dim=16, depths=(2, 2), num_heads=(2, 4))
CONVNEXT = dict(depths=(1, 2, 1, 1), dims=(8, 16, 24, 32))


def timm_resnetv2_gn():
    pytest.importorskip("timm")
    from timm.layers import GroupNormAct
    from timm.models.resnetv2 import ResNetV2

    norm = partial(GroupNormAct, num_groups=8)
    return ResNetV2((1, 2), (32, 64), num_classes=5, stem_chs=16, stem_type="fixed", norm_layer=norm)


def torchvision_swin(version=""):
    swin = pytest.importorskip("torchvision").models.swin_transformer
    parts = {"block": getattr(swin, f"SwinTransformerBlock{version}"), "stochastic_depth_prob": 0.3}
    merging = getattr(swin, f"PatchMerging{version}")
    sizes = dict(patch_size=[4, 4], embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=[4, 4], num_classes=5)
    return swin.SwinTransformer(**sizes, **parts, downsample_layer=merging)


def torchvision_convnext():
    convnext = pytest.importorskip("torchvision").models.convnext
    stages = [convnext.CNBlockConfig(8, 12, 2), convnext.CNBlockConfig(12, None, 2)]
    return convnext.ConvNeXt(stages, stochastic_depth_prob=0.3, layer_scale=0.5, num_classes=5)


def encoder(norm=None, **layer):
    layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.2, batch_first=True, **layer)
    stack = nn.TransformerEncoder(layer, 2, norm, enable_nested_tensor=False)
    return nn.Sequential(PatchEmbedding(3, 32, 32, 8, 16), stack, MeanTokens(), nn.Linear(16, 5))


MODELS = {
    "timm resnet18": lambda: timm_model("resnet18"),
    "timm resnet26": lambda: timm_model("resnet26"),
    "timm resnet18 drop": lambda: timm_model("resnet18", drop_path_rate=0.5, drop_rate=0.3, drop_block_rate=0.2),
    "timm resnet10t": lambda: timm_model("resnet10t", zero_init_last=False),
    "timm seresnet18": lambda: timm_model("seresnet18", zero_init_last=False, drop_path_rate=0.5),
    "timm resnet26 aa, avg_down": lambda: timm_model("resnetaa50", layers=(1, 1, 1, 1), avg_down=True),
    "timm resnext": lambda: timm_model("resnext50_32x4d", layers=(1, 1, 2, 1)),
    "timm gn": lambda: timm_model("resnet50_gn", layers=(1, 1, 1, 1)),
    "timm vit_tiny": lambda: timm_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=3),
    "timm vit drop": lambda: timm_model(
        "vit_tiny_patch16_224",
        **VIT,
        drop_path_rate=0.5,
        drop_rate=0.2,
        proj_drop_rate=0.2,
        pos_drop_rate=0.2,
        patch_drop_rate=0.3,
        init_values=0.1,
        attn_drop_rate=0.2,
    ),
    "timm vit avg, registers": lambda: timm_model(
        "vit_tiny_patch16_224",
        **VIT,
        global_pool="avg",
        reg_tokens=2,
        no_embed_class=True,
        pre_norm=True,
        qk_norm=True,
    ),
    "timm vit avg, no class": lambda: timm_model("vit_tiny_patch16_224", **VIT, global_pool="avg", class_token=False),
    "timm vit map": lambda: timm_model("vit_tiny_patch16_224", **VIT, global_pool="map"),
    "timm deit_tiny": lambda: timm_model("deit_tiny_patch16_224", **VIT),
    "timm deit distilled": lambda: timm_model("deit_tiny_distilled_patch16_224", **VIT, drop_rate=0.2),
    "timm resnetv2_18": lambda: timm_model("resnetv2_18", layers=(1, 2, 1, 1), **NARROW, drop_path_rate=0.3),
    "timm resnetv2_50": lambda: timm_model("resnetv2_50", layers=(1, 2, 1, 1), **NARROW),
    "timm resnetv2 post": lambda: timm_model("resnetv2_50d", layers=(1, 1, 1, 1), **NARROW, preact=False),
    "timm resnetv2 gn": lambda: timm_resnetv2_gn(),
    "timm swin": lambda: timm_model("swin_tiny_patch4_window7_224", **WINDOWS, window_size=4),
    "timm swin padded": lambda: timm_model(
        "swin_tiny_patch4_window7_224", **WINDOWS, window_size=3, proj_drop_rate=0.2
    ),
    "timm convnext": lambda: timm_model("convnext_tiny", **CONVNEXT, ls_init_value=0.5, drop_path_rate=0.3),
    "timm convnextv2": lambda: timm_model("convnextv2_atto", **CONVNEXT, head_norm_first=True),
    "torchvision swin": lambda: torchvision_swin(),
    "torchvision swin v2": lambda: torchvision_swin("V2"),
    "torchvision convnext": lambda: torchvision_convnext(),
    "encoder post-LN": lambda: encoder(norm_first=False),
    "encoder pre-LN": lambda: encoder(norm_first=True, norm=nn.LayerNorm(16), activation=nn.GELU()),
    "torchvision resnet18": lambda: torchvision_resnet(lambda r: r.resnet18(num_classes=5)),
    "torchvision bottleneck": lambda: torchvision_resnet(lambda r: r.ResNet(r.Bottleneck, [1, 2, 1, 1], num_classes=5)),
    "torchvision vit": torchvision_vit,
    "torchvision vit drop": lambda: torchvision_vit(dropout=0.3, attention_dropout=0.2, representation_size=8),
}


def build(name):
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(1)
        model = MODELS[name]()
        for module in model.modules():  # timm starts the last BN of each branch at zero: nothing would flow
            if isinstance(module, nn.BatchNorm2d) and not module.weight.any():
                nn.init.ones_(module.weight)
    return model.double()


def batch(seed=0, side=32):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 3, side, side, generator=generator, dtype=torch.float64)
    return x, torch.tensor([0, 3, 1])


def step(forward, model, x, y, seed=7):
    """Output and input gradient of one training step; gradients and buffers stay on the model."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        out = forward(x)
    F.cross_entropy(out, y).backward()
    return out.detach(), x.grad


def assert_same_model(view_of, model):
    """Three SGD steps, one through the model and one through the view of a copy: equal to the last bit."""
    twin = copy.deepcopy(model)
    view = view_of(twin)
    for i in range(3):
        x, y = batch(i)
        want, want_dx = step(model, model, x, y)
        got, got_dx = step(view, twin, x, y)
        assert torch.equal(want, got), f"step {i}: outputs differ by {(want - got).abs().max():.1e}"
        assert torch.equal(want_dx, got_dx), f"step {i}: input gradients differ"
        for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), f"step {i}: {name} has a gradient on one side only"
            assert p.grad is None or torch.equal(p.grad, q.grad), f"step {i}: gradients of {name} differ"
            if p.grad is not None:
                with torch.no_grad():
                    p -= 0.1 * p.grad
                    q -= 0.1 * q.grad
        for (name, b), c in zip(model.named_buffers(), twin.buffers(), strict=True):
            assert torch.equal(b, c), f"step {i}: buffer {name} differs"
    assert any(p.grad is not None and p.grad.any() for p in list(model.parameters())[:2]), "nothing reached the stem"


@pytest.mark.parametrize("name", MODELS)
def test_view_equals_model_bit_for_bit(name):
    model = build(name).train()
    assert_same_model(as_chain, model)
    model.eval()
    x, _ = batch(9)
    assert torch.equal(model(x), as_chain(model)(x)), "eval outputs differ"


@pytest.mark.parametrize("name", MODELS)
def test_view_is_made_of_the_models_parts_and_leaves_it_alone(name):
    model = build(name)
    frozen = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d | nn.LayerNorm | nn.GroupNorm)).eval()

    def facts():
        modules = {key: (id(m), m.training, len(m._forward_hooks)) for key, m in model.named_modules()}
        return (
            modules,
            {key: id(p) for key, p in model.named_parameters()},
            list(model.state_dict()),
            dir(model),
        )

    before = facts()
    view = as_chain(model)
    view(batch()[0])
    assert facts() == before, "making or running the view changed the model"
    assert not frozen.training
    assert {id(p) for p in view.parameters()} == {id(p) for p in model.parameters()}, (
        "view and model own other parameters"
    )
    assert {id(b) for b in view.buffers()} == {id(b) for b in model.buffers()}, "view and model own other buffers"


@pytest.mark.parametrize("name", MODELS)
def test_hooks_on_layers_fire_as_in_the_model(name):
    model = build(name)
    calls = []
    for key, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_pre_hook(lambda m, args, key=key: calls.append((key, args[0].detach().clone())))
    x, _ = batch()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(3)
        model(x)
    want, calls[:] = list(calls), []
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(3)
        as_chain(model)(x)
    if "resnetv2" in name:  # calls a block's shortcut before its branch; the numbers are the same
        want, calls = sorted(want, key=lambda call: call[0]), sorted(calls, key=lambda call: call[0])
    assert [key for key, _ in calls] == [key for key, _ in want], "layers were called in another order or number"
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(want, calls, strict=True)), "a hook saw another input"


@pytest.mark.parametrize("name", MODELS)
def test_view_never_works_in_place_on_block_inputs_and_outputs(name):
    chain = as_chain(build(name))
    with torch.no_grad():
        h = chain.stem(batch()[0])
        for i, block in enumerate(chain.residuals()):
            kept = h.clone()
            z = block.branch(h)
            assert torch.equal(h, kept), f"branch {i} changed its input"
            kept_z = z.clone()
            out = block.merge(h, z)
            assert torch.equal(h, kept), f"merge {i} changed the block's input"
            assert torch.equal(z, kept_z), f"merge {i} changed the branch's output"
            assert out.data_ptr() != h.data_ptr(), f"block {i} hands on its input's memory"
            h = out
        kept = h.clone()
        chain.head(h)
        assert torch.equal(h, kept), "the head changed the last block's output"


@pytest.mark.parametrize(
    "name", ["timm resnet18 drop", "timm vit drop", "torchvision vit drop", "torchvision resnet18"]
)
def test_view_runs_with_substituted_parameters(name):
    """functional_call on the view reaches every parameter: nothing is read behind the view's back."""
    model = build(name).eval()
    view = as_chain(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()), dtype=p.dtype) * 0.1)
    by_id = {id(p): q for p, q in zip(model.parameters(), other.parameters(), strict=True)}
    swapped = {key: by_id[id(p)] for key, p in view.named_parameters()}
    x, _ = batch()
    assert torch.equal(torch.func.functional_call(view, swapped, (x,)), other(x))


def test_view_is_independent_when_copied():
    model = build("timm vit drop").eval()
    view = as_chain(model)
    twin = copy.deepcopy(view)
    x, _ = batch()
    assert torch.equal(twin(x), view(x))
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in model.parameters()}


def test_view_follows_train_and_eval_of_the_model():
    model = build("timm resnet18 drop")
    view = as_chain(model)
    model.eval()
    x, _ = batch()
    assert torch.equal(view(x), model(x)), "the view ignores model.eval()"
    model.train()
    assert not torch.equal(view(x), view(x)), "the view drops nothing in training"


def test_blocks_of_resnets_and_transformers():
    resnet = as_chain(build("timm resnet18")).residuals()
    kinds = [type(block.merge) for block in resnet]
    assert kinds == [AddReLU, AddReLU, ShortcutAdd, AddReLU, ShortcutAdd, AddReLU, ShortcutAdd, AddReLU]
    assert all(has_residual_path(block) for block in resnet)
    vit = as_chain(build("timm vit_tiny")).residuals()
    assert [type(block.merge) for block in vit] == [Add] * 6, "attention and MLP of three layers are six blocks"
    merges = {
        "timm resnetv2_18": [Add, Through, ShortcutAdd, Add, Through, ShortcutAdd, Through, ShortcutAdd],
        "timm resnetv2 post": [ShortcutAdd] * 4,
        "timm swin": [Add] * 4 + [Through] + [Add] * 4,
        "timm convnext": [Add, Through, Add, Add, Through, Add, Through, Add],
        "torchvision swin": [Add] * 4 + [Through] + [Add] * 4,
        "torchvision convnext": [Add, Add, Through, Add, Add],
        "encoder post-LN": [AddNorm] * 4,
        "encoder pre-LN": [Add] * 4,
    }
    for name, kinds in merges.items():
        assert [type(block.merge) for block in as_chain(build(name)).residuals()] == kinds, name


def small_chain():
    block = lambda: nn.Sequential(nn.Linear(6, 6), nn.Tanh())  # noqa: E731
    return Chain(nn.Linear(4, 6), nn.ModuleList([Residual(block()), Residual(block(), AddReLU())]), nn.Linear(6, 5))


def test_chain_is_its_formula_and_its_own_view():
    chain = small_chain().double()
    x = torch.randn(5, 4, dtype=torch.float64)
    h = chain.stem(x)
    first, second = chain.residuals()
    h = h + first.branch(h)
    h = torch.relu(h + second.branch(h))
    assert torch.equal(chain(x), chain.head(h))
    assert as_chain(chain) is chain


def test_merges():
    x, z = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 1.0])
    assert Add()(x, z).tolist() == [1.5, -1.0]
    assert AddReLU()(x, z).tolist() == [1.5, 0.0]
    assert Replace()(x, z) is z
    assert Through(nn.ReLU())(x, z).tolist() == [1.0, 0.0]
    assert transition(nn.ReLU())(x).tolist() == [1.0, 0.0]
    assert has_residual_path(transition(nn.Tanh()))
    assert ShortcutAdd(nn.Identity(), relu=False)(x, z).tolist() == [1.5, -1.0]
    assert ShortcutAdd(nn.Flatten(0), relu=True)(x.view(1, 2), z).tolist() == [1.5, 0.0]
    assert not has_residual_path(Residual(nn.Identity(), Replace()))
    assert has_residual_path(Residual(nn.Identity()))


def test_merges_never_broadcast():
    with pytest.raises(ValueError, match=r"shortcut \(5, 6\), branch \(5, 1\)"):
        Residual(nn.Linear(6, 1))(torch.zeros(5, 6))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Residual(3), TypeError, "branch must be an nn.Module, got int"),
        (
            lambda: Residual(nn.Identity(), "add"),
            TypeError,
            "merge must be an nn.Module such as Add.., got str",
        ),
        (lambda: ShortcutAdd(None, relu=True), TypeError, "shortcut must be an nn.Module, got NoneType"),
        (lambda: transition(torch.relu), TypeError, "Through: module must be an nn.Module, got builtin"),
        (lambda: Residual(nn.Linear(2, 2), Through(nn.Tanh())), TypeError, r"would not learn; use transition\(\)"),
        (lambda: Chain(None, nn.ModuleList([]), nn.Identity()), TypeError, "stem must be an nn.Module"),
        (lambda: Chain(nn.Identity(), nn.ModuleList([]), 1), TypeError, "head must be an nn.Module"),
        (
            lambda: Chain(nn.Identity(), nn.Identity(), nn.Identity()),
            TypeError,
            "ModuleList of Residual, got Identity",
        ),
        (
            lambda: Chain(nn.Identity(), [nn.Tanh()], nn.Identity()),
            TypeError,
            r"blocks\[0\] is a Tanh, not a Residual",
        ),
        (lambda: Chain(nn.Identity(), nn.ModuleList(), nn.Identity()), ValueError, "blocks is empty"),
    ],
)
def test_wrong_types_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


def sequential_with(*extra):
    body = [nn.Flatten(), nn.Linear(3 * 32 * 32, 8), Residual(nn.Linear(8, 8)), nn.BatchNorm1d(8)]
    return nn.Sequential(*body, *extra, Residual(nn.Sequential(nn.ReLU(), nn.Linear(8, 8)), AddReLU()), nn.Linear(8, 5))


@pytest.mark.parametrize(
    ("model", "merges"),
    [
        (sequential_with(), [Add, Through, AddReLU]),
        (sequential_with(nn.ReLU(inplace=True)), [Add, Through, Through, AddReLU]),
        (sequential_with(nn.Dropout(0.5, inplace=True)), [Add, Through, Through, AddReLU]),
        (sequential_with(Residual(nn.Linear(8, 8), Replace())), [Add, Through, Replace, AddReLU]),
        (nn.Sequential(*sequential_with(), nn.ReLU(inplace=True)), [Add, Through, AddReLU]),
        (
            nn.Sequential(nn.Flatten(), Residual(nn.Linear(3072, 3072)), nn.Identity(), nn.ReLU(inplace=True)),
            [Add],
        ),
        (
            nn.Sequential(nn.Flatten(), nn.Linear(3072, 8), nn.ReLU(inplace=True), nn.Linear(8, 5)),
            [Replace] * 4,
        ),
        (nn.Sequential(nn.Identity(), sequential_with()), [Add, Through, AddReLU]),
        (
            nn.Sequential(nn.Flatten(), nn.Linear(3072, 4), small_chain(), nn.Tanh()),
            [Add, AddReLU],
        ),
    ],
    ids=[
        "plain",
        "inplace",
        "dropout",
        "explicit",
        "inplace head",
        "hidden inplace",
        "no residual",
        "nested",
        "chain inside",
    ],
)
def test_sequential(model, merges):
    model = model.double()
    assert [type(block.merge) for block in as_chain(model).residuals()] == merges
    assert_same_model(as_chain, model.train())
    chain = as_chain(model)
    with torch.no_grad():
        h = chain.stem(batch()[0])
        for part in [*chain.blocks, chain.head]:
            kept, out = h.clone(), part(h)
            assert torch.equal(h, kept), f"{part} changed its input in place"
            h = out


class Halved(nn.Sequential):
    def forward(self, x):
        return super().forward(x) / 2


class Reversed(Chain):
    def forward(self, x):
        return -super().forward(x)


def test_foreign_models_are_refused_with_what_to_pass_instead():
    for model in (
        nn.Linear(2, 2),
        Halved(nn.Linear(2, 2)),
        Reversed(nn.Identity(), [Residual(nn.Tanh())], nn.Identity()),
    ):
        with pytest.raises(TypeError, match=rf"{type(model).__name__}: pass a fastbp.Chain, an nn.Sequential"):
            as_chain(model)
    with pytest.raises(ValueError, match="blocks is empty"):
        as_chain(nn.Sequential())


def parallel_vit():
    timm = pytest.importorskip("timm")
    return timm_model("vit_tiny_patch16_224", **VIT, block_fn=timm.models.vision_transformer.ParallelThingsBlock)


def checkpointing():
    model = timm_model("resnet18")
    model.set_grad_checkpointing(True)
    return model


def stage_checkpointing():
    model = timm_model("convnext_tiny", **CONVNEXT)
    model.set_grad_checkpointing(True)
    return model


def distilled_training():
    model = timm_model("deit_tiny_distilled_patch16_224", **VIT)
    model.set_distilled_training(True)
    return model


def data_parallel():
    wrapper = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)  # without a group
    nn.Module.__init__(wrapper)
    wrapper.module = small_chain()
    return wrapper


class OtherLayer(nn.TransformerEncoderLayer):
    pass


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (parallel_vit, "ParallelThingsBlock"),
        (lambda: timm_model("vit_tiny_patch16_224", **VIT, dynamic_img_size=True), "dynamic_img_size"),
        (lambda: timm_model("vit_tiny_patch16_224", **VIT, pos_embed="none"), "no position embedding"),
        (lambda: timm_model("resnet18", act_layer="silu"), "SiLU"),
        (distilled_training, r"two outputs; call model.set_distilled_training\(False\)"),
        (lambda: timm_model("swin_tiny_patch4_window7_224", **WINDOWS, strict_img_size=False), "images of any size"),
        (lambda: timm_model("swinv2_tiny_window8_256", **WINDOWS), "see into a timm.models.swin_transformer_v2"),
        (stage_checkpointing, r"set_grad_checkpointing\(False\)"),
        (lambda: timm_model("resnetv2_50", **NARROW, layers=(1, 1), preact=False, act_layer=nn.SiLU), "SiLU"),
        (lambda: nn.TransformerEncoder(OtherLayer(8, 2), 1, enable_nested_tensor=False), "OtherLayer"),
        (checkpointing, r"set_grad_checkpointing\(False\)"),
        (data_parallel, r"DistributedDataParallel: .* average no gradients.* pass the plain model .*all-reduce"),
        (lambda: nn.DataParallel(small_chain()), r"DataParallel: .* split no batch; pass the plain model"),
        (
            lambda: torch.compile(small_chain()),
            r"OptimizedModule: .* pass the plain model that torch.compile",
        ),
    ],
)
def test_unsupported_variants_are_named(make, message):
    with pytest.raises(TypeError, match=message):
        as_chain(make())
