"""Drawings to files: PNG and SVG of the same drawing, without dates and random ids, many of them on several cores."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.figure import Figure

from analysis.labels import shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_RC: Any = {
    "svg.hashsalt": "fastbp",
    "text.parse_math": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e3e6ea",
    "axes.axisbelow": True,
    "font.size": 10,
    "legend.frameon": False,
}

MOST_PROCESSES = 8
WORTH_A_PROCESS = 6  # drawings; another process spends as long as about three of them on its imports


@dataclass(frozen=True)
class Drawing:
    """A figure that is yet to be drawn; it can be pickled.

    Attributes:
        name: of the files, without suffix.
        panels: each draws one panel; they stand side by side.
    """

    name: str
    title: str
    panels: tuple[Callable[[Axes], None], ...]


def rendered(drawings: Iterable[Drawing], processes: int = 1) -> Iterator[tuple[str, bytes]]:
    """File names and contents of all drawings, in their order; the same bytes for any number of processes.

    Args:
        processes: at most; above 1 only for callers that may be imported again, as a program's own entry point.
    """
    drawings = list(drawings)
    processes = min(processes, len(drawings) // WORTH_A_PROCESS + 1)
    if processes == 1:
        for drawing in drawings:
            yield from render(drawing)
        return
    with ProcessPoolExecutor(processes - 1, get_context("spawn")) as pool:
        elsewhere = {i: pool.submit(render, d) for i, d in enumerate(drawings) if i % processes}
        here = {i: render(d) for i, d in enumerate(drawings) if i not in elsewhere}
        for i, drawing in enumerate(drawings):
            yield from here[i] if i in here else _made(elsewhere[i], drawing)


def _made(elsewhere: Future[list[tuple[str, bytes]]], drawing: Drawing) -> list[tuple[str, bytes]]:
    """What the other process drew; drawn here where that was killed, as for memory."""
    try:
        return elsewhere.result()
    except BrokenProcessPool:
        return render(drawing)


def processors() -> int:
    """How many processes this one may keep busy."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(allowed, MOST_PROCESSES)


def render(drawing: Drawing) -> list[tuple[str, bytes]]:
    """Name and content of the PNG and the SVG."""
    with matplotlib.rc_context(_RC), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # a name in a script that the font lacks
        count = len(drawing.panels)
        columns = min(count, 3)
        rows = -(-count // columns)
        figure = Figure(figsize=(7, 4.4) if count == 1 else (3.4 * columns, 3 * rows), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        for panel, own in zip(drawing.panels, axes, strict=False):
            panel(own)
        for unused in axes[count:]:
            unused.set_visible(False)
        axes[0].set_title(shortened(drawing.title, 90), loc="left", fontsize=10)
        made = []
        for suffix, metadata in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
            out = io.BytesIO()
            figure.savefig(out, format=suffix, dpi=160, metadata=metadata)
            figure.set_layout_engine("none")  # the places that were found hold for the other format
            made.append((f"{drawing.name}.{suffix}", out.getvalue()))
        return made
