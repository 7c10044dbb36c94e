"""Highway-BP over time: the gradient of a GRU or LSTM layer in k rounds of one matrix product and one scan.

A layer's forward is torch's own and keeps nothing but input and output. The backward recomputes all gates at once,
batched over time, and from them the factors of the two Jacobians: K, diagonal, the keep gate (GRU: z; LSTM: f on the
cell state), and J, everything that passes through the recurrent weights. The error signals w of all steps start from
the scan along K; every round pushes them through J in one product and scans again. The parameters' gradients follow
from the last w as in backprop.

To autograd a layer is one function that returns all its outputs; the gradient it gets is that of the loss at every
step. So head, stem, residual sums, loss scaling, accumulation and hooks are as in backprop, and stacked layers are
solved from top to bottom. With rounds for all steps the ordinary backward gives the same gradient, and runs instead.

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

if TYPE_CHECKING:
    from fastbp.methods.highway import HighwayBP

LSTM_STATES = ("co", "ch")


def sees_over_time(model: nn.Module) -> TypeGuard[Recurrent]:
    """Whether the model is a `Recurrent`.

    Raises:
        TypeError: it has recurrent layers, but cannot be seen into.
    """
    if isinstance(model, Recurrent) and type(model).forward is Recurrent.forward:
        return True
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
        loss = self.loss_fn(self.model.compute(x, lambda layer, h: self._run(layer, h, rounds)), y)
        loss.backward()
        return loss, torch.stack(rounds.growth).amax(0) if rounds.growth else None

    def _run(self, layer: nn.Module, h: Tensor, rounds: LayerRounds) -> Tensor:
        steps = self.model.steps
        if steps is not None and len(h) > steps:
            raise ValueError(
                f"HighwayBP: a sequence of {len(h)} steps for a Recurrent with steps={steps}, on which the exact "
                f"number of iterations rests; make it with steps={len(h)}"
            )
        if rounds.iterations >= len(h) - 1 and not self.method.tolerance:  # which decides by what the rounds change
            return layer(h)[0]
        return highway_layer(layer, h, rounds)


def highway_layer(layer: nn.Module, x: Tensor, rounds: LayerRounds) -> Tensor:
    """The outputs (T, B, hidden) of an `nn.GRU` or `nn.LSTM` on x (T, B, features), with Highway-BP as the backward."""
    (weights,) = layer.all_weights  # type: ignore[misc]
    return _Layer.apply(x, layer, rounds, *weights)  # type: ignore[return-value]


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Module, rounds: LayerRounds, *weights: Tensor) -> Tensor:  # type: ignore[override]
        out = layer(x)[0]
        ctx.save_for_backward(x, out, *weights)
        ctx.cell = GRU if isinstance(layer, nn.GRU) else LSTM if rounds.lstm_state == "co" else PaperLSTM
        ctx.rounds = rounds
        kind = x.device.type
        low = torch.is_autocast_enabled(kind) and weights[0].dtype != torch.float64
        ctx.product_dtype = torch.get_autocast_dtype(kind) if low else weights[0].dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, out, *weights = ctx.saved_tensors
        cell: Cell = ctx.cell(x, out, weights, ctx.product_dtype)
        cell.solve(grad, ctx.rounds)
        wanted = ctx.needs_input_grad
        return (cell.input_gradient() if wanted[0] else None, None, None, *cell.weight_gradients(wanted[3:]))
