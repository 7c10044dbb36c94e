"""What DDG's modules hold while batches are in flight, counted in the simulator, against the formula of the split."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from fastbp import DDG
from fastbp.delayed import DelayedModule
from fastbp.methods.ddg import Cutter
from fastbp.models import make_model
from fastbp.split import measure, module_bytes


class _Kept:
    """A tensor that autograd keeps; it lives as long as the graph."""

    def __init__(self, module: int, tensor: Tensor) -> None:
        self.module, self.tensor = module, tensor


class Ledger:
    """The most that every module's batches in flight held at any moment, each storage once, own weights left out.

    Attributes:
        current: the module that runs.
        peak: bytes by module.
    """

    def __init__(self, model: nn.Module) -> None:
        self.current, self.modules, self.peak = 0, [], {}
        self.own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.alive: weakref.WeakSet[_Kept] = weakref.WeakSet()

    def follow(self, modules: list[DelayedModule]) -> None:
        self.modules, self.peak = modules, dict.fromkeys(range(len(modules)), 0)
        for module in modules:
            module.net.register_forward_pre_hook(lambda *_, k=module.k: setattr(self, "current", k))

    def hooks(self) -> saved_tensors_hooks:
        return saved_tensors_hooks(self._pack, lambda kept: kept.tensor)

    def _pack(self, tensor: Tensor) -> _Kept:
        kept = _Kept(self.current, tensor.detach())
        self.alive.add(kept)
        self.note(self.current)
        return kept

    def note(self, k: int) -> None:
        tensors = [kept.tensor for kept in self.alive if kept.module == k]
        for entry in self.modules[k].queue:
            tensors += [entry.x, *entry.leaves.values(), *entry.saved]
        sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        held = sum(size for pointer, size in sizes.items() if pointer not in self.own)
        self.peak[k] = max(self.peak[k], held)


def peaks(method: DDG, model: nn.Module, x: Tensor, y: Tensor) -> list[int]:
    """Bytes that every module's batches in flight hold at their peak, over enough steps to fill the pipeline."""
    ledger = Ledger(model)

    def counted(out: Tensor, labels: Tensor) -> Tensor:
        for k in range(method.modules):
            ledger.note(k)
        return nn.functional.cross_entropy(out, labels)

    estimator: Any = method.bind(model, counted)
    ledger.follow(estimator.modules)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    for _ in range(method.modules + 2):
        optimizer.zero_grad(set_to_none=True)
        with ledger.hooks():
            estimator.backward(x.clone(), y)
        optimizer.step()
    return [ledger.peak[k] for k in range(method.modules)]


def memory_rows(modules: int = 4) -> list[dict[str, Any]]:
    """Held and predicted bytes of every module and meaning of a delayed backward, of a small net."""
    x, y = torch.randn(32, 3, 16, 16), torch.arange(32) % 10
    rows = []
    for weights in ("stash", "mixed", "replay"):
        model = make_model("resnet_tiny", (3, 16, 16), 10, {"blocks": 8, "width": 16}, seed=0)
        method = DDG(modules=modules, weights=weights, split="blocks")
        cutter = Cutter(method, model, nn.functional.cross_entropy)
        costs = measure(model, nn.functional.cross_entropy, x, y, timed=False)
        edges = [0, *(cutter.cuts or ()), len(costs)]
        for k, got in enumerate(peaks(method, model, x, y)):
            start, stop = edges[k], edges[k + 1]
            resident = 3 * sum(c.parameter_bytes for c in costs[start:stop])  # weights, gradients, momentum
            formula = module_bytes(costs, modules, weights, k, start, stop) - resident
            row = {"name": weights, "module": k, "delay": modules - 1 - k, "bytes": got, "formula": formula}
            rows.append(row | {"ratio": got / formula})
    return rows
