"""Highway-BP over time: the gradient of a GRU or LSTM layer in k rounds of one matrix product and one scan.

A layer's forward is torch's own and keeps nothing but input and output. The backward recomputes all gates at once,
batched over time, and from them the factors of the two Jacobians: K, diagonal, the keep gate (GRU: z; LSTM: f on the
cell state), and J, everything that passes through the recurrent weights. The error signals w of all steps start from
the scan along K; every round pushes them through J in one product and scans again. The parameters' gradients follow
from the last w as in backprop.

To autograd a layer is one function that returns all its outputs; the gradient it gets is that of the loss at every
step. So head, stem, residual sums, loss scaling, accumulation and hooks are as in backprop, and stacked layers are
solved from top to bottom. With rounds for all steps the ordinary backward gives the same gradient, and runs instead.

Without a highway (gamma = 1) a round takes a signal one step back and leaves nothing where it was. With a loss on the
last step alone, the n-th layer from the top then has signals at the last n k + 1 steps only, and works on these: that
is truncated backpropagation, at its price.

Reference: Fagnou, Caillon, Delattre, Allauzen (ICLR 2025), arXiv:2501.17086.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastbp.cell_rounds import GRU, LSTM, Cell, LayerRounds, PaperLSTM
from fastbp.chain import Chain
from fastbp.highway_schedule import ScheduledEstimator
from fastbp.method import LossFn
from fastbp.recurrent import Recurrent
from fastbp.units import unwrapped
from fastbp.view_parts import refuse_wrapped

if TYPE_CHECKING:
    from fastbp.methods.highway import HighwayBP

LSTM_STATES = ("co", "ch")


def sees_over_time(model: nn.Module) -> TypeGuard[Recurrent]:
    """Whether the model is a `Recurrent`.

    Raises:
        TypeError: it has recurrent layers, but cannot be seen into, or is a `Recurrent` that something wraps.
    """
    if isinstance(model, Recurrent):
        kind = type(model)
        if kind.forward is Recurrent.forward and kind.compute is Recurrent.compute:
            return True
    inside = model.module if isinstance(model, nn.DataParallel) else unwrapped(model)
    if isinstance(inside, Recurrent) and inside is not model:
        past = f"HighwayBP runs the layers of a Recurrent itself, past this {type(model).__name__}"
        refuse_wrapped(model, past, "Recurrent")
    if not isinstance(model, Chain | nn.Sequential) and any(isinstance(m, nn.RNNBase) for m in model.modules()):
        raise TypeError(
            f"HighwayBP cannot see into the recurrent layers of this {type(model).__name__}; "
            "pass a fastbp.Recurrent(stem, layers, head, last_step=...)"
        )
    return False


class HighwayOverTime(ScheduledEstimator):
    """Highway-BP bound to a `Recurrent`."""

    model: Recurrent

    def __init__(self, method: HighwayBP, model: Recurrent, loss_fn: LossFn) -> None:
        super().__init__(method, model, loss_fn, model.steps)

    def estimate(self, x: Tensor, y: Tensor, iterations: int, measure: bool) -> tuple[Tensor, Tensor | None]:
        method, growth = self.method, [] if measure else None
        best = method.combination == "min_residual"
        rounds = LayerRounds(iterations, self.schedule.gamma, method.lstm_state, best, growth)
        reaches = bool(self.model.last_step) and rounds.gamma == 1
        above = iter(reversed(range(len(self.model.layers))))  # layers, each of which reaches k steps back

        def run(layer: nn.Module, h: Tensor) -> Tensor:
            back = next(above) * iterations
            return self._run(layer, h, rounds, max(0, len(h) - 1 - back) if reaches else 0)

        loss = self.loss_fn(self.model.compute(x, run), y)
        loss.backward()
        return loss, torch.stack(rounds.growth).amax(0) if rounds.growth else None

    def _run(self, layer: nn.Module, h: Tensor, rounds: LayerRounds, first: int) -> Tensor:
        steps = self.model.steps
        if steps is not None and len(h) > steps:
            raise ValueError(
                f"HighwayBP: a sequence of {len(h)} steps for a Recurrent with steps={steps}, on which the exact "
                f"number of iterations rests; make it with steps={len(h)}"
            )
        if rounds.iterations >= len(h) - 1 and not self.method.tolerance:  # which decides by what the rounds change
            return layer(h)[0]
        return highway_layer(layer, h, rounds, first)


def highway_layer(layer: nn.Module, x: Tensor, rounds: LayerRounds, first: int = 0) -> Tensor:
    """The outputs (T, B, hidden) of an `nn.GRU` or `nn.LSTM` on x (T, B, features), with Highway-BP as the backward.

    Args:
        layer, x: as above.
        rounds: how.
        first: the first step whose output has a gradient; that of those before is taken to be zero with gamma = 1.
    """
    (weights,) = layer.all_weights  # type: ignore[misc]
    begin = max(0, first - rounds.iterations) if rounds.gamma == 1 else 0
    return _Layer.apply(x, layer, rounds, begin, *weights)  # type: ignore[return-value]


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, layer: nn.Module, rounds: LayerRounds, begin: int, *weights: Tensor
    ) -> Tensor:
        out, c_before = layer(x)[0], None
        if begin and isinstance(layer, nn.LSTM):
            c_before = layer.forward(x[:begin])[1][1][0]  # dearer to find afterwards
        ctx.save_for_backward(x, out, c_before, *weights)
        ctx.cell = GRU if isinstance(layer, nn.GRU) else LSTM if rounds.lstm_state == "co" else PaperLSTM
        ctx.rounds, ctx.begin = rounds, begin
        kind = x.device.type
        low = torch.is_autocast_enabled(kind) and weights[0].dtype != torch.float64
        ctx.product_dtype = torch.get_autocast_dtype(kind) if low else weights[0].dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, out, c_before, *weights = ctx.saved_tensors
        cell: Cell = ctx.cell(x, out, weights, ctx.product_dtype, ctx.begin, c_before)
        cell.solve(grad, ctx.rounds)
        wanted = ctx.needs_input_grad
        of_x, *of_weights = cell.gradients((wanted[0], *wanted[4:]))
        return (of_x, None, None, None, *of_weights)
