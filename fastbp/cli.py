"""`fastbp`: train one run, time a step of every method, read the methods' cards, check the installation."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from fastbp.bench import ratios, step_seconds
from fastbp.cards import costs_note, costs_table, show_card
from fastbp.config import RunConfig, Task
from fastbp.costs import measure_costs, random_batch, shape_of
from fastbp.installation import OPTIONAL, part, torchvision_mismatch
from fastbp.knobs import set_knobs
from fastbp.method import Method, method_class, nest
from fastbp.methods import METHODS
from fastbp.models import make_model
from fastbp.recipe import Recipe
from fastbp.record import EpochRecord, RecordWriter, RunRecord, to_line
from fastbp.run import Run
from fastbp.stage_workers import StageError
from fastbp.staged import StagedRun, open_run

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
console = Console()

MethodName = Annotated[
    str,
    typer.Option(
        "--method",
        "-m",
        help="bp, ldb, dbp, highway, ddg, a combination such as dbp+ldb, or package.module:Class",
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", help="NAME=VALUE of the method, or recipe.NAME, model.NAME, data.NAME; repeatable"),
]


@app.command()
def train(
    method: MethodName = "bp",
    model: Annotated[
        str, typer.Option(help="a name of fastbp.nets, timm:NAME, torchvision:NAME, package.module:function")
    ] = "resnet_tiny",
    data: Annotated[str, typer.Option(help="digits, cifar10, cifar100, folder:PATH, text:PATH, synthetic")] = "digits",
    epochs: Annotated[int, typer.Option(help="passes over the training split")] = 10,
    lr: Annotated[float, typer.Option(help="peak learning rate")] = 0.1,
    batch_size: Annotated[int, typer.Option(help="examples per step")] = 64,
    seed: Annotated[int, typer.Option(help="of weights, data order and dropout")] = 0,
    settings: Settings = None,
    device: Annotated[str | None, typer.Option(help="torch device; default: cuda where there is one")] = None,
    threads: Annotated[int | None, typer.Option(help="torch CPU threads, shared out among processes")] = None,
    out: Annotated[Path | None, typer.Option(help="records file to append to")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the run's record as one JSON line")] = False,
) -> None:
    """Train one run and print its record."""
    groups = _split_settings(settings or [])
    recipe = set_knobs(Recipe(epochs=epochs, lr=lr, batch_size=batch_size), groups["recipe"])
    chosen = set_knobs(_method(method), groups["method"])
    task = Task(data, model, groups["data"], groups["model"])
    run = open_run(RunConfig(task, recipe, chosen, seed, arm=method), device=device, threads=threads)
    try:
        if not as_json:
            _print_split(run.split_table())
        record, metrics = _recorded(run, RecordWriter(out) if out else None, quiet=as_json)
    finally:
        run.close()
    if as_json:
        sys.stdout.write(to_line(record))
    else:
        _print_record(record, metrics)
    if record.status != "finished":
        raise typer.Exit(1)


def _recorded(run: Run | StagedRun, writer: RecordWriter | None, *, quiet: bool) -> tuple[RunRecord, dict[str, float]]:
    """The run's record, and the method's metrics after the last epoch."""
    if writer:
        writer.write(run.start_record())
    try:
        return _drive(run, writer, quiet=quiet)
    except BaseException as error:  # also an interrupt: what was measured stays on record
        if writer:
            interrupted = isinstance(error, KeyboardInterrupt)
            writer.write(run.end("stopped" if interrupted else "failed", str(error) or type(error).__name__))
        raise


def _drive(run: Run | StagedRun, writer: RecordWriter | None, *, quiet: bool) -> tuple[RunRecord, dict[str, float]]:
    metrics: dict[str, float] = {}
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[state]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal) as progress:
        task = progress.add_task(
            f"{run.config.arm} on {run.config.task.data}", total=run.recipe.epochs, state="warming up"
        )
        while not run.done:
            epoch = run.train_epoch()
            metrics = epoch.metrics
            if writer:
                writer.write(epoch)
            progress.update(task, advance=1, state=_state(epoch, run.recipe.epochs))
            if not quiet and not console.is_terminal:
                console.print(_state(epoch, run.recipe.epochs))
    record = run.end()
    if writer:
        writer.write(record)
    return record, metrics


def _state(epoch: EpochRecord, epochs: int) -> str:
    def number(value: float | None, pattern: str) -> str:
        return "-" if value is None else format(value, pattern)

    return (
        f"epoch {epoch.epoch + 1}/{epochs}  train loss {number(epoch.train_loss, '.4f')}  "
        f"val accuracy {number(epoch.val_accuracy, '.4f')}  train {epoch.train_seconds:.2f} s"
    )


def _print_split(rows: list[dict[str, float]]) -> None:
    """Where the net was cut, and what each module costs on a batch."""
    if not rows:
        return
    timed, counted = any(row["seconds"] for row in rows), any(row["memory_bytes"] for row in rows)
    table = Table(title="modules" + (", as measured on one batch" if counted else ""), title_justify="left")
    for heading in ("module", "steps late", "blocks", "ms", "of the time", "of the FLOPs", "weights MB", "memory MB"):
        table.add_column(heading, justify="right")
    for row in rows:
        first, last = int(row["first_block"]), int(row["first_block"] + row["blocks"]) - 1
        table.add_row(
            str(row["module"]),
            str(row["delay"]),
            str(first) if first == last else f"{first} to {last}",
            f"{row['seconds'] * 1e3:.2f}" if timed else "-",
            f"{row['time_share']:.0%}" if timed else "-",
            f"{row['flops_share']:.0%}" if counted else "-",
            f"{row['parameter_bytes'] / 1e6:.2f}",
            f"{row['memory_bytes'] / 1e6:.2f}" if counted else "-",
        )
    console.print(table)


def _print_record(record: RunRecord, metrics: dict[str, float]) -> None:
    table = Table(title=f"run {record.run_key}", show_header=False)
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if field.name in ("kind", "schema_version", "run_key", "attempt", "exclusive") or value in ("", {}):
            continue
        if isinstance(value, dict):
            value = ", ".join(f"{k}={json.dumps(v)}" for k, v in value.items())
        elif value is None:
            value = "not measured"
        elif isinstance(value, float):
            value = f"{value:.6g}"
        table.add_row(field.name, str(value))
    for name, number in metrics.items():
        table.add_row(name, f"{number:.6g}")
    console.print(table)


@app.command()
def bench(
    methods: Annotated[
        str, typer.Option(help="comma-separated methods or combinations; bp is always timed")
    ] = "bp,ldb,dbp,highway,ddg",
    model: str = "resnet_tiny",
    data: str = "digits",
    batch_size: int = 64,
    precision: Annotated[str, typer.Option(help="float32, float64, bfloat16")] = "float32",
    device: str | None = None,
    threads: int | None = None,
    rounds: Annotated[int, typer.Option(help="interleaved rounds of 5 steps")] = 15,
) -> None:
    """Time a training step of every method against backprop's, interleaved in this process."""
    if threads:
        torch.set_num_threads(threads)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    names = ["bp", *(name for name in methods.split(",") if name != "bp")]
    recipe = Recipe(batch_size=batch_size, precision=precision)
    seconds = step_seconds(
        {n: _method(n) for n in names}, data=data, model=model, recipe=recipe, device=place, rounds=rounds
    )
    table = Table(title=f"{model} on {data}, batch {batch_size}, {place}: one step, {rounds} interleaved rounds")
    for heading in ("method", "median ms", "times backprop", "quartiles"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for name, (low, middle, high) in ratios(seconds, "bp").items():
        median = sorted(seconds[name])[len(seconds[name]) // 2] / 5 * 1000
        table.add_row(name, f"{median:.2f}", f"{middle:.2f}", f"{low:.2f} to {high:.2f}")
    console.print(table)


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="a method, or a combination such as dbp+ldb; default: all")] = None,
    model: Annotated[
        str | None, typer.Option(help="count the costs on this model: a net's name, timm:NAME, ...")
    ] = None,
    example: Annotated[
        str, typer.Option("--input", help="shape of an example, such as 3x32x32, or 64 for 64 tokens")
    ] = "3x32x32",
    classes: Annotated[int, typer.Option(help="outputs of the model, or its vocabulary")] = 10,
    batch_size: Annotated[int, typer.Option(help="examples per step")] = 64,
    settings: Annotated[
        list[str] | None, typer.Option("--set", "-s", help="NAME=VALUE of the method, or model.NAME; repeatable")
    ] = None,
) -> None:
    """Print every method's card, its settings with search ranges, and with --model what it costs there."""
    groups = _split_settings(settings or [])
    if groups["method"] and name is None:
        raise ValueError("--set: say of which method, as in: fastbp methods ldb --model resnet20 --set drop_rate=0.9")
    chosen = {key: set_knobs(_method(key), groups["method"]) for key in ([name] if name else METHODS)}
    shape = shape_of(example)
    if model is not None:
        make_model(model, shape, classes, groups["model"])  # a typo is said before five cards
    for each in name.split("+") if name else METHODS:
        show_card(console, each, method_class(each))
    if model is None:
        console.print(f"Counted costs: fastbp methods {name or 'ldb'} --model resnet20", highlight=False)
        return
    with console.status(f"counting on {model}"):
        make = partial(make_model, model, shape, classes, groups["model"])
        costs = dict(measure_costs(chosen, make, Recipe().make_loss(), *random_batch(shape, classes, batch_size)))
    console.print(costs_table(f"costs on {model}, input {example}, batch {batch_size}", costs))
    console.print(costs_note(), highlight=False)


@app.command()
def doctor() -> None:
    """Check the installation: versions, device, and whether the optional parts import."""
    table = Table(title="fastbp doctor", show_header=False)
    table.add_row("python", platform.python_version())
    table.add_row("torch", f"{torch.__version__}, {torch.get_num_threads()} CPU threads")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none: runs on the CPU"
    table.add_row("CUDA device", device)
    parts = [part(name) for name in OPTIONAL]
    for found in parts:
        if found.error:
            table.add_row(found.name, f"[red]fails to import[/red]: {escape(found.error)}")
        else:
            table.add_row(found.name, found.version or escape(f"not installed: pip install 'fastbp[{found.extra}]'"))
    console.print(table)
    vision = next((found.version for found in parts if found.name == "torchvision" and not found.error), None)
    mismatch = torchvision_mismatch(torch.__version__, vision) if vision else ""
    if mismatch:
        console.print(f"{mismatch}: install a matching pair from the same index.", highlight=False, soft_wrap=True)
    if mismatch or any(found.error for found in parts):
        raise typer.Exit(1)


def _method(name: str) -> Method:
    """`dbp+ldb+highway` is DecorrelatedBP on LayerDropBack on HighwayBP, at their defaults."""
    return nest(method_class(part)() for part in name.split("+") if part != "bp")


def _split_settings(settings: list[str]) -> dict[str, dict[str, Any]]:
    groups: dict[str, dict[str, Any]] = {"method": {}, "recipe": {}, "model": {}, "data": {}}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise ValueError(f"--set {setting}: expected NAME=VALUE")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        head, dot, rest = name.partition(".")
        group, key = (head, rest) if dot and head in ("recipe", "model", "data") else ("method", name)
        groups[group][key] = value
    return groups


def main() -> None:
    """Entry point: errors of the user's input are one sentence and exit code 2."""
    sys.path.append(os.getcwd())  # methods and models of the user's own, `my_pkg.sign:SignGrad`
    try:
        app()
    except (ValueError, TypeError, ImportError, OSError, StageError) as error:
        Console(stderr=True).print(f"[red]error:[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise SystemExit(2) from None
