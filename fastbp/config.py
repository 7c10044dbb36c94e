"""What a run is: (task, recipe, method, seed), as a value that identifies it wherever it is stored."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from fastbp.data import Dataset, load_dataset
from fastbp.knobs import coerce_fields, nearest
from fastbp.method import GradientEstimator, Method, method_from_dict
from fastbp.methods import Backprop
from fastbp.methods.ddg import in_place
from fastbp.models import make_model
from fastbp.recipe import Recipe
from fastbp.record import Phase, Role, config_key


@dataclass(frozen=True)
class Task:
    """What is learnt: a data set and a model, by name.

    Attributes:
        data: see `fastbp.data.load_dataset`.
        model: see `fastbp.models.make_model`.
        data_args, model_args: their keyword arguments.
    """

    data: str = "digits"
    model: str = "resnet_tiny"
    data_args: dict[str, Any] = field(default_factory=dict)
    model_args: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        coerce_fields(self)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Task:
        names = [f.name for f in fields(cls)]
        for key in data:
            if key not in names:
                raise ValueError(f"Task has no field {key!r}{nearest(key, names)}")
        return cls(**data)


@dataclass(frozen=True)
class RunConfig:
    """The whole configuration of a run; `key` identifies it wherever it is stored.

    Attributes:
        task, recipe, method, seed: what is trained. The seed gives initial weights, data order, augmentation, dropout.
        sweep, phase, arm, role: which sweep it belongs to, and as what; see `fastbp.record.RunRecord`.
        block: the randomised block it is timed in; not part of the key.
    """

    task: Task = field(default_factory=Task)
    recipe: Recipe = field(default_factory=Recipe)
    method: Method = Backprop()
    seed: int = 0
    sweep: str = ""
    phase: Phase = "single"
    arm: str = ""
    role: Role = "method"
    block: int | None = None

    @property
    def key(self) -> str:
        """16 hex digits: the hash of everything but the block."""
        return config_key({k: v for k, v in self.to_dict().items() if k != "block"})

    def to_dict(self) -> dict[str, Any]:
        out = {f.name: getattr(self, f.name) for f in fields(self)}
        return out | {name: out[name].to_dict() for name in ("task", "recipe", "method")}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> RunConfig:
        parsed = {
            "task": Task.from_dict(data["task"]),
            "recipe": Recipe.from_dict(data["recipe"]),
            "method": method_from_dict(data["method"]),
        }
        return cls(**(data | parsed))


def load_task_data(task: Task, recipe: Recipe, device: torch.device | str = "cpu") -> Dataset:
    """The task's data set on a device, in the recipe's precision."""
    return load_dataset(task.data, device=device, dtype=recipe.dtype, **task.data_args)


def check_bind(config: RunConfig, data: Dataset | None = None) -> Method | None:
    """Build the model on the CPU and bind the method, without training; returns its exact setting.

    `data` is the task's data set where it is loaded already.

    Raises:
        TypeError, ValueError, ImportError, OSError: what a `Run` of this configuration would raise.
    """
    task = config.task
    data = data or load_task_data(task, config.recipe)
    model = make_model(task.model, data.input_shape, data.classes, task.model_args, config.seed)
    exact = config.method.exact(model)
    bound: GradientEstimator = in_place(config.method).bind(model, config.recipe.make_loss())
    bound.start_epoch(0)
    return exact
