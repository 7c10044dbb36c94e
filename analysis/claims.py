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

Verdict = Literal["confirmed", "contradicted", "not enough data", "not comparable"]
METRICS = ("seconds_ratio", "target_ratio", "accuracy_difference")


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
        if self.metric not in METRICS:
            raise ReportError(f"claim {self.id}: metric {self.metric!r} is none of {', '.join(METRICS)}")
        if sum(bound is not None for bound in (self.at_most, self.at_least, self.above)) != 1:
            raise ReportError(f"claim {self.id}: give one of at_most, at_least and above")

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
        ReportError: the file is missing, no TOML, or a claim has a wrong key.
    """
    try:
        entries = tomllib.loads(path.read_text(encoding="utf-8")).get("claim", [])
        return [Claim(**entry) for entry in entries]
    except OSError as error:
        raise ReportError(f"{path}: cannot be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, TypeError) as error:
        raise ReportError(f"{path}: {error}") from error


def verdict(claim: Claim, estimate: Estimate) -> Verdict:
    """What an estimate with its 95 % interval says to a claim: only an interval wholly on one side decides.

    >>> verdict(Claim("c", "ldb", "", "", "seconds_ratio", at_most=0.8), Estimate(0.7, 0.65, 0.75, n=5))
    'confirmed'
    """
    if estimate.n < MIN_SEEDS or estimate.low is None or estimate.high is None:
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
    if where.get("devices", 1) > (device.get("count") or 1):
        return f"one device, not {where['devices']}"
    for name, wanted in (where.get("settings") or {}).items():
        if arm.values.get(name) != wanted:
            return f"{name} is {arm.values.get(name)}, not {wanted}"
    return ""


def claim_table(group: Group, results: Results, claims: Sequence[Claim]) -> Table:
    """Every claim about a method that this group measured, with the computed verdict."""
    rows = [
        _row(claim, group, arm, results)
        for claim in claims
        for arm in group.arms
        if arm.family == claim.method and arm.role == "method" and arm.n
    ]
    columns = (
        Column("claim", "published claim"),
        Column("verdict", "verdict"),
        Column("measured", "measured here", "number"),
        Column("bound", "bound"),
        Column("arm", "arm"),
        Column("why", "why"),
        Column("source", "source"),
    )
    caption = (
        "Bounds are the papers' own figures; ratios are arm over backprop, paired by seed, with 95 % intervals. A "
        f"claim is confirmed or contradicted only where the whole interval lies on one side, with at least {MIN_SEEDS} "
        "seeds; a measurement on other data, models or devices than the claim's is not comparable."
    )
    return Table("claims", "What the papers claim, and what was measured here", caption, columns, rows)


def _row(claim: Claim, group: Group, arm: Arm, results: Results) -> dict[str, Any]:
    estimate = _MEASURES[claim.metric](group, arm, results)
    why = mismatch(claim, group, arm)
    said: Verdict = "not comparable" if why else verdict(claim, estimate)
    if said == "not enough data":
        why = "the interval contains the bound"
        if estimate.n < MIN_SEEDS:
            why = f"{estimate.n} paired seeds, at least {MIN_SEEDS} are needed"
        elif estimate.low is None:
            why = "a pair of runs both missed the target"
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


def _inverse(speed: Callable[[Group, Arm, Results], Estimate]) -> Callable[[Group, Arm, Results], Estimate]:
    """A time ratio, arm over baseline, from a speed-up; a speed-up of 0 is a target that was never reached."""

    def ratio(group: Group, arm: Arm, results: Results) -> Estimate:
        one = speed(group, arm, results)
        if one.value is None:
            return one
        ends = (one.value, one.high, one.low)
        value, low, high = (None if x is None else math.inf if x == 0 else 1 / x for x in ends)
        return Estimate(value, low, high, one.n)

    return ratio


def _speed_up(group: Group, arm: Arm, results: Results) -> Estimate:
    return speed_up(group, arm)


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
    "seconds_ratio": _inverse(_speed_up),
    "target_ratio": _inverse(_target_ratio),
    "accuracy_difference": _accuracy_difference,
}
