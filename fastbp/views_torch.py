"""Views of torchvision's models and of torch's TransformerEncoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastbp.chain import AddNorm, Chain, Residual, transition
from fastbp.view_parts import FirstToken, class_of, kind_of, post_activation


def _resnet(model: Any) -> Chain:
    stem = nn.Sequential(model.conv1, model.bn1, model.relu, model.maxpool)
    blocks = []
    for block in (b for stage in (model.layer1, model.layer2, model.layer3, model.layer4) for b in stage):
        first = [block.conv1, block.bn1, block.relu, block.conv2, block.bn2]
        if kind_of(model, block, "torchvision.models.resnet", "BasicBlock", "Bottleneck") == "Bottleneck":
            first += [block.relu, block.conv3, block.bn3]
        blocks.append(post_activation(model, first, block.downsample, block.relu))
    return Chain(stem, blocks, nn.Sequential(model.avgpool, nn.Flatten(1), model.fc))


def _vit(model: Any) -> Chain:
    blocks = []
    for block in model.encoder.layers:
        kind_of(model, block, "torchvision.models.vision_transformer", "EncoderBlock")
        blocks += [
            Residual(nn.Sequential(block.ln_1, _SelfAttention(block.self_attention, block.dropout))),
            Residual(nn.Sequential(block.ln_2, block.mlp)),
        ]
    return Chain(_Tokens(model), blocks, nn.Sequential(model.encoder.ln, FirstToken(), model.heads))


class _Tokens(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.conv_proj, self.class_token = model.conv_proj, model.class_token
        self.pos_embedding, self.dropout = model.encoder.pos_embedding, model.encoder.dropout

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.conv_proj(x).flatten(2).permute(0, 2, 1)
        tokens = torch.cat([self.class_token.expand(len(x), -1, -1), tokens], dim=1)
        return self.dropout(tokens + self.pos_embedding)


class _SelfAttention(nn.Module):
    """torch's attention of a sequence to itself, and the dropout after it."""

    def __init__(self, attention: nn.MultiheadAttention, dropout: nn.Module) -> None:
        super().__init__()
        self.attention, self.dropout = attention, dropout

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.attention(x, x, x, need_weights=False)[0])


def _swin(model: Any) -> Chain:
    """Both versions; the states are (B, height, width, channels), patch merging is a transition."""
    blocks, (stem, *features) = [], model.features
    for part in features:
        if class_of(part).startswith("torchvision.models.swin_transformer.PatchMerging"):
            blocks.append(transition(part))
            continue
        for b in part:
            kinds = ("SwinTransformerBlock", "SwinTransformerBlockV2")
            if kind_of(model, b, "torchvision.models.swin_transformer", *kinds) == "SwinTransformerBlock":
                attention, mlp = [b.norm1, b.attn], [b.norm2, b.mlp]
            else:
                attention, mlp = [b.attn, b.norm1], [b.mlp, b.norm2]
            blocks += [Residual(nn.Sequential(*branch, b.stochastic_depth)) for branch in (attention, mlp)]
    return Chain(stem, blocks, nn.Sequential(model.norm, model.permute, model.avgpool, model.flatten, model.head))


def _convnext(model: Any) -> Chain:
    blocks, (stem, *features) = [], model.features
    for part in features:
        if class_of(part[0]) == "torchvision.models.convnext.LayerNorm2d":
            blocks.append(transition(part))  # downsampling
            continue
        for b in part:
            kind_of(model, b, "torchvision.models.convnext", "CNBlock")
            blocks.append(Residual(_ScaledBranch(b)))
    return Chain(stem, blocks, nn.Sequential(model.avgpool, model.classifier))


class _ScaledBranch(nn.Module):
    def __init__(self, block: Any) -> None:
        super().__init__()
        self.block, self.layer_scale, self.stochastic_depth = block.block, block.layer_scale, block.stochastic_depth

    def forward(self, x: Tensor) -> Tensor:
        return self.stochastic_depth(self.layer_scale * self.block(x))


def _encoder(model: Any) -> Chain:
    """Without masks, as in an `nn.Sequential`; pre-LN and post-LN, in both layouts."""
    blocks = []
    for layer in model.layers:
        kind_of(model, layer, "torch.nn.modules.transformer", "TransformerEncoderLayer")
        attention, feed = _SelfAttention(layer.self_attn, layer.dropout1), _FeedForward(layer)
        if layer.norm_first:
            blocks += [Residual(nn.Sequential(layer.norm1, attention)), Residual(nn.Sequential(layer.norm2, feed))]
        else:
            blocks += [Residual(attention, AddNorm(layer.norm1)), Residual(feed, AddNorm(layer.norm2))]
    return Chain(nn.Identity(), blocks, nn.Identity() if model.norm is None else model.norm)


_AS_MODULE = {F.relu: nn.ReLU(), F.gelu: nn.GELU()}  # equal blocks are known by their modules


class _FeedForward(nn.Module):
    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.linear1, self.linear2 = layer.linear1, layer.linear2
        self.activation = _AS_MODULE.get(layer.activation, layer.activation)
        self.dropout, self.dropout2 = layer.dropout, layer.dropout2

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout2(self.linear2(self.dropout(self.activation(self.linear1(x)))))


TORCH_VIEWS: dict[str, Callable[[Any], Chain]] = {
    "torch.nn.modules.transformer.TransformerEncoder": _encoder,
    "torchvision.models.resnet.ResNet": _resnet,
    "torchvision.models.vision_transformer.VisionTransformer": _vit,
    "torchvision.models.swin_transformer.SwinTransformer": _swin,
    "torchvision.models.convnext.ConvNeXt": _convnext,
}
