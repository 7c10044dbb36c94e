"""`fastbp-report SOURCE... --out DIR`, `fastbp-report diff A B`, `fastbp-report merge SOURCE... --out FILE`."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text
from typer.core import TyperGroup

from analysis.code_versions import code_warning
from analysis.diff import Diff, diff, write_diff
from analysis.embed import embed
from analysis.errors import ReportError
from analysis.measured import Group
from analysis.merge import merge
from analysis.rendering import processors
from analysis.report import Report, build, write
from analysis.table import Column, Table, header, text

REPORT = "SOURCE..."  # the command without a name, as it is listed in the help


class _ReportUnlessNamed(TyperGroup):
    """Takes everything that is no other command as the sources and options of the report."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, args if args[:1] and args[0] in (*self.commands, "--help") else [REPORT, *args])


app = typer.Typer(
    cls=_ReportUnlessNamed,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Report accuracy against training time: fastbp-report SOURCE... --out DIR.",
    epilog="A SOURCE is a results folder, a records file (also gzipped), mlflow:EXPERIMENT or mlflow:EXPERIMENT@URI; "
    "fastbp-report SOURCE... --help lists the options of the report.",
    subcommand_metavar="SOURCE... | diff A B | merge SOURCE...",
)
SourcesArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="SOURCE...", help="Results folder, records file, mlflow:EXPERIMENT or mlflow:EXPERIMENT@URI."
    ),
]
TrackingOption = Annotated[
    str | None,
    typer.Option("--tracking-uri", help="MLflow store; default MLFLOW_TRACKING_URI, else mlruns.db in this folder."),
]


@app.command(REPORT)
def report(
    sources: SourcesArgument,
    out: Annotated[Path, typer.Option("--out", help="Folder of the report; made if it does not exist.")] = Path(
        "report"
    ),
    allow_mixed: Annotated[
        bool, typer.Option("--allow-mixed", help="Accept unlike hardware or software, one section for each.")
    ] = False,
    claims: Annotated[
        Path | None,
        typer.Option("--claims", help="TOML file of claims to judge beside the published ones."),
    ] = None,
    into: Annotated[
        Path | None,
        typer.Option("--into", help="Also put answer and Pareto table into this Markdown file, between its marks."),
    ] = None,
    tracking_uri: TrackingOption = None,
) -> None:
    """Report accuracy against training time: Pareto front, time to target, control split, counts."""
    with _one_sentence():
        options = {"into": into, "tracking_uri": tracking_uri, "claims": claims, "processes": processors()}
        write_report(sources, out, allow_mixed=allow_mixed, **options)


@app.command("diff")
def diff_command(
    first: Annotated[str, typer.Argument(metavar="A", help="The sweep before: a SOURCE as of the report.")],
    second: Annotated[str, typer.Argument(metavar="B", help="The sweep after.")],
    out: Annotated[Path | None, typer.Option("--out", help="Also write it to this file, .md or .json.")] = None,
    allow_mixed: Annotated[
        bool, typer.Option("--allow-mixed", help="Compare times although hardware or software differ.")
    ] = False,
    tracking_uri: TrackingOption = None,
) -> None:
    """What changed from sweep A to sweep B: accuracy, time, settings, hardware and software, counts."""
    with _one_sentence():
        made = diff(first, second, allow_mixed=allow_mixed, tracking_uri=tracking_uri)
        if out is not None:
            write_diff(made, out)
        print_diff(made, Console())


@app.command("merge")
def merge_command(
    sources: SourcesArgument,
    out: Annotated[Path, typer.Option("--out", help="Records file to write, gzipped if it ends in .gz.")],
    tracking_uri: TrackingOption = None,
) -> None:
    """Write the records of all sources into one file, every run, epoch and sweep once."""
    with _one_sentence():
        merged = merge(sources, out, tracking_uri=tracking_uri)
        counts = ", ".join(f"{merged.kept[kind]} {kind} lines" for kind in ("sweep", "run", "epoch"))
        screen = Console()
        for problem in merged.problems:
            screen.print(Text(f"note: {problem}"), soft_wrap=True)
        screen.print(Text(f"{out}: {counts}, of {merged.read} lines read"), soft_wrap=True)


@contextmanager
def _one_sentence() -> Iterator[None]:
    """Bad input is one sentence and exit code 2."""
    try:
        yield
    except ReportError as error:
        print(f"fastbp-report: {' '.join(str(error).splitlines())}", file=sys.stderr)
        raise typer.Exit(2) from None


def write_report(
    sources: list[str],
    out: Path,
    allow_mixed: bool = False,
    console: Console | None = None,
    into: Path | None = None,
    tracking_uri: str | None = None,
    claims: Path | None = None,
    processes: int = 1,
) -> Path:
    """Write the report, print its Pareto tables and where it is; returns the path of the HTML page.

    Raises:
        ReportError: the sources cannot be read or compared, or the folder cannot be written.
    """
    made = build(sources, allow_mixed=allow_mixed, tracking_uri=tracking_uri, claims=claims)
    page = write(made, out, processes=processes)
    if into is not None:
        embed(made, into)
    screen = Console() if console is None else console
    print_report(made, screen)
    screen.print(Text(f"report: {page}"), soft_wrap=True)
    return page


def print_report(made: Report, console: Console) -> None:
    """Headline and Pareto table of every group, then what was left out."""
    for section in made.sections:
        for table in section.tables:
            if table.name == "pareto":  # there is none where only ablations were run
                console.print(_rich_table(section.group, table))
        console.print(Text(section.answer.headline))
        if warning := code_warning(section.group):
            console.print(Text(f"note: {warning}"))
        console.print()
    if made.across_tasks:
        console.print(Text(made.across_tasks))
        console.print()
    for table in made.overview:
        if table.name == "contaminated":
            console.print(_plain_table(table))
    if not made.sections:
        console.print("No measured runs: only a `measure` part gives times that can be compared.")
    runs = made.results.runs["status"].value_counts()
    bad = [f"{runs[status]} {status}" for status in ("failed", "diverged", "stopped", "running") if status in runs]
    if bad:
        console.print(Text(f"Runs that did not finish: {', '.join(bad)}; the report says why."))
    for reason, count in made.excluded.items():
        console.print(Text(f"Left out of the times: {count} finished runs that {reason}."))
    for problem in made.results.problems:
        console.print(Text(f"note: {problem}"))


_STYLE: Any = {"title_justify": "left", "title_style": "bold", "box": SIMPLE_HEAD, "pad_edge": False}


def _rich_table(group: Group, pareto: Table) -> RichTable:
    """The Pareto table for a terminal of 80 columns: fewer columns, intervals under their values."""
    accuracy = group.accuracy_name.replace("accuracy", "acc.").replace("validation", "val.")
    shown = {
        "arm": "arm",
        "n": "n",
        "accuracy": f"{accuracy} (%)",
        "seconds": "train time (s)",
        "speed_up": "speed-up",
        "on_front": "on front",
    }
    out = RichTable(title=Text(group.title), **_STYLE)
    for key, title in shown.items():
        is_name = key == "arm"
        out.add_column(title, justify="left" if is_name else "right", overflow="fold", no_wrap=not is_name)
    columns: dict[str, Column] = {c.key: c for c in pareto.shown}
    for row in pareto.rows:
        cells = [text(row.get(key), columns[key]) for key in shown]
        below = [cells[0], *(_interval_below(cell) for cell in cells[1:])]
        if row["on_front"] is not None:
            below[-1] += f"\nP {text(row['p_front'], columns['p_front'])}"
        out.add_row(*map(Text, below), style="dim" if row["role"] == "control" else None)
    return out


def _plain_table(table: Table) -> RichTable:
    """All shown columns, intervals under their values; controls dim."""
    out = RichTable(title=Text(table.title), **_STYLE)
    for column in table.shown:
        out.add_column(Text(header(column)), justify="left" if column.kind == "text" else "right", overflow="fold")
    for row in table.rows:
        cells = (Text(_interval_below(cell)) for cell in table.cells(row))
        out.add_row(*cells, style="dim" if row.get("role") == "control" else None)
    return out


def print_diff(made: Diff, console: Console) -> None:
    """All tables, intervals under their values, then what to know."""
    for side, name, runs in zip("AB", made.names, made.runs, strict=True):
        console.print(Text(f"{side}: {name}, {runs} runs"), soft_wrap=True)
    for table in made.tables:
        console.print()
        console.print(_plain_table(table))
        if table.caption:
            console.print(Text(table.caption))
    for note in made.notes:
        console.print(Text(f"note: {note}"), soft_wrap=True)


def _interval_below(cell: str) -> str:
    """`1.43× [1.40×, 1.46×]` on two lines and without the brackets."""
    value, bracket, interval = cell.partition(" [")
    return f"{value}\n{interval.rstrip(']').replace('×', '').replace(', ', ' to ')}" if bracket else cell


def main() -> None:
    """Entry point of the console script."""
    gc.freeze()  # what is imported stays; records are many and without cycles: looking for some rarely is enough
    gc.set_threshold(100_000, 20, 20)
    app()
