"""Claims: `fastbp-report` on 10 000 runs of 50 epochs takes at most 20 s and 2 GiB; on ten times the runs at most
twelve times as long; from an sqlite MLflow store of 5 000 runs at most 30 s.

The records are synthetic, with a seed: four sweeps, each of its own task, five arms; nine tenths of the runs are search
trials, the rest are measured with as many seeds as there is room for. Each figure is the wall time and the peak
resident memory of the real command in a process of its own, its start included, best of `--repeats`.

    python benchmarks/report_speed.py    # exit code 1 and one sentence where a claim does not hold
"""

from __future__ import annotations

import argparse
import json
import os
import sqlite3
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmark import environment, judge, write_json
from fastbp.record import EpochRecord, RunRecord, SweepRecord

LIMITS = {"seconds": 20.0, "gib": 2.0, "ratio": 12.0, "mlflow_seconds": 30.0}
TASKS = ("digits", "cifar10", "cifar100", "synthetic")
METHODS: dict[str, dict[str, Any]] = {
    "bp": {"method": "bp"},
    "ldb": {"method": "ldb", "drop_rate": 0.5, "every_epochs": 2, "inner": {"method": "bp"}},
    "dbp": {"method": "dbp", "decor_lr": 1e-4, "kappa": 1e-2, "inner": {"method": "bp"}},
    "highway": {"method": "highway", "iterations": 4, "gamma": 0.0},
    "ddg": {"method": "ddg", "modules": 2, "weights": "stash"},
}
EXACT = {"ldb": {"drop_rate": 0.0}, "dbp": {"decor_lr": 0.0}, "highway": {"iterations": 8}, "ddg": {"modules": 1}}
DEVICE = {"type": "cuda", "name": "Synthetic GPU", "threads": 8, "memory_bytes": 2**37}
SOFTWARE = {"fastbp": "0.1.0", "python": "3.12.1", "torch": "2.11.0", "cuda": "13.0", "matmul_precision": "highest"}
PROBE = """
import resource, subprocess, sys, time
began = time.perf_counter()
code = subprocess.call(sys.argv[1:], stdout=subprocess.DEVNULL)
print(time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""  # a small parent: a child's peak counts what its parent held when it began
WHEN = "2026-01-01T00:00:00+00:00"


def sweep_lines(task: str, runs: int, epochs: int, seed: int) -> Iterator[str]:
    """The records of one sweep with this many runs, in the order in which a sweep writes them."""
    rng = np.random.default_rng(seed)
    cells = [(arm, "baseline" if arm == "bp" else "method", METHODS[arm]) for arm in METHODS]
    controls = [(arm, "control", METHODS[arm] | exact) for arm, exact in EXACT.items()]
    seeds = max(3, runs // 10 // len(cells + controls))
    trials = runs - seeds * len(cells + controls)
    name = f"{task}-sweep"
    plan = {"search_trials": trials // len(cells), "seeds": list(range(seeds)), "targets": [0.5]}
    sweep = SweepRecord(sweep=name, file_hash=f"{seed:016x}", arms=list(METHODS), started_at=WHEN, **plan)
    yield _line(asdict(sweep) | {"measure_cells": seeds * len(cells + controls)})
    for i in range(trials):
        arm, role, method = cells[i % len(cells)]
        yield from run_lines(rng, epochs, name, "search", arm, role, method, task, 0)
    for i in range(seeds):
        for arm, role, method in cells + controls:
            yield from run_lines(rng, epochs, name, "measure", arm, role, method, task, i)


def run_lines(
    rng: np.random.Generator,
    epochs: int,
    sweep: str,
    phase: Any,
    arm: str,
    role: Any,
    method: Any,
    task: str,
    seed: int,
) -> Iterator[str]:
    """Start, epochs and end of one run."""
    key = rng.bytes(8).hex()
    final, seconds = 0.9 + 0.01 * rng.standard_normal(), (60 + 10 * len(arm)) * (1 + 0.01 * rng.standard_normal())
    lr = float(10 ** rng.uniform(-3, 0)) if phase == "search" else 0.1
    recipe = {"epochs": epochs, "batch_size": 128, "optimizer": "sgd", "lr": lr, "momentum": 0.9, "schedule": "cosine"}
    record = RunRecord(
        run_key=key, sweep=sweep, phase=phase, arm=arm, role=role, seed=seed, method=method, recipe=recipe,
        task={"data": task, "model": "resnet_tiny", "model_args": {"width": 16}, "data_args": {}},
        parameters=175_258, exclusive=phase == "measure", device=DEVICE, software=SOFTWARE, git_commit="0" * 40,
        git_dirty=False, started_at=WHEN,
    )  # fmt: skip
    run = asdict(record)
    yield _line(run)
    accuracy = final * (1 - np.exp(-np.arange(1, epochs + 1) / (epochs / 5)))
    epoch = asdict(EpochRecord(run_key=key, batch_size=128, metrics={"dropped_fraction": 0.5}))
    for i in range(epochs):
        done = i + 1
        epoch |= {"epoch": i, "examples": 50_000 * done, "steps": 391 * done, "lr": lr, "train_loss": 1 / done}
        epoch |= {"val_loss": 1.1 / done, "val_accuracy": float(accuracy[i]), "train_seconds": seconds * done / epochs}
        yield _line(epoch | {"eval_seconds": 0.1 * done, "peak_memory_bytes": 2**30})
    end = {"status": "finished", "epochs_done": epochs, "ended_at": WHEN, "train_seconds": seconds, "eval_seconds": 0.1}
    scores = {"val_accuracy": float(accuracy[-1]), "best_val_accuracy": float(accuracy[-1])}
    yield _line(run | end | scores | {"test_accuracy": float(accuracy[-1]) - 0.01, "peak_memory_bytes": 2**30})


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, sort_keys=True) + "\n"


def write_records(folder: Path, runs: int, epochs: int) -> Path:
    """One folder with a records file per sweep."""
    for i, task in enumerate(TASKS):
        path = folder / task / "records.jsonl"
        path.parent.mkdir(parents=True)
        share = runs // len(TASKS) + (i < runs % len(TASKS))
        with path.open("w", encoding="utf-8") as file:
            file.writelines(sweep_lines(task, share, epochs, seed=i))
    return folder


def write_store(folder: Path, runs: int, epochs: int) -> str:
    """An sqlite MLflow store of one sweep of this many runs; returns its URI.

    A hundred runs go through the code that sweeps use, which at this size would take minutes; the others are their
    rows again under new names. The records artifact is that of the whole sweep, written by the same code.
    """
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    from sweeps.mlflow_sync import MlflowMirror

    folder.mkdir()
    lines = list(sweep_lines("digits", runs, epochs, seed=0))
    whole, few = folder / "records.jsonl", folder / "few.jsonl"
    whole.write_text("".join(lines), encoding="utf-8")
    few.write_text("".join(lines[: 1 + min(runs, 100) * (epochs + 2)]), encoding="utf-8")
    uri = f"sqlite:///{folder / 'mlruns.db'}"
    mirror = MlflowMirror(few, uri, "demo")
    mirror.sync(final=True)
    mirror.records = whole
    mirror._upload_records(whole.stat().st_size, final=True)
    _clone(folder / "mlruns.db", runs - min(runs, 100))
    return uri


def _clone(database: Path, copies: int) -> None:
    """Copy tracked runs, with their params, tags and metrics, until there are so many more."""
    with sqlite3.connect(database) as store:
        known = [row[0] for row in store.execute("select run_uuid from tags where key = 'fastbp.run_key'")]
        tables = {}
        for table in ("runs", "params", "tags", "metrics", "latest_metrics"):
            names = [row[1] for row in store.execute(f"pragma table_info({table})")]
            shown = ", ".join("?" if name == "run_uuid" else name for name in names)
            tables[table] = f"insert into {table} ({', '.join(names)}) select {shown} from {table} where run_uuid = ?"
        for i in range(copies):
            new = uuid.UUID(int=i).hex
            for statement in tables.values():
                store.execute(statement, (new, known[i % len(known)]))
            store.execute(
                "update tags set value = ? where run_uuid = ? and key in ('fastbp.key', 'fastbp.run_key')", (new,) * 2
            )
    store.close()


def measure(sources: list[str], out: Path, expected: int, repeats: int) -> dict[str, float]:
    """Wall seconds and peak GiB of the command; the best of the repeats.

    Raises:
        RuntimeError: the command failed or did not count every run.
    """
    best = {"seconds": float("inf"), "gib": float("inf")}
    for _ in range(repeats):
        command = [sys.executable, "-c", PROBE, sys.executable, "-m", "analysis", *sources, "--out", str(out)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"the report of {sources} ended with exit code {done.returncode}")
        seconds, kib = map(float, done.stdout.split())
        best = {"seconds": min(best["seconds"], seconds), "gib": min(best["gib"], kib / 2**20)}
    rows = json.loads((out / "tables" / "summary.json").read_text(encoding="utf-8"))["rows"]
    counted = sum(row["finished"] for row in rows)
    if counted != expected:
        raise RuntimeError(f"the report counts {counted} finished runs of {expected}")
    return best | {"report_mib": sum(f.stat().st_size for f in out.rglob("*") if f.is_file()) / 2**20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--times", type=int, default=10, help="how many times the runs of the large case")
    parser.add_argument("--mlflow-runs", type=int, default=5_000)
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--folder", help="where the records go, about 0.3 MB per 10 runs; default the system's")
    parser.add_argument("--out", default="results/benchmarks/report_speed.json")
    arguments = parser.parse_args()
    rows: dict[str, dict[str, float]] = {}
    print(f"{'case':24s} {'runs':>8s} {'seconds':>9s} {'GiB':>6s} {'report MiB':>11s}")
    for case, runs in (
        ("records", arguments.runs),
        ("records, large", arguments.runs * arguments.times),
        ("mlflow", arguments.mlflow_runs),
    ):
        if not runs:
            continue
        with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
            folder, out = Path(name) / "in", Path(name) / "report"
            if case == "mlflow":
                sources = [f"mlflow:demo@{write_store(folder, runs, arguments.epochs)}"]
            else:
                sources = [str(write_records(folder, runs, arguments.epochs))]
            row = rows[case] = {"runs": runs, **measure(sources, out, runs, arguments.repeats)}
        print(f"{case:24s} {runs:8d} {row['seconds']:9.2f} {row['gib']:6.2f} {row['report_mib']:11.1f}", flush=True)
    figures = {"seconds": rows["records"]["seconds"], "gib": rows["records"]["gib"]}
    if "records, large" in rows:
        figures["ratio"] = rows["records, large"]["seconds"] / figures["seconds"]
    if "mlflow" in rows:
        figures["mlflow_seconds"] = rows["mlflow"]["seconds"]
    content = {"limits": LIMITS, "figures": figures, "rows": rows, "epochs": arguments.epochs, "cores": os.cpu_count()}
    write_json(arguments.out, content | environment())
    judge("report_speed", figures, LIMITS, arguments.out)


if __name__ == "__main__":
    try:
        main()
    except RuntimeError as error:
        sys.exit(f"report_speed: {error}")
