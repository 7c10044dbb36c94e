"""One sentence over several tasks: in how many each method wins or loses, and its mean speed-up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from analysis.measured import Group
from analysis.profiles import geometric_mean
from analysis.statistics import Estimate
from analysis.summary import Answer, Comparison
from analysis.table import estimate

_WORDS = {
    "wins": "wins in {}",
    "trade-off": "a trade-off in {}",
    "undecided": "undecided in {}",
    "loses": "loses in {}",
    "not enough data": "too little data in {}",
}


def across_sentence(found: Sequence[tuple[Group, Answer]]) -> str:
    """What the verdicts of several sections come to; empty below two sections or without a comparison.

    The verdicts are those of the sections, each corrected within its own. A method is an arm of the sweep files; of
    several settings in one section the best counts, which is said.
    """
    methods: dict[str, list[list[Comparison]]] = {}
    for _, answer in found:
        own: dict[str, list[Comparison]] = {}
        for comparison in answer.comparisons:
            own.setdefault(comparison.arm.arm, []).append(comparison)
        for name, settings in own.items():
            methods.setdefault(name, []).append(settings)
    if len(found) < 2 or not methods:
        return ""
    tasks = {group.title.partition(" — ")[0] for group, _ in found}
    over = f"{len(found)} tasks" if len(tasks) == len(found) else f"{len(found)} pairs of task and hardware"
    said = {name: _words(own, len(found)) for name, own in sorted(methods.items(), key=lambda item: _rank(item[1]))}
    return f"Over {over}: {'; '.join(f'{name} {words}' for name, words in said.items())}."


def _verdicts(own: list[list[Comparison]]) -> Counter[str]:
    """How often which verdict is the best of a section."""
    order = list(_WORDS)
    return Counter(min((c.verdict for c in settings), key=order.index) for settings in own)


def _rank(own: list[list[Comparison]]) -> tuple[int, int, int]:
    """Wins first, then losses last."""
    counts = _verdicts(own)
    return -counts["wins"], counts["loses"], -counts["trade-off"]


def _words(own: list[list[Comparison]], sections: int) -> str:
    counts = _verdicts(own)
    said = ", ".join(words.format(counts[verdict]) for verdict, words in _WORDS.items() if verdict in counts)
    said += f", not measured in {sections - len(own)}" if len(own) < sections else ""
    if any(len(settings) > 1 for settings in own):
        return f"{said} (the best of its settings)"
    mean = geometric_mean([c.speed for (c,) in own]) if len(own) == sections else Estimate()
    return f"{said} (mean speed-up {estimate(mean, 'ratio')})" if mean.value is not None else said
