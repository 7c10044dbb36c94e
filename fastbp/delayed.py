"""One module of a delayed pipeline: forward now, differentiate a batch of some steps ago.

`DelayedModule` holds the batches in flight and gives a delayed backward one of three meanings. Who carries activations
and error signals between modules (`fastbp.methods.ddg` in one process, `fastbp.stage` between processes) is not its
business, so that every executor computes the same numbers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call

from fastbp.chain import Residual, Through
from fastbp.seeding import seeded


@dataclass
class InFlight:
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


class DelayedModule:
    """Module k of K with its queue of batches in flight.

    Args:
        k: its number, 0 on the input's side.
        modules: K; the module is K-1-k steps late.
        net: its layers, on the device it shall run on.
        weights: `stash`, `mixed` or `replay`; see `DDG`.
        shrink: factor on every incoming error signal while the module is late.
        seed: of its dropout masks, together with k and the step.
    """

    def __init__(self, k: int, modules: int, net: nn.Sequential, weights: str, shrink: float, seed: int) -> None:
        self.k, self.modules, self.net, self.weights, self.shrink, self.seed = k, modules, net, weights, shrink, seed
        self.delay = modules - 1 - k
        self.parameters: dict[str, nn.Parameter] = {}  # read when first used: an outer method may rename them
        tensors = [*net.parameters(), *net.buffers()]
        self.device = tensors[0].device if tensors else None
        self.queue: deque[InFlight] = deque()
        self.keep = False  # whether the next backward leaves its gradients in `kept`
        self.kept: dict[str, Tensor | None] = {}

    @property
    def mode(self) -> str:
        """What a backward means now: one that is not late differentiates where it stands."""
        return self.weights if self.delay else "now"

    def forward(self, step: int, x: Tensor) -> Tensor:
        """Send a batch forward with today's weights and queue it; returns the output, detached where k < K-1.

        Raises:
            TypeError: the output is not one tensor, but another module is to follow.
        """
        self._see_parameters()
        x = x.detach()
        entry = InFlight(step, x, {name: p.requires_grad for name, p in self.parameters.items()})
        if self.k > 0:
            x.requires_grad_()
        self.queue.append(entry)
        if self.mode == "replay":
            with self.masks(step), torch.no_grad():
                return self._one_tensor(self.net(x))
        entry.leaves = self._leaves(entry, self.parameters)
        if self.mode == "stash":
            entry.buffers = dict(self.net.named_buffers())
        entry.y = self._one_tensor(self._record(entry))
        return entry.y.detach() if self.k < self.modules - 1 else entry.y

    def due(self, step: int) -> InFlight | None:
        """Takes the batch that this step differentiates from the queue; None where there is none."""
        return self.queue.popleft() if self.queue and self.queue[0].step == step - self.delay else None

    def backward(self, entry: InFlight, delta: Tensor | None) -> Tensor | None:
        """Differentiate a queued batch: adds to the parameters' gradients, returns the gradient of the input.

        Args:
            entry: from `due`.
            delta: the gradient of the module's output; None for the last module, whose output is the loss.
        """
        if entry.y is None:  # replay
            entry.leaves = self._leaves(entry, self.parameters)
            entry.y = self._record(entry, scratch=dict(self.net.named_buffers()))
        names = [name for name, wanted in entry.wants_grad.items() if wanted]
        inputs = [entry.leaves[name] for name in names] + ([entry.x] if self.k > 0 else [])
        if not entry.y.requires_grad or not inputs:
            self.rest()
            return None
        if delta is not None and self.delay and self.shrink != 1.0:
            delta = delta * self.shrink
        grads = torch.autograd.grad(entry.y, inputs, delta, allow_unused=True)
        if self.keep:
            self.kept = dict(zip(names, grads, strict=False))
        for name, grad in zip(names, grads, strict=False):
            parameter = self.parameters[name]
            if grad is not None:
                parameter.grad = grad if parameter.grad is None else parameter.grad + grad
        got = {name for name, grad in zip(names, grads, strict=False) if grad is not None}
        self.rest(name for name in self.parameters if name not in got)
        return grads[-1] if self.k > 0 else None

    def rest(self, names: Iterable[str] | None = None) -> None:
        """While late, let these parameters, or all, take no step: momentum would still move one whose gradient is zero.

        A gradient that is not zero stays: it is of another batch of the same step.
        """
        for name in (self.parameters if names is None else names) if self.delay else ():
            parameter = self.parameters[name]
            if parameter.grad is not None and not parameter.grad.any():
                parameter.grad = None

    def replica(self, step: int, x: Tensor, wants_grad: Mapping[str, bool]) -> tuple[Tensor, dict[str, Tensor]]:
        """The module on any input at today's weights, with the masks of a step, leaving no trace.

        Args:
            step: whose dropout masks to use.
            x: the input.
            wants_grad: by parameter name; those left out get no gradient.

        Returns:
            the output and the leaves it was computed with, by parameter name.
        """
        leaves = {n: p.detach().requires_grad_(wants_grad.get(n, False)) for n, p in self.net.named_parameters()}
        buffers = {name: buffer.clone() for name, buffer in self.net.named_buffers()}
        with self.masks(step):
            return functional_call(self.net, leaves | buffers, (x,)), leaves

    def masks(self, step: int):
        """Dropout of this module in this step, whatever runs beside it; one module alone is plain backprop."""
        if self.modules == 1 or self.device is None:
            return nullcontext()
        return seeded(self.device, ((self.seed % 2**31) * 1_000_003 + step) * 4099 + self.k)

    def _one_tensor(self, output: Any) -> Tensor:
        if self.k < self.modules - 1 and not isinstance(output, Tensor):
            raise TypeError(
                f"DDG: module {self.k}, which ends in {last_layer(self.net)}, returned a "
                f"{type(output).__name__}, but only one tensor can cross a cut; cut elsewhere or return a tensor"
            )
        return output

    def _see_parameters(self) -> None:
        if not self.parameters:
            self.parameters = dict(self.net.named_parameters())

    def _leaves(self, entry: InFlight, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self.mode == "now":
            return dict(self.parameters)
        copies = {name: v.detach().clone() if self.mode == "stash" else v.detach() for name, v in values.items()}
        return {name: leaf.requires_grad_(entry.wants_grad[name]) for name, leaf in copies.items()}

    def _record(self, entry: InFlight, scratch: dict[str, Tensor] | None = None) -> Tensor:
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
        with self.masks(entry.step), hooks:
            return functional_call(self.net, tensors, (entry.x,)) if tensors else self.net(entry.x)

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
        """Rebuild the queue, graphs included, without touching buffers or the caller's generators.

        Raises:
            ValueError: a batch was saved with parameters of other names.
        """
        self.queue.clear()
        self._see_parameters()
        for item in state:
            if set(item["wants_grad"]) != set(self.parameters):
                raise ValueError(
                    f"DDG: module {self.k} has other parameters than the saved one, of another model or from another "
                    "version of fastbp; start this run anew"
                )
            x = item["x"].to(self.device, copy=True).requires_grad_(self.k > 0)
            entry = InFlight(item["step"], x, dict(item["wants_grad"]))
            if self.mode != "replay":
                entry.leaves = self._leaves(entry, self._here(item.get("leaves", self.parameters)))
                entry.buffers = self._here(item.get("buffers", dict(self.net.named_buffers())))
                entry.y = self._record(entry, scratch=entry.buffers)
            if self.mode == "mixed":  # same graph, same order of saved tensors: put the old ones in
                entry.saved[:] = [self._load_saved(tensor) for tensor in item["saved"]]
            self.queue.append(entry)

    def _here(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.to(self.device) for name, tensor in tensors.items()}

    def _saved_state(self, tensor: Tensor) -> Any:
        for name, parameter in self.parameters.items():
            if tensor.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr():
                return [name, list(tensor.shape), list(tensor.stride()), tensor.storage_offset()]
        return tensor

    def _load_saved(self, item: Any) -> Tensor:
        if isinstance(item, Tensor):
            return item.to(self.device)
        name, shape, stride, offset = item
        return self.parameters[name].detach().as_strided(shape, stride, offset)


def last_layer(net: nn.Module) -> str:
    """The class of the layer or branch that a module ends in."""
    while isinstance(net, nn.Sequential | Residual) and len(list(net.children())):
        if isinstance(net, Residual):
            net = net.merge.module if isinstance(net.merge, Through) else net.branch
        else:
            net = net[-1]
    return type(net).__name__


def _append(items: list[Tensor], item: Tensor) -> int:
    items.append(item)
    return len(items) - 1
