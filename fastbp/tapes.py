"""Tapes: the forward of residual blocks, kept so that their Jacobians can be applied any number of times.

A block is h = merge(x, branch(x)). Its Jacobian d h / d x is K + J: K is the merge's by its first argument, the cheap
path; J leads through the branch. `AddNorm` alone keeps less for K: the diagonal of its norm, mean and deviation held
fixed; the rest belongs to J. A branch that hands on a tensor without a graph, as one that was skipped in this step, has
J = 0; so has `Through`, which does not read its branch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from fastbp.alike import Alike, alike_blocks
from fastbp.chain import Add, AddNorm, Residual, Through

Parameters = list[nn.Parameter]
_REENTRANT = (
    "HighwayBP on reentrant activation checkpointing: a block's own graph does not have its parameters; checkpoint "
    "with use_reentrant=False, or not at all"
)
_RERUN = (
    "HighwayBP on checkpointed blocks with buffers: every round runs a checkpointed branch again, and its buffers, "
    "such as the running statistics of a batch norm, moved each time; checkpoint what has none, or nothing"
)


class BlockPlan:
    """Blocks, and what about them need not be looked up in every step.

    Args:
        blocks: in order of the forward.
        batched: whether blocks that are alike are differentiated as one.
        carry: takes a tensor to the device of a block, by its number; default: all blocks are on one.

    Attributes:
        parameters: of every block's branch and of its merge, frozen ones too.
        alike: sets of blocks to be differentiated as one.
        buffers: of all blocks.
        checked: whether a step showed that the blocks can be differentiated any number of times.
    """

    def __init__(
        self, blocks: Sequence[Residual], *, batched: bool = False, carry: Callable[[Tensor, int], Tensor] | None = None
    ) -> None:
        self.blocks = list(blocks)
        self.carry = carry or _stay
        self.parameters = [(list(b.branch.parameters()), list(b.merge.parameters())) for b in blocks]
        self.alike = alike_blocks(blocks) if batched else []
        self.buffers = [buffer for block in blocks for buffer in block.buffers()]
        self.checked = False

    def versions(self) -> list[int]:
        """How often each buffer was written."""
        return [buffer._version for buffer in self.buffers]


class Tapes:
    """One forward of all blocks.

    Args:
        plan: the blocks; alike ones whose inputs differ in shape have a tape each.
        h0: the first block's input.
        gamma: share of K that counts as J.

    Attributes:
        last: the last block's output, without a graph.

    Raises:
        ValueError: in the plan's first step, a block is checkpointed in a way that hides its graph.
    """

    def __init__(self, plan: BlockPlan, h0: Tensor, gamma: float = 0.0) -> None:
        self.plan, self.gamma = plan, gamma
        batched = {i for together in plan.alike for i in together.members}
        self._single: dict[int, _Tape] = {}
        inputs: dict[int, Tensor] = {}
        h, quiet = h0.detach(), _no_graph(h0)
        for i, block in enumerate(plan.blocks):
            h = plan.carry(h, i)
            if i in batched:
                inputs[i] = h
                with quiet:
                    h = block.merge(h, block.branch(h)).detach()
            else:
                self._single[i] = _Tape(block, h)
                h = self._single[i].h.detach()
        self.last = h
        self._together: list[_BatchTape] = []
        for together in plan.alike:
            xs = {i: inputs[i] for i in together.members}
            if len({(x.shape, x.dtype, x.device) for x in xs.values()}) == 1:
                self._together.append(_BatchTape(together, list(xs.values())))
            else:
                self._single |= {i: _Tape(plan.blocks[i], x) for i, x in xs.items()}
        self._versions = None if plan.checked else plan.versions()
        if not plan.checked and any(tape.rebuilds_its_graph() for tape in self._single.values()):
            raise ValueError(_REENTRANT)

    def __len__(self) -> int:
        return len(self.plan.blocks)

    def keep(self, i: int, w: Tensor) -> Tensor:
        """w (1 - gamma) K of block i, counted from 0; w has the shape of the block's output."""
        kept = self._along_merge(i, w)
        return kept if self.gamma == 0 else (1 - self.gamma) * kept

    def cross(self, w: Sequence[Tensor], count: int) -> list[Tensor]:
        """w_{i+1} (J + gamma K) of the first `count` blocks i, from the signals w_1 .. w_count at their outputs."""
        crossed = {i: tape.across(w[i + 1]) for i, tape in self._single.items() if i < count}
        for tape in self._together:
            if tape.members[0] < count:
                crossed |= tape.across(w, count)
        if self.gamma:
            return [crossed.pop(i) + self.gamma * self._along_merge(i, w[i + 1]) for i in range(count)]
        return [crossed[i] for i in range(count)]

    def hand_down(self, i: int, w: Tensor) -> Tensor:
        """w_i, which came about where block i is, at the block before it, whose output it is the signal of."""
        return self.plan.carry(w, max(i - 1, 0))

    def accumulate(self, w: Sequence[Tensor]) -> None:
        """Add w_{i+1} d h_i / d theta to the gradients of every block's parameters; frees the tapes.

        Raises:
            ValueError: in the plan's first step, a buffer of a block was written since its forward.
        """
        for tape in self._together:
            tape.accumulate(w, _trainable([p for i in tape.members for p in self.plan.parameters[i][0]]))
        for i, tape in self._single.items():
            branch, merge = self.plan.parameters[i]
            tape.accumulate(w[i + 1], _trainable(branch), _trainable(merge))
        if self._versions is not None and self._versions != self.plan.versions():
            raise ValueError(_RERUN)
        self.plan.checked = True

    def _along_merge(self, i: int, w: Tensor) -> Tensor:
        """w K."""
        tape = self._single.get(i)
        return w if tape is None else tape.along_merge(w)


class _Tape:
    """One block's forward. Branch and merge are differentiated apart, so that each costs what it is."""

    def __init__(self, block: Residual, x: Tensor) -> None:
        self.adds, self.branches = type(block.merge) is Add, type(block.merge) is not Through
        self.x = x.detach().requires_grad_()  # read by the branch
        self.z = block.branch(self.x)
        self.skip = x.detach().requires_grad_(not self.adds)  # read by the merge
        self.z_in = self.z.detach().requires_grad_(not self.adds)
        self.h: Tensor = block.merge(self.skip, self.z_in)
        self.scale: Tensor | None = None
        if type(block.merge) is AddNorm:
            with torch.no_grad():
                self.scale = block.merge.scale(self.skip, self.z_in)

    def along_merge(self, w: Tensor) -> Tensor:
        """w K: past the branch; zero where the merge does not read the block's input."""
        if self.adds:
            return w
        if self.scale is not None:
            return (self.scale * w).to(w.dtype)
        dx = _vjp(self.h, self.skip, w)
        return torch.zeros_like(self.skip) if dx is None else dx

    def across(self, w: Tensor) -> Tensor:
        """w J."""
        dz = self._into_branch(w)
        dx = None if dz is None else _vjp(self.z, self.x, dz)
        crossed = torch.zeros_like(self.x) if dx is None else dx
        if self.scale is not None and dz is not None:  # its merge reads x + z: what dz is to z, it is to x
            crossed = crossed + (dz - self.along_merge(w))
        return crossed

    def _into_branch(self, w: Tensor) -> Tensor | None:
        """w d merge / d z: at the branch's output; None where the merge does not read it."""
        if self.adds:
            return w
        return _vjp(self.h, self.z_in, w) if self.branches else None

    def rebuilds_its_graph(self) -> bool:
        """Whether reentrant checkpointing hides the parameters from the graph: they would get no gradient."""
        nodes = [out.grad_fn for out in (self.z, self.h) if out.grad_fn is not None]
        seen = set(nodes)
        for node in nodes:  # grows while it is walked
            following = {after for after, _ in node.next_functions if after is not None} - seen
            seen |= following
            nodes += following
        return any(node.name() == "CheckpointFunctionBackward" for node in nodes)

    def accumulate(self, w: Tensor, branch: Parameters, merge: Parameters) -> None:
        dz = self._into_branch(w) if branch else None
        if dz is not None:
            _backward(self.z, dz, branch)
        if merge:
            _backward(self.h, w, merge)


class _BatchTape:
    """The branches of blocks that are alike, run once more as one; their merge is a plain sum."""

    def __init__(self, alike: Alike, xs: list[Tensor]) -> None:
        self.members = alike.members
        self.x = torch.stack(xs).requires_grad_()
        self.z = alike.run(self.x)

    def across(self, w: Sequence[Tensor], count: int) -> dict[int, Tensor]:
        """w_{i+1} J of the members among the first `count` blocks; the signals of the others are final."""
        below = [i for i in self.members if i < count]
        signals = [w[i + 1] for i in below]
        signals += [torch.zeros_like(signals[0])] * (len(self.members) - len(below))
        (dx,) = torch.autograd.grad(self.z, self.x, torch.stack(signals), retain_graph=True)
        return dict(zip(below, dx, strict=False))

    def accumulate(self, w: Sequence[Tensor], parameters: Parameters) -> None:
        if parameters:
            torch.autograd.backward(self.z, torch.stack([w[i + 1] for i in self.members]), inputs=parameters)


def _vjp(out: Tensor, at: Tensor, w: Tensor) -> Tensor | None:
    """w d out / d at; None where it is zero. The graph is kept."""
    if not out.requires_grad:
        return None
    return torch.autograd.grad(out, at, w, retain_graph=True, allow_unused=True)[0]


def _backward(out: Tensor, w: Tensor, parameters: Parameters) -> None:
    """Add w d out / d theta to the gradients of parameters. The graph is freed."""
    if out.requires_grad:
        torch.autograd.backward(out, w, inputs=parameters)


def _stay(tensor: Tensor, block: int) -> Tensor:
    return tensor


def _trainable(parameters: Parameters) -> Parameters:
    return [p for p in parameters if p.requires_grad]


def _no_graph(x: Tensor) -> AbstractContextManager[object]:
    """Under autocast there is one, and it is dropped: a cast weight that was cached without one has no gradient."""
    casts = x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)
    return nullcontext() if casts else torch.no_grad()
