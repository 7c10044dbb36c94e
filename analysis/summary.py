"""What should I use? Sentences computed from the data, with their uncertainty; losses as plainly as gains."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from analysis.code_versions import code_warning
from analysis.comparisons import MIN_SEEDS, Effect, accuracy_gain, comparisons, speed_up
from analysis.measured import Arm, Group
from analysis.statistics import Estimate, difference_estimate
from analysis.table import estimate, number
from analysis.tables import front

CLAIM_SEEDS = 5
MARGIN_ACCURACY = 0.01  # a faster method wins only where a loss of more than this fraction is excluded
MARGIN_SPEED = 0.9  # a more accurate one only where a speed-up below this is

Verdict = Literal["wins", "trade-off", "undecided", "loses", "not enough data"]
Sign = Literal[-1, 0, 1]


@dataclass(frozen=True)
class Comparison:
    """One method against the baseline of its sweep.

    Attributes:
        sentence: speed and accuracy in words, without the arm's name and the verdict.
        faster, better: 1 or -1 where the time or the accuracy is shown to differ.
    """

    arm: Arm
    verdict: Verdict
    speed: Estimate
    gain: Estimate
    sentence: str
    faster: int = 0
    better: int = 0


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
    """Verdict on one method: an effect counts only where its p, corrected over all methods, is below 5 %."""
    effects = comparisons(group).get(arm.name)
    if effects is None:
        speed, gain = speed_up(group, arm), accuracy_gain(group, arm, group.baseline_of(arm))
        return Comparison(arm, "not enough data", speed, gain, _too_few(group, arm, min(speed.n, gain.n)))
    speed, gain = effects[0].estimate, effects[1].estimate
    faster, better = effects[0].direction, effects[1].direction
    verdict: Verdict = "undecided"
    if faster + better > 0 and min(faster, better) >= 0:
        verdict = "wins"
    elif faster * better < 0:
        verdict = "trade-off"
    elif faster + better < 0:
        verdict = "loses"
    sentence = f"{_speed_words(speed, faster)}, {_gain_words(gain, better)}"
    doubts = [*_open_losses(speed, faster, gain, better), *_unequal_budget(group, arm)]
    lost, lost_by_baseline = _lost_share(arm), _lost_share(group.baseline_of(arm))
    if verdict == "wins" and (doubts or lost > lost_by_baseline):
        verdict = "trade-off"
    if verdict == "undecided":
        sentence += _unseen(effects)
    sentence = "; ".join([sentence, *doubts, *_ended_badly(arm)])
    return Comparison(arm, verdict, speed, gain, sentence, faster, better)


def _open_losses(speed: Estimate, faster: int, gain: Estimate, better: int) -> Iterable[str]:
    """What an undecided outcome may still cost where the other outcome is a gain."""
    if faster > 0 and better == 0 and gain.low is not None and gain.low < -MARGIN_ACCURACY:
        yield f"a loss of up to {number(-gain.low, 'points').removeprefix('+')} points is not excluded"
    if better > 0 and faster == 0 and speed.low is not None and speed.low < MARGIN_SPEED:
        yield f"a speed-up as low as {number(speed.low, 'ratio')} is not excluded"


def _unequal_budget(group: Group, arm: Arm) -> Iterable[str]:
    baseline = group.baseline_of(arm)
    own, other = arm.values.get("recipe.epochs"), baseline.values.get("recipe.epochs") if baseline else None
    if own != other:
        yield f"not the same budget: {own} epochs against the baseline's {other}"
    if baseline and arm.workers != baseline.workers:
        used, least = (estimate(group.device_seconds(a), "seconds") for a in (arm, baseline))
        yield (
            f"not the same hardware: {arm.workers} devices side by side against the baseline's {baseline.workers}, "
            f"{used} device-seconds against {least}"
        )


def _ended_badly(arm: Arm) -> Iterable[str]:
    """Runs that were meant to be measured and did not finish, by what became of them."""
    counts = arm.tried["status"].value_counts()
    for status in ("failed", "diverged", "stopped"):
        if status in counts:
            yield f"{counts[status]} of {len(arm.tried)} runs {status}"


def _lost_share(arm: Arm | None) -> float:
    if arm is None or arm.tried.empty:
        return 0.0
    return sum(status in ("failed", "diverged") for status in arm.tried["status"]) / len(arm.tried)


def _unseen(effects: tuple[Effect, Effect]) -> str:
    """What so many pairs would probably have missed."""
    speed, gain = effects[0].detectable, effects[1].detectable
    if speed is None or gain is None:
        return ""
    return (
        f"; with {effects[1].estimate.n} pairs a speed-up below {number(speed, 'ratio')} or a difference below "
        f"{number(gain, 'points').removeprefix('+')} points would mostly go unseen"
    )


def sign(estimate: Estimate, neutral: float) -> Sign:
    """On which side of `neutral` the whole interval lies; 0 where it contains it or there is none."""
    if estimate.low is None or estimate.high is None:
        return 0
    return 1 if estimate.low > neutral else -1 if estimate.high < neutral else 0


def _speed_words(speed: Estimate, faster: int) -> str:
    words = {1: "faster", 0: "no clear difference in training time", -1: "slower"}[faster]
    return f"{words} (speed-up {estimate(speed, 'ratio')})"


def _gain_words(gain: Estimate, better: int) -> str:
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
    if not group.candidates and group.ablated is not None:
        return "Only ablations were run: their tables show what each part brings."
    if not group.candidates and _shared(group):
        return (
            "Nothing can be said: other programs used the device beside every measured run, so that no time can be "
            "compared. Measure again, in a new folder, when the machine is quiet."
        )
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
        return _use(group, winners, decided)
    trades = [c for c in decided if c.verdict == "trade-off"]
    base = baselines[0].name
    open_ones = ", ".join(c.arm.name for c in comparisons if c.verdict == "not enough data")
    unjudged = f" Not enough data to judge {open_ones}." if open_ones else ""
    if trades:
        listed = "; ".join(f"{c.arm.name}: {c.sentence}" for c in trades)
        return f"Stay with {base} unless the trade suits you. {listed}.{unjudged}"
    if any(c.verdict == "undecided" for c in decided):
        return f"Stay with {base}: no method is shown to be faster or more accurate.{unjudged}"
    return f"Stay with {base}: every method that could be judged is worse.{unjudged}"


def _use(group: Group, winners: list[Comparison], decided: list[Comparison]) -> str:
    """The fastest winner, the most accurate where it is another, and what is more accurate at a price."""
    fastest = max(winners, key=lambda c: (c.speed.value or 0, c.gain.value or 0))
    finest = max((c for c in winners if c.better > 0), key=lambda c: c.gain.value or 0, default=fastest)
    text = f"Use {fastest.arm.name}. Against {_name(group, fastest)}: {fastest.sentence}."
    if finest is not fastest:
        text = (
            f"Use {fastest.arm.name} (fastest) or {finest.arm.name} (most accurate). Against {_name(group, fastest)}, "
            f"{fastest.arm.name}: {fastest.sentence}; {finest.arm.name}: {finest.sentence}."
        )
    known = finest.gain.value or 0 if finest.better > 0 else 0
    dearer = [c for c in decided if c.verdict == "trade-off" and c.better > 0 and (c.gain.value or 0) > known]
    if dearer:
        dearer.sort(key=lambda c: -(c.gain.value or 0))
        listed = ", ".join(
            f"{c.arm.name} ({number(c.gain.value or 0, 'points')} points at a speed-up of "
            f"{number(c.speed.value or 0, 'ratio')})"
            for c in dearer
        )
        text += f" More accurate, at a price: {listed}."
    return text


def _name(group: Group, comparison: Comparison) -> str:
    baseline = group.baseline_of(comparison.arm)
    return baseline.name if baseline else "the baseline"


def _basis(group: Group, baselines: list[Arm]) -> str:
    seeds = f"{len(group.seeds)} seed{'' if len(group.seeds) == 1 else 's'}"
    text = f"Measured {'alone ' if group.seeds else ''}on {group.hardware}, {seeds}."
    for arm in baselines[:1]:
        accuracy, seconds = group.accuracy(arm), group.seconds(arm)
        if accuracy.value is not None and seconds.value is not None:
            text += (
                f" The baseline {arm.name} reaches {estimate(accuracy, 'percent')} % {group.accuracy_name} "
                f"in {estimate(seconds, 'seconds')} s of training{_of_fewer(group, arm)}."
            )
    return text


def _of_fewer(group: Group, arm: Arm) -> str:
    return f" (with {arm.n} of the seeds)" if arm.n < len(group.seeds) else ""


def _notes(group: Group, comparisons: Iterable[Comparison]) -> Iterable[str]:
    """What a careful reader should know before acting on the verdicts."""
    comparisons = list(comparisons)
    if shared := _shared(group):
        finished = shared + sum(arm.n for arm in group.arms)
        yield (
            f"Other programs used the device beside {shared} of {finished} finished measured runs: these are left out "
            "here and listed as contaminated. Measure again on a quiet machine."
        )
    if warning := code_warning(group):
        yield warning
    for c in comparisons:
        if c.verdict in ("wins", "trade-off") and (note := _control_note(group, c)):
            yield note
    uncertain = [n for n, (on, p) in front(group).items() if on and p < 0.95]
    if uncertain:
        yield f"On the front, but with a probability below 95 % given the seeds: {', '.join(uncertain)}."
    decided = [c for c in comparisons if c.verdict != "not enough data"]
    fewest = min((min(c.speed.n, c.gain.n) for c in decided), default=CLAIM_SEEDS)
    if fewest < CLAIM_SEEDS:
        covers = f"{100 * (1 - 2.0 ** (1 - fewest)):.0f} %"
        yield (
            f"With {fewest} seeds this is a first impression; claim nothing below {CLAIM_SEEDS}. Intervals of median "
            f"times then cover the truth in {covers} instead of 95 %; those of accuracies, differences and "
            "speed-ups keep their 95 %."
        )
    if len(decided) > 1:
        yield (
            f"The verdicts are corrected for comparing {len(decided)} methods in time and accuracy (Holm); the "
            "95 % intervals in brackets are not, so one may exclude no effect where the verdict does not call it."
        )


def _shared(group: Group) -> int:
    """Finished runs that were not alone on their device."""
    return sum(arm.shared for arm in group.arms)


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
