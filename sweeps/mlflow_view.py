"""How records read in MLflow: names, tags, params, at most 25 metrics per run; pure functions of records."""

from __future__ import annotations

import math
from datetime import datetime
from typing import Any

from mlflow.entities import Metric

from fastbp.record import EpochRecord, RunRecord, Seconds, SweepRecord

MAX_METRICS = 25
EXPERIMENT_TAGS = {
    "mlflow.experimentKind": "custom_model_development",
    "mlflow.note.content": "A sweep holds cells, a cell holds runs: open them with the + beside a name, and choose "
    "metrics under Columns. A measured cell carries mean and 95 % interval over its seeds: filter with "
    "tags.`fastbp.level` = 'cell' and tags.phase = 'measure' to compare arms, or with tags.`fastbp.level` = 'run' to "
    "compare runs. The report is an artifact of the sweep.",
}
_SEGMENTS = ("train", "setup", "warmup", "eval", "checkpoint", "report_blocked")


def cell_name(run: RunRecord) -> str:
    if run.phase in ("search", "ablate"):
        return f"{run.phase} {run.arm}"
    return f"{run.arm} control" if run.role == "control" else run.arm


def run_name(run: RunRecord, number: int) -> str:
    return f"{cell_name(run)} #{number + 1}" if run.phase == "search" else f"{cell_name(run)} seed {run.seed}"


def planned_runs(sweep: SweepRecord, run: RunRecord) -> int:
    """How many runs the cell of this run has at most."""
    if run.phase == "ablate":
        ours = [a for a in sweep.ablations if any(cell["arm"] == run.arm for cell in a["cells"])]
        return len({seed for ablation in ours for seed in ablation["seeds"]})
    return len(sweep.seeds) if run.phase == "measure" else sweep.search_runs.get(run.arm, sweep.search_trials)


def is_complete(sweep: SweepRecord, runs: list[RunRecord], final: bool) -> bool:
    """Whether every planned run that is timed has ended; of a sweep that only searches, every trial.

    The numbers of cells to measure and ablate are 0 until the search is over. Older records do not say how many
    trials there were to be: they are complete when nobody trains any more and nothing was cut short.
    """
    ended = [run for run in runs if run.status != "running"]
    if sweep.seeds or sweep.config.get("ablate"):
        planned = sweep.measure_cells + sweep.ablate_cells
        return 0 < planned <= sum(run.phase in ("measure", "ablate") for run in ended)
    planned = sum(sweep.search_runs.values())
    return len(ended) >= planned if planned else final and len(ended) == len(runs) > 0


def end_of(statuses: list[str], final: bool, complete: bool) -> str:
    """MLflow's status of a sweep or cell with runs in these states."""
    if not final and not complete:
        return "RUNNING"
    if "failed" in statuses:
        return "FAILED"
    return "FINISHED" if complete and "running" not in statuses else "KILLED"


def sweep_tags(sweep: SweepRecord) -> dict[str, str]:
    return {"fastbp.level": "sweep", "arms": ", ".join(sweep.arms), "mlflow.source.name": "fastbp-sweep"}


def cell_tags(run: RunRecord) -> dict[str, str]:
    return {
        "fastbp.level": "cell",
        "arm": run.arm,
        "role": run.role,
        "phase": run.phase,
        "method": method_name(run.method),
    }


def run_tags(run: RunRecord) -> dict[str, str]:
    tags = cell_tags(run) | {
        "fastbp.level": "run",
        "fastbp.run_key": run.run_key,
        "fastbp.attempt": str(run.attempt),
        "seed": str(run.seed),
        "exclusive": str(run.exclusive).lower(),
        "block": "" if run.block is None else str(run.block),
        "git_commit": run.git_commit or "",
        "device": str(run.device.get("name", "")),
    }
    return {key: value for key, value in tags.items() if value}


def end_tags(run: RunRecord) -> dict[str, str]:
    tags = {"status": run.status, "exclusive": str(run.exclusive).lower()}  # known only at the end
    if run.reason and run.status != "running":
        tags["reason"] = run.reason
        tags["mlflow.note.content"] = f"**{run.status}**: {run.reason}"
    return tags


def sweep_params(sweep: SweepRecord) -> dict[str, str]:
    keep = {
        name: sweep.config[name]
        for name in ("task", "recipe", "search", "sampler", "measure", "ablate")
        if sweep.config.get(name)
    }
    return _flat(keep)


def cell_params(run: RunRecord, sweep: SweepRecord) -> dict[str, str]:
    """The setting of a measured cell; a search has none of its own but its arm's definition."""
    if run.phase == "search":
        return _flat({"task": run.task, "arm": sweep.config.get("arms", {}).get(run.arm, {})})
    return _flat({"task": run.task, "method": run.method, "recipe": run.recipe})


def run_params(run: RunRecord) -> dict[str, str]:
    return _flat({"task": run.task, "method": run.method, "recipe": run.recipe, "seed": run.seed})


def sweep_metrics(sweep: SweepRecord, statuses: list[str], step: int) -> list[Metric]:
    when = millis(sweep.started_at)
    counts = {f"runs/{s}": float(statuses.count(s)) for s in ("finished", "failed", "diverged", "stopped")}
    return [Metric(key, value, when, step) for key, value in counts.items()]


def progress(runs: list[RunRecord]) -> int:
    """A number that grows with every start and end of an attempt: MLflow shows the value of the highest step."""
    return sum(2 * run.attempt + 1 + (run.status != "running") for run in runs)


def cell_metrics(runs: list[RunRecord]) -> list[Metric]:
    """Mean and 95 % interval over seeds for a measured cell; the best accuracy for a search.

    Like the report, a measured cell takes runs that were alone on their device and not resumed: `runs/measured`.
    """
    ended = [run for run in runs if run.status != "running"]
    finished = [run for run in ended if run.status == "finished"]
    step, when = progress(runs), max((end_millis(run) for run in ended), default=0)
    values: dict[str, float | None] = {
        "runs/finished": float(len(finished)),
        **{f"runs/{s}": float(sum(run.status == s for run in ended)) for s in ("failed", "diverged", "stopped")},
    }
    if runs and runs[0].phase == "search":
        values["best/val_accuracy"] = max(
            (r.val_accuracy for r in finished if r.val_accuracy is not None), default=None
        )
    else:
        measured = [run for run in finished if run.exclusive and not run.resumed]
        values["runs/measured"] = float(len(measured))
        for name, sample in {
            "final/test_accuracy": [r.test_accuracy for r in measured],
            "final/val_accuracy": [r.val_accuracy for r in measured],
            "train_seconds": [r.train_seconds for r in measured],
        }.items():
            mean, low, high = mean_interval([v for v in sample if v is not None])
            ceiling = 1.0 if name.endswith("accuracy") else math.inf  # a t interval knows no bounds, the quantity does
            low, high = low and max(0.0, low), high and min(ceiling, high)
            values |= {name: mean, f"{name}_low": low, f"{name}_high": high}
    return _metrics(values, when, step)


def cell_note(metrics: list[Metric]) -> str:
    """The cell in one line, as the UI shows it above everything else."""
    values = {metric.key: metric.value for metric in metrics}
    parts = []
    for name, title, scale, unit in (
        ("final/test_accuracy", "test accuracy", 100.0, "%"),
        ("train_seconds", "training", 1.0, "s"),
        ("best/val_accuracy", "best validation accuracy", 100.0, "%"),
    ):
        if name in values:
            ends = [values.get(f"{name}_{end}") for end in ("low", "high")]
            interval = "" if None in ends else f" ({' to '.join(f'{scale * (e or 0.0):.2f}' for e in ends)})"
            parts.append(f"{title} {scale * values[name]:.2f}{interval} {unit}")
    return ", ".join([*parts, f"n = {values.get('runs/measured', values['runs/finished']):.0f}"])


def epoch_metrics(run: RunRecord, epochs: list[EpochRecord]) -> list[Metric]:
    """Curves, step = epoch; a point's time follows from the record, so that writing it twice is one point."""
    out: list[Metric] = []
    for record in epochs:
        values = {
            "train/loss": record.train_loss,
            "val/loss": record.val_loss,
            "val/accuracy": record.val_accuracy,
            "train_seconds": record.train_seconds,
            "examples": float(record.examples),
            "lr": record.lr,
        }
        out += _metrics(values, millis(run.started_at) + round(1000 * _elapsed(record)), record.epoch)
    return out


def final_metrics(run: RunRecord) -> list[Metric]:
    """The run's end: accuracies, segments of time, costs, and as many numeric hyper-parameters as fit."""
    values: dict[str, float | None] = {
        "final/val_accuracy": run.val_accuracy,
        "final/test_accuracy": run.test_accuracy,
        "best/val_accuracy": run.best_val_accuracy,
        **{f"seconds/{name}": getattr(run, f"{name}_seconds") for name in _SEGMENTS if name != "train"},
        "peak_memory_bytes": run.peak_memory_bytes,
        "flops_executed": run.flops_executed,
        "energy_joules": run.energy_joules,
        "parameters": run.parameters,
    }
    room = MAX_METRICS - 6 - len(values)  # 6: the curves of `epoch_metrics`
    values |= dict(list(_numbers(run).items())[:room])
    return _metrics(values, end_millis(run), max(run.epochs_done - 1, 0))


def mean_interval(values: list[float]) -> tuple[float | None, float | None, float | None]:
    """Mean and 95 % Student t interval; no interval for fewer than two values.

    >>> mean_interval([1.0])
    (1.0, None, None)
    """
    n = len(values)
    if n == 0:
        return None, None, None
    mean = sum(values) / n
    if n == 1:
        return mean, None, None
    from scipy.stats import t

    half = float(t.ppf(0.975, n - 1)) * math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n)
    return mean, mean - half, mean + half


def method_name(method: dict[str, Any]) -> str:
    """`dbp+ldb` for DecorrelatedBP around LayerDropBack."""
    name, inner = str(method.get("method", "?")), method.get("inner")
    if isinstance(inner, dict) and inner.get("method") not in (None, "bp"):
        return f"{name}+{method_name(inner)}"
    return name


def millis(iso: str) -> int:
    """Milliseconds since 1970 of a UTC time in ISO 8601; 0 where there is none."""
    return round(datetime.fromisoformat(iso).timestamp() * 1000) if iso else 0


def end_millis(run: RunRecord) -> int:
    """When a run ended; never before its start, whatever the clocks of its machines said."""
    return max(millis(run.ended_at), millis(run.started_at))


def _elapsed(record: Seconds) -> float:
    return sum(getattr(record, f"{name}_seconds") or 0.0 for name in _SEGMENTS)


def _numbers(run: RunRecord) -> dict[str, float]:
    """Numeric hyper-parameters as metrics, as MLflow compares no params by size: lr, then the method's."""
    flat = {"hp/lr": run.recipe.get("lr")}
    method: dict[str, Any] | None = run.method
    prefix = "hp/"
    while isinstance(method, dict):
        flat |= {f"{prefix}{name}": value for name, value in method.items() if name not in ("method", "inner", "seed")}
        method, prefix = method.get("inner"), f"{prefix}inner."
    return {k: float(v) for k, v in flat.items() if isinstance(v, int | float) and not isinstance(v, bool)}


def _metrics(values: dict[str, Any], when: int, step: int) -> list[Metric]:
    return [Metric(k, float(v), when, step) for k, v in values.items() if v is not None and math.isfinite(v)]


def _flat(value: Any, prefix: str = "") -> dict[str, str]:
    if isinstance(value, dict):
        out: dict[str, str] = {}
        for key, item in value.items():
            out |= _flat(item, f"{prefix}.{key}" if prefix else str(key))
        return out
    return {prefix: str(value)[:500]}
