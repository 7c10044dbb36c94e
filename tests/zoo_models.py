"""timm models of many families, each at a size that takes a step in milliseconds.

An entry of `ZOO` is a timm name and its arguments, or a constructor where timm's function fixes the size.
"""

import copy
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import torch

CLASSES = 5


@dataclass(frozen=True)
class Entry:
    """One model.

    Attributes:
        what: what it has that others have not.
        args: of `timm.create_model`.
        size: height and width of its images.
        ci: whether CI trains it; the others are for `make test`.
        make: instead of `timm.create_model(name)`.
        reads: whether a module reads the weight of a layer inside it without calling the layer.
    """

    what: str
    args: dict[str, Any] = field(default_factory=dict)
    size: int = 32
    ci: bool = False
    make: Any = None
    reads: bool = False


def _vit(**more):
    return {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3} | more


def _mixer(block, mlp_ratio=(0.5, 4.0), **more):
    from timm.models import mlp_mixer

    parts = {name: getattr(mlp_mixer, part) for name, part in {"block_layer": block, **more}.items()}
    size = {"img_size": 32, "patch_size": 8, "num_blocks": 2, "embed_dim": 32, "mlp_ratio": mlp_ratio}
    return mlp_mixer.MlpMixer(num_classes=CLASSES, **size, **parts)


def _poolformer():
    from timm.models.metaformer import GroupNorm1, MetaFormer

    scales = {"layer_scale_init_values": 1e-5, "res_scale_init_values": None}
    plain = {"downsample_norm": None, "mlp_bias": True, "norm_layers": GroupNorm1, "use_mlp_head": False}
    return MetaFormer(num_classes=CLASSES, depths=(1, 1, 1, 1), dims=(8, 16, 24, 32), **scales, **plain)


def _resnetv2_std():
    from timm.layers import GroupNormAct
    from timm.models.resnetv2 import ResNetV2

    norm = partial(GroupNormAct, num_groups=8)
    return ResNetV2((1, 1), (32, 64), num_classes=CLASSES, stem_chs=16, stem_type="fixed", norm_layer=norm)


def _convmixer():
    from timm.models.convmixer import ConvMixer

    return ConvMixer(dim=16, depth=2, kernel_size=3, patch_size=4, num_classes=CLASSES)


SMALL = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}
WINDOWS = {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (1, 2), "num_heads": (2, 4)}
STAGES = {"layers": (1, 1, 1, 1), "channels": (16, 16, 32, 32)}

ZOO = {
    "test_resnet": Entry("basic and bottleneck blocks, a deep stem", ci=True),
    "seresnext26d_32x4d": Entry("grouped convolutions, squeeze and excite", STAGES | {"cardinality": 4}),
    "res2net50_26w_4s": Entry("a chain of convolutions in a block", STAGES),
    "skresnet18": Entry("selective kernels", STAGES),
    "resnest14d": Entry("split attention", STAGES),
    "resnetv2_50": Entry("pre-activation, norm and activation in one", STAGES | {"channels": (16, 32, 32, 64)}),
    "resnetv2_std": Entry("weight-standardised StdConv2d, group norm", ci=True, make=_resnetv2_std),
    "test_nfnet": Entry("weight-standardised ScaledStdConv2d, no norm", ci=True),
    "test_efficientnet": Entry("depthwise convolutions", {"drop_path_rate": 0.2}),
    "test_efficientnet (same)": Entry("Conv2dSame", {"pad_type": "same"}, ci=True),
    "test_efficientnet_gn": Entry("group norm"),
    "test_efficientnet_evos": Entry("EvoNorm: norm and activation in one"),
    "mixnet_s": Entry("mixed depthwise kernels: convolutions in a ModuleDict"),
    "mobilenetv2_035": Entry("inverted residuals"),
    "mobilenetv3_small_050": Entry("a convolution for a head"),
    "hardcorenas_a": Entry("MobileNetV3 by search"),
    "ghostnet_050": Entry("ghost modules"),
    "regnety_002": Entry("grouped bottlenecks"),
    "densenet121": Entry("concatenation", {"growth_rate": 8, "block_config": (2, 2, 2)}, ci=True),
    "dla46_c": Entry("aggregation trees"),
    "vgg11": Entry("a 7x7 convolution as a linear layer", {"mlp_ratio": 0.01}),
    "legacy_xception": Entry("separable convolutions", size=64),
    "hrnet_w18_small": Entry("parallel resolutions", size=64),
    "ese_vovnet19b_slim_dw": Entry("one-shot aggregation"),
    "test_byobnet": Entry("blocks by configuration"),
    "repvgg_a0": Entry("branches that can be merged for inference"),
    "fastvit_t8": Entry("RepMixer", {"layers": (1, 1, 1, 1), "embed_dims": (8, 16, 32, 64)}),
    "test_convnext": Entry("layer scale, layer norm over channels", ci=True),
    "inception_next_atto": Entry("Inception depthwise branches", SMALL),
    "test_mambaout": Entry("gated convolutions"),
    "starnet_s050": Entry("products of branches", {"base_dim": 8, "depths": [1, 1, 1, 1]}),
    "fasternet_t0": Entry("partial convolutions", {"embed_dim": 16, "depths": (1, 1, 1, 1)}),
    "repvit_m0_9": Entry("two heads, averaged", {"embed_dim": (8, 16, 24, 32), "depth": (1, 1, 1, 1)}),
    "edgenext_xx_small": Entry("cross-covariance attention", SMALL | {"heads": (4, 4, 4, 4)}),
    "convmixer": Entry("patches and depthwise convolutions", make=_convmixer),
    "poolformer": Entry("pooling for attention", make=_poolformer),
    "mixer": Entry("linear layers over tokens", ci=True, make=partial(_mixer, "MixerBlock")),
    "resmlp": Entry("affine norms", make=partial(_mixer, "ResBlock", 4, norm_layer="Affine")),
    "gmlp": Entry("spatial gating", make=partial(_mixer, "SpatialGatingBlock", 4, mlp_layer="GatedMlp")),
    "test_vit": Entry("fused query, key and value", _vit(dynamic_img_size=True), ci=True),
    "test_vit3": Entry("attention pooling, register tokens", _vit()),
    "test_vit4": Entry("RMS norm", _vit()),
    "test_vit_relpos": Entry("relative positions by an MLP", _vit()),
    "deit_tiny_distilled_patch16_224": Entry("two heads, class and distillation token", _vit()),
    "deit3_small_patch16_224": Entry("layer scale", _vit()),
    "beit_base_patch16_224": Entry("reads qkv.weight without calling qkv", _vit(), ci=True, reads=True),
    "eva02_tiny_patch14_224": Entry("SwiGLU, rotary positions", _vit(ref_feat_shape=(4, 4)), reads=True),
    "cait_xxs24_224": Entry("talking heads, class attention", _vit(num_heads=4)),
    "convit_tiny": Entry("gated positional attention", _vit(embed_dim=8, num_heads=4, local_up_to_layer=1)),
    "xcit_nano_12_p16_224": Entry("cross-covariance attention over channels", _vit(embed_dim=32, num_heads=4)),
    "tnt_s_patch16_224": Entry(
        "a transformer in every patch", _vit(patch_size=16, inner_dim=8, num_heads_outer=3, num_heads=None)
    ),
    "pit_ti_224": Entry(
        "pooling between stages",
        {"img_size": 32, "patch_size": 8, "stride": 4, "base_dims": [8, 8, 8], "depth": [1, 1, 1]},
    ),
    "levit_128s": Entry("batch norm in attention, two heads", size=64, args={"img_size": 64}),
    "swin_tiny_patch4_window7_224": Entry("shifted windows", WINDOWS, ci=True),
    "swinv2_tiny_window8_256": Entry("cosine attention", WINDOWS, reads=True),
    "test_maxvit": Entry("blocks and grids", {"img_size": 64}, size=64),
    "test_coatnet": Entry("convolution and attention", {"img_size": 64}, size=64),
    "davit_tiny": Entry(
        "attention over channels",
        {"depths": (1, 1), "embed_dims": (16, 32), "num_heads": (2, 2), "window_size": 4},
    ),
    "pvt_v2_b0": Entry(
        "spatial reduction",
        {"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 24, 32), "num_heads": (1, 2, 3, 4)},
    ),
    "tiny_vit_5m_224": Entry(
        "convolutions, then windows",
        {"depths": (1, 1), "embed_dims": (16, 32), "num_heads": (2, 2), "window_sizes": (4, 4)},
    ),
    "visformer_tiny": Entry(
        "batch norm, attention by convolutions",
        {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": (1, 1, 1), "num_heads": 3, "init_channels": 8},
    ),
    "mobilevit_xxs": Entry("unfolds patches between convolutions", size=64),
    "sequencer2d_s": Entry(
        "LSTMs over rows and columns",
        {
            "img_size": 32,
            "layers": (1, 1),
            "patch_sizes": (8, 1),
            "embed_dims": (16, 16),
            "hidden_sizes": (4, 4),
            "mlp_ratios": (2.0, 2.0),
        },
    ),
}


def zoo_model(name: str) -> torch.nn.Module:
    """A new model in training mode, every time with the same weights."""
    return copy.deepcopy(_built(name))


@lru_cache(maxsize=2)
def _built(name: str) -> torch.nn.Module:
    import timm

    entry = ZOO[name]
    torch.manual_seed(0)
    args = {key: value for key, value in entry.args.items() if value is not None}
    model = entry.make() if entry.make else timm.create_model(name.partition(" ")[0], num_classes=CLASSES, **args)
    return model.train()


def zoo_batch(name: str, index: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Batch number `index`: x (size, 3, H, W), y (size,)."""
    generator = torch.Generator().manual_seed(1000 + index)
    x = torch.randn(size, 3, ZOO[name].size, ZOO[name].size, generator=generator)
    return x, torch.randint(CLASSES, (size,), generator=generator)
