"""The report: tables, figures, HTML and Markdown of a set of records; the same bytes for the same records."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from analysis import counts, plot, table, tables
from analysis.ablation import Dose, ablation_tables, doses
from analysis.across import across_sentence
from analysis.attainment import attainment_table
from analysis.claims import Claim, claim_table, load_claims
from analysis.comparisons import comparison_table
from analysis.contaminated import contaminated_table
from analysis.designs import designs
from analysis.dose_plots import DosePlot, dose_plots
from analysis.dose_plots import shown as drawn
from analysis.equal import equal_accuracy_table
from analysis.errors import ReportError
from analysis.factorial import ablation_table, factorial_table
from analysis.figures import dose_figures, figures, knob_figures, profile_figure
from analysis.knobs import Knob, figure_names, knob_table, knobs
from analysis.labels import Style, styles
from analysis.links import SHOWN, Origin
from analysis.load import Results, load
from analysis.measured import Arm, Group, left_out, measured_groups
from analysis.profile_plot import profile_plot
from analysis.profiles import Profile, profile_table, profiled
from analysis.reading import HOW
from analysis.rendering import Drawing, rendered
from analysis.resources import resource_plots, resource_table
from analysis.response import Response, responses
from analysis.shades import arm_styles
from analysis.summary import Answer, answer
from analysis.targets import target_table

WIDE, NARROW = (860, 460), (380, 380)  # pixels of the plots on a desk and on a phone

MARKERS = {
    "s": "M-5.5,-5.5H5.5V5.5H-5.5Z",
    "o": "M-6.2,0A6.2,6.2 0 1 0 6.2,0A6.2,6.2 0 1 0 -6.2,0Z",
    "^": "M0,-7L6.6,5.4H-6.6Z",
    "v": "M0,7L6.6,-5.4H-6.6Z",
    "D": "M0,-7.4L7.4,0L0,7.4L-7.4,0Z",
    "<": "M-7,0L5.4,-6.6V6.6Z",
    ">": "M7,0L-5.4,-6.6V6.6Z",
    "P": "M-2.4,-6.6H2.4V-2.4H6.6V2.4H2.4V6.6H-2.4V2.4H-6.6V-2.4H-2.4Z",
    "X": "M0,-3L3.6,-6.6L6.6,-3.6L3,0L6.6,3.6L3.6,6.6L0,3L-3.6,6.6L-6.6,3.6L-3,0L-6.6,-3.6L-3.6,-6.6Z",
    "p": "M0,-7L6.7,-2.2L4.1,5.7H-4.1L-6.7,-2.2Z",
    "h": "M0,-7L6,-3.5V3.5L0,7L-6,3.5V-3.5Z",
    "H": "M-3.5,-6H3.5L7,0L3.5,6H-3.5L-7,0Z",
    "8": "M-2.7,-6.5H2.7L6.5,-2.7V2.7L2.7,6.5H-2.7L-6.5,2.7V-2.7Z",
    "*": "M0,-7.6L1.8,-2.4L7.2,-2.3L2.9,0.9L4.5,6.1L0,3L-4.5,6.1L-2.9,0.9L-7.2,-2.3L-1.8,-2.4Z",
    "d": "M0,-8L4.6,0L0,8L-4.6,0Z",
}
"""matplotlib's marker to the same shape as an SVG path around the origin."""


@dataclass(frozen=True)
class Section:
    """One group with everything the report says about it.

    Attributes:
        runs: of each arm, seed and origin of the runs behind its point.
    """

    group: Group
    answer: Answer
    tables: list[table.Table]
    runs: list[list[tuple[int, Origin]]]
    pareto_plots: list[plot.Plot]
    curve_plots: list[plot.Plot]
    doses: list[Dose]
    resource_plots: list[plot.Plot]

    @property
    def dose_plots(self) -> list[DosePlot]:
        return dose_plots(self.doses)


@dataclass(frozen=True)
class Report:
    """All sections, and the tables over all runs."""

    results: Results
    sections: list[Section]
    across: list[table.Table]
    overview: list[table.Table]
    knobs: list[Knob]
    profile: Profile | None
    excluded: dict[str, int]
    styles: dict[str, Style]

    @property
    def across_tasks(self) -> str:
        """One sentence over all sections; empty for one."""
        return across_sentence([(section.group, section.answer) for section in self.sections])

    @cached_property
    def shades(self) -> dict[Arm, Style]:
        """How arms are drawn whose method has several settings, where it is not as the method."""
        drawn = [pair for section in self.sections for pair in arm_styles(section.group, self.styles).items()]
        return {arm: style for arm, style in drawn if style != self.styles[arm.family]}

    @cached_property
    def profile_plots(self) -> list[plot.Plot]:
        """The performance profile for a desk and for a phone; none below two tasks."""
        return [profile_plot(self.profile, *size) for size in (WIDE, NARROW)] if self.profile else []

    @cached_property
    def responses(self) -> list[Response]:
        """Small plots of accuracy against each knob."""
        return responses(self.knobs)

    @property
    def knob_figures(self) -> list[str]:
        """Names of the figures of knobs, without suffix."""
        return list(figure_names(self.knobs))


def build(
    sources: Iterable[str | Path],
    *,
    allow_mixed: bool = False,
    tracking_uri: str | None = None,
    claims: Path | None = None,
) -> Report:
    """Read and compute everything, write nothing.

    Args:
        allow_mixed: accept unlike hardware or software, one section for each.
        tracking_uri: of MLflow experiments that are named without one.
        claims: file of claims to judge beside the published ones.

    Raises:
        ReportError: the sources cannot be read or may not be compared.
    """
    judged = [*load_claims(), *(load_claims(claims) if claims else [])]
    results = load(sources, tracking_uri=tracking_uri)
    groups = measured_groups(results, allow_mixed=allow_mixed)
    found, profile = list(knobs(results)), profiled(groups, results)
    with_ablations = [part for group in groups for part in (group, group.ablated) if part]
    overview = [contaminated_table(results), counts.summary_table(results), counts.search_table(results)]
    overview.append(knob_table(found))
    return Report(
        results,
        [_section(group, results, judged) for group in groups],
        [profile_table(profile)] if profile else [],
        [t for t in overview if t.rows],
        found,
        profile,
        left_out(results, groups),
        styles([*(arm.family for group in with_ablations for arm in group.arms), *(knob.family for knob in found)]),
    )


def _section(group: Group, results: Results, claims: list[Claim]) -> Section:
    found = list(designs(group, results))
    made = [
        tables.pareto_table(group),
        target_table(group, results),
        equal_accuracy_table(group, results),
        *ablation_tables(found),
        ablation_table(group),
        factorial_table(group),
        tables.control_table(group),
        claim_table(group, results, claims),
        comparison_table(group),
        attainment_table(group),
        resource_table(group),
        tables.segment_table(group),
    ]
    shown = bool(group.candidates)
    return Section(
        group,
        answer(group),
        [t for t in made if t.rows],
        [_runs(arm, results) for arm in group.arms],
        [plot.pareto_plot(group, *size) for size in (WIDE, NARROW) if shown],
        [plot.curve_plot(group, results.epochs, *size) for size in (WIDE, NARROW) if shown],
        drawn(doses(found)),
        resource_plots(group) if shown else [],
    )


def _runs(arm: Arm, results: Results) -> list[tuple[int, Origin]]:
    """Seed and origin of the runs behind a point."""
    pairs = zip(arm.timed.index.tolist(), arm.timed["run_key"].tolist(), strict=True)
    return [(seed, results.origins[key]) for seed, key in pairs]


def write(report: Report, out: Path, *, processes: int = 1) -> Path:
    """Write all files of the report into a folder and return the path of the HTML page.

    Args:
        processes: at most that many draw figures; above 1 only from a program's own entry point.

    Raises:
        ReportError: the folder cannot be written.
    """
    try:
        for name, content in (*text_files(report), *figure_files(report, processes)):
            write_file(out / name, content)
    except OSError as error:
        raise ReportError(f"{out}: cannot write the report there ({error.strerror})") from error
    return out / "report.html"


def figure_files(report: Report, processes: int = 1) -> Iterator[tuple[str, bytes]]:
    """Paths of the figures inside the report folder and their contents."""
    for name, content in rendered(_drawings(report), processes):
        yield f"figures/{name}", content


def _drawings(report: Report) -> Iterator[Drawing]:
    for section in report.sections:
        yield from figures(section.group, report.results.epochs, report.styles)
        yield from dose_figures(section.doses, section.group.slug, report.styles)
    if report.profile:
        yield profile_figure(report.profile, report.styles)
    yield from knob_figures(report.knobs, report.styles)


def text_files(report: Report) -> Iterator[tuple[str, bytes]]:
    """Paths of tables and pages inside the report folder and their contents."""
    for one in all_tables(report):
        formats = {"csv": table.to_csv, "json": table.to_json, "tex": table.to_latex}
        for suffix, form in formats.items():
            yield f"tables/{one.name}.{suffix}", form(one).encode()
    yield "report.md", _render("report.md.j2", report, html=False)
    yield "report.html", _render("report.html.j2", report, html=True)


def all_tables(report: Report) -> list[table.Table]:
    """Each table once, the sections' joined with the group in the first column."""
    names = dict.fromkeys(t.name for s in report.sections for t in s.tables)
    found = [
        table.joined([(s.group.title, t) for s in report.sections for t in s.tables if t.name == name])
        for name in names
    ]
    return [*found, *report.across, *report.overview]


def _render(template: str, report: Report, *, html: bool) -> bytes:
    environment = _environment(html)
    families = {name: i for i, name in enumerate(sorted(report.styles))}
    environment.globals |= {"markers": MARKERS, "families": families, "styles": report.styles, "shown_runs": SHOWN}
    environment.globals |= {"shades": report.shades, "how": HOW}
    return environment.get_template(template).render(report=report).encode()


@cache
def _environment(html: bool) -> Environment:
    """Compiled once per process; what belongs to one report is among the globals."""
    environment = Environment(
        loader=PackageLoader("analysis"),
        autoescape=html,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "md": table.markdown,
        "markdown_table": table.to_markdown,
        "header": table.header,
        "cell": table.text,
        "sort_key": table.sort_key,
        "nobreak": table.nobreak,
    }
    return environment


def write_file(path: Path, content: bytes) -> None:
    """Replace a file in one step, so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".tmp")
    part.write_bytes(content)
    os.replace(part, path)
