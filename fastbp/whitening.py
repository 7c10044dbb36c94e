"""The whitening rule of decorrelated backprop: matrices R = I + D, which of them see which features, and their update.

Shapes: a layer has M matrices of width F; rows of its input are (M, n, F). Statistics are computed without autograd,
in the precision of D, and nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

STRUCTURES = ("full", "block", "channel")
RULES = ("standard", "normalized")
_BATCHED_WIDTH = 512  # layers up to this width are updated together; one product of wider ones fills a device


@dataclass(frozen=True)
class Layout:
    """Which features of a weight (outputs, channels, *kernel) share a matrix.

    Attributes:
        groups: groups of the convolution; each has matrices of its own.
        blocks: matrices per group, side by side on the diagonal.
        width: features F that one matrix mixes.
        taps: kernel positions that share a matrix.
        padding: features short in the last block, where blocks of one size do not fit: there D stays 0.
    """

    groups: int
    blocks: int
    width: int
    taps: int
    padding: int = 0

    @property
    def matrices(self) -> int:
        return self.groups * self.blocks

    def split(self, W: Tensor) -> Tensor:
        """A weight in its own shape as (matrices, rows, F): every row meets one matrix."""
        if self.padding:
            W = functional.pad(W.reshape(self.groups, W.shape[0] // self.groups, -1), (0, self.padding))
        rows = W.reshape(self.groups, -1, self.blocks, self.width, self.taps).permute(0, 2, 1, 4, 3)
        return rows.reshape(self.matrices, -1, self.width)

    def join(self, rows: Tensor, like: Tensor) -> Tensor:
        """The inverse of `split`, in the shape of `like`."""
        split = rows.reshape(self.groups, self.blocks, -1, self.taps, self.width)
        split = split.permute(0, 2, 1, 4, 3)
        if self.padding:
            split = split.flatten(2)[..., : -self.padding]
        return split.reshape(like.shape)

    def rows(self, rows_GnF: Tensor) -> Tensor:
        """Input rows of the whole groups, (groups, n, features of a group), as (matrices, n, F)."""
        if self.blocks == 1:
            return rows_GnF
        padded = functional.pad(rows_GnF, (0, self.padding)) if self.padding else rows_GnF
        return padded.unflatten(2, (self.blocks, self.width)).transpose(1, 2).flatten(0, 1)

    def without_padding(self, D: Tensor) -> Tensor:
        """D with zeros in the rows that are padding, changed in place; in their columns the rule leaves zeros."""
        if self.padding:
            D.unflatten(0, (self.groups, self.blocks))[:, -1, -self.padding :] = 0.0
        return D


def layout(weight: Tensor, groups: int, structure: str, block_size: int) -> Layout:
    """The matrices of one layer.

    Args:
        weight: (outputs, channels per group, *kernel).
        groups: groups of the convolution, 1 for a linear layer.
        structure: `full`, one matrix over all inputs of a group; `block`, square blocks of whole channels, the widest
            of equal size that are at most `block_size` wide (a channel's kernel positions are never parted); where
            these would be less than half as wide as they may, as of a prime number of channels, the last is smaller;
            `channel`, one matrix over the channels, shared by the kernel positions.
        block_size: features, for `block`.
    """
    channels, taps = weight.shape[1], weight[0, 0].numel()
    if structure == "channel":
        return Layout(groups, 1, channels, taps)
    together = channels
    if structure == "block":
        widest = min(max(1, block_size // taps), channels)
        together = max(c for c in range(1, widest + 1) if channels % c == 0)
        if 2 * together < widest:
            together = -(-channels // -(-channels // widest))
    blocks = -(-channels // together)
    return Layout(groups, blocks, together * taps, 1, (blocks * together - channels) * taps)


class Decorrelation(nn.Module):
    """Parametrization of a weight: the layer applies A = W R = W + W D; D = 0 is W to the bit.

    Attributes:
        D: buffer R - I, shape (matrices, F, F); float32, or float64 for a float64 weight.
    """

    D: Tensor

    def __init__(self, layout: Layout, weight: Tensor) -> None:
        super().__init__()
        self.layout = layout
        self.in_weight = True  # false inside a call whose input has met R already
        shape = (layout.matrices, layout.width, layout.width)
        self.register_buffer("D", torch.zeros(shape, dtype=master_dtype(weight), device=weight.device))

    def forward(self, W: Tensor) -> Tensor:
        if not self.in_weight:
            return W
        return W + self.layout.join(torch.bmm(self.layout.split(W), self.D.to(W.dtype)), W)

    def of_rows(self, x: Tensor) -> Tensor:
        """R x for every row of the input (..., features) of a linear layer."""
        rows = self.layout.rows(x.reshape(1, -1, x.shape[-1]))
        moves = torch.bmm(rows, self.D.mT.to(x.dtype)).transpose(0, 1).flatten(1)
        return x + moves[:, : x.shape[-1]].reshape(x.shape)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Decorrelation:
        """Moves with the model, but `half()` and `bfloat16()` leave the precision: small updates would round away."""
        before = self.D
        super()._apply(fn, recurse)
        if self.D.dtype in (torch.float16, torch.bfloat16):
            self.D = before.to(self.D.device)
        return self


def decorrelation_of(layer: nn.Module) -> Decorrelation:
    """The matrix of a bound layer."""
    return next(part for part in layer.parametrizations.weight if isinstance(part, Decorrelation))  # type: ignore[union-attr]


def meet_few_rows(layer: nn.Linear) -> list[RemovableHandle]:
    """Applies R to the rows of an input instead of to the weight where these are fewer than the layer's outputs.

    W (R x) costs 4 n F^2 with its backward, (W R) x 4 o F^2: a wide linear layer on a small batch is cheaper this way.
    """
    outputs = layer.out_features

    def before(layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> tuple[Any, Any] | None:
        x = args[0] if args else kwargs["input"]
        if x.shape[:-1].numel() >= outputs or parametrize._cache_enabled:  # a cached W R serves calls of any size
            return None
        matrix = decorrelation_of(layer)  # the layer's own: a copy of the model has copies of both, with these hooks
        matrix.in_weight = False
        return (matrix.of_rows(x),), {}

    def after(layer: nn.Module, args: Any, output: Any) -> None:
        decorrelation_of(layer).in_weight = True

    return [
        layer.register_forward_pre_hook(before, with_kwargs=True),
        layer.register_forward_hook(after, always_call=True),
    ]


def master_dtype(weight: Tensor) -> torch.dtype:
    """The precision in which R of this weight is learnt: float32 at least."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Rule:
    """R <- g (R - decor_lr M R), M = a offdiag(K) + b (diag(K) - I), K the second moment of z = R x.

    Attributes:
        decor_lr: step size.
        kappa: weight of the variance term.
        name: `standard`, a = 1 - kappa and b = kappa; `normalized`, a = (1 - kappa) / (F - 1) and b = 2 kappa (the
            authors' second rule: its step does not have to shrink with the width).
        center: K is the covariance of the sample, not its second moment.
        gain: g is the mean of |x| / |z| instead of 1 (arXiv:2407.10780: R keeps the length of its input).
    """

    decor_lr: float
    kappa: float
    name: str = "standard"
    center: bool = False
    gain: bool = False

    def weights(self, width: int) -> tuple[float, float]:
        """The coefficients (a, b) of M at this width."""
        variance = 2 * self.kappa if self.name == "normalized" else self.kappa
        return (1 - self.kappa) * self.scale(width), variance

    def scale(self, width: int) -> float:
        """What divides the off-diagonal part besides kappa, as a factor."""
        return 1 / max(1, width - 1) if self.name == "normalized" else 1.0

    def prepare(self, rows_MnF: Tensor, D: Tensor) -> Tensor:
        """The sample as the rule sees it: in the precision of D, centred if asked for."""
        rows = rows_MnF.to(D.dtype)
        return rows - rows.mean(dim=1, keepdim=True) if self.center else rows

    def direction(self, rows_MnF: Tensor, D: Tensor) -> Tensor:
        """M R, shape (matrices, F, F), in the association that costs least for this n and F."""
        off, diagonal = self.weights(D.shape[-1])
        return update_direction(rows_MnF, D, off, diagonal)

    def next_D(self, D: Tensor, direction: Tensor, gain: Tensor | None) -> Tensor:
        """D after the update, a new tensor: graphs in flight keep the old one."""
        if gain is None:
            return torch.add(D, direction, alpha=-self.decor_lr)
        D = gain * torch.add(D, direction, alpha=-self.decor_lr)
        D.diagonal(dim1=1, dim2=2).add_(gain.squeeze(2) - 1)
        return D


def update_direction(rows_MnF: Tensor, D: Tensor, off: float, diagonal: float) -> Tensor:
    """M R, shape (matrices, F, F), for R = I + D and M = off offdiag(K) + diagonal (diag(K) - I), K = mean of z z^T.

    With s_i = K_ii: M R = off K R + diag((diagonal - off) s - diagonal) R, and K R is formed in the cheapest of three
    associations: Z^T (Z R) / n where n < F (6 n F^2 FLOPs, F^3 never), Z^T Z first up to n = 2 F, and above it from
    the raw moment X^T X / n, where the rows themselves never meet R.
    """
    n, width = rows_MnF.shape[1:]
    if n > 2 * width:
        K = rows_MnF.mT @ rows_MnF / n
        K = K + D @ K
        K = K + K @ D.mT
    elif n >= width:
        Z = rows_MnF + rows_MnF @ D.mT
        K = Z.mT @ Z / n
    else:
        Z = rows_MnF + rows_MnF @ D.mT
        KR, s = Z.mT @ (Z + Z @ D) / n, Z.square().mean(dim=1)
        return _assemble(KR, s, D, off, diagonal)
    return _assemble(K + K @ D, K.diagonal(dim1=1, dim2=2), D, off, diagonal)


def _assemble(KR: Tensor, s: Tensor, D: Tensor, off: float, diagonal: float) -> Tensor:
    row_scale = ((diagonal - off) * s - diagonal).unsqueeze(2)
    direction = torch.addcmul(off * KR, row_scale, D)
    direction.diagonal(dim1=1, dim2=2).add_(row_scale.squeeze(2))  # row_scale x I
    return direction


def gain(rows_MnF: Tensor, D: Tensor) -> Tensor:
    """The mean over rows of |x| / |R x|, shape (matrices, 1, 1); rows that are zero count as 1."""
    before = rows_MnF.norm(dim=2)
    after = (rows_MnF + rows_MnF @ D.mT).norm(dim=2)
    return torch.where(after > 0, before / after, 1.0).mean(dim=1)[:, None, None]


def bracket(rows_MnF: Tensor, D: Tensor, off: float, diagonal: float) -> Tensor:
    """M itself, shape (matrices, F, F)."""
    Z = rows_MnF + rows_MnF @ D.mT
    M = off * (Z.mT @ Z) / rows_MnF.shape[1]
    s = Z.square().mean(dim=1)
    M.diagonal(dim1=1, dim2=2).copy_(diagonal * (s - 1))
    return M


def directions(rule: Rule, rows: Sequence[Tensor], Ds: Sequence[Tensor]) -> list[Tensor]:
    """`rule.direction` of many layers; layers of equal width and sample go through one batched product.

    Args:
        rows: per layer (matrices, n, F), prepared.
        Ds: per layer (matrices, F, F).
    """
    alike: dict[object, list[int]] = {}
    for i, (r, D) in enumerate(zip(rows, Ds, strict=True)):
        together = D.shape[-1] <= _BATCHED_WIDTH
        alike.setdefault((r.shape[1:], D.dtype, D.device) if together else i, []).append(i)
    out: list[Tensor] = [torch.empty(0)] * len(Ds)
    for members in alike.values():
        if len(members) == 1:
            out[members[0]] = rule.direction(rows[members[0]], Ds[members[0]])
            continue
        both = rule.direction(torch.cat([rows[i] for i in members]), torch.cat([Ds[i] for i in members]))
        for i, part in zip(members, both.split([len(Ds[i]) for i in members]), strict=True):
            out[i] = part
    return out


def decorrelation_losses(rows_MnF: Tensor, D: Tensor, kappa: float, padding: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """How far the second moment K of R x is from the identity, summed over matrices: three scalar tensors.

    Args:
        rows_MnF: the sample, in the precision of D.
        D: (matrices, F, F).
        kappa: weight of the variances.
        padding: features, over all matrices, that are none: their variance is no deviation.

    Returns:
        (1-kappa) off + kappa variance, off = sum C_ij^2 / F^2, variance = sum (K_ii - 1)^2 / F^2.
    """
    n, width = rows_MnF.shape[1:]
    Z = rows_MnF + rows_MnF @ D.mT
    K = Z.mT @ Z / n
    diagonal = K.diagonal(dim1=1, dim2=2)
    variance = ((diagonal - 1).square().sum() - padding) / width**2
    diagonal.zero_()
    off = K.square().sum() / width**2
    return (1 - kappa) * off + kappa * variance, off, variance


def top_eigenvalue(rows_MnF: Tensor, iterations: int = 8) -> Tensor:
    """The largest eigenvalue (modulus) of offdiag(K), K the second moment of the rows, by power iteration: a scalar.

    The rule is stable only while decor_lr times the weight of the off-diagonal part times this is below 2.
    """
    diagonal = rows_MnF.square().mean(dim=1).unsqueeze(2)
    v = torch.ones_like(diagonal)
    norm = v.new_zeros(())
    for _ in range(iterations):
        v = v / v.norm(dim=1, keepdim=True).clamp_min(1e-30)
        v = rows_MnF.mT @ (rows_MnF @ v) / rows_MnF.shape[1] - diagonal * v
        norm = v.norm(dim=1).amax()
    return norm
