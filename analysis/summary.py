"""What should I use? Sentences computed from the data, with their uncertainty; losses as plainly as gains."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from analysis.measured import Arm, Group
from analysis.statistics import Estimate, difference_estimate
from analysis.table import estimate
from analysis.tables import accuracy_gain, front, speed_up

MIN_SEEDS = 3
CLAIM_SEEDS = 5

Verdict = Literal["wins", "trade-off", "undecided", "loses", "not enough data"]
Sign = Literal[-1, 0, 1]


@dataclass(frozen=True)
class Comparison:
    """One method against the baseline of its sweep.

    Attributes:
        sentence: speed and accuracy in words, without the arm's name and the verdict.
    """

    arm: Arm
    verdict: Verdict
    speed: Estimate
    gain: Estimate
    sentence: str


@dataclass(frozen=True)
class Answer:
    """The first page for one group: headline, what it rests on, then one sentence per method."""

    headline: str
    basis: str
    comparisons: tuple[Comparison, ...]
    notes: tuple[str, ...]


def answer(group: Group) -> Answer:
    """The recommendation for one task on one kind of hardware."""
    methods = [arm for arm in group.arms if arm.role == "method"]
    comparisons = tuple(compare(group, arm) for arm in methods)
    baselines = [arm for arm in group.candidates if arm.role == "baseline"]
    return Answer(
        _headline(group, comparisons, baselines),
        _basis(group, baselines),
        comparisons,
        tuple(_notes(group, comparisons)),
    )


def compare(group: Group, arm: Arm) -> Comparison:
    """Verdict on one method: an effect counts only where its 95 % interval excludes no effect."""
    speed, gain = speed_up(group, arm), accuracy_gain(group, arm, group.baseline_of(arm))
    if min(speed.n, gain.n) < MIN_SEEDS:
        return Comparison(arm, "not enough data", speed, gain, _too_few(group, arm, min(speed.n, gain.n)))
    faster, better = sign(speed, 1.0), sign(gain, 0.0)
    verdict: Verdict = "undecided"
    if faster + better > 0 and min(faster, better) >= 0:
        verdict = "wins"
    elif faster * better < 0:
        verdict = "trade-off"
    elif faster + better < 0:
        verdict = "loses"
    return Comparison(arm, verdict, speed, gain, f"{_speed_words(speed, faster)}, {_gain_words(gain, better)}")


def sign(estimate: Estimate, neutral: float) -> Sign:
    """On which side of `neutral` the whole interval lies; 0 where it contains it or there is none."""
    if estimate.low is None or estimate.high is None:
        return 0
    return 1 if estimate.low > neutral else -1 if estimate.high < neutral else 0


def _speed_words(speed: Estimate, faster: Sign) -> str:
    words = {1: "faster", 0: "no clear difference in training time", -1: "slower"}[faster]
    return f"{words} (speed-up {estimate(speed, 'ratio')})"


def _gain_words(gain: Estimate, better: Sign) -> str:
    words = {1: "more accurate", 0: "no clear difference in accuracy", -1: "less accurate"}[better]
    return f"{words} ({estimate(gain, 'points')} points)"


def _too_few(group: Group, arm: Arm, pairs: int) -> str:
    if group.baseline_of(arm) is None:
        return "there is no finished baseline to compare with"
    done = f"{arm.n} finished measured run{'' if arm.n == 1 else 's'}"
    tried = len(arm.tried)
    done += f" of {tried}" if tried > arm.n else ""
    paired = f", {pairs} of them paired with the baseline" if pairs < arm.n else ""
    return f"{done}{paired}; at least {MIN_SEEDS} are needed"


def _headline(group: Group, comparisons: Iterable[Comparison], baselines: list[Arm]) -> str:
    comparisons = list(comparisons)
    if not group.candidates:
        return "No measured run finished, so there is nothing to recommend."
    if not baselines:
        return "There is no finished baseline run, so no method can be judged against plain backpropagation."
    if not comparisons:
        return "Only the baseline was measured, so there is nothing to compare it with."
    decided = [c for c in comparisons if c.verdict != "not enough data"]
    if not decided:
        return f"Not enough data: no method has {MIN_SEEDS} seeds paired with the baseline."
    winners = [c for c in decided if c.verdict == "wins"]
    if winners:
        best = max(winners, key=lambda c: (c.speed.value or 0, c.gain.value or 0))
        return f"Use {best.arm.name}. Against {_name(group, best)}: {best.sentence}."
    trades = [c for c in decided if c.verdict == "trade-off"]
    base = baselines[0].name
    if trades:
        listed = "; ".join(f"{c.arm.name}: {c.sentence}" for c in trades)
        return f"Stay with {base} unless the trade suits you. {listed}."
    if any(c.verdict == "undecided" for c in decided):
        return f"Stay with {base}: no method is shown to be faster or more accurate."
    return f"Stay with {base}: every method that could be judged is worse."


def _name(group: Group, comparison: Comparison) -> str:
    baseline = group.baseline_of(comparison.arm)
    return baseline.name if baseline else "the baseline"


def _basis(group: Group, baselines: list[Arm]) -> str:
    seeds = f"{len(group.seeds)} seed{'' if len(group.seeds) == 1 else 's'}"
    text = f"Measured alone on {group.hardware}, {seeds}."
    for arm in baselines[:1]:
        accuracy, seconds = group.accuracy(arm), group.seconds(arm)
        if accuracy.value is not None and seconds.value is not None:
            text += (
                f" The baseline {arm.name} reaches {estimate(accuracy, 'percent')} % {group.accuracy_name} "
                f"in {estimate(seconds, 'seconds')} s of training."
            )
    return text


def _notes(group: Group, comparisons: Iterable[Comparison]) -> Iterable[str]:
    """What a careful reader should know before acting on the verdicts."""
    comparisons = list(comparisons)
    for c in comparisons:
        if c.verdict in ("wins", "trade-off") and (note := _control_note(group, c)):
            yield note
    uncertain = [n for n, (on, p) in front(group).items() if on and p < 0.95]
    if uncertain:
        yield f"On the front, but in fewer than 95 % of resamples of the seeds: {', '.join(uncertain)}."
    decided = [c for c in comparisons if c.verdict != "not enough data"]
    fewest = min((min(c.speed.n, c.gain.n) for c in decided), default=CLAIM_SEEDS)
    if fewest < CLAIM_SEEDS:
        yield f"With {fewest} seeds this is a first impression; claim nothing below {CLAIM_SEEDS}."
    if len(decided) > 1:
        yield (
            f"{len(decided)} methods were compared without correcting for multiple comparisons: about one in "
            "twenty intervals misses by chance."
        )


def _control_note(group: Group, comparison: Comparison) -> str | None:
    """What the estimate itself does against the exact control of the same plan."""
    arm, control = comparison.arm, group.control_of(comparison.arm)
    if control is None:
        return None
    seeds = [s for s in arm.timed.index if s in control.timed.index]
    time, gain = (
        difference_estimate(arm.at(column, seeds), control.at(column, seeds))
        for column in ("train_seconds", group.accuracy_column)
    )
    if min(time.n, gain.n) < MIN_SEEDS:
        return None
    text = (
        f"{arm.name}: against its own exact control, which keeps its plan, the estimate changes training "
        f"time by {estimate(time, 'difference')} s and accuracy by {estimate(gain, 'points')} points."
    )
    if sign(comparison.speed, 1.0) > 0 and sign(time, 0.0) >= 0:
        text += " So its estimate is not what makes it faster."
    return text
