"""Highway-BP over time as a sum over paths, from dense Jacobians of cells written out by hand; for tiny nets.

A cell is a merge `r(s, z)` of the state before, s, with the branch `z = phi(s, x)`; states are (parts, B, hidden).
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.autograd.functional import jacobian

from fastbp.recurrent import Recurrent
from reference.highway import path_sum


def scan(x: Tensor, k: Tensor) -> Tensor:
    """y[t] = x[t] + k[t+1] y[t+1], one step after another."""
    y = [x[-1]]
    for t in range(len(x) - 2, -1, -1):
        y.insert(0, x[t] + k[t + 1] * y[0])
    return torch.stack(y)


def gates(h: Tensor, x: Tensor, weights: list[Tensor], count: int) -> tuple[Tensor, Tensor]:
    W, U, *b = weights
    b_i, b_h = b or (torch.zeros(len(W), dtype=W.dtype), torch.zeros(len(W), dtype=W.dtype))
    return (x @ W.T + b_i).unflatten(-1, (count, -1)), (h @ U.T + b_h).unflatten(-1, (count, -1))


class GRU:
    parts = 1

    @staticmethod
    def phi(s: Tensor, x: Tensor, weights: list[Tensor]) -> Tensor:
        into, back = gates(s[0], x, weights, 3)
        r, z = torch.sigmoid(into[:, 0] + back[:, 0]), torch.sigmoid(into[:, 1] + back[:, 1])
        n = torch.tanh(into[:, 2] + r * back[:, 2])
        return torch.stack([z, (1 - z) * n])

    @staticmethod
    def r(s: Tensor, z: Tensor) -> Tensor:
        return z[:1] * s + z[1:]

    @staticmethod
    def read(s: Tensor) -> Tensor:
        return s[0]


def lstm_gates(h: Tensor, x: Tensor, weights: list[Tensor]) -> tuple[Tensor, ...]:
    into, back = gates(h, x, weights, 4)
    i, f, g, o = (into + back).unbind(1)
    return i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()


class LSTMco:
    """State (c, o); the output o tanh(c) is made in the next cell, and in the loss."""

    parts = 2

    @staticmethod
    def phi(s: Tensor, x: Tensor, weights: list[Tensor]) -> Tensor:
        i, f, g, o = lstm_gates(LSTMco.read(s), x, weights)
        return torch.stack([f, i * g, o])

    @staticmethod
    def r(s: Tensor, z: Tensor) -> Tensor:
        return torch.stack([z[0] * s[0] + z[1], z[2]])

    @staticmethod
    def read(s: Tensor) -> Tensor:
        return s[1] * s[0].tanh()


class LSTMch:
    """State (c, h), the paper's table."""

    parts = 2

    @staticmethod
    def phi(s: Tensor, x: Tensor, weights: list[Tensor]) -> Tensor:
        i, f, g, o = lstm_gates(s[1], x, weights)
        return torch.stack([f, i * g, o * torch.tanh(f * s[0] + i * g)])

    @staticmethod
    def r(s: Tensor, z: Tensor) -> Tensor:
        return torch.stack([z[0] * s[0] + z[1], z[2]])

    @staticmethod
    def read(s: Tensor) -> Tensor:
        return s[1]


def layer_signals(
    cell: type, x: Tensor, weights: list[Tensor], G: Tensor, k: int, gamma: float
) -> tuple[list[Tensor], list[Tensor]]:
    """The signals w_1 .. w_T after k rounds, and the states s_0 .. s_T; G (T, B, hidden) is the outputs' gradient."""
    T, B, hidden = G.shape
    zero = torch.zeros(cell.parts, B, hidden, dtype=x.dtype)
    states, J, K, g = [zero], [], [], [zero.flatten()]
    for t in range(T):
        s = states[-1]
        z = cell.phi(s, x[t], weights).detach()
        n = s.numel()
        K_t = jacobian(lambda a, z=z: cell.r(a, z), s).reshape(n, n)
        J_t = jacobian(lambda a, s=s, t=t: cell.r(s, cell.phi(a, x[t], weights)), s).reshape(n, n)
        J.append(J_t + gamma * K_t)
        K.append((1 - gamma) * K_t)
        states.append(cell.r(s, z).detach())
        end = states[-1].clone().requires_grad_()
        g.append(torch.autograd.grad(cell.read(end), end, G[t])[0].flatten())
    return [w.view_as(zero) for w in path_sum(J, K, g, k)[1:]], states


def through_cells(
    cell: type, x: Tensor, weights: list[Tensor], states: list[Tensor], w: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """The gradients of x (T, B, features) and of the weights for the signals w_1 .. w_T."""
    grads = [torch.zeros_like(weight) for weight in weights]
    dx = torch.zeros_like(x)
    for t in range(len(x)):
        inputs = [x[t].clone().requires_grad_(), *(weight.detach().clone().requires_grad_() for weight in weights)]
        out = cell.r(states[t], cell.phi(states[t], inputs[0], inputs[1:]))
        dx[t], *by_weight = torch.autograd.grad(out, inputs, w[t])
        grads = [a + b for a, b in zip(grads, by_weight, strict=True)]
    return dx, grads


def layer_gradients(
    cell: type, x: Tensor, weights: list[Tensor], G: Tensor, k: int, gamma: float
) -> tuple[Tensor, list[Tensor]]:
    """The estimates of the gradients of x (T, B, features) and of the weights after k rounds."""
    w, states = layer_signals(cell, x, weights, G, k, gamma)
    return through_cells(cell, x, weights, states, w)


def min_residual(
    cell: type, x: Tensor, weights: list[Tensor], G: Tensor, k: int, gamma: float
) -> tuple[Tensor, list[Tensor]]:
    """The same for d^0 + sum_m c_m d^{m+1}, with the c that makes d^0 - sum_m c_m (d^m - d^{m+1}) smallest."""
    sums = []
    for m in range(k + 1):
        w, states = layer_signals(cell, x, weights, G, m, gamma)
        sums.append(torch.stack(w))
    d = [sums[0], *(b - a for a, b in pairwise(sums))]
    columns = torch.stack([(a - b).flatten() for a, b in pairwise(d)], 1)
    c = torch.linalg.lstsq(columns, d[0].flatten()[:, None]).solution[:, 0]
    best = d[0] + sum(c_m * increment for c_m, increment in zip(c, d[1:], strict=True))
    return through_cells(cell, x, weights, states, list(best))


def gradients(
    model: Recurrent,
    x: Tensor,
    y: Tensor,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    k: int,
    gamma: float = 0.0,
    lstm: type = LSTMco,
) -> dict[str, Tensor]:
    """The estimate after k rounds for every parameter, by name."""
    h0 = model.stem(x)
    h = [h0.detach().transpose(0, 1)]
    for i, layer in enumerate(model.layers):
        out = layer(h[-1])[0].detach()
        h.append(h[-1] + out if model.residual and i else out)
    last = h[-1].clone().requires_grad_()
    loss = loss_fn(model.head(last[-1] if model.last_step else last.transpose(0, 1)), y)
    head = list(model.head.parameters())
    G, *head_grads = torch.autograd.grad(loss, [last, *head])
    found = dict(zip(map(id, head), head_grads, strict=True))
    for i in reversed(range(len(model.layers))):
        layer = model.layers[i]
        (weights,) = layer.all_weights
        cell = GRU if isinstance(layer, nn.GRU) else lstm
        dx, grads = layer_gradients(cell, h[i], [w.detach() for w in weights], G, k, gamma)
        found |= dict(zip(map(id, weights), grads, strict=True))
        G = G + dx if model.residual and i else dx
    stem = list(model.stem.parameters())
    if stem:
        found |= dict(zip(map(id, stem), torch.autograd.grad(h0, stem, G.transpose(0, 1)), strict=True))
    return {name: found[id(p)] for name, p in model.named_parameters()}
