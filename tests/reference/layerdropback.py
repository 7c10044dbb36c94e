"""LayerDropBack as masked backprop: the whole gradient, then an explicit SGD loop over the kept tensors."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

_64 = (1 << 64) - 1


def uniform(seed: int, epoch: int, step: int, unit: int) -> float:
    """r in [0, 1): splitmix64's mixing function over (seed, epoch, step, unit) in Python's own integers."""
    word = _mix(seed & _64)
    word = _mix((word + epoch) & _64)
    word = _mix((word + step) & _64)
    word = _mix((word + unit) & _64)
    return (word >> 11) / 2**53


def _mix(word: int) -> int:
    word = (word + 0x9E3779B97F4A7C15) & _64
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _64
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _64
    return word ^ (word >> 31)


def train(
    model: nn.Module,
    epochs: Sequence[Sequence[tuple[Tensor, Tensor]]],
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    units: Sequence[Sequence[str]],
    droppable: Sequence[bool],
    *,
    p: float,
    s: int,
    seed: int,
    lr: float,
    mult: float,
    momentum: float,
    weight_decay: float,
) -> list[float]:
    """Train in place with Nesterov SGD; returns the loss of every step.

    Args:
        epochs: the batches of every epoch.
        units: the names of the parameters of each unit, in order; the position is the unit's index.
        droppable: False for the head.
        p, s, mult: drop rate, period in epochs, learning-rate factor of the dropping epochs.
    """
    theta = dict(model.named_parameters())
    v: dict[str, Tensor] = {}
    losses = []
    for e, batches in enumerate(epochs):
        is_drop = e > 0 and e % s == 0
        for t, (x, y) in enumerate(batches):
            loss = loss_fn(model(x), y)
            g = dict(zip(theta, torch.autograd.grad(loss, list(theta.values())), strict=True))
            losses.append(loss.item())
            for u, names in enumerate(units):
                m_u = 0 if is_drop and droppable[u] and uniform(seed, e, t, u) < p else 1
                if m_u == 0:
                    continue  # the tensor and its momentum stay
                for name in names:
                    with torch.no_grad():
                        d = g[name] + weight_decay * theta[name]
                        v[name] = momentum * v[name] + d if name in v else d.clone()
                        theta[name] -= lr * (mult if is_drop else 1) * (d + momentum * v[name])
    return losses
