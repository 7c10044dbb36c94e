"""The backward of one GRU or LSTM layer in rounds of one matrix product and one scan; see `fastbp.highway_recurrent`.

The symbols are those of torch's documentation; w_c and w_h are signals, gradients of the loss by c and by h. The pre-
activations of all gates and steps are computed once, in two products; from them follow the factors of K and J.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from fastbp.rounds import coefficients
from fastbp.scan import ReverseScan, forward_scan

Signals = tuple[Tensor, ...]


@dataclass
class LayerRounds:
    """How the layers of one backward are solved.

    Attributes:
        iterations: rounds k; from one less than the number of steps on the plain sum is exact.
        gamma: share of K that counts as J; 1 is fixed-point iteration without a highway.
        lstm_state: `co`: cell state and output gate, `ch`: cell state and output (the paper's table).
        min_residual: whether increments are combined by `fastbp.rounds.coefficients`, and not summed; exact one round
            later. An LSTM's are weighed as signals at c and h, whatever its state.
        growth: where a list, every layer appends to it (rounds,): by how much each round changed w, over its norm.
    """

    iterations: int
    gamma: float = 0.0
    lstm_state: str = "co"
    min_residual: bool = False
    growth: list[Tensor] | None = None


class Cell(ABC):
    """The backward of one layer: what is fixed for all rounds, and a round.

    States and scans are in float32 (float64 for float64 weights), products in the dtype of the forward's.

    Attributes:
        factors: (T, B, gates, hidden), what takes a signal at the gates' outputs to their recurrent pre-activations.
        pushed: (T B, gates hidden), the signals there, in `product_dtype`.
        into: the same at the gates' input pre-activations, once solved.
        keep: (T, B, hidden), K.
        signals: the states' w, (T, B, hidden) each.
    """

    keep: Tensor
    signals: Signals

    def __init__(self, x: Tensor, out: Tensor, weights: list[Tensor], product_dtype: torch.dtype) -> None:
        self.steps, self.batch, self.hidden = out.shape
        self.dtype = torch.promote_types(weights[0].dtype, torch.float32)
        self.product_dtype = product_dtype
        self.input_shape, self.input_dtype, self.weights = x.shape, x.dtype, weights
        self.x = x.reshape(self.steps * self.batch, -1).to(product_dtype)
        before = torch.cat([torch.zeros_like(out[:1]), out[:-1]])  # h_{t-1}
        self.before = before.to(self.dtype)
        self.before_rows = before.flatten(0, 1).to(product_dtype)
        self.recurrent = weights[1].to(product_dtype)
        rows = (functional.linear(a, w, b) for a, w, b in self._products())
        into, back = (part.to(self.dtype).view(self.steps, self.batch, -1, self.hidden) for part in rows)
        self.factors = self._linearise(into, back)
        self.pushed = torch.empty(self.x.shape[0], self.recurrent.shape[0], dtype=product_dtype, device=x.device)
        self.at_gates = self.pushed.view(self.factors.shape)

    def _products(self) -> list[tuple[Tensor, Tensor, Tensor | None]]:
        w_ih, w_hh, *biases = [w.to(self.product_dtype) for w in self.weights]
        b_ih, b_hh = biases or (None, None)
        return [(self.x, w_ih, b_ih), (self.before_rows, w_hh, b_hh)]

    @abstractmethod
    def _linearise(self, into: Tensor, back: Tensor) -> Tensor:
        """From the gates' two pre-activations (T, B, gates, hidden) all that a round needs; returns the factors."""

    @abstractmethod
    def _start(self) -> Signals:
        """The signals along the highway alone."""

    @abstractmethod
    def _push(self) -> None:
        """Fill `pushed` from the signals."""

    @abstractmethod
    def _receive(self, q: Tensor) -> Signals:
        """The next signals; q (T, B, hidden) stands at the step it left and lands on the output of the one before."""

    def solve(self, grad: Tensor, rounds: LayerRounds) -> None:
        """Run all rounds, and leave the final signals at the gates in `pushed` and `into`.

        Args:
            grad: (T, B, hidden), of the loss with respect to every output.
            rounds: how.
        """
        self.g, self.gamma = grad.to(self.dtype).contiguous(), rounds.gamma
        self.scan = ReverseScan((1 - rounds.gamma) * self.keep)
        self.signals = self._start()
        increments, ratios = [self.signals], []
        for _ in range(rounds.iterations):
            self._push()
            before = self.signals
            self.signals = self._receive((self.pushed @ self.recurrent).view(self.g.shape))
            if rounds.min_residual or rounds.growth is not None:
                increment = tuple(new - old for new, old in zip(self.signals, before, strict=True))
                ratios.append(_norm(increment) / _norm(self.signals))
                if rounds.min_residual:
                    increments.append(increment)
        if rounds.growth is not None and ratios:
            rounds.growth.append(torch.stack(ratios))
        if len(increments) > 1:
            self.signals = _combined(increments)
        self._push()
        self.into = self._pushed_into()

    def _pushed_into(self) -> Tensor:
        """The signals at the gates' input pre-activations, (T B, gates hidden)."""
        return self.pushed

    def input_gradient(self) -> Tensor:
        grad = self.into @ self.weights[0].to(self.product_dtype)
        return grad.view(self.input_shape).to(self.input_dtype)

    def weight_gradients(self, wanted: tuple[bool, ...]) -> list[Tensor | None]:
        """Of the input weight, the recurrent weight and their biases, in that order; None where not wanted."""
        into, recurrent = self.into, self.pushed
        grads = [
            into.T @ self.x if wanted[0] else None,
            recurrent.T @ self.before_rows if wanted[1] else None,
            *(
                part.sum(0, dtype=self.dtype) if want else None
                for part, want in zip((into, recurrent), wanted[2:], strict=False)
            ),
        ]
        return [None if g is None else g.to(w.dtype) for g, w in zip(grads, self.weights, strict=True)]


class GRU(Cell):
    """h' = (1-z) n + z h, gates in the order r, z, n; K = diag(z)."""

    def _linearise(self, into: Tensor, back: Tensor) -> Tensor:
        r, z = (into[:, :, :2] + back[:, :, :2]).sigmoid_().unbind(2)
        m = back[:, :, 2]
        n = torch.addcmul(into[:, :, 2], r, m).tanh_()
        self.into_n = (1 - z) * (1 - n * n)
        through_n = self.into_n * r
        self.keep = z.contiguous()
        return torch.stack([through_n * m * (1 - r), (self.before - n) * z * (1 - z), through_n], 2)

    def _start(self) -> Signals:
        return (self.scan(self.g),)

    def _push(self) -> None:
        (w,) = self.signals
        torch.mul(self.factors, w.unsqueeze(2), out=self.at_gates)

    def _receive(self, q: Tensor) -> Signals:
        if self.gamma:
            q = q + self.gamma * self.keep * self.signals[0]
        return (self.scan(self.g, q),)

    def _pushed_into(self) -> Tensor:
        """The reset gate stands between the recurrent product and n, not between the input's and n."""
        into = self.pushed.clone()
        torch.mul(self.into_n, self.signals[0], out=into.view(self.factors.shape)[:, :, 2])
        return into


class LSTM(Cell):
    """c' = f c + i g, h' = o tanh(c'), gates in the order i, f, g, o; the state is (c, o), K = diag(f) on c, 0 on o.

    Signals are kept at c and at h: that at o is the latter times tanh(c).
    """

    def _linearise(self, into: Tensor, back: Tensor) -> Tensor:
        i, f, g, o = into.add_(back).unbind(2)
        i, f, o, g = i.sigmoid(), f.sigmoid(), o.sigmoid(), g.tanh()
        c = forward_scan(i * g, f)
        before = torch.cat([torch.zeros_like(c[:1]), c[:-1]])
        tanh = c.tanh()
        self.keep = f
        self.into_c = o * (1 - tanh * tanh)  # from h to c
        return torch.stack([g * i * (1 - i), before * f * (1 - f), i * (1 - g * g), tanh * o * (1 - o)], 2)

    def _start(self) -> Signals:
        return self.scan(self.g * self.into_c), self.g

    def _push(self) -> None:
        self._push_signals(*self.signals)

    def _push_signals(self, w_c: Tensor, w_h: Tensor) -> None:
        torch.mul(self.factors[:, :, :3], w_c.unsqueeze(2), out=self.at_gates[:, :, :3])
        torch.mul(self.factors[:, :, 3], w_h, out=self.at_gates[:, :, 3])

    def _receive(self, q: Tensor) -> Signals:
        moved = self.gamma * self.keep * self.signals[0] if self.gamma else None
        w_h = _land(self.g, q)
        return self.scan(w_h * self.into_c, moved), w_h


class PaperLSTM(LSTM):
    """The state (c, h): K = 0 on h, so whatever reaches c crossed J, from the loss too; a round is lost."""

    def _start(self) -> Signals:
        return torch.zeros_like(self.g), self.g

    def _push(self) -> None:
        w_c, w_h = self.signals
        self._push_signals(torch.addcmul(w_c, w_h, self.into_c), w_h)

    def _receive(self, q: Tensor) -> Signals:
        w_c, w_h = self.signals
        moved = self.keep * torch.add(w_h * self.into_c, w_c, alpha=self.gamma)
        return self.scan(torch.zeros_like(self.g), moved), _land(self.g, q)


def _land(g: Tensor, q: Tensor) -> Tensor:
    """g[t] + q[t+1]."""
    out = g.clone()
    out[:-1] += q[1:]
    return out


def _combined(increments: list[Signals]) -> Signals:
    """The first plus the others, each times its coefficient."""
    states = [(increment[0], *increment) for increment in increments]  # what stands first is no part of the residual
    total = increments[0]
    for c, increment in zip(coefficients(states), increments[1:], strict=True):
        total = tuple(a + c.to(b.dtype) * b for a, b in zip(total, increment, strict=True))
    return total


def _norm(signals: Signals) -> Tensor:
    return torch.stack([w.norm() for w in signals]).norm()
