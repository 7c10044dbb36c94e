"""`fastbp-sweep`: plan, run, submit, status, sync, doctor."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from sweeps.source import SweepError, SweepStopped, without_password
from sweeps.stopping import EXIT_STOPPED

if TYPE_CHECKING:
    from sweeps.outcome import Outcome
    from sweeps.plan import Plan

app = typer.Typer(
    help="Search and measure methods over a sweep file, with Ray Tune and MLflow.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
FileArgument = Annotated[
    str, typer.Argument(help="a sweep file, or the bare name of a packaged one such as quickstart")
]
OutOption = Annotated[Path | None, typer.Option(help="output folder; default fastbp-runs/NAME")]


@app.command()
def plan(
    file: FileArgument,
    smoke: Annotated[bool, typer.Option(help="the sweep at its smallest")] = False,
    pilot: Annotated[bool, typer.Option(help="time a few steps of each arm, and say what the sweep will cost")] = True,
) -> None:
    """Validate a sweep file and show what it will run and cost; starts nothing."""
    from sweeps.plan import load_plan
    from sweeps.progress import ablation_table, plan_table

    planned = load_plan(file, smoke=smoke)
    console = Console()
    console.print(plan_table(planned))
    if planned.sweep.ablate:
        console.print(ablation_table(planned))
    idle = [arm.name for arm in planned.arms if not arm.space]
    if planned.sweep.search is not None and idle:
        console.print(f"{', '.join(idle)}: 0 searched fields, so one search trial each", highlight=False)
    if pilot:
        from sweeps.cost_table import show_estimate
        from sweeps.estimate import estimate

        with console.status("timing steps") as shown:
            found = estimate(planned, shown.update)
        show_estimate(console, found)


@app.command()
def run(
    file: FileArgument,
    out: OutOption = None,
    smoke: Annotated[bool, typer.Option(help="one epoch, one trial, one seed; for CI")] = False,
    report: Annotated[bool, typer.Option(help="write the report at the end")] = True,
    mlflow: Annotated[bool, typer.Option(help="mirror the records into MLflow")] = True,
    remeasure: Annotated[bool, typer.Option("--remeasure", help="measure blocks again that shared the device")] = False,
) -> None:
    """Run a sweep, or what is missing of it; exits with 1 when any run failed or is missing.

    Exit codes: 0 everything is done, 1 a run failed or is missing, 2 the file or folder is refused, 3 the world ended
    it (disk full, Ray died), 130 SIGINT, 143 SIGTERM. After 1, 3, 130 and 143 the same command continues.
    """
    from sweeps.live import progress_on
    from sweeps.plan import find_sweep, load_plan

    planned = load_plan(file, smoke=smoke)
    folder = out or Path("fastbp-runs") / planned.sweep.name
    console = Console()
    from sweeps.cluster import in_job
    from sweeps.drive import run_sweep

    if in_job() and out is None:
        _say(console, "warning: records go to the job's temporary folder; keep them with --out on shared storage")
    if in_job() and not (planned.sweep.mlflow.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")):
        _say(console, "warning: MLflow's store is in the job's temporary folder; set MLFLOW_TRACKING_URI for the job")
    progress = progress_on(console)
    try:
        outcome = run_sweep(planned, find_sweep(file)[0], folder, progress, mlflow=mlflow, remeasure=remeasure)
    finally:
        progress.close()
    if report and not outcome.interrupted:
        _report(folder, console, planned, outcome)
    raise typer.Exit(_summary(folder, console, outcome))


@app.command()
def submit(
    file: FileArgument,
    address: Annotated[str, typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="of the cluster's dashboard")],
    out: Annotated[str | None, typer.Option(help="output folder, absolute, which every node sees")] = None,
    working_dir: Annotated[Path, typer.Option(help="uploaded; the job runs in the copy")] = Path(),
    env: Annotated[list[str] | None, typer.Option(help="NAME or NAME=VALUE for the job; repeatable")] = None,
    wait: Annotated[bool, typer.Option(help="follow the log, and exit with the sweep's own code")] = True,
    smoke: Annotated[bool, typer.Option(help="one epoch, one trial, one seed")] = False,
    remeasure: Annotated[bool, typer.Option("--remeasure", help="measure blocks again that shared the device")] = False,
) -> None:
    """Run a sweep as a job of a Ray cluster. Ctrl-C stops following, not the job; the same command follows it again.

    MLFLOW_TRACKING_URI and user are passed on; password and token are not, as Ray logs a job's environment:
    set them where the head node is started.
    """
    from sweeps.submit import prepare, warnings

    request = prepare(
        file, address=address, out=out, working_dir=working_dir, env=env or [], smoke=smoke, remeasure=remeasure
    )
    console = Console()
    for warning in warnings(request):
        _say(console, warning)
    from sweeps import job

    raise typer.Exit(job.submit(request, wait=wait, say=lambda text: _say(console, text)))


def _say(console: Console, text: str) -> None:
    """One line as it is, whatever the width of the terminal."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _report(folder: Path, console: Console, planned: Plan, outcome: Outcome) -> None:
    """Run the report in a process of its own, which reads the records and prints its table; attach it in MLflow."""
    target = folder / "report"
    done = subprocess.run([sys.executable, "-P", "-m", "analysis", str(folder), "--out", str(target)], check=False)
    html = target / "report.html"
    if done.returncode or not html.exists():
        _say(
            console,
            f"warning: no report was written; try again with: "
            f"{_command('fastbp-report')} {shlex.quote(str(folder))} --out {shlex.quote(str(target))}",
        )
    elif outcome.uri and not outcome.mlflow_error:
        from sweeps.mlflow_pace import final_sync
        from sweeps.mlflow_sync import MlflowMirror
        from sweeps.output_folder import RECORDS

        mirror = MlflowMirror(folder / RECORDS, outcome.uri, planned.sweep.mlflow.experiment)
        outcome.mlflow_error = final_sync(mirror, console.print, html)


def _summary(folder: Path, console: Console, outcome: Outcome) -> int:
    """Say where everything is and what went wrong; returns the exit code."""
    _say(console, f"records: {folder / 'records.jsonl'}")
    if outcome.mlflow_error:
        _say(console, f"warning: MLflow is behind the records ({outcome.mlflow_error})")
        _say(console, f"         repair it later: {_command('fastbp-sweep')} sync {shlex.quote(str(folder))}")
    elif outcome.uri:
        _say(console, f"MLflow:  {_ui_hint(outcome.uri)}")
    for record in outcome.failed:
        _say(console, f"failed:  {record.phase} {record.arm} {record.role} seed {record.seed}: {record.reason}")
    if outcome.contaminated:
        shared = (
            f"{outcome.contaminated} measured run{'s'[: outcome.contaminated > 1]} shared the device with other work"
        )
        command = f"{_command('fastbp-sweep')} run {shlex.quote(str(folder / 'sweep.yaml'))}"
        _say(console, f"warning: {shared}; on a quiet machine, to measure again:")
        _say(console, f"         {command} --out {shlex.quote(str(folder))} --remeasure")
    if outcome.interrupted:
        _say(console, "interrupted; the same command continues")
        return 128 + outcome.interrupted
    for sentence in outcome.missing:
        _say(console, f"missing: {sentence}")
    return 0 if outcome.ok else 1


@app.command()
def status(
    target: Annotated[str, typer.Argument(help="a sweep file or an output folder")], out: OutOption = None
) -> None:
    """Show how far a sweep is; exits with 1 when any run failed."""
    from sweeps.output_folder import RECORDS, load_ledger
    from sweeps.plan import load_plan
    from sweeps.progress import status_table

    folder, file = _locate(target, out)
    records = folder / RECORDS
    if not records.exists():
        raise SweepError(f"{folder}: nothing has been run there")
    ledger = load_ledger(records)
    console = Console()
    smoke = ledger.sweep is not None and ledger.sweep.sweep.endswith("-smoke")
    console.print(status_table(load_plan(str(file), smoke=smoke), ledger))
    failed = [record for record in ledger.runs.values() if record.status == "failed"]
    for record in failed:
        _say(console, f"failed: {record.phase} {record.arm} seed {record.seed}: {record.reason}")
    if failed:
        raise typer.Exit(1)


@app.command()
def sync(
    target: Annotated[str, typer.Argument(help="a sweep file or an output folder")], out: OutOption = None
) -> None:
    """Make MLflow agree with the records of a sweep; can be repeated."""
    from sweeps.mlflow_pace import final_sync
    from sweeps.mlflow_sync import MlflowMirror, default_uri
    from sweeps.output_folder import RECORDS, locked
    from sweeps.spec import load_sweep

    folder, file = _locate(target, out)
    if not (folder / RECORDS).exists():
        raise SweepError(f"{folder}: nothing has been run there")
    settings = load_sweep(file)[0].mlflow
    uri, console = default_uri(settings.tracking_uri), Console()
    html = folder / "report" / "report.html"
    with locked(folder) as free:
        if not free:
            raise SweepError(f"{folder} is in use: the sweep that is running there syncs by itself")
        mirror = MlflowMirror(folder / RECORDS, uri, settings.experiment)
        error = final_sync(mirror, console.print, html if html.exists() else None)
    if error:
        raise SweepError(f"MLflow at {without_password(uri)}: {error}")
    _say(console, f"MLflow agrees with {folder / RECORDS}; {_ui_hint(uri)}")


@app.command()
def doctor(
    file: Annotated[str | None, typer.Argument(help="a sweep file, whose data and folders are looked at too")] = None,
    address: Annotated[str | None, typer.Option(help="of a cluster's dashboard, where sweeps run there")] = None,
    out: OutOption = None,
) -> None:
    """Look for what would stop a sweep or spoil its times: versions, devices, Ray, MLflow, data, folders.

    Changes nothing; exits with 1 where something must be mended.
    """
    from rich.table import Table
    from rich.text import Text

    from sweeps.doctor import examine

    console = Console()
    table = Table("", "what", "found", title="fastbp-sweep doctor")
    colours = {"ok": "green", "warn": "yellow", "fail": "bold red"}
    states: list[str] = []
    with console.status("looking"):
        for finding in examine(file, address, out):
            said = Text(finding.said)
            if finding.fix:
                said.append(f"\n-> {finding.fix}", style=colours[finding.state])
            table.add_row(Text(finding.state, style=colours[finding.state]), finding.what, said)
            states.append(finding.state)
    console.print(table)
    if "fail" in states:
        raise typer.Exit(1)


def _locate(target: str, out: Path | None) -> tuple[Path, Path]:
    """Output folder and sweep file of a folder, or of a sweep file."""
    from sweeps.plan import find_sweep
    from sweeps.spec import load_sweep

    if Path(target).is_dir():
        file = Path(target) / "sweep.yaml"
        if not file.exists():
            raise SweepError(f"{target}: no sweep.yaml there, so it is not the output folder of a sweep")
        return Path(target), file
    file, name = find_sweep(target)
    return out or Path("fastbp-runs") / load_sweep(file, name)[0].name, file


def _ui_hint(uri: str) -> str:
    """The line to type into a shell that opens the MLflow UI."""
    if not uri.startswith("sqlite:"):
        return f"see {without_password(uri)}"
    return f"{_command('mlflow')} ui --backend-store-uri {shlex.quote(uri)}"


def _command(name: str) -> str:
    """How to call a program of this environment from a shell that may not have activated it."""
    ours = Path(sys.executable).parent / name
    if shutil.which(name) == str(ours) or not ours.exists():
        return name
    return shlex.quote(os.path.relpath(ours) if ours.is_relative_to(Path.cwd()) else str(ours))


def main() -> None:
    """Entry point: errors of the user's making are one line each, without a traceback."""
    sys.path.append(os.getcwd())  # methods and models of the user's own, `my_pkg.sign:SignGrad`
    try:
        app()
    except SweepError as error:
        print(error, file=sys.stderr)
        sys.exit(EXIT_STOPPED if isinstance(error, SweepStopped) else 2)


if __name__ == "__main__":
    main()
