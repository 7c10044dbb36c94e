"""One table, written as text, CSV, JSON, Markdown and LaTeX."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from analysis.statistics import Estimate

Kind = Literal[
    "text", "count", "percent", "points", "seconds", "difference", "ratio", "share", "p", "flag", "bytes", "number"
]
NOT_REACHED = "not reached"
UNITS = {"percent": "%", "points": "points", "seconds": "s", "difference": "s", "bytes": "MiB"}
_FACTORS = {"percent": 100.0, "points": 100.0, "bytes": 2.0**-20}


@dataclass(frozen=True)
class Column:
    """A column: `key` into the rows, what stands above it, and how its values read.

    Attributes:
        null: what stands for unknown.
        shown: false for a column that only the files for machines have.
        places: decimals of times; None: as many as each value deserves.
    """

    key: str
    title: str
    kind: Kind = "text"
    null: str = "–"
    shown: bool = True
    places: int | None = None


@dataclass(frozen=True)
class Table:
    """Rows of raw values by column key: text, int, float, bool, Estimate or None.

    A row's `KEY_kind` is the kind of its value under `KEY`, where the rows of a column are not of one kind.

    Attributes:
        folded: a detail that a page may show closed.
    """

    name: str
    title: str
    caption: str
    columns: Sequence[Column]
    rows: list[dict[str, Any]] = field(default_factory=list)
    folded: bool = False

    @cached_property
    def shown(self) -> list[Column]:
        """What people read; the times of a column with one number of decimals."""
        return [self._even(column) for column in self.columns if column.shown]

    def _even(self, column: Column) -> Column:
        if column.kind not in ("seconds", "difference"):
            return column
        cells = [row.get(column.key) for row in self.rows]
        values = [cell.value if isinstance(cell, Estimate) else cell for cell in cells]
        return replace(column, places=even_decimals([abs(v) for v in values if isinstance(v, int | float)]))

    def cell(self, row: dict[str, Any], column: Column) -> str:
        """The value of a row as people read it; of a kind of its own with its unit."""
        kind = row.get(f"{column.key}_kind")
        if kind is None:
            return text(row.get(column.key), column)
        own = text(row.get(column.key), replace(column, kind=kind))
        return f"{own} {UNITS[kind]}" if kind in UNITS and own != column.null else own

    def without_empty(self, *keys: str) -> Table:
        """The table without those of the named columns of which every cell is unknown."""
        empty = {key for key in keys if all(_is_unknown(row.get(key)) for row in self.rows)}
        return replace(self, columns=[column for column in self.columns if column.key not in empty])

    def cells(self, row: dict[str, Any]) -> list[str]:
        """The shown columns of a row as people read them."""
        return [self.cell(row, column) for column in self.shown]


def text(value: Any, column: Column) -> str:
    """A value as people read it, its interval in brackets."""
    if isinstance(value, Estimate):
        return column.null if value.value is None else estimate(value, column.kind, column.places)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return column.null
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value) if isinstance(value, str) else number(value, column.kind, places=column.places)


def estimate(e: Estimate, kind: Kind, places: int | None = None) -> str:
    """A known estimate, its interval in brackets with as many decimals as the value."""
    assert e.value is not None
    if e.low is None or e.high is None:
        return number(e.value, kind, places=places)
    low, high = (number(end, kind, like=e.value, places=places) for end in (e.low, e.high))
    value = number(e.value, kind, places=places)
    return value if value == low == high == NOT_REACHED else f"{value} [{low}, {high}]"


def number(value: float, kind: Kind, *, like: float | None = None, places: int | None = None) -> str:
    """A number with the digits that its kind deserves, or that `like` would get; a ratio ends in ×.

    A time has `places` decimals where they are given.

    Units stand in the header.
    """
    if math.isinf(value):
        return NOT_REACHED if kind == "seconds" else "∞"
    if kind == "ratio" and value == 0:
        return NOT_REACHED  # in finite time
    if kind == "p":
        return "<0.001" if value < 0.001 else f"{value:.3f}"
    value *= _FACTORS.get(kind, 1.0)
    if kind in ("seconds", "difference"):
        known = value if like is None or math.isinf(like) else like
        if places is None:
            places = decimals(known)
        out = f"{value:.{places}f}" if abs(known) >= 1e-4 or known == 0 else f"{value:.2e}"
    elif kind in ("percent", "points", "ratio", "share"):
        out = f"{value:.2f}"
    else:
        out = {"count": f"{value:.0f}", "bytes": f"{value:.1f}"}.get(
            kind, f"{value:.4g}" if abs(value) < 1e6 else f"{value:.2e}"
        )
    if float(out) == 0:
        out = out.replace("-", "")
    elif kind in ("points", "difference") and value > 0:
        out = f"+{out}"
    return out.replace("-", "−") + ("×" if kind == "ratio" else "")


def decimals(value: float, digits: int = 3) -> int:
    """Decimals that show a number to at least so many significant digits.

    >>> [f"{x:.{decimals(x)}f}" for x in (0.01234, 1.234, 9.997, 12345.6, 0)]
    ['0.0123', '1.23', '10.0', '12346', '0']
    """
    if value == 0:
        return 0
    magnitude = math.floor(math.log10(float(f"{abs(value):.{digits - 1}e}")))
    return max(digits - 1 - magnitude, 0)


def even_decimals(values: Sequence[float]) -> int | None:
    """Decimals for all numbers of a column: three digits for the smallest, at most five for the largest.

    None where no number of decimals suits both, or there are no numbers.

    >>> [even_decimals(x) for x in ([82.6, 101.2], [1.5, 2.9], [0.012, 5000.0], [])]
    [1, 2, None, None]
    """
    known = [v for v in values if math.isfinite(v) and v >= 1e-4]
    if not known:
        return None
    fine, most = decimals(min(known)), decimals(max(known), digits=5)
    return min(fine, most) if max(known) < 1000 * min(known) else None


def sort_key(value: Any) -> float | str:
    """What an interactive table sorts by; unknown sorts last."""
    if isinstance(value, Estimate):
        value = value.value
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return value if isinstance(value, str) else float(value)


def joined(tables: Sequence[tuple[str, Table]]) -> Table:
    """The same table of several groups as one, the group in the first column.

    Args:
        tables: group title and table, at least one; columns may differ and are united.
    """
    first = tables[0][1]
    columns = {c.key: c for _, t in tables for c in t.columns}
    rows = [{"group": title, **row} for title, table in tables for row in table.rows]
    return replace(first, columns=[Column("group", "group"), *columns.values()], rows=rows)


def plain_rows(table: Table) -> list[dict[str, Any]]:
    """Rows of raw numbers: an estimate becomes `key`, `key_low`, `key_high`, `key_n`; unknown is None.

    Units are those of the records: fractions, seconds, bytes. A time that was not reached is infinite.
    """
    estimates = {c.key for c in table.columns if any(isinstance(row.get(c.key), Estimate) for row in table.rows)}
    out = []
    for row in table.rows:
        plain: dict[str, Any] = {}
        for column in table.columns:
            value = row.get(column.key)
            if f"{column.key}_kind" in row:
                plain[f"{column.key}_kind"] = row[f"{column.key}_kind"]
            if column.key in estimates:
                e = value if isinstance(value, Estimate) else Estimate()
                parts = {"": e.value, "_low": e.low, "_high": e.high, "_n": e.n}
                plain |= {column.key + suffix: _known(part) for suffix, part in parts.items()}
            else:
                plain[column.key] = _known(value)
        out.append(plain)
    return out


def to_csv(table: Table) -> str:
    rows = plain_rows(table)
    names = list(rows[0]) if rows else [c.key for c in table.columns]
    out = io.StringIO()
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def to_json(table: Table) -> str:
    rows = [{key: finite(value) for key, value in row.items()} for row in plain_rows(table)]
    data = {"name": table.name, "title": table.title, "caption": table.caption, "rows": rows}
    return json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def to_markdown(table: Table) -> str:
    """A pipe table, without title and caption."""
    head = [markdown(header(c)) for c in table.shown]
    rule = ["---" if c.kind == "text" else "---:" for c in table.shown]
    body = [[markdown(cell) for cell in table.cells(row)] for row in table.rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, rule, *body]) + "\n"


def to_latex(table: Table) -> str:
    """A booktabs table with its caption, for a paper."""
    align = "".join("l" if c.kind == "text" else "r" for c in table.shown)
    lines = [[latex(header(c)) for c in table.shown]]
    lines += [[latex(cell) for cell in table.cells(row)] for row in table.rows]
    body = [" & ".join(cells) + r" \\" for cells in lines]
    return "\n".join(
        [
            r"\begin{table}",
            rf"\caption{{{latex(table.title)}. {latex(table.caption)}}}",
            rf"\begin{{tabular}}{{{align}}}",
            r"\toprule",
            body[0],
            r"\midrule",
            *body[1:],
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def header(column: Column) -> str:
    """Title with unit."""
    unit = UNITS.get(column.kind)
    return f"{column.title} ({unit})" if unit else column.title


def nobreak(raw: str) -> str:
    """The text with a space between a number and its unit, or inside an interval, that no line ends at.

    >>> nobreak("0.9 [0.8, 1.1] s and 16.9 % of 3 runs").replace(chr(160), "_")
    '0.9_[0.8,_1.1]_s and 16.9_% of 3 runs'
    """
    raw = re.sub(r"(?<=\d)([×%]?)(\]?) (?=(?:%|s|points|×)(?!\w)|\[[−+\d])", "\\1\\2\N{NO-BREAK SPACE}", raw)
    return re.sub(r"(\[[−+]?[\d.]+×?,) (?=[−+\d])", "\\1\N{NO-BREAK SPACE}", raw)


def markdown(raw: str) -> str:
    """Text that Markdown shows literally, on one line."""
    raw = raw.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\|`*_\[\]#~$])", r"\\\1", re.sub(r"\s+", " ", raw))


_LATEX = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "×": r"$\times$", "−": "$-$", "∞": r"$\infty$", "–": "--", "—": "---", "·": r"$\cdot$", "≥": r"$\ge$",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", "[": "{[}", "]": "{]}",
    **{c: "\\" + c for c in "&%$#_{}"},
}  # fmt: skip


def latex(raw: str) -> str:
    """Text that LaTeX sets literally, on one line."""
    return "".join(_LATEX.get(c, c) for c in re.sub(r"\s+", " ", raw))


def _is_unknown(value: Any) -> bool:
    value = value.value if isinstance(value, Estimate) else value
    return value is None or (isinstance(value, float) and math.isnan(value))


def _known(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value


def finite(value: Any) -> Any:
    """JSON has no infinity; it is written as text."""
    return str(value) if isinstance(value, float) and math.isinf(value) else value
