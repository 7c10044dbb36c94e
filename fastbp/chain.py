"""Chain and Residual: the structure that methods see, `head(blocks(stem(x)))` of `merge(x, branch(x))`.

A residual net is a chain of blocks, each a cheap *merge* of its input with an expensive *branch* of it.
Methods that replace how the gradient passes through blocks (`HighwayBP`, `DDG`) need exactly this much
structure. Own nets (`fastbp.nets`) are Chains; `fastbp.views.as_chain` shows other people's models as one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn


class Add(nn.Module):
    """The merge `x + z` of a pre-activation net (He et al. 2016, arXiv:1603.05027)."""

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return _add(x, z)


class AddReLU(nn.Module):
    """The merge `relu(x + z)` of the original, post-activation ResNet (He et al. 2015, arXiv:1512.03385)."""

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return torch.relu(_add(x, z))


class ShortcutAdd(nn.Module):
    """The merge `shortcut(x) + z`, for blocks that change the shape; `relu` applies one to the sum.

    Args:
        shortcut: takes the block's input to the shape of the branch's output.
        relu: whether the block ends in a ReLU (post-activation nets).
    """

    def __init__(self, shortcut: nn.Module, relu: bool) -> None:
        super().__init__()
        if not isinstance(shortcut, nn.Module):
            raise TypeError(f"ShortcutAdd: shortcut must be an nn.Module, got {type(shortcut).__name__}")
        self.shortcut = shortcut
        self.relu = relu

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        out = _add(self.shortcut(x), z)
        return torch.relu(out) if self.relu else out

    def extra_repr(self) -> str:
        return f"relu={self.relu}"


class AddNorm(nn.Module):
    """The merge `norm(x + z)` of a post-LN transformer (Vaswani et al. 2017, arXiv:1706.03762).

    Args:
        norm: an `nn.LayerNorm`.
    """

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        if not isinstance(norm, nn.LayerNorm) or type(norm).forward is not nn.LayerNorm.forward:
            raise TypeError(f"AddNorm: norm must be an nn.LayerNorm, got {type(norm).__name__}")
        self.norm = norm

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.norm(_add(x, z))

    def scale(self, x: Tensor, z: Tensor) -> Tensor:
        """The output's derivative by the sum, entry by entry, where mean and deviation are held fixed."""
        total = _add(x, z)
        total = total.to(torch.promote_types(total.dtype, torch.float32))
        over = tuple(range(-len(self.norm.normalized_shape), 0))
        scale = torch.rsqrt(total.var(over, correction=0, keepdim=True) + self.norm.eps)
        return scale if self.norm.weight is None else scale * self.norm.weight


class Replace(nn.Module):
    """The merge that returns `z`: no residual path, an ordinary layer as a block.

    No gradient passes it along the merges. Where the layer is cheap beside the blocks around it, `transition` keeps
    their residual paths in one piece.
    """

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return z


class Through(nn.Module):
    """The merge `module(x)`: all of it is residual path, and the branch is not read.

    For what changes the stream between stages and has no shortcut around it, such as patch merging; see `transition`.

    Args:
        module: cheap beside a branch, as methods may differentiate it once more in every round.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        if not isinstance(module, nn.Module):
            raise TypeError(f"Through: module must be an nn.Module, got {type(module).__name__}")
        self.module = module

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.module(x)


class Residual(nn.Module):
    """One block: `merge(x, branch(x))`.

    Args:
        branch: the expensive part; it must not change its input in place.
        merge: a module called with the block's input and the branch's output; default `Add()`.

    Raises:
        TypeError: one of them is not a module, or nothing would read the branch.
        ValueError: at the forward, input and branch output differ in shape (they are never broadcast).
    """

    def __init__(self, branch: nn.Module, merge: nn.Module | None = None) -> None:
        super().__init__()
        if not isinstance(branch, nn.Module):
            raise TypeError(f"Residual: branch must be an nn.Module, got {type(branch).__name__}")
        if merge is not None and not isinstance(merge, nn.Module):
            raise TypeError(f"Residual: merge must be an nn.Module such as Add(), got {type(merge).__name__}")
        if isinstance(merge, Through) and type(branch) is not nn.Identity:
            raise TypeError("Residual: the merge Through reads no branch, so that it would not learn; use transition()")
        self.branch = branch
        self.merge = Add() if merge is None else merge

    def forward(self, x: Tensor) -> Tensor:
        return self.merge(x, self.branch(x))


def transition(module: nn.Module) -> Residual:
    """A block without a branch, `module(x)`: the residual paths of the blocks before and after it meet in it."""
    return Residual(nn.Identity(), Through(module))


class Chain(nn.Module):
    """A net as `head(blocks(stem(x)))`.

    Args:
        stem: everything before the first block; `nn.Identity()` for nothing.
        blocks: an `nn.ModuleList` (or a list) of `Residual`, at least one.
        head: everything after the last block; `nn.Identity()` for nothing.

    Raises:
        TypeError: stem or head is not a module, or a block is not a `Residual`.
        ValueError: there is no block.
    """

    def __init__(self, stem: nn.Module, blocks: nn.ModuleList | Sequence[nn.Module], head: nn.Module) -> None:
        super().__init__()
        for name, part in (("stem", stem), ("head", head)):
            if not isinstance(part, nn.Module):
                raise TypeError(
                    f"Chain: {name} must be an nn.Module (nn.Identity() for none), got {type(part).__name__}"
                )
        if not isinstance(blocks, nn.ModuleList | list | tuple):
            raise TypeError(f"Chain: blocks must be an nn.ModuleList of Residual, got {type(blocks).__name__}")
        for i, block in enumerate(blocks):
            if not isinstance(block, Residual):
                hint = (
                    "wrap it as Residual(block) or, where nothing is added, as fastbp.chain.transition(block) if it "
                    "is cheap and Residual(block, Replace()) if not"
                )
                raise TypeError(f"Chain: blocks[{i}] is a {type(block).__name__}, not a Residual; {hint}")
        if not len(blocks):
            raise ValueError("Chain: blocks is empty, a Chain needs at least one Residual")
        self.stem = stem
        self.blocks = blocks if isinstance(blocks, nn.ModuleList) else nn.ModuleList(blocks)
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        for block in self.blocks:
            h = block(h)
        return self.head(h)

    def residuals(self) -> list[Residual]:
        """The blocks as a typed list, in order of the forward."""
        return [cast(Residual, block) for block in self.blocks]


def has_residual_path(block: Residual) -> bool:
    """Whether the block's input reaches its output past the branch; False for `Replace`.

    >>> has_residual_path(Residual(nn.Linear(2, 2))), has_residual_path(Residual(nn.Linear(2, 2), Replace()))
    (True, False)
    """
    return not isinstance(block.merge, Replace)


def _add(x: Tensor, z: Tensor) -> Tensor:
    if x.shape != z.shape:
        got = f"shortcut {tuple(x.shape)}, branch {tuple(z.shape)}"
        raise ValueError(f"Residual: the two terms differ in shape ({got}); use ShortcutAdd or Replace as merge")
    return x + z
