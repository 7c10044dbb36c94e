"""LayerDropBack: in every n-th epoch, random layers get no weight gradient and no update.

Idea        The forward pass and the error signal stay whole; only weight gradients are left out. In those epochs the
            learning rate, and optionally the batch, is larger.
Exact when  mask = False (the control arm: learning-rate and batch plan stay), or drop_rate = 0.
Needs       Any model. Wraps `inner`. The head always learns: name it in `head` where the rule (fastbp.units) misses it.
            Checkpointed activations with use_reentrant=False; DistributedDataParallel with find_unused_parameters=True.
Cost        A coin per unit saves drop_rate x the weight gradients' share (about 1/3) of the dropping epochs, 8 % of
            a run at the defaults; of the input gradients only the few below the lowest kept unit. `prefix` saves both
            below its cut: about drop_rate x 2/3, where the layers cost alike. A larger batch may save time by itself:
            compare with the control. Counted FLOPs are a mean over all masks, or over 16 that stand for them: every
            unit is dropped as often as the drop_rate says, to a sixteenth. Of what they predict, one CPU thread saves
            65 to 154 % in a dropping step, at least 85 % in 13 of 18 cases (six nets, benchmarks/ldb_saving.py).
Departs     Learning rate times exactly 1/(1-p) (the authors' code: 2, or 1/(1-p+1e-6)); all parameter groups keep
            their ratios; parameters frozen by the user stay frozen; the mask is a pure function of
            (seed, epoch, optimizer step, unit); default unit `layer`, the authors' code drops single tensors
            (`tensor`). Accumulated micro-batches are one step: a `backward` continues it as long as no gradient of
            the last one was cleared or changed, and no weight. `prefix` is not in the paper: one random cut per step,
            everything below it is dropped; each kept unit's gradient is scaled by 1/(1-p_l), at most 4, instead of the
            learning rate. Nor is `pool`: steps choose from a few fixed masks, so that few graphs are compiled.
Not for     Saving memory (but `prefix` keeps no activation below its cut); compute-bound training where 8 % is not
            worth the noise; torch.compile of a whole model without `pool`: every mask recompiles, until torch gives
            up and runs eagerly (equal blocks compiled one by one share graphs: at most four with unit `block`, two
            more than a block has layers with `prefix`). Short trainings: ResNet-20, 2048 images of 16 px, 5 epochs, two
            of which drop, one CPU thread, 3 seeds (sweeps/drop_rates.yaml): 1.03, 1.07, 1.14 and 1.13 times as fast as
            backprop with `layer`, `tensor`, `prefix` and, on twice the batch, `block`, none beyond the noise after
            correction, at 0.6 to 2.6 points less accuracy, which the plan and the searched learning rates cost: the
            mask alone moves -0.6 to +0.2. Crossed with each other, mask, drop_rate (.25, .5), lr_policy (none, inverse)
            and batch_scale (1, 2) move accuracy by -0.4, -0.1, +0.2 and -0.6 points and time by factors of 0.97, 0.98,
            1.02 and 0.93; that too is within the noise.
Reference   Hershkovitch Neiterman, Ben-Artzi (2024), arXiv:2412.18027.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from operator import mul
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fastbp.knobs import Choice, Uniform, require
from fastbp.masks import (
    dropped_mask,
    evenly,
    fitting_pool,
    pool_masks,
    pool_pattern,
    prefix_mask,
    prefix_top,
    stratified_masks,
)
from fastbp.method import EpochPlan, GradientEstimator, LossFn, Method, WrappingEstimator, parts
from fastbp.methods.backprop import Backprop
from fastbp.methods.ddg import DDG
from fastbp.units import Unit, droppable_units, head_parameters, unwrapped, wrappings

_STEPS_AT_ONCE = 64  # masks are drawn for this many steps in one vectorised call
_PREFIX_CAP = 4.0  # largest gradient scale of a `prefix` unit
_TYPICAL = 16  # masks at most that FLOPs are averaged over
_LOSSES_LOOKED_AT = 100  # for reentrant checkpointing, at most: a mask may hide it, a step without one does not


@dataclass(frozen=True)
class LayerDropBack(Method):
    """Random layers skip their weight gradient in every `every_epochs`-th epoch (arXiv:2412.18027, section 3).

    Ranks of DistributedDataParallel share the mask, as it depends on seed, epoch and step alone: give all of them the
    same seed and equally many steps.

    Attributes:
        drop_rate: probability p in [0, 1) that a unit gets no gradient in a step; 0.5 in the authors' code.
        every_epochs: period; epochs 2, 4, ... at 2, never epoch 0 (authors' code).
        unit: what one coin is tossed for: `tensor` (authors' code), `layer` (a module that owns parameters),
            `block` (timm's parameter groups, or a child of a repeated container), `prefix` (one cut per step,
            which drops half of the units at most: a drop_rate above 0.5 is one of 0.5).
        lr_policy: learning-rate factor in dropping epochs: `inverse` 1/(1-p), `double` 2, `none` 1.
        batch_scale: batch-size factor in dropping epochs; 2 in the authors' fine-tuning code, 1 in the other.
        pool: M > 0: steps choose from M fixed masks, each unit dropped by exactly p M of them; 0: a coin per unit.
        seed: of the masks; independent of every other random number.
        head: paths of the submodules that always learn, such as ("fc", "aux.fc"); (): the classifier's last layer by
            the rule of `fastbp.units.head_parameters`, which a net with an unusual head may need to be told.
        mask: False keeps the plan (epochs, learning rate, batch) and drops nothing: the control arm.
        inner: the method that computes the gradient of the kept layers.
    """

    drop_rate: Annotated[float, Uniform(0.1, 0.9)] = 0.5
    every_epochs: Annotated[int, Choice((2, 3, 4))] = 2
    unit: Annotated[str, Choice(("tensor", "layer", "block", "prefix"))] = "layer"
    lr_policy: Annotated[str, Choice(("inverse", "double", "none"))] = "inverse"
    batch_scale: Annotated[float, Choice((1.0, 2.0))] = 2.0
    pool: int = 0
    seed: int = 0
    head: tuple[str, ...] = ()
    mask: bool = True
    inner: Method = Backprop()

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.head, list):
            object.__setattr__(self, "head", tuple(self.head))
        named = isinstance(self.head, tuple) and all(isinstance(name, str) for name in self.head)
        require(self, "head", named, "must be a list of submodules, such as ['fc']; [] is the rule")
        require(self, "drop_rate", 0 <= self.drop_rate < 1, "must be in [0, 1): at 1 nothing would learn")
        require(self, "every_epochs", self.every_epochs >= 1, "must be at least 1")
        require(self, "batch_scale", self.batch_scale > 0, "must be positive; 1 keeps the batch size")
        require(self, "unit", self.unit in _UNITS, f"must be one of {', '.join(_UNITS)}")
        require(self, "lr_policy", self.lr_policy in _POLICIES, f"must be one of {', '.join(_POLICIES)}")
        require(self, "pool", self.pool >= 0, "must not be negative; 0 tosses a coin per unit")
        if self.pool:
            require(self, "pool", self.unit != "prefix", "unit='prefix' has one mask per cut already; set pool to 0")
            fit = fitting_pool(self.drop_rate, self.pool)
            works = f"pool={fit} works" if fit else f"take a drop_rate that is a multiple of 1/{self.pool}"
            require(self, "pool", fit == self.pool, f"drop_rate x pool must be a whole number: {works}")

    def bind(self, model: nn.Module, loss_fn: LossFn) -> GradientEstimator:
        if any(isinstance(part, LayerDropBack) for part in parts(self.inner)):
            raise TypeError("LayerDropBack in LayerDropBack: two masks are one mask at another drop_rate")
        if self.unit == "prefix" and any(isinstance(part, DDG) for part in parts(self.inner)):
            raise TypeError(
                "LayerDropBack(unit='prefix') on DDG: a cut scales the gradients of its own batch, "
                "DDG's are of older ones; use another unit"
            )
        droppable_units(model, self.unit, self.head)  # refuses before the inner method touches the model
        head = head_parameters(model, self.head)
        if not any(p.requires_grad for p in model.parameters() if id(p) in head):
            raise ValueError(
                f"LayerDropBack: the head of this {type(unwrapped(model)).__name__} is frozen, so a step that drops "
                "every unit would have nothing to differentiate; leave the head trainable"
            )
        if self.mask:
            _refuse_rigid_ddp(model)
        watched = _RefusingReentrant(loss_fn, _LOSSES_LOOKED_AT if self.mask else 0)
        return _LayerDropBack(self, self.inner.bind(model, watched), watched)

    def exact(self, model: nn.Module) -> Method | None:
        """The same plan without a mask: learning rate and batch of the dropping epochs are kept."""
        inner = self.inner.exact(model)
        return None if inner is None else replace(self, mask=False, inner=inner)

    def is_dropping(self, epoch: int) -> bool:
        """Whether the 0-based epoch drops: a positive multiple of `every_epochs`."""
        return epoch > 0 and epoch % self.every_epochs == 0

    @property
    def epoch_period(self) -> int:
        return math.lcm(self.every_epochs, super().epoch_period)

    @property
    def lr_scale(self) -> float:
        """The learning-rate factor of dropping epochs; `prefix` scales gradients per unit instead."""
        if self.lr_policy == "double":
            return 2.0
        return 1 / (1 - self.drop_rate) if self.lr_policy == "inverse" and self.unit != "prefix" else 1.0


_UNITS = ("tensor", "layer", "block", "prefix")
_POLICIES = ("inverse", "double", "none")


class _LayerDropBack(WrappingEstimator):
    """Freezes the dropped units for the time of a `backward`, by turning `requires_grad` off.

    Attributes:
        step: optimizer steps of this epoch that had a `backward`.
        dropped: which units the current step drops.
        left: the parameters that the last `backward` left with a gradient, their versions and the gradients'.
    """

    method: LayerDropBack

    def __init__(self, method: LayerDropBack, inner: GradientEstimator, loss: _RefusingReentrant) -> None:
        super().__init__(method, inner)
        self.loss = loss
        self.units = droppable_units(inner.model, method.unit, method.head)  # the same parameters as before the surgery
        sizes = [max(p.numel() for p in unit.parameters) for unit in self.units]
        self.pool = pool_masks(method.seed, sizes, method.drop_rate, method.pool) if method.pool else None
        self.epoch = self.step = 0
        self.dropping = False
        self.dropped: list[bool] = []
        self.told: list[bool] | None = None  # the mask of every step from now on, by `choose`
        self.left: list[tuple[nn.Parameter, int, int]] = []
        self.drawn: list[list[bool]] = []  # masks of `_STEPS_AT_ONCE` steps, the first of them `drawn_from`
        self.drawn_from = -1

    def start_epoch(self, epoch: int) -> EpochPlan:
        _let_compiled_layers_see_masks()
        self.epoch, self.step, self.drawn_from, self.left, self.told = epoch, 0, -1, [], None
        self.dropping = self.method.is_dropping(epoch)
        plan = super().start_epoch(epoch)
        if not self.dropping:
            return plan
        return plan * EpochPlan(self.method.lr_scale, self.method.batch_scale, "dropping")

    def backward(self, x: Tensor, y: Tensor) -> Tensor:
        if not (self.dropping and self.method.mask):
            loss = super().backward(x, y)
            self.loss.looks = 0  # it saw the whole graph
            return loss
        begins = not self._continues()
        if begins:
            self.dropped = self._masks_of_step()
        skipped = [p for unit in self._dropped_units() for p in unit.parameters if p.requires_grad]
        for p in skipped:  # before the forward: later saves nothing
            p.requires_grad_(False)
            if begins:
                p.grad = None  # a stale or zero gradient would still move the parameter by momentum and decay
        hooks = self._compensation()
        try:
            loss = super().backward(x, y)
        finally:
            for p in skipped:
                p.requires_grad_(True)
            for hook in hooks:
                hook.remove()
        self.step += begins
        self.left = [(p, p._version, p.grad._version) for p in self.model.parameters() if p.grad is not None]
        return loss

    def _continues(self) -> bool:
        """Whether the last call's optimizer step is still to come: its gradients and its weights are what they were.

        Torch's fused optimizers leave no trace on a weight's version; clearing to zero does on the gradient's.
        """
        return bool(self.left) and all(
            p.grad is not None and p._version == weight and p.grad._version == gradient
            for p, weight, gradient in self.left
        )

    def _dropped_units(self) -> Iterator[Unit]:
        return (unit for unit, drop in zip(self.units, self.dropped, strict=True) if drop)

    def _masks_of_step(self) -> list[bool]:
        """This step's decision for every unit; head units are never dropped."""
        if self.told is not None:
            return self.told
        offset = self.step - self.drawn_from
        if self.drawn_from < 0 or offset >= _STEPS_AT_ONCE:
            self.drawn_from, offset = self.step, 0
            self.drawn = self._draw(range(self.step, self.step + _STEPS_AT_ONCE)).tolist()
        return self.drawn[offset]

    def _draw(self, steps: range) -> Tensor:
        """Whether each unit is dropped in these steps: bool, shape (len(steps), U)."""
        method = self.method
        if self.pool is not None:
            return self.pool[pool_pattern(method.seed, self.epoch, steps, method.pool)]
        if method.unit == "prefix":
            return prefix_mask(method.seed, self.epoch, steps, len(self.units), method.drop_rate)
        indices = torch.tensor([unit.index for unit in self.units])
        return dropped_mask(method.seed, self.epoch, steps, indices, method.drop_rate)

    @property
    def variants(self) -> int:  # type: ignore[override]
        return len(self._typical()) if self.dropping and self.method.mask else super().variants

    def choose(self, variant: int) -> None:
        if self.dropping and self.method.mask:
            self.told = self._typical()[variant].tolist()
        else:
            super().choose(variant)

    def _typical(self) -> Tensor:
        """Few masks whose mean work is the expected work: bool, shape (masks, U); all masks where they are few."""
        method = self.method
        if self.pool is not None:
            return self.pool[evenly(len(self.pool), _TYPICAL)]
        if method.unit == "prefix":
            cuts = evenly(prefix_top(len(self.units), method.drop_rate) + 1, _TYPICAL)
            return torch.arange(len(self.units)) < cuts[:, None]
        return stratified_masks(len(self.units), method.drop_rate, _TYPICAL)

    def _compensation(self) -> list[RemovableHandle]:
        """Hooks that scale what this call adds to the gradients of a `prefix`'s kept units by 1/(1-p_l)."""
        if self.method.unit != "prefix" or self.method.lr_policy != "inverse":
            return []
        top = prefix_top(len(self.units), self.method.drop_rate)
        scales = [min(_PREFIX_CAP, (top + 1) / (position + 1)) for position in range(top)]
        return [
            p.register_hook(partial(mul, scale))
            for unit, scale in zip(self.units, scales, strict=False)
            for p in unit.parameters
            if p.requires_grad
        ]

    def metrics(self) -> dict[str, float]:
        return {**super().metrics(), "ldb/dropping": float(self.dropping)}

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "epoch": self.epoch, "step": self.step, "dropping": self.dropping}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.epoch, self.step, self.dropping = state["epoch"], state["step"], state["dropping"]
        self.drawn_from, self.left = -1, []


def _refuse_rigid_ddp(model: nn.Module) -> None:
    """Raises ValueError where DistributedDataParallel would wait for the gradients of dropped layers, or miss kept."""
    for wrapper in wrappings(model):
        if isinstance(wrapper, nn.parallel.DistributedDataParallel) and (
            wrapper.static_graph or not wrapper.find_unused_parameters
        ):
            raise ValueError(
                "LayerDropBack in DistributedDataParallel: the layers without a gradient change from step to step; "
                "wrap the model with find_unused_parameters=True and without static_graph"
            )


def _let_compiled_layers_see_masks() -> None:
    """Has torch.compile look at `requires_grad` in every call, where it is in use.

    Torch 2.11 skips that where the dictionary of a module's parameters is the one it saw last, and runs a graph that
    was made for another mask; 2.14 does not.
    """
    if torch.__version__ < "2.14" and "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].config.skip_tensor_guards_with_matching_dict_tags = False


class _RefusingReentrant:
    """A loss that refuses a model with reentrant activation checkpointing, as seen in the first graphs.

    Attributes:
        looks: losses still to be looked at; each takes a walk through the graph.
    """

    def __init__(self, loss_fn: LossFn, looks: int) -> None:
        self.loss_fn, self.looks = loss_fn, looks

    def __call__(self, output: Tensor, y: Tensor) -> Tensor:
        loss = self.loss_fn(output, y)
        if self.looks and loss.grad_fn is not None:
            self.looks -= 1
            if "CheckpointFunctionBackward" in _node_names(loss.grad_fn):
                raise ValueError(
                    "LayerDropBack on reentrant activation checkpointing: a kept layer with only dropped ones below it "
                    "would get no gradient; checkpoint with use_reentrant=False"
                )
        return loss


def _node_names(root: Any) -> set[str]:
    """The names of all nodes of an autograd graph."""
    seen, found = {root}, [root]
    for node in found:  # grows while it is walked
        following = {after for after, _ in node.next_functions if after is not None} - seen
        seen |= following
        found += following
    return {node.name() for node in found}
