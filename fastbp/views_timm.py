"""Views of timm's models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastbp.chain import Chain, Residual, ShortcutAdd, transition
from fastbp.view_parts import kind_of, post_activation, refuse


def _resnet(model: Any) -> Chain:
    stem = nn.Sequential(model.conv1, model.bn1, model.act1, model.maxpool)
    blocks = []
    for b in (b for stage in (model.layer1, model.layer2, model.layer3, model.layer4) for b in stage):
        if kind_of(model, b, "timm.models.resnet", "BasicBlock", "Bottleneck") == "BasicBlock":
            branch, last = [b.conv1, b.bn1, b.drop_block, b.act1, b.aa, b.conv2, b.bn2], b.act2
        else:
            branch = [b.conv1, b.bn1, b.act1, b.conv2, b.bn2, b.drop_block, b.act2, b.aa, b.conv3, b.bn3]
            last = b.act3
        optional = [module for module in (b.se, b.drop_path) if module is not None]
        blocks.append(post_activation(model, branch + optional, b.downsample, last))
    return Chain(stem, blocks, _ResNetHead(model))


class _ResNetHead(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.global_pool, self.fc, self.drop_rate = model.global_pool, model.fc, float(model.drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        x = self.global_pool(x)
        if self.drop_rate:  # the pool's flag, not the view's own: it follows model.train() and model.eval()
            x = F.dropout(x, p=self.drop_rate, training=self.global_pool.training)
        return self.fc(x)


def _resnet_v2(model: Any) -> Chain:
    """Pre-activation; the first norm of a block that changes the shape is a transition: the shortcut reads it too."""
    blocks = []
    for b in (b for stage in model.stages for b in stage.blocks):
        kind = kind_of(model, b, "timm.models.resnetv2", "PreActBasic", "PreActBottleneck", "Bottleneck")
        if kind == "Bottleneck":
            branch = [b.conv1, b.norm1, b.conv2, b.norm2, b.conv3, b.norm3, b.drop_path]
            blocks.append(post_activation(model, branch, b.downsample, b.act3))
            continue
        branch = [b.conv1, b.norm2, b.conv2]
        branch += [b.norm3, b.conv3, b.drop_path] if kind == "PreActBottleneck" else [b.drop_path]
        if b.downsample is None:
            blocks.append(Residual(nn.Sequential(b.norm1, *branch)))
        else:
            blocks.append(transition(b.norm1))
            blocks.append(Residual(nn.Sequential(*branch), ShortcutAdd(b.downsample, relu=False)))
    return Chain(model.stem, blocks, nn.Sequential(model.norm, model.head))


def _vit(model: Any) -> Chain:
    return Chain(_Tokens(model, model.cls_token, model.reg_token), _vit_blocks(model), _ViTHead(model))


def _distilled_vit(model: Any) -> Chain:
    if model.distilled_training:
        refuse(model, "in distilled training it returns two outputs; call model.set_distilled_training(False)")
    return Chain(_Tokens(model, model.cls_token, model.dist_token), _vit_blocks(model), _TwoHeads(model))


def _vit_blocks(model: Any) -> list[Residual]:
    if model.dynamic_img_size:
        refuse(model, "dynamic_img_size is on; make it with dynamic_img_size=False")
    if model.pos_embed is None:
        refuse(model, "it has no position embedding; make it with pos_embed='learn'")
    blocks = []
    for b in model.blocks:
        kind_of(model, b, "timm.models.vision_transformer", "Block")
        blocks.append(Residual(nn.Sequential(b.norm1, b.attn, b.ls1, b.drop_path1)))
        blocks.append(Residual(nn.Sequential(b.norm2, b.mlp, b.ls2, b.drop_path2)))
    return blocks


class _Tokens(nn.Module):
    """Patches behind the model's own tokens, with positions."""

    def __init__(self, model: Any, first: nn.Parameter | None, second: nn.Parameter | None) -> None:
        super().__init__()
        self.patch_embed, self.pos_drop = model.patch_embed, model.pos_drop
        self.patch_drop, self.norm_pre = model.patch_drop, model.norm_pre
        self.first, self.second, self.pos_embed = first, second, model.pos_embed
        self.position_first = model.no_embed_class

    def forward(self, x: Tensor) -> Tensor:
        prefix = [t.expand(len(x), -1, -1) for t in (self.first, self.second) if t is not None]
        x = self.patch_embed(x)
        if self.position_first:
            x = x + self.pos_embed
        if prefix:
            x = torch.cat([*prefix, x], dim=1)
        if not self.position_first:
            x = x + self.pos_embed
        return self.norm_pre(self.patch_drop(self.pos_drop(x)))


class _ViTHead(nn.Module):
    def __init__(self, model: Any) -> None:
        from timm.models.vision_transformer import global_pool_nlc

        super().__init__()
        self.norm, self.attn_pool, self.fc_norm = model.norm, model.attn_pool, model.fc_norm
        self.head_drop, self.head = model.head_drop, model.head
        self.prefix, self.include_prefix = model.num_prefix_tokens, model.pool_include_prefix
        self.pool_type, self.pool = model.global_pool, global_pool_nlc

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        if self.attn_pool is not None:
            x = self.attn_pool(x if self.include_prefix else x[:, self.prefix :])
        else:
            x = self.pool(x, self.pool_type, self.prefix, self.include_prefix)
        return self.head(self.head_drop(self.fc_norm(x)))


class _TwoHeads(nn.Module):
    """The mean of what the class and the distillation token say."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.norm, self.head_drop = model.norm, model.head_drop
        self.head, self.head_dist = model.head, model.head_dist

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        label, distilled = self.head_drop(x[:, 0]), self.head_drop(x[:, 1])
        return (self.head(label) + self.head_dist(distilled)) / 2


def _swin(model: Any) -> Chain:
    """The states are (B, height, width, channels); patch merging is a transition."""
    if model.dynamic_img_size:
        refuse(model, "it takes images of any size; make it with strict_img_size=True and dynamic_img_size=False")
    blocks = []
    for stage in model.layers:
        if not isinstance(stage.downsample, nn.Identity):
            blocks.append(transition(stage.downsample))
        for b in stage.blocks:
            kind_of(model, b, "timm.models.swin_transformer", "SwinTransformerBlock")
            blocks += [Residual(_Windows(b)), Residual(_OverTokens(b))]
    return Chain(model.patch_embed, blocks, nn.Sequential(model.norm, model.head))


class _Windows(nn.Module):
    """Attention within windows: shift, cut into windows, attend, and back."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.norm, self.attn, self.drop_path = block.norm1, block.attn, block.drop_path1
        self.window, self.shift = tuple(block.window_size), tuple(block.shift_size)
        self.register_buffer("mask", block.attn_mask, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, _ = x.shape
        down, right = self.shift
        h = self.norm(x)
        if down or right:
            h = torch.roll(h, (-down, -right), (1, 2))
        h = F.pad(h, (0, 0, 0, -width % self.window[1], 0, -height % self.window[0]))
        h = h.unflatten(2, (-1, self.window[1])).unflatten(1, (-1, self.window[0])).transpose(2, 3)
        rows, columns = h.shape[1:3]  # of windows: h is (B, rows, columns, *window, channels)
        h = self.attn(h.flatten(3, 4).flatten(0, 2), mask=self.mask)
        h = h.unflatten(0, (batch, rows, columns)).unflatten(3, self.window).transpose(2, 3)
        h = h.flatten(3, 4).flatten(1, 2)[:, :height, :width]
        if down or right:
            h = torch.roll(h, (down, right), (1, 2))
        return self.drop_path(h)


class _OverTokens(nn.Module):
    """The MLP on (B, tokens, channels)."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.norm, self.mlp, self.drop_path = block.norm2, block.mlp, block.drop_path2

    def forward(self, x: Tensor) -> Tensor:
        return self.drop_path(self.mlp(self.norm(x.flatten(1, 2)))).view(x.shape)


def _convnext(model: Any) -> Chain:
    blocks = []
    for stage in model.stages:
        if not isinstance(stage.downsample, nn.Identity):
            blocks.append(transition(stage.downsample))
        for b in stage.blocks:
            kind_of(model, b, "timm.models.convnext", "ConvNeXtBlock")
            plain = isinstance(b.shortcut, nn.Identity)
            blocks.append(Residual(_ConvNeXtBranch(b), None if plain else ShortcutAdd(b.shortcut, relu=False)))
    return Chain(model.stem, blocks, nn.Sequential(model.norm_pre, model.head))


class _ConvNeXtBranch(nn.Module):
    def __init__(self, block: Any) -> None:
        super().__init__()
        self.conv_dw, self.norm, self.mlp, self.gamma = block.conv_dw, block.norm, block.mlp, block.gamma
        self.drop_path, self.channels_first = block.drop_path, block.use_conv_mlp

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_dw(x)
        h = self.mlp(self.norm(h)) if self.channels_first else self.mlp(self.norm(h.movedim(1, -1))).movedim(-1, 1)
        return self.drop_path(h if self.gamma is None else h * self.gamma.view(-1, 1, 1))


TIMM_VIEWS: dict[str, Callable[[Any], Chain]] = {
    "timm.models.resnet.ResNet": _resnet,
    "timm.models.resnetv2.ResNetV2": _resnet_v2,
    "timm.models.vision_transformer.VisionTransformer": _vit,
    "timm.models.deit.VisionTransformerDistilled": _distilled_vit,
    "timm.models.swin_transformer.SwinTransformer": _swin,
    "timm.models.convnext.ConvNeXt": _convnext,
}
