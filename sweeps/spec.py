"""A sweep file as a validated value.

Checked in stages, cheapest first, and without Ray: YAML and duplicate keys; keys and types; task, recipe,
methods and search ranges; then every arm is bound to the model on CPU. A stage reports all its problems.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fastbp.knobs import nearest
from fastbp.record import config_key
from sweeps.source import Source, SweepError, read_source, without_password

Slug = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=80)]
Fraction = Annotated[float, Field(gt=0, lt=1)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class SearchPart(_Part):
    """Tuning: every arm gets the same number of trials; its seconds are never drawn on a time axis."""

    sampler: Literal["tpe", "random", "qmc", "grid"] = "tpe"
    trials: int = Field(ge=1)  # per arm; an arm without searched fields runs once
    epochs: int | None = Field(default=None, ge=1)  # of a trial; null: the recipe's
    cpus: float = Field(default=1, gt=0)  # per trial
    gpus: float | None = Field(default=None, ge=0)  # per trial; 0.25 packs four on a device; null: 1 where there is one
    seed: int = Field(default=1000, ge=0)  # of every trial and of the samplers; best none of the measured seeds
    checkpoint_epochs: int = Field(default=0, ge=0)  # state is saved every so many epochs; 0: never


class MeasurePart(_Part):
    """The chosen settings over several seeds, one at a time, in random blocks with the backprop anchor."""

    seeds: list[int] = Field(min_length=1)
    controls: bool = True  # also run every arm at its exact setting
    targets: list[Fraction] = []  # validation accuracies for time-to-target, fixed before measuring
    gpus: int | None = Field(default=None, ge=0, le=1)  # 1: a whole device per run; 0: the whole CPU; null: 1 if any
    threads: int | None = Field(default=None, ge=1)  # of a run; null: all CPUs of its node
    order_seed: int = Field(default=0, ge=0)  # of the order within the blocks

    @model_validator(mode="after")
    def _distinct(self) -> MeasurePart:
        if len(set(self.seeds)) != len(self.seeds) or min(self.seeds) < 0:
            raise ValueError("seeds must be distinct whole numbers from 0")
        return self


class MlflowPart(_Part):
    tracking_uri: str | None = None  # null: MLFLOW_TRACKING_URI, else sqlite in the current folder
    experiment: str | None = None  # null: the sweep's name

    @model_validator(mode="after")
    def _no_password(self) -> MlflowPart:
        if self.tracking_uri and self.tracking_uri != without_password(self.tracking_uri):
            raise ValueError(
                "tracking_uri holds a password; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD instead"
            )
        return self


class TaskPart(_Part):
    data: str
    model: str
    model_args: dict[str, Any] = {}
    data_args: dict[str, Any] = {}


class Sweep(_Part):
    """A sweep file. `recipe` and `arms` may hold search expressions, which `sweeps.arms` resolves."""

    name: Slug
    task: TaskPart
    recipe: dict[str, Any]
    arms: dict[Slug, dict[str, Any]] = Field(min_length=1)
    search: SearchPart | None = None
    measure: MeasurePart | None = None
    mlflow: MlflowPart = MlflowPart()
    max_failures: int = Field(default=1, ge=0)  # retries of a failed run per start of the sweep
    storage_path: str | None = None  # of Ray Tune; a cluster needs a shared folder or URI; null: inside the output

    @model_validator(mode="after")
    def _something_to_do(self) -> Sweep:
        if self.search is None and self.measure is None:
            raise ValueError("nothing to do: give a `search` part, a `measure` part, or both")
        return self

    def config(self) -> dict[str, Any]:
        """What is trained, as JSON-able dictionaries; not where it is stored or how often it is retried."""
        return self.model_dump(mode="json", exclude={"mlflow", "max_failures", "storage_path"})

    @property
    def hash(self) -> str:
        return config_key(self.config())

    def smoke(self) -> Sweep:
        """The same sweep at its smallest, for CI: one epoch, one trial per arm, one seed."""
        search, measure = self.search, self.measure
        return self.model_copy(
            update={
                "name": f"{self.name}-smoke",
                "recipe": {**self.recipe, "epochs": 1, "warmup_epochs": 0},
                "search": search and search.model_copy(update={"trials": 1, "epochs": 1}),
                "measure": measure and measure.model_copy(update={"seeds": measure.seeds[:1]}),
            }
        )


def load_sweep(path: Path, name: str | None = None) -> tuple[Sweep, Source]:
    """Read and check keys and types of a sweep file.

    Args:
        path: the file.
        name: how messages call it; default the path.

    Raises:
        SweepError: everything found, as `file:line: sentence`.
    """
    source = read_source(path, name)
    if not isinstance(source.data, dict):
        raise SweepError(f"{source.name}:1: a sweep file is a mapping with name, task, recipe, arms, search, measure")
    try:
        sweep = Sweep.model_validate(source.data)
    except ValidationError as error:
        for item in error.errors():
            source.problem(tuple(item["loc"]), _sentence(item, source.data))
        source.check()
        raise
    _check_anchor(sweep, source)
    source.check()
    return sweep, source


def _sentence(item: Any, data: Any) -> str:
    """One validation error in plain words, with the nearest valid key."""
    loc = [part for part in item["loc"] if part != "[key]"]
    where = ".".join(map(str, loc[:-1])) or "the sweep"
    if item["type"] == "extra_forbidden":
        return f"unknown key {loc[-1]!r} in {where}{nearest(str(loc[-1]), _keys_at(loc[:-1]))}"
    if item["type"] == "missing":
        return f"missing key {loc[-1]!r} in {where}"
    message = item["msg"].removeprefix("Value error, ")
    if not loc:
        return message
    got = "" if isinstance(item["input"], dict | BaseModel) else f" = {item['input']!r}"
    return f"{'.'.join(map(str, loc))}{got}: {message[0].lower()}{message[1:]}"


def _keys_at(loc: list[Any]) -> list[str]:
    parts = {"task": TaskPart, "search": SearchPart, "measure": MeasurePart, "mlflow": MlflowPart}
    return list((parts.get(str(loc[0]), Sweep) if loc else Sweep).model_fields)


def _check_anchor(sweep: Sweep, source: Source) -> None:
    if sweep.measure and not any(
        set(arm) <= {"method", "recipe"} and arm.get("method") == "bp" for arm in sweep.arms.values()
    ):
        source.problem(("arms",), "no arm is plain backprop; measuring needs the anchor: add `bp: {method: bp}`")
