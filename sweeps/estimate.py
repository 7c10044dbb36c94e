"""What a sweep will cost, from pilot steps on this machine: device time per part and arm."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from fastbp.config import RunConfig, load_task_data
from fastbp.data import Dataset
from fastbp.environment import device_fingerprint
from fastbp.knobs import Choice, Domain, IntRange, LogUniform
from sweeps.arms import Arm, Values
from sweeps.pilot import Pilot, pilot
from sweeps.plan import Plan


@dataclass(frozen=True)
class Work:
    """Runs of a part that cost the same.

    Attributes:
        part: search, measure or ablate.
        runs: how many, seeds included.
        config: of one of them.
        threads: of torch in each.
        at_once: how many run beside each other on one device; on a GPU packing is counted as no gain.
    """

    part: str
    arm: str
    runs: int
    config: RunConfig
    device: str
    threads: int
    at_once: int


@dataclass
class Cost:
    """Runs of an arm in one part.

    Attributes:
        runs: their number.
        seconds: of a whole device, each run as long as it takes alone.
    """

    runs: int = 0
    seconds: float = 0.0


@dataclass
class Estimate:
    """What a sweep costs on this machine.

    Attributes:
        costs: by part, then arm.
        epoch_seconds: training seconds of an epoch of the arm, by arm.
        devices: "NAME, N threads" of what was timed.
        foreign: whether the sweep asks for GPUs and this machine has none.
        stops: whether trials may be stopped early, which is not counted.
        failed: one sentence per configuration that could not be timed; its runs are not in `costs`.
        wall_seconds: on this machine, all of its GPUs searching at once.
    """

    costs: dict[str, dict[str, Cost]]
    epoch_seconds: dict[str, float]
    devices: list[str]
    foreign: bool
    stops: bool
    failed: list[str]
    wall_seconds: float

    @property
    def seconds(self) -> float:
        """Of a whole device, over all parts and arms."""
        return sum(cost.seconds for costs in self.costs.values() for cost in costs.values())


def estimate(plan: Plan, tell: Callable[[str], Any] = lambda text: None) -> Estimate:
    """Pilot every arm, and every control where there are any, and add up what the sweep runs of each.

    Args:
        tell: is told which pilot runs now.
    """
    works = works_of(plan)
    data = _Data()
    stops = plan.sweep.search is not None and plan.sweep.search.rungs is not None
    out = Estimate({part: {} for part in dict.fromkeys(w.part for w in works)}, {}, [], _foreign(plan), stops, [], 0.0)
    pilots: dict[Any, Pilot | None] = {}
    longest = max(work.config.recipe.epochs for work in works)
    _try_pilot(works[0].config, works[0], data, [])  # what a process does once, a sweep's workers have done before
    for work in works:
        recipe = work.config.recipe
        key = (work.config.method, replace(recipe, epochs=longest), work.device, work.threads)
        if key not in pilots:
            tell(f"timing steps: {work.arm}{' control' if work.config.role == 'control' else ''}")
            pilots[key] = _try_pilot(replace(work.config, recipe=key[1]), work, data, out.failed)
        timed = pilots[key]
        if timed is None:
            continue
        seconds = work.runs * (data.load_seconds + timed.run_seconds(recipe.epochs)) / work.at_once
        cost = out.costs[work.part].setdefault(work.arm, Cost())
        cost.runs, cost.seconds = cost.runs + work.runs, cost.seconds + seconds
        out.wall_seconds += seconds / _devices(work)
        if work.config.role != "control" and work.config.arm == work.arm:  # measured later than searched: whole recipe
            out.epoch_seconds[work.arm] = timed.train_seconds(recipe.epochs) / recipe.epochs
        where = f"{_device_name(work.device)} ({work.device}, {_count(work.threads, 'thread')})"
        if where not in out.devices:
            out.devices.append(where)
    return out


def works_of(plan: Plan) -> list[Work]:
    """The runs of a sweep, those that cost the same in one; searched fields stand at the middle of their ranges."""
    search, measure, cpus = plan.sweep.search, plan.sweep.measure, len(os.sched_getaffinity(0))
    works = []
    for arm in plan.arms if search else ():
        device, threads = _device(plan.search_part.gpus), max(1, int(plan.search_part.cpus))
        at_once = 1 if device == "cuda" else max(1, int(cpus / plan.search_part.cpus))
        config = plan.search_run(arm, middle(arm))
        works.append(Work("search", arm.name, plan.trials(arm), config, device, threads, at_once))
    for arm in plan.arms if measure else ():
        device, threads = _device(plan.measure_part.gpus), plan.measure_part.threads or cpus
        settings = 1 if arm.name == plan.anchor or not arm.space else plan.measure_part.settings
        seeds = len(plan.measure_part.seeds) * settings
        for config in plan.cells(arm, middle(arm)):
            works.append(Work("measure", arm.name, seeds, config, device, threads, 1))
    ablated = plan.ablate_runs()
    for config in {run.arm: run for run in ablated}.values():
        device, threads = _device(plan.exclusive_part.gpus), plan.exclusive_part.threads or cpus
        arm, blocks = config.arm.partition("/")[0], sum(run.arm == config.arm for run in ablated)
        works.append(Work("ablate", arm, blocks, config, device, threads, 1))
    return works


def middle(arm: Arm) -> Values:
    """The arm's setting at the middle of every searched range; a choice at its default, else its middle value."""
    values = arm.values_of(arm.method.to_dict(), arm.recipe.to_dict())
    return {path: _middle(domain, values[path]) for path, domain in arm.space.items()}


def _middle(domain: Domain, default: Any) -> Any:
    if isinstance(domain, Choice):
        return default if default in domain.values else domain.values[len(domain.values) // 2]
    if isinstance(domain, IntRange):
        return (domain.low + domain.high) // 2
    if isinstance(domain, LogUniform):
        return math.sqrt(domain.low * domain.high)
    return (domain.low + domain.high) / 2


class _Data:
    """The sweep's data set, loaded once; every run loads it anew."""

    def __init__(self) -> None:
        self._loaded: dict[Any, Dataset] = {}
        self.load_seconds = 0.0

    def of(self, work: Work) -> Dataset:
        key = (work.config.recipe.dtype, work.device)
        if key not in self._loaded:
            began = time.perf_counter()
            self._loaded[key] = load_task_data(work.config.task, work.config.recipe, work.device)
            self.load_seconds = time.perf_counter() - began
        return self._loaded[key]


def _try_pilot(config: RunConfig, work: Work, data: _Data, failed: list[str]) -> Pilot | None:
    try:
        return pilot(config, device=work.device, threads=work.threads, data=data.of(work))
    except (TypeError, ValueError, RuntimeError) as error:  # out of memory is a RuntimeError
        control = " control" if config.role == "control" else ""
        failed.append(f"{work.part} {work.arm}{control}: {str(error).splitlines()[0]}")
        return None


def _device(gpus: float | None) -> str:
    return "cuda" if torch.cuda.is_available() and gpus != 0 else "cpu"


def _devices(work: Work) -> int:
    """How many devices of this machine share the runs of a part; measured runs come one at a time."""
    return torch.cuda.device_count() if work.device == "cuda" and work.part == "search" else 1


def _foreign(plan: Plan) -> bool:
    wanted = [part.gpus for part in (plan.sweep.search, plan.sweep.exclusive) if part is not None]
    return any(wanted) and not torch.cuda.is_available()


def _device_name(device: str) -> str:
    return device_fingerprint(torch.device(device))["name"]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
