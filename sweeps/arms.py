"""Arms: what a sweep compares. An arm is a method and a recipe, some of whose fields are searched."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from fastbp.config import RunConfig, Task, check_bind, load_task_data
from fastbp.data import Dataset
from fastbp.knobs import Choice, Domain, IntRange, LogUniform, Uniform, domains, nearest, set_knobs
from fastbp.method import Method, method_class
from fastbp.methods import Backprop
from fastbp.recipe import Recipe
from sweeps.source import Key, Source
from sweeps.spec import Sweep

Loaded = dict[torch.dtype, Dataset]  # the task's data by its type; all arms share the task
Values = dict[str, Any]  # a setting of the searched fields: "method.inner.drop_rate" or "recipe.lr" to value


@dataclass(frozen=True)
class Arm:
    """One line of the comparison.

    Attributes:
        method: with searched fields at their defaults.
        recipe: with searched fields at their defaults.
        space: the searched fields, "method.<dotted name>" and "recipe.<name>", in the order of the file.
    """

    name: str
    task: Task
    method: Method
    recipe: Recipe
    space: dict[str, Domain]

    @property
    def plain(self) -> bool:
        """Whether this is plain backprop."""
        return isinstance(self.method, Backprop)

    def at(self, values: Values) -> tuple[Method, Recipe]:
        """Method and recipe at one setting of the searched fields."""
        of = {kind: _under(values, kind) for kind in ("method", "recipe")}
        return set_knobs(self.method, of["method"]), set_knobs(self.recipe, of["recipe"])

    def values_of(self, method: dict[str, Any], recipe: dict[str, Any]) -> Values:
        """The inverse of `at` on recorded dictionaries."""
        return {path: _dig({"method": method, "recipe": recipe}, path) for path in self.space}


def build_arms(sweep: Sweep, source: Source) -> list[Arm]:
    """Task, recipe, methods and ranges of a sweep, checked field by field.

    Raises:
        SweepError: everything found, as `file:line: sentence`.
    """
    task = _task(sweep, source)
    base, base_space = _dataclass(Recipe, dict(sweep.recipe), ("recipe",), source)
    source.check()
    assert task is not None
    assert base is not None
    arms = []
    for name, data in sweep.arms.items():
        data = dict(data)
        override = data.pop("recipe", {})
        method, method_space = _method(data, ("arms", name), source)
        recipe, space = _override(base, base_space, override, ("arms", name, "recipe"), source)
        if method is not None and recipe is not None:
            space = _prefixed("method", method_space) | _prefixed("recipe", space)
            arms.append(Arm(name, task, method, recipe, space))
    source.check()
    for arm in arms:
        if arm.space and sweep.search is None:
            paths = ", ".join(arm.space)
            source.problem(("arms", arm.name), f"arm {arm.name} searches {paths}, but there is no `search` part")
    source.check()
    return arms


def check_arms(arms: list[Arm], source: Source, loaded: Loaded) -> int:
    """Bind every arm to the model on CPU, at its defaults and at the ends of its ranges.

    Returns:
        training examples in an epoch; 0 where the data cannot be loaded.

    Raises:
        SweepError: everything refused, as `file:line: sentence`.
    """
    for arm in arms:
        for values in corners(arm.space):
            error = refusal(arm.task, *arm.at(values), loaded)
            if error is not None:
                at = ", ".join(f"{path} = {value!r}" for path, value in values.items())
                source.problem(("arms", arm.name), f"arm {arm.name}{f' at {at}' if at else ''}: {error}")
                break
    source.check()
    return next((len(data.train) for data in loaded.values()), 0)


def refusal(task: Task, method: Method, recipe: Recipe, loaded: Loaded) -> Exception | None:
    """Why this setting cannot be bound to the model; None where it can."""
    try:
        if recipe.dtype not in loaded:
            loaded[recipe.dtype] = load_task_data(task, recipe)
        check_bind(RunConfig(task=task, recipe=recipe, method=method, seed=0), loaded[recipe.dtype])
    except (TypeError, ValueError, ImportError, OSError) as error:
        return error
    return None


def _task(sweep: Sweep, source: Source) -> Task | None:
    try:
        return Task(**sweep.task.model_dump())
    except (TypeError, ValueError) as error:
        source.problem(("task",), f"task: {error}")
        return None


def _method(data: Any, key: Key, source: Source) -> tuple[Method | None, dict[str, Domain]]:
    data = {"method": data} if isinstance(data, str) else data
    where = ".".join(map(str, key))
    if not isinstance(data, dict) or "method" not in data:
        source.problem(key, f"{where}: expected {{method: name, ...}}, got {data!r}")
        return None, {}
    data = dict(data)
    try:
        kind = method_class(data.pop("method"))
    except ValueError as error:
        source.problem((*key, "method"), f"{where}.method: {error}")
        return None, {}
    if "inner" not in data or "inner" not in {f.name for f in fields(kind)}:
        return _dataclass(kind, data, key, source)
    if data["inner"] == "search" or (isinstance(data["inner"], dict) and set(data["inner"]) & set(_EXPRESSIONS)):
        source.problem(
            (*key, "inner"),
            f"{where}.inner: the method inside is not searched, as each would get only a part of the arm's trials; "
            "make one arm per inner method",
        )
        return None, {}
    inner, inner_space = _method(data.pop("inner"), (*key, "inner"), source)
    outer, space = _dataclass(kind, data, key, source)
    if inner is None or outer is None:
        return None, {}
    return replace(outer, inner=inner), space | _prefixed("inner", inner_space)


def _override(
    base: Recipe, space: dict[str, Domain], data: Any, key: Key, source: Source
) -> tuple[Recipe | None, dict]:
    """The sweep's recipe with an arm's own fields on top."""
    if not isinstance(data, dict):
        source.problem(key, f"{'.'.join(map(str, key))}: expected a mapping of recipe fields, got {data!r}")
        return None, {}
    recipe, own_space = _dataclass(Recipe, data, key, source, base)
    return recipe, {name: domain for name, domain in space.items() if name not in data} | own_space


def _dataclass(
    kind: Any, data: dict[str, Any], key: Key, source: Source, base: Any = None
) -> tuple[Any, dict[str, Domain]]:
    """Build a method or recipe from literals and search expressions; problems stand at their field's line."""
    where, names = ".".join(map(str, key)), [f.name for f in fields(kind)]
    before, literal, space = len(source.problems), {}, {}
    for name, value in data.items():
        if name not in names:
            source.problem((*key, name), f"unknown key {name!r} in {where}{nearest(name, names)}")
        elif not _is_expression(value):
            literal[name] = _frozen(value)
        else:
            try:
                space[name] = _domain(value, domains(kind).get(name))
            except ValueError as error:
                source.problem((*key, name), f"{where}.{name}: {error}")
    built = _construct(kind, literal, key, source, base)
    for name, domain in space.items() if built is not None else ():
        try:
            for end in _ends(domain):
                set_knobs(built, {name: end})
        except (TypeError, ValueError) as error:
            source.problem((*key, name), f"{where}.{name}: {error}")
    return (None, {}) if len(source.problems) > before else (built, space)


def _construct(kind: Any, literal: dict[str, Any], key: Key, source: Source, base: Any) -> Any:
    """The value itself; every refused field is reported at its own line, as far as the message names it."""
    literal = dict(literal)
    while True:
        try:
            return kind(**literal) if base is None else replace(base, **literal)
        except (TypeError, ValueError) as error:
            named = re.match(r"\w+\.(\w+) = ", str(error))
            name = named.group(1) if named and named.group(1) in literal else None
            source.problem((*key, name) if name else key, f"{'.'.join(map(str, key))}: {error}")
            if name is None:
                return None
            del literal[name]


_EXPRESSIONS = ("uniform", "log_uniform", "int", "choice")


def _is_expression(value: Any) -> bool:
    return value == "search" or isinstance(value, dict)


def _domain(value: Any, own: Domain | None) -> Domain:
    """The domain of `search`, {uniform: [a, b]}, {log_uniform: [a, b]}, {int: [a, b]} or {choice: [...]}."""
    if value == "search":
        if own is None:
            raise ValueError("`search` needs a field with a range of its own; give one, e.g. {uniform: [0.1, 0.9]}")
        return own
    if len(value) != 1 or next(iter(value)) not in _EXPRESSIONS:
        known = ", ".join(_EXPRESSIONS)
        raise ValueError(
            f"{value!r} is no search expression{nearest(next(iter(value), ''), _EXPRESSIONS)}; one of {known}"
        )
    kind, values = next(iter(value.items()))
    if kind == "choice":
        if not isinstance(values, list) or not values:
            raise ValueError(f"choice: expected a list of values, got {values!r}")
        return Choice(tuple(_frozen(v) for v in values))
    numbers = int if kind == "int" else (int, float)
    if not (
        isinstance(values, list) and len(values) == 2 and all(isinstance(v, numbers) and v is not True for v in values)
    ):
        raise ValueError(f"{kind}: expected [low, high], got {values!r}")
    low, high = values
    if low >= high or (kind == "log_uniform" and low <= 0):
        raise ValueError(f"{kind}: [{low}, {high}] needs {'0 < ' if kind == 'log_uniform' else ''}low < high")
    if kind == "int":
        return IntRange(low, high)
    return (Uniform if kind == "uniform" else LogUniform)(float(low), float(high))


def _ends(domain: Domain) -> tuple[Any, ...]:
    return domain.values if isinstance(domain, Choice) else (domain.low, domain.high)


def corners(space: dict[str, Domain]) -> Iterator[Values]:
    """The defaults, then settings in which every end of every range occurs at least once."""
    yield {}
    ends = {path: _ends(domain) for path, domain in space.items() if path.startswith("method.")}
    for i in range(max((len(values) for values in ends.values()), default=0)):
        yield {path: values[min(i, len(values) - 1)] for path, values in ends.items()}


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value


def _prefixed(prefix: str, space: dict[str, Domain]) -> dict[str, Domain]:
    return {f"{prefix}.{name}": domain for name, domain in space.items()}


def _under(values: Values, prefix: str) -> Values:
    return {path.removeprefix(f"{prefix}."): v for path, v in values.items() if path.startswith(f"{prefix}.")}


def _dig(data: Any, path: str) -> Any:
    for part in path.split("."):
        data = data[part]
    return _frozen(data)
