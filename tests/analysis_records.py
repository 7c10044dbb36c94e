"""Hand-made records as plain JSON lines, with known truth, and reports of them; knows nothing of fastbp."""

import csv
import hashlib
import io
import json
import random
from pathlib import Path

from analysis.load import load
from analysis.measured import measured_groups
from analysis.report import build, figure_files, text_files

CPU = {"type": "cpu", "name": "Test CPU", "threads": 1}
SOFTWARE = {"python": "3.11", "torch": "2.14.1", "cuda": None}
TASK = {"data": "digits", "model": "resnet-tiny", "model_args": {}, "data_args": {}}
RECIPE = {"epochs": 4, "lr": 0.1, "batch_size": 64}


def bp():
    return {"method": "bp"}


def ldb(rate=0.5):
    return {"method": "ldb", "drop_rate": rate, "every_epochs": 2, "inner": bp()}


def dbp(rate=1e-4):
    return {"method": "dbp", "decor_lr": rate, "inner": bp()}


def run_line(**changes):
    """A finished measured run; the key is made from what makes the run."""
    line = {
        "kind": "run", "schema_version": 1, "attempt": 0, "sweep": "demo", "phase": "measure", "arm": "bp",
        "role": "baseline", "block": 0, "task": TASK, "recipe": RECIPE, "method": bp(), "seed": 0,
        "status": "finished", "reason": "", "epochs_done": 4, "examples": 4000, "steps": 64, "parameters": 1000,
        "train_loss": 0.1, "val_loss": 0.1, "val_accuracy": 0.9, "best_val_accuracy": 0.91, "test_accuracy": 0.9,
        "train_seconds": 10.0, "setup_seconds": 0.5, "warmup_seconds": 0.25, "compile_seconds": None,
        "eval_seconds": 1.0, "checkpoint_seconds": 0.0, "report_blocked_seconds": 0.0, "peak_memory_bytes": None,
        "flops_executed": None, "energy_joules": None, "exclusive": True, "resumed": False, "device": CPU,
        "software": SOFTWARE, "git_commit": None, "git_dirty": None, "started_at": "2026-01-01T00:00:00+00:00",
        "ended_at": "2026-01-01T00:01:00+00:00",
    }  # fmt: skip
    line |= changes
    if "run_key" not in line:
        made_of = [line[k] for k in ("sweep", "phase", "arm", "role", "task", "recipe", "method", "seed")]
        made_of += [line["device"], line["software"]]
        line["run_key"] = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]
    return line


def epoch_lines(run, curve=None):
    """Epochs of a run: even steps of time, accuracy rising to the run's own, or as in `curve`."""
    final = run["val_accuracy"] or 0.0
    curve = curve or [final * (1 - 0.5**e) / (1 - 0.5**4) for e in range(1, 5)]
    return [
        {
            "kind": "epoch", "schema_version": 1, "run_key": run["run_key"], "attempt": run["attempt"], "epoch": e,
            "examples": 1000 * (e + 1), "steps": 16 * (e + 1), "batch_size": 64, "lr": 0.1, "train_loss": 0.5,
            "val_loss": 0.5, "val_accuracy": accuracy, "test_accuracy": None, "metrics": {},
            "train_seconds": (run["train_seconds"] or 0.0) * (e + 1) / len(curve), "eval_seconds": 0.1 * e,
        }
        for e, accuracy in enumerate(curve)
    ]  # fmt: skip


def sweep_line(**changes):
    return {
        "kind": "sweep", "schema_version": 1, "sweep": "demo", "file_hash": "00", "arms": ["bp", "ldb", "dbp"],
        "search_trials": 0, "seeds": [0, 1, 2, 3, 4], "measure_cells": 25, "targets": [], "config": {},
        "started_at": "2026-01-01T00:00:00+00:00",
    } | changes  # fmt: skip


def cells():
    """(arm, role, method, true seconds, true accuracy) of the synthetic sweep: ldb is faster, dbp is worse."""
    return [
        ("bp", "baseline", bp(), 10.0, 0.90),
        ("ldb", "method", ldb(0.5), 7.0, 0.90),
        ("ldb", "control", ldb(0.0), 8.0, 0.905),
        ("dbp", "method", dbp(1e-3), 14.0, 0.88),
        ("dbp", "control", dbp(0.0), 13.0, 0.90),
    ]


def synthetic(seeds=5, noise=0.002, **changes):
    """Lines of a sweep with known means; seed effects are common to all arms, so pairing removes them."""
    rng = random.Random(0)
    lines = [sweep_line(seeds=list(range(seeds)), measure_cells=5 * seeds, **changes)]
    for seed in range(seeds):
        common = rng.gauss(0, 5 * noise)
        for arm, role, method, seconds, accuracy in cells():
            accuracy = accuracy + common + rng.gauss(0, noise)
            run = run_line(
                arm=arm, role=role, method=method, seed=seed, block=seed,
                train_seconds=seconds * (1 + rng.gauss(0, noise)), val_accuracy=accuracy, test_accuracy=accuracy - 0.01,
            )  # fmt: skip
            lines += [{**run, "status": "running"}, *epoch_lines(run), run]
    return lines


def search_lines(trials=3):
    lines = []
    for arm, method in (("bp", bp()), ("ldb", ldb())):
        for trial in range(trials):
            method = {**method, **({"drop_rate": 0.2 * (trial + 1)} if arm == "ldb" else {})}
            run = run_line(
                arm=arm, phase="search", role="baseline" if arm == "bp" else "method", method=method, exclusive=False,
                recipe=RECIPE | {"lr": 0.1 * (trial + 1)}, val_accuracy=0.8 + 0.01 * trial, test_accuracy=None,
            )  # fmt: skip
            lines.append(run)
    return lines


def write(path: Path, lines) -> Path:
    """Write lines as a records file; text is written as it stands."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join(line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) + "\n" for line in lines),
        encoding="utf-8",
    )
    return path


def groups_of(tmp_path, lines, **options):
    results = load([write(tmp_path / "records.jsonl", lines)])
    return results, measured_groups(results, **options)


def report_of(tmp_path, lines, *, figures=False):
    """Paths to contents of the files of the report."""
    report = build([write(tmp_path / "in" / "records.jsonl", lines)])
    return dict([*text_files(report), *(figure_files(report) if figures else ())])


def rows_of(contents, name):
    return list(csv.DictReader(io.StringIO(contents[f"tables/{name}.csv"].decode())))


def with_run(lines, choose, **changes):
    """The lines with the end of some runs changed."""
    return [
        line | changes if line["kind"] == "run" and line["status"] != "running" and choose(line) else line
        for line in lines
    ]
