"""How `fastbp methods` shows a method: its card, its settings with their ranges, its measured costs."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from collections.abc import Mapping

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastbp.costs import Cost
from fastbp.knobs import Choice, Domain, domains
from fastbp.method import Method


def show_card(console: Console, name: str, kind: type[Method]) -> None:
    """Print the card of a method (its module's docstring) and a table of its settings."""
    console.rule(f"{name}: {kind.__name__}", align="left")
    title, sections = card_sections(importlib.import_module(kind.__module__).__doc__ or "")
    console.print(f"{escape(title)}\n", highlight=False)
    if sections:
        grid = Table.grid(padding=(0, 2))
        grid.add_column(no_wrap=True)
        for heading, text in sections:
            grid.add_row(f"[bold]{escape(heading)}[/bold]", escape(text))
        console.print(grid, highlight=False)
        console.print()
    if dataclasses.fields(kind):
        console.print(settings_table(kind))
        console.print()


def card_sections(card: str) -> tuple[str, list[tuple[str, str]]]:
    r"""The first paragraph of a module's docstring, and the sections below it, each as one line to be wrapped anew.

    >>> card_sections("Sign: of the gradient.\n\nIdea        Move it\n            there.\nCost        None.")
    ('Sign: of the gradient.', [('Idea', 'Move it there.'), ('Cost', 'None.')])
    """
    title, _, body = inspect.cleandoc(card).partition("\n\n")
    sections: list[tuple[str, str]] = []
    for line in body.splitlines():
        start = re.match(r"(\w[\w ]*?) {2,}(\S.*)", line)
        if start:
            sections.append((start[1], start[2]))
        elif sections and line.startswith(" "):
            sections[-1] = (sections[-1][0], f"{sections[-1][1]} {line.strip()}")
        elif line:  # not a card: as it was written
            return inspect.cleandoc(card), []
    return title.replace("\n", " "), sections


def settings_table(kind: type[Method]) -> Table:
    """One row per field: default, the range that `search` in a sweep file stands for, meaning."""
    table = Table(title=f"settings of {kind.__name__}", title_justify="left", show_lines=True)
    for heading, width in (("setting", None), ("default", None), ("search range", 22), ("meaning", None)):
        table.add_column(heading, max_width=width)
    ranges, texts = domains(kind), meanings(kind)
    for field in dataclasses.fields(kind):
        default = "bp" if field.name == "inner" else str(field.default)
        row = (field.name, default, describe(ranges.get(field.name)), texts.get(field.name, ""))
        table.add_row(*map(escape, row))
    return table


def meanings(kind: type) -> dict[str, str]:
    """Field name to its text under `Attributes:` in the class's docstring, each as one line."""
    _, _, section = (inspect.getdoc(kind) or "").partition("Attributes:\n")
    found: dict[str, str] = {}
    name = ""
    for line in section.split("\n\n", 1)[0].splitlines():
        entry = re.match(r"    (\w+): (.*)", line)
        if entry:
            name = entry[1]
            found[name] = entry[2]
        elif name:
            found[name] += f" {line.strip()}"
    return {name: text.replace("`", "") for name, text in found.items()}


def describe(domain: Domain | None) -> str:
    """A search range in words.

    >>> from fastbp.knobs import LogUniform
    >>> describe(LogUniform(1e-6, 0.01))
    '1e-06 to 0.01, logarithmic'
    """
    if domain is None:
        return "not searched"
    if isinstance(domain, Choice):
        return "one of " + ", ".join(str(value) for value in domain.values)
    scale = {"LogUniform": ", logarithmic", "IntRange": ", whole"}.get(type(domain).__name__, "")
    return f"{domain.low:g} to {domain.high:g}{scale}"


def costs_table(title: str, costs: Mapping[str, Cost | str]) -> Table:
    """One row per method.

    Args:
        title: of the table.
        costs: method to its cost, or to the sentence why there is none.
    """
    table = Table(title=title, title_justify="left", show_lines=True)
    table.add_column("method")
    table.add_column("FLOPs of a step\n/ backprop's", justify="right")
    table.add_column("mean over\nepochs", justify="right")
    table.add_column("extra state\nMB", justify="right")
    remarks = any(isinstance(cost, str) or len(cost.step_flops) > 1 for cost in costs.values())
    if remarks:
        table.add_column("of")
    for name, cost in costs.items():
        if isinstance(cost, str):
            table.add_row(escape(name), "-", "-", "-", escape(cost))
            continue
        steps = [f"{ratio:.3f}" for ratio in cost.step_flops.values()] or ["not counted"]
        mean = "-" if cost.mean_flops is None else f"{cost.mean_flops:.3f}"
        kinds = [f"{kind or 'other'} epochs" for kind in cost.step_flops] if len(cost.step_flops) > 1 else []
        row = ["\n".join(steps), mean, f"{cost.state_bytes / 1e6:.3f}", *(["\n".join(kinds)] if remarks else [])]
        table.add_row(escape(name), *row)
    return table


def costs_note() -> str:
    """What the numbers of `costs_table` are and are not."""
    return (
        "Counted: matrix products, convolutions and attention, forward and backward, on the same batch. The\n"
        "mean is over a period of epochs (ldb drops in every second one). State is what a checkpoint has\n"
        "more than backprop's. FLOPs are not seconds: fastbp bench times the steps."
    )
