"""A sweep file as a validated value.

Checked in stages, cheapest first, and without Ray: YAML and duplicate keys; keys and types; task, recipe,
methods and search ranges; then every arm is bound to the model on CPU. A stage reports all its problems.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fastbp.knobs import nearest
from fastbp.record import config_key
from sweeps.source import Source, SweepError, read_source, without_password

Slug = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=80)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
EPOCHS = ("epochs", "warmup_epochs")  # of a recipe: what a smoke run sets


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class RungsPart(_Part):
    """Early stopping: where a trial must be among the best of its arm to go on; see `sweeps.rungs`."""

    unit: Literal["examples", "seconds"] = "examples"  # seconds: what the training would take alone on the device
    first: float = Field(gt=0)  # the first rung, in examples or seconds
    factor: float = Field(default=3, gt=1)  # from one rung to the next
    keep: Fraction | None = None  # share of the trials on a rung that goes on; null: 1 / factor
    grace_epochs: int = Field(default=1, ge=0)  # no rung before: a method's transient, a warm-up of the learning rate

    @property
    def share(self) -> float:
        return 1 / self.factor if self.keep is None else self.keep


class SearchPart(_Part):
    """Tuning: every arm gets the same number of trials; its seconds are never drawn on a time axis."""

    sampler: Literal["tpe", "nsga2", "random", "qmc", "grid"] = "tpe"
    trials: int = Field(ge=1)  # per arm; an arm without searched fields runs once
    epochs: int | None = Field(default=None, ge=1)  # of a trial; null: the recipe's
    cpus: float = Field(default=1, gt=0)  # per trial
    gpus: float | None = Field(default=None, ge=0)  # per trial; 0.25 packs four on a device; null: 1 where there is one
    seed: int = Field(default=1000, ge=0)  # of every trial and of the samplers; best none of the measured seeds
    checkpoint_epochs: int = Field(default=0, ge=0)  # state is saved every so many epochs; 0: never
    objectives: list[Literal["val_accuracy", "flops"]] = ["val_accuracy"]  # accuracy is raised, FLOPs are lowered
    rungs: RungsPart | None = None  # null: every trial runs its full budget

    @field_validator("objectives", mode="before")
    @classmethod
    def _objectives(cls, given: Any) -> Any:
        if given not in (["val_accuracy"], ["val_accuracy", "flops"]):
            raise ValueError("expected [val_accuracy] or [val_accuracy, flops]")
        return given


class MeasurePart(_Part):
    """The chosen settings over several seeds, one at a time, in random blocks with the backprop anchor."""

    seeds: list[int] = Field(min_length=1)
    settings: int = Field(default=1, ge=1)  # per arm but the anchor: the most accurate, then others on the front
    controls: bool = True  # also run every arm at its exact setting
    targets: list[Fraction] = []  # validation accuracies for time-to-target, fixed before measuring
    gpus: int | None = Field(default=None, ge=0, le=1)  # 1: a whole device per run; 0: the whole CPU; null: 1 if any
    threads: int | None = Field(default=None, ge=1)  # of a run; null: all CPUs of its node
    order_seed: int = Field(default=0, ge=0)  # of the order within the blocks

    @model_validator(mode="after")
    def _distinct(self) -> MeasurePart:
        _check_seeds(self.seeds)
        return self


class AblatePart(_Part):
    """What the parts of one arm do: cells with components or fields changed, run and timed like `measure`."""

    arm: str
    design: Literal["leave_one_out", "add_one_in", "dose_response", "factorial"]
    factors: dict[str, list[Any] | None] | None = None  # components and fields; null: the arm's components
    max_cells: int = Field(default=32, ge=2)  # a larger factorial becomes a regular fraction
    seeds: list[int] | None = Field(default=None, min_length=1)  # null: those of the measure part
    gpus: int | None = Field(default=None, ge=0, le=1)  # as in `measure`, which has it where there is one
    threads: int | None = Field(default=None, ge=1)  # likewise

    @field_validator("factors", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        """A list of names is a mapping without levels."""
        if value is None or isinstance(value, dict):
            return value
        if not isinstance(value, list):
            raise ValueError("give a list of components, or a mapping from factors to their levels")
        if not value or not all(isinstance(name, str) for name in value) or len(set(value)) < len(value):
            raise ValueError("a list of factors holds names, each once")
        return dict.fromkeys(value)

    @model_validator(mode="after")
    def _distinct(self) -> AblatePart:
        _check_seeds(self.seeds or [0])
        return self


def _check_seeds(seeds: list[int]) -> None:
    if len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise ValueError("seeds must be distinct whole numbers from 0")


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


_ELSEWHERE = {"mlflow", "max_failures", "storage_path"}  # not what is trained


class Sweep(_Part):
    """A sweep file. `recipe` and `arms` may hold search expressions, which `sweeps.arms` resolves."""

    name: Slug
    task: TaskPart
    recipe: dict[str, Any]
    arms: dict[Slug, dict[str, Any]] = Field(min_length=1)
    search: SearchPart | None = None
    measure: MeasurePart | None = None
    ablate: list[AblatePart] = []  # in the file one mapping or a list of them
    mlflow: MlflowPart = MlflowPart()
    max_failures: int = Field(default=1, ge=0)  # retries of a failed run per start of the sweep
    storage_path: str | None = None  # of Ray Tune; a cluster needs a shared folder or URI; null: inside the output

    @field_validator("ablate", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return [value] if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _something_to_do(self) -> Sweep:
        if self.search is None and self.measure is None and not self.ablate:
            raise ValueError("nothing to do: give a `search`, a `measure` or an `ablate` part")
        return self

    @property
    def exclusive(self) -> MeasurePart | None:
        """How runs that are alone on their device are run; None where there are none."""
        if self.measure or not self.ablate:
            return self.measure
        gpus, threads = self._of_ablations("gpus"), self._of_ablations("threads")
        return MeasurePart(seeds=[0], gpus=gpus[0] if gpus else None, threads=threads[0] if threads else None)

    def _of_ablations(self, name: str) -> list[int]:
        """What the ablations say of how they are run, each value once."""
        given = [getattr(part, name) for part in self.ablate]
        return list(dict.fromkeys(value for value in given if value is not None))

    def config(self) -> dict[str, Any]:
        """What is trained, as JSON-able dictionaries; not where it is stored or how often it is retried."""
        out = self.model_dump(mode="json", exclude=_ELSEWHERE)
        for part in out["ablate"]:
            for name in ("gpus", "threads"):
                if part[name] is None:
                    del part[name]
        return {name: value for name, value in out.items() if name != "ablate" or value}

    @property
    def hash(self) -> str:
        """Of what is trained; settings at their defaults do not count, so that a new one changes nothing."""
        return config_key(self.model_dump(mode="json", exclude=_ELSEWHERE, exclude_defaults=True))

    def smoke(self) -> Sweep:
        """The same sweep at its smallest, for CI: one epoch, one trial per arm, one seed.

        Arms and ablations lose what they say of epochs; an ablation of nothing else goes, and where nothing is left to
        do, the arms are measured once.
        """
        ablate = [short for part in self.ablate if (short := _one_epoch(part)) is not None]
        search, measure = self.search, self.measure
        if not (search or measure or ablate):
            measure = self.exclusive
        return self.model_copy(
            update={
                "name": f"{self.name}-smoke",
                "recipe": {**self.recipe, "epochs": 1, "warmup_epochs": 0},
                "arms": {name: _without_epochs(arm) for name, arm in self.arms.items()},
                "search": search and search.model_copy(update={"trials": 1, "epochs": 1, "rungs": None}),
                "measure": measure and measure.model_copy(update={"seeds": measure.seeds[:1]}),
                "ablate": [part.model_copy(update={"seeds": part.seeds and part.seeds[:1]}) for part in ablate],
            }
        )


def _without_epochs(arm: dict[str, Any]) -> dict[str, Any]:
    """An arm that takes its epochs from the sweep's recipe."""
    own = arm.get("recipe")
    if not isinstance(own, dict):
        return arm
    return arm | {"recipe": {name: value for name, value in own.items() if name not in EPOCHS}}


def _one_epoch(part: AblatePart) -> AblatePart | None:
    """An ablation that changes no epochs; None where it changed nothing else."""
    if not part.factors:
        return part
    left = {name: levels for name, levels in part.factors.items() if name.removeprefix("recipe.") not in EPOCHS}
    return part.model_copy(update={"factors": left}) if left else None


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
            if item["loc"][:2] == ("ablate", 0) and isinstance(source.data["ablate"], dict):
                item["loc"] = ("ablate", *item["loc"][2:])  # the file has no list there
            source.problem(tuple(item["loc"]), _sentence(item, source.data))
        source.check()
        raise
    _check_anchor(sweep, source)
    _check_objectives(sweep, source)
    _check_ablated_devices(sweep, source)
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


def _check_objectives(sweep: Sweep, source: Source) -> None:
    search, measure = sweep.search, sweep.measure
    several = search is not None and len(search.objectives) > 1
    if several and search is not None and search.rungs is not None:
        source.problem(
            ("search", "rungs"),
            "search.rungs need one objective: with FLOPs as the second, a trial that is stopped early would look "
            "cheap; leave out `rungs` or `objectives`",
        )
    if measure is not None and measure.settings > 1 and not several:
        source.problem(
            ("measure", "settings"),
            f"measure.settings = {measure.settings}: several settings of an arm are points of its trade-off, so the "
            "search needs both objectives; add `objectives: [val_accuracy, flops]` to `search`, or leave it at 1",
        )


def _check_ablated_devices(sweep: Sweep, source: Source) -> None:
    """All runs that are alone on their device have the same one: their seconds are compared."""
    for i, part in enumerate(sweep.ablate):
        at = ("ablate",) if isinstance(source.data["ablate"], dict) else ("ablate", i)
        for name in ("gpus", "threads"):
            own, common = getattr(part, name), getattr(sweep.exclusive, name)
            if own is None or own == common:
                continue
            where = "the measure part" if sweep.measure else "another ablation"
            source.problem(
                (*at, name),
                f"ablate.{name} = {own}: {where} has {common if common is not None else 'none'}, and all measured runs "
                f"and ablations are run alike; give it in {'`measure` alone' if sweep.measure else 'one of them'}",
            )


def _keys_at(loc: list[Any]) -> list[str]:
    if loc == ["search", "rungs"]:
        return list(RungsPart.model_fields)
    parts = {"task": TaskPart, "search": SearchPart, "measure": MeasurePart, "ablate": AblatePart, "mlflow": MlflowPart}
    return list((parts.get(str(loc[0]), Sweep) if loc else Sweep).model_fields)


def _check_anchor(sweep: Sweep, source: Source) -> None:
    if sweep.exclusive and not any(
        set(arm) <= {"method", "recipe"} and arm.get("method") == "bp" for arm in sweep.arms.values()
    ):
        source.problem(("arms",), "no arm is plain backprop; measuring needs the anchor: add `bp: {method: bp}`")
