"""Claim cards: what the papers say, and what these measurements say to it."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

from analysis.errors import ReportError
from analysis.load import Results
from analysis.measured import Arm, Group
from analysis.statistics import Estimate
from analysis.table import Column, Kind, Table
from analysis.tables import accuracy_gain, speed_up
from analysis.targets import group_curves, target_speed_up, target_times

PUBLISHED = Path(__file__).parent / "published" / "claims.toml"
MIN_SEEDS = 3
MIN_TARGET_SEEDS = 5  # a median over seeds: below five its interval, the range, covers less than 94 %

Verdict = Literal["confirmed", "contradicted", "not enough data", "not comparable"]
METRICS = ("seconds_ratio", "target_ratio", "accuracy_difference")
_CONDITIONS: dict[str, tuple[type, str]] = {
    "data": (list, "a list of names"),
    "model": (list, "a list of names"),
    "device": (str, "a text"),
    "devices": (int, "a whole number"),
    "settings": (dict, "a table"),
}


@dataclass(frozen=True)
class Claim:
    """One published claim.

    Attributes:
        method: family it is about, as `ldb` or `dbp+ldb`.
        text: the claim in one sentence.
        source: paper and place.
        metric: one of METRICS; a ratio is arm over baseline.
        at_most, at_least, above: the bound that the metric must keep, `above` strictly; one of the three.
        where: what a measurement must match, see `published/claims.toml`.
    """

    id: str
    method: str
    text: str
    source: str
    metric: str
    at_most: float | None = None
    at_least: float | None = None
    above: float | None = None
    where: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        for name in ("id", "method", "text", "source"):
            if not isinstance(getattr(self, name), str):
                raise ReportError(f"claim {self.id}: {name} is {getattr(self, name)!r:.80}, expected a text")
        if self.metric not in METRICS:
            raise ReportError(f"claim {self.id}: metric {self.metric!r} is none of {', '.join(METRICS)}")
        bounds = [bound for bound in (self.at_most, self.at_least, self.above) if bound is not None]
        if len(bounds) != 1:
            raise ReportError(f"claim {self.id}: give one of at_most, at_least and above")
        if isinstance(bounds[0], bool) or not isinstance(bounds[0], int | float) or not math.isfinite(bounds[0]):
            raise ReportError(f"claim {self.id}: the bound is {bounds[0]!r:.80}, expected a number")
        self._check_where()

    def _check_where(self) -> None:
        if not isinstance(self.where or {}, dict):
            raise ReportError(f"claim {self.id}: where is {self.where!r:.80}, expected a table")
        for name, value in (self.where or {}).items():
            if name not in _CONDITIONS:
                raise ReportError(f"claim {self.id}: where has no {name!r:.80}; known are {', '.join(_CONDITIONS)}")
            kind, expected = _CONDITIONS[name]
            names = value if isinstance(value, list) else []
            if not isinstance(value, kind) or isinstance(value, bool) or any(not isinstance(n, str) for n in names):
                raise ReportError(f"claim {self.id}: where.{name} is {value!r:.80}, expected {expected}")

    @property
    def min_seeds(self) -> int:
        """Paired seeds below which nothing is decided."""
        return MIN_TARGET_SEEDS if self.metric == "target_ratio" else MIN_SEEDS

    @property
    def bound(self) -> str:
        sign, value = next(
            (sign, value)
            for sign, value in (("≤", self.at_most), ("≥", self.at_least), (">", self.above))
            if value is not None
        )
        shown = f"{100 * value:g} points" if self.kind == "points" else f"{value:g}×"
        return f"{sign} {shown}".replace("-", "−").replace(" ", "\N{NO-BREAK SPACE}")

    @property
    def kind(self) -> Kind:
        """How its metric reads."""
        return "points" if self.metric == "accuracy_difference" else "ratio"


def load_claims(path: Path = PUBLISHED) -> list[Claim]:
    """The claims of a file.

    Raises:
        ReportError: the file is missing, no TOML, has no claim, or a claim has a wrong key or value.
    """
    try:
        entries = tomllib.loads(path.read_text(encoding="utf-8")).get("claim")
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise ReportError("there is no [[claim]]; write one as in analysis/published/claims.toml")
        return [Claim(**entry) for entry in entries]
    except OSError as error:
        raise ReportError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, TypeError, RecursionError, ReportError) as error:  # no TOML, no text, a wrong key or value
        raise ReportError(f"{path}: {str(error).replace('Claim.__init__() ', '')}") from error


def verdict(claim: Claim, estimate: Estimate) -> Verdict:
    """What an estimate with its 95 % interval says to a claim: only an interval wholly on one side decides.

    >>> verdict(Claim("c", "ldb", "", "", "seconds_ratio", at_most=0.8), Estimate(0.7, 0.65, 0.75, n=5))
    'confirmed'
    """
    if estimate.n < claim.min_seeds or estimate.low is None or estimate.high is None:
        return "not enough data"
    if claim.at_most is not None:
        inside, outside = estimate.high <= claim.at_most, estimate.low > claim.at_most
    elif claim.at_least is not None:
        inside, outside = estimate.low >= claim.at_least, estimate.high < claim.at_least
    else:
        assert claim.above is not None
        inside, outside = estimate.low > claim.above, estimate.high <= claim.above
    return "confirmed" if inside else "contradicted" if outside else "not enough data"


def mismatch(claim: Claim, group: Group, arm: Arm) -> str:
    """Why a measurement does not speak to a claim, in a few words; empty where it does."""
    where, run = claim.where or {}, arm.timed.iloc[0]
    for key in ("data", "model"):
        patterns, got = where.get(key), str(run["task"].get(key))
        if patterns and not any(fnmatch(got, p) for p in patterns):
            return f"{key} is {got}, not {' or '.join(patterns)}"
    device = run["device"]
    if where.get("device") not in (None, device.get("type")):
        return f"device is {device.get('type')}, not {where['device']}"
    if where.get("devices", 1) > arm.workers:
        return f"{'one device' if arm.workers == 1 else f'{arm.workers} devices'}, not {where['devices']}"
    for name, wanted in (where.get("settings") or {}).items():
        if arm.values.get(name) != wanted:
            return f"{name} is {arm.values.get(name)}, not {wanted}"
    return ""


def claim_table(group: Group, results: Results, claims: Sequence[Claim]) -> Table:
    """Every claim about a method that this group measured, be it beside other programs, with the computed verdict."""
    rows = [
        _row(claim, group, arm, results)
        for claim in claims
        for arm in group.arms
        if arm.family == claim.method and arm.role == "method" and (arm.n or arm.shared)
    ]
    columns = (
        Column("claim", "claim"),
        Column("verdict", "verdict"),
        Column("measured", "measured here", "number"),
        Column("bound", "bound"),
        Column("arm", "arm"),
        Column("why", "why"),
        Column("source", "source"),
    )
    caption = (
        "Bounds are the claims' own figures; ratios are arm over backprop, paired by seed, with 95 % intervals. A "
        f"claim is confirmed or contradicted only where the whole interval lies on one side, with at least {MIN_SEEDS} "
        f"seeds ({MIN_TARGET_SEEDS} for times to a target, whose median needs them); not corrected for the number of "
        "claims. A measurement on other data, models or devices than the claim's is not comparable."
    )
    return Table("claims", "What is claimed, and what was measured here", caption, columns, rows)


def _row(claim: Claim, group: Group, arm: Arm, results: Results) -> dict[str, Any]:
    estimate = _MEASURES[claim.metric](group, arm, results) if arm.n else Estimate()
    why = mismatch(claim, group, arm) if arm.n else ""
    said: Verdict = "not comparable" if why else verdict(claim, estimate)
    if said == "not enough data":
        why = "the interval contains the bound"
        if not arm.n:
            why = f"all {arm.shared} measured runs shared their device with other programs"
        elif estimate.n < claim.min_seeds:
            why = f"{estimate.n} paired seeds, at least {claim.min_seeds} are needed"
        elif estimate.low is None:
            why = "a pair has no ratio: both runs missed the target, or the baseline's time is 0"
    return {
        "claim": claim.text,
        "source": claim.source,
        "arm": arm.name,
        "bound": claim.bound,
        "measured": estimate,
        "measured_kind": claim.kind,
        "verdict": said,
        "why": why,
    }


def _seconds_ratio(group: Group, arm: Arm, results: Results) -> Estimate:
    """Training seconds over the baseline's, paired by seed."""
    speed = speed_up(group, arm)
    if speed.value is None:
        return speed
    ends = (speed.value, speed.high, speed.low)
    value, low, high = (None if x is None else math.inf if x == 0 else 1 / x for x in ends)
    return Estimate(value, low, high, speed.n)


def _accuracy_difference(group: Group, arm: Arm, results: Results) -> Estimate:
    return accuracy_gain(group, arm, group.baseline_of(arm))


def _target_ratio(group: Group, arm: Arm, results: Results) -> Estimate:
    """Seconds to the baseline's mean final validation accuracy over the baseline's, paired by seed.

    Every run counts, also those that diverged or failed; the estimate is empty where both runs of a pair missed.
    """
    baseline = group.baseline_of(arm)
    if baseline is None:
        return Estimate()
    target = float(baseline.timed["val_accuracy"].to_numpy(dtype=float).mean())
    curves = group_curves(group, results)
    return target_speed_up(target_times(arm, curves, target), target_times(baseline, curves, target))


_MEASURES: dict[str, Callable[[Group, Arm, Results], Estimate]] = {
    "seconds_ratio": _seconds_ratio,
    "target_ratio": _target_ratio,
    "accuracy_difference": _accuracy_difference,
}
