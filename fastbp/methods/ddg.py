"""DDG: modules differentiate older batches, all at once, with the error signal their successor made one step ago.

Idea        Cut the net into K modules. In a step, the new batch goes forward through all of them; then module j
            differentiates the batch of K-1-j steps ago. The K backward passes are independent of each other.
Exact when  modules = 1.
Needs       Chain, nn.Sequential, or a model that `as_chain` can see into; no weight shared across a cut. Leaf.
Cost        On one device: backprop's time; a module that is d steps late holds d+1 batches' activations (and weights,
            `stash`). Side by side, on `devices` or in `processes`: the slowest module's forward and backward per batch,
            so `split` by measured time is the default there (modules that sleep: 1.03 times that, K = 2, 3, 4;
            memory: 1.00 times the formula, `replay` 0.90 to 0.98; K = 2 on two CPU processes: 1.80 times the throughput
            of backprop on one thread, 1.01, quartiles 0.97 to 1.03, of both threads, 1.21 times that of 1F1B, 0.98 of
            data parallelism; benchmarks/ddg_speed.py).
Departs     `stash` (default) differentiates at the weights of the batch, as the paper's formula says; the authors' code
            used the current ones in part (`mixed`). `replay` recomputes the forward (features replay). Dropout is
            seeded by (module, step). A module that has nothing to apply yet takes no step at all. A module asks for its
            error signal when it needs it, not when it is made: same numbers, and forward passes overlap too.
Not for     Speed on one device; momentum 0.9 at backprop's learning rate: the delay shrinks the stable step (over the
            curvature, K = 1, 2, 3, 4: 1.36, 0.25, 0.08, 0.05 with Nesterov momentum 0.9; 2, 1, 0.62, 0.45 without
            momentum), so refit the learning rate per K; short trainings, even then (ResNet-20, 2560 images of 16 px, 12
            epochs, one process, 3 seeds, sweeps/module_splits.yaml: 1.4 to 2.6 points below backprop at K = 2, 2.5 and
            4.0 at K = 4, of which only the 2.5 is beyond the noise of so few seeds; 0.79 to 0.97 of its speed);
            `mixed` under autocast, where the saved casts turn it into `stash`.
Reference   Huo, Gu, Yang, Huang (ICML 2018), arXiv:1804.10574.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import MISSING, dataclass, fields, replace
from itertools import pairwise
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from fastbp.delayed import DelayedModule, InFlight
from fastbp.knobs import Choice, IntRange, Uniform, nearest, require
from fastbp.links import Carried, Carrier
from fastbp.measurement import measurement
from fastbp.method import EpochPlan, GradientEstimator, LossFn, Method, nest, parts
from fastbp.placed import device_named, gathered
from fastbp.split import SPLITS, BlockCost, best_cuts, even_cuts, measure, module_bytes, pieces, table, tied_cuts
from fastbp.views import as_chain

_WEIGHTS = ("stash", "mixed", "replay")
_DRAINS = ("never", "epoch", "end")


@dataclass(frozen=True)
class DDG(Method):
    """Decoupled parallel backpropagation with delayed gradients (arXiv:1804.10574, algorithm 1).

    Attributes:
        modules: number K of modules; module k = 0..K-1 is K-1-k steps late.
        weights: what a delayed backward uses. `stash`: activations and weights of its batch (the paper's formula).
            `mixed`: its activations, current weights (the authors' code). `replay`: its input, current weights.
        drain: when the batches in flight are worked off, by K-1 steps without a new batch: `never` (the authors' code),
            after every `epoch`, or at the `end` of training.
        split: how the blocks are dealt out: equal `time` (measured on a batch), `flops`, `parameters` or numbers of
            `blocks`; `auto` is time where the modules run side by side, else blocks, which no measurement can change.
        cuts: the first block of every module but the first, instead of `split`.
        max_memory_bytes: of any module, as counted by `fastbp.split.module_bytes`; cuts that need more are not taken.
            With one module the whole net has to fit; the control, `exact`, has no cap.
        devices: one torch device per module, in one process; None runs all modules where the model is.
        processes: one process per module, in a `torch.distributed` group of K ranks that run the same loop;
            batches of equally many examples have the same shapes.
        shrink: factor on the error signal at every late module, so that module k carries shrink^(K-1-k) (FDG's beta).
        lr_power: the learning rate of a module that is d steps late is divided by (1+d)^lr_power.
        undelayed_epochs: epochs at the start that are plain backprop.
        cosine_every: measure the cosine between stale and true gradient every so many steps, for which the batches in
            flight are differentiated once more; 0: never.
    """

    modules: Annotated[int, IntRange(1, 4)] = 2
    weights: Annotated[str, Choice(("stash", "mixed", "replay"))] = "stash"
    drain: str = "never"
    split: str = "auto"
    cuts: tuple[int, ...] | None = None
    max_memory_bytes: int | None = None
    devices: tuple[str, ...] | None = None
    processes: bool = False
    shrink: Annotated[float, Uniform(0.2, 1.0)] = 1.0
    lr_power: Annotated[float, Choice((0.0, 0.25, 0.5, 1.0))] = 0.0
    undelayed_epochs: Annotated[int, IntRange(0, 5)] = 0
    cosine_every: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("cuts", "devices"):
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        require(self, "modules", self.modules >= 1, "must be at least 1, which is backprop")
        for name, valid in (("weights", _WEIGHTS), ("drain", _DRAINS), ("split", SPLITS)):
            value = getattr(self, name)
            require(self, name, value in valid, f"must be one of {', '.join(valid)}{nearest(value, valid)}")
        if self.cuts is not None:
            ok = all(isinstance(c, int) and not isinstance(c, bool) and c >= 1 for c in self.cuts)
            rising = ok and len(set(self.cuts)) == len(self.cuts) and sorted(self.cuts) == list(self.cuts)
            require(self, "cuts", rising, "must be rising block numbers from 1")
            fit = len(self.cuts) == self.modules - 1 or self.modules == 1
            require(self, "cuts", fit, f"{self.modules} modules need {self.modules - 1} cuts")
        cap = self.max_memory_bytes
        require(
            self, "max_memory_bytes", cap is None or (isinstance(cap, int) and cap > 0), "must be a positive number"
        )
        require(
            self, "max_memory_bytes", cap is None or not self.cuts, "chooses among cuts, and `cuts` are given; omit one"
        )
        if self.devices is not None:
            fit = len(self.devices) == self.modules or self.modules == 1
            require(self, "devices", fit, f"{self.modules} modules need {self.modules} devices, one each")
            require(
                self, "devices", not self.processes, "with `processes` every process has a device of its own; omit it"
            )
        require(self, "shrink", 0 < self.shrink <= 1, "must be in (0, 1]")
        require(self, "lr_power", self.lr_power >= 0, "must not be negative")
        require(self, "undelayed_epochs", self.undelayed_epochs >= 0, "must not be negative")
        require(self, "cosine_every", self.cosine_every >= 0, "must not be negative; 0 is never")
        alone = not (self.cosine_every and self.processes)
        require(self, "cosine_every", alone, "the true gradient needs all modules in one process; set it to 0")

    def bind(self, model: nn.Module, loss_fn: LossFn) -> GradientEstimator:
        cutter = Cutter(self, model, loss_fn)
        if self.processes and self.modules > 1:
            from fastbp.stage import StageDDG  # needs a process group

            return StageDDG(self, model, cutter, loss_fn)
        return _DDG(self, model, cutter, loss_fn)

    def exact(self, model: nn.Module) -> DDG:
        return replace(self, modules=1, max_memory_bytes=None)


def in_place(method: Method) -> Method:
    """The same combination, all of it in this process and where the model is: same numbers."""
    placed = ("devices", "processes")
    return nest(
        replace(part, **{f.name: f.default for f in fields(part) if f.name in placed and f.default is not MISSING})
        for part in parts(method)
    )


class Cutter:
    """Deals the blocks of one model out to modules.

    Attributes:
        cuts: once decided.
        rows: the table of `fastbp.split.table`, once decided.

    Raises:
        TypeError: `as_chain` cannot see into the model, or a weight is shared across a cut.
        ValueError: more modules than blocks.
    """

    def __init__(self, method: DDG, model: nn.Module, loss_fn: LossFn) -> None:
        self.method, self.loss_fn = method, loss_fn
        self.parts = pieces(as_chain(model))
        self.tied = tied_cuts(self.parts)
        self.cuts: tuple[int, ...] | None = None
        self.rows: list[dict[str, float]] = []
        self.copy: nn.Module | None = None
        blocks, kind = len(self.parts), type(model).__name__
        if method.modules > blocks:
            raise ValueError(f"DDG.modules = {method.modules}: this {kind} has {blocks} blocks; use at most that many")
        if method.cuts and method.cuts[-1] >= blocks and method.modules > 1:
            raise ValueError(f"DDG.cuts = {method.cuts!r}: this {kind} has {blocks} blocks; the last cut is below that")
        self.split = method.split
        if self.split == "auto":
            self.split = "time" if method.processes or method.devices else "blocks"
        if method.modules == 1 and method.max_memory_bytes is None:
            self.decide(())
        elif method.cuts:
            self.decide(method.cuts)
        elif method.max_memory_bytes is None and self.split == "blocks":
            self.decide(even_cuts(blocks, method.modules))
        elif method.max_memory_bytes is None and self.split == "parameters":
            self.decide(self._best([float(sum(p.numel() for p in part.parameters())) for part in self.parts]))
        else:
            self.copy = copy.deepcopy(model)  # as it is before anybody wraps it

    def measure(self, x: Tensor, y: Tensor) -> None:
        """Decide by measured costs of one batch, unless it is decided."""
        if self.cuts is not None:
            return
        assert self.copy is not None
        costs = measure(self.copy, self.loss_fn, x, y, timed=self.split == "time")
        self.copy = None
        method = self.method
        again = 1.0 if method.weights == "replay" else 0.0  # a late module of replay runs its forward twice
        values = {
            "time": [c.seconds + again * c.forward_seconds for c in costs],
            "flops": [c.flops for c in costs],
            "parameters": [float(c.parameter_bytes) for c in costs],
            "blocks": [1.0] * len(costs),
        }[self.split]
        cap = method.max_memory_bytes

        def fits(k: int, start: int, stop: int) -> bool:
            return cap is None or module_bytes(costs, method.modules, method.weights, k, start, stop) <= cap

        self.decide(self._best(values, fits))
        assert self.cuts is not None
        self.rows = table(costs, self.cuts, method.weights)

    def decide(self, cuts: Sequence[int]) -> None:
        """Take these cuts.

        Raises:
            TypeError: a weight is shared across one of them.
        """
        for cut in cuts:
            if cut in self.tied:
                raise TypeError(
                    f"DDG: weight {self.tied[cut]} is shared across the cut before block {cut}; its gradients would "
                    "come from different batches. Untie it, cut elsewhere or use fewer modules"
                )
        self.cuts = tuple(cuts)
        self.copy = None
        if cuts:
            weights = [sum(p.nbytes for p in part.parameters()) for part in self.parts]
            self.rows = table([BlockCost(parameter_bytes=size) for size in weights], self.cuts, self.method.weights)

    def nets(self) -> list[nn.Sequential]:
        """The modules."""
        assert self.cuts is not None
        edges = [0, *self.cuts, len(self.parts)]
        return [nn.Sequential(*[m for part in self.parts[a:b] for m in part]) for a, b in pairwise(edges)]

    def _best(
        self, values: list[float], fits: Callable[[int, int, int], bool] = lambda k, a, b: True
    ) -> tuple[int, ...]:
        try:
            return best_cuts(
                values, self.method.modules, lambda k, a, b: (a == 0 or a not in self.tied) and fits(k, a, b)
            )
        except ValueError:
            cap, modules = self.method.max_memory_bytes, self.method.modules
            if cap is not None:
                uncut = "the whole net needs more; raise it, use more modules or a smaller batch"
                cuts = (
                    f"no cut of {len(self.parts)} blocks into {modules} modules needs so little; raise it, use "
                    "weights='replay' or a smaller batch"
                )
                raise ValueError(f"DDG.max_memory_bytes = {cap}: {uncut if modules == 1 else cuts}") from None
            raise TypeError(
                f"DDG: weight {next(iter(self.tied.values()))} is shared by too many blocks to cut the net into "
                f"{self.method.modules} modules; its gradients would come from different batches. Untie it"
            ) from None


class DelayedEstimator(GradientEstimator):
    """What the executors of DDG have in common: the cut modules, the step counter, the plan.

    Attributes:
        cutter: decides the cuts, at the latest at the first batch.
        modules: of this process; empty until the cuts are decided.
    """

    def __init__(self, method: DDG, model: nn.Module, cutter: Cutter, loss_fn: LossFn) -> None:
        self.method, self.model, self.cutter, self.loss_fn = method, model, cutter, loss_fn
        self.latency = method.modules - 1
        self.seed = torch.initial_seed()
        self.step = 0
        self.modules: list[DelayedModule] = []

    def own(self, k: int) -> bool:
        """Whether module k runs in this process."""
        return True

    def cut(self) -> None:
        """Make the modules of the decided cuts."""
        method = self.method
        if self.modules or self.cutter.cuts is None:
            return
        self.modules = [
            DelayedModule(k, method.modules, net, method.weights, method.shrink, self.seed)
            for k, net in enumerate(self.cutter.nets())
            if self.own(k)
        ]
        self._set_delays(late=method.undelayed_epochs == 0)

    def prepare(self, x: Tensor, y: Tensor) -> None:
        self.cutter.measure(x, y)
        self.cut()

    def param_groups(self) -> list[dict[str, Any]]:
        power = self.method.lr_power
        if not power or self.method.modules == 1:
            return super().param_groups()
        if self.cutter.cuts is None:
            raise ValueError(
                f"DDG.lr_power = {power}: the cuts are not decided yet; call estimator.prepare(x, y) before making the "
                "optimizer, or give `cuts`"
            )
        nets = self.cutter.nets()
        return [
            {"params": list(net.parameters()), "lr_scale": (1.0 + len(nets) - 1 - k) ** -power}
            for k, net in enumerate(nets)
            if any(True for _ in net.parameters())
        ]

    def start_epoch(self, epoch: int) -> EpochPlan:
        late = epoch >= self.method.undelayed_epochs
        self._set_delays(late)
        return EpochPlan(kind="" if late or self.method.modules == 1 else "undelayed")

    def _set_delays(self, late: bool) -> None:
        for module in self.modules:
            module.delay = module.modules - 1 - module.k if late else 0

    def table(self) -> list[dict[str, float]]:
        """One row per module of what the split was decided on; empty where nothing was measured."""
        return self.cutter.rows

    def state_dict(self) -> dict[str, Any]:
        """The step, the cuts, the error signals under way, and every batch in flight with what its backward needs."""
        return {
            "step": self.step,
            "seed": self.seed,
            "cuts": None if self.cutter.cuts is None else list(self.cutter.cuts),
            "late": all(module.delay == module.modules - 1 - module.k for module in self.modules),
            "inbox": self.inbox_state(),
            "queues": [module.state() for module in self.modules],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken; load the model's own state first, in training's autocast."""
        cuts = state["cuts"]
        if cuts is not None and len(cuts) != self.method.modules - 1:
            raise ValueError(
                f"DDG.modules = {self.method.modules}, but the state was saved with {len(cuts) + 1}; "
                "resume with that number"
            )
        self.step, self.seed = state["step"], state["seed"]
        if cuts is not None:
            self.cutter.decide(cuts)
            self.modules = []
            self.cut()
        self._set_delays(state["late"])
        self.load_inbox(state["inbox"])
        for module, queue in zip(self.modules, state["queues"], strict=True):
            module.load(queue)

    @abstractmethod
    def inbox_state(self) -> list[Tensor | None]:
        """The error signals under way: the gradient of a module's output, of its shape, or None; by module."""

    @abstractmethod
    def load_inbox(self, inbox: list[Tensor | None]) -> None:
        """Take up signals that `inbox_state` gave."""

    def finalize(self) -> nn.Module:
        for module in self.modules:
            module.queue.clear()
        return self.model


class _DDG(DelayedEstimator):
    """All modules in one process, where the model is or on one device each.

    Raises:
        ValueError: this machine does not have one of the devices; nothing was moved.
    """

    def __init__(self, method: DDG, model: nn.Module, cutter: Cutter, loss_fn: LossFn) -> None:
        super().__init__(method, model, cutter, loss_fn)
        self.devices = _devices(method)
        self.carrier = Carrier()
        self.inbox: list[Carried | None] = [None] * method.modules  # error signals made in the previous step
        self.labels: dict[int, tuple[Tensor, Tensor]] = {}  # batches in flight, for the true gradient
        self.cosines: dict[int, Tensor] = {}  # the last one measured, by module
        self.cut()

    def cut(self) -> None:
        if not self.modules and self.cutter.cuts is not None:
            for net, device in zip(self.cutter.nets(), self.devices, strict=False):  # none: all stay where they are
                net.to(device)
        super().cut()

    def backward(self, x: Tensor, y: Tensor) -> Tensor:
        if not self.modules:
            self.prepare(x, y)
        if self.method.cosine_every:
            self.labels[self.step] = (x, y)
        h = Carried(x)
        for module in self.modules:
            out = module.forward(self.step, self.carrier.carry(h.arrive(), module.device).arrive())
            h = Carried(out)
        loss = self.loss_fn(h.tensor, self.carrier.carry(y, self.modules[-1].device).arrive())
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
        """Every module differentiates the batch that is due; the signals reach the predecessors in the next step.

        Without delay they are used at once, from the last module to the first.
        """
        outbox: list[Carried | None] = [None] * len(self.modules)
        late, every = any(module.delay for module in self.modules), self.method.cosine_every
        for module in self.modules if late else reversed(self.modules):
            entry = module.due(self.step)
            if entry is None:
                module.rest()
                continue
            signal = (self.inbox if late else outbox)[module.k]
            module.keep = bool(module.delay and every and self.step % every == 0)
            delta = module.backward(entry, None if signal is None else signal.arrive())
            if module.keep:
                self._measure_cosine(module, entry)
            if module.k > 0 and delta is not None:
                outbox[module.k - 1] = self.carrier.carry(delta, self.modules[module.k - 1].device)
        self.inbox = outbox if late else [None] * len(self.modules)
        self.labels.pop(self.step - self.latency, None)
        self.step += 1

    def _measure_cosine(self, module: DelayedModule, entry: InFlight) -> None:
        """Between the gradient a late module has just got, if any, and that of the same batch at today's weights."""
        kept = {name: grad for name, grad in module.kept.items() if grad is not None}
        module.kept = {}
        if not kept or entry.step not in self.labels:  # all frozen or dropped; a state without labels
            return
        h, y = self.labels[entry.step]
        leaves: dict[str, Tensor] = {}
        with measurement():
            for m in self.modules:
                wants_grad = entry.wants_grad if m is module else {}
                with torch.set_grad_enabled(m.k >= module.k):
                    h, used = m.replica(entry.step, self.carrier.carry(h, m.device).arrive(), wants_grad)
                leaves = used if m is module else leaves
        loss = self.loss_fn(h, self.carrier.carry(y, self.modules[-1].device).arrive())
        true = torch.autograd.grad(loss, [leaves[name] for name in kept], allow_unused=True)
        pairs = [(g.flatten(), t.flatten()) for g, t in zip(kept.values(), true, strict=True) if t is not None]
        if pairs:
            stale, now = (torch.cat(side) for side in zip(*pairs, strict=True))
            self.cosines[module.k] = cosine_similarity(stale, now, dim=0)

    def whole(self) -> AbstractContextManager[nn.Module]:
        return gathered(self.model, self.devices)  # back to the very storages: what is in flight may alias them

    def metrics(self) -> dict[str, float]:
        flight = float(len(self.modules[0].queue)) if self.modules else 0.0
        cosines = {f"ddg/cosine_{k}": value.item() for k, value in sorted(self.cosines.items())}
        return {"ddg/batches_in_flight": flight} | cosines

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        if self.method.cosine_every:
            state |= {"labels": dict(self.labels), "cosines": dict(self.cosines)}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.labels, self.cosines = dict(state.get("labels", {})), dict(state.get("cosines", {}))

    def inbox_state(self) -> list[Tensor | None]:
        return [None if signal is None else signal.arrive() for signal in self.inbox]

    def load_inbox(self, inbox: list[Tensor | None]) -> None:
        places = [module.device for module in self.modules]
        self.inbox = [
            None if signal is None else Carried(signal.to(place)) for signal, place in zip(inbox, places, strict=False)
        ] or [None] * self.method.modules

    def finalize(self) -> nn.Module:
        if self.devices:
            self.model.to(self.devices[0])
        return super().finalize()


def _devices(method: DDG) -> tuple[torch.device, ...]:
    return tuple(device_named(name, "DDG.devices") for name in (method.devices or ())[: method.modules])
