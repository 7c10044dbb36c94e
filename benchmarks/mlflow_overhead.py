"""Claim: a sweep that is tracked in MLflow blocks its trials at most a twentieth of the time that Ray's own
`MLflowLoggerCallback` does, per result of 25 numbers, on an MLflow server over HTTP and on sqlite.

Blocked is the time between a trial's leaving one step and its entering the next, measured in the trial: Ray Tune's own
work and what the callbacks of the driver add. All variants run the same no-op trial, one at a time, with reused actors
and Tune's own result files off, in turn within a round: bare Tune, Ray's callback, ours (the sweep's recorder, which
writes all 25 numbers to disk, beside the background thread that mirrors the records into MLflow; then the last sync).
A round's figure is the mean per result; the ratio is the median over rounds of Ray's to ours.

Ours and bare Tune run all `--trials` x `--results`. Ray's callback takes up to two seconds per result, more than an
hour for all of them, so it runs `--ray-trials` trials of `--ray-results` results; nothing is extrapolated: the
comparison is per result, and both sizes are in the JSON. In MLflow Ray's callback leaves every number of every result,
ours the curves of six of them and the rest in the records that are attached to the sweep.

    python benchmarks/mlflow_overhead.py    # exit code 1 and one sentence where the claim does not hold
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmark import environment, judge, median_interval, write_json
from fastbp.config import RunConfig, Task
from fastbp.recipe import Recipe
from fastbp.record import EpochRecord, RecordWriter, RunRecord, SweepRecord
from sweeps.cluster import prepare_environment, ray_session

prepare_environment()

from mlflow import MlflowClient  # noqa: E402
from ray import tune  # noqa: E402 - Ray reads its environment when it is imported
from ray.air.integrations.mlflow import MLflowLoggerCallback  # noqa: E402

from sweeps.ledger import Ledger  # noqa: E402
from sweeps.mlflow_pace import BackgroundSync, final_sync  # noqa: E402
from sweeps.mlflow_sync import MlflowMirror  # noqa: E402
from sweeps.progress import Progress  # noqa: E402
from sweeps.recorder import Recorder  # noqa: E402
from sweeps.stopping import Stop  # noqa: E402

TARGET = 20.0
NUMBERS = 25
WHEN = "2026-01-01T00:00:00+00:00"


class NoOp(tune.Trainable):
    """Reports 25 numbers a step and keeps the seconds between its steps.

    Its config is `setting`, JSON of the folder for the seconds and the number of results, as one text: Ray's callback
    logs every number in a config with every result; and `run`, a name or the dictionary of a RunConfig.
    """

    def setup(self, config: dict[str, Any]) -> None:
        self.folder, self.results = json.loads(config["setting"])
        self.run = None if isinstance(config["run"], str) else RunConfig.from_dict(config["run"])
        self.name = self.run.key if self.run else config["run"]
        self.blocked: list[float] = []
        self.left, self.step_number = 0.0, 0

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.setup(new_config)
        return True

    def step(self) -> dict[str, Any]:
        entered = time.perf_counter()
        if self.step_number:
            self.blocked.append(entered - self.left)
        result = self.records() if self.run else {f"number{i}": float(self.step_number + i) for i in range(NUMBERS)}
        self.step_number += 1
        done = self.step_number == self.results
        if done:
            (Path(self.folder) / f"{self.name}.json").write_text(json.dumps(self.blocked), encoding="utf-8")
        self.left = time.perf_counter()
        return result | {"done": done}

    def records(self) -> dict[str, Any]:
        """What a trial of ours reports: an epoch of 25 numbers, at its start and end also the run."""
        assert self.run is not None
        config = self.run.to_dict()
        names = ("sweep", "phase", "arm", "role", "block", "task", "recipe", "method", "seed")
        run = RunRecord(run_key=self.run.key, started_at=WHEN, **{name: config[name] for name in names})
        i = self.step_number
        epoch = EpochRecord(
            run_key=run.run_key, epoch=i, examples=i, steps=i, batch_size=1, lr=0.1, train_loss=1.0, val_loss=1.0,
            val_accuracy=0.5, train_seconds=float(i), metrics={f"number{k}": 0.5 for k in range(11)},
        )  # fmt: skip
        result: dict[str, Any] = {"record": dataclasses.asdict(epoch)}
        if i == 0:
            result["start"] = dataclasses.asdict(run)
        if i == self.results - 1:
            end = dataclasses.replace(run, status="finished", epochs_done=self.results, val_accuracy=0.5, ended_at=WHEN)
            result["end"] = dataclasses.asdict(end)
        return result


def run_tune(folder: Path, kind: str, trials: int, results: int, name: str, callbacks: list[Any]) -> list[float]:
    """One Tune experiment; the blocked seconds of all its trials."""
    runs: list[Any] = [f"trial {i}" for i in range(trials)]
    space: dict[str, Any] = {"setting": json.dumps([str(folder / "blocked"), results])}
    if kind == "ours":
        recipes = [Recipe(epochs=results, lr=(i + 1) / 1000) for i in range(trials)]
        runs = [RunConfig(Task("digits", "mlp"), r, sweep=name, phase="search", arm="bp").to_dict() for r in recipes]
        space |= {"attempt": 0, "exclusive": False}
    (folder / "blocked").mkdir()
    tune.Tuner(
        tune.with_resources(NoOp, {"CPU": 1}),
        param_space=space | {"run": tune.grid_search(runs)},
        tune_config=tune.TuneConfig(max_concurrent_trials=1, reuse_actors=True),
        run_config=tune.RunConfig(name=name, storage_path=str(folder / "tune"), callbacks=callbacks, verbose=0),
    ).fit()
    files = list((folder / "blocked").glob("*.json"))
    if len(files) != trials:
        raise RuntimeError(f"{len(files)} of {trials} trials ended")
    return [seconds for file in files for seconds in json.loads(file.read_text(encoding="utf-8"))]


def measure(kind: str, uri: str, name: str, trials: int, results: int) -> dict[str, float]:
    """Blocked seconds per result, and wall and driver CPU per result until everything is in MLflow.

    Raises:
        RuntimeError: MLflow does not hold what was reported.
    """
    with tempfile.TemporaryDirectory(prefix="fastbp-bench-") as temporary:
        folder = Path(temporary)
        cpu, wall = time.process_time(), time.perf_counter()
        if kind == "ours":
            blocked = _ours(folder, uri, name, trials, results)
        else:
            ray = [MLflowLoggerCallback(tracking_uri=uri, experiment_name=name)] if kind == "ray" else []
            blocked = run_tune(folder, kind, trials, results, name, ray)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    if kind != "bare":
        _check(uri, name, "train/loss" if kind == "ours" else "number0", trials, results)
    blocked.sort()
    return {
        "blocked_mean_s": statistics.fmean(blocked),
        "blocked_median_s": statistics.median(blocked),
        "blocked_max_s": blocked[-1],
        "wall_s": wall / (trials * results),
        "driver_cpu_s": cpu / (trials * results),
    }


def _ours(folder: Path, uri: str, name: str, trials: int, results: int) -> list[float]:
    """As a sweep does in its search."""
    writer, ledger = RecordWriter(folder / "records.jsonl"), Ledger()
    writer.write(SweepRecord(sweep=name, file_hash=name, arms=["bp"], search_trials=trials, started_at=WHEN))
    progress = Progress(Console(file=(folder / "console.txt").open("w", encoding="utf-8")))
    progress.phase("search", {"bp": trials}, ledger)
    recorder = Recorder(writer, ledger, progress.ended, progress, {}, Stop())
    mirror = MlflowMirror(folder / "records.jsonl", uri)
    with BackgroundSync(mirror):
        blocked = run_tune(folder, "ours", trials, results, name, [recorder])
    error = final_sync(mirror, print)
    progress.console.file.close()
    if error:
        raise RuntimeError(error)
    return blocked


def _check(uri: str, name: str, metric: str, trials: int, results: int) -> None:
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name(name)
    runs = [] if experiment is None else client.search_runs([experiment.experiment_id], max_results=1000)
    runs = [run for run in runs if run.data.tags.get("fastbp.level", "run") == "run"]
    if len(runs) != trials:
        raise RuntimeError(f"{name}: MLflow holds {len(runs)} runs of {trials}")
    points = {len(client.get_metric_history(run.info.run_id, metric)) for run in (runs[0], runs[-1])}
    if points != {results}:
        raise RuntimeError(f"{name}: MLflow holds {points} points of {results}")


@contextlib.contextmanager
def server(folder: Path) -> Iterator[str]:
    """A real MLflow server on loopback: one worker, an sqlite database."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1", "--backend-store-uri"]
    command += [f"sqlite:///{folder / 'server.db'}", "--artifacts-destination", str(folder / "artifacts")]
    with (folder / "server.log").open("w", encoding="utf-8") as log:
        settings = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, cwd=folder, env=settings)
    try:
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                break
            if process.poll() is not None:
                raise RuntimeError((folder / "server.log").read_text(encoding="utf-8")[-2000:])
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def compare(store: str, uri: str, sizes: dict[str, tuple[int, int]], rounds: int) -> dict[str, Any]:
    """All variants in turn, a share of the trials per round."""
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in sizes}
    for i in range(rounds):
        for k in range(len(sizes)):
            kind = list(sizes)[(i + k) % len(sizes)]
            trials, results = sizes[kind]
            share = trials // rounds + (i < trials % rounds)
            row = measure(kind, uri, f"{kind}-{i}", share, results)
            found[kind].append(row)
            print(
                f"{store:7s} round {i + 1} {kind:5s} " + "  ".join(f"{k} {v:.5f}" for k, v in row.items()), flush=True
            )
    ratios = [a["blocked_mean_s"] / b["blocked_mean_s"] for a, b in zip(found["ray"], found["ours"], strict=True)]
    ratio, low, high = median_interval(ratios)
    medians = {
        kind: {name: statistics.median(row[name] for row in rows) for name in rows[0]} for kind, rows in found.items()
    }
    return {"store": store, "ratio": ratio, "low": low, "high": high, "per_result": medians, "rounds": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--results", type=int, default=50)
    parser.add_argument("--ray-trials", type=int, default=5)
    parser.add_argument("--ray-results", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--stores", default="http,sqlite")
    parser.add_argument("--quick", action="store_true", help="one round of four trials")
    parser.add_argument("--out", default="results/benchmarks/mlflow_overhead.json")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.trials, arguments.results, arguments.ray_trials, arguments.ray_results, arguments.rounds = (
            4,
            5,
            1,
            3,
            1,
        )
    full, part = (arguments.trials, arguments.results), (arguments.ray_trials, arguments.ray_results)
    sizes = {"bare": full, "ray": part, "ours": full}
    rows = []
    with tempfile.TemporaryDirectory(prefix="fastbp-bench-") as temporary, ray_session():
        for store in arguments.stores.split(","):
            folder = Path(temporary) / store
            folder.mkdir()
            where = server(folder) if store == "http" else contextlib.nullcontext(f"sqlite:///{folder / 'mlruns.db'}")
            with where as uri:
                rows.append(compare(store, uri, sizes, arguments.rounds))
    shown = {kind: {"trials": trials, "results": results} for kind, (trials, results) in sizes.items()}
    content = {"target": TARGET, "numbers_per_result": NUMBERS, "sizes": shown, "rows": rows}
    write_json(arguments.out, content | environment())
    print(
        f"{'store':8s} {'bare Tune ms':>13s} {'ours ms':>9s} {'Ray ms':>9s} {'Ray / ours':>11s} {'95 % interval':>20s}"
    )
    for row in rows:
        ms = {kind: 1e3 * values["blocked_mean_s"] for kind, values in row["per_result"].items()}
        interval = f"{row['low']:.1f} to {row['high']:.1f}"
        times = f"{ms['bare']:13.2f} {ms['ours']:9.2f} {ms['ray']:9.2f}"
        print(f"{row['store']:8s} {times} {row['ratio']:11.1f} {interval:>20s}")
    if arguments.quick:
        print("too few trials to judge the claim by")
    else:
        figures = {row["store"]: row["ratio"] for row in rows}
        judge("mlflow_overhead", figures, dict.fromkeys(figures, TARGET), arguments.out, least=figures, places=1)


if __name__ == "__main__":
    main()
