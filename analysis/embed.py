"""The report's answer and Pareto table inside another Markdown file, between two marks."""

from __future__ import annotations

from pathlib import Path

from analysis.errors import ReportError
from analysis.report import Report, write_file
from analysis.table import markdown, to_markdown

BEGIN, END = "<!-- fastbp-report: begin -->", "<!-- fastbp-report: end -->"


def embed(report: Report, path: Path) -> None:
    """Replace what stands between the marks; the rest of the file is left alone.

    Raises:
        ReportError: the file cannot be read or has no marks.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ReportError(f"{path}: cannot be read ({error.strerror})") from error
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ReportError(f"{path}: has no place for the table; put the lines {BEGIN} and {END} where it should stand")
    write_file(path, f"{before}{BEGIN}\n{summary(report)}{END}{after}".encode())


def summary(report: Report) -> str:
    """Per group: the headline, what it rests on, a sentence for each method, and the Pareto table, in Markdown."""
    pieces = []
    for section in report.sections:
        sentences = "".join(
            f"- {c.verdict}: **{markdown(c.arm.name)}**: {markdown(c.sentence)}.\n" for c in section.answer.comparisons
        )
        notes = "".join(f"\n{markdown(note)}\n" for note in section.answer.notes)
        pieces.append(
            f"**{markdown(section.answer.headline)}**\n\n{markdown(section.answer.basis)}\n\n{sentences}{notes}"
        )
        pieces += [f"{to_markdown(table)}\n" for table in section.tables if table.name == "pareto"]
    return "\n".join(pieces)
