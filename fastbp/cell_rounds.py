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

    States and scans are in float32 (float64 for float64 weights), products in the dtype of the forward's. What is large
    is made in place of what is no longer needed: a (T, B, hidden) more is one that the longest sequence pays for.

    Args:
        x, out: (T, B, features) and (T, B, hidden), of the forward.
        weights: as in `all_weights`.
        product_dtype: of the forward's products.
        begin: the first step to work on; all signals at those before are zero.
        c_before: (B, hidden), an LSTM's cell state before that step; None for zero.

    Attributes:
        factors: (steps, B, gates, hidden), what takes a signal to the gates' recurrent pre-activations.
        pushed: (steps B, gates hidden), the signals there, in `product_dtype`.
        keep: (steps, B, hidden), K; until it is solved.
        share: what of K counts as J; None for nothing.
        signals: the states' w, (steps, B, hidden) each.
    """

    keep: Tensor
    signals: Signals

    def __init__(
        self,
        x: Tensor,
        out: Tensor,
        weights: list[Tensor],
        product_dtype: torch.dtype,
        begin: int = 0,
        c_before: Tensor | None = None,
    ) -> None:
        self.x, self.out, self.weights = x, out, weights
        self.begin, self.c_before = begin, c_before
        self.dtype = torch.promote_types(weights[0].dtype, torch.float32)
        self.product_dtype = product_dtype
        self.recurrent = weights[1].to(product_dtype)
        self.factors = self._linearise()

    def _before(self) -> Tensor:
        """h_{t-1}, (steps, B, hidden)."""
        if self.begin:
            return self.out[self.begin - 1 : -1]
        return torch.cat([torch.zeros_like(self.out[:1]), self.out[:-1]])

    def _rows(self, steps: Tensor) -> Tensor:
        """(steps, B, n) as an operand of a product, (steps B, n)."""
        return steps.flatten(0, 1).to(self.product_dtype)

    def _pre_activations(self) -> tuple[Tensor, Tensor]:
        """The input's and the recurrent part of every gate, (steps, B, gates, hidden)."""
        w_ih, w_hh, *biases = [w.to(self.product_dtype) for w in self.weights]
        b_ih, b_hh = biases or (None, None)
        shape = (*self.out[self.begin :].shape[:2], -1, self.out.shape[2])
        into = functional.linear(self._rows(self.x[self.begin :]), w_ih, b_ih).to(self.dtype)
        back = functional.linear(self._rows(self._before()), w_hh, b_hh).to(self.dtype)
        return into.view(shape), back.view(shape)

    @abstractmethod
    def _linearise(self) -> Tensor:
        """From the gates' pre-activations all that a round needs; returns the factors."""

    @abstractmethod
    def _start(self) -> Signals:
        """The signals along the highway alone."""

    @abstractmethod
    def _push(self) -> None:
        """Fill `pushed` from the signals."""

    @abstractmethod
    def _receive(self) -> Signals:
        """The next signals from `pushed`; lets go of the old ones as soon as they are not needed."""

    def _crossed(self) -> Tensor:
        """`pushed` through the recurrent weights, (steps, B, hidden).

        It stands at the step it left and lands on the output of the one before.
        """
        return (self.pushed @ self.recurrent).view(self.g.shape)

    def solve(self, grad: Tensor, rounds: LayerRounds) -> None:
        """Run all rounds, and leave the final signals at the recurrent pre-activations in `pushed`.

        Args:
            grad: (T, B, hidden), of the loss with respect to every output.
            rounds: how.
        """
        self.g, self.gamma = grad[self.begin :].to(self.dtype).contiguous(), rounds.gamma
        self.scan = ReverseScan((1 - rounds.gamma) * self.keep)
        self.share = rounds.gamma * self.keep if rounds.gamma else None
        del self.keep
        steps, batch, gates, hidden = self.factors.shape
        self.pushed = self.factors.new_empty(steps * batch, gates * hidden, dtype=self.product_dtype)
        self.at_gates = self.pushed.view(self.factors.shape)
        self.signals = self._start()
        increments, ratios = [self.signals] if rounds.min_residual else [], []
        watched = rounds.min_residual or rounds.growth is not None
        for _ in range(rounds.iterations):
            increment = self._round(watched)
            if rounds.growth is not None:
                ratios.append(_norm(increment) / _norm(self.signals))
            if rounds.min_residual:
                increments.append(increment)
        del self.scan, self.share
        if ratios and rounds.growth is not None:
            rounds.growth.append(torch.stack(ratios))
        if len(increments) > 1:
            self.signals = ()
            self.signals = _combined(increments)
        self._push()

    def _round(self, watched: bool) -> Signals:
        """The next signals; returns by how much they changed, where that is asked for."""
        self._push()
        before = self.signals if watched else ()
        self.signals = self._receive()
        return tuple(new - old for new, old in zip(self.signals, before, strict=True)) if watched else ()

    def gradients(self, wanted: tuple[bool, ...]) -> list[Tensor | None]:
        """Of x, the input weight, the recurrent weight and their biases, in that order; None where not wanted."""
        wanted = (*wanted, False, False)  # there may be no biases
        recurrent = self.pushed.T @ self._rows(self._before()) if wanted[2] else None
        recurrent_bias = self.pushed.sum(0, dtype=self.dtype) if wanted[4] else None
        into = self._pushed_into()
        grads = [
            into.T @ self._rows(self.x[self.begin :]) if wanted[1] else None,
            recurrent,
            into.sum(0, dtype=self.dtype) if wanted[3] else None,
            recurrent_bias,
        ]
        by_weight = [None if g is None else g.to(w.dtype) for g, w in zip(grads, self.weights, strict=False)]
        return [self._input_gradient(into) if wanted[0] else None, *by_weight]

    def _pushed_into(self) -> Tensor:
        """The signals at the gates' input pre-activations, (steps B, gates hidden), in place of `pushed`."""
        return self.pushed

    def _input_gradient(self, into: Tensor) -> Tensor:
        grad = (into @ self.weights[0].to(self.product_dtype)).to(self.x.dtype)
        if not self.begin:
            return grad.view(self.x.shape)
        whole = self.x.new_zeros(self.x.shape)
        whole[self.begin :] = grad.view(-1, *self.x.shape[1:])
        return whole


class GRU(Cell):
    """h' = (1-z) n + z h, gates in the order r, z, n; K = diag(z)."""

    def _linearise(self) -> Tensor:
        into, back = self._pre_activations()
        into[:, :, :2].add_(back[:, :, :2]).sigmoid_()
        r, z, n = into.unbind(2)
        at_r, at_z, m = back.unbind(2)
        n.addcmul_(r, m).tanh_()
        self.keep = z.clone(memory_format=torch.contiguous_format)
        _one_minus_(z)
        self.into_n = _one_minus_(n * n).mul_(z)
        through_n = torch.mul(self.into_n, r, out=at_z)
        torch.mul(through_n, m, out=at_r).mul_(_one_minus_(r))
        m.copy_(through_n)
        torch.sub(self._before(), n, out=at_z).mul_(self.keep).mul_(z)
        return back

    def _start(self) -> Signals:
        return (self.scan(self.g),)

    def _push(self) -> None:
        (w,) = self.signals
        torch.mul(self.factors, w.unsqueeze(2), out=self.at_gates)

    def _receive(self) -> Signals:
        q = self._crossed()
        if self.share is not None:
            q = q.to(self.dtype).add_(self.share * self.signals[0])
        self.signals = ()
        return (self.scan(self.g, q),)

    def _pushed_into(self) -> Tensor:
        """The reset gate stands between the recurrent product and n, not between the input's and n."""
        torch.mul(self.into_n, self.signals[0], out=self.at_gates[:, :, 2])
        return self.pushed


class LSTM(Cell):
    """c' = f c + i g, h' = o tanh(c'), gates in the order i, f, g, o; the state is (c, o), K = diag(f) on c, 0 on o.

    Signals are kept at c and at h: that at o is the latter times tanh(c).
    """

    def _linearise(self) -> Tensor:
        gates, back = self._pre_activations()
        gates.add_(back)
        gates[:, :, :2].sigmoid_()
        gates[:, :, 2].tanh_()
        gates[:, :, 3].sigmoid_()
        i, f, g, o = gates.unbind(2)
        c = self._cell_states(i * g, f)
        self.keep = f.clone(memory_format=torch.contiguous_format)
        torch.mul(c[:-1], self.keep, out=f).mul_(1 - self.keep)
        tanh = c[1:].tanh_()
        self.into_c = _one_minus_(tanh * tanh).mul_(o)  # from h to c
        off = 1 - o
        o.mul_(tanh).mul_(off)
        off = torch.sub(1, i, out=off)
        through_g = _one_minus_(g * g).mul_(i)
        i.mul_(g).mul_(off)
        g.copy_(through_g)
        return gates

    def _cell_states(self, into: Tensor, f: Tensor) -> Tensor:
        """c before the first step, and after each, from what is added in it; that is used up."""
        before = torch.zeros_like(into[:1])
        if self.c_before is not None:
            before += self.c_before
            into[0].addcmul_(f[0], before[0])
        return torch.cat([before, forward_scan(into, f)])

    def _start(self) -> Signals:
        return self.scan(self.g * self.into_c), self.g

    def _push(self) -> None:
        self._push_signals(*self.signals)

    def _push_signals(self, w_c: Tensor, w_h: Tensor) -> None:
        torch.mul(self.factors[:, :, :3], w_c.unsqueeze(2), out=self.at_gates[:, :, :3])
        torch.mul(self.factors[:, :, 3], w_h, out=self.at_gates[:, :, 3])

    def _receive(self) -> Signals:
        moved = None if self.share is None else self.share * self.signals[0]
        self.signals = ()
        w_h = _land(self.g, self._crossed())
        return self.scan(w_h * self.into_c, moved), w_h


class PaperLSTM(LSTM):
    """The state (c, h): K = 0 on h, so whatever reaches c crossed J, from the loss too; a round is lost."""

    def _linearise(self) -> Tensor:
        factors = super()._linearise()
        self.f = self.keep
        return factors

    def _start(self) -> Signals:
        return torch.zeros_like(self.g), self.g

    def _push(self) -> None:
        w_c, w_h = self.signals
        self._push_signals(torch.addcmul(w_c, w_h, self.into_c), w_h)

    def _receive(self) -> Signals:
        w_c, w_h = self.signals
        moved = torch.add(w_h * self.into_c, w_c, alpha=self.gamma).mul_(self.f)
        self.signals = ()
        del w_c, w_h
        return self.scan(torch.zeros_like(self.g), moved), _land(self.g, self._crossed())


def _one_minus_(t: Tensor) -> Tensor:
    """In place."""
    return t.neg_().add_(1)


def _land(g: Tensor, q: Tensor) -> Tensor:
    """g[t] + q[t+1]."""
    out = g.clone()
    out[:-1] += q[1:]
    return out


def _combined(increments: list[Signals]) -> Signals:
    """The first plus the others, each times its coefficient; the list is used up."""
    # what stands first is no part of the residual
    found = coefficients([(increment[0], *increment) for increment in increments]).unbind()
    first, second = increments[:2]
    total = tuple(a + found[0].to(b.dtype) * b for a, b in zip(first, second, strict=True))
    del increments[:2], first, second
    for c, increment in zip(found[1:], increments, strict=True):
        for a, b in zip(total, increment, strict=True):
            a.add_(c.to(b.dtype) * b)
    return total


def _norm(signals: Signals) -> Tensor:
    return torch.stack([w.norm() for w in signals]).norm()
