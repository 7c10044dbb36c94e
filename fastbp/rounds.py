"""The rounds of Highway-BP over the tapes of one forward: from the loss's gradient to every block's error signal.

Written with w_i for the signal at the state h_i (h_0 enters the first block, h_L leaves the last), and a reverse scan
along the cheap path, scan(a)_i = a_i + scan(a)_{i+1} K_{i+1}. The loss reads h_L alone.

Blocks may be on several devices: w_i is on that of the block that made h_i. The scan is walked, and one tensor, summed
up, crosses a cut per round: the sums are those of one device, in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastbp.tapes import Tapes

_RIDGE = 1e-12  # on a diagonal of ones: columns that are multiples of each other get the smallest coefficients
_PIECE, _PIECES = 2**12, 64  # entries of a state in one piece of its Gram matrix, at least; and pieces, at most


def sum_of_increments(
    tapes: Tapes, g: Tensor, iterations: int, *, measure: bool = False
) -> tuple[list[Tensor], Tensor | None]:
    """The signals after k rounds, w^{m+1} = scan(g + v) with v_i = w^m_{i+1} J_{i+1}; no increment is kept.

    Args:
        tapes: of the forward.
        g: gradient of the loss with respect to the last state.
        iterations: rounds k; w_i is final after L - i of them, later rounds leave it alone.
        measure: whether to look at the increments.

    Returns:
        w_0 .. w_L, with the shapes of the states; of every round the norm of its increment over that of the sum so
        far, (k,), where asked.
    """
    w = _highway(tapes, g)
    ratios = []
    for count in range(len(tapes), max(0, len(tapes) - iterations), -1):
        before, w = w, list(w)
        crossed = tapes.cross(before, count)  # all of them from the old w: parallel
        for i in reversed(range(count)):
            w[i] = tapes.hand_down(i, crossed[i] + tapes.keep(i, w[i + 1]))
        if measure:
            ratios.append(_norm([a - b for a, b in zip(w, before, strict=True) if a is not b]) / _norm(w))
    return w, torch.stack(ratios) if ratios else None


def min_residual(
    tapes: Tapes, g: Tensor, iterations: int, *, measure: bool = False
) -> tuple[list[Tensor], Tensor | None]:
    """The increments d^0 .. d^k combined as d^0 + sum_m c_m d^{m+1}, where c solves the adjoint equation best.

    The plain sum is c = 1. Here 1 - c is the least-squares solution of a problem whose right-hand side is d^k on the
    states 1 .. L: nothing at k = L, where the plain sum is exact. Solved in float64, without waiting for the device;
    keeps k increments.

    Args, returns: as `sum_of_increments`.
    """
    increments = [_highway(tapes, g)]
    for count in range(len(tapes), max(0, len(tapes) - iterations), -1):
        crossed = tapes.cross(increments[-1], count)  # d^m has the states 0 .. L - m; the others are zero
        crossed[-1] = tapes.hand_down(count - 1, crossed[-1])
        for i in reversed(range(count - 1)):
            crossed[i] = tapes.hand_down(i, crossed[i] + tapes.keep(i, crossed[i + 1]))
        increments.append(crossed)
    w = list(increments[0])
    if len(increments) > 1:
        c = coefficients(increments)
        at = {device: c.to(device) for device in {d.device for d in w}}
        for m, increment in enumerate(increments[1:]):
            for i, d in enumerate(increment):
                w[i] = w[i] + at[d.device][m].to(d.dtype) * d
    return w, _ratios(increments) if measure and len(increments) > 1 else None


def _highway(tapes: Tapes, g: Tensor) -> list[Tensor]:
    """w^0: the cheap path alone."""
    w = [g] * (len(tapes) + 1)
    for i in reversed(range(len(tapes))):
        w[i] = tapes.hand_down(i, tapes.keep(i, w[i + 1]))
    return w


def coefficients(increments: Sequence[Sequence[Tensor]]) -> Tensor:
    """c_0 .. c_{k-1}, (k,), float64: those that make d^0 - sum_m c_m (d^m - d^{m+1}) smallest on the states 1 .. L."""
    k, home = len(increments) - 1, increments[0][0].device
    gram = torch.zeros(k + 1, k + 1, dtype=torch.float64, device=home)
    for i in range(1, len(increments[0])):
        some = [d[i] for d in increments if i < len(d)]
        pieces = max(1, min(_PIECES, some[0].numel() // _PIECE))  # in float64 one at a time
        for slices in zip(*(d.chunk(pieces) for d in some), strict=True):
            here = torch.stack([d.flatten() for d in slices]).double()
            rows = here.clone()  # what is left after them, d^k, is the last of k + 1
            rows[:-1] -= here[1:]
            gram[: len(rows), : len(rows)] += (rows @ rows.T).to(home)
    scale = gram.diagonal()[:k].clamp_min(torch.finfo(torch.float64).tiny).rsqrt()
    normal = scale[:, None] * gram[:k, :k] * scale + _RIDGE * torch.eye(k, dtype=gram.dtype, device=gram.device)
    factor, _ = torch.linalg.cholesky_ex(normal)
    return 1 + scale * torch.cholesky_solve((scale * gram[:k, k])[:, None], factor)[:, 0]


def _ratios(increments: Sequence[list[Tensor]]) -> Tensor:
    total, ratios = list(increments[0]), []
    for increment in increments[1:]:
        total[: len(increment)] = [a + b for a, b in zip(total, increment, strict=False)]
        ratios.append(_norm(increment) / _norm(total))
    return torch.stack(ratios)


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    """Of all entries together, in float32 at least."""
    norms = [torch.linalg.vector_norm(t, dtype=torch.promote_types(t.dtype, torch.float32)) for t in tensors]
    return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))
