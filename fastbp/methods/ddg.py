"""DDG: modules differentiate older batches, all at once, with the error signal their successor made one step ago.

Idea        Cut the net into K modules. In a step, the new batch goes forward through all of them; then module j
            differentiates the batch of K-1-j steps ago. The K backward passes are independent of each other.
Exact when  modules = 1.
Needs       Chain, nn.Sequential, or a model that `as_chain` can see into; no weight shared across a cut. Leaf.
Cost        On one device: backprop's time; a module that is d steps late holds d+1 batches' activations (and weights,
            `stash`). The parallel speed-up needs a device per module.
Departs     `stash` (default) differentiates at the weights of the batch, as the paper's formula says; the authors' code
            used the current ones in part (`mixed`). `replay` recomputes the forward (features replay). Dropout is
            seeded by (module, step). A module that has nothing to apply yet takes no step at all.
Not for     Speed on one device; momentum 0.9 at backprop's learning rate: the delay shrinks the stable step (from
            1.36 to 0.25 over the curvature for Nesterov momentum at delay 1), so refit the learning rate per K;
            `mixed` under autocast, where the saved casts turn it into `stash`.
Reference   Huo, Gu, Yang, Huang (ICML 2018), arXiv:1804.10574.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call

from fastbp.knobs import Choice, IntRange, require
from fastbp.method import GradientEstimator, LossFn, Method
from fastbp.seeding import seeded
from fastbp.views import as_chain

_WEIGHTS = ("stash", "mixed", "replay")
_DRAINS = ("never", "epoch", "end")


@dataclass(frozen=True)
class DDG(Method):
    """Decoupled parallel backpropagation with delayed gradients (arXiv:1804.10574, algorithm 1).

    Attributes:
        modules: number K of modules, cut into equal numbers of blocks; module k = 0..K-1 is K-1-k steps late.
        weights: what a delayed backward uses. `stash`: activations and weights of its batch (the paper's formula).
            `mixed`: its activations, current weights (the authors' code). `replay`: its input, current weights.
        drain: when the batches in flight are worked off, by K-1 steps without a new batch: `never` (the authors' code),
            after every `epoch`, or at the `end` of training.
        devices: reserved for one device per module; None runs all modules in place, with the same numbers.
    """

    modules: Annotated[int, IntRange(1, 4)] = 2
    weights: Annotated[str, Choice(("stash", "mixed", "replay"))] = "stash"
    drain: str = "never"
    devices: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "modules", self.modules >= 1, "must be at least 1, which is backprop")
        require(self, "weights", self.weights in _WEIGHTS, f"must be one of {', '.join(_WEIGHTS)}")
        require(self, "drain", self.drain in _DRAINS, f"must be one of {', '.join(_DRAINS)}")
        require(self, "devices", self.devices is None, "several devices are not supported yet; leave it None")

    def bind(self, model: nn.Module, loss_fn: LossFn) -> GradientEstimator:
        return _DDG(self, model, split(model, self.modules), loss_fn)

    def exact(self, model: nn.Module) -> DDG:
        return replace(self, modules=1)


def split(model: nn.Module, modules: int) -> list[nn.Sequential]:
    """Cut a model into consecutive modules of equal numbers of blocks, the remainder to the later ones.

    The stem belongs to the first module and the head to the last.

    Raises:
        TypeError: `as_chain` cannot see into the model, or a weight is shared across a cut.
        ValueError: more modules than blocks.
    """
    chain = as_chain(model)
    blocks = list(chain.blocks)
    if modules > len(blocks):
        raise ValueError(
            f"DDG.modules = {modules}: this {type(model).__name__} has {len(blocks)} blocks; use at most that many"
        )
    edges = [k * len(blocks) // modules for k in range(modules + 1)]
    groups = [blocks[start:stop] for start, stop in pairwise(edges)]
    groups[0] = [chain.stem, *groups[0]]
    groups[-1] = [*groups[-1], chain.head]
    owner: dict[int, int] = {}
    for k, group in enumerate(groups):
        for part in group:
            for name, parameter in part.named_parameters():
                if owner.setdefault(id(parameter), k) != k:
                    raise TypeError(
                        f"DDG: weight {name} is shared by modules {owner[id(parameter)]} and {k}; its gradients would "
                        "come from different batches. Untie it or use fewer modules"
                    )
    return [nn.Sequential(*group) for group in groups]


@dataclass
class _Entry:
    """One batch in flight in one module."""

    step: int
    x: Tensor  # the module's input, a leaf
    wants_grad: dict[str, bool]  # of the parameters, at this batch's forward
    leaves: dict[str, Tensor] = field(default_factory=dict)  # the parameters its graph was recorded with
    buffers: dict[str, Tensor] = field(
        default_factory=dict
    )  # stash: the buffers then; those replaced since live on here
    y: Tensor | None = None  # output with graph; None for replay
    saved: list[Tensor] = field(default_factory=list)  # mixed: what autograd saved, in order


class _Module:
    """Module k of K with its queue of batches in flight."""

    def __init__(self, k: int, net: nn.Sequential, method: DDG, seed: int, device: torch.device) -> None:
        self.k, self.delay, self.net, self.seed = k, method.modules - 1 - k, net, seed
        self.mode = method.weights if self.delay else "now"
        self.counted = method.modules > 1  # seed dropout by (module, step); one module is plain backprop
        self.parameters: dict[str, nn.Parameter] = {}  # read when first used: an outer method may rename them
        self.device = device
        self.queue: deque[_Entry] = deque()

    def forward(self, step: int, x: Tensor) -> Tensor:
        """Send a batch forward with today's weights and queue it; returns the output, detached unless k = K-1."""
        self._see_parameters()
        x = x.detach()
        entry = _Entry(step, x, {name: p.requires_grad for name, p in self.parameters.items()})
        if self.k > 0:
            x.requires_grad_()
        self.queue.append(entry)
        if self.mode == "replay":
            with self._seeded(step), torch.no_grad():
                return self.net(x)
        entry.leaves = self._leaves(entry, self.parameters)
        if self.mode == "stash":
            entry.buffers = dict(self.net.named_buffers())
        entry.y = self._record(entry)
        return entry.y if self.delay == 0 else entry.y.detach()

    def backward(self, entry: _Entry, delta: Tensor | None) -> Tensor | None:
        """Differentiate a queued batch: adds to the parameters' gradients, returns the gradient of the input."""
        if entry.y is None:  # replay
            entry.leaves = self._leaves(entry, self.parameters)
            entry.y = self._record(entry, scratch=dict(self.net.named_buffers()))
        names = [name for name, wanted in entry.wants_grad.items() if wanted]
        inputs = [entry.leaves[name] for name in names] + ([entry.x] if self.k > 0 else [])
        if not entry.y.requires_grad or not inputs:
            return None
        grads = torch.autograd.grad(entry.y, inputs, delta, allow_unused=True)
        for name, grad in zip(names, grads, strict=False):
            parameter = self.parameters[name]
            if grad is not None:
                parameter.grad = grad if parameter.grad is None else parameter.grad + grad
        return grads[-1] if self.k > 0 else None

    def _see_parameters(self) -> None:
        if not self.parameters:
            self.parameters = dict(self.net.named_parameters())

    def _leaves(self, entry: _Entry, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self.mode == "now":
            return dict(self.parameters)
        copies = {name: v.detach().clone() if self.mode == "stash" else v.detach() for name, v in values.items()}
        return {name: leaf.requires_grad_(entry.wants_grad[name]) for name, leaf in copies.items()}

    def _record(self, entry: _Entry, scratch: dict[str, Tensor] | None = None) -> Tensor:
        """Run the module on a queued batch with its leaves, recording the graph.

        Args:
            scratch: buffers to read instead of the module's own, which then stay untouched.
        """
        tensors = {} if self.mode == "now" else dict(entry.leaves)
        if scratch:
            tensors |= {name: buffer.clone() for name, buffer in scratch.items()}
        hooks = nullcontext()
        if self.mode == "mixed":  # the backward reads what these return: aliases of weights that move on
            saved = entry.saved  # not the entry: a graph that holds its own output is never freed
            hooks = saved_tensors_hooks(lambda z: _append(saved, z.detach()), saved.__getitem__)
        with self._seeded(entry.step), hooks:
            return functional_call(self.net, tensors, (entry.x,)) if tensors else self.net(entry.x)

    def _seeded(self, step: int):
        return seeded(self.device, self._counter(step)) if self.counted else nullcontext()

    def _counter(self, step: int) -> int:
        return ((self.seed % 2**31) * 1_000_003 + step) * 4099 + self.k

    def state(self) -> list[dict[str, Any]]:
        """The batches in flight as plain tensors."""
        out = []
        for entry in self.queue:
            item: dict[str, Any] = {"step": entry.step, "x": entry.x.detach(), "wants_grad": entry.wants_grad}
            if self.mode == "stash":
                item["leaves"] = {name: leaf.detach() for name, leaf in entry.leaves.items()}
                item["buffers"] = {name: buffer.detach() for name, buffer in entry.buffers.items()}
            if self.mode == "mixed":
                item["saved"] = [self._saved_state(tensor) for tensor in entry.saved]
            out.append(item)
        return out

    def load(self, state: list[dict[str, Any]]) -> None:
        """Rebuild the queue, graphs included, without touching buffers or the caller's generators."""
        self.queue.clear()
        self._see_parameters()
        for item in state:
            x = item["x"].clone().requires_grad_(self.k > 0)
            entry = _Entry(item["step"], x, dict(item["wants_grad"]))
            if self.mode != "replay":
                entry.leaves = self._leaves(entry, item.get("leaves", self.parameters))
                entry.buffers = item.get("buffers", dict(self.net.named_buffers()))
                entry.y = self._record(entry, scratch=entry.buffers)
            if self.mode == "mixed":  # same graph, same order of saved tensors: put the old ones in
                entry.saved[:] = [self._load_saved(tensor) for tensor in item["saved"]]
            self.queue.append(entry)

    def _saved_state(self, tensor: Tensor) -> Any:
        for name, parameter in self.parameters.items():
            if tensor.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr():
                return [name, list(tensor.shape), list(tensor.stride()), tensor.storage_offset()]
        return tensor

    def _load_saved(self, item: Any) -> Tensor:
        if isinstance(item, Tensor):
            return item
        name, shape, stride, offset = item
        return self.parameters[name].detach().as_strided(shape, stride, offset)


class _DDG(GradientEstimator):
    def __init__(self, method: DDG, model: nn.Module, nets: list[nn.Sequential], loss_fn: LossFn) -> None:
        self.method = method
        self.model = model
        self.loss_fn = loss_fn
        self.latency = len(nets) - 1
        seed, device = torch.initial_seed(), next(model.parameters()).device
        self.modules = [_Module(k, net, method, seed, device) for k, net in enumerate(nets)]
        self.step = 0
        self.inbox: list[Tensor | None] = [None] * len(nets)  # error signals made in the previous step

    def backward(self, x: Tensor, y: Tensor) -> Tensor:
        h = x
        for module in self.modules:
            h = module.forward(self.step, h)
        loss = self.loss_fn(h, y)
        self.modules[-1].queue[-1].y = loss
        self._tick()
        return loss.detach()

    def drain(self, *, final: bool) -> Iterator[None]:
        if self.method.drain == "epoch" or (self.method.drain == "end" and final):
            while any(module.queue for module in self.modules):
                for parameter in self.model.parameters():
                    parameter.grad = None
                self._tick()
                yield

    def _tick(self) -> None:
        """Every module differentiates the batch that is due; the signals reach the predecessors in the next step."""
        outbox: list[Tensor | None] = [None] * len(self.modules)
        for module in self.modules:
            if module.queue and module.queue[0].step == self.step - module.delay:
                delta = module.backward(module.queue.popleft(), self.inbox[module.k])
                if module.k > 0:
                    outbox[module.k - 1] = delta
        self.inbox = outbox
        self.step += 1

    def metrics(self) -> dict[str, float]:
        return {"ddg/batches_in_flight": float(len(self.modules[0].queue))}

    def state_dict(self) -> dict[str, Any]:
        """The step, the error signals under way, and every batch in flight with what its backward needs."""
        return {
            "step": self.step,
            "seed": self.modules[0].seed,
            "inbox": list(self.inbox),
            "queues": [module.state() for module in self.modules],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken; load the model's own state first."""
        if len(state["queues"]) != len(self.modules):
            raise ValueError(
                f"DDG.modules = {len(self.modules)}, but the state was saved with {len(state['queues'])}; "
                "resume with that number"
            )
        self.step, self.inbox = state["step"], list(state["inbox"])
        for module, queue in zip(self.modules, state["queues"], strict=True):
            module.seed = state["seed"]
            module.load(queue)

    def finalize(self) -> nn.Module:
        for module in self.modules:
            module.queue.clear()
        return self.model


def _append(items: list[Tensor], item: Tensor) -> int:
    items.append(item)
    return len(items) - 1
