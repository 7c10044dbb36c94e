"""Small sweeps and records for the tests of `sweeps`."""

import contextlib
from dataclasses import replace
from pathlib import Path

from typer.testing import CliRunner

from fastbp.record import EpochRecord, RunRecord, SweepRecord
from sweeps.cli import app
from sweeps.plan import load_plan

TOY = """\
name: toy
task: {data: digits, model: mlp, model_args: {depth: 2, width: 8}, data_args: {limit: 128}}
recipe: {epochs: 2, batch_size: 64, lr: {log_uniform: [0.01, 0.5]}}
arms:
  bp: {method: bp}
  ldb: {method: ldb, drop_rate: search}
search: {trials: 3, epochs: 1}
measure: {seeds: [0, 1, 2]}
"""


def invoke(folder, *arguments):
    """Run the command line of sweeps in a folder."""
    with contextlib.chdir(folder):
        return CliRunner().invoke(app, list(arguments))


def plan_of(folder: Path, text: str = TOY):
    file = folder / "toy.yaml"
    file.write_text(text)
    return load_plan(str(file))


def ended(
    config, *, status="finished", val=0.9, test=0.8, attempt=0, examples=128, train_seconds=1.0, reason="", flops=None
):
    """The last line of a run of this configuration."""
    data = config.to_dict()
    names = ("sweep", "phase", "arm", "role", "block", "task", "recipe", "method", "seed")
    return RunRecord(
        run_key=config.key,
        attempt=attempt,
        status=status,
        reason=reason,
        epochs_done=data["recipe"]["epochs"],
        examples=examples,
        val_accuracy=val,
        best_val_accuracy=val,
        test_accuracy=test,
        train_seconds=train_seconds,
        flops_executed=flops,
        exclusive=config.phase in ("measure", "ablate"),
        started_at="2026-01-01T00:00:00+00:00",
        ended_at="" if status == "running" else "2026-01-01T00:01:00+00:00",
        **{name: data[name] for name in names},
    )


def history(config, **end):
    """All lines of a run: its start, its epochs, its end."""
    last = ended(config, **end)
    start = replace(last, status="running", reason="", ended_at="", val_accuracy=None, test_accuracy=None)
    epochs = [
        EpochRecord(
            run_key=config.key,
            attempt=last.attempt,
            epoch=i,
            examples=128 * (i + 1),
            lr=0.1,
            train_loss=1.0 / (i + 1),
            val_accuracy=0.5,
            train_seconds=float(i + 1),
        )
        for i in range(config.recipe.epochs)
    ]
    return [start, *epochs] + ([last] if last.status != "running" else [])


def sweep_record(plan, cells=0):
    sweep = plan.sweep
    return SweepRecord(
        sweep=sweep.name,
        file_hash=sweep.hash,
        arms=[arm.name for arm in plan.arms],
        search_trials=sweep.search.trials if sweep.search else 0,
        seeds=list(sweep.measure.seeds) if sweep.measure else [],
        measure_cells=cells,
        config=sweep.config(),
        started_at="2026-01-01T00:00:00+00:00",
    )
