"""Highway-BP as a sum over paths, from dense Jacobians: exponential in the depth, for tiny nets."""

import copy
from collections.abc import Callable, Sequence
from itertools import combinations

import torch
from torch import Tensor
from torch.autograd.functional import jacobian

from fastbp.chain import AddNorm, Chain


def path_sum(J: Sequence[Tensor], K: Sequence[Tensor], g: Sequence[Tensor], k: int) -> list[Tensor]:
    """w_0 .. w_L: over all losses j >= i and all choices of at most k blocks of i+1 .. j to cross by J.

    Args:
        J, K: of blocks 1 .. L, matrices d out / d in.
        g: local loss gradients g_0 .. g_L, row vectors.
    """
    L = len(J)
    w = []
    for i in range(L + 1):
        total = torch.zeros_like(g[i])
        for j in range(i, L + 1):
            for crossed in range(k + 1):
                for S in combinations(range(i + 1, j + 1), crossed):
                    path = g[j]
                    for m in range(j, i, -1):
                        path = path @ (J[m - 1] if m in S else K[m - 1])
                    total = total + path
        w.append(total)
    return w


def jacobians(chain: Chain, h0: Tensor, gamma: float) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """J_i, K_i of every block as dense matrices over the whole flattened batch, and the states h_0 .. h_L.

    K is the merge's Jacobian by x at fixed z; of a post-LN merge, its diagonal alpha / sigma. Gamma moves the share
    gamma of K into J.
    """
    J, K, states = [], [], [h0]
    for block in chain.residuals():
        x = states[-1]
        z = block.branch(x).detach()
        h = block.merge(x, z).detach()
        K_i = jacobian(lambda a, z=z, m=block.merge: m(a, z), x).reshape(h.numel(), x.numel())
        dh_dz = jacobian(lambda b, x=x, m=block.merge: m(x, b), z).reshape(h.numel(), z.numel())
        full = K_i
        if isinstance(block.merge, AddNorm):
            norm, s = block.merge.norm, x + z
            sigma = (s.var(-1, unbiased=False, keepdim=True) + norm.eps).sqrt()
            K_i = torch.diag((norm.weight / sigma).detach().flatten())
        dz_dx = jacobian(lambda a, b=block.branch: b(a), x).reshape(z.numel(), x.numel())
        J.append(dh_dz @ dz_dx + (full - K_i) + gamma * K_i)
        K.append((1 - gamma) * K_i)
        states.append(h)
    return J, K, states


def gradients(
    chain: Chain,
    x: Tensor,
    y: Tensor,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    k: int,
    gamma: float = 0.0,
) -> dict[str, Tensor]:
    """The estimate after k rounds for every parameter, by name; the chain itself is left alone."""
    chain = copy.deepcopy(chain)
    h0 = chain.stem(x)
    J, K, states = jacobians(chain, h0.detach(), gamma)
    last = states[-1].clone().requires_grad_()
    loss = loss_fn(chain.head(last), y)
    head = list(chain.head.parameters())
    g_L, *head_grads = torch.autograd.grad(loss, [last, *head])
    g = [torch.zeros(h.numel(), dtype=h.dtype) for h in states[:-1]] + [g_L.flatten()]
    w = path_sum(J, K, g, k)
    grads = dict(zip((id(p) for p in head), head_grads, strict=True))
    for i, block in enumerate(chain.residuals(), start=1):
        parameters = list(block.parameters())
        if parameters:
            h = block(states[i - 1])
            vjp = torch.autograd.grad(h, parameters, w[i].view_as(h))
            grads |= dict(zip((id(p) for p in parameters), vjp, strict=True))
    stem = list(chain.stem.parameters())
    if stem:
        grads |= dict(zip((id(p) for p in stem), torch.autograd.grad(h0, stem, w[0].view_as(h0)), strict=True))
    return {name: grads[id(p)] for name, p in chain.named_parameters()}
