"""LayerDropBack: in every n-th epoch, random layers get no weight gradient and no update.

Idea        The forward pass and the error signal stay whole; only weight gradients are left out. In those epochs the
            learning rate, and optionally the batch, is larger.
Exact when  mask = False (the control arm: learning-rate and batch plan stay), or drop_rate = 0.
Needs       Any model. Wraps `inner`.
Cost        Saves at most drop_rate x the weight gradients' share (about 1/3) of the dropping epochs: 8 % of a run at
            the defaults. A larger batch saves time too, by itself: compare with the control.
Departs     Learning rate times exactly 1/(1-p) (the authors' code: 2, or 1/(1-p+1e-6)); all parameter groups keep
            their ratios; parameters frozen by the user stay frozen; the mask is a pure function of
            (seed, epoch, step, unit); default unit `layer`, the authors' code drops single tensors (`tensor`).
            `prefix` is not in the paper: one random cut per step, everything below it is dropped; each kept unit's
            gradient is scaled by 1/(1-p_l), at most 4, instead of the learning rate.
Not for     Gradient accumulation (every backward draws a mask and clears what it drops); saving memory;
            compute-bound training where 8 % is not worth the noise; torch.compile of a whole model (every mask
            recompiles).
Reference   Hershkovitch Neiterman, Ben-Artzi (2024), arXiv:2412.18027.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from fastbp.knobs import Choice, Uniform, require
from fastbp.method import EpochPlan, GradientEstimator, LossFn, Method, WrappingEstimator, parts
from fastbp.methods.backprop import Backprop
from fastbp.methods.ddg import DDG
from fastbp.units import droppable_units, head_parameters

_STEPS_AT_ONCE = 64  # masks are drawn for this many steps in one vectorised call
_PREFIX_CAP = 4.0  # largest gradient scale of a `prefix` unit


@dataclass(frozen=True)
class LayerDropBack(Method):
    """Random layers skip their weight gradient in every `every_epochs`-th epoch (arXiv:2412.18027, section 3).

    Attributes:
        drop_rate: probability p in [0, 1) that a unit gets no gradient in a step; 0.5 in the authors' code.
        every_epochs: period; epochs 2, 4, ... at 2, never epoch 0 (authors' code).
        unit: what one coin is tossed for: `tensor` (authors' code), `layer` (a module that owns parameters),
            `block` (a direct child of a repeated container), `prefix` (one cut per step).
        lr_policy: learning-rate factor in dropping epochs: `inverse` 1/(1-p), `double` 2, `none` 1.
        batch_scale: batch-size factor in dropping epochs; 2 in the authors' fine-tuning code, 1 in the other.
        seed: of the masks; independent of every other random number.
        mask: False keeps the plan (epochs, learning rate, batch) and drops nothing: the control arm.
        inner: the method that computes the gradient of the kept layers.
    """

    drop_rate: Annotated[float, Uniform(0.1, 0.9)] = 0.5
    every_epochs: Annotated[int, Choice((2, 3, 4))] = 2
    unit: Annotated[str, Choice(("tensor", "layer", "block", "prefix"))] = "layer"
    lr_policy: Annotated[str, Choice(("inverse", "double", "none"))] = "inverse"
    batch_scale: Annotated[float, Choice((1.0, 2.0))] = 2.0
    seed: int = 0
    mask: bool = True
    inner: Method = Backprop()

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "drop_rate", 0 <= self.drop_rate < 1, "must be in [0, 1): at 1 nothing would learn")
        require(self, "every_epochs", self.every_epochs >= 1, "must be at least 1")
        require(self, "batch_scale", self.batch_scale > 0, "must be positive; 1 keeps the batch size")
        require(self, "unit", self.unit in _UNITS, f"must be one of {', '.join(_UNITS)}")
        require(self, "lr_policy", self.lr_policy in _POLICIES, f"must be one of {', '.join(_POLICIES)}")

    def bind(self, model: nn.Module, loss_fn: LossFn) -> GradientEstimator:
        if any(isinstance(part, LayerDropBack) for part in parts(self.inner)):
            raise TypeError("LayerDropBack in LayerDropBack: two masks are one mask at another drop_rate")
        if self.unit == "prefix" and any(isinstance(part, DDG) for part in parts(self.inner)):
            raise TypeError(
                "LayerDropBack(unit='prefix') on DDG: a cut scales the gradients of its own batch, "
                "DDG's are of older ones; use another unit"
            )
        droppable_units(model, self.unit)  # refuses before the inner method touches the model
        head = head_parameters(model)
        if not any(p.requires_grad for p in model.parameters() if id(p) in head):
            raise ValueError(
                f"LayerDropBack: the head of this {type(model).__name__} is frozen, so a step that drops every unit "
                "would have nothing to differentiate; leave the head trainable"
            )
        return _LayerDropBack(self, self.inner.bind(model, loss_fn))

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
    method: LayerDropBack

    def __init__(self, method: LayerDropBack, inner: GradientEstimator) -> None:
        super().__init__(method, inner)
        self.units = droppable_units(inner.model, method.unit)  # after the inner surgery: the same parameters
        self.epoch = self.step = 0
        self.dropping = False
        self.drawn: list[list[bool]] = []  # masks of `_STEPS_AT_ONCE` steps, the first of them `drawn_from`
        self.drawn_from = -1

    def start_epoch(self, epoch: int) -> EpochPlan:
        self.epoch, self.step, self.drawn_from = epoch, 0, -1
        self.dropping = self.method.is_dropping(epoch)
        plan = super().start_epoch(epoch)
        if not self.dropping:
            return plan
        return plan * EpochPlan(self.method.lr_scale, self.method.batch_scale, "dropping")

    def backward(self, x: Tensor, y: Tensor) -> Tensor:
        if not (self.dropping and self.method.mask):
            return super().backward(x, y)
        skipped = [
            p
            for unit, drop in zip(self.units, self._dropped(), strict=True)
            if drop
            for p in unit.parameters
            if p.requires_grad
        ]
        for p in skipped:  # before the forward: later saves nothing
            p.grad = None  # a stale or zero gradient would still move the parameter by momentum and decay
            p.requires_grad_(False)
        try:
            loss = super().backward(x, y)
        finally:
            for p in skipped:
                p.requires_grad_(True)
        if self.method.unit == "prefix" and self.method.lr_policy == "inverse":
            self._compensate()
        self.step += 1
        return loss

    def _dropped(self) -> list[bool]:
        """This step's decision for every unit; head units are never dropped."""
        offset = self.step - self.drawn_from
        if self.drawn_from < 0 or offset >= _STEPS_AT_ONCE:
            self.drawn_from, offset = self.step, 0
            steps = range(self.step, self.step + _STEPS_AT_ONCE)
            draw = _prefix_mask if self.method.unit == "prefix" else dropped_mask
            indices = torch.tensor([unit.index for unit in self.units])
            self.drawn = draw(self.method.seed, self.epoch, steps, indices, self.method.drop_rate).tolist()
        return self.drawn[offset]

    def _compensate(self) -> None:
        top = prefix_top(len(self.units), self.method.drop_rate)
        for position, unit in enumerate(self.units[:top]):
            scale = min(_PREFIX_CAP, (top + 1) / (position + 1))  # 1 / (1 - p_l)
            for p in unit.parameters:
                if p.grad is not None:
                    p.grad.mul_(scale)

    def metrics(self) -> dict[str, float]:
        return {**super().metrics(), "ldb/dropping": float(self.dropping)}

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "epoch": self.epoch, "step": self.step, "dropping": self.dropping}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.epoch, self.step, self.dropping = state["epoch"], state["step"], state["dropping"]
        self.drawn_from = -1


def dropped_mask(seed: int, epoch: int, steps: range, units: Tensor, drop_rate: float) -> Tensor:
    """Which units are dropped: a pure function of (seed, epoch, step, unit), without any generator.

    Args:
        units: unit indices, shape (U,), int64.

    Returns:
        bool tensor, shape (len(steps), U), True with probability `drop_rate`, independent over all four arguments.
    """
    return _uniform(seed, epoch, steps, units) < drop_rate


def prefix_top(units: int, drop_rate: float) -> int:
    """The highest cut: the cut is uniform on 0..top, so that units are dropped `drop_rate` of the time on average.

    Above 1/2, where no uniform cut from 0 reaches that average, the top is the number of units.
    """
    return min(round(2 * drop_rate * units), units)


def _prefix_mask(seed: int, epoch: int, steps: range, units: Tensor, drop_rate: float) -> Tensor:
    top = prefix_top(len(units), drop_rate)
    cuts = (_uniform(seed, epoch, steps, torch.zeros(1, dtype=torch.int64)) * (top + 1)).floor()
    return torch.arange(len(units)) < cuts


def _uniform(seed: int, epoch: int, steps: range, units: Tensor) -> Tensor:
    """Uniform numbers in [0, 1), shape (len(steps), U), float64: 53 bits of a counter-based 64-bit hash."""
    word = _mix(torch.tensor(seed)) + epoch
    word = _mix(_mix(word) + torch.arange(steps.start, steps.stop)[:, None])
    word = _mix(word + units)
    return _shift(word, 11).double() * 2.0**-53


def _mix(word: Tensor) -> Tensor:
    """The splitmix64 finaliser (Steele, Lea, Flood, OOPSLA 2014) on int64 words, which wrap like unsigned ones."""
    word = word + -7046029254386353131
    word = (word ^ _shift(word, 30)) * -4658895280553007687
    word = (word ^ _shift(word, 27)) * -7723592293110705685
    return word ^ _shift(word, 31)


def _shift(word: Tensor, bits: int) -> Tensor:
    """Logical shift to the right of an int64 tensor."""
    return (word >> bits) & ((1 << (64 - bits)) - 1)
