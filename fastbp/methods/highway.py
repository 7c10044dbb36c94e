"""Highway-BP: backpropagate through all residual blocks at once, k times.

Idea        Start from the gradient through the cheap merges alone; each round adds the paths that cross one more
            branch. After k rounds a block's error signal is the sum over all paths through at most k branches.
Exact when  iterations >= number of blocks (the blocks' own parameters already at one less).
Needs       Chain of Residual blocks, or a model that `as_chain` can see into. Leaf.
Cost        Forward as backprop. k rounds of input VJPs of all blocks (parallel over blocks in principle), then one
            pass for the parameters: about (k+3)/3 of backprop's FLOPs. Memory: backprop's, held longer.
Departs     Rounds run as a serial loop over blocks here, so every k >= 1 is slower than backprop; a round skips blocks
            whose signal is final already (w_i after L-i rounds). The scan starts from K_{i+1}, which the paper's
            printed algorithm misindexes. The merge's Jacobian is applied as a VJP, whatever it is.
Not for     Speed on one device as it stands; late training of transformers at small k, where blocks cancel the stream
            and the error grows before it falls (raise gamma).
Reference   Fagnou, Caillon, Delattre, Allauzen (ICLR 2025), arXiv:2501.17086.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

import torch
from torch import Tensor, nn

from fastbp.chain import Add, Chain, Residual, has_residual_path
from fastbp.knobs import Choice, IntRange, require
from fastbp.method import GradientEstimator, LossFn, Method
from fastbp.views import as_chain


@dataclass(frozen=True)
class HighwayBP(Method):
    """Iterated gradient propagation along the residual path (arXiv:2501.17086, section 3).

    Attributes:
        iterations: rounds k >= 0; the gradient contains all paths that cross at most k branches. 3 to 5 in the
            paper's deep nets.
        gamma: share in [0, 1] of the merge's Jacobian that is moved into the branch; any value gives the same
            gradient at full iterations, 1 is fixed-point iteration without a highway. The paper: 0 for ResNets, 0.2
            for GPT-2, 0.8 for RoBERTa.
    """

    iterations: Annotated[int, IntRange(0, 8)] = 4
    gamma: Annotated[float, Choice((0.0, 0.1, 0.2, 0.5))] = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "iterations", self.iterations >= 0, "must be 0 or more; the number of blocks is exact")
        require(self, "gamma", 0 <= self.gamma <= 1, "must be in [0, 1]")

    def bind(self, model: nn.Module, loss_fn: LossFn) -> GradientEstimator:
        chain = as_chain(model)
        if not any(has_residual_path(block) for block in chain.residuals()):
            raise TypeError(
                f"HighwayBP: no block of this {type(model).__name__} has a residual path, so no gradient would travel "
                "between blocks; pass a fastbp.Chain of Residual blocks"
            )
        return _HighwayBP(self, model, chain, loss_fn)

    def exact(self, model: nn.Module) -> HighwayBP:
        return replace(self, iterations=len(as_chain(model).blocks))


class _Tape:
    """One block's forward, kept so that its two Jacobians can be applied any number of times.

    The layer is h = merge(x, z) with z = branch(x). K = d merge / d x at fixed z; J = d merge / d z . d branch / d x.
    """

    def __init__(self, block: Residual, x: Tensor) -> None:
        self.block = block
        self.x = x.detach().requires_grad_()  # read by the branch
        self.z = block.branch(self.x)
        self.skip = x.detach().requires_grad_()  # read by the merge
        self.z_in = self.z.detach().requires_grad_()
        self.h = block.merge(self.skip, self.z_in)

    def along_merge(self, w: Tensor) -> Tensor:
        """w K: past the branch; zero where the merge does not read the block's input."""
        if type(self.block.merge) is Add:
            return w
        (dx,) = torch.autograd.grad(self.h, self.skip, w, retain_graph=True, allow_unused=True)
        return torch.zeros_like(self.skip) if dx is None else dx

    def into_branch(self, w: Tensor) -> Tensor | None:
        """w d merge/dz: at the branch's output; None where the merge does not read it."""
        if type(self.block.merge) is Add:
            return w
        (dz,) = torch.autograd.grad(self.h, self.z_in, w, retain_graph=True, allow_unused=True)
        return dz

    def through_branch(self, dz: Tensor) -> Tensor:
        """The product dz d branch / d x."""
        (dx,) = torch.autograd.grad(self.z, self.x, dz, retain_graph=True, allow_unused=True)
        return torch.zeros_like(self.x) if dx is None else dx

    def accumulate(self, w: Tensor, dz: Tensor | None) -> None:
        """Add w dh/d theta to the parameters' gradients, of the branch and of the merge; frees the tape."""
        branch, merge = _trainable(self.block.branch), _trainable(self.block.merge)
        if branch and dz is not None:
            torch.autograd.backward(self.z, dz, inputs=branch, retain_graph=False)
        if merge:
            torch.autograd.backward(self.h, w, inputs=merge, retain_graph=False)


class _HighwayBP(GradientEstimator):
    def __init__(self, method: HighwayBP, model: nn.Module, chain: Chain, loss_fn: LossFn) -> None:
        self.method = method
        self.model = model
        self.chain = chain
        self.loss_fn = loss_fn

    def backward(self, x: Tensor, y: Tensor) -> Tensor:
        h0 = self.chain.stem(x)
        tapes: list[_Tape] = []
        h = h0
        for block in self.chain.residuals():
            tapes.append(_Tape(block, h))
            h = tapes[-1].h
        last = h.detach().requires_grad_()
        loss = self.loss_fn(self.chain.head(last), y)
        loss.backward()
        if last.grad is None:
            raise TypeError("HighwayBP: the loss does not depend on the last block's output")
        w = highway_gradients(tapes, last.grad, self.method.iterations, self.method.gamma)
        for tape, w_i in zip(tapes, w[1:], strict=True):
            if _trainable(tape.block):
                tape.accumulate(w_i, tape.into_branch(w_i))
        if h0.requires_grad:
            h0.backward(w[0])
        return loss.detach()


def highway_gradients(tapes: list[_Tape], g: Tensor, iterations: int, gamma: float) -> list[Tensor]:
    """The error signals w_0 .. w_L after k rounds, for a loss that reads the last state alone.

    With v_i = w_{i+1} J_{i+1} (v_L = 0), each round is one reverse scan w = scan(g + v),
    scan(a)_i = a_i + scan(a)_{i+1} K_{i+1}. Gamma splits K into (1-gamma) K, kept, and gamma K, moved to J.

    Args:
        tapes: one per block.
        g: gradient of the loss with respect to the last state.
        iterations: rounds k; w_i is final after L - i of them, later rounds leave it alone.
        gamma: share of K that counts as branch.

    Returns:
        L + 1 tensors with the shapes of the states.
    """
    blocks = len(tapes)
    w: list[Tensor] = [g] * (blocks + 1)
    for i in reversed(range(blocks)):  # round 0: the highway alone
        w[i] = _keep(tapes[i], w[i + 1], gamma)
    for done in range(min(iterations, blocks)):
        crossed = [_cross(tapes[i], w[i + 1], gamma) for i in range(blocks - done)]  # all from the old w: parallel
        for i in reversed(range(blocks - done)):
            w[i] = crossed[i] + _keep(tapes[i], w[i + 1], gamma)
    return w


def _keep(tape: _Tape, w: Tensor, gamma: float) -> Tensor:
    """w (1-gamma) K."""
    kept = tape.along_merge(w)
    return kept if gamma == 0 else (1 - gamma) * kept


def _cross(tape: _Tape, w: Tensor, gamma: float) -> Tensor:
    """w (J + gamma K)."""
    dz = tape.into_branch(w)
    crossed = torch.zeros_like(tape.x) if dz is None else tape.through_branch(dz)
    return crossed if gamma == 0 else crossed + gamma * tape.along_merge(w)


def _trainable(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]
