"""DDG from its formula: iteration t of module k applies batch t-d_k, d_k = K-1-k, at the weights of t-d_k.

`stash` keeps a deep copy of the whole net for every iteration and runs plain backprop on it. `mixed` and
`replay` are the two other meanings of a delayed backward, each by its plainest means.
"""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fastbp.chain import Chain


def split(chain: Chain, K: int) -> list[nn.Sequential]:
    """K modules of equal numbers of blocks, the remainder to the later ones; stem first, head last."""
    blocks = list(chain.blocks)
    L = len(blocks)
    modules = [blocks[k * L // K : (k + 1) * L // K] for k in range(K)]
    modules[0] = [chain.stem, *modules[0]]
    modules[-1] = [*modules[-1], chain.head]
    return [nn.Sequential(*module) for module in modules]


def seed_module(seed: int, k: int, t: int) -> None:
    """The same dropout mask for (module, iteration) in every runtime."""
    torch.manual_seed((seed * 1_000_003 + t) * 4099 + k)


def train(
    chain: Chain,
    batches: Sequence[tuple[Tensor, Tensor]],
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    make_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    K: int,
    *,
    weights: str = "stash",
    drain: bool = False,
    seed: int = 0,
) -> tuple[list[Tensor], list[list[list[Tensor] | None]]]:
    """Train the chain in place, one optimizer per module.

    Returns:
        the losses, and the gradients applied: [iteration][module], None in the warm-up, else one tensor each.
    """
    modules = split(chain, K)
    optimizers = [make_optimizer(list(m.parameters())) for m in modules]
    T, losses, applied = len(batches), [], []
    record = {"stash": _Stash, "mixed": _Mixed, "replay": _Replay}[weights](modules, loss_fn, seed)
    for t in range(T + (K - 1 if drain else 0)):
        if t < T:
            losses.append(record.forward(t, *batches[t]))
        grads = [None if not 0 <= t - (K - 1 - k) < T else record.gradients(k, t - (K - 1 - k)) for k in range(K)]
        for module, optimizer, grad in zip(modules, optimizers, grads, strict=True):
            if grad is None:
                continue
            for p, g in zip(module.parameters(), grad, strict=True):
                p.grad = g
            with torch.autograd._unsafe_preserve_version_counter(tuple(module.parameters())):
                optimizer.step()  # the version counter is what would stop the old graphs of `mixed`
        applied.append([None if grad is None else [g.clone() for g in grad] for grad in grads])
    return losses, applied


class _Stash:
    """Full backprop of every batch on a deep copy of all modules, made at its time."""

    def __init__(self, modules: list[nn.Sequential], loss_fn, seed: int) -> None:
        self.modules, self.loss_fn, self.seed = modules, loss_fn, seed
        self.grads: list[list[list[Tensor]]] = []

    def forward(self, t: int, x: Tensor, y: Tensor) -> Tensor:
        copies = copy.deepcopy(self.modules)
        for k, module in enumerate(copies):
            seed_module(self.seed, k, t)
            x = module(x)
        loss = self.loss_fn(x, y)
        loss.backward()
        self.grads.append([[p.grad for p in module.parameters()] for module in copies])
        for module, new in zip(self.modules, copies, strict=True):  # running statistics
            for buffer, value in zip(module.buffers(), new.buffers(), strict=True):
                buffer.data.copy_(value)
        return loss.detach()

    def gradients(self, k: int, s: int) -> list[Tensor]:
        return self.grads[s][k]


class _Mixed:
    """Ordinary graphs over weights that move on underneath them."""

    def __init__(self, modules: list[nn.Sequential], loss_fn, seed: int) -> None:
        self.modules, self.loss_fn, self.seed = modules, loss_fn, seed
        self.inputs: dict[tuple[int, int], Tensor] = {}
        self.outputs: dict[tuple[int, int], Tensor] = {}
        self.delta: dict[tuple[int, int], Tensor] = {}

    def forward(self, t: int, x: Tensor, y: Tensor) -> Tensor:
        for k, module in enumerate(self.modules):
            self.inputs[k, t] = x = x.detach().requires_grad_(k > 0)
            x = self.run(k, t, module, x)
        self.outputs[len(self.modules) - 1, t] = loss = self.loss_fn(x, y)
        return loss.detach()

    def run(self, k: int, t: int, module: nn.Sequential, x: Tensor) -> Tensor:
        seed_module(self.seed, k, t)
        self.outputs[k, t] = module(x)
        return self.outputs[k, t]

    def gradients(self, k: int, s: int) -> list[Tensor]:
        return self.differentiate(k, s, self.inputs[k, s], self.outputs[k, s], list(self.modules[k].parameters()))

    def differentiate(self, k: int, s: int, x: Tensor, y: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
        grads = torch.autograd.grad(y, [*parameters, *([x] if k else [])], self.delta.get((k, s)))
        if k:
            self.delta[k - 1, s] = grads[-1]
        return list(grads[: len(parameters)])


class _Replay(_Mixed):
    """The stored input once more through a copy of today's module."""

    def gradients(self, k: int, s: int) -> list[Tensor]:
        if k == len(self.modules) - 1:
            return super().gradients(k, s)
        module = copy.deepcopy(self.modules[k])
        seed_module(self.seed, k, s)
        x = self.inputs[k, s].detach().requires_grad_(k > 0)
        return self.differentiate(k, s, x, module(x), list(module.parameters()))
