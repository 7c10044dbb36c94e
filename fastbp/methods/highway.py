"""Highway-BP: backpropagate through all residual blocks at once, k times.

Idea        Start from the gradient through the cheap merges alone; each round adds the paths that cross one more
            branch. After k rounds a block's error signal is the sum over all paths through at most k branches.
Exact when  iterations >= number of blocks (the blocks' own parameters already at one less; not with min_residual).
Needs       Chain of Residual blocks, or a model that `as_chain` can see into; or `fastbp.Recurrent`, a GRU or LSTM
            over time, where a block is a step. Leaf. The plain model, neither in DistributedDataParallel nor in
            torch.compile; activation checkpoints with use_reentrant=False and no batch norm inside.
Cost        Forward as backprop. k rounds of input VJPs of all blocks (parallel over blocks in principle), then one
            pass for the parameters: (k+2)/3 to (k+3)/3 of backprop's FLOPs; `batched` adds one forward of the blocks.
            Memory at depth: backprop's, held longer, plus three states per block (k more with min_residual). Over time,
            in sequences (T, B, hidden) per layer beside input, output and gradient: 11 for a GRU, 14 for an LSTM (16 as
            `ch`), up to 2 more with gamma; with min_residual k + 12 and 2 k + 16 (`ch`: 2 k + 17).
            `devices` share out blocks, weights and memory and all work in a round, launched by one thread; the forward
            goes from one to the next. Speed on several GPUs: not measured.
            Over time a round is one matrix product and one scan for all steps: cheap beside a step-by-step backward. On
            one CPU thread, batch 8, 1024 steps, k = 5, a GRU's training step is 5.6 times as fast as a Python loop's
            and 4.6 times as fast as with torch's own layer at width 16 (cosine to the layer's gradient .96; k = 20:
            3.8, 3.1, 1.00), 2.2 and 1.9 times at width 64 (.82); an LSTM's 9.4 and 0.5 times at width 16, 2.3 and 0.3
            at 64: torch has one kernel for all of its steps there (benchmarks/highway_rnn.py). gamma = 1 with a loss on
            the last step is truncated backprop and works on the last n k + 1 steps of the n-th layer from the top.
            At depth it is slower than backprop on a CPU at every k. The better of the two forms over the better of
            eager and compiled backprop, k = 0, 3, 5: 0.73, 0.52, 0.44 times as fast on a GPT of 24 blocks of width 32
            and 8 tokens; 0.86, 0.38, 0.29 with width 64 and 8 x 64 tokens; 0.94 [0.90, 0.96], 0.47, 0.36 on a
            ResNet-110 (benchmarks/highway_deep.py). Over eager backprop alone `batched` wins on the smallest net: 1.20
            [1.11, 1.45] at k = 0. Cosines after 200 steps, k = 0, 3: .42 to .64, .98 to 1.00; ResNet-110: .08, .42.
Departs     Rounds run as a serial loop over blocks, so on one device every k >= 1 is slower than backprop; with
            `batched`, blocks of equal structure are one call, and `bind` refuses nets without any. Between `devices`
            the scan is walked, one tensor per cut, where log2(devices) hops would do. A round skips blocks whose signal
            is final (w_i after L-i rounds). The scan starts from K_{i+1}, which the paper's printed algorithm
            misindexes. The merge's Jacobian is applied as a VJP, whatever it is; of a post-LN block K is the diagonal
            of its norm, the rest counts as J. A block that downsamples keeps its shortcut as K; a transition without
            one (patch merging, ConvNeXt's downsampling, the first norm of a ResNetV2 stage, a plain layer between
            Residuals) is K whole, J = 0, and differentiated in each of the k + 1 scans. The paper's stream at full
            resolution, where K = I, is `stream: full` among the model_args of resnet20 to resnet110, a net of its own:
            shortcuts average. Its ResNet-110 is `{stream: full, activation: post}`; the ReLU after a sum is part of K.
            Growing iterations, gamma over epochs, tolerance and min_residual are not in the paper; all are off.
Not for     Speed on one device, but over time; LSTMs on a CPU; LSTMs over long times, where steps cancel the stream and
            the error grows before it falls (LSTM of 64, 1024 steps: cosine .89 at k = 10, .41 at 20, where gamma = 1
            has .95): watch `cosine_every`. At k = 20 a GRU of 64 is no nearer with the highway (.96) than without
            (.97). The paper's GPT-2 diverges at gamma = 0 and takes 0.2; within 200 steps no net of highway_deep.py
            comes to that: there gamma = .1 and min_residual are further from the gradient at k = 1 and 3.
            Small nets on one CPU thread, test accuracy in % (sweeps/highway_iterations*.yaml). GRU of 32 over 64 steps,
            5 seeds: backprop 78.3, k = 10 82.2 (+3.9 [-1.7, 9.4]) at 0.84 of its speed, truncated backprop (gamma = 1,
            k = 10) 64.5 at 1.84; k = 0, 1, 2, 5, 10, 20, 3 seeds: 67, 69, 72, 79, 82, 81, and with gamma = 1 52, 56,
            60, 67, 69, 75. ResNet-20, 5 epochs: backprop 35.7, k = 3 34.5 (-1.2 [-3.0, 0.6]) at 0.47 of its speed,
            growing k 35.4 at 0.59, a tolerance 35.7 at 0.33; k = 0, 1, 3, 8, 2 seeds: 31.7, 34.1, 34.4, 34.7, gamma =
            1: 25.7, 27.8, 30.7, 35.1. GPT of 8 blocks, 8 epochs: backprop 27.7, k = 3 27.8 at 0.40, rising gamma 26.2
            (-1.5 [-6.9, 3.9]) at 0.39, min_residual 28.2 at 0.37; gamma up to .2 moves 0.3 at most, gamma = 1 costs 2.6
            to 5.3, 2 seeds.
Reference   Fagnou, Caillon, Delattre, Allauzen (ICLR 2025), arXiv:2501.17086.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Annotated

from torch import Tensor, nn

from fastbp.alike import alike_blocks
from fastbp.chain import Chain, Through, has_residual_path
from fastbp.highway_recurrent import LSTM_STATES, HighwayOverTime, sees_over_time
from fastbp.highway_schedule import ScheduledEstimator
from fastbp.knobs import Choice, IntRange, nearest, require
from fastbp.method import EpochPlan, GradientEstimator, LossFn, Method
from fastbp.placed import Placement, gathered
from fastbp.rounds import min_residual, sum_of_increments
from fastbp.tapes import BlockPlan, Tapes
from fastbp.views import as_chain

_COMBINATIONS = ("sum", "min_residual")


@dataclass(frozen=True)
class HighwayBP(Method):
    """Iterated gradient propagation along the residual path (arXiv:2501.17086, section 3).

    Attributes:
        iterations: rounds k >= 0; the gradient contains all paths that cross at most k branches. 3 to 5 in the paper's
            deep nets; over time 3 with a loss at every step, 10 with one at the end of 1024. Late training needs more.
        gamma: share in [0, 1] of the merge's Jacobian that is moved into the branch; any value gives the same
            gradient at full iterations, 1 is fixed-point iteration (FPI, Wang and Ragni 2021), without a highway. The
            paper: 0 for ResNets, 0.2 for GPT-2, 0.8 for RoBERTa.
        growing_epochs: over so many epochs k rises in equal steps up to `iterations`; 0: constant from the start.
        gamma_epochs: over so many epochs gamma rises in equal steps from 0; 0: constant from the start.
        exact_from: from this epoch on (the first is 0), steps are plain backprop; 0: never.
        tolerance: the next epoch's k is the first round of which the increment was smaller than this times the sum so
            far, when last looked at, in every 100th step of this epoch; `iterations` where none was. 0: off.
        combination: of the increments of the rounds: their `sum` (the paper), or the combination with the smallest
            residual of the adjoint equation (`min_residual`).
        batched: whether blocks of equal structure (linear layers, layer norms, activations, attention) run as one call
            per round: the same sums in another order. It pays where a block is too small to fill the device. Without
            dropout; an error where no two blocks are equal.
        lstm_state: of an LSTM over time, what one step hands to the next: `co`, cell state and output gate, or `ch`,
            cell state and output (the paper), which wastes a round. Other nets do not have it.
        devices: names of torch devices; each takes an equal share of consecutive blocks, the first the stem too, the
            last the head; None: all where the model is. In a round all of them work at the same time. Over every cut
            one tensor crosses in the forward and one back in each of the k + 1 scans; sums keep their order.
        cosine_every: compare the gradient with backprop's (cosine, relative error) every so many steps, for which the
            batch runs once more, in the seconds but not in the FLOPs of a run; 0: never. A cosine that falls in
            training wants more iterations.
    """

    iterations: Annotated[int, IntRange(0, 8)] = 4
    gamma: Annotated[float, Choice((0.0, 0.05, 0.1, 0.2, 0.5, 0.8))] = 0.0
    growing_epochs: Annotated[int, IntRange(0, 10)] = 0
    gamma_epochs: Annotated[int, IntRange(0, 10)] = 0
    exact_from: int = 0
    tolerance: Annotated[float, Choice((0.0, 0.01, 0.03, 0.1, 0.3))] = 0.0
    combination: Annotated[str, Choice(_COMBINATIONS)] = "sum"
    batched: bool = False
    lstm_state: Annotated[str, Choice(LSTM_STATES)] = "co"
    devices: tuple[str, ...] | None = None
    cosine_every: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.devices, list):
            object.__setattr__(self, "devices", tuple(self.devices))
        require(self, "iterations", self.iterations >= 0, "must be 0 or more; the number of blocks is exact")
        require(self, "gamma", 0 <= self.gamma <= 1, "must be in [0, 1]")
        require(self, "growing_epochs", self.growing_epochs >= 0, "must not be negative; 0 is constant iterations")
        require(self, "gamma_epochs", self.gamma_epochs >= 0, "must not be negative; 0 is constant gamma")
        require(self, "exact_from", self.exact_from >= 0, "must not be negative; 0 is never")
        require(self, "cosine_every", self.cosine_every >= 0, "must not be negative; 0 is never")
        require(self, "tolerance", self.tolerance >= 0, "must not be negative; 0 runs all iterations")
        known = f"must be one of {', '.join(_COMBINATIONS)}{nearest(self.combination, _COMBINATIONS)}"
        require(self, "combination", self.combination in _COMBINATIONS, known)
        states = f"must be one of {', '.join(LSTM_STATES)}{nearest(self.lstm_state, LSTM_STATES)}"
        require(self, "lstm_state", self.lstm_state in LSTM_STATES, states)
        named = isinstance(self.devices, tuple) and self.devices and all(isinstance(name, str) for name in self.devices)
        rule = "must be names of torch devices, at least one, such as ('cuda:0', 'cuda:1'); None is where the model is"
        require(self, "devices", self.devices is None or bool(named), rule)

    def bind(self, model: nn.Module, loss_fn: LossFn) -> GradientEstimator:
        has_it = self.lstm_state == "co" or any(isinstance(module, nn.LSTM) for module in model.modules())
        require(self, "lstm_state", has_it, f"this {type(model).__name__} has no nn.LSTM; omit it")
        if sees_over_time(model):
            rule = f"the steps of a {type(model).__name__} are one product in any case; omit it"
            require(self, "batched", not self.batched, rule)
            rule = f"the steps of a {type(model).__name__} share their weights and stay on one device; omit it"
            require(self, "devices", self.devices is None, rule)
            return HighwayOverTime(self, model, loss_fn)
        chain = as_chain(model)
        if not any(has_residual_path(b) and type(b.merge) is not Through for b in chain.residuals()):
            raise TypeError(
                f"HighwayBP: no block of this {type(model).__name__} has a residual path, so no gradient would travel "
                "between blocks; pass a fastbp.Chain of Residual blocks"
            )
        rule = (
            f"no two blocks of this {type(model).__name__} can run as one call: that takes equal branches of linear "
            "layers, layer norms, activations and attention, without dropout, added to their input; omit it"
        )
        require(self, "batched", not self.batched or bool(alike_blocks(chain.residuals())), rule)
        return _HighwayBP(self, model, chain, loss_fn)

    def exact(self, model: nn.Module) -> HighwayBP | None:
        length = model.steps if sees_over_time(model) else len(as_chain(model).blocks)
        return None if length is None else replace(self, iterations=length, growing_epochs=0, tolerance=0.0)


class _HighwayBP(ScheduledEstimator):
    def __init__(self, method: HighwayBP, model: nn.Module, chain: Chain, loss_fn: LossFn) -> None:
        super().__init__(method, model, loss_fn, len(chain.blocks))
        self.chain = chain
        self.placement = Placement(chain, method.devices)
        self.devices = self.placement.devices
        self.combine = sum_of_increments if method.combination == "sum" else min_residual
        self.plan: BlockPlan | None = None  # made late: other methods may still change the layers

    def start_epoch(self, epoch: int) -> EpochPlan:
        self.plan = None
        return super().start_epoch(epoch)

    def backward(self, x: Tensor, y: Tensor) -> Tensor:
        return super().backward(self.placement.carry(x, 0), self.placement.carry(y, -1))

    def forward(self, x: Tensor) -> Tensor:
        return self.placement.forward(x) if self.devices else super().forward(x)

    def estimate(self, x: Tensor, y: Tensor, iterations: int, measure: bool) -> tuple[Tensor, Tensor | None]:
        if self.plan is None:
            blocks, carry = self.chain.residuals(), self.placement.carry
            self.plan = BlockPlan(blocks, batched=self.method.batched, carry=carry)
        h0 = self.chain.stem(x)
        tapes = Tapes(self.plan, h0, self.schedule.gamma)
        last = tapes.last.requires_grad_()
        loss = self.loss_fn(self.chain.head(last), y)
        loss.backward()
        if last.grad is None:
            raise TypeError("HighwayBP: the loss does not depend on the last block's output")
        w, ratios = self.combine(tapes, last.grad, iterations, measure=measure)
        tapes.accumulate(w)
        if h0.requires_grad:
            h0.backward(w[0])
        return loss, ratios

    def whole(self) -> AbstractContextManager[nn.Module]:
        return gathered(self.model, self.devices)

    def finalize(self) -> nn.Module:
        if self.devices:
            self.model.to(self.devices[0])
        return super().finalize()
