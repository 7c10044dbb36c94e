"""The few layers that torch does not have and the nets of `fastbp.nets` need."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SubsamplePad(nn.Module):
    """The parameter-free shortcut between stages: every second pixel, new channels zero.

    Type A of He et al. 2015, arXiv:1512.03385, section 3.3:
    `(B, channels_in, H, W)` to `(B, channels_out, ceil(H/2), ceil(W/2))`.
    """

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.new_channels = channels_out - channels_in

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, self.new_channels))


class ColumnsToChannels(nn.Module):
    """Parameter-free downsampling: s x s patches, averaged over their rows, their columns become channels.

    `(B, C, H, W)` to `(B, s C, H/s, W/s)`, s = `factor`, column j of a patch in the channels j C to (j+1) C; twice by 2
    is once by 4. With `ChannelsToColumns` after it, the residual stream of a net keeps its resolution while blocks
    work at a lower one (Highway-BP, arXiv:2501.17086).
    """

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        s = self.factor
        patches = x.unflatten(3, (-1, s)).unflatten(2, (-1, s))  # (B, C, H/s, s, W/s, s)
        return patches.mean(3).permute(0, 4, 1, 2, 3).flatten(1, 2)

    def extra_repr(self) -> str:
        return f"factor={self.factor}"


class ChannelsToColumns(nn.Module):
    """The right inverse of `ColumnsToChannels`, and `factor` times its adjoint: columns go back, rows are repeated."""

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        s = self.factor
        columns = x.unflatten(1, (s, -1)).permute(0, 2, 3, 4, 1).flatten(3)  # (B, C, H/s, W)
        return columns.repeat_interleave(s, 2)

    def extra_repr(self) -> str:
        return f"factor={self.factor}"


class SelfAttention(nn.Module):
    """Multi-head self-attention over `(B, tokens, dim)`; `causal`: a token sees itself and those before."""

    def __init__(self, dim: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"dim {dim} is not a multiple of heads {heads}")
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        )  # each (B, heads, tokens, dim/heads)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(mixed.transpose(1, 2).flatten(2))


class PatchEmbedding(nn.Module):
    """`(B, C, H, W)` to `(B, HW/patch², dim)`: a linear map of each patch plus a learned position."""

    def __init__(self, channels: int, height: int, width: int, patch: int, dim: int) -> None:
        super().__init__()
        if height % patch or width % patch:
            raise ValueError(f"a {height}x{width} image does not divide into patches of {patch}")
        self.project = nn.Conv2d(channels, dim, patch, stride=patch)
        self.position = nn.Parameter(torch.randn(1, (height // patch) * (width // patch), dim) * 0.02)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(x).flatten(2).transpose(1, 2) + self.position


class TokenEmbedding(nn.Module):
    """Token numbers `(B, T)` to `(B, T, dim)`, T <= `tokens`: a vector per token plus one per position."""

    def __init__(self, vocabulary: int, tokens: int, dim: int) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, dim)
        self.position = nn.Embedding(tokens, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.token(x) + self.position.weight[: x.shape[1]]


class MeanTokens(nn.Module):
    """The mean over tokens: `(B, tokens, dim)` to `(B, dim)`."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)
