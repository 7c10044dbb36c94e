"""Own small nets, each a `Chain` or a `Recurrent`; `fastbp.models.make_model` makes them by name.

Every entry of `NETS` takes `(input_shape, classes, **args)`: `input_shape` is one example's shape without the
batch, `(channels, height, width)` for images or `(tokens,)` for text; the output is logits,
`(batch, classes)` for images and `(batch, tokens, classes)` for text.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
from torch import nn

from fastbp.chain import Add, AddNorm, AddReLU, Chain, Residual, ShortcutAdd
from fastbp.layers import (
    ChannelsToColumns,
    ColumnsToChannels,
    MeanTokens,
    PatchEmbedding,
    SelfAttention,
    SubsamplePad,
    TokenEmbedding,
)
from fastbp.recurrent import PixelSteps, Recurrent


def resnet_tiny(input_shape: tuple[int, ...], classes: int, *, blocks: int = 4, width: int = 16) -> Chain:
    """A pre-activation residual net without downsampling, for 8x8 digits and other small images.

    Args:
        input_shape: `(channels, height, width)`.
        classes: number of logits.
        blocks: residual blocks, each BN-ReLU-conv-BN-ReLU-conv.
        width: channels throughout.

    Reference: He, Zhang, Ren, Sun, Identity Mappings in Deep Residual Networks (2016), arXiv:1603.05027.
    """
    channels, _, _ = image_shape(input_shape, "resnet_tiny")
    _positive(classes=classes, blocks=blocks, width=width)
    body = [Residual(_conv_branch(width, width), Add()) for _ in range(blocks)]
    stem, head = _conv3x3(channels, width), nn.Sequential(*_norm_relu(width), *_pooled_logits(width, classes))
    return _he_normal(Chain(stem, nn.ModuleList(body), head))


def cifar_resnet(
    input_shape: tuple[int, ...],
    classes: int,
    *,
    depth: int,
    width: int = 16,
    activation: str = "pre",
    stream: str = "stages",
) -> Chain:
    """The CIFAR ResNet: three stages of (depth - 2)/6 blocks, width times 1, 2 and 4.

    Shortcuts between stages are parameter-free (type A). Unlike the paper of the pre-activation net, the first block
    too has its BN-ReLU inside the branch, so that all blocks are alike and, within a stage, every merge is a plain sum.

    Args:
        input_shape: `(channels, height, width)`; with stream `full`, multiples of 4.
        classes: number of logits.
        depth: 6 n + 2 layers.
        width: channels of the first stage.
        activation: `pre`: branches BN-ReLU-conv-BN-ReLU-conv and plain sums (2016); `post`: conv-BN-ReLU-conv-BN and a
            ReLU after the sum (2015).
        stream: `stages`, each at its own resolution; or `full`: all blocks are on a stream that keeps the first stage's
            shape, which a branch reads and writes through `ColumnsToChannels` and back (Highway-BP, arXiv:2501.17086);
            the first blocks of stages two and three have a few more weights then. Without a shortcut that changes the
            shape every merge is a plain sum; with `post` it is one with a ReLU, which now acts at full resolution.

    Reference: He, Zhang, Ren, Sun, Identity Mappings in Deep Residual Networks (2016), arXiv:1603.05027; the CIFAR
    architecture, shortcut A and `post` from Deep Residual Learning (2015), arXiv:1512.03385, section 4.2.
    """
    name = f"resnet{depth}"
    channels, height, row = image_shape(input_shape, name)
    _positive(classes=classes, width=width)
    _check(stream in ("stages", "full"), f"{name}: stream = {stream!r}: must be stages or full")
    _check(activation in ("pre", "post"), f"{name}: activation = {activation!r}: must be pre or post")
    fits = stream == "stages" or height % 4 == row % 4 == 0
    _check(fits, f"{name}: stream = 'full' needs height and width in multiples of 4, got {height} x {row}")
    post = activation == "post"
    stages = [width * 2**stage for stage in range(3) for _ in range((depth - 2) // 6)]
    if stream == "full":
        body = [_stream_block(out, out // width, post) for out in stages]
    else:
        body = [_stage_block(before, out, post) for before, out in pairwise([width, *stages])]
    stem = nn.Sequential(_conv3x3(channels, width), *_norm_relu(width)) if post else _conv3x3(channels, width)
    down = [ColumnsToChannels(4)] if stream == "full" else []
    head = nn.Sequential(*down, *(() if post else _norm_relu(4 * width)), *_pooled_logits(4 * width, classes))
    return _he_normal(Chain(stem, nn.ModuleList(body), head))


def mlp(input_shape: tuple[int, ...], classes: int, *, depth: int = 4, width: int = 64) -> Chain:
    """A residual multi-layer perceptron on flattened inputs.

    Args:
        input_shape: any shape.
        classes: number of logits.
        depth: residual blocks, each LayerNorm-Linear-ReLU-Linear.
        width: features throughout.
    """
    _positive(classes=classes, depth=depth, width=width)
    features = 1
    for size in input_shape:
        features *= size
    stem = nn.Sequential(nn.Flatten(), nn.Linear(features, width))
    head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, classes))
    branches = (
        nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
        for _ in range(depth)
    )
    return Chain(stem, nn.ModuleList(Residual(branch) for branch in branches), head)


def vit_tiny(
    input_shape: tuple[int, ...],
    classes: int,
    *,
    patch: int | None = None,
    dim: int = 64,
    depth: int = 4,
    heads: int = 4,
    mlp_ratio: int = 2,
) -> Chain:
    """A small pre-LN vision transformer; attention and MLP are blocks of their own: 2 * depth blocks.

    Args:
        input_shape: `(channels, height, width)`.
        classes: number of logits.
        patch: pixels per side of a patch; None is 2 for images lower than 16 pixels and 4 for others.
        dim: features per token.
        depth: transformer layers.
        heads: attention heads, a divisor of `dim`.
        mlp_ratio: hidden features of the MLP over `dim`.

    The head averages the tokens instead of reading a class token (the paper's appendix D.3 finds them equal).

    Reference: Dosovitskiy et al., An Image is Worth 16x16 Words (2021), arXiv:2010.11929.
    """
    channels, height, width = image_shape(input_shape, "vit_tiny")
    patch = patch if patch is not None else 2 if height < 16 else 4
    _positive(classes=classes, patch=patch, dim=dim, depth=depth, heads=heads, mlp_ratio=mlp_ratio)
    stem = PatchEmbedding(channels, height, width, patch, dim)
    head = nn.Sequential(nn.LayerNorm(dim), MeanTokens(), nn.Linear(dim, classes))
    return Chain(stem, _transformer(dim, depth, heads, mlp_ratio, causal=False), head)


def gpt_tiny(
    input_shape: tuple[int, ...],
    classes: int,
    *,
    dim: int = 64,
    depth: int = 4,
    heads: int = 4,
    mlp_ratio: int = 4,
    norm: str = "pre",
) -> Chain:
    """A small character GPT: token numbers `(B, T)`, int64, to logits `(B, T, classes)`; 2 * depth blocks.

    Args:
        input_shape: `(T,)`, the longest context in tokens.
        classes: size of the vocabulary.
        dim: features per token.
        depth: transformer layers.
        heads: attention heads, a divisor of `dim`.
        mlp_ratio: hidden features of the MLP over `dim`.
        norm: where the LayerNorm of a block is: `pre`, first in its branch (GPT-2), or `post`, on the sum (GPT).
            There is one more before the head with `pre`.

    Weights of Linear and Embedding start normal with standard deviation 0.02, as in GPT-2; head and token
    embedding are not tied.

    Reference: Radford et al., Language Models are Unsupervised Multitask Learners (2019).
    """
    _check(len(input_shape) == 1, f"gpt_tiny: input_shape must be (tokens,), got {input_shape}")
    _positive(tokens=input_shape[0], classes=classes, dim=dim, depth=depth, heads=heads, mlp_ratio=mlp_ratio)
    _check(norm in ("pre", "post"), f"gpt_tiny: norm = {norm!r}: must be pre or post")
    stem = TokenEmbedding(classes, input_shape[0], dim)
    head: nn.Module = nn.Linear(dim, classes)
    if norm == "pre":
        head = nn.Sequential(nn.LayerNorm(dim), head)
    chain = Chain(stem, _transformer(dim, depth, heads, mlp_ratio, causal=True, post=norm == "post"), head)
    for module in chain.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
    return chain


def recurrent(
    input_shape: tuple[int, ...],
    classes: int,
    *,
    cell: str,
    width: int = 64,
    layers: int = 1,
    residual: bool = True,
    step: int = 1,
    keep_bias: float = 0.0,
) -> Recurrent:
    """A GRU or LSTM over the pixels of an image or the characters of a text.

    Images `(B, C, H, W)` are read row by row, the last step gives the logits `(B, classes)`; token numbers `(B, T)`,
    int64, are embedded, every step gives logits `(B, T, classes)`.

    Args:
        input_shape: `(channels, height, width)` or `(T,)`, the longest sequence in tokens.
        classes: number of logits, or size of the vocabulary.
        cell: `gru` or `lstm`.
        width: hidden features of every layer, and of the embedding.
        layers: stacked ones.
        residual: whether layers from the second on add their input, as in Highway-BP's paper.
        step: pixels per time step, a divisor of height times width.
        keep_bias: added at the start to the bias of the gate that keeps the state (GRU: z, LSTM: f); 1 or 2 lets the
            net remember longer (Jozefowicz et al. 2015).
    """
    _positive(classes=classes, width=width, layers=layers, step=step)
    if len(input_shape) == 1:
        _check(step == 1, f"{cell}: step = {step} is for images, a token is a step")
        features, steps, stem = width, input_shape[0], nn.Embedding(classes, width)
    else:
        channels, height, row = image_shape(input_shape, cell)
        pixels = height * row
        _check(pixels % step == 0, f"{cell}: step = {step} does not divide the {height} x {row} pixels")
        features, steps, stem = channels * step, pixels // step, PixelSteps(step)
    kind = {"gru": nn.GRU, "lstm": nn.LSTM}[cell]
    stack = [kind(features if i == 0 else width, width) for i in range(layers)]
    with torch.no_grad():
        for layer in stack:
            layer.bias_ih_l0[width : 2 * width] += keep_bias
    head = nn.Linear(width, classes)
    return Recurrent(stem, stack, head, last_step=len(input_shape) > 1, residual=residual, steps=steps)


NETS: dict[str, Callable[..., Chain | Recurrent]] = {
    "resnet_tiny": resnet_tiny,
    "resnet20": partial(cifar_resnet, depth=20),
    "resnet32": partial(cifar_resnet, depth=32),
    "resnet56": partial(cifar_resnet, depth=56),
    "resnet110": partial(cifar_resnet, depth=110),
    "mlp": mlp,
    "vit_tiny": vit_tiny,
    "gpt_tiny": gpt_tiny,
    "gru": partial(recurrent, cell="gru"),
    "lstm": partial(recurrent, cell="lstm"),
}


def _conv3x3(channels_in: int, channels_out: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False)


def _norm_relu(channels: int) -> tuple[nn.Module, nn.Module]:
    return nn.BatchNorm2d(channels), nn.ReLU()


def _conv_branch(channels_in: int, channels_out: int, stride: int = 1, *, post: bool = False) -> nn.Sequential:
    first, second = _conv3x3(channels_in, channels_out, stride), _conv3x3(channels_out, channels_out)
    if post:
        return nn.Sequential(first, *_norm_relu(channels_out), second, nn.BatchNorm2d(channels_out))
    return nn.Sequential(*_norm_relu(channels_in), first, *_norm_relu(channels_out), second)


def _stage_block(before: int, out: int, post: bool) -> Residual:
    """A block that halves height and width where it has more channels than the one before."""
    if before != out:
        return Residual(_conv_branch(before, out, 2, post=post), ShortcutAdd(SubsamplePad(before, out), relu=post))
    return Residual(_conv_branch(out, out, post=post), AddReLU() if post else Add())


def _stream_block(channels: int, factor: int, post: bool) -> Residual:
    """A block that works at a resolution lower by this factor than that of the stream it is on."""
    branch = _conv_branch(channels, channels, post=post)
    if factor > 1:
        branch = nn.Sequential(ColumnsToChannels(factor), *branch, ChannelsToColumns(factor))
    return Residual(branch, AddReLU() if post else Add())


def _pooled_logits(channels: int, classes: int) -> tuple[nn.Module, ...]:
    return nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)


def _he_normal(chain: Chain) -> Chain:
    """Convolutions start normal with variance 2 / fan_out (He et al. 2015, arXiv:1502.01852)."""
    for module in chain.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return chain


def _transformer(
    dim: int, depth: int, heads: int, mlp_ratio: int, *, causal: bool, post: bool = False
) -> nn.ModuleList:
    """Attention and MLP sublayers in turn, each with its LayerNorm first or, `post`, on its sum."""
    blocks = nn.ModuleList()
    for _ in range(depth):
        hidden = mlp_ratio * dim
        attention = [SelfAttention(dim, heads, causal=causal)]
        feed = [nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim)]
        for branch in (attention, feed):
            norm = nn.LayerNorm(dim)
            blocks.append(
                Residual(nn.Sequential(*branch), AddNorm(norm)) if post else Residual(nn.Sequential(norm, *branch))
            )
    return blocks


def image_shape(input_shape: tuple[int, ...], name: str) -> tuple[int, int, int]:
    """The shape of one image, `(channels, height, width)`; a ValueError with this net's name where it is none."""
    wrong = f"input_shape must be (channels, height, width), got {tuple(input_shape)}"
    _check(len(input_shape) == 3, f"{name}: {wrong}")
    channels, height, width = input_shape
    return channels, height, width


def _positive(**sizes: int) -> None:
    for name, size in sizes.items():
        ok = isinstance(size, int) and size >= 1
        _check(ok, f"{name} = {size!r}: must be a whole number of at least 1")


def _check(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)
