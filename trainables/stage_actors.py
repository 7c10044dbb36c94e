"""One Ray actor per module of a DDG run: what lets one trial span several devices or nodes.

The trial's placement group holds an empty head bundle and one bundle per stage, so that Tune schedules the trial as one
unit. Every actor lives as long as the trial and takes one call per epoch.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.tune import PlacementGroupFactory
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from fastbp.config import RunConfig
from fastbp.stage_workers import ANSWER_SECONDS, TIMEOUT_SECONDS, StageError, StageWorker, seconds_for
from fastbp.staged import stages
from trainables.given_device import device_for

START_SECONDS = 300.0  # how long actors may take to come up
USED_SECONDS = 30.0  # how long idle ones may take to say what they used


def stage_resources(
    config: RunConfig, cpus: float, gpus: float, selector: dict[str, str] | None = None
) -> PlacementGroupFactory:
    """What a trial of this run asks of Ray: one bundle, or an empty one and a bundle for every stage.

    Args:
        config: the run.
        cpus: of the whole trial, shared out among its stages.
        gpus: of a run in one process; every stage gets a whole device.
        selector: labels that the bundles' nodes must have.
    """
    count = stages(config.method)
    if count == 1:
        bundles = [_bundle(cpus, gpus)]
    else:
        bundles = [{}, *[_bundle(cpus / count, float(math.ceil(gpus))) for _ in range(count)]]
    labels = {} if selector is None else {"bundle_label_selector": [selector] * count}  # Tune leaves the empty one out
    return PlacementGroupFactory(bundles, strategy="PACK", **labels)


def _bundle(cpus: float, gpus: float) -> dict[str, float]:
    return {"CPU": cpus} | ({"GPU": gpus} if gpus else {})


class StageActor:
    """A process that becomes a stage once all know where the first one is."""

    def address(self) -> str:
        """A free port of this node, for the group to meet at."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return f"tcp://{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"

    def start(
        self,
        folder: str | None,
        sys_path: list[str],
        environment: dict[str, str],
        rank: int,
        ranks: int,
        address: str,
        config: dict[str, Any],
        options: dict[str, Any],
        timeout: float,
    ) -> None:
        """Join the group and build the run; from `rank` on, the arguments are those of `StageWorker`.

        Raises:
            RuntimeError: see `device_for`.
        """
        if folder and Path(folder).is_dir():
            os.chdir(folder)
        sys.path += [item for item in sys_path if item not in sys.path]
        os.environ.update(environment)
        if options.get("device"):
            options["device"] = device_for(options["device"])
        self._worker = StageWorker(rank, ranks, address, config, options, timeout)

    def used(self) -> tuple[str, float]:
        """The node's id, and this process's processor seconds so far."""
        return ray.get_runtime_context().get_node_id(), time.process_time()

    def call(self, name: str, arguments: list[Any]) -> Any:
        return getattr(self._worker, name)(*arguments)


class RayWorkers:
    """The stages of one run as actors in the trial's placement group.

    Args:
        config: of the run.
        options: of `Run`.
        group: the trial's placement group, whose last K bundles are the stages'; None: wherever Ray has room.
        timeout: seconds a stage waits for a neighbour.

    Raises:
        StageError: a stage could not start.
    """

    def __init__(
        self,
        config: RunConfig,
        options: dict[str, Any],
        group: PlacementGroup | None = None,
        timeout: float = TIMEOUT_SECONDS,
    ) -> None:
        ranks = stages(config.method)
        self._actors = [self._actor(rank, ranks, group) for rank in range(ranks)]
        try:
            address = ray.get(self._actors[0].address.remote(), timeout=START_SECONDS)
        except (RayActorError, RayTaskError, GetTimeoutError) as error:
            self._fail(f"stage 0 did not start ({type(error).__name__})")
        names = ("FASTBP_GIT_COMMIT", "FASTBP_GIT_DIRTY")
        environment = {name: os.environ[name] for name in names if name in os.environ}
        own_path = [item for item in sys.path if item and not item.startswith((sys.prefix, sys.base_prefix))]
        self._wait(
            [
                actor.start.remote(
                    os.getcwd(), own_path, environment, rank, ranks, address, config.to_dict(), dict(options), timeout
                )
                for rank, actor in enumerate(self._actors)
            ]
        )

    @staticmethod
    def _actor(rank: int, ranks: int, group: PlacementGroup | None) -> Any:
        resources: dict[str, Any] = {"num_cpus": 1}
        if group is not None:
            index = len(group.bundle_specs) - ranks + rank  # Tune leaves an empty head bundle out
            bundle = group.bundle_specs[index]
            strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
            resources = {
                "num_cpus": bundle.get("CPU", 0),
                "num_gpus": bundle.get("GPU", 0),
                "scheduling_strategy": strategy,
            }
        return ray.remote(StageActor).options(max_restarts=0, **resources).remote()

    def call(self, name: str, *args: Sequence[Any]) -> list[Any]:
        return self._wait(
            [actor.call.remote(name, [arg[rank] for arg in args]) for rank, actor in enumerate(self._actors)],
            seconds_for(name),
        )

    def process_seconds(self) -> float | None:
        """Processor seconds of all stages so far; None where one is gone or on another node than this process."""
        try:
            used = ray.get([actor.used.remote() for actor in self._actors], timeout=USED_SECONDS)
        except RayError:
            return None
        here = ray.get_runtime_context().get_node_id()
        return sum(seconds for _, seconds in used) if all(node == here for node, _ in used) else None

    def _wait(self, calls: list[Any], seconds: float = ANSWER_SECONDS) -> list[Any]:
        """All answers; the first failure ends all stages, for the others wait for a neighbour that is gone."""
        left = {call: rank for rank, call in enumerate(calls)}
        answers: dict[int, Any] = {}
        while left:
            answered = ray.wait(list(left), num_returns=1, timeout=seconds)[0]
            if not answered:
                self._fail(f"stage {min(left.values())} did not answer within {seconds:g} s")
            for ready in answered:
                rank = left.pop(ready)
                try:
                    answers[rank] = ray.get(ready)
                except RayTaskError as error:
                    cause = error.cause if isinstance(getattr(error, "cause", None), BaseException) else error
                    self._fail(f"stage {rank} failed: {type(cause).__name__}: {_last_line(cause)}")
                except RayActorError as error:
                    gone = re.search(r"node (has died|was terminated)", str(error))
                    cause = "its node died" if gone else "its process was killed, ran out of memory, or crashed"
                    self._fail(f"stage {rank} died: {cause}")
        return [answers[rank] for rank in range(len(calls))]

    def _fail(self, sentence: str) -> None:
        self.close(gracefully=False)
        # From None: what Ray said of the actor would be taken for the end of the trial's own process.
        raise StageError(f"{sentence}; all stages were ended, start again from the last checkpoint") from None

    def close(self, *, gracefully: bool = True) -> None:
        """End all actors."""
        if gracefully:
            with contextlib.suppress(StageError):
                self.call("close")
        for actor in self._actors:
            ray.kill(actor)


def _last_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
