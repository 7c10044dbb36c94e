"""`fastbp-report SOURCE... --out DIR`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from analysis.embed import embed
from analysis.errors import ReportError
from analysis.measured import Group
from analysis.report import Report, build, write
from analysis.summary import answer
from analysis.table import Column, Table, text

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def report(
    sources: Annotated[
        list[str],
        typer.Argument(metavar="SOURCE...", help="Results folder, records file, or mlflow:EXPERIMENT."),
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder of the report; made if it does not exist.")] = Path(
        "report"
    ),
    allow_mixed: Annotated[
        bool, typer.Option("--allow-mixed", help="Accept unlike hardware or software, one section for each.")
    ] = False,
    into: Annotated[
        Path | None,
        typer.Option("--into", help="Also put answer and Pareto table into this Markdown file, between its marks."),
    ] = None,
) -> None:
    """Report accuracy against training time: Pareto front, time to target, control split, counts."""
    try:
        write_report(sources, out, allow_mixed=allow_mixed, into=into)
    except ReportError as error:
        print(f"fastbp-report: {error}", file=sys.stderr)
        raise typer.Exit(2) from None


def write_report(
    sources: list[str],
    out: Path,
    allow_mixed: bool = False,
    console: Console | None = None,
    into: Path | None = None,
) -> Path:
    """Write the report, print its Pareto tables and where it is; returns the path of the HTML page.

    Raises:
        ReportError: the sources cannot be read or compared, or the folder cannot be written.
    """
    made = build(sources, allow_mixed=allow_mixed)
    page = write(made, out)
    if into is not None:
        embed(made, into)
    screen = Console() if console is None else console
    print_report(made, screen)
    screen.print(Text(f"report: {page}"), soft_wrap=True)
    return page


def print_report(made: Report, console: Console) -> None:
    """Headline and Pareto table of every group, then what was left out."""
    for section in made.sections:
        console.print(_rich_table(section.group, section.tables[0]))
        console.print(Text(answer(section.group).headline))
        console.print()
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
    style = {"title_justify": "left", "title_style": "bold", "box": SIMPLE_HEAD, "pad_edge": False}
    out = RichTable(title=Text(group.title), **style)
    for key, title in shown.items():
        is_name = key == "arm"
        out.add_column(title, justify="left" if is_name else "right", overflow="fold", no_wrap=not is_name)
    columns: dict[str, Column] = {c.key: c for c in pareto.columns}
    for row in pareto.rows:
        cells = [text(row.get(key), columns[key]) for key in shown]
        below = [cells[0], *(_interval_below(cell) for cell in cells[1:])]
        if row["on_front"] is not None:
            below[-1] += f"\nP {text(row['p_front'], columns['p_front'])}"
        out.add_row(*map(Text, below), style="dim" if row["role"] == "control" else None)
    return out


def _interval_below(cell: str) -> str:
    """`1.43× [1.40×, 1.46×]` on two lines and without the brackets."""
    value, bracket, interval = cell.partition(" [")
    return f"{value}\n{interval.rstrip(']').replace('×', '').replace(', ', ' to ')}" if bracket else cell


def main() -> None:
    """Entry point of the console script."""
    app()
