"""The recipe: everything about training that is not the method, the same lines for every arm."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastbp.data import AUGMENTATIONS
from fastbp.knobs import Choice, LogUniform, Uniform, coerce_fields, nearest, require

OPTIMIZERS = ("sgd", "adam", "adamw")
SCHEDULES = ("cosine", "constant", "step")
PRECISIONS = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.float32}


@dataclass(frozen=True)
class Recipe:
    """Hyper-parameters of the training loop.

    Attributes:
        epochs: passes over the training split.
        batch_size: examples per step; a method's plan may scale it per epoch.
        optimizer: `sgd`, `adam` or `adamw`.
        lr: peak learning rate; a method's plan may scale it per epoch.
        momentum: of sgd; the first beta of adam and adamw.
        nesterov: for sgd with momentum.
        weight_decay: on all parameters.
        schedule: `cosine` to 0, `step` (times 0.1 after 50 % and 75 %), `constant`; by the fraction of epochs
            done, so that a larger batch does not change it.
        warmup_epochs: linear from 0 to `lr` first.
        label_smoothing: of the cross entropy, in training only.
        augment: `none`, `flip`, `crop`, `flip_crop`, drawn on the device.
        eval_every_epochs: validation cadence; the last epoch is always evaluated.
        eval_batch_size: examples per evaluation batch.
        precision: `float32`, `float64`, or `bfloat16` (float32 weights under autocast).
    """

    epochs: int = 10
    batch_size: Annotated[int, Choice((32, 64, 128, 256))] = 64
    optimizer: str = "sgd"
    lr: Annotated[float, LogUniform(1e-3, 1.0)] = 0.1
    momentum: Annotated[float, Uniform(0.0, 0.95)] = 0.9
    nesterov: bool = True
    weight_decay: Annotated[float, LogUniform(1e-5, 1e-2)] = 5e-4
    schedule: str = "cosine"
    warmup_epochs: float = 0.0
    label_smoothing: Annotated[float, Uniform(0.0, 0.2)] = 0.0
    augment: str = "none"
    eval_every_epochs: int = 1
    eval_batch_size: int = 1024
    precision: str = "float32"

    def __post_init__(self) -> None:
        coerce_fields(self)
        for name in ("epochs", "batch_size", "eval_every_epochs", "eval_batch_size"):
            require(self, name, getattr(self, name) >= 1, "must be at least 1")
        require(self, "lr", self.lr > 0, "must be positive")
        require(self, "momentum", 0 <= self.momentum < 1, "must be in [0, 1)")
        require(self, "weight_decay", self.weight_decay >= 0, "must not be negative")
        require(self, "warmup_epochs", 0 <= self.warmup_epochs < self.epochs, "must be in [0, epochs)")
        require(self, "label_smoothing", 0 <= self.label_smoothing < 1, "must be in [0, 1)")
        for name, valid in (
            ("optimizer", OPTIMIZERS),
            ("schedule", SCHEDULES),
            ("augment", AUGMENTATIONS),
            ("precision", tuple(PRECISIONS)),
        ):
            value = getattr(self, name)
            require(self, name, value in valid, f"must be one of {', '.join(valid)}{nearest(value, valid)}")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Recipe:
        """The inverse of `to_dict`; missing fields take their defaults.

        Raises:
            ValueError: unknown field; the message has the nearest valid one.
        """
        names = [f.name for f in fields(cls)]
        for key in data:
            if key not in names:
                raise ValueError(f"Recipe has no field {key!r}{nearest(key, names)}")
        return cls(**data)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights and of the images in a batch."""
        return PRECISIONS[self.precision]

    def lr_at(self, epochs_done: float) -> float:
        """The learning rate after a (fractional) number of epochs, before any method's plan.

        >>> Recipe(epochs=10, lr=1.0).lr_at(5.0)
        0.5
        """
        if epochs_done < self.warmup_epochs:
            return self.lr * epochs_done / self.warmup_epochs
        done = (epochs_done - self.warmup_epochs) / (self.epochs - self.warmup_epochs)
        if self.schedule == "cosine":
            return self.lr * 0.5 * (1 + math.cos(math.pi * done))
        if self.schedule == "step":
            return self.lr * (0.01 if done >= 0.75 else 0.1 if done >= 0.5 else 1.0)
        return self.lr

    def batch_size_at(self, scale: float) -> int:
        """Examples per step where a method's plan scales them; never one alone, for the sake of batch norm."""
        return max(2, math.floor(self.batch_size * scale))

    def make_optimizer(self, parameters: Iterable[nn.Parameter] | list[dict[str, Any]]) -> torch.optim.Optimizer:
        """The optimizer over the parameters or groups of them, in torch's multi-tensor form.

        Adam is fused; sgd is not, because torch's fused sgd fails where parameters take their first step at different
        times, as DDG's do.
        """
        common: dict[str, Any] = {"lr": self.lr, "weight_decay": self.weight_decay}
        if self.optimizer == "sgd":
            nesterov = self.nesterov and self.momentum > 0
            return torch.optim.SGD(parameters, momentum=self.momentum, nesterov=nesterov, foreach=True, **common)
        kind = torch.optim.Adam if self.optimizer == "adam" else torch.optim.AdamW
        return kind(parameters, betas=(self.momentum, 0.999), fused=True, **common)

    def precision_context(self, device: torch.device) -> AbstractContextManager[Any]:
        """Autocast for `bfloat16`, nothing otherwise; may stay open over optimizer steps.

        Weights are cast at every use: autocast's cache lives until its block ends, and would go on serving the weights
        of before the optimizer's step.
        """
        if self.precision == "bfloat16":
            return torch.autocast(device.type, torch.bfloat16, cache_enabled=False)
        return nullcontext()

    def make_loss(self) -> Loss:
        return Loss(self.label_smoothing)


@dataclass(frozen=True)
class Loss:
    """Mean cross entropy of logits (..., classes) against labels (...): one per example, or one per token."""

    label_smoothing: float = 0.0

    def __call__(self, logits: Tensor, y: Tensor) -> Tensor:
        return functional.cross_entropy(logits.flatten(0, -2), y.flatten(), label_smoothing=self.label_smoothing)
