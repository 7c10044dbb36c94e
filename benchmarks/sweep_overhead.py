"""Claims: a sweep costs at most 10 % more per trial than bare Ray Tune on the same no-op trial; with reused actors, as
it searches by default, less than bare Tune without them; and 1 000 trials grow the driver by less than 30 MiB.

A no-op trial imports torch and reports a few results. Bare Tune runs it as a plain Trainable with random search and
nothing else: even its own result files, which it writes by default, are off. Ours is a whole sweep of the product:
proposals by TPE, one Trainable around one run, records on disk before anybody hears of a result; only the training is
left out. All variants run in turn in one Ray session; figures are medians over rounds of the ratio within a round, with
95 % intervals, of wall seconds per trial from the start of the experiment to its end.

    python benchmarks/sweep_overhead.py    # exit code 1 and one sentence where a claim does not hold
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from rich.console import Console

from benchmark import environment, judge, median_interval, write_json
from fastbp.config import RunConfig
from fastbp.data import Dataset
from fastbp.record import EpochRecord, RunRecord
from fastbp.run import Run
from sweeps.cluster import prepare_environment, ray_session

prepare_environment()

from ray import tune  # noqa: E402 - Ray reads its environment when it is imported

from sweeps.drive import run_sweep  # noqa: E402
from sweeps.plan import load_plan  # noqa: E402
from sweeps.progress import Progress  # noqa: E402
from trainables import method_trainable  # noqa: E402

LIMITS = {"fresh": 1.10, "reused": 1.0, "mib_per_1000": 30.0}
RESULTS = 3  # of every trial
SWEEP = """\
name: overhead-{name}
task: {{data: digits, model: mlp}}
recipe: {{epochs: {results}, lr: {{log_uniform: [0.01, 0.5]}}}}
arms: {{{arms}}}
search: {{sampler: tpe, trials: {trials}}}
"""


class NoOpRun(Run):
    """A run that trains nothing; its records are complete."""

    def _setup(self, data: Dataset | None) -> None:
        self.parameters, self.devices = 0, [self.device]

    def train_epoch(self) -> EpochRecord:
        with self.clock.segment("train"):
            self.epoch += 1
        accuracy = 1 / (1 + self.recipe.lr)
        record = EpochRecord(run_key=self.config.key, attempt=self.attempt, epoch=self.epoch - 1, val_accuracy=accuracy)
        self.last = dataclasses.replace(record, **self.clock.totals())
        return self.last


class NoOpMethod(method_trainable.MethodTrainable):
    """Our Trainable around a no-op run."""

    @staticmethod
    def _new_run(config: dict[str, Any]) -> Run:
        return NoOpRun(RunConfig.from_dict(config["run"]), device=config.get("device"), threads=config.get("threads"))


class Bare(tune.Trainable):
    """The same no-op trial without anything of ours."""

    def setup(self, config: dict[str, Any]) -> None:
        import torch

        torch.set_num_threads(1)
        self.results, self.lr = 0, config["lr"]

    def step(self) -> dict[str, Any]:
        self.results += 1
        return {"val_accuracy": 1 / (1 + self.lr), "done": self.results == RESULTS}

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.setup(new_config)
        return True


def bare(folder: Path, trials: int, reuse: bool, callbacks: list[tune.Callback] | None = None) -> None:
    """One Tune experiment of no-op trials, as many at once as the machine has processors."""
    none = tune.CheckpointConfig(checkpoint_at_end=False)
    tuner = tune.Tuner(
        tune.with_resources(Bare, {"CPU": 1}),
        param_space={"lr": tune.loguniform(0.01, 0.5)},
        tune_config=tune.TuneConfig(num_samples=trials, reuse_actors=reuse),
        run_config=tune.RunConfig(
            name="bare", storage_path=str(folder), checkpoint_config=none, verbose=0, callbacks=callbacks
        ),
    )
    found = tuner.fit()
    assert len(found) == trials, f"bare Tune ran {len(found)} of {trials} trials"
    assert not found.num_errors, f"bare Tune had errors: {found.errors}"


def ours(folder: Path, trials: int, reuse: bool, arms: int = 1, progress: Progress | None = None) -> None:
    """The search of a sweep file over no-op runs, as `fastbp-sweep run` does it."""
    file = folder / "overhead.yaml"
    names = ", ".join(f"arm{i}: {{method: bp}}" for i in range(arms))
    file.write_text(SWEEP.format(name=folder.name, results=RESULTS, arms=names, trials=trials // arms), "utf-8")
    plan = load_plan(str(file))
    with no_training(reuse), Path(os.devnull).open("w") as nowhere:
        outcome = run_sweep(plan, file, folder / "out", progress or Progress(Console(file=nowhere)), mlflow=False)
    assert outcome.ok, f"the sweep lost runs: {outcome.missing or outcome.failed}"


@contextlib.contextmanager
def no_training(reuse: bool) -> Iterator[None]:
    """Sweeps run no-op trials inside, in actors that are reused or not."""
    config: Any = tune.TuneConfig

    def tune_config(**settings: Any) -> Any:
        return config(**(settings | {"reuse_actors": reuse}))

    with (
        mock.patch.object(method_trainable, "MethodTrainable", NoOpMethod),
        mock.patch.object(tune, "TuneConfig", tune_config),
    ):
        yield


VARIANTS: dict[str, Callable[[Path, int], None]] = {
    "bare Tune": lambda folder, trials: bare(folder, trials, reuse=False),
    "sweep": lambda folder, trials: ours(folder, trials, reuse=False),
    "bare Tune, reused actors": lambda folder, trials: bare(folder, trials, reuse=True),
    "sweep, reused actors": lambda folder, trials: ours(folder, trials, reuse=True),
}


def per_trial(rounds: int, trials: int) -> dict[str, list[float]]:
    """Seconds per trial of every variant in every round; the order reverses every round."""
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for i in range(-1, rounds):
        for name in VARIANTS if i % 2 else reversed(VARIANTS):
            with tempfile.TemporaryDirectory() as folder:
                began = time.perf_counter()
                VARIANTS[name](Path(folder), trials if i >= 0 else 2)  # once untimed
                if i >= 0:
                    seconds[name].append((time.perf_counter() - began) / trials)
        if i >= 0:
            print("  ".join(f"{name} {times[-1]:.3f} s" for name, times in seconds.items()), flush=True)
    return seconds


class BareMemory(tune.Callback):
    """Notes the same under bare Tune."""

    def __init__(self, every: int) -> None:
        self.every, self.runs, self.mib = every, 0, list[float]()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.runs += 1
        if self.runs % self.every == 0:
            self.mib.append(resident_mib())


class Memory(Progress):
    """Notes the driver's resident memory every so many ended runs."""

    def __init__(self, every: int) -> None:
        super().__init__(Console(quiet=True))
        self.every, self.runs, self.mib = every, 0, list[float]()

    def ended(self, record: RunRecord) -> None:
        super().ended(record)
        self.runs += 1
        if self.runs % self.every == 0:
            self.mib.append(resident_mib())


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def memory(trials: int) -> dict[str, Any]:
    """Growth of the driver over one sweep of many short trials in four arms, from its second fifth on."""
    watch = Memory(every=max(1, trials // 10))
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        ours(Path(folder), trials, reuse=True, arms=4, progress=watch)
        seconds = time.perf_counter() - began
        beside = BareMemory(every=watch.every)
        bare(Path(folder), trials, reuse=True, callbacks=[beside])
    slopes = [
        float(np.polyfit(np.arange(len(m) - 1) * watch.every, m[1:], 1)[0]) * 1000 for m in (watch.mib, beside.mib)
    ]
    found = {"trials": watch.runs, "seconds": seconds, "every": watch.every, "mib": watch.mib, "bare_mib": beside.mib}
    return found | {"mib_per_1000": slopes[0], "bare_mib_per_1000": slopes[1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--trials", type=int, default=12, help="of a variant in a round")
    parser.add_argument("--many", type=int, default=1000, help="trials of the sweep whose memory is watched")
    parser.add_argument("--quick", action="store_true", help="as small as it gets, to see that it works")
    parser.add_argument("--out", default="results/benchmarks/sweep_overhead.json")
    arguments = parser.parse_args()
    rounds, trials, many = (1, 2, 20) if arguments.quick else (arguments.rounds, arguments.trials, arguments.many)
    with ray_session():
        seconds = per_trial(rounds, trials)
        found = memory(many)
    rows = {}
    print(f"{'':26s} {'s per trial':>12s} {'over bare Tune':>15s} {'95 % interval':>18s}")
    for name, times in seconds.items():
        ratio, low, high = median_interval([a / b for a, b in zip(times, seconds["bare Tune"], strict=True)])
        rows[name] = {"seconds": sorted(times)[len(times) // 2], "ratio": ratio, "low": low, "high": high}
        print(f"{name:26s} {rows[name]['seconds']:12.3f} {ratio:15.3f} {f'{low:.3f} to {high:.3f}':>18s}")
    print(
        f"{found['trials']} trials in one sweep: {found['seconds'] / found['trials']:.3f} s each; driver "
        f"{found['mib'][0]:.0f} MiB at the first tenth, {found['mib'][-1]:.0f} MiB at the end, "
        f"{found['mib_per_1000']:+.1f} MiB per 1000 trials; bare Tune {found['bare_mib_per_1000']:+.1f}"
    )
    figures = {
        "fresh": rows["sweep"]["ratio"],
        "reused": rows["sweep, reused actors"]["ratio"],
        "mib_per_1000": found["mib_per_1000"],
    }
    content = {"limits": LIMITS, "figures": figures, "rounds": rounds, "trials": trials, "rows": rows, "memory": found}
    write_json(arguments.out, content | environment())
    if arguments.quick:
        print("too few trials to judge the claims by")
    else:
        judge("sweep_overhead", figures, LIMITS, arguments.out, places=3)


if __name__ == "__main__":
    main()
